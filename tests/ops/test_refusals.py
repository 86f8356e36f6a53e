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
