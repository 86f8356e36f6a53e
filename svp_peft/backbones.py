"""What we know of each model family, found by structure and never by importing its package.

A family's function looks at one module of the model and returns a complete `BackboneSpec` if the
module has that family's blocks and attributes, else None. `find_backbone` asks them for every
module of the model and wants exactly one answer; a spec passed by the user overrides them all.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal

from torch import Tensor, nn

from svp_peft.errors import BackboneNotSupportedError, InputError

logger = logging.getLogger(__name__)

ClassTokens = Literal["none", "head", "tail", "middle", "double"] | tuple[int, ...]
Layout = Literal["tokens", "channels_last", "channels_first"]

_CLASS_TOKENS = ("none", "head", "tail", "middle", "double")
_LAYOUTS = ("tokens", "channels_last", "channels_first")


@dataclass(frozen=True, kw_only=True)
class BackboneSpec:
    """How to find blocks, width, class tokens and head in a model.

    Only `blocks` is needed; the rest has the values of a plain stack without class token.
    """

    blocks: str | tuple[str, ...]
    """Path of the nn.ModuleList of blocks, or the paths of the blocks in the order they run."""

    d_model: int | tuple[int, ...] | None = None
    """Token width, or the width of each block. None: the size of each block's norm."""

    class_tokens: ClassTokens = "none"
    """Tokens that get no prompt: "head" 0, "tail" L-1, "middle" (L-1)//2, "double" both ends, or
    their positions."""

    reversed_blocks: tuple[int, ...] = ()
    """Indices of blocks that see the tokens in reverse order, position p at L-1-p."""

    head: str | None = "head"
    """Path of the classifier head. None: the model has none."""

    input_name: str = "hidden_states"
    """Name of the block's first argument, for models that pass it by keyword."""

    layout: Layout = "tokens"
    """What a block takes: "tokens" (batch, L, d_model), "channels_last" (batch, H, W, d_model) or
    "channels_first" (batch, d_model, H, W)."""

    owner: str = ""
    """Path of the module whose forward takes the images. "": the model itself."""

    family: str = "custom"
    """Name of the family, for messages."""

    def __post_init__(self) -> None:
        positions = self.class_tokens
        if isinstance(positions, (tuple, list)):
            valid = all(isinstance(p, int) and p >= 0 for p in positions)
            object.__setattr__(self, "class_tokens", tuple(sorted(set(positions))))
        else:
            valid = positions in _CLASS_TOKENS
        if not valid:
            raise InputError(
                f"class_tokens={positions!r} is unknown: it says which tokens get no prompt. "
                f"Use one of {_CLASS_TOKENS} or a tuple of positions from 0."
            )
        if self.layout not in _LAYOUTS:
            raise InputError(
                f"layout={self.layout!r} is unknown: it says what a block takes. "
                f"Use one of {_LAYOUTS}."
            )

    @property
    def depth(self) -> int:
        """Number of blocks; of a spec that `find_backbone` returned."""
        return len(self.blocks)

    @property
    def widths(self) -> tuple[int, ...]:
        """Width of every block; of a spec that `find_backbone` returned."""
        assert isinstance(self.d_model, tuple)
        return self.d_model


