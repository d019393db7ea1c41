"""Benchmarks of the studio: `make bench`, and `python bench.py --gpu` for one GPU.

Seconds depend on the machine and its load; compare the ratios within one run. The GPU's part needs
no checkpoint and no network, and no package but torch, transformers, diffusers and pydantic.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from core.music import INSTRUMENTAL
from core.requests import Generate
from models import acestep, catalog, checkpoints, sampler, vae

ROOT = Path(__file__).parent


def drain(steps: Iterator[Any]) -> Any:
    """Run a generator to its end; its return value."""
    while True:
        try:
            next(steps)
        except StopIteration as end:
            return end.value


def median_s(work: Callable[[], Any], times: int) -> float:
    """Median seconds of `work` over `times` runs, after one warm-up run."""
    work()
    durations = []
    for _ in range(times):
        began = time.perf_counter()
        work()
        durations.append(time.perf_counter() - began)
    return statistics.median(durations)


def engine_against_stock(seconds: float, times: int) -> list[tuple[str, str]]:
    """Compare our engine with diffusers' pipeline: same weights, float32, settings and noise."""
    import torch
    from diffusers import AceStepPipeline

    from runtime import device

    cpu = device.find_device("cpu")
    device.set_threads(cpu)
    model = catalog.choose("mini")
    engine = drain(acestep.Engine.load(model, model.folder, "cpu", "float32"))
    fast = drain(acestep.Engine.load(model, model.folder, "cpu", cpu.dtype))
    stock = AceStepPipeline.from_pretrained(model.folder, dtype=torch.float32)
    stock.set_progress_bar_config(disable=True)
    song = Generate.of(
        {
            "prompt": "warm lofi piano",
            "instrumental": True,
            "duration_s": seconds,
            "inference_steps": model.steps,
            "guidance_scale": model.guidance,
            "shift": model.shift,
            "seed": 7,
        }
    )
    noise, _ = sampler.draw_noise(7, acestep.frames_for(seconds), engine.channels)
    arguments = {
        "prompt": [song.prompt],
        "lyrics": [INSTRUMENTAL],
        "vocal_language": "unknown",
        "audio_duration": seconds,
        "num_inference_steps": song.inference_steps,
        "guidance_scale": song.guidance_scale,
        "shift": song.shift,
        "latents": noise,
    }
    with torch.inference_mode():
        conditions, _ = engine.conditions(song)
        fast_conditions, _ = fast.conditions(song)
        latents = drain(engine.denoise(conditions, song))
        ours = {
            "conditions": median_s(lambda: engine.conditions(song), times),
            "denoise": median_s(lambda: drain(engine.denoise(conditions, song)), times),
            "decode": median_s(lambda: drain(vae.decode(engine.pipe.vae, latents)), times),
        }
        fast_s = median_s(lambda: drain(fast.denoise(fast_conditions, song)), times)
        stock_s = median_s(lambda: stock(**arguments, output_type="latent"), times)
        stock_decode_s = median_s(lambda: stock.vae.decode(latents.transpose(1, 2)), times)
    total = sum(ours.values())
    rows = [(f"{name} of {seconds:g} s", f"{taken:.2f} s") for name, taken in ours.items()]
    denoise = ours["conditions"] + ours["denoise"]
    return [
        *rows,
        ("conditions and denoising, ours / stock", f"{denoise / stock_s:.2f}"),
        ("decoding, ours / stock", f"{ours['decode'] / stock_decode_s:.2f}"),
        ("all, ours / stock", f"{total / (stock_s + stock_decode_s):.2f}"),
        (f"denoising in {cpu.dtype} / float32", f"{fast_s / ours['denoise']:.2f}"),
        ("seconds of sound a second", f"{seconds / total:.1f}"),
    ]


