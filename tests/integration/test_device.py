"""Device detection, time estimates, ZeroGPU durations, and private files."""

from __future__ import annotations

import json
import os
import random
import stat
import statistics
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT

import backend
from core.errors import StudioError
from core.results import Progress
from models import catalog
from runtime import device, doctor, estimates


def rates(tmp_path, key="cpu|mini"):
    return estimates.Rates(key, tmp_path / "rates.json")


def test_unknown_device_fails_with_device_missing():
    with pytest.raises(StudioError) as caught:
        device.find_device("tpu")
    assert caught.value.code == "device-missing"


def test_thread_count_is_set_and_recorded(monkeypatch):
    monkeypatch.setenv("ACE_THREADS", "1")
    cpu = device.find_device("cpu")
    assert cpu.threads == 1
    assert cpu.used().threads == 1
    assert cpu.dtype in ("float32", "bfloat16")
    assert "float16" not in {cpu.dtype}


def test_bfloat16_only_where_the_processor_computes_it(monkeypatch):
    monkeypatch.setattr(device, "_cpuinfo", lambda: "flags : avx2 avx512f")
    assert device.find_device("cpu").dtype == "float32"
    monkeypatch.setattr(device, "_cpuinfo", lambda: "flags : avx2 amx_bf16 amx_tile")
    assert device.find_device("cpu").dtype == "bfloat16"


class FakeGpu:
    """Stands for torch's module of a GPU."""

    def __init__(self, name, total_gb, capability=(0, 0)):
        self.name, self.total, self.capability = name, int(total_gb * 1e9), capability
        self.emptied = 0

    def is_available(self):
        return True

    def get_device_name(self):
        return self.name

    def get_device_capability(self):
        return self.capability

    def get_device_properties(self, _):
        return SimpleNamespace(total_memory=self.total, driver_version="1.6.3")

    def mem_get_info(self):
        return self.total // 2, self.total

    def empty_cache(self):
        self.emptied += 1


@pytest.fixture
def gpu(monkeypatch):
    """Puts a GPU into this computer: its module's name, torch's build, itself, and the HIP version."""

    def put(kind, build, fake, hip=None):
        real = device.version
        monkeypatch.setattr(device, "version", lambda n: build if n == "torch" else real(n))
        monkeypatch.setattr(device, "_has_driver", lambda asked: asked == kind)
        monkeypatch.setattr(torch, kind, fake)
        monkeypatch.setattr(torch.version, "hip", hip)
        device.device_name.cache_clear()
        return fake

    yield put
    device.device_name.cache_clear()


GPUS = {
    "intel": ("xpu", "2.13.0+xpu", FakeGpu("Intel Arc B580", 12), None, "bfloat16", "Level Zero"),
    "amd": ("cuda", "2.13.0+rocm6.4", FakeGpu("Radeon", 16, (9, 0)), "6.4", "bfloat16", "ROCm 6.4"),
    "old amd": ("cuda", "2.13.0+rocm6.4", FakeGpu("MI", 16, (7, 0)), "6.4", "bfloat16", "ROCm"),
    "ampere": ("cuda", "2.13.0+cu130", FakeGpu("RTX", 24, (8, 6)), None, "bfloat16", "CUDA"),
    "turing": ("cuda", "2.13.0+cu130", FakeGpu("T4", 16, (7, 5)), None, "float32", "CUDA"),
}


@pytest.mark.parametrize("maker", GPUS)
def test_a_gpu_of_any_maker_is_a_device_like_others(gpu, maker):
    kind, build, fake, hip, dtype, driver = GPUS[maker]
    gpu(kind, build, fake, hip)
    found = device.find_device()
    assert (found.kind, found.dtype) == (kind, dtype)
    assert device.find_device(kind) == found
    assert found.used().name == fake.name
    assert device.driver(kind).startswith(driver)
    assert device.memory_gb(kind) == 2 * device.free_gb(kind) == fake.total / 1e9
    before = fake.emptied
    device.free(kind)
    assert fake.emptied == before + 1
    assert device.find_device("cpu").kind == "cpu"


def test_the_plan_and_the_report_of_an_intel_card(gpu):
    gpu("xpu", "2.13.0+xpu", FakeGpu("Intel Arc B580", 12))
    model = catalog.MODELS["xl-sft"]
    studio = backend.Studio(model, device.find_device(), "none")
    assert (studio.setup.plan.precision, studio.setup.plan.offload) == ("bf16", "encoders")
    assert studio.model_info().device == "Intel Arc B580 · bfloat16, encoders offloaded"
    assert "of 12 GB" in studio.model_info().memory
    found = doctor.report(studio.setup)
    assert found["device"]["driver"] == "Level Zero 1.6.3"
    assert found["memory"] == {"total_gb": 12.0, "free_gb": 6.0}
    assert "Keeping the whole model on the device" in [each["what"] for each in found["faster"]]


def test_the_report_names_plan_models_and_what_would_be_faster(command):
    text = command("doctor").stdout
    for words in ("Plan      ", "mini ", "vendor/ace-step-mini", "python app.py fetch xl-sft"):
        assert words in text
    found = json.loads(command("doctor", "--json", "--precision", "bf16").stdout)
    assert found["plan"]["precision"] == "bf16"
    assert found["device"]["dtype"] == "bfloat16"
    assert {"mini", "xl-sft", "0.6B"} <= {model["name"] for model in found["models"]}
    assert found["faster"][0]["what"] == "A GPU"


def test_rates_are_learned_saved_and_separated_by_key(tmp_path):
    store = rates(tmp_path)
    assert store.usual({"Denoising": 10}) is None
    assert store.predict("Denoising", 10) is None
    for seconds in (10, 20, 30):
        store.learn({"Denoising": seconds}, {"Denoising": 10})
    assert store.predict("Denoising", 5) == (5.0, 15.0)
    again = rates(tmp_path)
    assert again.usual({"Denoising": 5}) == pytest.approx(10.0)
    assert rates(tmp_path, "cuda|xl").usual({"Denoising": 5}) is None


