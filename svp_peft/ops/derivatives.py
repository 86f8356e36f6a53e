"""Which derivatives the kernels have."""

import torch

from svp_peft.errors import BackendError


def refuse_second() -> None:
    """Raise in a backward pass whose result is to be differentiated again.

    Kernels are invisible to autograd, which would take their results for constants. Raising only
    when they are differentiated is not enough: a sum of a kernel's gradient and another path would
    lose the kernel's part in silence.

    Raises:
        BackendError: the backward pass was started with create_graph=True.
    """
    if torch.is_grad_enabled():
        raise BackendError(
            "create_graph=True asks for gradients that can be differentiated again, and the "
            "kernels have first derivatives only. Leave create_graph out."
        )
