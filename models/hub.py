"""Bringing models from the hub to disk: gone on with after any end, checked, stopped at once.

Finished files stand in the cache of huggingface_hub, where its own functions find them. Unfinished
ones stand in `partial/` beside them, under the hash of what they will hold, whoever began them.
"""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Iterator
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
    """How far a download is, in bytes on disk: of the file at hand, and of all files together.

    `component` is the file's path in its repository, empty while the hub is asked what there is.
    What earlier runs brought counts as done. A file that has to be begun anew takes `done` back.
    """

    component: str = ""
    component_done: int = 0
    component_total: int = 0
    done: int = 0
    total: int = 0
    files_done: int = 0
    files_total: int = 0

    def __str__(self) -> str:
        """A line for a terminal."""
        if not self.component:
            return "Asking the hub"
        return (
            f"{self.component} {self.component_percent:.0f} % of {format_bytes(self.component_total)}"
            f" · all {self.overall_percent:.0f} % of {format_bytes(self.total)}"
            f" · file {min(self.files_done + 1, self.files_total)} of {self.files_total}"
        )

    @property
    def component_percent(self) -> float:
        """0 to 100; an empty file is whole."""
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
        found = snapshot_download(
            weights.repo,
            revision=weights.revision,
            allow_patterns=list(weights.files),
            local_files_only=True,
        )
    except (LocalEntryNotFoundError, HFValidationError):
        return None
    return Path(found) if (Path(found) / weights.marker).is_file() else None


def fetch(weights: Weights) -> Iterator[DownloadProgress]:
    """Bring `weights` to disk, small files first, unless they are there; asks no hub if they are.

    Yields a `DownloadProgress` for every piece of at most 64 KiB, and several times a second while it waits for
    the hub or for another process that fetches the same file. Closing the generator stops there.
    However it ends, the next call goes on from the last byte on disk. Every file has the size and
    the hash that the hub's listing says (sha256, or git's sha1 for small ones) before it counts.

    Returns:
        The folder (as the generator's return value). The last `DownloadProgress` has all bytes and files done.

    Raises:
        StudioError: `model-missing` where the hub cannot be reached, `model-gated`, `hub-unknown`
            for a repository or revision, `disk-full` before anything is fetched,
            `cache-read-only`, and `download-failed` for a file that does not come whole.
    """
    if weights.folder:
        return weights.folder
    if (here := find(weights)) and not weights.missing(here):
        return here
    yield DownloadProgress()
    with _in_words(weights):
        listing = yield from _listing(weights)
        shelf = _Shelf(weights, listing)
        shelf.make_room(listing.files)
    total, done = sum(file.size for file in listing.files), 0
    for count, file in enumerate(listing.files):
        with _in_words(weights, file.path, total - done):
            for at in shelf.bring(file):
                yield DownloadProgress(
                    file.path, at, file.size, done + at, total, count, len(listing.files)
                )
        done += file.size
        yield DownloadProgress(
            file.path, file.size, file.size, done, total, count + 1, len(listing.files)
        )
    with _in_words(weights):
        return shelf.finish()


@dataclass(frozen=True)
class _Listing:
    """What the hub has: the commit, the files that are wanted, and the hashes of all files."""

    commit: str
    files: list[RemoteFile]
    hashes: set[str]


def _listing(weights: Weights) -> Iterator[DownloadProgress]:
    """Ask the hub what it has (returned), patiently."""
    from huggingface_hub.errors import HfHubHTTPError

    patience = Backoff()
    while True:
        try:
            return _listed(weights)
        except HfHubHTTPError as error:
            for _ in patience.after(error):
                yield DownloadProgress()


def _listed(weights: Weights) -> _Listing:
    from huggingface_hub import HfApi, constants
    from huggingface_hub.hf_api import RepoFile
    from huggingface_hub.utils import filter_repo_objects

    hub = HfApi()
    info = hub.model_info(
        weights.repo, revision=weights.revision, timeout=constants.HF_HUB_DOWNLOAD_TIMEOUT
    )
    tree = {}
    for entry in hub.list_repo_tree(weights.repo, revision=info.sha, recursive=True):
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


