"""The paper's data sets as they lie on disk: 11 of "HTA" and the 19 tasks of VTAB-1k.

`load_hta` and `load_vtab` return `Splits`: lists of files, or arrays, with labels 0..C-1.

Splits. `released` are those the authors' code trains and tests on; `honest` keeps a validation
split out of the training images so that nothing is chosen on the test split. Where the authors draw
at random we draw by a fixed rule instead, `hold_out`: an image is held out if the SHA-256 of its
name is among the smallest. The rule needs no seed and gives the same split on every machine.

| data set | released train | honest train / val | test |
|---|---|---|---|
| cub, nabirds, dogs, flowers | train.json | train.json / val.json | test.json |
| cars | train.json | train.json without val.json / val.json | test.json |
| cifar10, cifar100 | all 50,000 | 45,000 / 5,000 by `hold_out` | 10,000 |
| dtd | train1.txt | train1.txt / val1.txt | test1.txt |
| gtsrb | 80% of the images by `hold_out` | 80% / 20% of the tracks by `hold_out` | Final_Test |
| svhn | first 80% | first 80% / last 20% | test_32x32.mat |
| food101 | 80% by `hold_out` | 80% / 20% by `hold_out` | test.json |
| VTAB-1k | train800val200.txt | train800.txt / val200.txt | test.txt |

GTSRB has 30 photos of every sign, one track: images of one track on both sides would make its
validation accuracy worthless, hence whole tracks.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torchvision.datasets as tv
from sources import JSON_SOURCE, SOURCES, fetch, remedy
from splits import (
    DataError,
    Split,
    Splits,
    any_case,
    check_labels,
    checked_split,
    few,
    hold_out,
    known_label,
    read_json,
    read_mat,
    read_table,
    read_text,
)

logger = logging.getLogger(__name__)


# ---- where things lie ----------------------------------------------------------------------------

# every spelling in the released README and code, VPT, DAM-VP and SSF; upper and lower case alike
FOLDERS: dict[str, tuple[str, ...]] = {
    "cub": ("FGVC/CUB_200_2011", "CUB_200_2011", "FGVC/cub", "cub", "cub200"),
    "nabirds": ("FGVC/nabirds", "nabirds"),
    "flowers": (
        "FGVC/OxfordFlower",
        "OxfordFlower",
        "FGVC/OxfordFlowers",
        "flowers-102",
        "flowers",
    ),
    "dogs": ("FGVC/stanford-dogs", "stanford-dogs", "FGVC/StanfordDogs", "dogs"),
    "cars": ("FGVC/stanford-cars", "stanford-cars", "FGVC/StanfordCars", "stanford_cars", "cars"),
    "cifar10": ("cifar-10-batches-py", "cifar10/cifar-10-batches-py"),
    "cifar100": ("cifar-100-python", "cifar100/cifar-100-python", "cifar/cifar-100-python"),
    "dtd": ("dtd/dtd", "dtd"),
    "gtsrb": ("gtsrb",),
    "svhn": (".", "svhn"),
    "food101": ("food-101", "food101/food-101", "food101"),
}
_json = partial(read_json, source=JSON_SOURCE)


def load_hta(name: str, root: Path, *, honest: bool = True, download: bool = False) -> Splits:
    """One of the 11 data sets of HTA.

    Args:
        name: a key of `FOLDERS`.
        root: the folder that holds all data sets, or the folder of this one.
        honest: keep a validation split; False trains on what the released code trains on.
        download: fetch it with torchvision if it is one of `DOWNLOADS`.

    Raises:
        DataError: files are missing or hold something else.
    """
    if name not in FOLDERS:
        raise DataError(f"data set {name!r} is unknown. Use one of {', '.join(FOLDERS)}.")
    if download:
        fetch(name, Path(root).expanduser(), FOLDERS[name][0])
    readers: dict[str, Callable[[Path, bool], Splits]] = {
        "flowers": _flowers,
        "cifar10": _cifar,
        "cifar100": _cifar,
        "dtd": _dtd,
        "gtsrb": _gtsrb,
        "svhn": _svhn,
        "food101": _food,
    }
    reader = readers.get(name, _fgvc)
    folder = _folder(name, root)
    try:
        splits = reader(folder, honest)
    except FileNotFoundError as error:
        raise DataError(f"{name}: {error.filename} is missing. {remedy(name, folder)}") from error
    check_labels(f"{name} in {folder}", splits)
    return splits


def _folder(name: str, root: Path) -> Path:
    root = Path(root).expanduser()
    wanted = {
        "flowers": ("train.json", "setid.mat"),
        "cifar10": ("data_batch_1",),
        "cifar100": ("train",),
        "dtd": ("labels/train1.txt",),
        "gtsrb": ("GTSRB",),
        "svhn": ("train_32x32.mat",),
        "food101": ("meta/train.json",),
    }.get(name, ("train.json",))
    # the root may be the folder of the data set itself, as in VPT
    for spelling in (*FOLDERS[name], "."):
        folder = any_case(root, spelling)
        if folder and any(any_case(folder, file) for file in wanted):
            return folder
    usual = root / FOLDERS[name][0]
    raise DataError(
        f"{name}: not found under {root}: expected for example {usual / wanted[0]} (also accepted: "
        f"{', '.join((*FOLDERS[name][1:], 'the folder itself'))}, in upper or lower case). "
        f"{remedy(name, usual)}"
    )


# ---- one reader per format -----------------------------------------------------------------------


def _fgvc(folder: Path, honest: bool) -> Splits:
    """VPT's json files, {relative path: class id}: CUB-200, NABirds, Dogs, Cars, Flowers."""
    tables = {split: _json(folder / f"{split}.json") for split in ("train", "test")}
    if honest:
        tables["val"] = _json(folder / "val.json")
        # 815 of the 8,144 training images of Cars are its validation images
        tables["train"] = {k: v for k, v in tables["train"].items() if k not in tables["val"]}
    # ids are "001".. or 295..1010: numbered by the training split, for NABirds' validation split
    # has 553 of the 555 classes
    number = {c: i for i, c in enumerate(sorted(set(tables["train"].values())))}
    images = any_case(folder, "images") or folder
    splits = {
        split: checked_split(
            [_image_path(folder, images, key) for key in table],
            [known_label(c, number, folder / f"{split}.json") for c in table.values()],
            list(table),
            folder / f"{split}.json",
        )
        for split, table in tables.items()
    }
    return Splits(len(number), splits["train"], splits.get("val"), splits["test"])


