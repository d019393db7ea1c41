"""Resumable, hash-checked, cancellable downloads from the model hub.

Complete files are stored in the cache of huggingface_hub, where its own functions find them.
Incomplete ones are stored in `partial/` beside them, named by the hash of the complete file, so
that any process can resume them.
"""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from core.errors import StudioError
from core.files import replace_file
from models.http_download import (
    PULSE_S,
    Backoff,
    PartialFile,
    RemoteFile,
    WrongContent,
    size_of,
    status_of,
)
from models.weights import Weights, format_bytes


@dataclass(frozen=True)
class DownloadProgress:
    """Progress of a download in bytes on disk: of the current file, and of all files.

    `component` is the file's path in its repository, empty while the files are being listed. Bytes
    from earlier runs count as done. `done` falls when a file has to be restarted.
    """

    component: str = ""
    component_done: int = 0
    component_total: int = 0
    done: int = 0
    total: int = 0
    files_done: int = 0
    files_total: int = 0

    def __str__(self) -> str:
        """One line for a terminal."""
        if not self.component:
            return "Asking the hub"
        return (
            f"{self.component} {self.component_percent:.0f} % of {format_bytes(self.component_total)}"
            f" · all {self.overall_percent:.0f} % of {format_bytes(self.total)}"
            f" · file {min(self.files_done + 1, self.files_total)} of {self.files_total}"
        )

    @property
    def component_percent(self) -> float:
        """0 to 100; an empty file counts as complete."""
        return 100 * self.component_done / self.component_total if self.component_total else 100.0

    @property
    def overall_percent(self) -> float:
        """0 to 100."""
        return 100 * self.done / self.total if self.total else 0.0


