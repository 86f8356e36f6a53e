"""The mixer, the scan, the norm and the prompt as ops: gradients, what is asked for, shapes.

The kernels are the reference's own (oracle_kernels.py), in float64: what is tested is how the ops
compose them. Tolerance 1e-12: float64 rounding over a few hundred additions.
"""

import itertools

import pytest
import torch

from svp_peft import ops
from svp_peft.ops import backends, mixer_op, prompt_op, reference
from svp_peft.ops.types import MixerWeights
from tests.ops import oracle_kernels

D_MODEL, D_INNER, D_STATE, DT_RANK, WIDTH = 6, 10, 4, 3, 4
KINDS = {"none": (1, 1), "v1": (1, 2), "v2": (2, 2)}


@pytest.fixture(autouse=True)
def _oracle_backend(monkeypatch):
    monkeypatch.setitem(backends._loaded, "cpu", oracle_kernels)
    monkeypatch.setitem(backends._DTYPES, "cpu", (torch.float32, torch.float64))


def mixer_weights(kind: str, bias: bool = True) -> MixerWeights:
    convs, scans = KINDS[kind]

    def draw(*shape: int) -> torch.Tensor:
        return (0.4 * torch.randn(*shape, dtype=torch.float64)).requires_grad_()

    def several(count: int, *shape: int) -> tuple[torch.Tensor, ...]:
        return tuple(draw(*shape) for _ in range(count))

    return MixerWeights(
        in_proj_weight=draw(2 * D_INNER, D_MODEL),
        in_proj_bias=draw(2 * D_INNER) if bias else None,
        conv_weight=several(convs, D_INNER, WIDTH),
        conv_bias=several(convs, D_INNER) if bias else None,
        x_proj_weight=several(convs, DT_RANK + 2 * D_STATE, D_INNER),
        dt_weight=several(convs, D_INNER, DT_RANK),
        dt_bias=several(convs, D_INNER),
        A_log=several(scans, D_INNER, D_STATE),
        D=several(convs, D_INNER),
        out_proj_weight=draw(D_MODEL, D_INNER),
        out_proj_bias=draw(D_MODEL) if bias else None,
    )


def named_leaves(hidden: torch.Tensor, weights: MixerWeights) -> dict[str, torch.Tensor]:
    leaves = {"hidden": hidden}
    for name, field in weights._asdict().items():
        if isinstance(field, tuple):
            leaves |= {f"{name}.{k}": t for k, t in enumerate(field)}
        elif field is not None:
            leaves[name] = field
    return leaves


def gradients(out: torch.Tensor, leaves: dict[str, torch.Tensor], cotangent: torch.Tensor):
    wanted = {name: t for name, t in leaves.items() if t.requires_grad}
    return dict(
        zip(wanted, torch.autograd.grad(out, list(wanted.values()), cotangent), strict=True)
    )


@pytest.mark.parametrize("keep_everything", [0, 10**9], ids=["recompute", "keep"])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_mixer_equals_the_reference_with_every_gradient(kind, bias, keep_everything, monkeypatch):
    monkeypatch.setitem(mixer_op._KEEP_EVERYTHING, "cpu", keep_everything)
    torch.manual_seed(0)
    hidden = torch.randn(2, 7, D_MODEL, dtype=torch.float64, requires_grad=True)
    weights = mixer_weights(kind, bias)
    cotangent = torch.randn(2, 7, D_MODEL, dtype=torch.float64)
    leaves = named_leaves(hidden, weights)
    expected_out = reference.mixer(hidden, weights, scale=0.5)
    out = ops.mixer(hidden, weights, scale=0.5, backend="cpu")
    torch.testing.assert_close(out, expected_out, rtol=1e-12, atol=1e-12)
    expected = gradients(expected_out, leaves, cotangent)
    found = gradients(out, leaves, cotangent)
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], rtol=1e-11, atol=1e-12, msg=name)


def test_mixer_gradients_can_be_asked_for_one_by_one():
    torch.manual_seed(1)
    weights = mixer_weights("v2")
    hidden = torch.randn(1, 5, D_MODEL, dtype=torch.float64, requires_grad=True)
    cotangent = torch.randn(1, 5, D_MODEL, dtype=torch.float64)
    leaves = named_leaves(hidden, weights)
    expected = gradients(reference.mixer(hidden, weights, scale=1.0), leaves, cotangent)
    for name in leaves:
        for other in leaves.values():
            other.requires_grad_(False)
        leaves[name].requires_grad_(True)
        out = ops.mixer(hidden, weights, backend="cpu")
        (found,) = gradients(out, leaves, cotangent).values()
        torch.testing.assert_close(found, expected[name], rtol=1e-11, atol=1e-12, msg=name)


def test_mixer_of_a_frozen_backbone_asks_the_kernels_for_no_weight_gradient(monkeypatch):
    asked = []
    original = oracle_kernels.scan_backward

    def spy(*args, need, **kwargs):
        asked.append(need)
        return original(*args, need=need, **kwargs)

    monkeypatch.setattr(oracle_kernels, "scan_backward", spy)
    weights = mixer_weights("v2")
    for field in named_leaves(torch.zeros(1), weights).values():
        field.requires_grad_(False)
    hidden = torch.randn(1, 5, D_MODEL, dtype=torch.float64, requires_grad=True)
    ops.mixer(hidden, weights, backend="cpu").sum().backward()
    assert asked == [(True, True, True, True, True, False, False, False, False)]


def test_mixer_saves_nothing_without_gradients():
    hidden = torch.randn(1, 5, D_MODEL, dtype=torch.float64)
    weights = mixer_weights("v2")
    with torch.no_grad():
        assert not ops.mixer(hidden, weights, backend="cpu").requires_grad


