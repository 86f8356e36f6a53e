"""Where the two files of an adapter lie: a folder, or one commit of a Hub repository.

Writing goes through temporary files in the same folder and two renames, the weights first. The
weights file holds the config too, so its rename is the moment at which the new adapter replaces
the old one: a process killed at any time leaves one of the two, whole.
"""

import contextlib
import os
import secrets
import stat
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from svp_peft.adapter_config import CONFIG_NAME
from svp_peft.adapter_format import WEIGHTS_NAME, AdapterContents, decode
from svp_peft.download import is_repo_id, open_repo
from svp_peft.errors import AdapterNotFoundError, AdapterSaveError, HubError, InputError

_ABANDONED_AFTER = 3600.0  # seconds; a temporary file this old belongs to no living save


@dataclass(frozen=True, kw_only=True)
class HubOptions:
    """How to read from the Hub; the arguments of `load_adapter` of the same names."""

    revision: str | None = None
    subfolder: str | None = None
    token: str | bool | None = None
    cache_dir: str | Path | None = None
    force_download: bool = False
    local_files_only: bool = False


def write_folder(folder: str | os.PathLike[str], config: bytes, weights: bytes) -> Path:
    """Write both files into `folder`, made if missing; replaces an adapter that is there.

    Raises:
        AdapterSaveError: the disk is full, the folder may not be written, ... An adapter that
            was in the folder is still there, whole.
    """
    folder = Path(folder).expanduser()
    for attempt in range(3):
        try:
            folder.mkdir(parents=True, exist_ok=True)
            _replace_files(folder, {WEIGHTS_NAME: weights, CONFIG_NAME: config})
            return folder
        except FileNotFoundError as error:
            # somebody removed the folder meanwhile: nothing of ours is lost, so write again
            if attempt == 2:
                raise _save_error(folder, error, len(config) + len(weights)) from error
        except OSError as error:
            raise _save_error(folder, error, len(config) + len(weights)) from error
    raise AssertionError("unreachable")


def read_adapter(path_or_repo: str | os.PathLike[str], options: HubOptions) -> AdapterContents:
    """The adapter in a folder or, when there is no such folder, in a Hub repository.

    Raises:
        AdapterNotFoundError: no such folder or repository, or an adapter's file is missing in it.
        InputError: `subfolder` leads out of the folder or repository.
        HubError: the repository cannot be had.
        AdapterConfigError, AdapterWeightsError: see `adapter_format.decode`.
    """
    text = os.fspath(path_or_repo)
    path = Path(text).expanduser()
    _check_inside(options.subfolder)
    # not Path.is_dir, which raises where a name is too long
    if os.path.isdir(path):
        where = path / options.subfolder if options.subfolder else path
        config, weights = _read_folder(where)
        return decode(config, weights, where=str(where), one_commit=False)
    if os.path.exists(path):
        raise AdapterNotFoundError(f"{text} is a file; an adapter is a folder. {_advice(path)}")
    if not isinstance(path_or_repo, str) or not is_repo_id(text):
        raise AdapterNotFoundError(
            f"there is no folder {text} (looked in {Path.cwd()}), and it is not the id of a Hub "
            "repository, 'owner/name'. Check the path."
        )
    return _read_repo(text, options)


def _read_folder(folder: Path) -> tuple[bytes, bytes]:
    names = sorted(entry.name for entry in folder.iterdir()) if folder.is_dir() else None
    if names is None:
        raise AdapterNotFoundError(f"there is no folder {folder}. Check the path and subfolder=.")
    _check_present(str(folder), names, where_else=_subfolders(folder))
    try:
        # the config first: if a save comes between, the newer weights bring their own config
        return _read_file(folder / CONFIG_NAME), _read_file(folder / WEIGHTS_NAME)
    except OSError as error:
        raise AdapterNotFoundError(
            f"the adapter in {folder} cannot be read: {error}. Check its rights and the disk."
        ) from error


def _read_file(file: Path) -> bytes:
    # reading a named pipe would wait for ever, and a device may have no end
    if not stat.S_ISREG(file.stat().st_mode):
        raise OSError(f"{file.name} is not a regular file")
    return file.read_bytes()


def _check_inside(subfolder: str | None) -> None:
    parts = PurePosixPath(subfolder or "").parts
    if parts[:1] == ("/",) or ".." in parts:
        raise InputError(
            f"subfolder={subfolder!r} leads out of the folder or repository. Pass a path inside "
            "it, such as 'birds', or the other folder itself."
        )


