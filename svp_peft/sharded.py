"""Models whose tensors FSDP2 (`fully_shard`) has spread over several processes as DTensors.

Every function here but `is_sharded` and `refuse_sharded` is a collective for sharded tensors: all
processes must call it, in the same order.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from svp_peft.errors import InputError


def is_sharded(tensor: Tensor) -> bool:
    """Whether `tensor` is a DTensor."""
    # by its method: importing torch.distributed.tensor takes a while, and nobody else needs it
    return hasattr(type(tensor), "full_tensor")


def has_shards(model: nn.Module) -> bool:
    """Whether any parameter of `model` is a DTensor, or was before a forward pass gathered it."""
    managed = (m for m in model.modules() if any(c.__name__ == "FSDPModule" for c in type(m).mro()))
    return any(map(is_sharded, model.parameters())) or any(True for _ in managed)


def refuse_sharded(model: nn.Module, action: str) -> None:
    """Raise `InputError` if new parameters could no longer be sharded along with `model`."""
    if has_shards(model):
        raise InputError(
            f"{action} was called on a model that fully_shard has spread over several processes "
            "already: new parameters would stay whole, and nothing would keep their gradients "
            f"alike. Call {action} first and fully_shard then."
        )


def whole(tensor: Tensor) -> Tensor:
    """`tensor` with all of its values."""
    sharded: Any = tensor
    return sharded.full_tensor() if is_sharded(tensor) else tensor  # type: ignore[no-any-return]


def copy_values(target: Tensor, source: Tensor) -> None:
    """Overwrite the values of `target`, sharded or not, by those of a plain tensor."""
    if not is_sharded(target):
        target.copy_(source)
        return
    try:
        from torch.distributed.tensor import distribute_tensor
    except ImportError:  # torch 2.4
        from torch.distributed._tensor import distribute_tensor  # type: ignore[attr-defined]
    mesh: Any = target
    values = source.to(device=target.device, dtype=target.dtype)
    target.copy_(distribute_tensor(values, mesh.device_mesh, mesh.placements))
