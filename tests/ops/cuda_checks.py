"""Each CUDA kernel against the reference in float64, on a GPU or on its emulation.

Bounds on ||found - truth|| / ||truth||:

    float32   the special function unit's exp has 2 ulp (2e-7), and recurrences add such errors up
    bfloat16  one rounding of a result is 1.7e-3; y of the first half of a sequence is rounded too
    float16   an eighth of bfloat16's
"""

import copy
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from svp_peft.config import SVPConfig
from svp_peft.grouped import GroupedPrompts
from svp_peft.ops import cuda, reference
from svp_peft.ops.cuda.prompter_copies import Copies
from svp_peft.ops.cuda.stack_kernels import StackKernels
from svp_peft.ops.types import Cache, FrozenBlock, PromptWeights, ScanGrads, ScanNeeds
from svp_peft.prompters import SVPAdapter
from tests.ops.cuda_cases import (
    EVERY_GRADIENT,
    Case,
    error,
    map_tensors,
    scan_case,
    scan_truth,
)

OUTPUT_BOUND = {torch.float32: 3e-6, torch.bfloat16: 4e-3, torch.float16: 5e-4}
GRADIENT_BOUND = {torch.float32: 1e-5, torch.bfloat16: 6e-3, torch.float16: 8e-4}

# what makes a random case a hard one, in place
STRESS: dict[str, Callable[[Case], object]] = {
    "gradient at one token": lambda c: c.grad_out.mul_(
        (torch.arange(c.grad_out.shape[1], device=c.grad_out.device) == 98)[:, None]
    ),
    "gradients from 1e-2 to 1e2": lambda c: c.grad_out.mul_(
        10 ** (4 * torch.rand_like(c.grad_out[:1, :, :1], dtype=torch.float32) - 2)
    ),
    "gradients of 1e-6": lambda c: c.grad_out.mul_(1e-6),
    "one token 1000 times larger": lambda c: c.arguments[0][0][:, 50].mul_(1000),
}


def check_forward(case: Case, alone: bool = True) -> None:
    """`alone`: also without y, which takes another kernel."""
    out, y = cuda.scan(*case.arguments, **case.options, save_y=True)
    true_out, true_y = reference.scan(
        *map_tensors(case.arguments, torch.Tensor.double), **case.options
    )
    bound = OUTPUT_BOUND[out.dtype]
    assert y is not None
    assert error(out, true_out) < bound
    assert error(y, true_y) < bound
    if alone:
        again, nothing = cuda.scan(*case.arguments, **case.options, save_y=False)
        assert nothing is None
        assert torch.equal(again, out)


def backward(case: Case, need: ScanNeeds, y: Tensor | None = None) -> ScanGrads:
    first, rest = case.arguments[:5], case.arguments[5:]
    return cuda.scan_backward(case.grad_out, *first, y, *rest, **case.options, need=need)


def check_backward(case: Case, need: ScanNeeds = EVERY_GRADIENT, factor: float = 1.0) -> None:
    found = backward(case, need)._asdict()
    _, _, truth = scan_truth(case)
    bound = factor * GRADIENT_BOUND[case.grad_out.dtype]
    for name, expected in truth.items():
        wanted = getattr(need, name[1:]) and expected is not None
        got = found[name]
        assert (got is not None) == wanted, name
        if not wanted:
            continue
        pairs = (
            zip(got, expected, strict=True) if isinstance(expected, tuple) else ((got, expected),)
        )
        for k, (g, e) in enumerate(pairs):
            if not e.any():  # dA of a single token: sums of rounding errors of numbers up to 1e3
                assert g.abs().max() < 1e-3, name
                continue
            assert error(g, e) < bound, f"{name} of direction {k}: {error(g, e):.1e}"


def check_views(device: str) -> None:
    """Gradients are written into the views that are given, and nowhere else."""
    case = scan_case(2, 21, 64, 16, 8, torch.bfloat16, device)
    xz = torch.full((2, 21, 128), float("nan"), device=device, dtype=torch.bfloat16)
    slabs = torch.full((2, 2, 21, 8 + 32), float("nan"), device=device, dtype=torch.bfloat16)
    first, rest = case.arguments[:5], case.arguments[5:]
    found = cuda.scan_backward(
        case.grad_out, *first, None, *rest, **case.options,
        dz_out=xz[..., 64:], dx_dbl_out=tuple(slabs), need=ScanNeeds(),
    )  # fmt: skip
    expected = backward(case, ScanNeeds())
    assert torch.equal(xz[..., 64:], expected.dz)
    assert xz[..., :64].isnan().all()
    for k in range(2):
        parts = (expected.ddt[k], expected.dB[k], expected.dC[k])
        assert torch.equal(slabs[k], torch.cat(parts, -1))
        assert found.dC[k].data_ptr() == slabs[k][..., 24:].data_ptr()