def _read_repo(repo_id: str, options: HubOptions) -> AdapterContents:
    prefix = f"{options.subfolder.strip('/')}/" if options.subfolder else ""
    try:
        repo = open_repo(
            repo_id,
            probe=prefix + CONFIG_NAME,
            revision=options.revision,
            token=options.token,
            cache_dir=options.cache_dir,
            force_download=options.force_download,
            local_files_only=options.local_files_only,
        )
    except HubError as error:
        raise type(error)(f"{error} (There is no local folder {repo_id} either.)") from error
    where = f"{repo}/{prefix}".rstrip("/")
    if repo.files is not None:
        names = [name.removeprefix(prefix) for name in repo.files if name.startswith(prefix)]
        folders = sorted(
            name.rpartition("/")[0] for name in repo.files if name.endswith("/" + CONFIG_NAME)
        )
        _check_present(where, names, where_else=folders)
    found = [repo.fetch(prefix + name) for name in (CONFIG_NAME, WEIGHTS_NAME)]
    missing = [
        name for name, file in zip((CONFIG_NAME, WEIGHTS_NAME), found, strict=True) if file is None
    ]
    if missing:
        raise AdapterNotFoundError(f"{where} has no {' and no '.join(missing)}. Check subfolder=.")
    config, weights = (file.read_bytes() for file in found if file is not None)
    return decode(config, weights, where=where, one_commit=True)


def _check_present(where: str, names: Sequence[str], *, where_else: Sequence[str]) -> None:
    """Raise unless both files are among `names`; the message fits what is there instead."""
    missing = [name for name in (CONFIG_NAME, WEIGHTS_NAME) if name not in names]
    if not missing:
        return
    shown = sorted(name for name in names if not name.startswith("."))
    listing = f"found {shown[:12]}{' and more' if len(shown) > 12 else ''}"
    pickles = [name for name in shown if name.endswith((".bin", ".pth", ".pt", ".ckpt"))]
    if WEIGHTS_NAME in missing and pickles:
        advice = (
            f"{pickles[0]} is a pickle, which can run code when it is opened, so it is never "
            "loaded. For a checkpoint of the authors' SVP code run "
            "convert_svp_checkpoint(checkpoint, folder) or `svp-peft convert`."
        )
    elif CONFIG_NAME in missing and WEIGHTS_NAME not in missing:
        advice = "The copy is incomplete, or the first save into it was interrupted: save again."
    elif "config.json" in names or "model.safetensors" in names:
        advice = "This is a whole model, not an adapter: load a Vision Mamba with load_vim."
    elif "adapter.safetensors" in names or "pytorch_adapter.bin" in names:
        advice = "This is an adapter of the adapters library; load it with that."
    elif where_else:
        advice = f"There are adapters in its subfolders {list(where_else[:8])}: pass subfolder=."
    else:
        advice = "An adapter is the two files that save_adapter writes. Check the path."
    raise AdapterNotFoundError(f"{where} has no {' and no '.join(missing)}; {listing}. {advice}")


def _subfolders(folder: Path) -> list[str]:
    return sorted(file.parent.name for file in folder.glob(f"*/{CONFIG_NAME}"))


def _advice(file: Path) -> str:
    if file.suffix in (".pth", ".pt", ".bin", ".ckpt"):
        return (
            "Pickles are never loaded as adapters; for a checkpoint of the authors' SVP code run "
            f"convert_svp_checkpoint({str(file)!r}, folder) or `svp-peft convert`."
        )
    return f"Pass the folder that holds {CONFIG_NAME} and {WEIGHTS_NAME}, here {file.parent}."


def _replace_files(folder: Path, files: dict[str, bytes]) -> None:
    """Write every file beside its place, then rename all into place in order."""
    _remove_abandoned(folder)
    written: list[tuple[Path, Path]] = []
    try:
        for name, data in files.items():
            temporary = folder / f".{name}.{os.getpid()}.{secrets.token_hex(4)}.tmp"
            written.append((temporary, folder / name))
            with open(temporary, "xb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
        for temporary, final in written:
            os.replace(temporary, final)
        _sync_folder(folder)
    finally:
        for temporary, _ in written:
            with contextlib.suppress(OSError):
                temporary.unlink()


def _sync_folder(folder: Path) -> None:
    """Make the renames survive a power failure, where the system can."""
    with contextlib.suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def _remove_abandoned(folder: Path) -> None:
    for file in folder.glob(".adapter_*.tmp"):
        with contextlib.suppress(OSError):
            if time.time() - file.stat().st_mtime > _ABANDONED_AFTER:
                file.unlink()


def _save_error(folder: Path, error: OSError, size: int) -> AdapterSaveError:
    return AdapterSaveError(
        f"the adapter could not be written to {folder}: {error.strerror or error} "
        f"({size} bytes are needed there). An adapter that was in the folder is still whole. "
        "Free some space or choose a folder that may be written, and save again."
    )