def test_damaged_rates_file_is_replaced(tmp_path):
    (tmp_path / "rates.json").write_text("{half")
    store = rates(tmp_path)
    store.learn({"Decoding": 2.0}, {"Decoding": 1.0})
    assert json.loads((tmp_path / "rates.json").read_text()) == {"cpu|mini": {"Decoding": [2.0]}}


@pytest.mark.parametrize(
    ("usual", "guess", "attempt", "expected"),
    [
        (None, 5, 1, 60),
        (None, 100, 1, 100),
        (None, 900, 1, 300),
        (None, 50, 2, 120),
        (None, 200, 2, 300),
        (10.0, 999, 1, 12),
        (10.0, 999, 2, 24),
        (1000.0, 5, 1, 300),
    ],
)
def test_gpu_seconds_by_measured_time_estimate_and_attempt(usual, guess, attempt, expected):
    assert estimates.gpu_seconds(usual, guess, attempt) == expected


def test_learned_gpu_time_is_at_most_1_3_times_the_use_at_the_median(tmp_path):
    """200 random jobs whose stage times vary by 12 % (one sigma) around the true rates."""
    rng, store, ratios = random.Random(4), rates(tmp_path), []
    for n in range(200):
        seconds, rows = rng.uniform(10, 240), rng.choice([16, 27, 54, 100])
        work = {"Reading the words": 1.0, "Denoising": rows * seconds, "Decoding": seconds}
        true = {"Reading the words": 0.3, "Denoising": 0.004, "Decoding": 0.02}
        used = {s: true[s] * work[s] * rng.gauss(1, 0.12) for s in work}
        if n > 5:
            ratios.append(estimates.gpu_seconds(store.usual(work), 60) / sum(used.values()))
        store.learn(used, work)
    assert statistics.median(ratios) <= 1.3
    assert statistics.median(ratios) >= 1.0


class SettableClock:
    """A clock that the test sets."""

    def __init__(self):
        self.at = 0.0

    def __call__(self):
        return self.at


def test_time_left_range_contains_the_true_time_and_is_empty_before_learning(tmp_path):
    work = {"Denoising": 100.0, "Decoding": 50.0}
    timer, store = SettableClock(), rates(tmp_path)
    clock = estimates.TimeLeft(store, work, timer)
    assert clock.tick(Progress(stage="Waiting", step=1)).left_s is None
    assert clock.tick(Progress(stage="Denoising", step=0, steps=10)).left_s is None
    for seconds in (9.0, 11.0):
        store.learn({"Denoising": seconds, "Decoding": seconds / 2}, work)

    rng, inside, total = random.Random(1), 0, 0
    for _ in range(100):
        timer.at = 0.0
        clock = estimates.TimeLeft(store, work, timer)
        step_s, decode_s = rng.uniform(0.92, 1.08), rng.uniform(4.6, 5.4)
        end = 10 * step_s + decode_s
        for i in range(11):
            left = clock.tick(Progress(stage="Denoising", step=i, steps=10)).left_s
            total += 1
            inside += left[0] <= end - timer.at <= left[1]
            timer.at += step_s
    assert inside / total >= 0.9


def test_time_left_falls_during_a_long_step(tmp_path):
    timer, store = SettableClock(), rates(tmp_path)
    clock = estimates.TimeLeft(store, {"Denoising": 1.0}, timer)
    for i in range(4):
        clock.tick(Progress(stage="Denoising", step=i, steps=10))
        timer.at += 2.0
    first = clock.tick().left_s
    timer.at += 1.0
    assert clock.tick().left_s[1] < first[1]


class SpacesError(Exception):
    """Has the attributes of the `gr.Error` that `spaces` raises."""

    def __init__(self, title, message):
        super().__init__(message)
        self.title, self.message = title, message


def test_zerogpu_errors_are_classified():
    assert device.gpu_trouble(SpacesError("ZeroGPU worker error", "GPU task aborted")) == "aborted"
    quota = SpacesError("ZeroGPU quota exceeded", "You have <b>3 s</b> left. <a href='x'>More</a>")
    assert device.gpu_trouble(quota) == "You have 3 s left. More"
    assert device.gpu_trouble(ValueError("GPU task aborted")) is None


def test_private_folder_is_owner_only_and_removed_with_its_process():
    code = "import time; from core import files; print(files.private_folder(), flush=True); time.sleep({})"
    gone = subprocess.run(
        [sys.executable, "-c", code.format(0)], cwd=ROOT, capture_output=True, text=True
    ).stdout.strip()
    assert not os.path.exists(gone)
    killed = subprocess.Popen(
        [sys.executable, "-c", code.format(60)], cwd=ROOT, stdout=subprocess.PIPE, text=True
    )
    left = killed.stdout.readline().strip()
    assert stat.S_IMODE(os.stat(left).st_mode) == 0o700
    killed.kill()
    killed.wait()
    assert os.path.exists(left)
    subprocess.run([sys.executable, "-c", code.format(0)], cwd=ROOT, capture_output=True)
    assert not os.path.exists(left), "the next start removes the files of a killed process"


def test_loopback_is_excluded_from_proxies(monkeypatch):
    monkeypatch.setenv("NO_PROXY", "example.org")
    device.reach_loopback()
    assert os.environ["NO_PROXY"].split(",")[:3] == ["example.org", "127.0.0.1", "localhost"]
    before = os.environ["NO_PROXY"]
    device.reach_loopback()
    assert os.environ["NO_PROXY"] == before
