"""`verify_backbone`: one batch through a model proves that SVP fits it, before any training."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from svp_peft.backbones import BackboneSpec
from svp_peft.config import SVPConfig
from svp_peft.errors import BackboneNotSupportedError
from svp_peft.patch import apply_svp, check_patchable, remove_svp


@dataclass(frozen=True)
class BackboneReport:
    """What `verify_backbone` saw."""

    family: str
    """Name of the record, or "custom"."""

    owner: str
    """Path of the module that holds the blocks; "" is the model itself."""

    widths: tuple[int, ...]
    """Token width of every block."""

    token_shapes: tuple[tuple[int, ...], ...]
    """Shape of what entered every block."""

    unprompted: tuple[tuple[int, ...], ...]
    """By block, positions of the tokens that got no prompt: the class tokens."""

    head: str | None
    """Path of the head that an adapter trains."""


def verify_backbone(
    model: nn.Module, images: Tensor, *, backbone: BackboneSpec | None = None
) -> BackboneReport:
    """Run one batch and prove that prompts go where they should; the model is left as it was.

    Proves that a fresh adapter changes no bit of the output, that every block runs and gets
    prompts once its scales are not zero, and that the tokens without prompts are exactly those
    that the model's class token parameters end up in: these are changed for a moment to see
    where. The model runs in eval mode without gradients, four times.

    Args:
        images: a batch as the model takes it, or a tuple of its positional arguments.
        backbone: as in `apply_svp`.

    Raises:
        BackboneNotSupportedError: the model does not fit; says what was expected and seen.
        AlreadyAppliedError: the model carries SVP already.
    """
    spec = check_patchable(model, backbone)
    arguments = images if isinstance(images, tuple) else (images,)
    config = SVPConfig(inner_bottleneck=1, cross_group_size=len(spec.blocks), modules_to_save=())
    entered, prompted = _Recorder(), _Recorder()
    with _evaluating(model), torch.no_grad(), torch.random.fork_rng():
        base = _run(model, arguments)
        if not _same(base, _run(model, arguments)):
            raise BackboneNotSupportedError(
                f"{type(model).__name__} gives two outputs for one batch in eval mode: it draws "
                "random numbers, so that nothing can be compared. Switch that off first."
            )
        blocks = [model.get_submodule(path) for path in spec.blocks]
        handles = [
            block.register_forward_pre_hook(entered.hook(index, spec), with_kwargs=True)
            for index, block in enumerate(blocks)
        ]
        apply_svp(model, config, backbone=spec)
        handles += [
            block.register_forward_pre_hook(prompted.hook(index, spec), with_kwargs=True)
            for index, block in enumerate(blocks)
        ]
        try:
            if not _same(base, _run(model, arguments)):
                raise BackboneNotSupportedError(
                    f"a fresh adapter changes the output of {type(model).__name__}: a block works "
                    "on its input in place, or on something else than the spec says "
                    f"({spec.layout}, first argument {spec.input_name!r}). Pass another backbone=."
                )
            specials = _class_tokens_seen(model, spec, arguments, entered)
            for parameter in model.svp.adapter.parameters():  # type: ignore[union-attr]
                nn.init.normal_(parameter)
            _run(model, arguments)
        finally:
            for handle in handles:
                handle.remove()
            remove_svp(model)
    missing = [path for index, path in enumerate(spec.blocks) if index not in prompted.tokens]
    if missing:
        raise BackboneNotSupportedError(
            f"the blocks {missing} did not run on this batch: their prompters would never train. "
            "Leave them out by backbone=BackboneSpec(blocks=(...)) or SVPConfig(layers=...)."
        )
    unprompted = tuple(
        _unchanged(entered.tokens[index], prompted.tokens[index]) for index in range(len(blocks))
    )
    _check_class_tokens(spec, unprompted, specials)
    return BackboneReport(
        family=spec.family,
        owner=spec.owner,
        widths=spec.widths,
        token_shapes=tuple(tuple(entered.shapes[index]) for index in range(len(blocks))),
        unprompted=unprompted,
        head=spec.head,
    )


class _Recorder:
    """What entered each block in the last run, as (batch, L, d_model)."""

    def __init__(self) -> None:
        self.tokens: dict[int, Tensor] = {}
        self.shapes: dict[int, torch.Size] = {}

    def hook(self, index: int, spec: BackboneSpec) -> Any:
        def record(block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            x = args[0] if args else kwargs[spec.input_name]
            self.shapes[index] = x.shape
            if spec.layout == "channels_first":
                x = x.movedim(1, -1)
            self.tokens[index] = x.reshape(x.shape[0], -1, x.shape[-1]).clone()

        return record


def _class_tokens_seen(
    model: nn.Module, spec: BackboneSpec, arguments: tuple[Any, ...], entered: _Recorder
) -> tuple[int, ...]:
    """Positions at the first block that depend on the owner's class token parameters."""
    owner = model.get_submodule(spec.owner)
    tokens = [p for n, p in owner.named_parameters(recurse=False) if n.startswith("cls_token")]
    if not tokens or spec.layout != "tokens":
        return ()
    before = entered.tokens[0]
    values = [token.clone() for token in tokens]
    for token in tokens:
        token.add_(1)
    try:
        _run(model, arguments)
    finally:
        for token, value in zip(tokens, values, strict=True):
            token.copy_(value)
    changed = set(range(before.shape[1])) - set(_unchanged(before, entered.tokens[0]))
    return tuple(sorted(changed))


def _check_class_tokens(
    spec: BackboneSpec, unprompted: tuple[tuple[int, ...], ...], seen: tuple[int, ...]
) -> None:
    first = unprompted[0]
    if seen and seen != first:
        raise BackboneNotSupportedError(
            f"family {spec.family!r} says that the class tokens are {spec.class_tokens!r}, so that "
            f"tokens {first} got no prompt, but the class token parameters went into tokens "
            f"{seen}. Pass backbone=BackboneSpec(..., class_tokens={seen})."
        )
    for index, positions in enumerate(unprompted):
        if positions != first and index not in spec.reversed_blocks and spec.layout == "tokens":
            raise BackboneNotSupportedError(
                f"block {spec.blocks[index]!r} left the tokens {positions} without prompt, but the "
                f"first block {first}: its prompts cannot be placed. Pass another backbone=."
            )


def _unchanged(before: Tensor, after: Tensor) -> tuple[int, ...]:
    """Positions whose tokens are the same in every image."""
    same = (before == after).flatten(2).all(-1).all(0)
    return tuple(int(position) for position in same.nonzero().flatten())


def _run(model: nn.Module, arguments: tuple[Any, ...]) -> Any:
    return model(*arguments)


def _same(one: Any, other: Any) -> bool:
    if isinstance(one, Tensor):
        return torch.equal(one, other)
    if isinstance(one, dict):
        return all(_same(one[key], other[key]) for key in one)
    if isinstance(one, (list, tuple)):
        return all(_same(a, b) for a, b in zip(one, other, strict=True))
    return True


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    training = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, flag in training.items():
            module.training = flag