@pytest.mark.parametrize(
    ("gate", "skip", "bias", "softplus", "reverse"),
    list(itertools.product([True, False], repeat=5)),
)
def test_selective_scan_equals_the_reference_with_every_gradient(
    gate, skip, bias, softplus, reverse
):
    torch.manual_seed(2)

    def leaf(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, dtype=torch.float64, requires_grad=True)

    u, delta = leaf(2, 5, 9), leaf(2, 5, 9)
    A = (-torch.rand(5, 3, dtype=torch.float64) - 0.1).requires_grad_()
    B, C = leaf(2, 3, 9), leaf(2, 3, 9)
    D = leaf(5) if skip else None
    z = leaf(2, 5, 9) if gate else None
    delta_bias = leaf(5) if bias else None
    arguments = (u, delta, A, B, C, D, z, delta_bias)
    leaves = {str(i): t for i, t in enumerate(arguments) if t is not None}
    cotangent = torch.randn(2, 5, 9, dtype=torch.float64)
    results = []
    for backend in ("reference", "cpu"):
        out = ops.selective_scan(
            *arguments, delta_softplus=softplus, reverse=reverse, backend=backend
        )
        results.append((out, gradients(out, leaves, cotangent)))
    (expected_out, expected), (out, found) = results
    torch.testing.assert_close(out, expected_out, rtol=1e-12, atol=1e-12)
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], rtol=1e-11, atol=1e-12)


def test_selective_scan_reversed_is_the_scan_of_the_flipped_sequence():
    torch.manual_seed(3)
    u, delta, z = (torch.randn(2, 5, 6, dtype=torch.float64) for _ in range(3))
    B, C = (torch.randn(2, 3, 6, dtype=torch.float64) for _ in range(2))
    A = -torch.rand(5, 3, dtype=torch.float64)
    backwards = ops.selective_scan(u, delta, A, B, C, z=z, reverse=True)
    flipped = [t.flip(-1) for t in (u, delta, B, C, z)]
    forwards = ops.selective_scan(flipped[0], flipped[1], A, *flipped[2:4], z=flipped[4])
    torch.testing.assert_close(backwards, forwards.flip(-1), rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("rms", [True, False])
@pytest.mark.parametrize("with_residual", [True, False])
def test_add_norm_equals_the_reference_with_every_gradient(rms, with_residual):
    torch.manual_seed(4)

    def leaf(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, dtype=torch.float64, requires_grad=True)

    hidden, weight, bias = leaf(2, 5, 8), leaf(8), None if rms else leaf(8)
    residual = leaf(2, 5, 8) if with_residual else None
    leaves = {"hidden": hidden, "residual": residual, "weight": weight, "bias": bias}
    leaves = {name: t for name, t in leaves.items() if t is not None}
    results = []
    for backend in ("reference", "cpu"):
        y, total = ops.add_norm(hidden, residual, weight, bias, rms=rms, backend=backend)
        loss = (y * torch.linspace(-1, 1, 8, dtype=torch.float64)).sum() + total.square().sum()
        results.append(
            (
                y,
                total,
                dict(zip(leaves, torch.autograd.grad(loss, list(leaves.values())), strict=True)),
            )
        )
    (y0, total0, expected), (y, total, found) = results
    torch.testing.assert_close(y, y0, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(total, total0, rtol=0, atol=0)
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], rtol=1e-11, atol=1e-12, msg=name)


@pytest.mark.parametrize("keep", [0, 10**9], ids=["recompute", "keep"])
@pytest.mark.parametrize("skip", [(), (2,), (0, 4)])
def test_prompt_equals_the_formula_with_every_gradient(skip, keep, monkeypatch):
    monkeypatch.setattr(prompt_op, "KEEP_PRE_ACTIVATIONS", keep)
    torch.manual_seed(5)

    def leaf(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, dtype=torch.float64, requires_grad=True)

    x = leaf(2, 5, 8)
    tensors = (leaf(8, 8), leaf(8), leaf(3, 8), leaf(3), leaf(8, 3), leaf(8), leaf(8), leaf(8))
    W, b, D, c, U, d, alpha, beta = tensors
    silu = torch.nn.functional.silu
    expected_out = x + alpha * silu(x @ W.T + b) + beta * silu((x @ D.T + c) @ U.T + d)
    keep_mask = torch.ones(5, dtype=torch.bool)
    keep_mask[list(skip)] = False
    expected_out = torch.where(keep_mask[:, None], expected_out, x)
    leaves = {str(i): t for i, t in enumerate((x, *tensors))}
    cotangent = torch.randn(2, 5, 8, dtype=torch.float64)
    expected = gradients(expected_out, leaves, cotangent)
    for backend in ("reference", "cpu"):
        out = ops.svp_prompt(x, *tensors, skip=skip, backend=backend)
        torch.testing.assert_close(out, expected_out, rtol=1e-12, atol=1e-12)
        found = gradients(out, leaves, cotangent)
        for name in expected:
            torch.testing.assert_close(found[name], expected[name], rtol=1e-11, atol=1e-12)


def test_prompt_is_the_identity_at_zero_scales():
    x = torch.randn(2, 5, 8)
    tensors = [torch.randn(8, 8), torch.randn(8), torch.randn(3, 8), torch.randn(3)]
    tensors += [torch.randn(8, 3), torch.randn(8), torch.zeros(8), torch.zeros(8)]
    assert torch.equal(ops.svp_prompt(x, *tensors, skip=(2,), backend="reference"), x)
