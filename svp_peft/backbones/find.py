"""`find_backbone`: the one family that fits a model, or an error that shows what was found."""

from __future__ import annotations

import logging
from dataclasses import replace

from torch import Tensor, nn

from svp_peft.backbones.families import FAMILIES, join
from svp_peft.backbones.spec import BackboneSpec
from svp_peft.errors import BackboneNotSupportedError

logger = logging.getLogger(__name__)


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
        for family in FAMILIES:
            candidate = family(path, module)
            if candidate is not None:
                found.append(candidate)
                break
    if len(found) == 1:
        complete = _complete(model, found[0])
        logger.info(
            "%s recognised as family %r: %d blocks of width %s at %r, class tokens %s, head %r",
            type(model).__name__,
            complete.family,
            complete.depth,
            sorted(set(complete.widths)),
            complete.owner,
            complete.class_tokens,
            complete.head,
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
        f"known family. Lists of modules found: {_skeleton(model) or 'none'}. If the blocks are "
        f"among them, say so, for example by backbone={_start_spec(model)} "
        "(class_tokens is one of 'none', 'head', 'tail', 'middle', 'double' or a tuple of "
        "positions; docs/backbones.md)."
    )


def _complete(model: nn.Module, spec: BackboneSpec) -> BackboneSpec:
    """`spec` with block paths and widths written out, after checking it against the model."""
    paths = _block_paths(model, spec)
    owner = _module_at(model, spec.owner, "owner")
    spec = replace(spec, head=_head_path(model, spec))
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
        # not named_children(), which leaves out a block that stands there twice
        paths = tuple(join(spec.blocks, name) for name in stack._modules)
    modules = [id(model.get_submodule(path)) for path in paths]
    if not paths or len(set(modules)) != len(modules):
        raise BackboneNotSupportedError(
            f"blocks={spec.blocks!r} of the backbone spec names {len(paths)} blocks of which "
            f"{len(set(modules))} are distinct: prompts need at least one block, each once. "
            f"Lists of modules found: {_skeleton(model) or 'none'}."
        )
    return paths


def _head_path(model: nn.Module, spec: BackboneSpec) -> str | None:
    """Where the head is: as the spec says, or a `head` of a module around the backbone."""
    if spec.head is None:
        return None
    if spec.family == "custom" and spec.head != "head":
        _module_at(model, spec.head, "head")
    above = spec.owner.split(".") if spec.owner else []
    around = [join(*above[:end], "head") for end in range(len(above), -1, -1)]
    for path in [spec.head, *around]:
        if isinstance(_lookup(model, path), nn.Module):
            return path
    return None


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


def _start_spec(model: nn.Module) -> str:
    """A spec to start from: the longest list of equal modules."""
    best, length = "path.to.blocks", 1
    for path, module in model.named_modules():
        if isinstance(module, (nn.ModuleList, nn.Sequential)) and path:
            kinds = {type(item) for item in module}
            if len(kinds) == 1 and len(module) > length:
                best, length = path, len(module)
    heads = (
        path
        for path, module in model.named_modules()
        if path.split(".")[-1] in ("head", "fc", "classifier") and isinstance(module, nn.Linear)
    )
    head = next(heads, None)
    return f"BackboneSpec(blocks={best!r}, d_model=..., class_tokens='none', head={head!r})"
