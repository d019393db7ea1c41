"""Sampling by flow matching: time schedules, guidance (APG, ADG) and the table of solvers.

Works on tensors alone and knows nothing of the transformer. Time runs from t = 1 (noise) to t = 0
(data); the model predicts the velocity v = noise - data, so the clean estimate is x0 = x - t * v.
A new solver is one function and one row of `SOLVERS`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Generator
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from core.requests import EDITION, SongRequest

if TYPE_CHECKING:
    import torch


APG_MOMENTUM = -0.75


APG_NORM_LIMIT = 2.5


ADG_MAX_ANGLE = 3.14 / 6
"""Radians. 3.14, not pi: the number in the authors' code."""


PREVIEW_FIRST, PREVIEW_EVERY = 4, 3
"""A preview evaluates so many first steps, then each step whose number this divides, and the last.

Measured on the embedded model against 50 steps of the same seed: 20 of 50 evaluated are closer than
20 steps alone.
"""


class Velocity(NamedTuple):
    """The model's output at one point: [1, frames, channels] with and without the condition."""

    cond: torch.Tensor
    uncond: torch.Tensor | None


VelocityModel = Callable[["torch.Tensor", float, bool], Velocity]
"""(x [1, frames, channels], t, guided) -> Velocity. `uncond` is needed only when guided."""


AfterStep = Callable[["torch.Tensor", int, "torch.Tensor"], "torch.Tensor"]
"""(x after a step, steps done, its time as a 0-d tensor) -> x to continue with."""


@dataclass(frozen=True)
class SamplerConfig:
    """How to get from noise to latents.

    Guidance acts where `cfg_start` <= t <= `cfg_end`, with t the shifted time. As in the ACE-Step
    authors' code, t = 1 is the beginning.
    """

    steps: int
    guidance: float = 1.0
    method: str = "ode"
    shift: float = 1.0
    cfg_start: float = 0.0
    cfg_end: float = 1.0
    adg: bool = False
    preview: bool = False

    @classmethod
    def of(cls, song: SongRequest) -> SamplerConfig:
        """The settings of a request whose steps, guidance and shift are resolved."""
        return cls(
            steps=song.inference_steps,
            guidance=song.guidance_scale,
            method=song.infer_method,
            shift=song.shift,
            cfg_start=song.cfg_interval_start,
            cfg_end=song.cfg_interval_end,
            adg=song.use_adg,
            preview=song.fast_preview,
        )

    def guided_at(self, t: float) -> bool:
        """Whether time `t` needs the second, unconditional pass."""
        return self.guidance > 1.0 and self.cfg_start <= t <= self.cfg_end


class Step(NamedTuple):
    """One step of a run, as a solver sees it.

    `t` and `t_next` are 0-d float32 tensors on the CPU, whatever the device of `x`: torch passes
    those to kernels as plain numbers, so no step waits for a copy.
    """

    x: torch.Tensor
    v: torch.Tensor
    t: torch.Tensor
    t_next: torch.Tensor
    is_last: bool
    velocity_next: Callable[[torch.Tensor], torch.Tensor]
    """The guided velocity of another x at `t_next`; leaves APG's momentum as it is."""
    fresh_noise: Callable[[], torch.Tensor]
    """Standard normal noise shaped like `x`, from the run's own generator."""


def euler(step: Step) -> torch.Tensor:
    """Follow the velocity in a straight line."""
    return step.x + (step.t_next - step.t) * step.v


def heun(step: Step) -> torch.Tensor:
    """Follow the mean of the velocities at both ends of the step (trapezoidal rule).

    The last step is Euler's: the model is not evaluated at t = 0.
    """
    ahead = euler(step)
    if step.is_last:
        return ahead
    return step.x + (step.t_next - step.t) * (step.v + step.velocity_next(ahead)) / 2


def sde(step: Step) -> torch.Tensor:
    """Estimate the clean latents, then noise them afresh to the next time of the schedule."""
    clean = step.x - step.t * step.v
    return step.t_next * step.fresh_noise() + (1 - step.t_next) * clean