def _image_path(folder: Path, images: Path, key: str) -> Path:
    # Cars and Flowers keep the subfolder in the key (car_ims/, jpg/), the others leave out images/
    return folder / key if key.split("/")[0] in ("car_ims", "jpg") else images / key


def _flowers(folder: Path, honest: bool) -> Splits:
    """VPT's json files, or torchvision's flowers-102: jpg/, imagelabels.mat, setid.mat."""
    if any_case(folder, "train.json"):
        return _fgvc(folder, honest)
    [labels] = read_mat(folder / "imagelabels.mat", "labels")
    labels = labels.reshape(-1).astype(int) - 1
    splits = {}
    ids = read_mat(folder / "setid.mat", "trnid", "valid", "tstid")
    for split, numbers in zip(("train", "val", "test"), ids, strict=True):
        numbers = numbers.reshape(-1).astype(int)
        if numbers.size and not 1 <= numbers.min() <= numbers.max() <= len(labels):
            raise DataError(
                f"{folder}: setid.mat names images {numbers.min()} to {numbers.max()}, but "
                f"imagelabels.mat has {len(labels)} labels. Delete both and add --download."
            )
        names = [f"jpg/image_{i:05d}.jpg" for i in numbers]
        chosen, images = labels[numbers - 1].tolist(), [folder / name for name in names]
        splits[split] = checked_split(images, chosen, names, folder / "setid.mat")
    count = max(splits["train"].labels) + 1
    return Splits(count, splits["train"], splits["val"] if honest else None, splits["test"])


