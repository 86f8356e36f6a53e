"""What a training run leaves on disk, written so that a kill at any moment loses nothing.

run.json        the settings; another run is refused the folder
metrics.jsonl   one line per epoch
checkpoints/    epoch_0004/: everything needed to go on after epoch 4, by Accelerate
best/, last/    what was trained: the adapter's two files, or trained.safetensors
tensorboard/    the same numbers for TensorBoard
result.json     written last: the run is complete
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from methods import trained_state
from safetensors import SafetensorError, safe_open
from torch import nn


class RunError(Exception):
    """A run cannot start or go on: says why and what to do."""


def write_json(path: Path, value: dict[str, Any]) -> None:
    """The old file or the new one, whole, whenever the process is killed."""
    partial = path.with_name(path.name + ".partial")
    with disk(path):
        with open(partial, "w") as file:
            json.dump(value, file, indent=1)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)


def claim(folder: Path, settings: dict[str, Any]) -> None:
    """Make `folder` the one of the run with these settings; more of them may be added later.

    Raises:
        RunError: it belongs to a run with other settings, which has finished an epoch.
    """
    with disk(folder):
        folder.mkdir(parents=True, exist_ok=True)
    settings = json.loads(json.dumps(settings))
    file = folder / "run.json"
    begun = (folder / "metrics.jsonl").exists() or (folder / "result.json").exists()
    found = json.loads(file.read_text()) if file.is_file() else {}
    if not begun and any(settings[key] != found[key] for key in settings.keys() & found.keys()):
        # a command that failed at once, now corrected
        found = {}
    differ = [key for key in settings if key in found and settings[key] != found[key]]
    if differ:
        shown = ", ".join(f"{k} ({found[k]!r}, now {settings[k]!r})" for k in differ[:4])
        raise RunError(
            f"{folder} holds a run with other settings: {shown}. Use another --output, or delete "
            "the folder."
        )
    if not settings.keys() <= found.keys():
        write_json(file, found | settings)


def result_of(folder: Path) -> dict[str, Any] | None:
    """The result of a complete run, or None."""
    file = folder / "result.json"
    return json.loads(file.read_text()) if file.is_file() else None


def append_metrics(folder: Path, row: dict[str, Any]) -> None:
    with disk(folder), open(folder / "metrics.jsonl", "a") as file:
        file.write(json.dumps(row) + "\n")


def read_metrics(folder: Path, epochs: int | None = None) -> list[dict[str, Any]]:
    """The lines of the first `epochs` epochs; a line cut off by a kill ends the list."""
    rows: list[dict[str, Any]] = []
    if (folder / "metrics.jsonl").is_file():
        for line in (folder / "metrics.jsonl").read_text().splitlines():
            try:
                row = json.loads(line)
            except json.JSONDecodeError:
                break
            if epochs is None or row["epoch"] < epochs:
                rows.append(row)
    return rows


def cut_metrics(folder: Path, epochs: int) -> None:
    """Keep the first `epochs` epochs: those after the checkpoint are trained again."""
    if (folder / "metrics.jsonl").is_file():
        rows = read_metrics(folder, epochs)
        partial = folder / "metrics.jsonl.partial"
        with disk(folder):
            partial.write_text("".join(json.dumps(row) + "\n" for row in rows))
            os.replace(partial, folder / "metrics.jsonl")


def save_checkpoint(
    accelerator: Accelerator,
    model: nn.Module,
    folder: Path,
    epoch: int,
    progress: dict[str, Any],
    extra: dict[str, Any],
) -> None:
    """Everything that a resumed run needs, complete under its final name or not there at all.

    Only trained tensors are written; the backbone comes from its own file. `extra` are further
    things to `torch.save`, by file name.

    Raises:
        RunError: it cannot be written; the checkpoint before is untouched.
    """
    checkpoints = folder / "checkpoints"
    partial = checkpoints / "partial"
    trained = set(trained_state(model))

    def drop_frozen(models: list[nn.Module], weights: list[dict], output: str) -> None:
        for state in weights:
            for name in [n for n in state if n.removeprefix("module.") not in trained]:
                del state[name]

    if accelerator.is_main_process:
        shutil.rmtree(partial, ignore_errors=True)
    accelerator.wait_for_everyone()
    handle = accelerator.register_save_state_pre_hook(drop_frozen)
    try:
        with disk(partial):
            accelerator.save_state(str(partial))
            accelerator.wait_for_everyone()
            if not accelerator.is_main_process:
                return
            if (folder / "best").is_dir():
                shutil.copytree(folder / "best", partial / "best")
            for name, value in extra.items():
                torch.save(value, partial / name)
            write_json(partial / "progress.json", progress)
            for file in partial.iterdir():
                if file.is_file():
                    with open(file, "rb") as written:
                        os.fsync(written.fileno())
            final = checkpoints / f"epoch_{epoch:04d}"
            shutil.rmtree(final, ignore_errors=True)
            partial.rename(final)
    except RunError:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    finally:
        handle.remove()
    for older in checkpoints.iterdir():
        if older != final:
            shutil.rmtree(older, ignore_errors=True)


def latest_checkpoint(folder: Path) -> Path | None:
    complete = sorted((folder / "checkpoints").glob("epoch_*"))
    return complete[-1] if complete else None


def load_checkpoint(
    accelerator: Accelerator, model: nn.Module, folder: Path, checkpoint: Path
) -> dict[str, Any]:
    """Put model, optimizer and best/ back as they were; returns what `progress` held.

    Raises:
        RunError: the checkpoint is of another model.
    """
    with safe_open(checkpoint / "model.safetensors", "pt") as file:
        found = {name.removeprefix("module.") for name in file.keys()}
    if found != set(trained_state(model)):
        odd = sorted(found ^ set(trained_state(model)))[0]
        raise RunError(
            f"{checkpoint} is of another model: the tensor {odd} is on one side only. Use another "
            "--output."
        )
    accelerator.load_state(str(checkpoint), strict=False)
    if accelerator.is_main_process:
        shutil.rmtree(folder / "best", ignore_errors=True)
        if (checkpoint / "best").is_dir():
            shutil.copytree(checkpoint / "best", folder / "best")
    return json.loads((checkpoint / "progress.json").read_text())


@contextmanager
def disk(path: Path) -> Iterator[None]:
    """Failed writes, whichever library made them, as one error that says what to do."""
    try:
        yield
    except (OSError, SafetensorError, RuntimeError) as error:
        free = shutil.disk_usage(_existing(path)).free / 1e6
        raise RunError(
            f"{path} could not be written ({error}); {free:,.0f} MB are free. Make room, then run "
            "the same command again: it goes on from the last complete checkpoint."
        ) from error


def _existing(path: Path) -> Path:
    return path if path.exists() else _existing(path.parent)
