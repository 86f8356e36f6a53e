"""Compiled kernels on disk, so that only the first process on a machine waits for the compiler.

One file per kernel in `$SVP_PEFT_CACHE/cuda`, else `$XDG_CACHE_HOME/svp_peft/cuda`, else
`~/.cache/svp_peft/cuda`. Its name is a hash of everything that made it; its content starts with a
checksum, so a damaged file is compiled again rather than loaded. Files appear by renaming, so any
number of processes may write at once. A folder that cannot be written costs the time, nothing else.
"""

import hashlib
import logging
import os
import tempfile
from pathlib import Path

_log = logging.getLogger(__name__)
_MAGIC = b"svp_peft cubin 1\n"


def cache_folder() -> Path:
    """Where compiled kernels are kept; read from the environment at every call.

    Raises:
        OSError: nothing is named and the user has no home directory.
    """
    base = os.environ.get("SVP_PEFT_CACHE")
    xdg = os.environ.get("XDG_CACHE_HOME")
    try:
        if base:
            return Path(base).expanduser() / "cuda"
        root = Path(xdg) if xdg else Path.home() / ".cache"
    except RuntimeError as error:
        raise OSError(str(error)) from error
    return root / "svp_peft" / "cuda"


def key_of(*parts: str) -> str:
    """Name of the file for a kernel made of these parts, order included."""
    digest = hashlib.sha256()
    for part in parts:
        encoded = part.encode()
        digest.update(f"{len(encoded)}:".encode() + encoded)
    return digest.hexdigest()[:40]


def read(key: str) -> bytes | None:
    """The kernel kept under `key`, or None where there is none or the file is damaged."""
    try:
        path = cache_folder() / key
        content = path.read_bytes()
    except OSError:
        return None
    header = len(_MAGIC) + 32
    payload = content[header:]
    if (
        content[: len(_MAGIC)] != _MAGIC
        or content[len(_MAGIC) : header] != hashlib.sha256(payload).digest()
    ):
        _log.warning("%s is damaged; the kernel is compiled again", path)
        return None
    return payload


def write(key: str, payload: bytes) -> None:
    """Keep a kernel. Failing to is reported once per process and is no error."""
    folder = temporary = None
    try:
        folder = cache_folder()
        folder.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=folder, prefix=".writing-")
        with os.fdopen(handle, "wb") as file:
            file.write(_MAGIC + hashlib.sha256(payload).digest() + payload)
        os.replace(temporary, folder / key)
    except OSError as error:
        if temporary is not None:
            try:
                os.unlink(temporary)
            except OSError:
                pass
        if folder not in _reported:
            _reported.add(folder)
            _log.warning(
                "compiled kernels cannot be kept in %s (%s), so every process compiles its own. "
                "Set SVP_PEFT_CACHE to a folder that can be written.",
                folder or "a cache",
                error,
            )


_reported: set[Path | None] = set()
