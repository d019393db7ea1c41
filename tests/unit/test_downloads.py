"""Downloads started from the page: progress, rate, stop, resume and failure, with a faked hub."""

from __future__ import annotations

import threading

import pytest
from browsing import wait

from core.errors import StudioError
from models import catalog, hub
from models.hub import DownloadProgress
from runtime.downloads import Downloads

WRITER = catalog.SONGWRITERS["qwen-0.5b"]


@pytest.fixture
def faked(monkeypatch):
    """A hub that sends a byte for every release of the semaphore, and keeps what has arrived."""
    sent, on_disk, began_at = threading.Semaphore(0), [], []

    def fetch(_):
        began_at.append(len(on_disk))
        while len(on_disk) < 10:
            if sent.acquire(timeout=0.01):
                on_disk.append(1)
            yield DownloadProgress("model.safetensors", done=len(on_disk), total=10)

    monkeypatch.setattr(hub, "fetch", fetch)
    return sent, began_at


def test_a_download_reports_stops_and_resumes(faked):
    sent, began_at = faked
    downloads = Downloads()
    assert downloads.state(WRITER.name) is None
    downloads.start(WRITER)
    downloads.start(WRITER)  # already under way
    sent.release(4)
    wait(lambda: downloads.state(WRITER.name).done == 4, 5)
    assert (downloads.state(WRITER.name).state, downloads.state(WRITER.name).total) == (
        "running",
        10,
    )
    wait(lambda: downloads.state(WRITER.name).rate > 0, 5)
    downloads.stop(WRITER.name)
    wait(lambda: downloads.state(WRITER.name).state == "stopped", 5)
    assert downloads.state(WRITER.name).done == 4
    sent.release(6)
    downloads.start(WRITER)
    wait(lambda: downloads.state(WRITER.name).state == "done", 5)
    assert began_at == [0, 4]
    downloads.stop(WRITER.name)
    assert downloads.state(WRITER.name).state == "done"


def test_a_failed_download_says_why_and_can_be_started_again(monkeypatch):
    def fetch(_):
        yield DownloadProgress()
        raise StudioError("disk-full", place="the models", needed="1 GB")

    monkeypatch.setattr(hub, "fetch", fetch)
    downloads = Downloads()
    for _ in range(2):
        downloads.start(WRITER)
        wait(lambda: downloads.state(WRITER.name).state == "failed", 5)
        assert downloads.state(WRITER.name).failed.code == "disk-full"
