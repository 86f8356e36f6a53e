"""`adapter_config.json`: `AdapterInfo`, and every check of the file that needs no model."""

import json
from dataclasses import dataclass, fields
from difflib import get_close_matches
from typing import Any

from svp_peft.config import SVPConfig
from svp_peft.errors import AdapterConfigError, ConfigError

CONFIG_NAME = "adapter_config.json"
FORMAT_VERSION = 1
PEFT_TYPE = "SVP"

_MAX_CONFIG = 1_000_000
# building the list of keys takes time for every block; Vision Mambas have a few dozen
_MAX_DEPTH = 4096
_MAX_COUNT = 1_000_000
_SVP_FIELDS = tuple(field.name for field in fields(SVPConfig))
# what every adapter of the peft library has; of no meaning here, but tools look for them
_PEFT_KEYS: dict[str, Any] = {"auto_mapping": None, "inference_mode": True, "task_type": None}
_FILE_KEYS = (
    *_PEFT_KEYS,
    "base_arch",
    "base_fingerprint",
    "format_version",
    "num_classes",
    "peft_type",
    "svp_peft_version",
    "weights_sha256",
)
EDITABLE_KEYS = frozenset(
    {*_PEFT_KEYS, "base_fingerprint", "base_model_name_or_path", "revision", "svp_peft_version"}
)
"""Keys that say where an adapter comes from, not what it computes: they may be edited."""


@dataclass(frozen=True)
class AdapterInfo:
    """`adapter_config.json`, checked."""

    svp: SVPConfig
    base_arch: dict[str, Any]
    """Geometry of the base model: `depth`, `d_model` (of every block, or a list) and more."""
    base_fingerprint: str | None
    num_classes: int | None
    """Outputs of the head, or None without one."""
    svp_peft_version: str
    weights_sha256: str | None

    @property
    def depth(self) -> int:
        return int(self.base_arch["depth"])

    @property
    def widths(self) -> tuple[int, ...]:
        """Token width at each block."""
        d_model = self.base_arch["d_model"]
        return tuple(d_model) if isinstance(d_model, list) else (d_model,) * self.depth

    def to_dict(self) -> dict[str, Any]:
        return {
            **_PEFT_KEYS,
            **self.svp.to_dict(),
            "base_arch": self.base_arch,
            "base_fingerprint": self.base_fingerprint,
            "format_version": FORMAT_VERSION,
            "num_classes": self.num_classes,
            "peft_type": PEFT_TYPE,
            "svp_peft_version": self.svp_peft_version,
            "weights_sha256": self.weights_sha256,
        }


def parse_config(data: bytes, where: str) -> AdapterInfo:
    """`adapter_config.json`, checked. Nothing named in it is imported or opened.

    Raises:
        AdapterConfigError: naming the file, the line or the key, and what would be right.
    """
    raw = _json_object(data, where)
    kind = raw.get("peft_type")
    if kind != PEFT_TYPE:
        raise AdapterConfigError(f"{where} {_other_kind(raw)}")
    version = raw.get("format_version")
    if not isinstance(version, int) or isinstance(version, bool) or version < 1:
        raise AdapterConfigError(
            f"{where}: format_version is {version!r}, not an integer of at least 1. "
            "The file was not written by svp_peft, or was damaged: fetch it again."
        )
    if version > FORMAT_VERSION:
        raise AdapterConfigError(
            f"{where} has format_version {version}, written by svp_peft "
            f"{raw.get('svp_peft_version')!r}; this one ({FORMAT_VERSION} is the newest it reads) "
            "is older. Run `pip install -U svp_peft`."
        )
    _check_keys(raw, where)
    arch = raw.get("base_arch")
    if not isinstance(arch, dict):
        raise AdapterConfigError(
            f"{where}: base_arch is {arch!r}, not an object that describes the base model. "
            "Save the adapter again with save_adapter."
        )
    d_model = arch.get("d_model")
    _check_count(arch.get("depth"), f"{where}: base_arch.depth", _MAX_DEPTH)
    for width in d_model if isinstance(d_model, list) else [d_model]:
        _check_count(width, f"{where}: base_arch.d_model")
    if isinstance(d_model, list) and len(d_model) != arch["depth"]:
        raise AdapterConfigError(
            f"{where}: base_arch.d_model lists {len(d_model)} widths for {arch['depth']} blocks. "
            "Save the adapter again with save_adapter."
        )
    if raw.get("num_classes") is not None:
        _check_count(raw["num_classes"], f"{where}: num_classes")
    for key in ("base_fingerprint", "svp_peft_version", "weights_sha256"):
        if not isinstance(raw.get(key), str | None):
            raise AdapterConfigError(f"{where}: {key} is {raw[key]!r}, not a string or null.")
    try:
        svp = SVPConfig.from_dict({key: raw[key] for key in _SVP_FIELDS if key in raw})
    except ConfigError as error:
        raise AdapterConfigError(f"{where}: {error}") from error
    if svp.layers is not None and svp.layers[-1] >= arch["depth"]:
        raise AdapterConfigError(
            f"{where}: layers={list(svp.layers)} names block {svp.layers[-1]}, but base_arch says "
            f"that the base model has {arch['depth']} blocks (0 to {arch['depth'] - 1})."
        )
    return AdapterInfo(
        svp=svp,
        base_arch=arch,
        base_fingerprint=raw.get("base_fingerprint"),
        num_classes=raw.get("num_classes"),
        svp_peft_version=raw.get("svp_peft_version") or "unknown",
        weights_sha256=raw.get("weights_sha256"),
    )


