"""From files to batches: reading any image as RGB, transforms, and loaders that keep a GPU busy.

Three things cost time: decoding a file, augmenting it, and moving it. So

* a deterministic pipeline (evaluation, and VTAB's training) is decoded once and then lives on the
  device as uint8, if it fits: batches are an indexing operation;
* an augmented one is decoded once into memory, if it fits, and workers only augment;
* batches travel as uint8 and are normalised on the device.

Workers live as long as their loader. What they draw for an image follows from the epoch's seed and
the image's place in the epoch, not from the worker that has it.
"""

from __future__ import annotations

import os
import random
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import psutil
import torch
import torch.nn.functional as F
from PIL import Image
from splits import DataError, Split
from timm.data import (
    IMAGENET_DEFAULT_MEAN,
    IMAGENET_DEFAULT_STD,
    auto_augment,
    create_transform,
)
from timm.data.random_erasing import RandomErasing
from timm.data.transforms import RandomResizedCropAndInterpolation
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler, default_collate

Picture = Image.Image | np.ndarray
Transform = Callable[[Picture], Tensor]
# the part of the free memory that decoded images may take
MEMORY_SHARE = 0.4
# images that are on their way to the device at once: it may have more memory than its host
PART = 1024
# batches that a worker prepares ahead
PREFETCH = 4


def read_image(path: Path) -> Image.Image:
    """The file as an RGB image, whatever it holds: grayscale, palette, CMYK, alpha or 16 bits.

    Raises:
        DataError: the file is truncated or not an image.
    """
    try:
        with Image.open(path) as image:
            image.load()
            if image.mode.startswith("I"):
                # Pillow cuts 16-bit values at 255 instead of scaling them
                values = (np.asarray(image).astype(np.float64) / 257).round().clip(0, 255)
                return Image.fromarray(values.astype(np.uint8)).convert("RGB")
            return image.convert("RGB")
    except Image.DecompressionBombError as error:
        raise DataError(f"{path}: {error}. Make the image smaller, or leave it out.") from error
    except Exception as error:  # the decoders of damaged files raise whatever they stumble over
        raise DataError(
            f"{path}: not a readable image ({error}). Unpack the archive again; the file is "
            "probably truncated."
        ) from error


def build_transform(kind: str, size: int, *, training: bool) -> Transform:
    """The pipeline from an RGB image or array to a uint8 tensor (3, size, size).

    "reference" is the released one for training (random crop, flip, RandAugment; the random
    erasing follows on the device) and, for evaluation, resize to size / 0.875 and centre crop.
    "resize" is SSF's and MambaPEFT's for VTAB: the whole image to size x size, nothing random.
    """
    if kind == "resize" or not training:
        crop = {"crop_pct": 1.0, "crop_mode": "squash"} if kind == "resize" else {"crop_pct": 0.875}
        pipeline = create_transform(size, interpolation="bicubic", use_prefetcher=True, **crop)
        pipeline.transforms.insert(0, open_image)
        return pipeline
    pipeline = create_transform(
        size,
        is_training=True,
        color_jitter=0.3,
        auto_augment="rand-m9-mstd0.5-inc1",
        interpolation="bicubic",
        use_prefetcher=True,
    )
    crop = pipeline.transforms[0]
    pipeline.transforms[0] = CropAndResize(size, scale=crop.scale, ratio=crop.ratio)
    for step in pipeline.transforms:
        for op in step.ops if isinstance(step, auto_augment.RandAugment) else ():
            if op.aug_fn is auto_augment.posterize:
                op.aug_fn = posterise
    return pipeline


class CropAndResize(RandomResizedCropAndInterpolation):
    """timm's random crop, resized by PyTorch's bicubic filter.

    It is Pillow's filter with vector instructions. Of 200 crops to 224 pixels of scikit-learn's two
    sample photographs, 186 differ from Pillow 13.0's by 2 of 255 at most, and 14 by up to 9: those
    Pillow resizes along their columns first. On average a value differs by 0.014.
    """

    def __call__(self, picture: Picture) -> Image.Image:
        if isinstance(picture, Image.Image):
            top, left, height, width = self.get_params(picture, self.scale, self.ratio)
            pixels = np.array(picture.crop((left, top, left + width, top + height)))
        else:
            # what get_params wants to know is the size
            like = torch.empty(picture.shape[:2], device="meta")
            top, left, height, width = self.get_params(like, self.scale, self.ratio)
            pixels = picture[top : top + height, left : left + width].copy()
        # a batch of one whose strides PyTorch takes for channels last, as Pillow's pixels are
        batch = torch.from_numpy(pixels)[None].permute(0, 3, 1, 2)
        batch = F.interpolate(batch, self.size, mode="bicubic", antialias=True)
        return Image.fromarray(batch.permute(0, 2, 3, 1)[0].contiguous().numpy())


