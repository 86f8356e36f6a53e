"""Inputs, truth and comparisons for the tests of the C++ kernels.

Tolerances, as relative L2 error per tensor: 2e-6 for a few roundings of float32 (6e-8 each) added
up over at most 3,137 tokens; the kernels are at 1e-7 to 7e-7 in these tests. Where a test needs
another one it says why.
"""

import torch
from torch import Tensor

from svp_peft.ops import cpu, reference
from svp_peft.ops.types import ScanGrads, ScanNeeds

NAMES = ("u", "dt", "B", "C", "z", "A_log", "D", "dt_weight", "dt_bias")
ALL = ScanNeeds(*[True] * 9)


def relative(value: Tensor, truth: Tensor) -> float:
    error = (value.double() - truth.double()).norm()
    return (error / truth.double().norm().clamp_min(1e-30)).item()


def scan_inputs(
    batch: int, length: int, d_inner: int, d_state: int, dt_rank: int, directions: int = 2
) -> dict[str, list[Tensor]]:
    """Float64 tensors with float32 values, so that both sides see the same numbers."""

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape).double()

    def each(make, *shape: int) -> list[Tensor]:
        return [make(*shape) for _ in range(directions)]

    def rates() -> Tensor:
        integers = torch.arange(1, d_state + 1).float()
        return (torch.log(integers) + 0.1 * torch.randn(d_inner, d_state)).double()

    return {
        "u": each(draw, batch, length, d_inner),
        "dt": each(draw, batch, length, dt_rank),
        "B": each(draw, batch, length, d_state),
        "C": each(draw, batch, length, d_state),
        "z": [draw(batch, length, d_inner)],
        "A_log": each(rates),
        "D": each(draw, d_inner),
        "dt_weight": [0.3 * a for a in each(draw, d_inner, dt_rank)],
        "dt_bias": [a - 4.0 for a in each(draw, d_inner)],
    }  # fmt: skip


def single(inputs: dict[str, list[Tensor]]) -> dict[str, list[Tensor]]:
    return {name: [t.float() for t in group] for name, group in inputs.items()}


def arguments(inputs: dict[str, list[Tensor]]) -> list:
    """In the order of the signature; an empty group is an absent one, z is no tuple."""
    groups = [tuple(inputs[name]) or None for name in NAMES]
    groups[4] = groups[4] and groups[4][0]
    return groups


def options(inputs: dict[str, list[Tensor]], **changed) -> dict:
    reverse = (False, True)[: len(inputs["u"])]
    return {"reverse": reverse, "softplus": True, "scale": 0.5, "A_is_log": True} | changed


def truth(inputs: dict[str, list[Tensor]], grad: Tensor, **changed) -> tuple[Tensor, Tensor, dict]:
    """out, y and the gradients by name, all in float64."""
    leaves = {n: [t.clone().requires_grad_() for t in group] for n, group in inputs.items()}
    out, y = reference.scan(*arguments(leaves), **options(inputs, **changed))
    flat = [t for name in NAMES for t in leaves[name]]
    found = iter(torch.autograd.grad(out, flat, grad.double(), allow_unused=True))
    return out.detach(), y.detach(), {name: [next(found) for _ in leaves[name]] for name in NAMES}


def backward(
    inputs: dict[str, list[Tensor]], grad: Tensor, y: Tensor | None, need=ALL, **extra
) -> ScanGrads:
    values = arguments(inputs)
    settings = options(inputs) | extra
    return cpu.scan_backward(grad, *values[:5], y, *values[5:], need=need, **settings)


def assert_gradients(found: ScanGrads, expected: dict, limit: float = 2e-6) -> None:
    for name, group in zip(NAMES, found, strict=True):
        tensors = (group,) if isinstance(group, Tensor) else group or ()
        wanted = [t for t in expected[name] if t is not None]
        assert len(tensors) == len(wanted), name
        for value, true in zip(tensors, wanted, strict=True):
            assert value.dtype == torch.float32
            assert value.shape == true.shape, name
            assert relative(value, true) < limit or torch.equal(value, true.float()), name
