"""Curves of a training run from its `metrics.jsonl`, as written by the example scripts."""

from __future__ import annotations

import json
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

from svp_peft.errors import InputError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# what is drawn: panel, key of metrics.jsonl, label, colour, style
_LINES = (
    ("loss", "loss", "training loss", "#0072b2", "-"),
    ("accuracy", "train_accuracy", "training", "#0072b2", "-"),
    ("accuracy", "val_accuracy", "validation", "#d55e00", "--"),
    ("accuracy", "test_accuracy", "test", "#009e73", "-."),
    ("learning rate", "lr", "lr", "#333333", "-"),
    ("images per second", "images_per_second", "images/s", "#333333", "-"),
)


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
    """Loss, accuracy, learning rate and images per second against the epoch.

    Args:
        run: a run folder of the example scripts, or its `metrics.jsonl`. Of each epoch the keys
            `loss`, `train_accuracy`, `val_accuracy`, `test_accuracy`, `lr` and
            `images_per_second` are drawn where they exist.

    Returns:
        A matplotlib figure. Raises as `read_metrics` does.
    """
    from matplotlib.figure import Figure

    epochs = read_metrics(run)
    panels = list(dict.fromkeys(panel for panel, *_ in _LINES))
    figure = Figure(figsize=(3.1 * len(panels), 3.0), layout="constrained")
    axes = dict(zip(panels, figure.subplots(1, len(panels)), strict=True))
    for panel, key, label, colour, style in _LINES:
        points = [(e["epoch"], e[key]) for e in epochs if isinstance(e.get(key), (int, float))]
        if points:
            # a line through one point would be invisible
            marker = "o" if len(points) == 1 else ""
            x, y = zip(*points, strict=True)
            axes[panel].plot(x, y, style, color=colour, marker=marker, label=label)
    for panel, axis in axes.items():
        axis.set_title(panel, fontsize=10)
        axis.set_xlabel("epoch")
        axis.grid(alpha=0.25)
        if len(axis.lines) > 1:
            axis.legend(frameon=False, fontsize=8)
    return figure