class Solver(NamedTuple):
    """A row of the solver table.

    `evaluates_next` says that the solver also evaluates the model at the end of each step but the
    last; time estimates count those evaluations.
    """

    advance: Callable[[Step], torch.Tensor]
    evaluates_next: bool = False


SOLVERS = {
    "ode": Solver(euler),
    "sde": Solver(sde),
    "heun": Solver(heun, evaluates_next=True),
}
"""By the values of `infer_method` in a request."""


def schedule(steps: int, shift: float) -> torch.Tensor:
    """The times of a run, float32 [steps + 1], from 1 down to 0.

    Evenly spaced, then bent by t' = shift * t / (1 + (shift - 1) * t): shift 3 spends more steps
    on the coarse part. Source: the ACE-Step 1.5 paper and its turbo tables, which this reproduces.
    """
    import torch

    t = torch.linspace(1.0, 0.0, steps + 1, dtype=torch.float32)
    return t if shift == 1.0 else shift * t / (1 + (shift - 1) * t)


class Variation(NamedTuple):
    """A retake near the first take: how far towards the noise of `seed`, 0 (not at all) to 1."""

    seed: int
    variance: float


def draw_noise(
    seed: int, frames: int, channels: int, variation: Variation | None = None
) -> tuple[torch.Tensor, torch.Generator]:
    """Standard normal float32 [1, frames, channels], and the generator to continue with.

    Drawn on the CPU whatever the device, so that a seed means the same song everywhere.

    Args:
        variation: mixes in the noise of a second seed, cos(v * pi / 2) of the first to
            sin(v * pi / 2) of the second, which keeps it standard normal. At variance 0 the noise
            is that of `seed` alone, bit for bit. Source: the authors' retake. What a solver draws
            during the run stays that of `seed`.
    """
    import torch

    generator = torch.Generator("cpu").manual_seed(seed)
    noise = torch.randn(1, frames, channels, generator=generator)
    if variation and variation.variance > 0:
        angle = variation.variance * math.pi / 2
        other, _ = draw_noise(variation.seed, frames, channels)
        noise = math.cos(angle) * noise + math.sin(angle) * other
    return noise, generator


def sample(
    model: VelocityModel,
    noise: torch.Tensor,
    config: SamplerConfig,
    generator: torch.Generator,
    *,
    first_step: int = 0,
    after_step: AfterStep | None = None,
) -> Generator[int, None, torch.Tensor]:
    """Integrate from `noise` to latents. Yields the number of steps done, from `first_step` on.

    Args:
        model: evaluated once a step, or as the solver's row in `SOLVERS` says.
        noise: float32 [1, frames, channels] on the model's device.
        generator: CPU generator for the noise that the SDE draws during the run.
        first_step: the step to begin with; `noise` must then be noised to that step's time.
        after_step: may put known latents back after each step.

    Returns:
        The latents, float32, of the same shape (as the generator's return value).
    """
    times = schedule(config.steps, config.shift)
    solver = SOLVERS[config.method]
    apg = Apg()

    def velocity(x: torch.Tensor, i: int, update_momentum: bool = True) -> torch.Tensor:
        return guide(model, x, float(times[i]), config, apg, update_momentum)

    x = noise
    yield first_step
    for i in range(first_step, config.steps):
        x = solver.advance(
            Step(
                x=x,
                v=velocity(x, i),
                t=times[i],
                t_next=times[i + 1],
                is_last=i + 1 == config.steps,
                velocity_next=lambda ahead, i=i: velocity(ahead, i + 1, update_momentum=False),
                fresh_noise=lambda x=x: _noise_like(x, generator),
            )
        )
        if after_step:
            x = after_step(x, i + 1, times[i + 1])
        yield i + 1
    return x


def guide(
    model: VelocityModel,
    x: torch.Tensor,
    t: float,
    config: SamplerConfig,
    apg: Apg,
    update_momentum: bool = True,
) -> torch.Tensor:
    """The velocity at (x, t), with guidance where `config` has it."""
    guided = config.guided_at(t)
    v = model(x, t, guided)
    if not guided:
        return v.cond
    if config.adg:
        return adg(x, v, t, config.guidance)
    return apg(v, config.guidance, update_momentum)


