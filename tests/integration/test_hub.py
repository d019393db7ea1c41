"""Downloads: resuming, checking, errors and concurrency, against a local hub with two origins."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import pytest
from conftest import ROOT, drain
from fake_hub import FakeHub, repository
from filelock import FileLock
from huggingface_hub import close_session, constants, scan_cache_dir, snapshot_download

import app
from core import startup
from core.errors import StudioError
from models import catalog, checkpoints, http_download
from models import hub as downloads
from models.http_download import RemoteFile
from models.hub import DownloadProgress, fetch, find
from models.weights import Weights
from runtime import device

BIG = "model.safetensors"
SIZE = 3_000_000
FILES = {
    "config.json": b"{}",
    "tokenizer/again.json": b"{}",
    "tokenizer/merges.txt": b"",
    "words.safetensors": 40_000,
    BIG: SIZE,
    "evil.py": b"raise SystemExit",
}
TOTAL = 4 + 40_000 + SIZE
BLOCK = 256 * 1024

MODEL = Weights(
    name="model",
    title="The model",
    repo="founders/model",
    revision="main",
    licence="MIT",
    may_sell=True,
    size_bytes=TOTAL,
)


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A hub with one model; this process is online with an empty cache and short retry pauses."""
    device.reach_loopback()
    close_session()
    with repository(tmp_path / "served", MODEL.repo, FILES):
        pass
    with FakeHub(tmp_path / "served", lfs_threshold=1024) as hub:
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "ENDPOINT", hub.url)
        address = hub.url + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", address)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hf" / "hub"))
        monkeypatch.setattr(http_download, "PAUSE_S", 0.01)
        yield hub
    close_session()


class Cache:
    """The model's folder in the cache of the hub."""

    def __init__(self, hub, tmp_path) -> None:
        self.home = tmp_path / "hf" / "hub" / "models--founders--model"
        self._hub = hub

    def file(self, name: str = BIG):
        return self._hub._repo(MODEL.repo).files[name]

    @property
    def partial(self):
        return self.home / "partial" / self.file().sha256

    @property
    def blob(self):
        return self.home / "blobs" / self.file().sha256

    @property
    def lock(self):
        return self.home.parent / ".locks" / self.home.name / f"{self.file().sha256}.lock"

    def begin(self, content: bytes, tag: str = "") -> None:
        """Write `content` as the partial file of a killed process."""
        self.partial.parent.mkdir(parents=True, exist_ok=True)
        self.partial.write_bytes(content)
        if tag:
            self.partial.with_name(f"{self.partial.name}.etag").write_text(tag)

    def source(self) -> bytes:
        return self.file().disk.read_bytes()

    def is_complete(self) -> bool:
        rest = list((self.home / "partial").iterdir())
        return self.blob.read_bytes() == self.source() and not rest


@pytest.fixture
def cache(hub, tmp_path):
    return Cache(hub, tmp_path)


def bodies(hub, name: str = BIG):
    """Log entries of the responses that sent the file, in order."""
    return [r for r in hub.log if r.path.endswith("~/" + name)]


def refused() -> StudioError:
    with pytest.raises(StudioError) as caught:
        drain(fetch(MODEL))
    return caught.value


def until(what, seconds: float = 20.0) -> None:
    end = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < end
        time.sleep(0.005)


PROCESS = """
import sys
sys.path.insert(0, {root!r})
from models import hub
from models.weights import Weights
steps = hub.fetch(Weights(**{weights!r}))
while True:
    try:
        step = next(steps)
    except StopIteration as end:
        print(end.value)
        break
    if step.component == {big!r}:
        print(step.component_done, flush=True)
"""


@pytest.fixture
def process(hub, tmp_path):
    """Start processes that download the model and write their progress in bytes to a file each."""
    started = []
    env = {
        **os.environ,
        "HF_ENDPOINT": hub.url,
        "HF_HOME": str(tmp_path / "hf"),
        "HF_HUB_OFFLINE": "0",
    }
    script = PROCESS.format(root=str(ROOT), weights=vars(MODEL), big=BIG)

    def start():
        output = tmp_path / f"output-{len(started)}.txt"
        with output.open("w") as out:
            run = subprocess.Popen([sys.executable, "-c", script], env=env, stdout=out)
        started.append(run)
        return run, output

    yield start
    for run in started:
        run.kill()
        run.wait()


