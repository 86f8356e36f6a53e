"""A small patched Vim run as one op and with its blocks called, for the tests of both."""

from collections.abc import Callable
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn

from svp_peft.vim import stack
from tests.ops.cuda_cases import error
from tests.ops.test_cuda_on_cpu_stack import on_cuda, small_vim  # noqa: F401

# of two computations in bfloat16, four blocks deep
TOLERANCE = 6e-2


def images(batch: int = 2) -> Tensor:
    torch.manual_seed(5)
    return torch.randn(batch, 3, 24, 24)


def logits_of(model: nn.Module, x: Tensor, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    with torch.autocast("cpu", dtype):
        return model(x)


def loss_of(logits: Tensor) -> Tensor:
    torch.manual_seed(7)
    return (logits.double() * torch.randn(logits.shape).double()).sum()


def gradients(model: nn.Module) -> dict[str, Tensor]:
    found = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


def called(model: nn.Module, run: Callable[[], Any]) -> dict[str, Tensor]:
    """The gradients of `run` where every block is called."""
    with mock.patch.object(stack, "run", return_value=None):
        run()
    return gradients(model)


def check(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    assert found
    for name, gradient in expected.items():
        assert error(found[name], gradient) < TOLERANCE, name


def step(model: nn.Module) -> None:
    loss_of(logits_of(model, images())).backward()


def runs_as_one(model: nn.Module, x: Tensor | None = None) -> bool:
    once, found = stack.run, []

    def noted(*arguments: Any) -> Any:
        found.append(once(*arguments))
        return found[-1]

    with torch.no_grad(), mock.patch.object(stack, "run", noted):
        logits_of(model, images() if x is None else x)
    return found[0] is not None
