"""One epoch of training, one pass of evaluation, and what turns a batch into targets."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable

import torch
from accelerate import Accelerator
from images import Normalise, batches
from recipes import Recipe
from run_folder import RunError
from timm.data import Mixup
from timm.loss import SoftTargetCrossEntropy
from timm.utils import ModelEmaV3
from torch import nn
from torch.utils.data import DataLoader
from tqdm import tqdm


def per_step_batch(recipe: Recipe, parts: int, images: int) -> int:
    """Images per process and step, so that `parts` of them make one batch of the recipe.

    Raises:
        RunError: they cannot.
    """
    batch_size = recipe.batch_size
    if batch_size % parts:
        raise RunError(
            f"a batch of {batch_size} cannot be divided among {parts} processes and accumulated "
            "steps. Choose a --batch-size that can."
        )
    if images < batch_size:
        raise RunError(
            f"{images} training images do not fill one batch of {batch_size}. Choose a smaller "
            "--batch-size."
        )
    if (recipe.mixup or recipe.cutmix) and batch_size // parts % 2:
        raise RunError(
            f"a step of a process has {batch_size // parts} images, but Mixup mixes two by two. "
            "Choose a --batch-size that leaves an even number."
        )
    return batch_size // parts


def batch_function(recipe: Recipe, num_classes: int, normalise: Normalise) -> Callable:
    """(uint8 images, labels) -> (normalised images, labels, soft targets), on the device."""
    mixup = None
    if recipe.mixup or recipe.cutmix:
        mixup = Mixup(
            recipe.mixup,
            recipe.cutmix,
            label_smoothing=recipe.label_smoothing,
            num_classes=num_classes,
        )

    def prepare(images: torch.Tensor, labels: torch.Tensor):
        images, labels = normalise(images), labels.to(normalise.device, non_blocking=True)
        if mixup:
            images, targets = mixup(images, labels)
        else:
            off = recipe.label_smoothing / num_classes
            targets = torch.full((len(labels), num_classes), off, device=labels.device)
            targets.scatter_(1, labels[:, None], 1 - recipe.label_smoothing + off)
        return images, labels, targets

    return prepare


def train_epoch(
    accelerator: Accelerator,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    loader: DataLoader,
    prepare_batch: Callable,
    steps: int,
    recipe: Recipe,
    epoch: int,
    ema: ModelEmaV3 | None,
) -> dict[str, float]:
    """One pass over the training images; loss, accuracy, speed, and the time lost to data.

    Accuracy counts the unmixed label, so under Mixup it is low and says little.
    """
    model.train()
    criterion = SoftTargetCrossEntropy()
    totals = torch.zeros(2, device=accelerator.device, dtype=torch.float64)
    started = time.perf_counter()
    waited, seen = 0.0, 0
    incoming = batches(loader)
    bar = tqdm(
        total=steps,
        desc=f"epoch {epoch + 1}/{recipe.epochs}",
        unit="step",
        leave=False,
        mininterval=1.0,
        disable=not accelerator.is_main_process or not sys.stderr.isatty(),
    )
    for step in range(steps):
        asked = time.perf_counter()
        images, labels = next(incoming)
        waited += time.perf_counter() - asked
        images, labels, targets = prepare_batch(images, labels)
        with accelerator.accumulate(model):
            logits = model(images)
            loss = criterion(logits.float(), targets)
            accelerator.backward(loss)
            if recipe.clip_norm and accelerator.sync_gradients:
                accelerator.clip_grad_norm_(model.parameters(), recipe.clip_norm)
            optimizer.step()
            optimizer.zero_grad()
        if ema and accelerator.sync_gradients:
            ema.update(accelerator.unwrap_model(model))
        hits = (logits.detach().argmax(1) == labels).sum()
        totals += torch.stack((loss.detach().double() * len(labels), hits))
        seen += len(labels)
        # reading a number waits for the device: not at every step
        if step % 20 == 19 or step == steps - 1:
            total_loss, correct = totals.tolist()
            if not math.isfinite(total_loss):
                raise RunError(
                    f"the loss is {total_loss / seen} in epoch {epoch}, step {step}: the learning "
                    "rate is probably too high, or fp16 overflows. Lower --lr, or use "
                    "--mixed-precision bf16. Earlier checkpoints are untouched."
                )
            speed = seen * accelerator.num_processes / (time.perf_counter() - started)
            accuracy = f"accuracy {correct / seen:.1%}"
            bar.set_postfix_str(f"loss {total_loss / seen:.3f}, {accuracy}, {speed:,.0f} images/s")
        bar.update()
    bar.close()
    seen *= accelerator.num_processes
    total_loss, correct = accelerator.reduce(totals).tolist()
    seconds = time.perf_counter() - started
    return {
        "loss": total_loss / seen,
        "train_accuracy": correct / seen,
        "seconds": seconds,
        "images_per_second": seen / seconds,
        "data_wait": waited / seconds,
    }


@torch.no_grad()
def evaluate(
    accelerator: Accelerator, model: nn.Module, loader: DataLoader, normalise: Normalise
) -> float:
    """Top-1 accuracy over all processes; every image counts once."""
    model.eval()
    correct = torch.zeros((), device=accelerator.device)
    seen = 0
    for images, labels in batches(loader):
        labels = labels.to(accelerator.device, non_blocking=True)
        correct += (model(normalise(images)).argmax(1) == labels).sum()
        seen += len(labels)
    counts = accelerator.reduce(torch.stack((correct, torch.full_like(correct, seen))))
    right, total = counts.tolist()
    return right / total