def step_at(config: SamplerConfig, t: float) -> int:
    """The step of `config` whose time is nearest to `t`."""
    times = schedule(config.steps, config.shift)[:-1]
    return int((times - t).abs().argmin())


def switch_step(
    config: SamplerConfig, strength: float, first_step: int = 0, edition: int = EDITION
) -> int:
    """The step at which a cover stops following its source.

    Args:
        strength: share of the steps that follow the source, 0 to 1. Of the steps that remain after
            `first_step`, as in the authors' code; in edition 1, of all steps.
        first_step: the step that the cover begins with.
    """
    if edition < 2:
        return int(config.steps * strength)
    return first_step + int((config.steps - first_step) * strength)


def morph(
    source: VelocityModel,
    target: VelocityModel,
    clean: torch.Tensor,
    config: SamplerConfig,
    generator: torch.Generator,
    *,
    n_min: float,
    n_max: float,
    n_avg: int,
) -> Generator[int, None, torch.Tensor]:
    """Flow editing: move clean latents from one description to another without inverting them.

    While n_min < t <= n_max the difference between both velocities, at equally noised points,
    moves the edit; from n_min on the target alone finishes it. Always Euler. Yields steps done.
    Source: Kulikov et al., FlowEdit, arXiv 2412.08629, as in ACE-Step 1.5's morph. The bounds are
    noise levels here; in the authors' code they are shares of the steps, counted from the start.

    Args:
        source, target: the model under the old and the new description.
        clean: float32 [1, frames, channels], the source's latents.
        n_avg: noise samples averaged in each step.

    Returns:
        The edited latents; `clean` itself where n_max is 0 (as the generator's return value).
    """
    import torch

    times = schedule(config.steps, config.shift)
    apg_source, apg_target = Apg(), Apg()
    edit = clean
    path: torch.Tensor | None = None
    yield 0
    for i in range(config.steps):
        t, t_next = times[i], times[i + 1]
        t_number = float(t)
        if t_number > n_max:
            yield i + 1
            continue
        if t_number > n_min:
            moved = torch.zeros_like(clean)
            for draw in range(n_avg):
                noised = (1 - t) * clean + t * _noise_like(clean, generator)
                is_last = draw + 1 == n_avg
                v_target = guide(
                    target, edit + noised - clean, t_number, config, apg_target, is_last
                )
                v_source = guide(source, noised, t_number, config, apg_source, is_last)
                moved = moved + (v_target - v_source) / n_avg
            edit = edit + (t_next - t) * moved
        else:
            if path is None:
                path = edit + t * (_noise_like(clean, generator) - clean)
            path = path + (t_next - t) * guide(target, path, t_number, config, apg_target)
        yield i + 1
    return edit if path is None else path


class Apg:
    """Adaptive projected guidance with ACE-Step's constants; keeps its momentum between calls.

    Only the part of (cond - uncond) that is orthogonal to cond is added, per channel over time:
    it steers without oversaturating. Source: Sadat et al., arXiv 2410.02416.
    """

    def __init__(self) -> None:
        self._average: torch.Tensor | float = 0.0

    def __call__(self, v: Velocity, scale: float, update_momentum: bool = True) -> torch.Tensor:
        """The guided velocity, shaped like `v.cond`."""
        import torch

        average = (v.cond - v.uncond) + APG_MOMENTUM * self._average
        if update_momentum:
            self._average = average
        norm = average.norm(p=2, dim=1, keepdim=True)
        update = average * torch.minimum(torch.ones_like(norm), APG_NORM_LIMIT / norm)
        update64, along = _float64(update), _float64(v.cond)
        along = torch.nn.functional.normalize(along, dim=1)
        across = update64 - (update64 * along).sum(dim=1, keepdim=True) * along
        return v.cond + (scale - 1.0) * across.to(v.cond.device, v.cond.dtype)