def refuse_look_alikes(data: bytes, where: str, error: type[Exception]) -> None:
    """Raise for what stands under an adapter file's name when a download went wrong."""
    start = data[:512].lstrip().lower()
    if not data.strip():
        raise error(f"{where} is empty ({len(data)} bytes). Fetch or save the file again.")
    if start.startswith(b"version https://git-lfs"):
        raise error(
            f"{where} is a Git-LFS pointer of {len(data)} bytes, not the file itself: the "
            "repository was cloned without LFS. Run `git lfs pull` in it."
        )
    if start.startswith((b"<!doctype", b"<html", b"<?xml", b"<head")):
        raise error(
            f"{where} is a web page ({len(data)} bytes), probably a login or error page saved "
            "under this name. Download the file again, signed in if it is private."
        )
    # 0x80 0x02 may also be the length of a small safetensors header, then zeros follow
    pickled = data[:1] == b"\x80" and data[1:2] in b"\x02\x03\x04\x05" and any(data[2:8])
    if start.startswith(b"pk\x03\x04") or pickled:
        raise error(
            f"{where} is a pickle file, which can run code when it is opened; svp_peft reads "
            "safetensors only. Convert the authors' checkpoints with convert_svp_checkpoint."
        )


def _json_object(data: bytes, where: str) -> dict[str, Any]:
    refuse_look_alikes(data, where, AdapterConfigError)
    if len(data) > _MAX_CONFIG:
        raise AdapterConfigError(
            f"{where} has {len(data)} bytes; an adapter's config has about a thousand. "
            "It is another file under this name: fetch it again."
        )
    try:
        raw = json.loads(
            data.decode("utf-8"), object_pairs_hook=no_duplicates, parse_constant=_no_constant
        )
    except json.JSONDecodeError as error:
        raise AdapterConfigError(
            f"{where}, line {error.lineno}, column {error.colno}: not valid JSON ({error.msg}). "
            "Fetch the file again, or undo the edit."
        ) from error
    except (ValueError, RecursionError) as error:
        raise AdapterConfigError(f"{where} is not valid JSON: {error}. Fetch it again.") from error
    if not isinstance(raw, dict):
        raise AdapterConfigError(
            f"{where} holds a JSON {type(raw).__name__}, not an object. Fetch the file again."
        )
    return raw


def no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError(f"a key stands twice among {sorted(key for key, _ in pairs)[:20]}")
    return found


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


def _other_kind(raw: dict[str, Any]) -> str:
    """How the sentence about a config of another kind goes on."""
    kind = raw.get("peft_type")
    if isinstance(kind, str):
        return (
            f"describes a {kind} adapter, not an SVP adapter (peft_type is {kind!r}, expected "
            f"'SVP'). Load it with the library that made it, for example peft."
        )
    if kind is not None:
        return f"has peft_type {kind!r}, expected 'SVP'. Fetch the file again."
    if "architectures" in raw or "model_type" in raw:
        return (
            "describes a whole model, not an adapter. Load a Vision Mamba checkpoint with "
            "load_vim, and the adapter from its own repository."
        )
    if "model_class" in raw or "hidden_size" in raw:
        return (
            "belongs to the adapters library, not to svp_peft (there is no peft_type). "
            "Load it with that library."
        )
    return (
        f"has no peft_type, so it is not an adapter's config; found the keys {sorted(raw)[:12]}. "
        "Expected peft_type 'SVP', as save_adapter writes it."
    )


def _check_keys(raw: dict[str, Any], where: str) -> None:
    known = (*_SVP_FIELDS, *_FILE_KEYS)
    unknown = sorted(raw.keys() - set(known))
    if not unknown:
        return
    hints = [
        f"{key!r} (did you mean {close[0]!r}?)"
        if (close := get_close_matches(key, known, n=1))
        else repr(key)
        for key in unknown[:8]
    ]
    raise AdapterConfigError(
        f"{where}: unknown keys {', '.join(hints)}. They were written by a newer svp_peft "
        f"(the file says {raw.get('svp_peft_version')!r}) or by hand, and might change what the "
        "adapter computes. Run `pip install -U svp_peft`, or remove them."
    )


def _check_count(value: object, what: str, most: int = _MAX_COUNT) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= most:
        raise AdapterConfigError(
            f"{what} is {value!r}, not an integer from 1 to {most}. "
            "Save the adapter again with save_adapter."
        )