def _cifar(folder: Path, honest: bool) -> Splits:
    kind = tv.CIFAR100 if folder.name.lower() == "cifar-100-python" else tv.CIFAR10
    try:
        train, test = (kind(folder.parent, train=part) for part in (True, False))
    except RuntimeError as error:
        raise DataError(
            f"{folder}: torchvision finds a file missing or damaged ({error}). Delete the folder "
            "and add --download."
        ) from error
    splits = [
        Split(list(data.data), list(data.targets), [f"{part}/{i}" for i in range(len(data))])
        for part, data in (("train", train), ("test", test))
    ]
    if not honest:
        return Splits(len(train.classes), splits[0], None, splits[1])
    kept, held = hold_out(splits[0].names, 0.9)
    return Splits(len(train.classes), splits[0].subset(kept), splits[0].subset(held), splits[1])


def _dtd(folder: Path, honest: bool) -> Splits:
    lists = folder / "labels"
    lines = {
        split: read_text(lists / f"{split}1.txt").split() for split in ("train", "val", "test")
    }
    number = {c: i for i, c in enumerate(sorted({line.split("/")[0] for line in lines["train"]}))}
    splits = {
        split: checked_split(
            [folder / "images" / line for line in names],
            [
                known_label(line.split("/")[0], number, folder / f"labels/{split}1.txt")
                for line in names
            ],
            names,
            lists / f"{split}1.txt",
        )
        for split, names in lines.items()
    }
    val = splits["val"] if honest else None
    return Splits(len(number), splits["train"], val, splits["test"])


def _gtsrb(folder: Path, honest: bool) -> Splits:
    training = folder / "GTSRB" / "Training"
    classes = sorted(entry.name for entry in training.iterdir() if entry.is_dir())
    names = [f"{c}/{file.name}" for c in classes for file in sorted((training / c).glob("*.ppm"))]
    labels = [classes.index(name.split("/")[0]) for name in names]
    everything = checked_split([training / name for name in names], labels, names, training)
    table = folder / "GT-final_test.csv"
    images = folder / "GTSRB" / "Final_Test" / "Images"
    # "00012" in the folder's name is 12 in the table
    number = {c.lstrip("0") or "0": i for i, c in enumerate(classes)}
    rows = read_table(table, ("Filename", "ClassId"), source="GTSRB_Final_Test_GT.zip")
    test = checked_split(
        [images / row["Filename"] for row in rows],
        [known_label(row["ClassId"].lstrip("0") or "0", number, table) for row in rows],
        [row["Filename"] for row in rows],
        table,
    )
    if not honest:
        return Splits(len(classes), everything.subset(hold_out(names, 0.8)[0]), None, test)
    # 00012/00003_00029.ppm is photo 29 of track 3 of class 12
    tracks = sorted({name.rsplit("_", 1)[0] for name in names})
    kept = {tracks[i] for i in hold_out(tracks, 0.8)[0]}
    inside = [name.rsplit("_", 1)[0] in kept for name in names]
    train = everything.subset([i for i, keep in enumerate(inside) if keep])
    val = everything.subset([i for i, keep in enumerate(inside) if not keep])
    return Splits(len(classes), train, val, test)


def _svhn(folder: Path, honest: bool) -> Splits:
    splits = {}
    for split in ("train", "test"):
        file = folder / f"{split}_32x32.mat"
        if not file.is_file():
            raise DataError(f"{file} is missing. Add --download.")
        pixels, digits = read_mat(file, "X", "y")
        digits = digits.astype(int).reshape(-1)
        wrong = ""
        if not set(digits.tolist()) <= set(range(11)):
            wrong = f"label {max(digits)} is out of range, expected 1..10 (10 is the digit 0)"
        elif pixels.ndim != 4 or pixels.shape[2:] != (3, len(digits)):
            wrong = f"pixels of shape {pixels.shape} do not fit {len(digits)} labels"
        if wrong:
            raise DataError(f"{file}: {wrong}. Delete the file and add --download.")
        images = list(pixels.transpose(3, 0, 1, 2))
        names = [f"{split}/{i}" for i in range(len(digits))]
        splits[split] = Split(images, (digits % 10).tolist(), names)
    everything = splits["train"]
    border = int(0.8 * len(everything))
    val = everything.subset(range(border, len(everything))) if honest else None
    return Splits(10, everything.subset(range(border)), val, splits["test"])


