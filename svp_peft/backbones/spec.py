"""`BackboneSpec`: where the blocks, their width, the class tokens and the head of a model are."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from svp_peft.errors import InputError

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
            valid = all(type(p) is int and p >= 0 for p in positions)
            if valid:
                object.__setattr__(self, "class_tokens", tuple(sorted(set(positions))))
        else:
            valid = positions in _CLASS_TOKENS
        if not valid:
            raise InputError(
                f"class_tokens={positions!r} is unknown: it says which tokens get no prompt. "
                f"Use one of {_CLASS_TOKENS} or a tuple of positions from 0."
            )
        paths = (self.blocks,) if isinstance(self.blocks, str) else self.blocks
        if not isinstance(paths, (tuple, list)) or not all(isinstance(p, str) for p in paths):
            raise InputError(
                f"blocks={self.blocks!r} is no path: it says where the blocks are. Pass the path "
                f"of their nn.ModuleList, such as 'layers', or the path of every block."
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
