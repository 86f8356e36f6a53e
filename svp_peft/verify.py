"""`verify_backbone`: one batch through a model proves that SVP fits it, before any training."""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, is_dataclass
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
    prompts once its scales are not zero and that these reach the output, and that the tokens
    without prompts are exactly those that the model's class token parameters end up in: these are
    changed for a moment to see where. Positions that `backbone` lists may be more, for registers.

    The model runs up to five times, in eval mode, without gradients and with the same random
    numbers each time. All runs are frozen as `apply_svp` leaves the model: PyTorch multiplies by
    weights that require gradients in another order, which shows in the last bits.

    Args:
        images: a batch as the model takes it, or a tuple of its positional arguments.
        backbone: as in `apply_svp`.

    Raises:
        BackboneNotSupportedError: the model does not fit; says what was expected and seen.
        InputError: a block was called with something else than the tokens of the spec.
        AlreadyAppliedError: the model carries SVP already.
    """
    spec = check_patchable(model, backbone)
    arguments = images if isinstance(images, tuple) else (images,)
    config = SVPConfig(inner_bottleneck=1, cross_group_size=len(spec.blocks), modules_to_save=())
    entered, prompted = _Recorder(), _Recorder()
    with _at_rest(model), torch.no_grad():
        base = _base_output(model, arguments)
        blocks = [model.get_submodule(path) for path in spec.blocks]
        handles = [
            block.register_forward_pre_hook(entered.hook(index, spec), with_kwargs=True)
            for index, block in enumerate(blocks)
        ]
        with _same_draws(model):
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
            with _same_draws(model):
                for parameter in model.svp.adapter.parameters():  # type: ignore[union-attr]
                    nn.init.normal_(parameter)
            reached = not _same(base, _run(model, arguments))
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
    if not reached:
        raise BackboneNotSupportedError(
            f"prompts in all {len(blocks)} blocks do not change the output of "
            f"{type(model).__name__}: no prompter would ever train. In a model that scans forwards "
            "only, a class token at the head sees no patch. Pass another backbone=."
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
            x = args[0] if args else kwargs.get(spec.input_name)
            if not isinstance(x, Tensor):
                return  # the prompter's own hook says what is wrong
            self.shapes[index] = x.shape
            if spec.layout == "channels_first":
                x = x.movedim(1, -1)
            self.tokens[index] = x.reshape(x.shape[0], -1, x.shape[-1]).clone()

        return record


def _base_output(model: nn.Module, arguments: tuple[Any, ...]) -> list[Tensor]:
    """The tensors that the model returns, which must be the same in a second run."""
    base = _run(model, arguments)
    if not base:
        raise BackboneNotSupportedError(
            f"{type(model).__name__} returned no tensor that could be compared: outputs may be "
            "tensors, and lists, tuples, dicts and dataclasses of them. Wrap the model in a module "
            "that returns what matters of it."
        )
    if not _same(base, _run(model, arguments)):
        raise BackboneNotSupportedError(
            f"{type(model).__name__} gives two outputs for one batch in eval mode, with the same "
            "random numbers: it remembers something from call to call, so that nothing can be "
            "compared. Switch that off first."
        )
    return base


def _class_tokens_seen(
    model: nn.Module, spec: BackboneSpec, arguments: tuple[Any, ...], entered: _Recorder
) -> tuple[int, ...]:
    """Positions at the first block that depend on class token parameters, wherever they are."""
    parameters = dict(model.named_parameters())
    tokens = [p for path, p in parameters.items() if path.split(".")[-1].startswith("cls_token")]
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
    # positions given by hand may be of other tokens besides, such as registers
    by_hand = spec.family == "custom" and isinstance(spec.class_tokens, tuple)
    if seen and (not set(seen) <= set(first) if by_hand else seen != first):
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


def _run(model: nn.Module, arguments: tuple[Any, ...]) -> list[Tensor]:
    """The tensors of the model's output; the next run draws the same random numbers."""
    with _same_draws(model):
        return _tensors(model(*arguments))


def _tensors(output: Any) -> list[Tensor]:
    if isinstance(output, Tensor):
        return [output]
    if is_dataclass(output):
        output = vars(output)
    if isinstance(output, Mapping):
        output = list(output.values())
    if isinstance(output, (list, tuple)):
        return [tensor for part in output for tensor in _tensors(part)]
    return []


def _same(one: list[Tensor], other: list[Tensor]) -> bool:
    return len(one) == len(other) and all(map(_equal, one, other))


def _equal(one: Tensor, other: Tensor) -> bool:
    # not a number equals itself here
    same = one.shape == other.shape and (one == other) | ((one != one) & (other != other))
    return bool(torch.as_tensor(same).all())


@contextmanager
def _same_draws(model: nn.Module) -> Iterator[None]:
    """Put the random number generators back afterwards, PyTorch's and Python's own, so that
    whatever comes next draws the same numbers."""
    devices = {p.device for p in model.parameters() if p.is_cuda}
    state = random.getstate()
    try:
        with torch.random.fork_rng(devices):
            yield
    finally:
        random.setstate(state)


@contextmanager
def _at_rest(model: nn.Module) -> Iterator[None]:
    """Eval mode and frozen."""
    training = {module: module.training for module in model.modules()}
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    model.eval().requires_grad_(False)
    try:
        yield
    finally:
        for module, flag in training.items():
            module.training = flag
        for parameter in trained:
            parameter.requires_grad_(True)