def check_convolution(
    shape: tuple[int, int, int], reverse: tuple[bool, ...], dtype: torch.dtype, device: str
) -> None:
    batch, length, channels = shape
    xz = torch.randn(batch, length, 2 * channels, device=device).to(dtype)
    x = xz[..., :channels]
    weight = tuple(torch.randn(channels, 4, device=device) for _ in reverse)
    bias = tuple(torch.randn(channels, device=device) for _ in reverse)
    grads = tuple(torch.randn(*shape, device=device).to(dtype) for _ in reverse)
    out = cuda.conv_silu(x, weight, bias, reverse)
    d_xz = torch.empty_like(xz)
    dx, dweight, dbias = cuda.conv_silu_backward(
        grads, x, weight, bias, reverse,
        dx_out=d_xz[..., :channels], need_x=True, need_weight=True, need_bias=True,
    )  # fmt: skip
    leaves = map_tensors((x, weight, bias), lambda t: t.double().requires_grad_())
    truth = reference.conv_silu(*leaves, reverse)
    flat = [leaves[0], *leaves[1], *leaves[2]]
    expected = torch.autograd.grad(truth, flat, [g.double() for g in grads])
    for k in range(len(reverse)):
        assert error(out[k], truth[k]) < OUTPUT_BOUND[dtype]
    assert dx is not None
    assert dx.data_ptr() == d_xz.data_ptr()
    for found, true in zip((dx, *dweight, *dbias), expected, strict=True):
        assert error(found, true) < GRADIENT_BOUND[dtype]


def check_norm(
    shape: tuple[int, int, int],
    first: bool,
    rms: bool,
    dtype: torch.dtype,
    device: str,
    dropping: bool = False,
) -> None:
    width = shape[-1]
    hidden = torch.randn(*shape, device=device).to(dtype)
    residual = None if first else torch.randn(*shape, device=device) * 3 + 1
    weight = torch.randn(width, device=device)
    bias = None if rms else torch.randn(width, device=device)
    options = {"eps": 1e-5, "rms": rms}
    # every other image is dropped
    keep = 1.25 * (torch.arange(shape[0], device=device) % 2).float() if dropping else None
    drop = {} if keep is None else {"mask": keep / 1.25, "mask_scale": 1.25}
    y, total = cuda.add_norm(
        hidden, residual, weight, bias, residual_dtype=torch.float32, **drop, **options
    )
    grads = [torch.randn(*shape, device=device).to(t.dtype) for t in (y, total)]
    found = cuda.add_norm_backward(
        *grads, total, weight, need_weight=True, need_bias=not rms, hidden_dtype=dtype,
        residual_in_dtype=None if first else torch.float32, **drop, **options,
    )  # fmt: skip
    given = (hidden, residual, weight, bias)
    leaves = map_tensors(given, lambda t: t.double().requires_grad_())
    entering = leaves[0] if keep is None else leaves[0] * keep.double()[:, None, None]
    truth = reference.add_norm(entering, *leaves[1:], residual_dtype=torch.float64, **options)
    flat = [leaf for leaf in leaves if leaf is not None]
    expected = iter(torch.autograd.grad(truth, flat, [g.double() for g in grads]))
    assert error(y, truth[0]) < OUTPUT_BOUND[dtype]
    assert error(total, truth[1]) < OUTPUT_BOUND[torch.float32]
    for gradient, leaf in zip(found, leaves, strict=True):
        assert (gradient is None) == (leaf is None)
        if gradient is not None:
            # width 1: LayerNorm's gradient is exactly zero there and relative errors mean nothing
            true = next(expected)
            assert error(gradient, true) < GRADIENT_BOUND[dtype] or true.norm() < 1e-6


def check_prompts(skip: tuple[int, ...], width: int, dtype: torch.dtype, device: str) -> None:
    shape = (4, 11, width)
    joint = torch.randn(4, 11, 2 * width, device=device).to(dtype)
    x = torch.randn(*shape, device=device).to(dtype)
    cross, inner = joint[..., :width], joint[..., width:] * 4
    alpha, beta = torch.randn(2, width, device=device)
    grad = torch.randn(*shape, device=device).to(dtype)
    for given in (
        (cross, inner, alpha, beta),
        (cross, None, alpha, None),
        (None, inner, None, beta),
    ):
        out = cuda.prompt(x, *given, skip)
        found = cuda.prompt_backward(grad, *given, skip)
        leaves = [None if t is None else t.double().requires_grad_() for t in given]
        truth = reference.prompt(x.double(), *leaves, skip)
        flat = [leaf for leaf in leaves if leaf is not None]
        expected = iter(torch.autograd.grad(truth, flat, grad.double()))
        assert error(out, truth) < OUTPUT_BOUND[dtype]
        assert torch.equal(out[:, list(skip)], x[:, list(skip)])
        for gradient, leaf in zip(found, leaves, strict=True):
            assert (gradient is None) == (leaf is None)
            if gradient is not None:
                assert error(gradient, next(expected)) < GRADIENT_BOUND[dtype]
    zero = torch.zeros(width, device=device)
    assert torch.equal(cuda.prompt(x, cross, inner, zero, zero, skip), x)