class _Shelf:
    """A repository's folder in the hub's cache: blobs, and links to them for every commit."""

    def __init__(self, weights: Weights, listing: _Listing) -> None:
        from huggingface_hub import constants
        from huggingface_hub.file_download import repo_folder_name

        name = repo_folder_name(repo_id=weights.repo, repo_type="model")
        cache = Path(constants.HF_HUB_CACHE)
        self._weights, self._commit = weights, listing.commit
        self._home, self._locks = cache / name, cache / ".locks" / name
        self._blobs, self._partials = self._home / "blobs", self._home / "partial"
        self._snapshot = self._home / "snapshots" / listing.commit
        for folder in (self._blobs, self._partials, self._snapshot, self._locks):
            folder.mkdir(parents=True, exist_ok=True)
        self._sweep(listing.hashes)

    def make_room(self, files: list[RemoteFile]) -> None:
        """Refuse to begin what the disk cannot hold: `disk-full`, with what is to be freed."""
        lacking = {file.hash: file for file in files if not self._has(file)}.values()
        lacking = [file for file in lacking if size_of(self._blobs / file.hash) != file.size]
        needed = sum(f.size - size_of(self._partials / f.hash) for f in lacking)
        if (short := needed - shutil.disk_usage(self._home).free) > 0:
            raise _full(short)

    def bring(self, file: RemoteFile) -> Iterator[int]:
        """Have `file` in the snapshot. Yields how many of its bytes are on disk."""
        if self._has(file):
            return
        while (lock := _taken(self._locks / f"{file.hash}.lock")) is None:
            yield min(file.size, size_of(self._partials / file.hash))
        try:
            if not self._has(file):
                yield from self._put(file)
        finally:
            lock.release()

    def _put(self, file: RemoteFile) -> Iterator[int]:
        blob, link = self._blobs / file.hash, self._snapshot / file.path
        if not blob.is_file() or size_of(blob) != file.size:
            partial = PartialFile(file, self._partials / file.hash, self._address(file))
            yield from partial.complete()
            partial.settle(blob)
        link.parent.mkdir(parents=True, exist_ok=True)
        link.unlink(missing_ok=True)
        try:
            link.symlink_to(os.path.relpath(blob, link.parent))
        except OSError:  # Windows lets not everybody make links
            os.replace(blob, link)

    def finish(self) -> Path:
        """Name the commit under its revision, now that all is there; returns the folder."""
        if self._weights.revision != self._commit:
            name = self._home / "refs" / self._weights.revision
            name.parent.mkdir(parents=True, exist_ok=True)
            replace_file(name, [self._commit.encode()])
        return self._snapshot

    def _has(self, file: RemoteFile) -> bool:
        link = self._snapshot / file.path
        return link.is_file() and size_of(link) == file.size

    def _address(self, file: RemoteFile) -> str:
        from huggingface_hub import hf_hub_url

        return hf_hub_url(self._weights.repo, file.path, revision=self._commit)

    def _sweep(self, hashes: set[str]) -> None:
        """Remove what was begun of files that the repository no longer has."""
        for old in self._partials.iterdir():
            name = old.name.split(".")[0]
            if name not in hashes and (lock := _taken(self._locks / f"{name}.lock")):
                old.unlink(missing_ok=True)
                lock.release()


@contextmanager
def _in_words(weights: Weights, file: str = "", needed: int = 0) -> Iterator[None]:
    """Tell what the hub, the net or the disk raised, as a `StudioError`."""
    from huggingface_hub.errors import (
        GatedRepoError,
        HFValidationError,
        HTTPError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    told = {"model": weights.title, "command": weights.command}
    try:
        yield
    except GatedRepoError as error:
        raise StudioError("model-gated", **{**told, "model": weights.repo}) from error
    except (RepositoryNotFoundError, RevisionNotFoundError, HFValidationError) as error:
        raise _unknown(weights) from error
    except (HTTPError, OSError, WrongContent) as error:
        status, number = status_of(error), getattr(error, "errno", None)
        if status in (401, 403):
            raise StudioError("model-gated", **{**told, "model": weights.repo}) from error
        if number in (errno.ENOSPC, errno.EDQUOT):
            raise _full(needed) from error
        if number in (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EEXIST):
            raise StudioError("cache-read-only") from error
        if not file:
            raise StudioError("model-missing", size=weights.size, **told) from error
        problem = f"was answered with HTTP {status}" if status else "broke off"
        if isinstance(error, WrongContent):
            problem = str(error)
        raise StudioError("download-failed", file=file, problem=problem, **told) from error


def _unknown(weights: Weights) -> StudioError:
    return StudioError(
        "hub-unknown", repo=weights.repo, revision=weights.revision, command=weights.command
    )


def _full(short: int) -> StudioError:
    return StudioError("disk-full", place="the models", needed=format_bytes(short))


def _taken(path: Path) -> Any:
    """The lock at `path`, or None while another process has it. Any thread may release it.

    It is the one that huggingface_hub takes for the same file.
    """
    from filelock import FileLock, SoftFileLock

    for kind in (FileLock, SoftFileLock):
        lock = kind(path, timeout=PULSE_S, thread_local=False, mode=0o664)
        try:
            lock.acquire()
        except TimeoutError:
            return None
        except NotImplementedError:  # a network disk knows no locks: a file must do
            continue
        return lock
    return None
