"""Checks of constructor arguments: a value that cannot work is named before anything is built.

Arguments also come from JSON files, where a number may turn out to be a string.
"""

from __future__ import annotations

import math
import numbers
import operator
from collections.abc import Sequence
from typing import Any

from svp_peft.errors import InputError


def pair(value: Any, name: str) -> tuple[int, int]:
    """(height, width) from one number or from two.

    Raises:
        InputError: neither, or less than 1.
    """
    two = tuple(value) if isinstance(value, (list, tuple)) else (value, value)
    if len(two) != 2 or any(_integer(size, 1) is None for size in two):
        raise InputError(
            f"{name}={value!r} is not a size: it is one integer of at least 1 for a square, or two "
            f"for (height, width). Pass for example {name}=16."
        )
    return operator.index(two[0]), operator.index(two[1])


def check_counts(least: int, **counts: Any) -> None:
    """Raise `InputError` unless each is an integer of at least `least`."""
    for name, value in counts.items():
        if _integer(value, least) is None:
            raise InputError(f"{name}={value!r} cannot work. Pass an integer of at least {least}.")


def check_numbers(least: float, most: float, **given: Any) -> None:
    """Raise `InputError` unless each is a number from `least` to `most`."""
    for name, value in given.items():
        number = isinstance(value, numbers.Real) and not isinstance(value, bool)
        if not number or not least <= value <= most:
            low = f" from {least:g}" if math.isfinite(least) else ""
            high = f" to {most:g}" if math.isfinite(most) else " on" if low else ""
            raise InputError(f"{name}={value!r} cannot work. Pass a number{low}{high}.")


def check_flags(**flags: Any) -> None:
    """Raise `InputError` unless each is a bool; any string would count as True."""
    for name, value in flags.items():
        if value not in (True, False):
            raise InputError(f"{name}={value!r} is neither True nor False. Pass one of these.")


def check_choice(name: str, value: object, choices: Sequence[str], meaning: str) -> None:
    """Raise `InputError`, which says what `name` means, unless `value` is one of `choices`."""
    if value not in choices:
        raise InputError(f"{name}={value!r} is unknown: {meaning}. Use one of {list(choices)}.")


def one_spelling(divide: bool | None, devide: bool | None) -> bool:
    """`if_divide_out` from its new and its old spelling; True where neither is given.

    Raises:
        InputError: they contradict each other, or one is no bool.
    """
    given = [flag for flag in (divide, devide) if flag is not None]
    for flag in given:
        check_flags(if_divide_out=flag)
    if len(given) == 2 and bool(divide) != bool(devide):
        raise InputError(
            f"if_divide_out={divide} and if_devide_out={devide} contradict each other: they are "
            f"the new and the old spelling of one option. Pass if_divide_out alone."
        )
    return bool(given[0]) if given else True


def _integer(value: Any, least: int) -> int | None:
    if isinstance(value, bool):
        return None
    try:
        number = operator.index(value)
    except TypeError:
        return None
    return number if number >= least else None