def check_prompt_up_norm(
    shape: tuple[int, int, int],
    bottleneck: int,
    rms: bool,
    dtype: torch.dtype,
    device: str,
    dropping: bool = False,
    keep: bool = True,
    shift: int = 0,
) -> None:
    """Prompts with their second product inside, drop, residual add and norm of one block.

    Args:
        shift: elements by which the norm's weight lies behind an aligned address.
    """
    batch, length, width = shape
    skip = (length // 2,)

    def numbers(*sizes: int, scale: float = 1.0) -> Tensor:
        return torch.randn(*sizes, device=device) * scale

    projections = (
        numbers(width, width), numbers(width), numbers(bottleneck, width), numbers(bottleneck),
        numbers(width, bottleneck, scale=bottleneck**-0.5), numbers(width),
    )  # fmt: skip
    alpha, beta = numbers(2, width), numbers(3, width)
    weight, bias = numbers(width + shift)[shift:], None if rms else numbers(width)
    prompt = PromptWeights(projections, alpha, 1, beta, 2, skip)
    without_mixer: Any = None
    block = FrozenBlock(without_mixer, Cache(), 1.0, weight, bias, 1e-5, rms, 0.0, prompt)
    x, residual = numbers(*shape).to(dtype), numbers(*shape) * 3 + 1
    # what lies behind [cross | middle] is not read
    joint = numbers(batch * length, width + bottleneck + 8).to(dtype)
    joint[:, width + bottleneck :] = float("nan")
    drop = (torch.arange(batch, device=device) % 2).float()
    mask = (drop.data_ptr(), 1.25) if dropping else (0, 1.0)
    (packed,) = Copies([projections], dtype).renewed()
    kernels = StackKernels(x, residual, [block])
    assert kernels.has_prompt_up_norm
    y, total, inner = kernels.prompt_up_norm(0, x, joint, packed, residual, mask, keep)

    cross, middle = joint[:, :width].double(), joint[:, width : width + bottleneck].double()
    true_inner = middle @ projections[4].to(dtype).double().t() + projections[5].to(dtype).double()
    prompted = reference.prompt(
        x.double(), cross.view(shape), true_inner.view(shape), alpha[1].double(),
        beta[2].double(), skip,
    )  # fmt: skip
    if dropping:
        prompted = prompted * (1.25 * drop.double()[:, None, None])
    norm = weight.double(), None if bias is None else bias.double()
    truth = reference.add_norm(
        prompted, residual.double(), *norm, eps=1e-5, rms=rms, residual_dtype=torch.float64
    )
    assert error(y, truth[0]) < OUTPUT_BOUND[dtype]
    assert error(total, truth[1]) < OUTPUT_BOUND[dtype]
    assert (inner is not None) == keep
    if inner is not None:
        assert error(inner, true_inner) < OUTPUT_BOUND[dtype]
        # behind the product nothing differs from the kernel that is given inner
        again = kernels.prompt_norm(0, x, joint, inner, residual, mask)
        assert torch.equal(y, again[0])
        assert torch.equal(total, again[1])


def check_grouped_prompts(repeat: int, width: int, dtype: torch.dtype, device: str) -> None:
    """A batch over three adapters, the last with one image, and two images without a prompt.

    Products are in the dtype of the weights, so that the sum alone is rounded to `dtype`.
    """
    adapters = {}
    for name in "abc":
        adapters[name] = SVPAdapter(width, 3, SVPConfig(inner_bottleneck=8)).to(device)
        for parameter in adapters[name].parameters():
            torch.nn.init.normal_(parameter, std=width**-0.5)
    owners = "ab.acba.b"
    groups = {name: [i for i, owner in enumerate(owners) if owner == name] for name in "abc"}
    prompts = GroupedPrompts(groups, len(owners))
    x = torch.randn(len(owners) * repeat, 7, width, device=device).to(dtype)

    def rows_of(owner: str) -> list[int]:
        owned = [i for i, other in enumerate(owners) if other == owner]
        return [i * repeat + k for i in owned for k in range(repeat)]

    with torch.no_grad():
        found = prompts(x, adapters, ("a", "b", "c"), 1, (3,))
        truth = x.double()
        for name, adapter in adapters.items():
            own = rows_of(name)
            cross, inner, alpha, beta = copy.deepcopy(adapter).double().parts(1)
            tokens = truth[own]
            before = F.linear(tokens, cross.weight, cross.bias), inner.up(inner.down(tokens))
            truth[own] = reference.prompt(tokens, *before, alpha, beta, (3,))
    # the prompts, which are rounded to x's dtype before they are activated, add to x's own error
    assert error(found, truth) < OUTPUT_BOUND[dtype]
    assert torch.equal(found[:, 3], x[:, 3])
    assert torch.equal(found[rows_of(".")], x[rows_of(".")])