def imports() -> list[tuple[str, str]]:
    """Import time of each entry module in a new process, and whether it imports torch."""
    rows = []
    code = (
        "import time, sys; t = time.perf_counter(); import {0}; "
        "print(round(time.perf_counter() - t, 2), 'torch' in sys.modules)"
    )
    for module in ("backend", "web.page", "app", "torch"):
        output = subprocess.run(
            [sys.executable, "-c", code.format(module)], cwd=ROOT, capture_output=True, text=True
        ).stdout.split()
        rows.append(
            (f"import {module}", f"{output[0]} s, torch {'in' if output[1] == 'True' else 'out'}")
        )
    return rows


def start() -> list[tuple[str, str]]:
    """Seconds from process start to the page, and to the first song's file."""
    from core import files

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    began = time.perf_counter()
    page = subprocess.Popen(
        [sys.executable, "app.py", "--model", "mini", "--port", str(port)],
        cwd=ROOT,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
    )
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        while page.poll() is None and time.perf_counter() - began < 120:
            with contextlib.suppress(OSError):
                opener.open(f"http://127.0.0.1:{port}/", timeout=5).read()
                break
            time.sleep(0.05)
        served = time.perf_counter() - began
    finally:
        page.terminate()
        page.wait()
    out = files.private_folder() / "bench.wav"
    began = time.perf_counter()
    output = subprocess.run(
        [
            sys.executable,
            "app.py",
            "generate",
            "--model",
            "mini",
            "--prompt",
            "lofi",
            "--duration-s",
            "30",
            "--out",
            str(out),
            "--json",
        ],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
    )
    finished = time.perf_counter() - began
    stages = json.loads(output.stdout)["timings_s"]
    stages_text = ", ".join(f"{re.sub(' .*', '', k).lower()} {v:.1f}" for k, v in stages.items())
    return [
        ("process start to page", f"{served:.1f} s"),
        ("process start to a 30 s song on disk", f"{finished:.1f} s ({stages_text})"),
    ]


def daemon(seconds: float) -> list[tuple[str, str]]:
    """Latencies of the daemon while it runs the embedded model."""
    began, notes = time.monotonic(), []
    with tempfile.TemporaryDirectory() as folder:
        process = subprocess.Popen(
            [sys.executable, "app.py", "daemon", "--model", "mini", "--device", "cpu"],
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env={
                **os.environ,
                "LOFI_CACHE_PATH": folder,
                "XDG_CACHE_HOME": folder,  # without measured rates of earlier songs
                "HF_HUB_OFFLINE": "1",
            },
        )

        def read() -> dict[str, Any]:
            message = json.loads(process.stdout.readline())
            if "method" in message:
                notes.append((time.monotonic(), message["method"], message["params"]))
            return message

        def call(method: str, **params: Any) -> dict[str, Any]:
            request = {"jsonrpc": "2.0", "id": 1, "method": method, "params": params}
            process.stdin.write(json.dumps(request).encode() + b"\n")
            process.stdin.flush()
            while "result" not in (message := read()):
                pass
            return message["result"]

        def song(seed: int) -> list[float]:
            """Seconds per ping while a song is generated, loading excluded."""
            notes.clear()
            call("generate", prompt="warm lofi piano", duration_sec=round(seconds), seed=seed)
            pings = []
            while not notes or notes[-1][1] != "generation_complete":
                sent = time.monotonic()
                call("ping")
                pings += [time.monotonic() - sent] if notes else []
                time.sleep(0.01)
            return pings

        call("ping")
        answered = time.monotonic() - began
        song(1)
        started = time.monotonic()
        pings = song(2)
        ended = notes[-1][0]
        off = max(
            abs(at + params["eta_sec"] - ended) / (ended - started)
            for at, _, params in notes
            if params.get("percent", 0) >= 10
        )
        track = call("generate", prompt="long", duration_sec=round(seconds), inference_steps=200)
        while read().get("method") != "generation_progress":
            pass
        sent = time.monotonic()
        call("cancel", track_id=track["track_id"])
        while notes[-1][1] != "generation_cancelled":
            read()
        cancelled = notes[-1][0] - sent
        call("generate", prompt="long", duration_sec=round(seconds), inference_steps=200)
        while read().get("method") != "generation_progress":
            pass
        closed = time.monotonic()
        process.stdin.close()
        process.wait()
        exited = time.monotonic() - closed
        process.stdout.close()
    middle, most = 1000 * statistics.median(pings), 1000 * max(pings)
    return [
        ("process start to the first answer", f"{answered:.1f} s"),
        ("ping while a song is made", f"{middle:.1f} ms, {most:.0f} ms at most"),
        ("largest error of the time left, after a tenth", f"{100 * off:.0f} % of the whole"),
        ("cancel to its notification", f"{1000 * cancelled:.0f} ms"),
        ("end of the input to end of the process", f"{1000 * exited:.0f} ms"),
    ]