def _food(folder: Path, honest: bool) -> Splits:
    tables = {split: _json(folder / "meta" / f"{split}.json") for split in ("train", "test")}
    number = {c: i for i, c in enumerate(sorted(tables["train"]))}
    splits = {}
    for split, table in tables.items():
        names = [f"{key}.jpg" for keys in table.values() for key in keys]
        labels = [
            known_label(c, number, folder / f"meta/{split}.json")
            for c, keys in table.items()
            for _ in keys
        ]
        images = [folder / "images" / name for name in names]
        splits[split] = checked_split(images, labels, names, folder / f"meta/{split}.json")
    kept, held = hold_out(splits["train"].names, 0.8)
    val = splits["train"].subset(held) if honest else None
    return Splits(len(number), splits["train"].subset(kept), val, splits["test"])


# ---- VTAB-1k -------------------------------------------------------------------------------------

# spellings of the README that differ from the archive's folders, and SSF's names
VTAB_ALIASES: dict[str, tuple[str, ...]] = {
    "clevr_count": ("clever_count",),
    "clevr_dist": ("clever_dist",),
    "cifar": ("cifar100",),
    "oxford_flowers102": ("flowers102",),
    "oxford_iiit_pet": ("pets",),
}


def load_vtab(name: str, root: Path, count: int, *, honest: bool = True) -> Splits:
    """One of the 19 tasks of VTAB-1k.

    Args:
        name: its folder's name, such as "clevr_count".
        root: holds VTAB/vtab-1k/<name>, vtab-1k/<name> or <name>, or is that folder.
        count: how many classes the task has; the lists hold bare numbers.
        honest: train on 800 and validate on 200 images; False trains on all 1,000.

    Raises:
        DataError: files are missing or hold something else.
    """
    root = Path(root).expanduser()
    places = [
        f"{parent}/{spelling}"
        for parent in ("VTAB/vtab-1k", "vtab-1k", ".")
        for spelling in (name, *VTAB_ALIASES.get(name, ()))
    ]
    folders = [any_case(root, place) for place in (*places, ".")]
    folder = next((f for f in folders if f and (f / "test.txt").is_file()), None)
    if folder is None:
        raise DataError(
            f"{name}: not found under {root}: expected {root / places[0] / 'test.txt'}. Unpack "
            f"vtab-1k from {SOURCES['vtab']}."
        )
    train = _vtab_list(folder, "train800.txt" if honest else "train800val200.txt", count)
    val = _vtab_list(folder, "val200.txt", count) if honest else None
    missing = sorted(set(range(count)) - set(train.labels))
    if missing:
        # not an error: 1,000 images drawn at random do not cover 397 classes
        logger.warning("%s: no training image of class %s", name, few(missing))
    return Splits(count, train, val, _vtab_list(folder, "test.txt", count))


def _vtab_list(folder: Path, file: str, num_classes: int) -> Split:
    if not (folder / file).is_file():
        raise DataError(f"{folder / file} is missing. Unpack vtab-1k again: {SOURCES['vtab']}.")
    names, labels = [], []
    for row, line in enumerate(read_text(folder / file).splitlines(), 1):
        if not line.strip():
            continue
        # from the right: the released code splits at every blank and breaks on paths with blanks
        name, _, label = line.rstrip().rpartition(" ")
        if not name or not label.isdecimal() or int(label) >= num_classes:
            raise DataError(
                f"{folder / file}, line {row}: {line!r} is not 'path label' with a label from 0 to "
                f"{num_classes - 1}. Correct the line, or unpack vtab-1k again."
            )
        names.append(name)
        labels.append(int(label))
    return checked_split([folder / name for name in names], labels, names, folder / file)
