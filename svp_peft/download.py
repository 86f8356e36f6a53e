"""Files of one commit of a Hugging Face Hub repository.

`open_repo` turns a revision into a commit once; every file is then taken from that commit, so two
files always belong together, even when the branch moves in between. A cached commit named by its
40 digits needs no request at all.

When the Hub cannot be reached, the newest cached commit of the revision is used and a warning is
logged. When the Hub answers "no such repository", "not for you" or "no such revision", that answer
is raised: a cached copy must not hide it.
"""

import logging
import re
from collections.abc import Callable
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, NoReturn, TypeVar

from svp_peft.errors import HubError, HubUnreachable

logger = logging.getLogger(__name__)

T = TypeVar("T")

# the HTTP library behind huggingface_hub differs between its releases (requests, httpx, httpx2);
# their exceptions are recognised by module so that none of them has to be imported
_TRANSPORT_MODULES = ("requests", "urllib3", "httpx", "httpx2", "httpcore", "httpcore2")

_REPO_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+|[A-Za-z0-9][\w.-]*")
_COMMIT = re.compile(r"[0-9a-f]{40}")


def library_version() -> str:
    """Version of the installed svp_peft, as the Hub's logs and adapter files record it."""
    try:
        return metadata.version("svp_peft")
    except metadata.PackageNotFoundError:
        return "0+unknown"


def is_repo_id(name: str) -> bool:
    """Whether `name` has the form of a Hub repository: "name" or "owner/name"."""
    bad = "--" in name or ".." in name or name.endswith((".git", ".", "-"))
    return _REPO_ID.fullmatch(name) is not None and not bad and len(name) <= 96


@dataclass(frozen=True)
class HubRepo:
    """One commit of a repository, and how to fetch its files."""

    repo_id: str
    commit: str
    """40 hexadecimal digits."""
    files: tuple[str, ...] | None
    """Paths in the commit, or None when the Hub was not asked."""
    branch: str | None
    """Branch or tag that named the commit, if one did."""
    cached_only: bool
    token: str | bool | None
    cache_dir: str | Path | None
    force_download: bool

    def __str__(self) -> str:
        return f"{self.repo_id}@{self.commit[:12]}"

    def fetch(self, filename: str) -> Path | None:
        """Local path of `filename`, downloaded if it is not cached; None if it does not exist.

        Raises:
            HubError: the file cannot be had: no access, no connection, a broken transfer.
        """
        if self.files is not None and filename not in self.files:
            return None
        path = _download(
            self.repo_id,
            filename,
            revision=self.commit,
            token=self.token,
            cache_dir=self.cache_dir,
            force_download=self.force_download,
            local_files_only=self.cached_only,
        )
        if path is not None and self.branch is not None:
            self._remember_branch(path.parents[filename.count("/") + 2])
        return path

    def _remember_branch(self, folder: Path) -> None:
        """Note in the cache which commit the branch names, so that it is found without the Hub.

        The client does so itself only where it is given the branch instead of the commit.
        """
        reference = folder / "refs" / str(self.branch)
        try:
            if not reference.is_file() or reference.read_text() != self.commit:
                reference.parent.mkdir(parents=True, exist_ok=True)
                reference.write_text(self.commit)
        except OSError as error:
            logger.info("the cache does not remember %s of %s: %s", self.branch, self, error)


def open_repo(
    repo_id: str,
    *,
    probe: str,
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | Path | None = None,
    force_download: bool = False,
    local_files_only: bool = False,
) -> HubRepo:
    """Resolve `revision` (default: the branch main) to a commit, once.

    Args:
        repo_id: "owner/name" of a model repository.
        probe: a file of the repository, by which a cached commit is recognised when offline.
        revision: branch, tag or commit.
        token: Hub token; None takes the one of `hf auth login`, False sends none.
        cache_dir: Hub cache; None takes the usual one.
        force_download: fetch again what is cached.
        local_files_only: use the cache alone; so does HF_HUB_OFFLINE=1.

    Raises:
        HubError: the repository or revision does not exist, is private or gated, the Hub failed
            or cannot be reached, or nothing is cached. The message says which, and the remedy.
    """
    from huggingface_hub import HfApi, constants
    from huggingface_hub.errors import HFValidationError

    offline = local_files_only or constants.HF_HUB_OFFLINE
    if offline and force_download:
        raise HubError(
            f"{repo_id}: force_download=True needs the Hub, but local_files_only=True or "
            "HF_HUB_OFFLINE=1 forbids asking it. Drop one of the two."
        )

    def cached(revision: str | None) -> HubRepo | None:
        path = _cached(repo_id, probe, revision, cache_dir)
        if path is None:
            return None
        # .../snapshots/<commit>/<probe>
        commit = path.parents[probe.count("/")].name
        return HubRepo(repo_id, commit, None, None, offline, token, cache_dir, False)

    if offline or (revision and _COMMIT.fullmatch(revision) and not force_download):
        found = cached(revision)
        if found:
            return found
        if offline:
            raise HubError(
                f"{repo_id} (revision {revision or 'main'}) is not in the Hub cache, and "
                "local_files_only=True or HF_HUB_OFFLINE=1 forbids asking the Hub. "
                "Load it once with a connection, or pass cache_dir= where it was cached."
            )

    # the client's own setting, HF_HUB_ETAG_TIMEOUT; 10 seconds by default
    timeout = constants.HF_HUB_ETAG_TIMEOUT
    api = HfApi(token=token, library_name="svp_peft", library_version=library_version())
    try:
        info = call_hub(
            lambda: api.model_info(repo_id, revision=revision, timeout=timeout), repo_id
        )
    except HubUnreachable as error:
        found = None if force_download else cached(revision)
        if found is None:
            raise
        logger.warning("%s Using the cached commit %s.", error, found.commit[:12])
        return HubRepo(repo_id, found.commit, None, None, True, token, cache_dir, False)
    except HFValidationError as error:
        raise HubError(f"{repo_id!r} is not a Hub repository id: {error}") from error
    files = None if info.siblings is None else tuple(file.rfilename for file in info.siblings)
    if info.sha is None:
        raise HubError(f"{repo_id}: the Hub named no commit for revision {revision or 'main'}.")
    branch = None if revision == info.sha else revision or "main"
    return HubRepo(repo_id, info.sha, files, branch, False, token, cache_dir, force_download)


