"""The bidirectional selective scan alone: our kernels beside those of other packages.

    python examples/benchmarks/scan_kernels.py [--output FILE.json] [--device cuda]

One block of Vim-Small (d_inner 768, d_state 16, 197 tokens), both directions, delta given in full,
no gate. Every contender gets the inputs in the layout that it wants, so no flip and no copy is
timed, and what it computes is compared with the float64 reference before it is timed. The backward
pass makes the gradients of u, delta, B and C.

    svp_peft            each backend that runs here
    mamba_ssm           selective_scan_fn, once per direction
    vmamba              selective_scan_cuda_oflex of VMamba, both directions in one call
    accelerated_scan    its first-order scans (warp: CUDA, needs nvcc; scalar: Triton; ref: PyTorch)
                        over exp(delta A) and delta B u: all states in memory, and the tokens
                        padded to a power of two as it demands

Packages that are not installed are named and left out.
"""

import argparse
import importlib
import json
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from svp_peft import ops

REVERSE = (False, True)


class Inputs(NamedTuple):
    """Of both directions: u, delta (batch, L, d_inner), B, C (batch, L, d_state); A, D and bias."""

    u: list[Tensor]
    delta: list[Tensor]
    B: list[Tensor]
    C: list[Tensor]
    A: list[Tensor]
    D: list[Tensor]
    bias: list[Tensor]


Contender = Callable[[Inputs], tuple[Callable[[], Tensor], list[Tensor]]]
"""Makes the call to time, which returns (batch, L, d_inner), and the tensors to differentiate."""


def random_inputs(batch: int, length: int, channels: int, states: int) -> Inputs:
    """Float64 tensors whose values bfloat16 can hold, with the rates and steps of a trained Vim."""
    draw = lambda *shape: [torch.randn(*shape).bfloat16().double() for _ in REVERSE]  # noqa: E731
    rates = -torch.arange(1, states + 1, dtype=torch.float64).repeat(channels, 1)
    return Inputs(
        u=draw(batch, length, channels),
        delta=draw(batch, length, channels),
        B=draw(batch, length, states),
        C=draw(batch, length, states),
        A=[rates, rates.clone()],
        D=draw(channels),
        bias=[d - 4 for d in draw(channels)],
    )


def place(inputs: Inputs, device: str, dtype: torch.dtype, exact: torch.dtype) -> Inputs:
    """Activations in `dtype`, parameters in `exact`, on the device."""
    pairs = zip(inputs, (dtype,) * 4 + (exact,) * 3, strict=True)
    return Inputs(*([t.to(device, kind) for t in group] for group, kind in pairs))


def leaves(*groups: Sequence[Tensor]) -> list[Tensor]:
    return [t.detach().requires_grad_() for group in groups for t in group]


def svp(backend: str) -> Contender:
    def prepare(x: Inputs) -> tuple[Callable[[], Tensor], list[Tensor]]:
        tensors = leaves(x.u, x.delta, x.B, x.C)
        u, delta, B, C = (tensors[i : i + 2] for i in range(0, 8, 2))

        def run() -> Tensor:
            return ops.scan(
                u, delta, B, C, None, x.A, x.D, None, x.bias,
                reverse=REVERSE, softplus=True, A_is_log=False, backend=backend,
            )[0]  # fmt: skip

        return run, tensors

    return prepare


def channels_first(group: Sequence[Tensor]) -> list[Tensor]:
    """(batch, width, L) of both directions, the second one flipped: what a forward scan takes."""
    return [
        (t.flip(1) if back else t).transpose(1, 2).contiguous()
        for t, back in zip(group, REVERSE, strict=True)
    ]


def both_directions(forwards: Tensor, backwards: Tensor) -> Tensor:
    """The sum as (batch, L, d_inner) of two (batch, d_inner, L), the second one flipped."""
    return (forwards + backwards.flip(2)).transpose(1, 2)


def mamba_ssm(x: Inputs) -> tuple[Callable[[], Tensor], list[Tensor]]:
    scan = importlib.import_module("mamba_ssm.ops.selective_scan_interface").selective_scan_fn
    tensors = leaves(*(channels_first(group) for group in (x.u, x.delta, x.B, x.C)))

    def run() -> Tensor:
        each = [
            scan(*(tensors[i + k] for i in (0, 2)), x.A[k], *(tensors[i + k] for i in (4, 6)),
                 x.D[k], None, x.bias[k], True)
            for k in range(2)
        ]  # fmt: skip
        return both_directions(*each)

    return run, tensors


class _Oflex(torch.autograd.Function):
    """VMamba's compiled scan, called as its csms6s.py does."""

    @staticmethod
    def forward(ctx, u, delta, A, B, C, D, bias):  # type: ignore[no-untyped-def]
        kernels = importlib.import_module("selective_scan_cuda_oflex")
        out, states, *_ = kernels.fwd(u, delta, A, B, C, D, bias, True, 1, True)
        ctx.save_for_backward(u, delta, A, B, C, D, bias, states)
        return out

    @staticmethod
    def backward(ctx, grad):  # type: ignore[no-untyped-def]
        kernels = importlib.import_module("selective_scan_cuda_oflex")
        *tensors, states = ctx.saved_tensors
        return tuple(kernels.bwd(*tensors, grad.contiguous(), states, True, 1)[:7])


