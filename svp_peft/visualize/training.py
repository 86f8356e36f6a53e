"""Curves of a training run from its `metrics.jsonl`, as written by the example scripts."""

from __future__ import annotations

import json
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

from svp_peft.errors import InputError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# line of each split: colour, style
_SPLITS = {
    "train": ("#0072b2", "-"),
    "val": ("#d55e00", "--"),
    "test": ("#009e73", "-."),
}


def read_metrics(run: str | PathLike[str]) -> list[dict[str, Any]]:
    """The epochs of a run, in order.

    A run that was stopped and resumed may have written an epoch twice, and its last line may be
    cut: the later line of an epoch wins, and a cut last line is left out.

    Args:
        run: the run's folder, or its `metrics.jsonl`.

    Returns:
        One dict per epoch, each with the key "epoch".

    Raises:
        InputError: there is no such file, it has no epoch, or a line that is not the last is
            not a JSON object with an "epoch".
    """
    path = Path(run)
    path = path / "metrics.jsonl" if path.is_dir() else path
    if not path.is_file():
        raise InputError(
            f"{path} does not exist: curves are drawn from the metrics.jsonl that the training "
            "scripts write into their run folder. Pass that folder."
        )
    lines = path.read_text(encoding="utf-8").splitlines()
    epochs: dict[float, dict[str, Any]] = {}
    for number, line in enumerate(lines, start=1):
        try:
            record = json.loads(line)
            epochs[float(record["epoch"])] = record
        except (ValueError, KeyError, TypeError) as error:
            if number == len(lines):
                continue
            raise InputError(
                f"line {number} of {path} is not a JSON object with an 'epoch' ({line[:60]!r}): "
                "the file is damaged or not ours. Remove the line."
            ) from error
    if not epochs:
        raise InputError(f"{path} holds no complete epoch yet. Wait for the first one to end.")
    return [epochs[epoch] for epoch in sorted(epochs)]


def plot_training(run: str | PathLike[str]) -> Figure:
    """Loss, accuracy and learning rate against the epoch.

    Args:
        run: a run folder of the example scripts, or its `metrics.jsonl`. Of each epoch the keys
            `train_loss`, `val_loss`, `test_loss`, the same with `_accuracy`, and `lr` are drawn
            where they exist.

    Returns:
        A matplotlib figure. Raises as `read_metrics` does.
    """
    from matplotlib.figure import Figure

    epochs = read_metrics(run)
    figure = Figure(figsize=(9.5, 3.2), layout="constrained")
    axes = figure.subplots(1, 3)
    for axis, quantity in zip(axes, ("loss", "accuracy"), strict=False):
        for split, (colour, style) in _SPLITS.items():
            _draw(axis, epochs, f"{split}_{quantity}", split, colour, style)
        if axis.lines:
            axis.legend(frameon=False, fontsize=8)
    _draw(axes[2], epochs, "lr", "lr", "#333333", "-")
    for axis, title in zip(axes, ("loss", "accuracy", "learning rate"), strict=True):
        axis.set_title(title, fontsize=10)
        axis.set_xlabel("epoch")
        axis.grid(alpha=0.25)
    return figure


def _draw(
    axis: Axes, epochs: list[dict[str, Any]], key: str, label: str, colour: str, style: str
) -> None:
    points = [(e["epoch"], e[key]) for e in epochs if isinstance(e.get(key), (int, float))]
    if points:
        marker = "o" if len(points) == 1 else ""
        axis.plot(*zip(*points, strict=True), style, color=colour, marker=marker, label=label)
