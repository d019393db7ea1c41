"""A small fake of the Hugging Face Hub, for tests without a network.

It serves the folders below a root, ``<root>/<owner>/<repo>/...`` (or ``<root>/<repo>/...``),
as model repositories over HTTP on the loopback interface: repository info, the recursive
tree listing, HEAD and GET of files with the Hub's headers, redirects to a pretended CDN for
large files, byte ranges, tokens, and faults that a test can switch on and off while it runs.
The pretended CDN is a second port, so redirects leave the Hub's origin as they do in earnest.

As a library::

    from fake_hub import FakeHub

    with FakeHub(root, lfs_threshold=1024) as hub:
        hub.faults.rate = 2_000_000              # bytes per second and response
        hub.faults.drop_after = 100_000          # cut the next body after so many bytes
        snapshot_download("owner/repo", endpoint=hub.url, cache_dir=tmp)
        assert any(r.range for r in hub.log)

As a program::

    python fake_hub.py ROOT [--port 0] [--rate N] [--drop-after N] [--drops N] [--no-range]
                            [--token T] [--lfs-threshold N]

It prints ``http://127.0.0.1:PORT`` as its first line; give that to the process under test as
HF_ENDPOINT *before* it imports huggingface_hub (the variable is read at import), or pass it as
``endpoint=``. ``GET /__log`` returns the requests so far as JSON, ``POST /__faults`` with a JSON
object sets faults, ``POST /__reset`` clears the log and the faults.

Only the standard library is used. It never listens on anything but 127.0.0.1.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import hashlib
import json
import os
import re
import socket
import sys
import threading
import time
import urllib.parse
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

CHUNK = 16 * 1024


@dataclasses.dataclass
class Faults:
    """Injected faults; every field may be changed while the server runs."""

    rate: float = 0.0  # bytes per second of one response body, 0 = unlimited
    drop_after: int = 0  # cut a body after this many bytes, 0 = never
    drops: int = 1  # how many bodies to cut before serving whole ones again (-1 = always)
    no_range: bool = False  # answer 200 with the whole file although a range was requested
    no_length: bool = False  # chunked body without Content-Length (as for compressed text)
    corrupt: str = ""  # flip one byte in the bodies of paths that contain this text
    truncate: str = ""  # serve one byte too few (with a matching Content-Length) for such paths
    status: int = 0  # answer file requests with this HTTP status
    status_for: str = ""  # ... only for paths that contain this text, or API paths from "/api" on
    status_times: int = -1  # ... so many times, -1 = always
    retry_after: str = ""  # Retry-After header that goes with `status`
    gated: int = 0  # refuse files with this HTTP status, as the Hub does before terms are accepted
    etag: str = ""  # ETag of files on the fake CDN, instead of their sha256
    latency: float = 0.0  # seconds to wait before each response
    xet: bool = False  # announce Xet storage in the headers (there is no Xet service)


@dataclasses.dataclass(frozen=True)
class Request:
    """One request as the server saw it."""

    method: str
    path: str
    range: str
    status: int
    sent: int  # bytes of the body that were written
    authorized: bool
    if_range: str = ""


@dataclasses.dataclass(frozen=True)
class _File:
    path: str
    disk: Path
    size: int
    oid: str  # the git blob id
    sha256: str
    lfs: bool

    @property
    def etag(self) -> str:
        return self.sha256 if self.lfs else self.oid


class _Repo:
    """A folder served as a repository with one commit."""

    def __init__(self, folder: Path, lfs_threshold: int):
        self.files: dict[str, _File] = {}
        commit = hashlib.sha1()
        for disk in sorted(p for p in folder.rglob("*") if p.is_file()):
            name = disk.relative_to(folder).as_posix()
            size = disk.stat().st_size
            blob, sha = hashlib.sha1(b"blob %d\0" % size), hashlib.sha256()
            with disk.open("rb") as f:
                while part := f.read(1 << 20):
                    blob.update(part)
                    sha.update(part)
            entry = _File(
                name, disk, size, blob.hexdigest(), sha.hexdigest(), size >= lfs_threshold
            )
            self.files[name] = entry
            commit.update(f"{name} {entry.oid}\n".encode())
        self.commit = commit.hexdigest()


class _Server(ThreadingHTTPServer):
    """Logs no error for clients that were killed."""

    def handle_error(self, request: object, client_address: object) -> None:
        if not isinstance(sys.exception(), ConnectionError):
            super().handle_error(request, client_address)


class FakeHub:
    """The server; use it as a context manager, or call start() and stop()."""

    def __init__(
        self,
        root: str | os.PathLike[str],
        *,
        port: int = 0,
        lfs_threshold: int = 1 << 20,
        token: str | None = None,
        refs: tuple[str, ...] = ("main",),
        faults: Faults | None = None,
    ):
        self.root = Path(root)
        self.lfs_threshold = lfs_threshold
        self.token = token
        self.refs = refs
        self.faults = faults or Faults()
        self.log: list[Request] = []
        self._repos: dict[str, tuple[float, _Repo]] = {}
        self._live: dict[int, tuple[str, int]] = {}  # bodies being written: path and bytes so far
        self._lock = threading.Lock()
        # Two origins, because huggingface_hub follows a redirect only while it stays on the Hub's own
        # origin (host and port) and reads the file's facts off a redirect that leaves it.
        handler = self._handler()
        self._servers = [_Server(("127.0.0.1", p), handler) for p in (port, 0)]

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._servers[0].server_address[1]}"

    @property
    def cdn_url(self) -> str:
        return f"http://127.0.0.1:{self._servers[1].server_address[1]}"

    def start(self) -> FakeHub:
        for server in self._servers:
            server.daemon_threads = True
            threading.Thread(
                target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True
            ).start()
        return self

    def stop(self) -> None:
        for server in self._servers:
            server.shutdown()
            server.server_close()

    def __enter__(self) -> FakeHub:
        return self.start()

    def __exit__(self, *exc: object) -> None:
        self.stop()

    def reset(self) -> None:
        """Clear the log and all faults."""
        with self._lock:
            self.log.clear()
            self.faults = Faults()

    def commit(self, repo_id: str) -> str:
        repo = self._repo(repo_id)
        assert repo is not None, repo_id
        return repo.commit

    def bytes_sent(self, path_part: str = "") -> int:
        """Body bytes written so far for matching paths, unfinished responses included."""
        with self._lock:
            done = [(r.path, r.sent) for r in self.log if r.method == "GET"]
            return sum(n for path, n in (*done, *self._live.values()) if path_part in path)

    def _repo(self, repo_id: str) -> _Repo | None:
        folder = (self.root / repo_id).resolve()
        if not folder.is_dir() or self.root.resolve() not in folder.parents:
            return None
        stamp = max((p.stat().st_mtime for p in folder.rglob("*")), default=0.0)
        with self._lock:
            entry = self._repos.get(repo_id)
            if entry is None or entry[0] != stamp:
                self._repos[repo_id] = entry = (stamp, _Repo(folder, self.lfs_threshold))
        return entry[1]

    def _take(self, field: str) -> bool:
        """Consume one occurrence of a counted fault; whether one was left."""
        with self._lock:
            left = getattr(self.faults, field)
            if left == 0:
                return False
            if left > 0:
                setattr(self.faults, field, left - 1)
            return True

    def _handler(hub) -> type[BaseHTTPRequestHandler]:
        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            sent = 0
            code = 0

            def log_message(self, *args: object) -> None:
                pass

            def do_HEAD(self) -> None:
                self._serve()

            def do_GET(self) -> None:
                self._serve()

            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
                path = self.path.split("?")[0]
                if path == "/__reset":
                    hub.reset()
                elif path == "/__faults":
                    known = {f.name for f in dataclasses.fields(Faults)}
                    wanted = json.loads(body or b"{}")
                    if unknown := set(wanted) - known:
                        return self._json(400, {"error": f"no such fault: {sorted(unknown)}"})
                    for name, value in wanted.items():
                        setattr(hub.faults, name, value)
                elif m := re.fullmatch(r"/api/models/(.+)/paths-info/([^/]+)", path):
                    return self._paths_info(m[1], m[2], body)
                else:
                    return self._json(404, {"error": "not found"})
                self._json(200, dataclasses.asdict(hub.faults))

            # -- responses ---------------------------------------------------------------

            def _serve(self) -> None:
                self.sent = self.code = 0
                if hub.faults.latency:
                    time.sleep(hub.faults.latency)
                try:
                    self._route()
                except (BrokenPipeError, ConnectionResetError):
                    self.close_connection = True
                finally:
                    if not self.path.startswith("/__"):
                        with hub._lock:
                            hub._live.pop(id(self), None)
                            hub.log.append(
                                Request(
                                    self.command,
                                    urllib.parse.unquote(self.path),
                                    self.headers.get("Range", ""),
                                    self.code,
                                    self.sent,
                                    bool(self.headers.get("Authorization")),
                                    self.headers.get("If-Range", ""),
                                )
                            )

            def _route(self) -> None:
                path, _, query = self.path.partition("?")
                path = urllib.parse.unquote(path)
                if path == "/__log":
                    return self._json(200, [dataclasses.asdict(r) for r in list(hub.log)])
                if m := re.fullmatch(r"/cdn/(.+?)/~/(.+)", path):
                    repo = hub._repo(m[1])  # signed address: no token needed, as on the real CDN
                    entry = repo.files.get(m[2]) if repo else None
                    return (
                        self._body(entry, redirected=True)
                        if entry
                        else self._json(404, {"error": "no such blob"})
                    )
                if hub.token and self.headers.get("Authorization") != f"Bearer {hub.token}":
                    return self._error(401, "RepoNotFound", "Invalid username or password.")
                part = hub.faults.status_for
                if part.startswith("/api") and path.startswith(part) and hub._take("status_times"):
                    return self._refuse()
                if m := re.fullmatch(r"/api/models/(.+?)(?:/revision/([^/]+))?", path):
                    if t := re.fullmatch(r"(.+)/tree/([^/]+)(?:/.*)?", m[1]):
                        return self._tree(t[1], t[2], urllib.parse.parse_qs(query))
                    return self._info(m[1], m[2] or "main")
                if m := re.fullmatch(r"/(.+?)/resolve/([^/]+)/(.+)", path):
                    return self._resolve(m[1], m[2], m[3])
                self._json(404, {"error": "not found"})

            def _find(self, repo_id: str, revision: str) -> _Repo | None:
                repo = hub._repo(repo_id)
                if repo is None:
                    self._error(
                        401 if hub.token is None else 404, "RepoNotFound", "Repository not found"
                    )
                elif revision not in (*hub.refs, repo.commit):
                    self._error(404, "RevisionNotFound", f"Invalid rev id: {revision}")
                else:
                    return repo
                return None

            def _info(self, repo_id: str, revision: str) -> None:
                if repo := self._find(repo_id, revision):
                    self._json(
                        200,
                        {
                            "_id": "0" * 24,
                            "id": repo_id,
                            "modelId": repo_id,
                            "sha": repo.commit,
                            "private": False,
                            "gated": False,
                            "disabled": False,
                            "tags": [],
                            "downloads": 0,
                            "likes": 0,
                            "lastModified": "2025-01-01T00:00:00.000Z",
                            "createdAt": "2025-01-01T00:00:00.000Z",
                            "siblings": [{"rfilename": name} for name in repo.files],
                        },
                        {"X-Repo-Commit": repo.commit},
                    )

            def _entry(self, f: _File) -> dict[str, object]:
                entry: dict[str, object] = {
                    "type": "file",
                    "oid": f.oid,
                    "size": f.size,
                    "path": f.path,
                }
                if f.lfs:
                    entry["lfs"] = {"oid": f.sha256, "size": f.size, "pointerSize": 134}
                if hub.faults.xet and f.lfs:
                    entry["xetHash"] = f.sha256
                return entry

            def _tree(self, repo_id: str, revision: str, query: dict[str, list[str]]) -> None:
                if not (repo := self._find(repo_id, revision)):
                    return
                recursive = query.get("recursive", ["false"])[0].lower() in ("true", "1")
                folders = {str(Path(n).parent.as_posix()) for n in repo.files if "/" in n}
                rows: list[dict[str, object]] = [
                    {"type": "directory", "oid": "0" * 40, "size": 0, "path": d}
                    for d in sorted(folders)
                    if recursive or "/" not in d
                ]
                rows += [
                    self._entry(f) for f in repo.files.values() if recursive or "/" not in f.path
                ]
                self._json(200, rows, {"X-Repo-Commit": repo.commit})

            def _paths_info(self, repo_id: str, revision: str, body: bytes) -> None:
                if repo := self._find(repo_id, revision):
                    try:
                        wanted = json.loads(body)["paths"]
                    except ValueError:
                        wanted = urllib.parse.parse_qs(body.decode()).get("paths", [])
                    self._json(200, [self._entry(repo.files[p]) for p in wanted if p in repo.files])

            def _resolve(self, repo_id: str, revision: str, name: str) -> None:
                f = hub.faults
                if f.status and f.status_for in name and hub._take("status_times"):
                    return self._refuse()
                if f.gated:
                    return self._error(f.gated, "GatedRepo", "Access is restricted")
                if not (repo := self._find(repo_id, revision)):
                    return None
                entry = repo.files.get(name)
                if entry is None:
                    return self._error(
                        404, "EntryNotFound", "Entry not found", {"X-Repo-Commit": repo.commit}
                    )
                if not entry.lfs:
                    return self._body(entry, extra={"X-Repo-Commit": repo.commit})
                headers = {
                    "X-Repo-Commit": repo.commit,
                    "X-Linked-ETag": f'"{entry.sha256}"',
                    "X-Linked-Size": str(entry.size),
                    "ETag": f'"{entry.oid}"',
                    "Location": f"{hub.cdn_url}/cdn/{repo_id}/~/{urllib.parse.quote(name)}",
                }
                if f.xet:
                    headers["X-Xet-Hash"] = entry.sha256
                    headers["Link"] = (
                        f'<{hub.url}/api/models/{repo_id}/xet-read-token/{repo.commit}>; rel="xet-auth"'
                    )
                self._send(302, b"", headers)

            def _body(
                self, entry: _File, *, redirected: bool = False, extra: dict[str, str] | None = None
            ) -> None:
                f = hub.faults
                etag = f.etag if f.etag and redirected else entry.etag
                size = entry.size - (
                    1 if f.truncate and f.truncate in entry.path and entry.size else 0
                )
                headers = {
                    "ETag": f'"{etag}"',
                    "Accept-Ranges": "bytes",
                    "Content-Type": "application/octet-stream",
                    **(extra or {}),
                }
                if redirected:
                    headers["Content-Disposition"] = f'inline; filename="{entry.disk.name}";'
                first, last, status = 0, size - 1, 200
                requested = self.headers.get("Range")
                stale = self.headers.get("If-Range") not in (None, f'"{etag}"')
                if requested and not f.no_range and not stale:
                    m = re.fullmatch(r"bytes=(\d*)-(\d*)", requested.strip())
                    if m and (m[1] or m[2]):
                        first = int(m[1]) if m[1] else max(0, size - int(m[2]))
                        last = min(int(m[2]), size - 1) if m[1] and m[2] else size - 1
                        if first > last:
                            return self._send(
                                416, b"", {**headers, "Content-Range": f"bytes */{size}"}
                            )
                        status = 206
                        headers["Content-Range"] = f"bytes {first}-{last}/{size}"
                length = last - first + 1
                chunked = f.no_length and self.command == "GET"
                if chunked:
                    headers["Transfer-Encoding"] = "chunked"
                else:
                    headers["Content-Length"] = str(length)
                self._head(status, headers)
                if self.command == "HEAD":
                    return None
                cut = (
                    f.drop_after
                    if f.drop_after and length > f.drop_after and hub._take("drops")
                    else None
                )
                self._stream(entry, first, length, cut, chunked)

            def _stream(
                self, entry: _File, first: int, length: int, cut: int | None, chunked: bool
            ) -> None:
                bad = hub.faults.corrupt and hub.faults.corrupt in entry.path
                started = time.monotonic()
                with entry.disk.open("rb") as src:
                    src.seek(first)
                    while self.sent < length:
                        part = src.read(min(CHUNK, length - self.sent))
                        if cut is not None and self.sent + len(part) > cut:
                            part = part[: cut - self.sent]
                        if (
                            bad
                            and part
                            and first + self.sent <= entry.size // 2 < first + self.sent + len(part)
                        ):
                            at = entry.size // 2 - first - self.sent
                            part = part[:at] + bytes([part[at] ^ 0xFF]) + part[at + 1 :]
                        if part:
                            self.wfile.write(
                                b"%x\r\n%s\r\n" % (len(part), part) if chunked else part
                            )
                            self.sent += len(part)
                            with hub._lock:
                                hub._live[id(self)] = (self.path, self.sent)
                        if cut is not None and self.sent >= cut:
                            self.wfile.flush()
                            self.close_connection = True
                            with contextlib.suppress(OSError):
                                self.connection.shutdown(socket.SHUT_RDWR)
                            return
                        if hub.faults.rate:
                            ahead = self.sent / hub.faults.rate - (time.monotonic() - started)
                            if ahead > 0:
                                time.sleep(ahead)
                if chunked:
                    self.wfile.write(b"0\r\n\r\n")

            def _refuse(self) -> None:
                f = hub.faults
                headers = {"Retry-After": f.retry_after} if f.retry_after else {}
                self._error(f.status, "", "fault injected", headers)

            # -- plumbing ----------------------------------------------------------------

            def _head(self, status: int, headers: dict[str, str]) -> None:
                self.code = status
                self.send_response(status)
                for name, value in headers.items():
                    self.send_header(name, value)
                self.end_headers()

            def _send(self, status: int, body: bytes, headers: dict[str, str]) -> None:
                self._head(status, {"Content-Length": str(len(body)), **headers})
                if self.command != "HEAD":
                    self.wfile.write(body)
                    self.sent += len(body)

            def _json(
                self, status: int, value: object, headers: dict[str, str] | None = None
            ) -> None:
                self._send(
                    status,
                    json.dumps(value).encode(),
                    {"Content-Type": "application/json", **(headers or {})},
                )

            def _error(
                self, status: int, code: str, message: str, headers: dict[str, str] | None = None
            ) -> None:
                more = {"X-Error-Message": message, **(headers or {})}
                if code:
                    more["X-Error-Code"] = code
                self._json(status, {"error": message}, more)

        return Handler


@contextlib.contextmanager
def repository(root: Path, repo_id: str, files: dict[str, bytes | int]) -> Iterator[Path]:
    """Write a repository below root; an int stands for that many reproducible bytes."""
    folder = root / repo_id
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if isinstance(content, int):
            block = hashlib.shake_256(name.encode()).digest(1 << 16)
            with path.open("wb") as f:
                for start in range(0, content, len(block)):
                    f.write(block[: content - start])
        else:
            path.write_bytes(content)
    yield folder


def main(argv: list[str] | None = None) -> int:
    p = argparse.ArgumentParser(
        description="serve folders as Hugging Face model repositories on 127.0.0.1"
    )
    p.add_argument("root")
    p.add_argument("--port", type=int, default=0)
    p.add_argument("--lfs-threshold", type=int, default=1 << 20)
    p.add_argument("--token")
    p.add_argument("--rate", type=float, default=0.0)
    p.add_argument("--drop-after", type=int, default=0)
    p.add_argument("--drops", type=int, default=1)
    p.add_argument("--no-range", action="store_true")
    a = p.parse_args(argv)
    faults = Faults(rate=a.rate, drop_after=a.drop_after, drops=a.drops, no_range=a.no_range)
    hub = FakeHub(a.root, port=a.port, lfs_threshold=a.lfs_threshold, token=a.token, faults=faults)
    print(hub.url, flush=True)
    with hub, contextlib.suppress(KeyboardInterrupt):
        while True:
            time.sleep(3600)
    return 0


if __name__ == "__main__":
    sys.exit(main())