def posterise(image: Image.Image, bits: int, **_: object) -> Image.Image:
    """timm's posterize for every Pillow: at full strength timm keeps no bit at all.

    Older Pillow makes that a black image, newer Pillow an error, once in some hundred images.
    """
    if bits < 1:
        return Image.new(image.mode, image.size)
    return auto_augment.posterize(image, bits)


class Transformed(Dataset):
    """(uint8 tensor (3, size, size), label) per image of a split, read when asked for.

    An index may come with a seed for what is random, as `Order` gives it to workers.
    """

    def __init__(self, split: Split, transform: Transform) -> None:
        self.split = split
        self.transform = transform

    def __len__(self) -> int:
        return len(self.split)

    def __getitem__(self, index: int | tuple[int, int]) -> tuple[Tensor, int]:
        if isinstance(index, tuple):
            index, seed = index
            # timm draws from the first two, torchvision from the third
            random.seed(seed)
            np.random.seed(seed)
            torch.default_generator.manual_seed(seed)
        picture = self.split.images[index]
        if isinstance(picture, Path):
            picture = read_image(picture)
        return self.transform(picture), self.split.labels[index]


class Resident(Dataset):
    """A split that lives on a device: uint8 (n, 3, size, size) and int64 (n,)."""

    def __init__(self, images: Tensor, labels: Tensor) -> None:
        self.images = images
        self.labels = labels

    def __len__(self) -> int:
        return len(self.labels)

    def __getitems__(self, indices: list[int]) -> tuple[Tensor, Tensor]:
        chosen = torch.tensor(indices, device=self.labels.device)
        return self.images[chosen], self.labels[chosen]


def open_image(image: Path | Picture) -> Image.Image:
    if isinstance(image, Image.Image):
        return image
    return Image.fromarray(image) if isinstance(image, np.ndarray) else read_image(image)


