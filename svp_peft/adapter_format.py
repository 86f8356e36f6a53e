"""The two files of an adapter as bytes, and every check of them that needs no model.

`docs/adapter_file.md` gives the format byte for byte. In short:

    adapter_config.json        indented JSON with sorted keys: the fields of `SVPConfig`, plus
                               `peft_type` "SVP", `format_version` 1, `base_arch`,
                               `base_fingerprint`, `num_classes`, `weights_sha256`, ...
    adapter_model.safetensors  svp.inner.{l}.down|up.{weight,bias}  inner prompter of block l
                               svp.cross.{g}.{weight,bias}          cross prompter of group g
                               svp.alpha (groups, d_model), svp.beta (depth, d_model)
                               head.* and the other `modules_to_save`
                               metadata: "adapter_config", the text of the JSON file, and
                               "adapter_config_sha256", the hash of that text

`weights_sha256` covers every tensor's key, dtype, shape and bytes, and the config is in both
files. So a changed bit is noticed wherever it is, and the weights file alone is a whole adapter:
when the two files come from different saves (a process was killed between the two renames, or two
processes saved at once), the config inside the weights file is used.
"""

import hashlib
import json
import struct
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from svp_peft.adapter_config import (
    CONFIG_NAME,
    EDITABLE_KEYS,
    AdapterInfo,
    no_duplicates,
    parse_config,
    refuse_look_alikes,
)
from svp_peft.errors import AdapterConfigError, AdapterKeyError, AdapterWeightsError
from svp_peft.serialise import assemble, pack
from svp_peft.state import plain_path

WEIGHTS_NAME = "adapter_model.safetensors"

UNUSED_SCALE_ROWS = "released.unused_scale_rows"
"""Rows of the released code's 24-row scale beyond the depth; only the exporter reads them."""

_DTYPES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2}
_MAX_HEADER = 100_000_000  # the limit of the safetensors library itself
# wrappers of a model whose names end up in its state_dict's keys
_WRAPPERS_IN_FRONT = ("module.", "base_model.model.")


@dataclass(frozen=True)
class AdapterContents:
    """An adapter read from its two files; the tensors are not yet compared with anything."""

    info: AdapterInfo
    tensors: dict[str, Tensor]
    """By key, wrapper prefixes removed; on the CPU, in the dtype of the file."""
    digest: str
    """The hash over `tensors`, to be compared with the one in `info`."""
    where: str
    """The folder or repository, for messages."""
    from_weights_file: bool
    """The two files came from different saves, and `info` is the weights file's own copy."""
    config_differs: tuple[str, ...]
    """Keys that adapter_config.json has otherwise than the weights file's copy."""


def encode(info: AdapterInfo, tensors: Mapping[str, Tensor]) -> tuple[bytes, bytes]:
    """The bytes of adapter_config.json and adapter_model.safetensors.

    The same adapter gives the same bytes.

    Args:
        info: its `weights_sha256` is ignored and computed here.
        tensors: by key, any device and layout.
    """
    entries, payload = pack(tensors)
    digest = _hash_tensors(entries, memoryview(payload))
    config = {**info.to_dict(), "weights_sha256": digest}
    text = json.dumps(config, indent=2, sort_keys=True, allow_nan=False) + "\n"
    metadata = {
        "format": "pt",
        "adapter_config": text,
        "adapter_config_sha256": hashlib.sha256(text.encode()).hexdigest(),
    }
    return text.encode(), assemble(entries, payload, metadata)


