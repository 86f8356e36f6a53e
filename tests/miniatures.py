"""Miniatures of the paper's data sets, in the formats that they have on disk.

Every class has its own colour, so a model can learn the task.
"""

import json
import pickle
from pathlib import Path

import numpy as np
from PIL import Image
from scipy.io import savemat

CLASSES = 3
PER_CLASS = {"train": 5, "val": 2, "test": 3}


def picture(label: int, index: int, size: tuple[int, int] = (24, 20)) -> np.ndarray:
    """uint8 (height, width, 3)."""
    rng = np.random.default_rng(1000 * label + index)
    colour = np.random.default_rng(label).integers(0, 256, 3)
    noise = rng.integers(-20, 21, (size[1], size[0], 3))
    return np.clip(colour + noise, 0, 255).astype(np.uint8)


def write_picture(path: Path, label: int, index: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(picture(label, index)).save(path)


def _write_fgvc(folder: Path, name, identifier, prefix: str) -> None:
    """VPT's format; `name(label, index)` is the json key, `prefix` what lies in front of it."""
    index = 0
    for split, count in PER_CLASS.items():
        table = {}
        for _ in range(count):
            for label in range(CLASSES):
                key = name(label, index)
                table[key] = identifier(label)
                write_picture(folder / prefix / key, label, index)
                index += 1
        (folder / f"{split}.json").write_text(json.dumps(table))


def write_cub(root: Path) -> None:
    folder = root / "FGVC/CUB_200_2011"
    _write_fgvc(
        folder,
        lambda label, i: f"{label + 1:03d}.Some_Bird/Some_Bird_{i:04d}.jpg",
        lambda label: f"{label + 1:03d}",
        "images",
    )
    lines = [f"{c + 1} {c + 1:03d}.Some_Bird" for c in range(CLASSES)]
    (folder / "classes.txt").write_text("\n".join(lines))


def write_nabirds(root: Path) -> None:
    folder = root / "FGVC/nabirds"
    _write_fgvc(
        folder,
        lambda label, i: f"{[295, 730, 1010][label]:04d}/{i:032x}.jpg",
        lambda label: [295, 730, 1010][label],
        "images",
    )
    # as in the real one, the validation split lacks a class
    table = json.loads((folder / "val.json").read_text())
    (folder / "val.json").write_text(json.dumps({k: v for k, v in table.items() if v != 730}))


def write_dogs(root: Path) -> None:
    _write_fgvc(
        root / "FGVC/stanford-dogs",
        lambda label, i: f"n0208{label}-some_dog/n0208{label}_{i}.jpg",
        lambda label: label + 1,
        "images",
    )


def write_cars(root: Path) -> None:
    folder = root / "FGVC/stanford-cars"
    _write_fgvc(folder, lambda label, i: f"car_ims/{i:06d}.jpg", lambda label: label + 1, "")
    # as in the real one, every validation image is a training image too
    train = json.loads((folder / "train.json").read_text())
    train |= json.loads((folder / "val.json").read_text())
    (folder / "train.json").write_text(json.dumps(train))


def write_flowers(root: Path) -> None:
    _write_fgvc(
        root / "FGVC/OxfordFlower",
        lambda label, i: f"jpg/image_{i + 1:05d}.jpg",
        lambda label: label + 1,
        "",
    )


def write_flowers_torchvision(root: Path) -> None:
    folder = root / "flowers-102"
    labels, ids = [], {}
    for split, key in (("train", "trnid"), ("val", "valid"), ("test", "tstid")):
        ids[key] = []
        for label in range(CLASSES):
            for _ in range(PER_CLASS[split]):
                labels.append(label + 1)
                ids[key].append(len(labels))
                write_picture(folder / f"jpg/image_{len(labels):05d}.jpg", label, len(labels))
    savemat(folder / "imagelabels.mat", {"labels": np.array(labels, dtype=np.uint8)})
    savemat(folder / "setid.mat", {key: np.array(value) for key, value in ids.items()})


def _cifar_rows(per_class: int, classes: int, offset: int = 0) -> tuple[np.ndarray, list[int]]:
    labels = [label for _ in range(per_class) for label in range(classes)]
    rows = [
        picture(label, offset + i, (32, 32)).transpose(2, 0, 1).reshape(-1)
        for i, label in enumerate(labels)
    ]
    return np.stack(rows), labels


def _pickle(path: Path, value: dict) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(pickle.dumps(value))


def write_cifar10(root: Path) -> None:
    folder = root / "cifar-10-batches-py"
    for batch in range(1, 6):
        data, labels = _cifar_rows(1, 10, 100 * batch)
        _pickle(folder / f"data_batch_{batch}", {"data": data, "labels": labels})
    data, labels = _cifar_rows(1, 10)
    _pickle(folder / "test_batch", {"data": data, "labels": labels})
    _pickle(folder / "batches.meta", {"label_names": [f"class {i}" for i in range(10)]})


def write_cifar100(root: Path) -> None:
    folder = root / "cifar-100-python"
    for split, per_class in (("train", 4), ("test", 1)):
        data, labels = _cifar_rows(per_class, CLASSES)
        _pickle(folder / split, {"data": data, "fine_labels": labels})
    names = [f"class {i}" for i in range(CLASSES)]
    _pickle(folder / "meta", {"fine_label_names": names})


def write_svhn(root: Path) -> None:
    root.mkdir(parents=True, exist_ok=True)
    for split, per_class in (("train", 5), ("test", 1)):
        labels = [label for _ in range(per_class) for label in range(10)]
        images = np.stack([picture(y, i, (32, 32)) for i, y in enumerate(labels)], axis=-1)
        # the digit 0 has the label 10 in the files
        digits = np.array([[y or 10] for y in labels], dtype=np.uint8)
        savemat(root / f"{split}_32x32.mat", {"X": images, "y": digits})


def write_gtsrb(root: Path) -> None:
    folder = root / "gtsrb"
    for label in range(CLASSES):
        for track in range(5):
            for photo in range(2):
                name = f"{label:05d}/{track:05d}_{photo:05d}.ppm"
                write_picture(folder / "GTSRB/Training" / name, label, 10 * track + photo)
    rows = ["Filename;Width;Height;Roi.X1;Roi.Y1;Roi.X2;Roi.Y2;ClassId"]
    for i in range(6):
        write_picture(folder / f"GTSRB/Final_Test/Images/{i:05d}.ppm", i % CLASSES, 100 + i)
        rows.append(f"{i:05d}.ppm;24;20;1;1;20;20;{i % CLASSES}")
    (folder / "GT-final_test.csv").write_text("\r\n".join(rows) + "\r\n")


def write_dtd(root: Path) -> None:
    folder = root / "dtd/dtd"
    (folder / "labels").mkdir(parents=True)
    for split, count in PER_CLASS.items():
        names = []
        for label, name in enumerate(("banded", "dotted", "woven")):
            for i in range(count):
                names.append(f"{name}/{name}_{split}{i:04d}.jpg")
                write_picture(folder / "images" / names[-1], label, i)
        (folder / "labels" / f"{split}1.txt").write_text("\n".join(names) + "\n")


def write_food101(root: Path) -> None:
    folder = root / "food-101"
    (folder / "meta").mkdir(parents=True)
    for split, count in (("train", 6), ("test", 2)):
        table: dict[str, list[str]] = {}
        for label, name in enumerate(("apple_pie", "pad_thai", "waffles")):
            table[name] = [f"{name}/{label}{split == 'test':d}{i:05d}" for i in range(count)]
            for i, key in enumerate(table[name]):
                write_picture(folder / f"images/{key}.jpg", label, i)
        (folder / f"meta/{split}.json").write_text(json.dumps(table))


HTA_WRITERS = {
    "cub": write_cub,
    "nabirds": write_nabirds,
    "flowers": write_flowers,
    "dogs": write_dogs,
    "cars": write_cars,
    "cifar10": write_cifar10,
    "cifar100": write_cifar100,
    "dtd": write_dtd,
    "gtsrb": write_gtsrb,
    "svhn": write_svhn,
    "food101": write_food101,
}


def write_vtab(root: Path, name: str, classes: int) -> None:
    """A task with one training image per class, but at least ten."""
    folder = root / "VTAB/vtab-1k" / name
    lists: dict[str, list[str]] = {}
    for split, count in (("train800", max(classes, 10)), ("val200", 3), ("test", 4)):
        lists[split] = []
        for i in range(count):
            label = i % classes
            key = f"images/{'test' if split == 'test' else 'train'}/{split}_{i:06d}.jpg"
            write_picture(folder / key, label, i)
            lists[split].append(f"{key} {label}")
    lists["train800val200"] = lists["train800"] + lists["val200"]
    for split, lines in lists.items():
        (folder / f"{split}.txt").write_text("\n".join(lines) + "\n")