def find(weights: Weights) -> Path | None:
    """The folder of `weights` in the hub's cache, or None. Never goes online."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    try:
        snapshot = snapshot_download(
            weights.repo,
            revision=weights.revision,
            allow_patterns=list(weights.files),
            local_files_only=True,
        )
    except (LocalEntryNotFoundError, HFValidationError):
        return None
    folder = weights.root(Path(snapshot))
    return folder if weights.is_in(folder) else None


def fetch(weights: Weights) -> Generator[DownloadProgress, None, Path]:
    """Download `weights` and what else they need, small files first, unless they are on disk.

    The hub is contacted only if a file is missing. Yields a `DownloadProgress` for every piece of
    at most 64 KiB, and several times a second while waiting for the hub or for another process
    that downloads the same file. Closing the generator stops there; the next call resumes from the
    last byte on disk, whatever ended the previous one. A file counts only once its size and hash
    equal the hub's listing (sha256, or git's sha1 for small files).

    Returns:
        The folder (as the generator's return value). In the last `DownloadProgress` of a
        repository all bytes and files are done.

    Raises:
        StudioError: `model-missing` if the hub cannot be reached, `model-gated`, `hub-unknown`
            for a repository or revision, `disk-full` before anything is downloaded,
            `cache-read-only`, and `download-failed` for a file that cannot be completed.
    """
    folder = weights.folder or (yield from _fetch_repository(weights))
    for other in weights.companions(folder):
        yield from fetch(other)
    return folder


def _fetch_repository(weights: Weights) -> Generator[DownloadProgress, None, Path]:
    """Download the files of one repository, unless they are on disk (returns the folder)."""
    if (found := find(weights)) and not weights.missing(found):
        return found
    yield DownloadProgress()
    with _as_studio_errors(weights):
        listing = yield from _list_files(weights)
        cache = _RepositoryCache(weights, listing)
        cache.check_space(listing.files)
    total, done = sum(file.size for file in listing.files), 0
    for count, file in enumerate(listing.files):
        with _as_studio_errors(weights, file.path, total - done):
            for size in cache.download(file):
                yield DownloadProgress(
                    file.path, size, file.size, done + size, total, count, len(listing.files)
                )
        done += file.size
        yield DownloadProgress(
            file.path, file.size, file.size, done, total, count + 1, len(listing.files)
        )
    with _as_studio_errors(weights):
        return weights.root(cache.finish())


@dataclass(frozen=True)
class _Listing:
    """What a repository holds: its commit, the files to download, and the hashes of all files."""

    commit: str
    files: list[RemoteFile]
    hashes: set[str]


def _list_files(weights: Weights) -> Generator[DownloadProgress, None, _Listing]:
    """List the repository's files (returned), with retries."""
    from huggingface_hub.errors import HfHubHTTPError

    backoff = Backoff()
    while True:
        try:
            return _request_listing(weights)
        except HfHubHTTPError as error:
            for _ in backoff.wait(error):
                yield DownloadProgress()


def _request_listing(weights: Weights) -> _Listing:
    from huggingface_hub import HfApi, constants
    from huggingface_hub.hf_api import RepoFile
    from huggingface_hub.utils import filter_repo_objects

    api = HfApi()
    info = api.model_info(
        weights.repo, revision=weights.revision, timeout=constants.HF_HUB_DOWNLOAD_TIMEOUT
    )
    tree = {}
    for entry in api.list_repo_tree(weights.repo, revision=info.sha, recursive=True):
        if isinstance(entry, RepoFile):
            size, hash_ = (
                (entry.lfs.size, entry.lfs.sha256) if entry.lfs else (entry.size, entry.blob_id)
            )
            tree[entry.path] = RemoteFile(entry.path, size, hash_)
    names = filter_repo_objects(tree, allow_patterns=list(weights.files))
    files = sorted((tree[name] for name in names), key=lambda file: (file.size, file.path))
    if not files or not all(file.is_safe() for file in files):
        raise _unknown(weights)
    return _Listing(info.sha, files, {file.hash for file in tree.values()})


class _RepositoryCache:
    """A repository's folder in the hub's cache: blobs, and links to them for every commit."""

    def __init__(self, weights: Weights, listing: _Listing) -> None:
        from huggingface_hub import constants
        from huggingface_hub.file_download import repo_folder_name

        name = repo_folder_name(repo_id=weights.repo, repo_type="model")
        cache = Path(constants.HF_HUB_CACHE)
        self._weights, self._commit = weights, listing.commit
        self._folder, self._locks = cache / name, cache / ".locks" / name
        self._blobs, self._partials = self._folder / "blobs", self._folder / "partial"
        self._snapshot = self._folder / "snapshots" / listing.commit
        for folder in (self._blobs, self._partials, self._snapshot, self._locks):
            folder.mkdir(parents=True, exist_ok=True)
        self._remove_stale_partials(listing.hashes)

    def check_space(self, files: list[RemoteFile]) -> None:
        """Raise `disk-full`, with the space to free, if the disk cannot hold what is missing."""
        missing = {file.hash: file for file in files if not self._has(file)}.values()
        missing = [file for file in missing if size_of(self._blobs / file.hash) != file.size]
        needed = sum(f.size - size_of(self._partials / f.hash) for f in missing)
        if (short := needed - shutil.disk_usage(self._folder).free) > 0:
            raise _disk_full(short)

    def download(self, file: RemoteFile) -> Iterator[int]:
        """Download `file` into the snapshot. Yields the number of its bytes on disk."""
        if self._has(file):
            return
        while (lock := _acquire(self._locks / f"{file.hash}.lock")) is None:
            yield min(file.size, size_of(self._partials / file.hash))
        try:
            if not self._has(file):
                yield from self._download_locked(file)
        finally:
            lock.release()

    def _download_locked(self, file: RemoteFile) -> Iterator[int]:
        blob, link = self._blobs / file.hash, self._snapshot / file.path
        if not blob.is_file() or size_of(blob) != file.size:
            partial = PartialFile(file, self._partials / file.hash, self._url(file))
            yield from partial.complete()
            partial.publish(blob)
        link.parent.mkdir(parents=True, exist_ok=True)
        link.unlink(missing_ok=True)
        try:
            link.symlink_to(os.path.relpath(blob, link.parent))
        except OSError:  # on Windows, links need a privilege
            os.replace(blob, link)

    def finish(self) -> Path:
        """Point the revision at the commit, now that it is complete; returns the snapshot."""
        if self._weights.revision != self._commit:
            ref = self._folder / "refs" / self._weights.revision
            ref.parent.mkdir(parents=True, exist_ok=True)
            replace_file(ref, [self._commit.encode()])
        return self._snapshot

    def _has(self, file: RemoteFile) -> bool:
        link = self._snapshot / file.path
        return link.is_file() and size_of(link) == file.size

    def _url(self, file: RemoteFile) -> str:
        from huggingface_hub import hf_hub_url

        return hf_hub_url(self._weights.repo, file.path, revision=self._commit)

    def _remove_stale_partials(self, hashes: set[str]) -> None:
        """Delete incomplete files that the repository no longer has."""
        for path in self._partials.iterdir():
            name = path.name.split(".")[0]
            if name not in hashes and (lock := _acquire(self._locks / f"{name}.lock")):
                path.unlink(missing_ok=True)
                lock.release()


@contextmanager
def _as_studio_errors(weights: Weights, file: str = "", needed: int = 0) -> Iterator[None]:
    """Raise errors of the hub, the network and the disk as a `StudioError`.

    Args:
        file: the file being downloaded; empty while the repository is being listed.
        needed: bytes still to come, for `disk-full`.
    """
    from huggingface_hub.errors import (
        GatedRepoError,
        HFValidationError,
        HTTPError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    facts = {"model": weights.title, "command": weights.command}
    gated = {**facts, "model": weights.repo}
    try:
        yield
    except GatedRepoError as error:
        raise StudioError("model-gated", **gated) from error
    except (RepositoryNotFoundError, RevisionNotFoundError, HFValidationError) as error:
        raise _unknown(weights) from error
    except (HTTPError, OSError, WrongContent) as error:
        status, number = status_of(error), getattr(error, "errno", None)
        if status in (401, 403):
            raise StudioError("model-gated", **gated) from error
        if number in (errno.ENOSPC, errno.EDQUOT):
            raise _disk_full(needed) from error
        if number in (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EEXIST):
            raise StudioError("cache-read-only") from error
        if not file:
            raise StudioError("model-missing", size=weights.size, **facts) from error
        problem = f"was answered with HTTP {status}" if status else "broke off"
        if isinstance(error, WrongContent):
            problem = str(error)
        raise StudioError("download-failed", file=file, problem=problem, **facts) from error


def _unknown(weights: Weights) -> StudioError:
    return StudioError(
        "hub-unknown", repo=weights.repo, revision=weights.revision, command=weights.command
    )


def _disk_full(short: int) -> StudioError:
    return StudioError("disk-full", place="the models", needed=format_bytes(short))


def _acquire(path: Path) -> Any:
    """The lock at `path`, or None while another process holds it. Any thread may release it.

    It is the lock that huggingface_hub takes for the same file.
    """
    from filelock import FileLock, SoftFileLock

    for kind in (FileLock, SoftFileLock):
        lock = kind(path, timeout=PULSE_S, thread_local=False, mode=0o664)
        try:
            lock.acquire()
        except TimeoutError:
            return None
        except NotImplementedError:  # network disks without locks: a lock file has to do
            continue
        return lock
    return None
