"""What the ops refuse instead of computing something else."""

import pytest
import torch
from torch import nn

from svp_peft import ops
from svp_peft.errors import BackendError, InputError
from svp_peft.vim.mixer import VimMixer


def scan_inputs() -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    draw = torch.randn
    return {
        "u": draw(1, 4, 5),
        "delta": draw(1, 4, 5),
        "A": -torch.rand(4, 3),
        "B": draw(1, 3, 5),
        "C": draw(1, 3, 5),
        "D": draw(4),
    }


@pytest.mark.parametrize("name", ["u", "delta", "A", "B", "C", "D"])
@pytest.mark.parametrize("dtype", [torch.complex64, torch.int64])
def test_selective_scan_takes_real_floating_point_tensors_only(
    name: str, dtype: torch.dtype
) -> None:
    inputs = scan_inputs()
    inputs[name] = inputs[name].to(dtype)
    with pytest.raises(InputError, match=f"{name} is {str(dtype).removeprefix('torch.')}"):
        ops.selective_scan(**inputs)


def one_call(name: str, backend: str, x: torch.Tensor) -> torch.Tensor:
    torch.manual_seed(1)
    width = x.shape[-1]
    if name == "scan":
        return ops.selective_scan(**(scan_inputs() | {"u": x[..., :4].mT}), backend=backend)
    if name == "norm":
        return ops.add_norm(x, None, torch.ones(width), None, backend=backend)[0]
    if name == "prompt":
        cross, down, up = nn.Linear(width, width), nn.Linear(width, 2), nn.Linear(2, width)
        weights = [p for layer in (cross, down, up) for p in layer.parameters()]
        scales = torch.ones(width), torch.ones(width)
        return ops.svp_prompt(x, *weights, *scales, backend=backend)
    weights = VimMixer(width, d_state=4, bimamba_type="v2")._weights()
    return ops.mixer(x, weights, backend=backend)


@pytest.mark.parametrize("name", ["mixer", "norm", "prompt"])
def test_a_second_derivative_of_a_kernel_is_refused_and_never_a_wrong_number(name: str) -> None:
    x = torch.randn(1, 5, 8, requires_grad=True)
    # a residual path of which the second derivative could be had
    loss = (x + one_call(name, "cpu", x)).square().sum()
    torch.autograd.grad(loss, x, retain_graph=True)
    with pytest.raises(BackendError, match="create_graph=True"):
        torch.autograd.grad(loss, x, create_graph=True)


@pytest.mark.parametrize("name", ["scan", "mixer"])
def test_a_second_derivative_of_the_reference_scan_is_refused(name: str) -> None:
    x = torch.randn(1, 5, 8, requires_grad=True)
    loss = one_call(name, "reference", x).square().sum()
    (first,) = torch.autograd.grad(loss, x, create_graph=True)
    with pytest.raises(RuntimeError, match="no autograd formula"):
        torch.autograd.grad(first.square().sum(), x)


def prompt_weights(width: int = 8) -> list[torch.Tensor]:
    layers = nn.Linear(width, width), nn.Linear(width, 2), nn.Linear(2, width)
    return [p for layer in layers for p in layer.parameters()]


def scan_once(**changes: list[torch.Tensor]) -> torch.Tensor:
    rows = WIDE[..., :3]
    given = {"u": [WIDE], "dt": [WIDE], "B": [rows], "C": [rows], "A_log": [torch.ones(8, 3)]}
    absent = dict.fromkeys(("z", "D", "dt_weight", "dt_bias"))
    return ops.scan(**(given | absent | changes), reverse=[False])[0]


WIDE, NARROW, SCALE = torch.randn(2, 5, 8), torch.randn(1, 5, 8), torch.randn(8)
MISFITS = {
    "weight of a norm": (lambda: ops.add_norm(WIDE, None, torch.ones(4), None), "weight"),
    "bias of a norm": (lambda: ops.add_norm(WIDE, None, SCALE, torch.ones(4)), "bias"),
    "residual": (lambda: ops.add_norm(WIDE, NARROW, SCALE, None), "residual"),
    "alpha": (lambda: ops.svp_prompt(WIDE, *prompt_weights(), SCALE[:4], SCALE), "alpha"),
    "beta": (lambda: ops.svp_prompt(WIDE, *prompt_weights(), SCALE, SCALE[:4]), "beta"),
    "class token": (
        lambda: ops.svp_prompt(WIDE, *prompt_weights(), SCALE, SCALE, skip=(5,)),
        r"skip is \(5,\)",
    ),
    "taps": (lambda: ops.conv_silu(WIDE, [torch.ones(4, 3)], None, [False]), "weight"),
    "taps of one direction": (
        lambda: ops.conv_silu(WIDE, [torch.ones(8, 3)], None, [False, True]),
        "weight has 1 tensors for 2 directions",
    ),
    "C": (lambda: scan_once(C=[NARROW[..., :3]]), "C has shape"),
    "A_log": (lambda: scan_once(A_log=[torch.ones(4, 3)]), "A_log has shape"),
}


@pytest.mark.parametrize("case", MISFITS)
@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_a_shape_that_does_not_fit_is_refused_before_a_kernel_reads_beyond_it(
    case: str, backend: str
) -> None:
    call, message = MISFITS[case]
    before = ops.get_backend()
    ops.set_backend(backend)
    try:
        with pytest.raises(InputError, match=message):
            call()
    finally:
        ops.set_backend(before)


def test_what_fits_is_computed() -> None:
    assert scan_once().shape == WIDE.shape
    assert ops.svp_prompt(WIDE, *prompt_weights(), SCALE, SCALE, skip=(0, 4)).shape == WIDE.shape
    assert ops.add_norm(WIDE, WIDE, SCALE, SCALE)[0].shape == WIDE.shape
