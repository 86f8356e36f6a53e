"""Lists of images with labels, and how to find and divide them; used by datasets.py."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np


class DataError(Exception):
    """A data set on disk cannot be used: says which file, why and what to do."""


@dataclass(frozen=True)
class Split:
    """Images and labels; `images` are files, or uint8 arrays (height, width, 3)."""

    images: Sequence[Path] | Sequence[np.ndarray]
    labels: Sequence[int]
    names: Sequence[str]
    """One name per image that does not depend on where the data lie."""

    def __len__(self) -> int:
        return len(self.labels)

    def subset(self, indices: Sequence[int]) -> Split:
        return Split(
            [self.images[i] for i in indices],
            [self.labels[i] for i in indices],
            [self.names[i] for i in indices],
        )

    def fingerprint(self) -> str:
        """16 hexadecimal digits that change when an image, a label or their order does."""
        text = "\n".join(f"{n}\t{y}" for n, y in zip(self.names, self.labels, strict=True))
        return hashlib.sha256(text.encode()).hexdigest()[:16]


@dataclass(frozen=True)
class Splits:
    """One data set: the training images, the validation images (None: none kept), the test."""

    num_classes: int
    train: Split
    val: Split | None
    test: Split


def hold_out(names: Sequence[str], kept: float) -> tuple[list[int], list[int]]:
    """Indices to keep, int(kept * n) of them, and to hold out; both in the order of `names`.

    Held out are the names with the smallest SHA-256, so the split depends on nothing else.
    """
    digest = [hashlib.sha256(name.encode()).digest() for name in names]
    number = len(names) - int(kept * len(names))
    held = set(sorted(range(len(names)), key=digest.__getitem__)[:number])
    return [i for i in range(len(names)) if i not in held], sorted(held)


def any_case(folder: Path, relative: str) -> Path | None:
    """folder / relative if it exists, upper and lower case alike."""
    for part in Path(relative).parts:
        exact = folder / part
        if not exact.exists():
            if not folder.is_dir():
                return None
            same = sorted(e for e in os.listdir(folder) if e.lower() == part.lower())
            if not same:
                return None
            exact = folder / same[0]
        folder = exact
    return folder


def checked_split(images: list[Path], labels: list[int], names: list[str]) -> Split:
    """Checks that every file is there: one listing per folder, not one look-up per image."""
    if not images:
        raise DataError("a split without a single image. Unpack the data set again.")
    present = {folder: _listing(folder) for folder in {path.parent for path in images}}
    missing = [path for path in images if path.name not in present[path.parent]]
    if missing:
        raise DataError(
            f"{len(missing)} of {len(images)} images are missing, the first is {missing[0]}. "
            "Unpack the archive again, or correct the list that names them."
        )
    return Split(images, labels, names)


def known_label(value: object, number: dict, file: Path) -> int:
    """The number of a class; an error names the file if training has no such class."""
    if value not in number:
        raise DataError(
            f"{file}: class {value!r} is out of range: the training split has no such class "
            f"({len(number)} classes). The split files do not belong together; unpack them again."
        )
    return number[value]


def read_json(file: Path, source: str) -> dict:
    """The table in the file; an error says where `source` has it."""
    if not file.is_file():
        raise DataError(f"{file} is missing: it lists the images. Put in {source}.")
    try:
        return json.loads(file.read_text("utf-8-sig"))
    except json.JSONDecodeError as error:
        raise DataError(f"{file} is not valid JSON ({error}). Unpack it again.") from error


def _listing(folder: Path) -> set[str]:
    return set(os.listdir(folder)) if folder.is_dir() else set()


def few(values: Sequence[int]) -> str:
    shown = ", ".join(str(v) for v in values[:5])
    return shown if len(values) <= 5 else f"{shown} and {len(values) - 5} more"
