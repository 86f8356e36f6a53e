"""Looking into a model while it runs, and putting tokens back onto the image.

Hooks sit on the blocks, on their mixers and on the head, never inside a mixer: fused kernels read
the weights in there directly, and a hook would not fire.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from svp_peft.backbones import BackboneSpec, class_token_positions
from svp_peft.errors import BackboneNotSupportedError, InputError
from svp_peft.state import SVPState, svp_of

_MIXER_PARTS = ("in_proj", "conv1d", "x_proj", "dt_proj", "A_log")


def checked_state(model: nn.Module, images: Tensor, function: str) -> SVPState:
    """The model's `SVPState`, if one adapter is active and the images are a batch.

    Raises:
        NotAppliedError: the model carries no SVP.
        InputError: the images are no batch; or adapters are routed, disabled or hidden by random
            flips, so that no single adapter's effect could be seen.
    """
    svp = svp_of(model)
    if not isinstance(images, Tensor) or images.dim() != 4 or len(images) == 0:
        shape = tuple(images.shape) if isinstance(images, Tensor) else type(images).__name__
        raise InputError(
            f"images is {shape}, but {function} takes a batch (batch, channels, height, width) as "
            "the model does. Add the batch axis: images[None]."
        )
    if svp.routing is not None or svp.disabled:
        where = "route(...)" if svp.routing is not None else "disable_adapter(...)"
        raise InputError(
            f"{function} was called inside {where}, but it compares one active adapter with the "
            f"base model. Call it outside; set_adapter(model, name) chooses the adapter."
        )
    owner = model.get_submodule(svp.spec.owner)
    if getattr(owner, "flip_img_sequences_ratio", 0) > 0:
        raise InputError(
            f"flip_img_sequences_ratio={owner.flip_img_sequences_ratio} turns the tokens around "
            "at random, so their places on the image are unknown. "
            "Set model.flip_img_sequences_ratio = -1."
        )
    return svp


def checked_blocks(spec: BackboneSpec, blocks: Sequence[int] | None) -> tuple[int, ...]:
    """Block indices, negative ones counted from the end; all blocks for None."""
    if blocks is None:
        return tuple(range(spec.depth))
    chosen = tuple(blocks)
    if not chosen or any(not -spec.depth <= index < spec.depth for index in chosen):
        raise InputError(
            f"blocks={list(chosen)} must name at least one of the model's {spec.depth} blocks, "
            f"0..{spec.depth - 1} or -{spec.depth}..-1. Choose such indices, or None for all."
        )
    return tuple(index % spec.depth for index in chosen)


def vim_mixer(block: nn.Module) -> nn.Module:
    """The mixer of a block, if it has the parts whose gates we can compute."""
    mixer = block._modules.get("mixer")
    missing = [part for part in _MIXER_PARTS if not hasattr(mixer, part)]
    if mixer is None or missing:
        raise BackboneNotSupportedError(
            f"a block of type {type(block).__name__} has no Vim mixer "
            f"({'no `mixer`' if mixer is None else f'its mixer lacks {missing}'}): update and "
            "forget gates cannot be computed. Use a Vim; VisionMamba.from_model(fork_model) adopts "
            "one that was built with a fork."
        )
    return mixer


def image_grid(
    model: nn.Module, spec: BackboneSpec, images: Tensor, patches: int
) -> tuple[int, int]:
    """(rows, columns) of the patches: from the model, else from the shape of the images.

    Raises:
        InputError: the patches do not fill a rectangle of the images' shape.
    """
    embed = getattr(model.get_submodule(spec.owner), "patch_embed", None)
    grid = getattr(embed, "grid_size", None)
    if isinstance(grid, (tuple, list)) and len(grid) == 2 and grid[0] * grid[1] == patches:
        return int(grid[0]), int(grid[1])
    height, width = images.shape[-2:]
    rows = round((patches * height / width) ** 0.5)
    if rows < 1 or patches % rows:
        raise InputError(
            f"{patches} patches of images {height}x{width} do not fill a rectangular grid, so "
            "there is no map to draw. Give the model a patch_embed with a grid_size."
        )
    return rows, patches // rows


def patch_positions(spec: BackboneSpec, block_index: int, length: int) -> list[int]:
    """Positions of the patches among a block's tokens, in image order.

    Class tokens are left out, and blocks that see the tokens in reverse are turned around.
    """
    turned = block_index in spec.reversed_blocks
    skip = set(class_token_positions(spec.class_tokens, length, turned))
    positions = [p for p in range(length) if p not in skip]
    return positions[::-1] if turned else positions


@contextmanager
def eager_evaluation(model: nn.Module) -> Iterator[None]:
    """The model in evaluation mode and not compiled; afterwards all is as it was.

    Compiled graphs take no notice of hooks that come later, so what they compute is run eagerly.
    """
    before = [(m, m.training, m._compiled_call_impl) for m in model.modules()]
    model.eval()
    for module, _, _ in before:
        module._compiled_call_impl = None
    try:
        yield
    finally:
        for module, training, compiled in before:
            module.training = training
            module._compiled_call_impl = compiled


@contextmanager
def first_input(
    module: nn.Module, name: str, see: Callable[[Tensor], Tensor | None], *, first: bool = False
) -> Iterator[None]:
    """Call `see` with the first input of `module`, by position or under `name`.

    What `see` returns, if anything, replaces that input. With `first`, before all other hooks:
    before the prompts of a patched block.
    """

    def hook(
        _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        replacement = see(args[0] if args else kwargs[name])
        if replacement is None:
            return None
        if args:
            return (replacement, *args[1:]), kwargs
        return args, kwargs | {name: replacement}

    handle = module.register_forward_pre_hook(hook, with_kwargs=True, prepend=first)
    try:
        yield
    finally:
        handle.remove()