def class_token_positions(
    class_tokens: ClassTokens, length: int, reversed_block: bool = False
) -> tuple[int, ...]:
    """Sorted positions of the class tokens among `length` tokens.

    The middle one is at (L-1)//2: Vim inserts it after the first M//2 of M = L-1 patches. In a
    reversed block position p is at L-1-p.

    Raises:
        InputError: a fixed position lies outside the tokens.
    """
    if isinstance(class_tokens, tuple):
        positions = class_tokens
        if positions and positions[-1] >= length:
            raise InputError(
                f"the class tokens stand at {positions}, but a block was called with {length} "
                "tokens: tokens were dropped, or the image has another size. Use the image size "
                "the model was built for, or pass backbone=BackboneSpec(class_tokens=...)."
            )
    elif class_tokens == "none":
        positions = ()
    elif class_tokens == "head":
        positions = (0,)
    elif class_tokens == "tail":
        positions = (length - 1,)
    elif class_tokens == "middle":
        positions = ((length - 1) // 2,)
    else:
        positions = (0, length - 1) if length > 1 else (0,)
    if reversed_block:
        positions = tuple(length - 1 - p for p in reversed(positions))
    return positions


def find_backbone(model: nn.Module, spec: BackboneSpec | None = None) -> BackboneSpec:
    """The complete spec of `model`: block paths, the width of each block, and all else filled in.

    Args:
        spec: overrides what the families' records would find.

    Raises:
        BackboneNotSupportedError: no family or several fit, or `spec` does not fit the model.
            The message prints what was found and a spec to start from.
    """
    if spec is not None:
        return _complete(model, spec)
    found: list[BackboneSpec] = []
    for path, module in model.named_modules():
        for family in _FAMILIES:
            candidate = family(path, module)
            if candidate is not None:
                found.append(candidate)
                break
    if len(found) == 1:
        complete = _complete(model, found[0])
        logger.info(
            "%s recognised as family %r: %d blocks of width %s at %r, class tokens %s",
            type(model).__name__,
            complete.family,
            complete.depth,
            sorted(set(complete.widths)),
            complete.owner,
            complete.class_tokens,
        )
        return complete
    if found:
        raise BackboneNotSupportedError(
            f"{type(model).__name__} holds several stacks of blocks that svp_peft recognises: "
            f"{[(f.family, f.owner or '(the model itself)') for f in found]}. Patch one of them: "
            f"apply_svp(model.{found[0].owner or '...'}, ...), or pass backbone={found[0]!r}."
        )
    raise BackboneNotSupportedError(
        f"{type(model).__name__} is not a supported Vision Mamba model: no module has blocks of a "
        f"known family. Lists of modules found: {_skeleton(model) or 'none'}. If one of them holds "
        "the blocks, pass backbone=BackboneSpec(blocks='path.to.blocks', d_model=..., "
        "class_tokens='none' | 'head' | 'middle' | (positions), head='head') to say so "
        "(docs/backbones.md)."
    )


def _vim(path: str, module: nn.Module) -> BackboneSpec | None:
    """hustvl/Vim and all that share its blocks: forward(hidden_states, residual=None, ...).

    Source: hustvl/Vim at dd0358a, vim/models_mamba.py lines 66-139 and 392-501.
    """
    blocks = _blocks(module, "layers", "mixer")
    if blocks is None or not all(hasattr(b, "norm") or hasattr(b, "norm1") for b in blocks):
        return None
    reversed_blocks: tuple[int, ...] = ()
    if getattr(module, "if_bidirectional", False):
        reversed_blocks = tuple(range(1, len(blocks), 2))
    return BackboneSpec(
        blocks=_join(path, "layers"),
        class_tokens=_vim_class_tokens(path, module),
        reversed_blocks=reversed_blocks,
        head=_join(path, "head") if _is_module(module, "head") else None,
        owner=path,
        family="vim",
    )


def _vim_class_tokens(path: str, module: nn.Module) -> ClassTokens:
    """Where a Vim keeps its class tokens. One exists if and only if its parameter does: the
    segmentation and detection backbones delete the parameter and leave the flag on."""
    positions = getattr(module, "cls_positions", None)
    if isinstance(positions, (Tensor, list, tuple)):
        return tuple(int(p) for p in positions)
    if getattr(module, "cls_token_head", None) is not None:
        return "double"
    if getattr(module, "cls_token", None) is None:
        return "none"
    middle = getattr(module, "use_middle_cls_token", None)
    if middle is not None:
        return "middle" if middle else "head"
    # the released SVP model and ARM have no flag and always put it in the middle; VideoMamba has
    # neither flag nor choice and always puts it first
    if hasattr(module, "transfer_type") or type(module).__name__ == "ARM":
        return "middle"
    return "head"


_FAMILIES: tuple[Callable[[str, nn.Module], BackboneSpec | None], ...] = (_vim,)


def _complete(model: nn.Module, spec: BackboneSpec) -> BackboneSpec:
    """`spec` with block paths and widths written out, after checking it against the model."""
    paths = _block_paths(model, spec)
    owner = _module_at(model, spec.owner, "owner")
    if spec.head is not None and not isinstance(_lookup(model, spec.head), nn.Module):
        if spec.head != "head":
            _module_at(model, spec.head, "head")
        spec = replace(spec, head=None)
    if isinstance(spec.d_model, int):
        widths: tuple[int, ...] = (spec.d_model,) * len(paths)
    elif spec.d_model is not None:
        widths = tuple(spec.d_model)
    else:
        widths = tuple(_width(owner, model.get_submodule(path), path) for path in paths)
    if len(widths) != len(paths):
        raise BackboneNotSupportedError(
            f"the backbone spec gives {len(widths)} widths for {len(paths)} blocks. Give one int "
            "for all, one per block, or d_model=None to read them from the blocks' norms."
        )
    outside = [index for index in spec.reversed_blocks if not 0 <= index < len(paths)]
    if outside:
        raise BackboneNotSupportedError(
            f"reversed_blocks={spec.reversed_blocks} names {outside}, but there are {len(paths)} "
            f"blocks, 0..{len(paths) - 1}. Name only existing blocks."
        )
    return replace(spec, blocks=paths, d_model=widths)


def _block_paths(model: nn.Module, spec: BackboneSpec) -> tuple[str, ...]:
    if not isinstance(spec.blocks, str):
        for path in spec.blocks:
            _module_at(model, path, "blocks")
        paths = tuple(spec.blocks)
    else:
        stack = _module_at(model, spec.blocks, "blocks")
        paths = tuple(_join(spec.blocks, name) for name, _ in stack.named_children())
    modules = [id(model.get_submodule(path)) for path in paths]
    if not paths or len(set(modules)) != len(modules):
        raise BackboneNotSupportedError(
            f"blocks={spec.blocks!r} of the backbone spec names {len(paths)} blocks of which "
            f"{len(set(modules))} are distinct: prompts need at least one block, each once. "
            f"Lists of modules found: {_skeleton(model) or 'none'}."
        )
    return paths


def _module_at(model: nn.Module, path: str, field: str) -> nn.Module:
    module = _lookup(model, path)
    if not isinstance(module, nn.Module):
        raise BackboneNotSupportedError(
            f"{field}={path!r} of the backbone spec is not a module of {type(model).__name__}. "
            f"Its own modules are {[name for name, _ in model.named_children()]}; lists of modules "
            f"found: {_skeleton(model) or 'none'}. Correct the path."
        )
    return module


def _lookup(model: nn.Module, path: str) -> object:
    """The module at a dotted path, or None. Follows registered modules only: a wrapper that
    forwards attributes would otherwise answer for a path that does not exist."""
    module: nn.Module | None = model
    for name in path.split(".") if path else []:
        if module is None:
            return None
        module = module._modules.get(name)
    return module


def _width(owner: nn.Module, block: nn.Module, path: str) -> int:
    for name in ("norm", "norm1", "ln_1"):
        weight = getattr(getattr(block, name, None), "weight", None)
        if isinstance(weight, Tensor):
            return weight.numel()
    for name in ("d_model", "embed_dim", "num_features"):
        width = getattr(owner, name, None)
        if isinstance(width, int):
            return width
    raise BackboneNotSupportedError(
        f"the token width of block {path!r} ({type(block).__name__}) is unknown: it has no norm "
        "with a weight, and its model has no d_model or embed_dim. "
        "Pass backbone=BackboneSpec(..., d_model=384) with the right width."
    )


def _blocks(module: nn.Module, name: str, *attributes: str) -> list[nn.Module] | None:
    """The modules of the list `name` of `module` if it has any and all have `attributes`."""
    stack = module._modules.get(name)
    if not isinstance(stack, (nn.ModuleList, nn.Sequential)) or len(stack) == 0:
        return None
    blocks = list(stack)
    if all(_is_module(block, attribute) for block in blocks for attribute in attributes):
        return blocks
    return None


def _is_module(module: nn.Module, name: str) -> bool:
    return module._modules.get(name) is not None


def _join(*parts: str) -> str:
    return ".".join(part for part in parts if part)


def _skeleton(model: nn.Module, limit: int = 8) -> str:
    """One line per list of modules in `model`: where it is, how long, and what its items hold."""
    lines = []
    for path, module in model.named_modules():
        if isinstance(module, (nn.ModuleList, nn.Sequential)) and len(module) > 1:
            first = module[0]
            parts = [name for name, _ in first.named_children()]
            lines.append(f"{path or '(model)'}: {len(module)} x {type(first).__name__}{parts}")
    shown = "; ".join(lines[:limit])
    return shown + (f"; and {len(lines) - limit} more" if len(lines) > limit else "")
