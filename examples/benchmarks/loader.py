"""How many images per second the loaders of the training scripts deliver.

    python examples/benchmarks/loader.py --workers 16

Writes JPEG files of 500x375 pixels, as in CUB-200, to a temporary folder and reads them in the
three ways of examples/images.py, at 224x224:

read and augmented   workers decode and augment (when decoded images do not fit into memory)
augmented            decoded once into memory, workers augment
resident             a deterministic pipeline: indexing a tensor on the device

The first column is processor time per image in one process and hardly depends on what else runs;
the second is what arrives on the device, the normalised batch included.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageFilter

# the modules of the training scripts lie one folder up
sys.path.insert(0, str(Path(__file__).parents[1]))
from images import Normalise, Order, Transformed, build_data, build_loader, build_transform, decoded
from splits import Split

SIZE, BATCH = 224, 96


def write_photographs(folder: Path, count: int) -> Split:
    """Blurred noise over a gradient: about the entropy, and the decoding time, of a photograph."""
    paths = [folder / f"{index}.jpg" for index in range(count)]

    def write(index: int) -> None:
        rng = np.random.default_rng(index)
        noise = Image.fromarray(rng.integers(0, 256, (375, 500, 3), dtype=np.uint8))
        noise.filter(ImageFilter.GaussianBlur(1.5)).save(paths[index], quality=90)

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(write, range(count)))
    return Split(paths, [0] * count, [path.name for path in paths])


def processor_milliseconds(data: Transformed, count: int) -> float:
    begun = time.process_time()
    for index in range(count):
        data[index]
    return (time.process_time() - begun) / count * 1e3


def images_per_second(data, workers: int, device: torch.device) -> float:
    """The second epoch's rate; the first one warms up."""
    normalise = Normalise(device, erase=0.25)
    order = Order(len(data), seed=0)
    loader = build_loader(data, order, BATCH, workers, drop_last=True)
    for order.epoch in range(2):
        begun, seen = time.perf_counter(), 0
        for images, _ in loader:
            seen += len(normalise(images))
        if device.type == "cuda":
            torch.cuda.synchronize()
        rate = seen / (time.perf_counter() - begun)
    return rate


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--workers", type=int, default=os.cpu_count())
    parser.add_argument("--images", type=int, default=2000)
    options = parser.parse_args()
    # one thread: workers are the parallel ones
    torch.set_num_threads(1)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    with tempfile.TemporaryDirectory() as folder:
        files = write_photographs(Path(folder), options.images)
        transform = build_transform("reference", SIZE, training=True)
        begun = time.perf_counter()
        ahead = decoded(files, free_bytes=10**12)
        print(f"decoding {len(files)} files ahead took {time.perf_counter() - begun:.1f} s")
        print(f"{'':<20}{'ms per image':>14}{'images/s':>12}   ({options.workers} workers)")
        for name, data in (
            ("read and augmented", Transformed(files, transform)),
            ("augmented", Transformed(ahead, transform)),
        ):
            cost = processor_milliseconds(data, min(len(files), 200))
            rate = images_per_second(data, options.workers, device)
            print(f"{name:<20}{cost:>14.2f}{rate:>12,.0f}")
        data = build_data(files, "resize", SIZE, device, training=True)
        print(f"{'resident':<20}{'':>14}{images_per_second(data, 0, device):>12,.0f}")


if __name__ == "__main__":
    main()