def vmamba(x: Inputs) -> tuple[Callable[[], Tensor], list[Tensor]]:
    importlib.import_module("selective_scan_cuda_oflex")
    u, delta = (torch.cat(channels_first(group), 1) for group in (x.u, x.delta))
    B, C = (torch.stack(channels_first(group), 1) for group in (x.B, x.C))
    tensors = leaves([u, delta, B, C])
    A, D, bias = (torch.cat(group) for group in (x.A, x.D, x.bias))

    def run() -> Tensor:
        return both_directions(*_Oflex.apply(*tensors[:2], A, *tensors[2:], D, bias).chunk(2, 1))

    return run, tensors


def accelerated_scan(module: str) -> Contender:
    def prepare(x: Inputs) -> tuple[Callable[[], Tensor], list[Tensor]]:
        scan = importlib.import_module(f"accelerated_scan.{module}").scan
        tensors = leaves(*(channels_first(group) for group in (x.u, x.delta, x.B, x.C)))
        batch, channels, length = tensors[0].shape
        padding = (0, max(32, 1 << (length - 1).bit_length()) - length)

        def direction(k: int) -> Tensor:
            u, delta, B, C = (tensors[i + k].float() for i in (0, 2, 4, 6))
            step = F.softplus(delta + x.bias[k][:, None])
            gates = torch.exp(step[:, :, None] * x.A[k][:, :, None])  # (batch, d_inner, d_state, L)
            tokens = (step * u)[:, :, None] * B[:, None]
            states = scan(F.pad(gates.flatten(1, 2), padding), F.pad(tokens.flatten(1, 2), padding))
            states = states[..., :length].view(batch, channels, -1, length)
            return (states * C[:, None]).sum(2) + x.D[k][:, None] * u

        return lambda: both_directions(direction(0), direction(1)), tensors

    return prepare


def milliseconds(run: Callable[[], object], device: str, repeats: int) -> float:
    """Median of `repeats` runs after three to warm up."""
    times = []
    for index in range(repeats + 3):
        if device == "cuda":
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            run()
            end.record()
            end.synchronize()
            spent = begin.elapsed_time(end)
        else:
            start = time.perf_counter()
            run()
            spent = 1e3 * (time.perf_counter() - start)
        if index >= 3:
            times.append(spent)
    return statistics.median(times)


def compare(
    name: str, prepare: Contender, inputs: Inputs, truth: Tensor, repeats: int
) -> dict[str, object]:
    """A row: relative error, and milliseconds of the forward pass and of both."""
    device = inputs.u[0].device.type
    run, tensors = prepare(inputs)
    out = run()
    error = ((out.double() - truth).norm() / truth.norm()).item()
    grad = torch.ones_like(out)
    with torch.no_grad():
        forward = milliseconds(run, device, repeats)
    both = milliseconds(lambda: torch.autograd.grad(run(), tensors, grad), device, repeats)
    return {"what": name, "error": error, "forward_ms": forward, "both_ms": both}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8, 96])
    parser.add_argument("--length", type=int, default=197)
    parser.add_argument("--channels", type=int, default=768)
    parser.add_argument("--states", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=20)
    options = parser.parse_args()
    dtype = torch.bfloat16 if options.device == "cuda" else torch.float32
    backends = ("cuda", "triton") if options.device == "cuda" else ("cpu", "reference")
    contenders: dict[str, Contender] = {f"svp_peft, {name}": svp(name) for name in backends}
    contenders |= {"mamba_ssm": mamba_ssm, "vmamba": vmamba}
    for module in ("warp", "scalar") if options.device == "cuda" else ("ref",):
        contenders[f"accelerated_scan, {module}"] = accelerated_scan(module)
    rows = []
    for batch in options.batch:
        torch.manual_seed(0)
        exact = random_inputs(batch, options.length, options.channels, options.states)
        exact = place(exact, options.device, torch.float64, torch.float64)
        truth = svp("reference")(exact)[0]().detach()
        inputs = place(exact, options.device, dtype, torch.float32)
        for name, prepare in contenders.items():
            try:
                row = compare(name, prepare, inputs, truth, options.repeats)
            except Exception as error:  # whatever another package's build or kernels raise
                print(f"{name}: left out: {str(error).partition(chr(10))[0]}", flush=True)
                continue
            rows.append({"batch": batch, **row})
            print(
                f"batch {batch:3d}  {name:20s} forward {row['forward_ms']:9.3f} ms  with backward "
                f"{row['both_ms']:9.3f} ms  error {row['error']:.1e}",
                flush=True,
            )
    if options.output is not None:
        options.output.parent.mkdir(parents=True, exist_ok=True)
        options.output.write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