def call_hub(request: Callable[[], T], repo_id: str) -> T:
    """Result of `request()`; the client's and the transport's exceptions become `HubError`."""
    from huggingface_hub import errors

    try:
        return request()
    except errors.HFValidationError:
        raise
    except Exception as error:
        _translate(error, repo_id)


def _translate(error: Exception, repo_id: str) -> NoReturn:
    """Raise our own error for what the Hub client raised, or `error` itself if it is not its."""
    from huggingface_hub import constants, errors

    endpoint = constants.ENDPOINT
    if isinstance(error, errors.GatedRepoError):
        raise HubError(
            f"{repo_id} is gated: its owner decides who may download it. Ask for access at "
            f"{endpoint}/{repo_id}, then sign in with `hf auth login` or pass token=."
        ) from error
    if isinstance(error, errors.RepositoryNotFoundError):
        raise HubError(
            f"{repo_id} does not exist on {endpoint}, or it is private and the token given (if "
            "any) may not see it. Check the spelling; for a private repository sign in with "
            "`hf auth login` or pass token=."
        ) from error
    if isinstance(error, errors.RevisionNotFoundError):
        raise HubError(
            f"{repo_id} exists, but has no such revision. Pass the name of a branch or tag, or "
            f"a commit's 40 digits; {endpoint}/{repo_id}/commits lists them."
        ) from error
    if isinstance(error, errors.LocalEntryNotFoundError):
        raise HubUnreachable(
            f"A file of {repo_id} is not in the Hub cache and {endpoint} cannot be reached. "
            "Check the connection and try again."
        ) from error
    if isinstance(error, errors.OfflineModeIsEnabled):
        raise HubUnreachable(
            f"{repo_id}: HF_HUB_OFFLINE=1 forbids asking the Hub. Unset it."
        ) from error
    if isinstance(error, errors.HfHubHTTPError):
        status = getattr(error.response, "status_code", None)
        if status is not None and status >= 500:
            raise HubUnreachable(
                f"{endpoint} failed to answer for {repo_id} (HTTP {status}). "
                "Try again later; https://status.huggingface.co shows outages."
            ) from error
        if status in (401, 403):
            raise HubError(
                f"{endpoint} does not allow this on {repo_id} (HTTP {status}). Sign in with "
                "`hf auth login`, or pass a token= with the right to write if you push."
            ) from error
        raise HubError(f"{endpoint} refused the request for {repo_id}: {error}") from error
    modules = {kind.__module__.partition(".")[0] for kind in type(error).__mro__}
    if modules & set(_TRANSPORT_MODULES) or isinstance(error, ConnectionError | TimeoutError):
        raise HubUnreachable(
            f"{endpoint} cannot be reached for {repo_id} ({type(error).__name__}: {error}). "
            "Check the connection and HF_ENDPOINT."
        ) from error
    raise error


def _download(repo_id: str, filename: str, **options: Any) -> Path | None:
    from huggingface_hub import errors, hf_hub_download

    try:
        path = hf_hub_download(
            repo_id,
            filename,
            library_name="svp_peft",
            library_version=library_version(),
            **options,
        )
    except errors.LocalEntryNotFoundError as error:
        _translate(error, repo_id)
    except errors.EntryNotFoundError:
        return None
    except Exception as error:
        try:
            _translate(error, repo_id)
        except HubError:
            raise
        except (OSError, RuntimeError, ValueError) as cause:
            # the client's own checks of size and its disk errors
            raise HubError(
                f"{filename} of {repo_id} could not be downloaded: {cause} "
                "Nothing was kept. Try again; if it repeats, pass force_download=True or check "
                "the free space and the rights of the Hub cache."
            ) from cause
    return Path(path)


def _cached(
    repo_id: str, filename: str, revision: str | None, cache_dir: str | Path | None
) -> Path | None:
    from huggingface_hub import try_to_load_from_cache

    path = try_to_load_from_cache(repo_id, filename, revision=revision, cache_dir=cache_dir)
    return Path(path) if isinstance(path, str) else None
