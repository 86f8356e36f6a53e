"""Lists of images with labels, and how to find and divide them; used by datasets.py."""

from __future__ import annotations

import csv
import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from scipy.io import loadmat


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


def checked_split(images: list[Path], labels: list[int], names: list[str], where: Path) -> Split:
    """Checks that every file is there: one listing per folder, not one look-up per image.

    Args:
        where: the list that names the images, or their folder, for messages.
    """
    if not images:
        raise DataError(f"{where} names no image at all. Unpack the data set again.")
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
        table = json.loads(read_text(file))
    except json.JSONDecodeError as error:
        raise DataError(f"{file} is not valid JSON ({error}). Unpack it again.") from error
    kinds = {type(value) for value in table.values()} if isinstance(table, dict) else set()
    if len(kinds) != 1 or not kinds <= {str, int, list}:
        raise DataError(
            f"{file} is not a table of images: it must be one JSON object whose values are all "
            "class ids, or all lists of images. Unpack it again."
        )
    return table


def read_text(file: Path) -> str:
    """The text of a list, with or without a byte order mark."""
    try:
        return file.read_text("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"{file} is not UTF-8 ({error}). Save it as UTF-8.") from error


def read_table(file: Path, columns: Sequence[str], source: str) -> list[dict[str, str]]:
    """Rows of a table separated by semicolons; an error says where `source` has it."""
    lines = csv.DictReader(read_text(file).splitlines(), delimiter=";", skipinitialspace=True)
    rows = [{key: (value or "").strip() for key, value in row.items() if key} for row in lines]
    if rows and not set(columns) <= rows[0].keys():
        raise DataError(
            f"{file}: columns {' and '.join(columns)} expected, found {', '.join(rows[0])}. It "
            f"must be the file of {source}, separated by semicolons."
        )
    return rows


def read_mat(file: Path, *keys: str) -> list[np.ndarray]:
    """Arrays of a Matlab file."""
    try:
        found = loadmat(file)
        return [found[key] for key in keys]
    except FileNotFoundError:
        raise
    except Exception as error:  # scipy raises whatever it stumbles over
        raise DataError(
            f"{file} is not a whole Matlab file with {', '.join(keys)} ({error!r}). Delete it and "
            "add --download."
        ) from error


def check_labels(name: str, splits: Splits) -> None:
    """Every label names a class, and every class has a training image.

    Raises:
        DataError: otherwise.
    """
    known = range(splits.num_classes)
    for part in ("train", "val", "test"):
        split = getattr(splits, part)
        wrong = sorted({label for label in split.labels if label not in known}) if split else []
        if wrong:
            raise DataError(
                f"{name}: label {few(wrong)} of the {part} split is out of range: there are "
                f"{splits.num_classes} classes. Unpack the archive again, it is damaged."
            )
    missing = sorted(set(known) - set(splits.train.labels))
    if missing:
        raise DataError(
            f"{name}: no training image of class {few(missing)}: its output would never be "
            "trained. Unpack the archive again, the folder is probably incomplete."
        )


def _listing(folder: Path) -> set[str]:
    return set(os.listdir(folder)) if folder.is_dir() else set()


def few(values: Sequence[int]) -> str:
    shown = ", ".join(str(v) for v in values[:5])
    return shown if len(values) <= 5 else f"{shown} and {len(values) - 5} more"