def decode(config: bytes, weights: bytes, *, where: str, one_commit: bool) -> AdapterContents:
    """Read both files and decide which config holds.

    Args:
        config: bytes of adapter_config.json.
        weights: bytes of adapter_model.safetensors.
        where: the folder or repository, for messages.
        one_commit: the files come from one commit of a repository, so they cannot be halves of
            two saves: a mismatch is an error.

    Raises:
        AdapterConfigError: the config is unreadable, of another kind, or has wrong values.
        AdapterWeightsError: the weights are unreadable, damaged, or not the config's.
    """
    info = parse_config(config, f"{where}/{CONFIG_NAME}")
    metadata, tensors, digest = parse_weights(weights, f"{where}/{WEIGHTS_NAME}")
    inner = _embedded_config(metadata, f"{where}/{WEIGHTS_NAME}")
    if inner is None:
        return AdapterContents(info, tensors, digest, where, False, ())
    if info.weights_sha256 not in (None, inner.weights_sha256):
        if one_commit:
            raise AdapterWeightsError(
                f"{where}: {CONFIG_NAME} belongs to other weights than {WEIGHTS_NAME} (it names "
                f"sha256 {info.weights_sha256}, the file says {inner.weights_sha256}). Both come "
                "from one commit, so the upload or the download is wrong: pass "
                "force_download=True, or upload again with push_to_hub."
            )
        return AdapterContents(inner, tensors, digest, where, True, ())
    ours, theirs = info.to_dict(), inner.to_dict()
    differs = tuple(
        key
        for key in sorted(theirs)
        if ours[key] != theirs[key] and not (key == "weights_sha256" and ours[key] is None)
    )
    info = replace(info, weights_sha256=inner.weights_sha256)
    return AdapterContents(info, tensors, digest, where, False, differs)


def check_values(contents: AdapterContents, *, complete: bool = True) -> None:
    """Numbers finite and the tensors exactly those that were saved.

    Separate from `decode`, because a wrong key or shape deserves its own message first.

    Args:
        contents: what `decode` gave.
        complete: False when tensors were left out on purpose, so that the hash cannot hold.

    Raises:
        AdapterWeightsError: NaN, infinity or changed bytes.
        AdapterConfigError: adapter_config.json was edited in a way that changes the adapter.
    """
    where = f"{contents.where}/{WEIGHTS_NAME}"
    for key, tensor in sorted(contents.tensors.items()):
        wrong = int((~torch.isfinite(tensor)).sum())
        if wrong:
            raise AdapterWeightsError(
                f"{where}: {key} holds {wrong} NaN or infinite values among {tensor.numel()}. "
                "Training diverged before this was saved, or the file is damaged: "
                "take an earlier checkpoint."
            )
    expected = contents.info.weights_sha256
    if complete and expected not in (None, contents.digest):
        raise AdapterWeightsError(
            f"{where}: the tensors are not those that were saved (sha256 {contents.digest}, "
            f"saved as {expected}): bytes were damaged or replaced. Fetch or save the file "
            f"again; if you changed the tensors on purpose, set weights_sha256 in {CONFIG_NAME} "
            "to null and write the weights file without metadata."
        )
    edited = [key for key in contents.config_differs if key not in EDITABLE_KEYS]
    if edited:
        raise AdapterConfigError(
            f"{contents.where}/{CONFIG_NAME}: {edited} were changed after saving, so the file no "
            f"longer describes the tensors beside it. Undo the edit; only "
            f"{sorted(EDITABLE_KEYS)} may be edited."
        )


