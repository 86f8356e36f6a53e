"""Where the data sets come from, and how to get them; used by datasets.py."""

from __future__ import annotations

from pathlib import Path

import torchvision.datasets as tv
from splits import DataError

SOURCES: dict[str, str] = {
    "cub": "https://www.vision.caltech.edu/datasets/cub_200_2011",
    "nabirds": "https://dl.allaboutbirds.org/nabirds",
    "flowers": "https://www.robots.ox.ac.uk/~vgg/data/flowers/102",
    "dogs": "http://vision.stanford.edu/aditya86/ImageNetDogs",
    "cars": "https://github.com/KaiyangZhou/CoOp/blob/main/DATASETS.md#stanfordcars",
    "vtab": "the link in https://github.com/dongzelian/SSF#data-preparation",
}
JSON_SOURCE = "the split files fgvc_split.zip linked in https://github.com/KMnP/vpt#datasets"
# torchvision's class, and the splits that it downloads one by one
DOWNLOADS: dict[str, tuple[str, tuple[str, ...]]] = {
    "cifar10": ("CIFAR10", ()),
    "cifar100": ("CIFAR100", ()),
    "dtd": ("DTD", ()),
    "gtsrb": ("GTSRB", ("train", "test")),
    "svhn": ("SVHN", ("train", "test")),
    "food101": ("Food101", ()),
    "flowers": ("Flowers102", ()),
}


def remedy(name: str, folder: Path) -> str:
    """What to do when files of a data set are missing in `folder`."""
    if name in DOWNLOADS:
        return "Add --download to fetch it with torchvision."
    return f"Unpack {SOURCES[name]} to {folder}, and put in {JSON_SOURCE}."


def fetch(name: str, root: Path, usual: str) -> None:
    """Download a data set with torchvision into `root`.

    Args:
        usual: its folder under `root`, for messages.

    Raises:
        DataError: torchvision cannot, or the download failed.
    """
    if name not in DOWNLOADS:
        raise DataError(f"{name}: torchvision cannot download it. {remedy(name, root / usual)}")
    kind, splits = DOWNLOADS[name]
    try:
        root.mkdir(parents=True, exist_ok=True)
        for options in [{"split": split} for split in splits] or [{}]:
            getattr(tv, kind)(str(root), download=True, **options)
    except (OSError, RuntimeError) as error:
        raise DataError(
            f"{name}: the download to {root} failed ({error}). Check the connection and the free "
            "space and run the same command again, or bring the files there yourself."
        ) from error