# --- complete downloads


def test_a_complete_model_is_found_by_the_hubs_own_functions(hub, cache):
    steps = list(fetch(MODEL))
    folder = find(MODEL)
    assert cache.is_complete()
    assert (folder / "tokenizer/merges.txt").read_bytes() == b""
    assert (folder / "tokenizer/again.json").read_bytes() == b"{}"
    assert not (folder / "evil.py").exists()
    first, *rest = steps
    assert first == DownloadProgress()
    assert all(0 <= s.component_done <= s.component_total for s in rest)
    assert all(b.done - a.done <= BLOCK for a, b in pairwise(rest))
    assert all(a.done <= b.done for a, b in pairwise(rest))
    assert {s.total for s in rest} == {TOTAL}
    assert rest[-1] == DownloadProgress(BIG, SIZE, SIZE, TOTAL, TOTAL, 5, 5)
    assert rest[-1].overall_percent == rest[-1].component_percent == 100
    assert str(rest[-1]) == f"{BIG} 100 % of 3 MB · all 100 % of 3 MB · file 5 of 5"

    requests, sent = len(hub.log), hub.bytes_sent("~/")
    assert list(fetch(MODEL)) == []
    assert len(hub.log) == requests, "no request for a complete model"
    patterns = list(MODEL.files)
    offline = snapshot_download(MODEL.repo, allow_patterns=patterns, local_files_only=True)
    assert offline == str(folder)
    assert snapshot_download(MODEL.repo, allow_patterns=patterns) == offline
    assert hub.bytes_sent("~/") == sent
    assert not scan_cache_dir(cache.home.parent).warnings


def test_files_shared_with_another_commit_are_not_downloaded_again(hub, cache):
    drain(fetch(MODEL))
    folder = hub.root / MODEL.repo
    (folder / "config.json").write_bytes(b'{"new": 1}')
    os.utime(folder / "config.json", (2e9, 2e9))
    (cache.home / "refs" / "main").unlink()
    new = drain(fetch(MODEL))
    assert new.name == hub.commit(MODEL.repo)
    assert (new / "config.json").read_bytes() == b'{"new": 1}'
    assert (new / BIG).read_bytes() == cache.source()
    assert len(bodies(hub)) == 1


# --- interrupted downloads