def planner_against_generate(times: int) -> list[tuple[str, str]]:
    """Compare guided audio-code decoding with transformers' on the embedded planner's weights."""
    import torch
    from transformers import UnbatchedClassifierFreeGuidanceLogitsProcessor as Guide

    from models import plan_format
    from models.planner import Planner
    from models.token_sampling import SamplingParams

    folder = catalog.choose("mini").folder
    ours = drain(Planner.load(folder / "planner", checkpoints.codebook(folder), "cpu", "float32"))
    plan, codes = plan_format.Plan(bpm=100, keyscale="A minor"), 150
    prompt = ours.vocabulary.encode(plan_format.codes_prompt("warm lofi piano", INSTRUMENTAL, plan))
    unconditional = torch.tensor([ours.vocabulary.encode(plan_format.unconditional_prompt(""))])

    def ours_once() -> None:
        drain(
            ours.compose(
                "warm lofi piano",
                INSTRUMENTAL,
                plan,
                codes / 5,
                SamplingParams(0.85, 0.9, 0),
                [1],
                2.0,
            )
        )

    def stock_once() -> None:
        torch.manual_seed(1)
        ours.model.generate(
            torch.tensor([prompt]),
            do_sample=True,
            temperature=0.85,
            top_p=0.9,
            top_k=0,
            min_new_tokens=codes,
            max_new_tokens=codes,
            pad_token_id=0,
            logits_processor=[Guide(2.0, ours.model, unconditional_ids=unconditional)],
        )

    spent = {}
    for name, work in (("ours", ours_once), ("stock", stock_once)):
        seconds = []
        for _ in range(times):
            began = time.process_time()
            work()
            seconds.append(time.process_time() - began)
        spent[name] = statistics.median(seconds) * 1000 / codes
    return [
        ("guided code, ours / transformers.generate", f"{spent['ours'] / spent['stock']:.2f}"),
        ("CPU milliseconds a code", f"{spent['ours']:.1f} against {spent['stock']:.1f}"),
    ]


def on_gpu(tiny: bool, budget_s: float) -> None:
    """Measure one GPU; the table is also written to gpu_bench.tsv in the folder that OUT names."""
    import torch

    from models import gpu_bench

    if not tiny and not torch.cuda.is_available():
        raise SystemExit("torch finds no CUDA device here. --tiny runs the same lines on a CPU.")
    rows = gpu_bench.run(tiny, budget_s)
    if folder := os.environ.get("OUT"):
        text = "".join("\t".join(row) + "\n" for row in rows)
        (Path(folder) / "gpu_bench.tsv").write_text(text, "utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=30.0, help="length of the song")
    parser.add_argument("--times", type=int, default=3, help="runs of which the median is shown")
    parser.add_argument("--gpu", action="store_true", help="measure one GPU, on random weights")
    parser.add_argument("--budget", type=float, default=450, help="seconds that --gpu may take")
    parser.add_argument("--tiny", action="store_true", help="run what --gpu does, small, on a CPU")
    args = parser.parse_args()
    if args.gpu or args.tiny:
        on_gpu(args.tiny, args.budget)
        return
    for title, rows in (
        ("imports", imports()),
        ("start", start()),
        ("engine", engine_against_stock(args.seconds, args.times)),
        ("planner", planner_against_generate(args.times)),
        ("daemon", daemon(args.seconds)),
    ):
        print(f"\n{title}")
        for name, value in rows:
            print(f"  {name:<44} {value}")


if __name__ == "__main__":
    main()
