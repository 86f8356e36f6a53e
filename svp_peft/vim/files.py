"""Reading and writing checkpoint files of a base model. Never runs code from a file."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import uuid
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from svp_peft.errors import CheckpointError
from svp_peft.serialise import assemble, pack

WEIGHT_SUFFIXES = (".safetensors", ".pth", ".pt", ".bin")
CONFIG_KEY = "vim_config"
ENTRY_NAME_KEY = "vim_entry_name"
"""Keys in a safetensors file's metadata: constructor arguments as JSON, and `entry_name`."""

_CONTAINERS = ("model", "state_dict", "module")
_MOST_CONTAINERS = 8
_WRAPPERS = ("module.", "_orig_mod.", "model.")


class Checkpoint(NamedTuple):
    """What a file holds: tensors by hustvl/Vim's names, and what it says about the model."""

    state: dict[str, Tensor]
    config: dict[str, Any]
    """Constructor arguments that the file states; empty if it states none."""
    entry_name: str | None
    """Name of the official model function that the file was trained with, if it says so."""
    source: str
    """Where it came from, for messages."""


def read_checkpoint(path: Path) -> Checkpoint:
    """Read a `.safetensors` file, or a pickle of tensors.

    A pickle may hold nothing but tensors, plain containers and `argparse.Namespace` (the official
    training script saves one); anything else is refused before it runs.

    Raises:
        CheckpointError: the file is missing, damaged, unsafe, or holds no state_dict.
    """
    if not path.is_file():
        raise CheckpointError(f"{path} is not a file. Check the path of the checkpoint.")
    _refuse_pointer(path)
    reader = _read_safetensors if path.suffix == ".safetensors" else _read_pickle
    return reader(path)


def write_checkpoint(path: Path, checkpoint: Checkpoint) -> None:
    """Write a checkpoint as one safetensors file, whole or not at all.

    Raises:
        OSError: the folder cannot be written to.
        TypeError: the config holds what JSON cannot.
    """
    metadata = {"format": "pt", CONFIG_KEY: json.dumps(checkpoint.config, sort_keys=True)}
    if checkpoint.entry_name is not None:
        metadata[ENTRY_NAME_KEY] = checkpoint.entry_name
    data = assemble(*pack(checkpoint.state), metadata)
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    try:
        temporary.write_bytes(data)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _refuse_pointer(path: Path) -> None:
    try:
        with path.open("rb") as file:
            start = file.read(64)
    except OSError as error:
        raise CheckpointError(
            f"{path} cannot be read ({error.strerror}). Check the rights of the file."
        ) from error
    if start.startswith(b"version https://git-lfs"):
        raise CheckpointError(
            f"{path} is a Git LFS pointer and not the checkpoint itself. Run `git lfs pull` in "
            f"its folder."
        )
    # a safetensors file begins with the length of its header, whose bytes may spell " <"; but it is
    # a 64-bit number, and text has no zero bytes
    if start.lstrip()[:1] == b"<" and 0 not in start[:8]:
        raise CheckpointError(
            f"{path} is a web page and not a checkpoint: a download was answered by an error or "
            f"a login page. Download it again."
        )


def _read_safetensors(path: Path) -> Checkpoint:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(str(path), framework="pt") as file:
            state = {name: file.get_tensor(name) for name in file.keys()}
            metadata = file.metadata() or {}
    except (SafetensorError, OSError, ValueError, RuntimeError) as error:
        raise CheckpointError(
            f"{path} ({path.stat().st_size} bytes) is not a readable safetensors file: {error}. "
            f"It is damaged or cut short; get it again."
        ) from error
    config: Any = {}
    if CONFIG_KEY in metadata:
        try:
            config = json.loads(metadata[CONFIG_KEY])
        except ValueError as error:
            raise CheckpointError(
                f"{path}: the metadata entry {CONFIG_KEY!r} is not JSON ({error}). Write the file "
                f"again, or pass the constructor arguments to load_vim and remove the entry."
            ) from error
    if not isinstance(config, dict):
        raise CheckpointError(
            f"{path}: the metadata entry {CONFIG_KEY!r} is a {type(config).__name__} where "
            f"constructor arguments of VisionMamba were expected, as a JSON object. Write the file "
            f"again without it."
        )
    return _checkpoint(state, config, metadata.get(ENTRY_NAME_KEY), str(path))


