"""Adapt a pretrained Vision Mamba to handwritten digits on a CPU, two ways, in a few minutes.

    make demo            or            python examples/quickstart.py

A small Vim (1.7 million parameters, pretrained on Tiny ImageNet) learns to read the 1,797 scanned
digits of scikit-learn from 300 labelled ones: once by training its classifier alone (a linear
probe), once by Selective Visual Prompting. Then the SVP adapter is saved, loaded into a fresh copy
of the backbone, and both must give the same logits.

Writes runs/quickstart/: the adapter (two files), predictions.png and what the prompts do to the
gates, gates.png.
"""

import argparse
import math
import time
from pathlib import Path

import matplotlib
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn
from tqdm import tqdm

import svp_peft as sp
from svp_peft.visualize import gate_maps, plot_gate_maps

matplotlib.use("Agg")
import matplotlib.pyplot as plt

BACKBONE = Path(__file__).parent / "assets" / "vim_nano_tin"
NUM_TRAIN = 300
EPOCHS = 40
BATCH = 64
WARMUP = 0.1  # of all steps; then a cosine to zero
WEIGHT_DECAY = 1e-4
SHIFT = 4  # pixels, at random, in both directions
LEARNING_RATE = {"linear probe": 1e-2, "SVP": 6e-3}
CONFIG = sp.SVPConfig(inner_bottleneck=64, cross_group_size=4)


def digits() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(train images, train labels, test images, test labels); images (n, 3, 64, 64), normalised."""
    scans, labels = load_digits(return_X_y=True)
    images = torch.tensor(scans, dtype=torch.float32).view(-1, 1, 8, 8) / 16
    images = F.interpolate(images, size=64, mode="bicubic", align_corners=False).clamp(0, 1)
    mean = torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1)
    std = torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)
    images = (images.expand(-1, 3, -1, -1) - mean) / std
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    images, targets = images[order], torch.tensor(labels)[order]
    return images[:NUM_TRAIN], targets[:NUM_TRAIN], images[NUM_TRAIN:], targets[NUM_TRAIN:]


def shifted(images: Tensor) -> Tensor:
    """The batch moved by up to SHIFT pixels, edges repeated."""
    padded = F.pad(images, (SHIFT,) * 4, mode="replicate")
    top, left = torch.randint(0, 2 * SHIFT + 1, (2,)).tolist()
    return padded[..., top : top + images.shape[-2], left : left + images.shape[-1]]


def rate(step: int, steps: int) -> float:
    """Factor of the learning rate: a linear warm-up, then a cosine to zero."""
    warmup = max(1, round(WARMUP * steps))
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))


def train(model: nn.Module, images: Tensor, labels: Tensor, name: str, epochs: int) -> float:
    """Train whatever requires a gradient; returns the seconds it took."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=LEARNING_RATE[name], weight_decay=WEIGHT_DECAY)
    steps = epochs * -(-len(images) // BATCH)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: rate(step, steps))
    model.train()
    started = time.perf_counter()
    with tqdm(total=steps, desc=f"{name:<13}", unit="step") as progress:
        for _ in range(epochs):
            for batch in torch.randperm(len(images)).split(BATCH):
                logits = model(shifted(images[batch]))
                loss = F.cross_entropy(logits, labels[batch], label_smoothing=0.1)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                schedule.step()
                progress.update()
                progress.set_postfix(loss=f"{loss.item():.3f}")
    return time.perf_counter() - started


@torch.inference_mode()
def predict(model: nn.Module, images: Tensor) -> Tensor:
    """Logits, (n, num_classes)."""
    model.eval()
    return torch.cat([model(batch) for batch in images.split(250)])


def draw_predictions(images: Tensor, labels: Tensor, logits: Tensor, path: Path) -> None:
    """The first test digits with what was read; mistakes are framed and say what it was."""
    columns, rows = 12, 4
    figure, axes = plt.subplots(rows, columns, figsize=(columns * 0.95, rows * 1.2))
    for axis, image, label, guess in zip(
        axes.flat, images, labels.tolist(), logits.argmax(1).tolist(), strict=False
    ):
        axis.imshow(image[0], cmap="gray")
        axis.set_xticks([])
        axis.set_yticks([])
        right = guess == label
        axis.set_title(
            f"{guess}" if right else f"{guess} (is {label})",
            fontsize=10,
            color="black" if right else "#b3261e",
        )
        for spine in axis.spines.values():
            spine.set_visible(not right)
            spine.set_edgecolor("#b3261e")
            spine.set_linewidth(2)
    figure.suptitle("Test digits, read by the prompted Vision Mamba")
    figure.tight_layout()
    figure.savefig(path, dpi=130)
    plt.close(figure)


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    arguments.add_argument("--output", type=Path, default=Path("runs/quickstart"))
    arguments.add_argument("--epochs", type=int, default=EPOCHS)
    arguments.add_argument("--test-images", type=int, default=None, help="use only the first N")
    options = arguments.parse_args()

    torch.manual_seed(0)
    train_images, train_labels, test_images, test_labels = digits()
    test_images = test_images[: options.test_images]
    test_labels = test_labels[: options.test_images]
    rows = []
    for name in ("linear probe", "SVP"):
        model = sp.load_vim(BACKBONE, num_classes=10, drop_path_rate=0.05)
        if name == "SVP":
            sp.apply_svp(model, CONFIG)
        else:
            model.requires_grad_(False)
            model.head.requires_grad_(True)
        trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
        seconds = train(model, train_images, train_labels, name, options.epochs)
        logits = predict(model, test_images)
        accuracy = (logits.argmax(1) == test_labels).float().mean().item()
        rows.append((name, trained, accuracy, seconds))

    options.output.mkdir(parents=True, exist_ok=True)
    adapter = options.output / "adapter"
    sp.save_adapter(model, adapter)
    fresh = sp.load_vim(BACKBONE, num_classes=10)
    sp.load_adapter(fresh, adapter)
    if not torch.equal(predict(fresh, test_images), logits):
        raise SystemExit("the loaded adapter gives other logits than the saved one")

    print(f"\n{'method':<14}{'trained parameters':>20}{'test accuracy':>16}{'seconds':>10}")
    for name, trained, accuracy, seconds in rows:
        print(f"{name:<14}{trained:>20,}{accuracy:>15.1%}{seconds:>10.0f}")
    size = sum(file.stat().st_size for file in adapter.iterdir())
    print(f"\n{len(train_images)} training images, {len(test_images)} test images.")
    print(f"Adapter saved to {adapter} ({size / 1e6:.1f} MB) and loaded again: same logits.")

    draw_predictions(test_images, test_labels, logits, options.output / "predictions.png")
    shown = test_images[:1]
    maps = gate_maps(model, shown, blocks=(1, 5, 9))
    plot_gate_maps(maps, shown).savefig(options.output / "gates.png", dpi=130)
    print(f"Pictures: {options.output / 'predictions.png'}, {options.output / 'gates.png'}")


if __name__ == "__main__":
    main()