def adg(x: torch.Tensor, v: Velocity, t: float, scale: float) -> torch.Tensor:
    """Angle guidance: turn the clean estimate away from the unconditional one, frame by frame.

    The angle between both estimates is widened by (scale - 1), at most 30 degrees; lengths stay.
    Source: the authors' `adg` in ACE-Step 1.5's base model.

    Args:
        x: [1, frames, channels] at time `t` > 0.

    Returns:
        The guided velocity, shaped and typed like `v.cond`.
    """
    import torch

    x64, cond, uncond = _float64(x), _float64(v.cond), _float64(v.uncond)
    clean, clean_uncond = x64 - t * cond, x64 - t * uncond
    weight = max(scale - 1.0, 0.0) + 1e-3
    cosine = torch.nn.functional.cosine_similarity(clean, clean_uncond, dim=-1).unsqueeze(-1)
    angle = torch.arccos(cosine.clamp(-1.0, 1.0))
    turned = (weight * angle).clamp(-ADG_MAX_ANGLE, ADG_MAX_ANGLE)
    difference = clean - clean_uncond
    unit = torch.nn.functional.normalize(clean_uncond, dim=-1)
    across = difference - (difference * unit).sum(dim=-1, keepdim=True) * unit
    sine = torch.sin(angle)
    gain = torch.where(sine > 1e-3, torch.sin(turned) / sine.clamp_min(1e-3), weight)
    guided = torch.cos(turned) * clean + gain * across
    return ((x64 - guided) / t).to(v.cond.device, v.cond.dtype)


class Preview:
    """A model of which most steps are extrapolated, linearly in t, from the last two evaluated.

    Both outputs are, so that guidance, whose momentum must see every step, runs as usual. Only for
    Euler's method: the velocity along one path is smooth, but not that of another x.
    """

    def __init__(self, model: VelocityModel, config: SamplerConfig) -> None:
        self._model = model
        self._last = float(schedule(config.steps, config.shift)[-2])
        self._calls = 0
        self._evaluated: list[tuple[float, Velocity]] = []

    def __call__(self, x: torch.Tensor, t: float, guided: bool) -> Velocity:
        """See `VelocityModel`."""
        number, self._calls = self._calls, self._calls + 1
        known = [v.uncond is not None or not guided for _, v in self._evaluated]
        if len(known) < 2 or not all(known) or t <= self._last or _is_evaluated(number):
            v = self._model(x, t, guided)
            self._evaluated = [*self._evaluated[-1:], (t, v)]
            return v
        (before, first), (at, second) = self._evaluated
        share = (t - at) / (at - before)

        def ahead(one: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
            return other + share * (other - one)

        uncond = ahead(first.uncond, second.uncond) if guided else None
        return Velocity(ahead(first.cond, second.cond), uncond)


def _is_evaluated(number: int) -> bool:
    return number < PREVIEW_FIRST or number % PREVIEW_EVERY == 0


def evaluated_steps(config: SamplerConfig) -> list[int]:
    """The numbers of the steps in which the model is evaluated."""
    numbers = range(config.steps)
    return [i for i in numbers if not config.preview or _is_evaluated(i) or i + 1 == config.steps]


def evaluations(config: SamplerConfig) -> int:
    """How many rows the model computes in a run: the factor of a time estimate.

    Needs no torch, so that a page can estimate before anything heavy is imported.
    """
    even = (1 - i / config.steps for i in evaluated_steps(config))
    evaluated = [config.shift * t / (1 + (config.shift - 1) * t) for t in even]
    if SOLVERS[config.method].evaluates_next:
        evaluated += evaluated[1:]
    return sum(2 if config.guided_at(t) else 1 for t in evaluated)


def _noise_like(x: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Standard normal noise drawn on the CPU, moved to the device of `x`."""
    import torch

    noise = torch.randn(x.shape, generator=generator)
    if x.device.type == "cuda":  # from pinned memory the copy does not make the host wait
        return noise.pin_memory().to(x.device, non_blocking=True)
    return noise.to(x.device)


def _float64(x: torch.Tensor) -> torch.Tensor:
    """`x` in float64, on the CPU where the device has none (Apple's)."""
    return x.cpu().double() if x.device.type == "mps" else x.double()