def test_a_download_killed_twice_resumes(hub, cache, process):
    hub.faults.rate = 1_500_000
    kept = []
    for mark in (SIZE // 4, SIZE // 2):
        run, output = process()
        until(lambda mark=mark: cache.partial.exists() and cache.partial.stat().st_size > mark)
        run.send_signal(signal.SIGKILL)
        run.wait()
        kept.append(cache.partial.stat().st_size)
        until(lambda: not hub._live)
        assert int(output.read_text().split()[-1]) <= kept[-1], "reported bytes are on disk"
    hub.faults.rate = 0
    run, _ = process()
    assert run.wait(60) == 0
    assert cache.is_complete()
    first, second, third = bodies(hub)
    assert [first.range, second.range, third.range] == ["", *(f"bytes={n}-" for n in kept)]
    assert second.if_range == third.if_range == f'"{cache.file().sha256}"'
    assert third.sent == SIZE - kept[1]
    again = first.sent + second.sent + third.sent - SIZE
    assert again <= 2 * BLOCK, "at most one block is repeated per kill"


@pytest.mark.parametrize("drops", [1, 4])
def test_a_dropped_connection_resumes_where_it_was(hub, cache, drops):
    hub.faults.drop_after, hub.faults.drops = 500_000, drops
    drain(fetch(MODEL))
    assert cache.is_complete()
    assert len(bodies(hub)) == drops + 1
    assert sum(r.sent for r in bodies(hub)) <= SIZE + BLOCK


def test_a_server_that_always_drops_at_the_same_byte_fails(hub, cache):
    hub.faults.drop_after, hub.faults.drops, hub.faults.no_range = 500_000, -1, True
    error = refused()
    assert error.code == "download-failed"
    assert BIG in error.message
    assert "python app.py fetch model" in error.action
    assert len(bodies(hub)) == http_download.RETRIES + 1


def test_a_server_without_ranges_restarts_the_file(hub, cache):
    hub.faults.drop_after, hub.faults.no_range = 500_000, True
    drain(fetch(MODEL))
    assert cache.is_complete()
    assert [r.status for r in bodies(hub)] == [200, 200]


def test_if_range_sends_the_etag_of_the_server(hub, cache):
    """Content servers send their own ETags, not the hash in the hub's listing."""
    hub.faults.etag, hub.faults.drop_after = "parts-7", 500_000
    drain(fetch(MODEL))
    assert [r.if_range for r in bodies(hub)] == ["", '"parts-7"']
    assert bodies(hub)[1].status == 206
    assert cache.is_complete()


def test_a_changed_file_is_restarted(hub, cache):
    cache.begin(b"something else" * 1000, tag='"what it was called then"')
    drain(fetch(MODEL))
    assert [(r.status, r.sent) for r in bodies(hub)] == [(200, SIZE)]
    assert cache.is_complete()


def test_a_damaged_partial_file_is_restarted_once(hub, cache):
    cache.begin(b"\0" * 1_000_000)
    drain(fetch(MODEL))
    assert [r.sent for r in bodies(hub)] == [SIZE - 1_000_000, SIZE]
    assert cache.is_complete()


def test_a_complete_partial_file_needs_no_request(hub, cache):
    cache.begin(cache.source())
    drain(fetch(MODEL))
    assert not bodies(hub)
    assert cache.is_complete()


def test_closing_stops_within_a_block_and_the_next_call_resumes(hub, cache):
    hub.faults.rate = 1_000_000
    fetching = fetch(MODEL)
    step = next(s for s in fetching if s.component == BIG and s.component_done > 300_000)
    fetching.close()
    before = hub.bytes_sent("~/" + BIG)
    assert cache.partial.stat().st_size == step.component_done
    until(lambda: not hub._live)
    assert hub.bytes_sent("~/" + BIG) - before <= BLOCK
    hub.faults.rate = 0
    drain(fetch(MODEL))
    assert bodies(hub)[1].range == f"bytes={step.component_done}-"
    assert cache.is_complete()


# --- faults of the hub


def test_a_flipped_byte_never_becomes_a_model(hub, cache):
    hub.faults.corrupt = BIG
    error = refused()
    assert error.code == "download-failed"
    assert "other contents" in error.message
    assert not cache.blob.exists()
    assert not cache.partial.exists()
    assert find(MODEL) is None
    hub.faults.corrupt = ""
    drain(fetch(MODEL))
    assert cache.is_complete()


@pytest.mark.parametrize("chunked", [False, True])
def test_a_truncated_file_never_becomes_a_model(hub, cache, chunked):
    hub.faults.truncate, hub.faults.no_length = BIG, chunked
    error = refused()
    assert error.code == "download-failed"
    assert not cache.blob.exists()


def test_retry_after_is_obeyed(hub, cache):
    hub.faults.status, hub.faults.status_times, hub.faults.retry_after = 503, 1, "1"
    hub.faults.status_for = BIG
    steps, began = [], time.monotonic()
    steps += fetch(MODEL)
    assert time.monotonic() - began >= 1
    assert len([s for s in steps if (s.component, s.component_done) == (BIG, 0)]) >= 3
    assert cache.is_complete()


@pytest.mark.parametrize(
    ("retry_after", "attempts"), [("", http_download.RETRIES + 1), ("3600", 1)]
)
def test_a_server_that_stays_busy_fails(hub, cache, retry_after, attempts):
    hub.faults.status, hub.faults.retry_after, hub.faults.status_for = 503, retry_after, BIG
    error = refused()
    assert error.code == "download-failed"
    assert "HTTP 503" in error.message
    assert len([r for r in hub.log if r.status == 503]) == attempts


def test_a_busy_listing_is_retried(hub, cache):
    hub.faults.status, hub.faults.status_times = 503, 2
    hub.faults.status_for = "/api/models"
    drain(fetch(MODEL))
    assert cache.is_complete()


def test_retry_after_may_be_a_date():
    soon = format_datetime(datetime.now(UTC) + timedelta(seconds=30), usegmt=True)

    def pause(header: str) -> float | None:
        answer = SimpleNamespace(headers={"Retry-After": header}, status_code=503)
        return http_download._retry_after(SimpleNamespace(response=answer))

    assert 25 < pause(soon) <= 30
    assert pause("7") == 7
    assert pause("soon") is None
    assert pause("") is None


def test_the_token_stays_with_the_hub(hub, cache, monkeypatch):
    hub.token = "hf_secret"
    monkeypatch.setenv("HF_TOKEN", hub.token)
    hub.faults.drop_after = 500_000
    drain(fetch(MODEL))
    assert bodies(hub)
    assert not any(r.authorized for r in hub.log if r.path.startswith("/cdn/"))
    assert all(r.authorized for r in hub.log if r.path.startswith("/founders/"))


@pytest.mark.parametrize("status", [401, 403])
def test_gated_models_raise_model_gated(hub, cache, status):
    hub.faults.gated = status
    error = refused()
    assert error.code == "model-gated"
    assert "hf auth login" in error.action
    assert not bodies(hub)


@pytest.mark.parametrize("other", [{"repo": "founders/none"}, {"revision": "v9"}, {"repo": "a/-b"}])
def test_unknown_repositories_and_revisions_raise_hub_unknown(hub, other):
    with pytest.raises(StudioError) as caught:
        drain(fetch(replace(MODEL, **other)))
    assert caught.value.code == "hub-unknown"


def test_offline_sends_no_request(hub, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert refused().code == "model-missing"
    assert not hub.log
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    hub.stop()
    assert refused().code == "model-missing"


@pytest.mark.parametrize(
    ("path", "hash_"),
    [
        *(("../x.json", "0" * 40), ("/etc/x.json", "0" * 40), ("a\\..\\x.json", "0" * 40)),
        *(("C:x.json", "0" * 40), ("x.json", "../../x"), ("x.json", "0" * 39)),
    ],
)
def test_a_listing_cannot_name_a_path_outside(path, hash_):
    assert RemoteFile("a/x.json", 1, "0" * 64).is_safe()
    assert not RemoteFile(path, 1, hash_).is_safe()


# --- disk


def test_a_disk_that_is_too_small_fails_before_the_download(hub, cache, monkeypatch):
    cache.begin(cache.source()[:1_000_000])
    free = SimpleNamespace(free=TOTAL - 2 - 1_000_000 - 700_000)
    monkeypatch.setattr(downloads.shutil, "disk_usage", lambda _: free)
    error = refused()
    assert error.code == "disk-full"
    assert "700 kB" in error.action
    assert not bodies(hub, "words.safetensors")
    free.free += 700_000
    drain(fetch(MODEL))
    assert cache.is_complete()


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs Linux's full disk")
def test_a_disk_that_fills_up_meanwhile_raises_disk_full(hub, cache, monkeypatch):
    real, partial = Path.open, cache.partial

    def full(path, *args, **kwargs):
        return real(Path("/dev/full") if path == partial else path, *args, **kwargs)

    monkeypatch.setattr(Path, "open", full)
    error = refused()
    assert error.code == "disk-full"
    assert "3 MB" in error.action


def test_a_read_only_cache_raises_cache_read_only(hub, cache):
    cache.home.parent.parent.mkdir()
    cache.home.parent.write_text("a file where the folder should be")
    error = refused()
    assert error.code == "cache-read-only"
    assert "HF_HOME" in error.action


def test_stale_partial_files_are_removed_unless_locked(hub, cache):
    stale, busy = "1" * 64, "2" * 64
    cache.begin(b"")
    for name in (stale, f"{stale}.etag", busy):
        (cache.home / "partial" / name).write_bytes(b"old")
    cache.lock.parent.mkdir(parents=True)
    with FileLock(cache.lock.with_name(f"{busy}.lock")):
        drain(fetch(MODEL))
    assert [p.name for p in (cache.home / "partial").iterdir()] == [busy]


# --- concurrent processes


def test_two_processes_share_one_download(hub, cache, process):
    hub.faults.rate = 2_000_000
    runs = [process() for _ in range(2)]
    assert [run.wait(60) for run, _ in runs] == [0, 0]
    assert cache.is_complete()
    assert hub.bytes_sent("~/" + BIG) == SIZE
    outputs = [path.read_text().splitlines() for _, path in runs]
    assert outputs[0][-1] == outputs[1][-1], "the same folder"
    assert all(len(set(lines)) > 3 for lines in outputs), "the waiting process reports progress too"


def test_a_waiting_process_resumes_when_the_other_is_killed(hub, cache, process):
    hub.faults.rate = 300_000
    first, _ = process()
    until(lambda: cache.partial.exists() and cache.partial.stat().st_size > 300_000)
    second, output = process()
    until(lambda: output.read_text().count("\n") > 1)
    first.kill()
    first.wait()
    hub.faults.rate = 0
    assert second.wait(60) == 0
    assert cache.is_complete()
    until(lambda: not hub._live)
    assert len(bodies(hub)) == 2
    assert bodies(hub)[1].status == 206


def test_waiting_for_another_process_can_be_cancelled(hub, cache):
    cache.lock.parent.mkdir(parents=True)
    with FileLock(cache.lock):
        fetching = fetch(MODEL)
        step = next(s for s in fetching if s.component == BIG)
        assert step.component_done == 0
        fetching.close()
    assert not bodies(hub)


# --- progress and command line


def test_progress_is_in_megabytes_and_can_be_cancelled(hub, cache):
    fetching = checkpoints.fetch(MODEL)
    events = [next(fetching) for _ in range(3)]
    assert events[0].stage == "Fetching The model"
    assert events[2].stage.startswith("Fetching ")
    assert events[2].steps == TOTAL >> 20
    fetching.close()
    assert drain(checkpoints.fetch(MODEL)) == find(MODEL)
    assert cache.is_complete()


@pytest.mark.parametrize("weights", catalog.BY_NAME.values(), ids=lambda weights: weights.name)
def test_every_shown_command_fetches_its_model(weights, monkeypatch, capsys):
    fetched = []
    monkeypatch.setattr(downloads, "fetch", lambda wanted: iter(fetched.append(wanted) or ()))
    python, program, *arguments = shlex.split(weights.command)
    assert (python, program) == ("python", "app.py")
    assert app.main([*arguments, "--device", "cpu"]) == 0
    assert fetched == [weights]
    assert f"{weights.title} is installed." in capsys.readouterr().err


def test_an_unknown_name_lists_the_known_ones(capsys):
    assert app.main(["fetch", "nobody", "--device", "cpu"]) == startup.USAGE
    message = capsys.readouterr().err
    assert all(name in message for name in ("xl-sft", "4B", "qwen", "htdemucs"))


def test_ctrl_c_leaves_a_download_that_resumes(hub, cache, tmp_path):
    folder = hub.root / MODEL.repo
    (folder / "model_index.json").write_text(json.dumps({}))
    env = {
        **os.environ,
        "HF_ENDPOINT": hub.url,
        "HF_HOME": str(tmp_path / "hf"),
        "HF_HUB_OFFLINE": "0",
    }
    command = [sys.executable, str(ROOT / "app.py"), "fetch", MODEL.repo, "--device", "cpu"]
    hub.faults.rate = 1_500_000
    run = subprocess.Popen(command, env=env, stderr=subprocess.PIPE, text=True)
    until(lambda: cache.partial.exists() and cache.partial.stat().st_size > 200_000, 60)
    run.send_signal(signal.SIGINT)
    log = run.communicate(timeout=60)[1]
    assert run.returncode == startup.INTERRUPTED
    assert f"Stopped. Resume with: python app.py fetch {MODEL.repo}" in log
    assert f"{BIG} " in log
    assert " · file 6 of 6" in log
    assert "Traceback" not in log
    kept = cache.partial.stat().st_size
    hub.faults.rate = 0
    drain(fetch(MODEL))
    assert bodies(hub)[-1].range == f"bytes={kept}-"
    shutil.rmtree(tmp_path / "hf")