def parse_weights(data: bytes, where: str) -> tuple[dict[str, str], dict[str, Tensor], str]:
    """Metadata, tensors by plain key, and the hash over the tensors.

    Raises:
        AdapterWeightsError: not a whole safetensors file of floating-point tensors.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load

    refuse_look_alikes(data, where, AdapterWeightsError)
    header, payload = _checked_header(data, where)
    metadata = header.pop("__metadata__", {})
    for key, entry in header.items():
        if entry["dtype"] not in _DTYPES:
            raise AdapterWeightsError(
                f"{where}: {key} has dtype {entry['dtype']}; adapters hold "
                f"{', '.join(_DTYPES)}. Quantised or integer tensors are not adapter weights: "
                "save again from the trained model with save_adapter."
            )
        if 0 in entry["shape"]:
            raise AdapterWeightsError(
                f"{where}: {key} is empty (shape {entry['shape']}). It was probably saved from "
                "one process of a sharded model (ZeRO-3, FSDP): gather the parameters before "
                "saving."
            )
    try:
        tensors = load(data)
    except (SafetensorError, ValueError, RuntimeError, KeyError, OverflowError) as error:
        raise AdapterWeightsError(
            f"{where} is corrupt ({len(data)} bytes): {error}. Fetch or save the file again."
        ) from error
    short = {key: plain_key(key) for key in header}
    twice = sorted(key for key, plain in short.items() if plain != key and plain in header)
    if twice or len(set(short.values())) < len(short):
        raise AdapterKeyError(
            f"{where} holds tensors twice, with and without a wrapper's prefix ({twice[:4]}). "
            "Save again from the trained model with save_adapter."
        )
    digest = _hash_tensors({short[key]: entry for key, entry in header.items()}, payload)
    return metadata, {short[key]: tensor for key, tensor in tensors.items()}, digest


def plain_key(key: str) -> str:
    """`key` without what DDP, torch.compile, FSDP or peft put in front of it."""
    key = plain_path(key)
    while key.startswith(_WRAPPERS_IN_FRONT):
        for prefix in _WRAPPERS_IN_FRONT:
            key = key.removeprefix(prefix)
    return key


def _embedded_config(metadata: dict[str, str], where: str) -> AdapterInfo | None:
    text, digest = metadata.get("adapter_config"), metadata.get("adapter_config_sha256")
    if text is None and digest is None:
        return None  # written by another tool, for example safetensors.torch.save_file
    if text is None or hashlib.sha256(text.encode()).hexdigest() != digest:
        raise AdapterWeightsError(
            f"{where}: the config inside the file does not have the hash stored beside it, so "
            "the file was damaged or edited. Fetch or save it again."
        )
    return parse_config(text.encode(), f"{where} (the config inside)")


def _checked_header(data: bytes, where: str) -> tuple[dict[str, Any], memoryview]:
    size = len(data)
    length = struct.unpack("<Q", data[:8])[0] if size >= 8 else 0
    if size >= 8 and length > _MAX_HEADER:
        raise AdapterWeightsError(
            f"{where} is not a safetensors file: its first 8 bytes announce a header of {length} "
            f"bytes, more than the {_MAX_HEADER} allowed. Fetch or save the file again."
        )
    if size < 8 or 8 + length > size:
        raise AdapterWeightsError(
            f"{where} is truncated: {size} bytes, but its header alone needs {8 + length}. "
            "Fetch or save the file again."
        )
    try:
        header, payload = _split(data)
        ends = [0]
        for key, entry in header.items():
            if key != "__metadata__":
                start, end = entry["data_offsets"]
                count = 1
                for dim in entry["shape"]:
                    count *= dim
                if not isinstance(entry["dtype"], str) or min(entry["shape"], default=0) < 0:
                    raise ValueError(f"bad entry for {key}")
                if end - start != count * _DTYPES.get(entry["dtype"], 0) and (
                    entry["dtype"] in _DTYPES
                ):
                    raise ValueError(f"{key} needs another number of bytes than it has")
                ends.append(end)
        metadata = header.get("__metadata__", {})
        if not all(isinstance(text, str) for text in metadata.values()):
            raise ValueError("metadata is not all text")
        missing = max(ends) - len(payload)
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise AdapterWeightsError(
            f"{where} is corrupt ({size} bytes): its header cannot be read ({error}). "
            "Fetch or save the file again."
        ) from error
    if missing > 0:
        raise AdapterWeightsError(
            f"{where} is truncated: {size} bytes, {missing} fewer than its header announces. "
            "Fetch or save the file again."
        )
    return header, payload


def _split(data: bytes) -> tuple[dict[str, Any], memoryview]:
    """Header and tensor bytes of a safetensors file."""
    start = 8 + struct.unpack("<Q", data[:8])[0]
    header = json.loads(data[8:start].decode(), object_pairs_hook=no_duplicates)
    if not isinstance(header, dict):
        raise ValueError("the header is not a JSON object")
    return header, memoryview(data)[start:]


def _hash_tensors(header: dict[str, Any], payload: memoryview) -> str:
    """sha256 over "key|dtype|shape\\n" and the bytes of each tensor, keys sorted."""
    digest = hashlib.sha256()
    for key in sorted(header.keys() - {"__metadata__"}):
        entry = header[key]
        shape = ",".join(str(size) for size in entry["shape"])
        digest.update(f"{key}|{entry['dtype']}|{shape}\n".encode())
        start, end = entry["data_offsets"]
        digest.update(payload[start:end])
    return digest.hexdigest()
