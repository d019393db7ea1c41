"""What a song costs on one GPU, part by part, on random weights of real size: `bench.py --gpu`.

Sections run in order of worth, and one that no longer fits into the budget is left out by name. One
that fails says so and does not cost the others their turn.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, NamedTuple

from core.requests import Generate
from models import acestep, catalog, cuda_graph, random_weights, vae
from models.acestep import Engine
from models.code_decoder import CodeDecoder, StaticCodeDecoder
from models.fast_transformer import FastTransformer
from models.planner import Planner
from models.qwen3 import KeyValueCache
from models.step_counts import count_launches, longest_kernel, step_flops
from models.token_sampling import SamplingParams, uniform_draws

if TYPE_CHECKING:
    import torch

SAMPLING = SamplingParams(0.85, 0.9, 0)
PROMPT_TOKENS, NEGATIVE_TOKENS = 300, 60
PLANNER_GUIDANCE = 2.0
TAKES = 4


@dataclass(frozen=True)
class Scale:
    """How large a run is. The first of `seconds` is measured first and used where one is enough."""

    device: str
    dtype: str
    seconds: tuple[int, ...]
    steps: int
    codes: int
    tiny: bool
    compiler: str = "inductor"


FULL = Scale("cuda", "bfloat16", (120, 30, 60, 240), 50, 100, tiny=False)
TINY = Scale("cpu", "float32", (5, 6), 2, 8, tiny=True, compiler="eager")


class Cost(NamedTuple):
    """Median milliseconds, and the peak of memory over what was held before, in GB."""

    ms: float
    peak_gb: float

    def __str__(self) -> str:
        return f"{self.ms:.2f} ms" + (f", {self.peak_gb:.2f} GB over" if self.peak_gb else "")


@dataclass
class Report:
    """The table, printed line by line as it grows."""

    budget_s: float
    rows: list[tuple[str, str, str]] = field(default_factory=list)
    began: float = field(default_factory=time.monotonic)

    def add(self, section: str, what: str, value: str) -> None:
        """Print and keep one line."""
        self.rows.append((section, what, value))
        elapsed = time.monotonic() - self.began
        print(f"{elapsed:5.0f} s  {section:9} {what:48} {value}", flush=True)

    @contextmanager
    def attempt(self, section: str) -> Iterator[None]:
        """Report what fails inside."""
        try:
            yield
        except Exception as error:  # noqa: BLE001 - the other sections still count
            self.add(section, "FAILED", f"{type(error).__name__}: {str(error)[:300]}")

    def has_time(self, section: str, needs_s: float) -> bool:
        """Whether `needs_s` are left; reports that the section is left out if not."""
        left = max(0.0, self.budget_s - (time.monotonic() - self.began))
        if left < needs_s:
            self.add(section, "left out", f"needs {needs_s:.0f} s, {left:.0f} s are left")
        return left >= needs_s


class Bench:
    """All measurements of one run."""

    def __init__(self, scale: Scale, report: Report) -> None:
        import torch

        self.scale, self.report, self.cuda = scale, report, scale.device == "cuda"
        self.dtype = getattr(torch, scale.dtype)
        self.peak_tflops = self.bandwidth = 0.0
        self.stock_ms: dict[int, float] = {}
        self.eager_codes: torch.Tensor | None = None

    def run(self) -> None:
        """Every section that fits into the budget, the most telling first."""
        import torch

        sections: list[tuple[str, float, Callable[[], None]]] = [
            ("machine", 5, self.machine),
            ("attention", 10, self.attention),
            ("launches", 10, self.launches),
            ("step", 30, self.steps_of_diffusers),
            ("step", 30, self.steps_prepared),
            ("step", 20, self.steps_captured),
            ("planner", 40, self.planner_generate),
            ("planner", 30, self.planner_decoders),
            ("step", 75, self.steps_compiled),
            ("planner", 60, self.planner_compiled),
            ("song", 20, self.songs),
            ("takes", 25, self.takes),
            ("decode", 15, self.decoding),
            ("stock", 60, self.stock_pipeline),
        ]
        with torch.inference_mode():
            for name, needs_s, work in sections:
                if self.report.has_time(name, 0 if self.scale.tiny else needs_s):
                    with self.report.attempt(name):
                        work()

    @cached_property
    def stock(self) -> Any:
        """diffusers' pipeline as published."""
        tokenizer = catalog.choose("mini").folder / "tokenizer" / "tokenizer.json"
        device, tiny = self.scale.device, self.scale.tiny
        return random_weights.build_pipeline(device, self.dtype, tokenizer, tiny)

    @cached_property
    def reference(self) -> Engine:
        """The studio with diffusers' transformer."""
        return Engine(self.stock, catalog.MODELS["xl-sft"], self.scale.device, fast=False)

    @cached_property
    def engine(self) -> Engine:
        """The studio as on CUDA, over the same weights."""
        parts = {**self.stock.components}
        parts["transformer"] = random_weights.twin_of(self.stock.transformer)
        pipe = type(self.stock)(**parts)
        engine = Engine(pipe, catalog.MODELS["xl-sft"], self.scale.device, fast=True)
        engine.fast.captured = False
        return engine

    @cached_property
    def planner(self) -> Planner:
        """The planner of 1.7 B."""
        scale = self.scale
        model = random_weights.build_planner(scale.device, self.dtype, scale.tiny)
        first, codebook = random_weights.TINY_CODES if scale.tiny else random_weights.CODES
        return Planner(model, SimpleNamespace(first_code=first, codebook=codebook), scale.device)

    def cost(self, work: Callable[[], Any], times: int = 5, warm: int = 3) -> Cost:
        """Wall time between two synchronisations, so that queued work does not look fast."""
        import torch

        times, warm = (1, min(warm, 2)) if self.scale.tiny else (times, warm)
        for _ in range(warm):
            work()
        self.wait()
        held = torch.cuda.memory_allocated()
        if self.cuda:
            torch.cuda.reset_peak_memory_stats()
        spent = []
        for _ in range(times):
            began = time.perf_counter()
            work()
            self.wait()
            spent.append(1e3 * (time.perf_counter() - began))
        peak = torch.cuda.max_memory_allocated() - held
        return Cost(statistics.median(spent), peak / 1e9)

    def wait(self) -> None:
        """Return when the GPU has done all that it was given."""
        import torch

        if self.cuda:
            torch.cuda.synchronize()

    def request(self, seconds: float) -> Generate:
        """A song with lyrics, about 900 tokens of condition at full size."""
        lines = 2 if self.scale.tiny else 60
        return Generate.of(
            {
                "prompt": "warm lofi piano",
                "lyrics": "[verse]\n" + "while the night is young and slow\n" * lines,
                "duration_s": seconds,
                "inference_steps": self.scale.steps,
                "guidance_scale": 7.0,
                "shift": 1.0,
                "seed": 7,
            }
        )

    def step(self, engine: Engine, seconds: int) -> Callable[[], Any]:
        """One guided step of a song."""
        import torch

        conditions, _ = engine.conditions(self.request(seconds))
        model = engine.conditioned_model(conditions)
        frames = acestep.frames_for(seconds)
        x = torch.randn(1, frames, engine.channels, device=self.scale.device)
        return lambda: model(x, 0.5, True)

    def add_step(self, way: str, engine: Engine, seconds: int) -> float:
        """Measure one guided step; a line with its share of the machine's peak."""
        began = time.monotonic()
        work = self.step(engine, seconds)
        work()
        self.wait()
        first = time.monotonic() - began
        cost = self.cost(work)
        dit = engine.pipe.transformer.config
        tokens = engine.conditions(self.request(seconds))[0].cond.shape[1]
        tflops = step_flops(dit, acestep.frames_for(seconds), tokens) / cost.ms / 1e9
        share = tflops / self.peak_tflops if self.peak_tflops else 0.0
        stock = self.stock_ms.get(seconds, cost.ms)
        line = (
            f"{cost}, {share:.2f} of the peak, {cost.ms / stock:.2f} of stock, first {first:.1f} s"
        )
        self.report.add("step", f"{seconds} s, guided pair, {way}", line)
        return cost.ms

    def machine(self) -> None:
        """What this machine reaches at best."""
        import torch

        device, tiny = self.scale.device, self.scale.tiny
        name = torch.cuda.get_device_name() if self.cuda else "cpu"
        self.report.add("machine", name, f"torch {torch.__version__}, CUDA {torch.version.cuda}")
        size = 256 if tiny else 8192
        a = torch.randn(size, size, device=device, dtype=self.dtype)
        self.peak_tflops = 2 * size**3 / self.cost(lambda: a @ a).ms / 1e9
        b = torch.empty(1 << (20 if tiny else 31), dtype=torch.uint8, device=device)
        self.bandwidth = 2 * b.numel() / self.cost(b.clone).ms / 1e6
        reached = f"{self.peak_tflops:.2f} TFLOP/s, {self.bandwidth:.0f} GB/s"
        self.report.add("machine", "matrix product, copy", reached)

    def attention(self) -> None:
        """Which kernel runs for a sliding layer, as diffusers and as we call it."""
        import torch
        from torch.nn.functional import scaled_dot_product_attention as attend

        from models import fast_transformer

        length, window, width = (64, 8, 16) if self.scale.tiny else (1500, 128, 128)
        like = {"device": self.scale.device, "dtype": self.dtype}
        query, key = (torch.randn(2, heads, length, width, **like) for heads in (32, 8))
        dense = torch.zeros(1, 1, length, length, **like)
        band = fast_transformer.band_mask(length, window, 4, key)
        ways = {
            "grouped heads, dense mask (diffusers)": lambda: attend(
                query, key, key, dense, enable_gqa=True
            ),
            "grouped heads, no mask": lambda: attend(query, key, key, enable_gqa=True),
            "bands (ours)": lambda: fast_transformer.banded(
                query, key, key, window, width**-0.5, band
            ),
        }
        for name, work in ways.items():
            cost, kernel = self.cost(work), longest_kernel(work, self.cuda)
            self.report.add("attention", name, f"{cost}, mostly {kernel[:50]}")

    def launches(self) -> None:
        """Operations of a guided step, counted without arithmetic."""
        stock = random_weights.build_transformer("meta", self.dtype, self.scale.tiny)
        fast = FastTransformer(random_weights.twin_of(stock))
        before, after = (
            count_launches(each, stock.config, self.dtype, 750, 900) for each in (stock, fast)
        )
        for way, count in (("diffusers", before), ("prepared", after), ("captured", 1)):
            self.report.add("launches", f"one guided step, {way}", f"{count:,}")

    def steps_of_diffusers(self) -> None:
        """The reference."""
        for seconds in self.scale.seconds:
            self.stock_ms[seconds] = self.add_step("diffusers", self.reference, seconds)

    def steps_prepared(self) -> None:
        """Constants of the song, bands, fused norms."""
        for seconds in self.scale.seconds:
            self.add_step("prepared", self.engine, seconds)

    def steps_captured(self) -> None:
        """The same as CUDA graphs."""
        self.engine.fast.captured = None
        for seconds in self.scale.seconds:
            self.add_step("captured", self.engine, seconds)

    def steps_compiled(self) -> None:
        """The same with compiled layers; they stay compiled for what follows."""
        from torch._dynamo.utils import counters

        self.engine.fast.compile(self.scale.compiler)
        self.engine.fast.captured = False
        for seconds in self.scale.seconds[:2]:
            self.add_step("compiled", self.engine, seconds)
        self.engine.fast.captured = None
        for seconds in self.scale.seconds:
            self.add_step("compiled, captured", self.engine, seconds)
        graphs = counters["stats"].get("unique_graphs", 0)
        self.report.add("step", "graphs compiled for all lengths", str(graphs))

    def planner_generate(self) -> None:
        """What transformers' own loop takes, and the least that memory allows."""
        import torch
        from transformers import UnbatchedClassifierFreeGuidanceLogitsProcessor as Guide

        codes, model = max(4, self.scale.codes // 4), self.planner.model
        prompt, negative = (
            torch.randint(0, 900, (1, n), device=self.scale.device)
            for n in (PROMPT_TOKENS, NEGATIVE_TOKENS)
        )

        def generate() -> None:
            model.generate(
                prompt,
                attention_mask=torch.ones_like(prompt),
                do_sample=True,
                temperature=SAMPLING.temperature,
                top_p=SAMPLING.top_p,
                top_k=SAMPLING.top_k,
                min_new_tokens=codes,
                max_new_tokens=codes,
                pad_token_id=0,
                logits_processor=[Guide(PLANNER_GUIDANCE, model, unconditional_ids=negative)],
            )

        spent = self.cost(generate, times=1, warm=1).ms / codes
        self.report.add("planner", "transformers.generate, guided", f"{spent:.2f} ms a code")
        weights = sum(x.numel() for layer in self.planner.qwen.layers for x in layer)
        weights += self.planner.code_head.numel()
        floor = weights * self.planner.code_head.element_size() / self.bandwidth / 1e6
        self.report.add("planner", "floor: reading the weights", f"{floor:.2f} ms a code")

    def planner_decoders(self) -> None:
        """Ours, eager and static (on CUDA captured)."""
        self._add_decoder("ours, eager", CodeDecoder)
        self._add_decoder("ours, static step" + self.cuda * ", captured", StaticCodeDecoder)

    def planner_compiled(self) -> None:
        """The static step with a compiled layer."""
        self.planner.qwen.compile(self.scale.compiler)
        self._add_decoder("ours, static step, compiled", StaticCodeDecoder)

    def _add_decoder(self, name: str, kind: type[CodeDecoder]) -> None:
        compose, decoder = self._composer(kind, self.scale.codes)
        cost = self.cost(compose, times=3, warm=1)
        if self.eager_codes is None:
            self.eager_codes = decoder.codes.clone()
        same = int((decoder.codes == self.eager_codes).sum())
        line = f"{cost.ms / self.scale.codes:.2f} ms a code, {same} of {self.scale.codes} equal"
        self.report.add("planner", name, line)

    def _composer(
        self, kind: type[CodeDecoder], count: int
    ) -> tuple[Callable[[], None], CodeDecoder]:
        """What writes the codes of one song, and the decoder that then has them."""
        planner = self.planner
        prompts = [[5] * PROMPT_TOKENS, [5] * NEGATIVE_TOKENS]
        cache = KeyValueCache(planner.qwen, prompts, count)
        hidden = planner.qwen.forward(cache.prompts, cache)
        first = planner.vocabulary.first_code
        decoder = kind(
            planner.qwen, cache, planner.code_head, first, count, PLANNER_GUIDANCE, SAMPLING
        )
        draws = uniform_draws(1, count, self.scale.device)

        def compose() -> None:
            decoder.start(hidden, draws)
            while decoder.done < count:
                decoder.step()
            decoder.wait()

        return compose, decoder

    def songs(self) -> None:
        """Whole songs in the fastest way measured, and one with its planner."""
        for seconds in sorted(self.scale.seconds):
            cost = self.cost(lambda seconds=seconds: self._song(seconds), times=1, warm=0)
            what = f"{seconds} s, {self.scale.steps} guided steps, {self.engine.implementation}"
            self.report.add("song", what, f"{cost.ms / 1e3:.2f} s, {cost.peak_gb:.2f} GB over")
        seconds = self.scale.seconds[0]
        compose, _ = self._composer(StaticCodeDecoder, 5 * seconds)
        codes = self.cost(compose, times=1, warm=0).ms / 1e3
        song = self.cost(lambda: self._song(seconds), times=1, warm=0).ms / 1e3
        line = f"{codes:.2f} + {song:.2f} = {codes + song:.2f} s"
        self.report.add("song", f"{seconds} s, codes and song", line)

    def _song(self, seconds: int) -> torch.Tensor:
        request = self.request(seconds)
        conditions, _ = self.engine.conditions(request)
        latents = _drain(self.engine.denoise(conditions, request))
        return _drain(vae.decode(self.engine.pipe.vae, latents))

    def takes(self) -> None:
        """Whether a batch of takes is faster than takes one by one: transformer and planner."""
        import torch

        seconds = self.scale.seconds[0]
        one = self.cost(self.step(self.engine, seconds)).ms
        conditions, _ = self.reference.conditions(self.request(seconds))
        rows, like = 2 * TAKES, {"device": self.scale.device, "dtype": self.dtype}
        time_ = torch.full((rows,), 0.5, **like)
        x = torch.randn(rows, conditions.context.shape[1], self.engine.channels, **like)
        arguments = {
            "hidden_states": x,
            "timestep": time_,
            "timestep_r": time_,
            "encoder_hidden_states": conditions.cond.expand(rows, -1, -1),
            "context_latents": conditions.context.expand(rows, -1, -1),
            "return_dict": False,
        }
        batch = self.cost(lambda: self.stock.transformer(**arguments), times=3, warm=1)
        line = f"{one:.1f} ms ours; {batch.ms / TAKES:.1f} ms a take in a batch, {batch}"
        self.report.add("takes", f"step of {seconds} s: 1 take, {TAKES} takes (diffusers)", line)
        for rows in (2, 2 * TAKES):
            cost = self.cost(self._planner_step(rows))
            what = f"planner's step for {rows // 2} takes"
            self.report.add("takes", what, f"{cost.ms / (rows // 2):.2f} ms a take")

    def _planner_step(self, rows: int) -> Callable[[], Any]:
        """One step of the planner for so many rows, captured on CUDA."""
        import torch

        qwen, device = self.planner.qwen, self.scale.device
        cache = KeyValueCache(qwen, [[5] * PROMPT_TOKENS] * rows, 8)
        qwen.forward(cache.prompts, cache)
        ids, slot = (torch.full((n,), PROMPT_TOKENS, device=device) for n in (rows, 1))
        mask = torch.zeros(rows, 1, 1, cache.size, device=device, dtype=self.dtype)

        def work() -> torch.Tensor:
            return qwen.step(ids, cache, slot, mask)

        work()
        captured = cuda_graph.capture(work, "The planner's step") if self.cuda else None
        return captured[0] if captured else work

    def decoding(self) -> None:
        """The VAE, by the size of its tiles."""
        import torch

        seconds, before = self.scale.seconds[0], vae.TILE_FRAMES
        frames = acestep.frames_for(seconds)
        z = torch.randn(1, frames, self.engine.channels, device=self.scale.device)
        try:
            for tile in (64, 128, 256, 1024):
                vae.TILE_FRAMES = tile
                cost = self.cost(lambda: _drain(vae.decode(self.stock.vae, z)), times=2, warm=1)
                self.report.add("decode", f"{seconds} s in tiles of {tile} frames", str(cost))
        finally:
            vae.TILE_FRAMES = before

    def stock_pipeline(self) -> None:
        """diffusers' pipeline from prompt to sound."""
        seconds = self.scale.seconds[0]
        song = self.request(seconds)
        arguments = {
            "prompt": [song.prompt],
            "lyrics": [song.lyrics],
            "audio_duration": float(seconds),
            "num_inference_steps": song.inference_steps,
            "guidance_scale": song.guidance_scale,
            "shift": song.shift,
        }
        cost = self.cost(lambda: self.stock(**arguments), times=1, warm=0)
        what = f"{seconds} s, {self.scale.steps} guided steps, AceStepPipeline"
        self.report.add("stock", what, f"{cost.ms / 1e3:.2f} s, {cost.peak_gb:.2f} GB over")


def _drain(steps: Generator[Any, None, Any]) -> Any:
    while True:
        try:
            next(steps)
        except StopIteration as end:
            return end.value


def run(tiny: bool, budget_s: float) -> list[tuple[str, str, str]]:
    """Measure and print all that fits into the budget; the table as (section, what, value)."""
    import torch

    report, threads = Report(budget_s), torch.get_num_threads()
    if tiny:  # with so little to compute, threads only wait for each other
        torch.set_num_threads(1)
    try:
        Bench(TINY if tiny else FULL, report).run()
    finally:
        torch.set_num_threads(threads)
    return report.rows