def decoded(split: Split, free_bytes: int) -> Split:
    """The split with its files decoded into memory, or as it is if they would not fit.

    Workers share the arrays with the process that forked them.
    """
    if not len(split) or isinstance(split.images[0], np.ndarray):
        return split
    sample = [read_image(split.images[i]).size for i in range(0, len(split), len(split) // 20 + 1)]
    estimate = 3 * len(split) * sum(w * h for w, h in sample) // len(sample)
    if estimate > MEMORY_SHARE * free_bytes:
        return split
    arrays = list(_in_threads(lambda path: np.asarray(read_image(path)), split.images))
    return Split(arrays, split.labels, split.names)


def resident(
    split: Split, transform: Transform, size: int, device: torch.device
) -> Resident | None:
    """The transformed split on the device, or None if it would not fit."""
    if 3 * size * size * len(split) > MEMORY_SHARE * free_memory(device):
        return None
    images = torch.empty((len(split), 3, size, size), dtype=torch.uint8, device=device)
    for start in range(0, len(split), PART):
        part = split.images[start : start + PART]
        done = torch.stack(list(_in_threads(lambda image: transform(open_image(image)), part)))
        images[start : start + len(part)] = done.to(device)
    return Resident(images, torch.tensor(split.labels, device=device))


def build_data(
    split: Split, kind: str, size: int, device: torch.device, *, training: bool
) -> Transformed | Resident:
    """The split on the device where nothing is random and it fits, else read by workers."""
    transform = build_transform(kind, size, training=training)
    if kind == "resize" or not training:
        data = resident(split, transform, size, device)
        if data is not None:
            return data
    return Transformed(decoded(split, free_memory(torch.device("cpu"))), transform)


def free_memory(device: torch.device) -> int:
    """Free bytes of the device's memory, this process's part of them."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    # torchrun says how many processes share this machine
    return psutil.virtual_memory().available // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def _in_threads(function: Callable, items: Sequence) -> Iterator:
    # Pillow decodes and resizes outside of the interpreter lock
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        yield from pool.map(function, items)


class Order(Sampler[int]):
    """The images of one epoch that this process sees, in an order that (seed, epoch) fixes.

    Every process takes each world-th image of the same permutation. Loaders are not given to
    `Accelerator.prepare`: with Hugging Face's `datasets` installed it imports a module of that
    name, and would find examples/datasets.py.
    """

    def __init__(self, length: int, seed: int | None, rank: int = 0, world: int = 1) -> None:
        self.length, self.seed, self.rank, self.world = length, seed, rank, world
        self.epoch = 0

    def __len__(self) -> int:
        return len(range(self.rank, self.length, self.world))

    def __iter__(self) -> Iterator[int]:
        order = torch.arange(self.length)
        if self.seed is not None:
            generator = torch.Generator().manual_seed(self.seed * 100_003 + self.epoch)
            order = torch.randperm(self.length, generator=generator)
        return iter(order[self.rank :: self.world].tolist())


class Seeded(Sampler[tuple[int, int]]):
    """The images of an order, each with a seed of its own that follows from torch's."""

    def __init__(self, order: Order) -> None:
        self.order = order

    def __len__(self) -> int:
        return len(self.order)

    def __iter__(self) -> Iterator[tuple[int, int]]:
        # NumPy takes 32 bits
        seeds = torch.randint(2**32, (len(self.order),)).tolist()
        return zip(self.order, seeds, strict=True)


def build_loader(
    data: Dataset, order: Order, batch_size: int, workers: int, *, drop_last: bool
) -> DataLoader:
    """Batches of (uint8 (batch, 3, size, size), int64 (batch,)).

    Workers draw with seeds that follow from the epoch's own: a resumed run then augments as the
    uninterrupted one did.
    """
    on_device = isinstance(data, Resident)
    workers = 0 if on_device else workers
    shuffled = order.seed is not None
    return DataLoader(
        data,
        batch_size,
        sampler=Seeded(order) if workers and shuffled else order,
        drop_last=drop_last,
        # starting workers draws from it; from torch's own, a resumed run would draw once more
        generator=torch.Generator(),
        num_workers=workers,
        # to start them takes longer than a small epoch
        persistent_workers=workers > 0 and shuffled,
        prefetch_factor=PREFETCH if workers else None,
        worker_init_fn=_one_thread if workers else None,
        collate_fn=_as_is if on_device else _stack,
        pin_memory=torch.cuda.is_available() and not on_device,
    )


def _one_thread(_: int) -> None:
    # a worker is one of many
    torch.set_num_threads(1)


def batches(loader: DataLoader) -> Iterator[tuple[Tensor, Tensor]]:
    """One pass over the loader; what a worker found wrong with a file, without its traceback."""
    try:
        yield from loader
    except DataError as error:
        raise DataError(str(error).rpartition("DataError: ")[2].strip()) from error


def _as_is(batch: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    return batch


def _stack(batch: list[tuple[Tensor, int]]) -> tuple[Tensor, Tensor]:
    images, labels = zip(*batch, strict=True)
    # pixel by pixel, as Pillow has them; a worker's batch is written to shared memory at once
    pixels = default_collate([image.permute(1, 2, 0) for image in images])
    return pixels.permute(0, 3, 1, 2), torch.tensor(labels)


class Normalise:
    """uint8 batches to normalised float on the device, with random erasing in training."""

    def __init__(self, device: torch.device, erase: float = 0.0) -> None:
        mean, std = IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
        self.mean = torch.tensor(mean, device=device).view(3, 1, 1) * 255
        self.std = torch.tensor(std, device=device).view(3, 1, 1) * 255
        self.device = device
        self.erase = RandomErasing(erase, mode="pixel", device=device.type) if erase else None

    def __call__(self, images: Tensor) -> Tensor:
        images = images.to(self.device, non_blocking=True)
        # from pixel by pixel to plane by plane, on the device
        images = images.to(torch.float32, memory_format=torch.contiguous_format)
        images = images.sub_(self.mean).div_(self.std)
        return self.erase(images) if self.erase else images
