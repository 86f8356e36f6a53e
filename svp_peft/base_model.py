"""What an adapter file remembers of the base model: its geometry and a fingerprint of its weights.

Both are functions of parameters by name, so that a model and a checkpoint file give the same.
"""

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from svp_peft.sharded import whole

_SAMPLES = 64


def base_arch(
    parameters: Mapping[str, Tensor],
    blocks: Sequence[str],
    widths: Sequence[int],
    class_tokens: str | Sequence[int],
) -> dict[str, Any]:
    """Geometry that an adapter depends on, as JSON values.

    Args:
        parameters: of the base model, by name.
        blocks: path of every block, in order.
        widths: token width at every block.
        class_tokens: as in `BackboneSpec`.

    Returns:
        `depth`, `d_model` (an int, or a list where widths differ), `class_tokens`,
        `block_parameters` (how many numbers all blocks hold) and, for a Mamba mixer in the first
        block, `d_inner`, `d_state`, `dt_rank` and `bimamba_type`.
    """
    inside = _inside(parameters, blocks)
    arch: dict[str, Any] = {
        "depth": len(blocks),
        "d_model": widths[0] if len(set(widths)) == 1 else list(widths),
        "class_tokens": class_tokens if isinstance(class_tokens, str) else list(class_tokens),
        "block_parameters": sum(tensor.numel() for tensor in inside.values()),
    }
    a_log, dt_proj = inside.get("0.mixer.A_log"), inside.get("0.mixer.dt_proj.weight")
    if a_log is not None and dt_proj is not None:
        backward = "v1" if "0.mixer.A_b_log" in inside else "none"
        arch |= {
            "d_inner": a_log.shape[0],
            "d_state": a_log.shape[1],
            "dt_rank": dt_proj.shape[1],
            "bimamba_type": "v2" if "0.mixer.conv1d_b.weight" in inside else backward,
        }
    return arch


def differences(found: Mapping[str, Any], needed: Mapping[str, Any]) -> list[str]:
    """What of the geometry `needed` by an adapter a model with the geometry `found` does not have,
    for messages that begin "does not fit this model, which has"."""
    return [
        f"{key} {found.get(key)!r} (the adapter needs {value!r})"
        for key, value in needed.items()
        if found.get(key) != value
    ]


def base_fingerprint(
    parameters: Mapping[str, Tensor], blocks: Sequence[str], exclude: Sequence[str] = ()
) -> str:
    """Text "sha256:..." over up to 64 evenly spaced numbers of every parameter in the blocks.

    The numbers are rounded to bfloat16 first: a base cast to bfloat16 keeps its fingerprint. The
    head, the position embedding and the patch embedding are left out, because they may be
    replaced or resized without another base.

    Args:
        parameters: of the base model, by name.
        blocks: path of every block, in order.
        exclude: paths of modules that adapters train a copy of (`modules_to_save`).
    """
    prefixes = tuple(f"{path}." for path in exclude)
    kept = {name: tensor for name, tensor in parameters.items() if not name.startswith(prefixes)}
    inside = sorted(_inside(kept, blocks).items())
    digest = hashlib.sha256()
    picked = []
    for name, tensor in inside:
        count = min(_SAMPLES, tensor.numel())
        index = torch.arange(count, device=tensor.device) * tensor.numel() // max(count, 1)
        picked.append(whole(tensor.detach()).reshape(-1)[index].to(torch.bfloat16))
        digest.update(f"{name}|{','.join(str(size) for size in tensor.shape)}\n".encode())
    if picked:
        # one transfer for all: some hundred small ones would take longer than the hash
        numbers = torch.cat([part.to(picked[0].device) for part in picked]).cpu()
        digest.update(bytes(numbers.view(torch.uint8).tolist()))
    return f"sha256:{digest.hexdigest()}"


def _inside(parameters: Mapping[str, Tensor], blocks: Sequence[str]) -> dict[str, Tensor]:
    """Parameters of the blocks, by "block index.name inside"."""
    indices = {path: index for index, path in enumerate(blocks)}
    found = {}
    for name, tensor in parameters.items():
        parts = name.split(".")
        for end in range(1, len(parts)):
            index = indices.get(".".join(parts[:end]))
            if index is not None:
                found[f"{index}.{'.'.join(parts[end:])}"] = tensor
                break
    return found
