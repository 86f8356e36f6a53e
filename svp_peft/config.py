"""`SVPConfig`: what an adapter is made of, as plain checked values."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal, get_args

from svp_peft.errors import AdapterNameError, ConfigError

CrossSource = Literal["token", "released"]

BASE_ADAPTER = "__base__"
"""Reserved name that stands for the unprompted base model with its own head."""

_MOST = 1_000_000
"""Largest number of any field: more is a slip, and would be asked of the memory."""

_ADAPTER_NAME = re.compile(r"[A-Za-z0-9_-]+")
_MODULE_PATH = re.compile(r"[A-Za-z0-9_]+(\.[A-Za-z0-9_]+)*")


@dataclass(frozen=True, kw_only=True)
class SVPConfig:
    """Hyper-parameters of one SVP adapter. Immutable; checks itself; refuses unknown keys.

    Raises `ConfigError`, which names the field, its value and what would work.
    """

    inner_bottleneck: int = 64
    """Width of the inner prompter's bottleneck. The released scripts use 64."""

    cross_group_size: int = 8
    """Consecutive blocks that share one cross prompter. The released scripts use 4 to 12."""

    dropout: float = 0.0
    """Dropout on both prompts while training, in [0, 1)."""

    cross_source: CrossSource = "token"
    """Where the cross prompt of a token comes from.

    "token": from the token itself, as in the paper. "released": as in the authors' code, where the
    tokens after the class token take it from the already prompted tokens before it; needs a middle
    class token, two halves of equal length and a depth divisible by `cross_group_size`. Adapters
    converted from the authors' checkpoints use it.
    """

    simam_input: bool = False
    """Weigh the input image by SimAM first (the released option `input_relu`); no parameters."""

    use_cross: bool = True
    """Build cross prompters. False is the paper's ablation without them."""

    use_inner: bool = True
    """Build inner prompters. False is the paper's ablation without them."""

    layers: tuple[int, ...] | None = None
    """Indices of the blocks that get prompts. None: every block."""

    modules_to_save: tuple[str, ...] = ("head",)
    """Base modules of which each adapter trains its own copy. "head" is the classifier head."""

    base_model_name_or_path: str | None = None
    """Hub id of the base model, kept for the adapter's file and model card."""

    revision: str | None = None
    """Revision of the base model on the Hub."""

    def __post_init__(self) -> None:
        _check_positive_int(
            "inner_bottleneck", self.inner_bottleneck, "it is the inner prompter's width. Try 64."
        )
        _check_positive_int(
            "cross_group_size",
            self.cross_group_size,
            "it counts the blocks that share a cross prompter. Try 8.",
        )
        for name in ("simam_input", "use_cross", "use_inner"):
            if not isinstance(getattr(self, name), bool):
                raise ConfigError(
                    f"{name}={getattr(self, name)!r} must be True or False: it switches a part of "
                    "the method on or off. Pass a bool."
                )
        object.__setattr__(self, "dropout", _checked_dropout(self.dropout))
        object.__setattr__(self, "layers", _checked_layers(self.layers))
        object.__setattr__(self, "modules_to_save", _checked_paths(self.modules_to_save))
        if self.cross_source not in get_args(CrossSource):
            raise ConfigError(
                f"cross_source={self.cross_source!r} is unknown: the cross prompt comes from the "
                "token itself ('token', the paper) or as in the authors' code ('released'). "
                "Use one of these two; 'token' for new adapters."
            )
        if not (self.use_cross or self.use_inner):
            raise ConfigError(
                "use_cross=False and use_inner=False leave no prompter at all: the adapter would "
                "be a linear probe. Set one of them to True."
            )
        if self.cross_source == "released" and not (self.use_cross and self.use_inner):
            raise ConfigError(
                f"cross_source='released' with use_cross={self.use_cross}, "
                f"use_inner={self.use_inner} does not exist: the authors' code always has both "
                "prompters. Use cross_source='token' for ablations."
            )
        if self.cross_source == "released" and self.layers is not None:
            raise ConfigError(
                f"cross_source='released' with layers={self.layers} does not exist: the authors' "
                "code prompts every block. Set layers=None, or use cross_source='token'."
            )
        for name in ("base_model_name_or_path", "revision"):
            value = getattr(self, name)
            if value is not None and (not isinstance(value, str) or not value):
                raise ConfigError(
                    f"{name}={value!r} must be a non-empty string or None: it names the base "
                    "model on the Hub. Pass for example 'hustvl/Vim-small-midclstok'."
                )

    def to_dict(self) -> dict[str, Any]:
        """All fields as JSON values: tuples become lists."""
        return {
            name: list(value) if isinstance(value, tuple) else value
            for name, value in asdict(self).items()
        }

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any]) -> SVPConfig:
        """The config that `to_dict` gave; missing keys take their defaults.

        Raises:
            ConfigError: on unknown keys or values that cannot work.
        """
        unknown = sorted(str(key) for key in raw.keys() - {field.name for field in fields(cls)})
        if unknown:
            raise ConfigError(
                f"unknown config keys {unknown}: they were probably written by a newer svp_peft. "
                "Run `pip install -U svp_peft`, or remove the keys."
            )
        return cls(**raw)


def check_adapter_name(name: object) -> str:
    """`name` if it can name an adapter.

    Names become parts of state_dict keys and of paths, so only letters, digits, "_" and "-" are
    allowed; "__base__" is taken by the base model.

    Raises:
        AdapterNameError: for anything else.
    """
    if not isinstance(name, str) or _ADAPTER_NAME.fullmatch(name) is None:
        raise AdapterNameError(
            f"adapter name {name!r} is not usable: it becomes part of state_dict keys and paths. "
            "Use only letters, digits, '_' and '-', for example 'birds-v2'."
        )
    if name == BASE_ADAPTER:
        raise AdapterNameError(
            f"adapter name {name!r} is reserved: it stands for the base model without prompts. "
            "Choose another name."
        )
    return name


def _check_positive_int(name: str, value: object, reason: str) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= _MOST:
        raise ConfigError(f"{name}={value!r} must be an integer from 1 to {_MOST}: {reason}")


def _checked_dropout(value: object) -> float:
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not number or not math.isfinite(value) or not 0 <= value < 1:  # type: ignore[arg-type, operator]
        raise ConfigError(
            f"dropout={value!r} must be a number in [0, 1): it is the probability of dropping a "
            "prompt's element. Try 0.0 or 0.1."
        )
    return float(value)  # type: ignore[arg-type]


def _checked_layers(value: object) -> tuple[int, ...] | None:
    if value is None:
        return None
    valid = (
        isinstance(value, (list, tuple))
        and len(value) > 0
        and all(isinstance(i, int) and not isinstance(i, bool) and i >= 0 for i in value)
        and len(set(value)) == len(value)
    )
    if not valid:
        raise ConfigError(
            f"layers={value!r} must be None or a non-empty list of distinct block indices from 0: "
            "it chooses the blocks that get prompts. Try layers=None for all, or [0, 1, 2]."
        )
    return tuple(sorted(value))  # type: ignore[call-overload, no-any-return]


def _checked_paths(value: object) -> tuple[str, ...]:
    if value is None:
        return ()
    valid = (
        isinstance(value, (list, tuple))
        and all(isinstance(path, str) and _MODULE_PATH.fullmatch(path) for path in value)
        and len(set(value)) == len(value)
    )
    if not valid:
        raise ConfigError(
            f"modules_to_save={value!r} must be a list of distinct module paths such as 'head' or "
            "'norm_f': each adapter trains its own copy of these. Use () for none."
        )
    return tuple(value)  # type: ignore[arg-type]
