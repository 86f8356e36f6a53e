"""The hook objects of a patched model: one per block, two for the model's own call."""

from __future__ import annotations

import inspect
import threading
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from svp_peft.backbones import BackboneSpec, ClassTokens, Layout, class_token_positions
from svp_peft.errors import InputError
from svp_peft.ops import PromptWeights
from svp_peft.state import SVPState
from svp_peft.vim.bare import is_hooked

# arguments of the forks' forward that move tokens or leave out half of the scan
_REFUSED_ARGUMENTS = {
    "inference_params": "step-wise decoding runs the forward scan only in every fork of Vim",
    "if_random_token_rank": "shuffled tokens hide where the class token stands",
    "if_random_cls_token_position": "a random position hides where the class token stands",
}

# nn.DataParallel runs each copy of the model in a thread of its own; the copies share their hooks
_replica = threading.local()


@dataclass(frozen=True, eq=False)
class NoteReplica:
    """Forward pre-hook of the patched model: in a copy made by nn.DataParallel, keeps that copy's
    state for the hooks of its blocks, whose own state belongs to the original."""

    svp: SVPState

    def __call__(self, model: nn.Module, args: tuple[Any, ...]) -> None:
        if getattr(model, "_is_replica", False):
            _replica.svp = model.svp


@dataclass(frozen=True, eq=False)
class PromptBlockInput:
    """Forward pre-hook: replaces a block's first input by the prompted tokens, out of place.

    An object, not a closure: `copy.deepcopy(model)` must give the copy its own adapter. Where
    blocks run as one op (`svp_peft.vim.stack`), it is not called but asked for `weights_of`.
    """

    svp: SVPState
    block_index: int
    width: int
    class_tokens: ClassTokens
    reversed_block: bool
    input_name: str
    layout: Layout

    def __call__(
        self, block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        svp = _state_for(block, self.svp)
        if svp.disabled:
            return args, kwargs
        third = args[2] if self.input_name == "hidden_states" and len(args) > 2 else None
        if kwargs.get("inference_params", third) is not None:
            raise InputError(_refused("inference_params", "a block"))
        if args:
            return (self._prompted(svp, args[0]), *args[1:]), kwargs
        if self.input_name not in kwargs:
            raise InputError(
                f"block {self.block_index} was called with the keywords {sorted(kwargs)}, without "
                f"{self.input_name!r}: the prompts would be skipped silently. Pass the tokens "
                "first, or apply with backbone=BackboneSpec(input_name=...)."
            )
        return args, kwargs | {self.input_name: self._prompted(svp, kwargs[self.input_name])}

    def weights_of(self, block: nn.Module, length: int) -> PromptWeights | bool:
        """See `svp_peft.vim.stack.Prompting`."""
        svp = self.svp
        if type(self) is not PromptBlockInput:
            return False
        if svp.disabled:
            return True
        if svp.routing is not None or self.layout != "tokens":
            return False
        if type(svp) is not SVPState or is_hooked(svp):
            return False
        skip = class_token_positions(self.class_tokens, length, self.reversed_block)
        return svp.adapter.weights_of(self.block_index, skip)

    def _prompted(self, svp: SVPState, x: Tensor) -> Tensor:
        dims, axis = (3, -1) if self.layout == "tokens" else (4, -1)
        if self.layout == "channels_first":
            axis = 1
        if not isinstance(x, Tensor) or x.dim() != dims or x.shape[axis] != self.width:
            shape = tuple(x.shape) if isinstance(x, Tensor) else type(x).__name__
            raise InputError(
                f"block {self.block_index} was called with {shape}, but its prompters take "
                f"{dims}-dimensional tokens of width {self.width} ({self.layout}). Check the image "
                "size, or apply with another backbone=BackboneSpec(layout=..., d_model=...)."
            )
        if self.layout == "tokens":
            out = self._prompted_tokens(svp, x)
        elif self.layout == "channels_last":
            out = self._prompted_tokens(svp, x.flatten(1, 2)).reshape(x.shape)
        else:
            tokens = self._prompted_tokens(svp, x.flatten(2).transpose(1, 2))
            out = tokens.transpose(1, 2).reshape(x.shape)
        # kernels of PyTorch round differently on another memory layout, and a fresh adapter must
        # not change a bit
        return out if out.stride() == x.stride() else torch.empty_like(x).copy_(out)

    def _prompted_tokens(self, svp: SVPState, x: Tensor) -> Tensor:
        skip = class_token_positions(self.class_tokens, x.shape[1], self.reversed_block)
        return svp(x, self.block_index, skip)


@dataclass(frozen=True, eq=False)
class CheckModelInput:
    """Forward pre-hook of the model: refuses what would misplace prompts, and applies SimAM."""

    svp: SVPState
    refused: tuple[tuple[str, int], ...]
    """(name, position) of the forward arguments that must keep their defaults."""

    def __call__(
        self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        svp = _state_for(model, self.svp)
        if svp.disabled:
            return args, kwargs
        for name, position in self.refused:
            value = kwargs.get(name, args[position] if position < len(args) else None)
            if value is not None and value is not False:
                raise InputError(_refused(name, type(model).__name__))
        check_flips(model, svp.spec)
        routing = svp.routing
        for index, value in enumerate(args):
            if isinstance(value, Tensor):
                if routing is not None:
                    routing.check_batch(value.shape[0])
                return (*args[:index], svp.images(value), *args[index + 1 :]), kwargs
        for name, value in kwargs.items():
            if isinstance(value, Tensor):
                if routing is not None:
                    routing.check_batch(value.shape[0])
                return args, kwargs | {name: svp.images(value)}
        return args, kwargs


def check_flips(owner: nn.Module, spec: BackboneSpec) -> None:
    """Raise `InputError` if the model flips its tokens around a class token that then moves."""
    if not getattr(owner, "flip_img_sequences_ratio", 0) > 0:
        return
    patches = getattr(getattr(owner, "patch_embed", None), "num_patches", 0)
    symmetric = spec.class_tokens in ("none", "double", ())
    if symmetric or (spec.class_tokens == "middle" and patches % 2 == 0):
        return
    raise InputError(
        f"flip_img_sequences_ratio={owner.flip_img_sequences_ratio} turns the tokens around at "
        f"random, and class tokens at {spec.class_tokens!r} then stand elsewhere: the prompts "
        "would hit them. Set model.flip_img_sequences_ratio = -1."
    )


def refused_arguments(owner: nn.Module) -> tuple[tuple[str, int], ...]:
    """Arguments of the owner's forward to refuse, with their positions."""
    try:
        names = list(inspect.signature(owner.forward).parameters)
    except (TypeError, ValueError):
        return ()
    refused = [n for n in _REFUSED_ARGUMENTS if n in names]
    # hustvl/Vim ignores the random position while the middle or the double token is on
    fixed = getattr(owner, "use_middle_cls_token", False) or hasattr(owner, "cls_token_head")
    if fixed or getattr(owner, "cls_token", None) is None:
        refused = [n for n in refused if n != "if_random_cls_token_position"]
    return tuple((n, names.index(n)) for n in refused)


def _refused(name: str, where: str) -> str:
    return (
        f"{where} was called with {name}, which SVP cannot follow: {_REFUSED_ARGUMENTS[name]}. "
        f"Leave {name} at its default, or call inside disable_adapter(model)."
    )


def remove_hooks(module: nn.Module, svp: SVPState) -> None:
    """Take the hooks of this state off a module, and no one else's."""
    for key, hook in list(module._forward_pre_hooks.items()):
        if isinstance(hook, (NoteReplica, PromptBlockInput, CheckModelInput)) and hook.svp is svp:
            del module._forward_pre_hooks[key]
            module._forward_pre_hooks_with_kwargs.pop(key, None)


def _state_for(module: nn.Module, svp: SVPState) -> SVPState:
    return _replica.svp if getattr(module, "_is_replica", False) else svp