def _read_pickle(path: Path) -> Checkpoint:
    loaded = load_pickle(path)
    args = loaded.get("args")
    name = getattr(args, "model", None)
    config = loaded.get("cfg", loaded.get("config"))
    return _checkpoint(
        loaded,
        config if isinstance(config, Mapping) else {},
        name if isinstance(name, str) else None,
        str(path),
    )


def load_pickle(path: Path) -> Mapping[Any, Any]:
    """The mapping in a pickle of tensors, plain containers and `argparse.Namespace`.

    Raises:
        CheckpointError: the file holds anything else, and so is not run; or it is damaged.
    """
    # an archive's tensors are mapped, so that an optimiser saved beside the model costs nothing
    options: dict[str, Any] = {"mmap": True} if zipfile.is_zipfile(path) else {}
    try:
        with _namespace_allowed():
            loaded = torch.load(path, map_location="cpu", weights_only=True, **options)
    except Exception as error:
        raise CheckpointError(
            f"{path} ({path.stat().st_size} bytes) was not loaded: {_first_line(error)} Only "
            f"tensors, plain containers and argparse.Namespace are read, because other pickles can "
            f"run code. If the file is whole and yours, save its weights alone: "
            f"torch.save({{'model': model.state_dict()}}, path)."
        ) from error
    if not isinstance(loaded, Mapping):
        raise CheckpointError(
            f"{path} holds a {type(loaded).__name__} where a state_dict was expected. Save "
            f"model.state_dict(), alone or under the key 'model'."
        )
    return loaded


@contextlib.contextmanager
def _namespace_allowed() -> Iterator[None]:
    """Let `torch.load(weights_only=True)` read `argparse.Namespace` inside the block."""
    serialization = torch.serialization
    if hasattr(serialization, "safe_globals"):
        with serialization.safe_globals([argparse.Namespace]):
            yield
        return
    # torch 2.4 has the list, but no context manager for it
    before = list(serialization.get_safe_globals())
    serialization.add_safe_globals([argparse.Namespace])
    try:
        yield
    finally:
        serialization.clear_safe_globals()
        serialization.add_safe_globals(before)


def _first_line(error: Exception) -> str:
    text = str(error).strip().splitlines() or [type(error).__name__]
    unsupported = [line.strip() for line in text if "GLOBAL" in line or "Unsupported" in line]
    return (unsupported or text)[0].rstrip(".") + "."


def _checkpoint(
    raw: Mapping[Any, Any], config: Mapping[Any, Any], entry_name: str | None, source: str
) -> Checkpoint:
    """Take off what training scripts, DDP and torch.compile put around a state_dict."""
    # a mapping in a pickle may hold itself, so the unwrapping must end
    for _ in range(_MOST_CONTAINERS):
        inner = next((raw[k] for k in _CONTAINERS if isinstance(raw.get(k), Mapping)), None)
        if inner is None:
            break
        raw = inner
    state = {name: value for name, value in raw.items() if isinstance(value, Tensor)}
    others = sorted(str(name) for name in raw.keys() - state.keys())
    if not state or others or not all(isinstance(name, str) for name in state):
        raise CheckpointError(
            f"{source} holds no plain state_dict: it has {len(state)} tensors and other entries "
            f"{others[:8]}. Save model.state_dict(), alone or under the key 'model'."
        )
    while prefix := next((p for p in _WRAPPERS if all(k.startswith(p) for k in state)), None):
        state = {name.removeprefix(prefix): value for name, value in state.items()}
    return Checkpoint(state, {str(k): v for k, v in config.items()}, entry_name, source)
