"""Where a checkpoint comes from: a file, a folder, or a repository of the Hugging Face Hub."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Iterable
from pathlib import Path

from svp_peft.download import HubRepo, is_repo_id, open_repo
from svp_peft.errors import CheckpointError, HubError
from svp_peft.vim.files import WEIGHT_SUFFIXES, Checkpoint, read_checkpoint, write_checkpoint

PUBLISHED = {
    "hustvl/Vim-tiny-midclstok": "vim_t_midclstok_76p1acc.pth",
    "hustvl/Vim-small-midclstok": "vim_s_midclstok_80p5acc.pth",
}
"""Default file per repository, so that a cached one is found without asking the Hub."""

CONFIG_FILE = "config.json"
"""Constructor arguments beside the weights, in a folder or repository."""

_FINE_TUNED = re.compile(r"(^|[_-])ft([_-]|\.)")
_log = logging.getLogger(__name__)


def find_checkpoint(
    name_or_path: str | Path,
    *,
    filename: str | None = None,
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | Path | None = None,
    local_files_only: bool = False,
) -> Checkpoint:
    """Read the checkpoint that `name_or_path` and `filename` mean; see `load_vim`.

    An existing folder or file wins over a repository of the same name.

    Raises:
        CheckpointError: no such path, no file of it can be chosen, or the file is bad.
        HubError: the Hub refused or cannot be reached.
    """
    path = Path(name_or_path).expanduser()
    if path.is_dir():
        chosen = _choose(_files_below(path), filename, str(path))
        return _with_config(read_checkpoint(path / chosen), path / CONFIG_FILE)
    name = str(name_or_path)
    if path.is_file() or not is_repo_id(name) or path.suffix in WEIGHT_SUFFIXES:
        if filename is not None:
            raise CheckpointError(
                f"filename={filename!r} chooses a file of a folder or repository, and {name} is "
                f"neither. Pass the folder, or leave filename out."
            )
        if not path.exists():
            raise CheckpointError(
                f"{name} does not exist and is not a Hub repository's name ('owner/name'). Check "
                f"the path."
            )
        return read_checkpoint(path)
    probe = filename or PUBLISHED.get(name) or _cached_choice(name, cache_dir)
    repo = open_repo(
        name,
        probe=probe,
        revision=revision,
        token=token,
        cache_dir=cache_dir,
        local_files_only=local_files_only,
    )
    if repo.files is not None:
        chosen = _choose(repo.files, filename, str(repo), PUBLISHED.get(name))
    else:
        chosen = probe
    return _from_hub(repo, chosen)


def _from_hub(repo: HubRepo, filename: str) -> Checkpoint:
    source = f"{repo} {filename}"
    slim = None if filename.endswith(".safetensors") else _slim_copy(repo, filename)
    if slim is not None and slim.is_file():
        try:
            return read_checkpoint(slim)._replace(source=source)
        except CheckpointError as error:
            _log.warning("%s The original is read again.", error)
    path = repo.fetch(filename)
    if path is None:
        raise HubError(f"{repo} has no file {filename!r}. Pass another one as filename=.")
    checkpoint = read_checkpoint(path)._replace(source=source)
    if repo.files is not None and CONFIG_FILE in repo.files:
        config = repo.fetch(CONFIG_FILE)
        if config is not None:
            checkpoint = _with_config(checkpoint, config)
    elif repo.files is None:
        # an offline cache holds the config beside the weights, if the repository has one
        checkpoint = _with_config(checkpoint, path.with_name(CONFIG_FILE))
    if slim is not None:
        try:
            write_checkpoint(slim, checkpoint)
        except (OSError, TypeError, ValueError) as error:
            _log.info("no slim copy of %s is kept: %s", source, error)
    return checkpoint


def _slim_copy(repo: HubRepo, filename: str) -> Path | None:
    """Where the weights alone of a large pickle are kept; None where the cache is read-only."""
    from huggingface_hub import cached_assets_path

    try:
        folder = cached_assets_path(
            "svp_peft",
            namespace=repo.repo_id,
            subfolder=repo.commit,
            assets_dir=None if repo.cache_dir is None else Path(repo.cache_dir) / "assets",
        )
    except OSError as error:
        _log.info("no slim copy of %s is kept: %s", filename, error)
        return None
    return folder / (filename.replace("/", "--") + ".safetensors")


def _with_config(checkpoint: Checkpoint, path: Path) -> Checkpoint:
    """The checkpoint with the constructor arguments of a JSON file, if there is one, below its own.

    Raises:
        CheckpointError: the file is not a JSON object.
    """
    if not path.is_file():
        return checkpoint
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"{path} is not readable JSON ({error}). Correct it, or remove it: the geometry is "
            f"then read from the tensors."
        ) from error
    if not isinstance(config, dict):
        raise CheckpointError(
            f"{path} holds a {type(config).__name__} where constructor arguments of VisionMamba "
            f"were expected, as a JSON object. Correct it, or remove it."
        )
    return checkpoint._replace(config={**config, **checkpoint.config})


def _files_below(folder: Path) -> list[str]:
    return sorted(str(p.relative_to(folder)) for p in folder.iterdir() if p.is_file())


def _choose(
    files: Iterable[str], filename: str | None, where: str, default: str | None = None
) -> str:
    """The weight file that is meant: the named one, the default, the only one, the plain one."""
    weights = sorted(name for name in files if name.endswith(WEIGHT_SUFFIXES))
    if filename is not None:
        if filename in files:
            return filename
        raise CheckpointError(
            f"{where} has no file {filename!r}. Its checkpoints: {weights}. Pass one of them as "
            f"filename=."
        )
    if default in weights:
        return str(default)
    plain = [name for name in weights if not _FINE_TUNED.search(name)]
    if len(weights) == 1 or len(plain) == 1:
        return weights[0] if len(weights) == 1 else plain[0]
    if "model.safetensors" in weights:
        return "model.safetensors"
    if not weights:
        raise CheckpointError(
            f"{where} has no checkpoint: no file that ends in {', '.join(WEIGHT_SUFFIXES)}. It has "
            f"{sorted(files)[:12]}. Pass the right folder or repository."
        )
    raise CheckpointError(
        f"{where} has several checkpoints: {weights}. Pass one of them as filename=."
    )


def _cached_choice(repo_id: str, cache_dir: str | Path | None) -> str:
    """The file that an earlier load took, as far as the Hub cache tells."""
    from huggingface_hub import constants

    cache = Path(constants.HF_HUB_CACHE if cache_dir is None else cache_dir)
    snapshots = cache / f"models--{repo_id.replace('/', '--')}" / "snapshots"
    names = {path.name for path in snapshots.glob("*/*")}
    try:
        return _choose(names, None, repo_id)
    except CheckpointError:
        return "model.safetensors"
