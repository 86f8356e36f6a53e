"""Base models from checkpoints: `load_vim`, and the published models by name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from svp_peft.errors import CheckpointError, InputError
from svp_peft.vim.arguments import pair
from svp_peft.vim.embedding import grid_of
from svp_peft.vim.files import Checkpoint
from svp_peft.vim.geometry import arguments_of, complete_arguments
from svp_peft.vim.model import VisionMamba
from svp_peft.vim.resize import resize_pos_embed
from svp_peft.vim.source import find_checkpoint

_LISTED = 8
"""Names printed in an error before the rest is counted."""


def load_vim(
    name_or_path: str | Path,
    *,
    num_classes: int | None = None,
    img_size: int | tuple[int, int] | None = None,
    filename: str | None = None,
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | Path | None = None,
    local_files_only: bool = False,
    base_img_size: int | tuple[int, int] | None = None,
    **arguments: Any,
) -> VisionMamba:
    """A pretrained Vision Mamba, in training mode and in single precision.

    Keys and shapes must fit exactly. Where no config is given the geometry comes from the tensors;
    see `complete_arguments` for what is assumed about the rest.

    Args:
        name_or_path: Hub repository ("hustvl/Vim-small-midclstok"), folder, or `.safetensors`,
            `.pth`, `.pt` or `.bin` file. Pickles are read without running code. A repository's
            checkpoint is also kept as a slim safetensors copy, so the second load is quick.
        num_classes: classes of the head. None keeps the checkpoint's head; another number than
            the checkpoint's puts a freshly initialised head in its place; 0 leaves it out.
        img_size: image size the model will see; position embeddings are interpolated to it.
        filename: which file of the repository or folder. None takes the only one, or the plain one
            beside fine-tuned variants ("..._ft_...").
        revision, token, cache_dir, local_files_only: as in huggingface_hub.
        base_img_size: image size of the checkpoint, where neither a config nor the number of
            position embeddings tells.
        arguments: constructor arguments of `VisionMamba` that the file does not tell or that do
            not change its tensors: drop_path_rate, use_middle_cls_token, if_divide_out, stride...

    Returns:
        The model, on the CPU.

    Raises:
        CheckpointError: missing, unexpected or misshapen tensors (they are named), a damaged or
            unsafe file, or no file that can be chosen.
        HubError: the Hub refused or cannot be reached.
        InputError: an unknown keyword, or an argument that cannot work, passed or in the config.
    """
    unknown = sorted(arguments.keys() - arguments_of(VisionMamba))
    if unknown:
        raise InputError(
            f"load_vim does not know {unknown}: besides its own options it takes the constructor "
            f"arguments of VisionMamba. Remove them."
        )
    checkpoint = find_checkpoint(
        name_or_path,
        filename=filename,
        revision=revision,
        token=token,
        cache_dir=cache_dir,
        local_files_only=local_files_only,
    )
    if base_img_size is not None:
        arguments["img_size"] = base_img_size
    return build_vim(checkpoint, num_classes=num_classes, img_size=img_size, arguments=arguments)


def build_vim(
    checkpoint: Checkpoint,
    *,
    num_classes: int | None = None,
    img_size: int | tuple[int, int] | None = None,
    arguments: dict[str, Any] | None = None,
) -> VisionMamba:
    """The model of a checkpoint that was read already; see `load_vim`."""
    options = dict(arguments or {})
    placement = {key: options.pop(key) for key in ("device", "dtype") if key in options}
    target = None if img_size is None else pair(img_size, "img_size")
    complete = complete_arguments(
        VisionMamba,
        checkpoint.state,
        {**checkpoint.config, **options},
        checkpoint.entry_name,
        checkpoint.source,
        target,
    )
    base_image = complete["img_size"]
    complete["img_size"] = target or base_image
    own_classes = complete["num_classes"]
    complete["num_classes"] = own_classes if num_classes is None else num_classes
    model = VisionMamba(**complete, **placement)
    if model.norm_f.weight.is_meta:
        raise InputError(
            "a model on the meta device holds no values, so nothing can be loaded into it. Load it "
            "on the CPU, the default; VisionMamba(device='meta') is for its shapes alone."
        )
    state = dict(checkpoint.state)
    keeps_head = num_classes is None or num_classes == own_classes
    if not keeps_head:
        own_head = {f"head.{k}": v for k, v in model.head.state_dict().items()}
        state = {k: v for k, v in state.items() if not k.startswith("head.")} | own_head
    if complete["img_size"] != base_image:
        _fit_positions(state, model, base_image)
    _load_exactly(model, state, checkpoint.source)
    return model


def _fit_positions(
    state: dict[str, Tensor], model: VisionMamba, base_image: tuple[int, int]
) -> None:
    """Bring what depends on the grid from the checkpoint's image size to the model's."""
    embed = model.patch_embed
    if "pos_embed" in state:
        state["pos_embed"] = resize_pos_embed(
            state["pos_embed"],
            grid_of(base_image, embed.patch_size, embed.stride),
            embed.grid_size,
            model.num_tokens,
            model.use_middle_cls_token,
        )
    if model.if_rope:
        # the tables are computed, not learned: the new model has its own already
        state |= {f"rope.{name}": table for name, table in model.rope.state_dict().items()}


def _load_exactly(model: VisionMamba, state: dict[str, Tensor], source: str) -> None:
    """Copy `state` into the model if every name and shape fits, else name those that do not."""
    own = model.state_dict()
    problems = {
        "missing": sorted(own.keys() - state.keys()),
        "unexpected": sorted(state.keys() - own.keys()),
        "misshapen": [
            f"{name} {tuple(state[name].shape)} instead of {tuple(tensor.shape)}"
            for name, tensor in own.items()
            if name in state and state[name].shape != tensor.shape
        ],
        "not floating point": sorted(
            name for name, tensor in state.items() if not tensor.is_floating_point()
        ),
        "without plain values": sorted(
            name
            for name, tensor in state.items()
            if tensor.is_meta or tensor.layout != torch.strided
        ),
    }
    found = [f"{kind}: {_some(names)}" for kind, names in problems.items() if names]
    if found:
        raise CheckpointError(
            f"{source} does not fit a Vim of depth {len(model.layers)} and width "
            f"{model.embed_dim}. {'; '.join(found)}. Check that it is the right file, and the "
            f"arguments passed to load_vim."
        )
    model.load_state_dict(state)


def _some(names: list[str]) -> str:
    shown = ", ".join(names[:_LISTED])
    return shown if len(names) <= _LISTED else f"{shown} and {len(names) - _LISTED} more"
