"""Flow matching on latents: schedules, guidance (APG, ADG), solvers (ODE, SDE, Heun).

Tensors in, tensors out. Time runs from t = 1 (noise) to t = 0 (data); the model predicts the
velocity v = noise - data, so the clean estimate is x0 = x - t * v.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from core.requests import SongRequest

if TYPE_CHECKING:
    import torch


APG_MOMENTUM = -0.75


APG_NORM_LIMIT = 2.5


ADG_MAX_ANGLE = 3.14 / 6
"""Radians. 3.14, not pi: the number the authors wrote."""


class Velocity(NamedTuple):
    """What the model says at one point: [1, frames, channels] with and without the condition."""

    cond: torch.Tensor
    uncond: torch.Tensor | None


Model = Callable[["torch.Tensor", float, bool], Velocity]
"""(x [1, frames, channels], t, guided) -> Velocity. `uncond` is needed only when guided."""


@dataclass(frozen=True)
class SamplerConfig:
    """How to go from noise to sound.

    `guide_from` and `guide_to` bound the shifted time t in which guidance acts, as the authors of
    ACE-Step mean it: 1 is the beginning, both ends count.
    """

    steps: int
    guidance: float = 1.0
    method: str = "ode"
    shift: float = 1.0
    guide_from: float = 0.0
    guide_to: float = 1.0
    adg: bool = False

    @classmethod
    def of(cls, song: SongRequest) -> SamplerConfig:
        """The course that a request asks for, its open values resolved."""
        return cls(
            steps=song.inference_steps,
            guidance=song.guidance_scale,
            method=song.infer_method,
            shift=song.shift,
            guide_from=song.cfg_interval_start,
            guide_to=song.cfg_interval_end,
            adg=song.use_adg,
        )

    def guided_at(self, t: float) -> bool:
        """Whether the second, unconditional pass is worth its price at time `t`."""
        return self.guidance > 1.0 and self.guide_from <= t <= self.guide_to


def schedule(steps: int, shift: float) -> torch.Tensor:
    """The times of a run, float32 [steps + 1], from 1 down to 0.

    Evenly spaced, then bent by t' = shift * t / (1 + (shift - 1) * t): shift 3 spends more steps
    on the coarse part. Source: the ACE-Step 1.5 paper and its turbo tables, which this reproduces.
    """
    import torch

    t = torch.linspace(1.0, 0.0, steps + 1, dtype=torch.float32)
    return t if shift == 1.0 else shift * t / (1 + (shift - 1) * t)


def draw_noise(seed: int, frames: int, channels: int) -> tuple[torch.Tensor, torch.Generator]:
    """Standard normal float32 [1, frames, channels] on the CPU, and the generator to go on with.

    Drawn on the CPU whatever the device, so that a seed means the same song everywhere.
    """
    import torch

    generator = torch.Generator("cpu").manual_seed(seed)
    return torch.randn(1, frames, channels, generator=generator), generator


Hold = Callable[["torch.Tensor", int, "torch.Tensor"], "torch.Tensor"]
"""(x after a step, steps done, the time it is at) -> x to go on with."""


def sample(
    model: Model,
    noise: torch.Tensor,
    course: SamplerConfig,
    generator: torch.Generator,
    *,
    first: int = 0,
    hold: Hold | None = None,
) -> Iterator[int]:
    """Walk from `noise` to latents. Yields the number of steps done, starting with `first`.

    Args:
        model: asked once a step; twice, but for the last, by Heun.
        noise: float32 [1, frames, channels] on the model's device.
        generator: CPU generator for what the SDE draws on the way.
        first: the step to begin with; `noise` then stands at that step's time.
        hold: may put known latents back after each step.

    Returns:
        The latents, float32, of the same shape (as the generator's return value).
    """
    import torch

    times = schedule(course.steps, course.shift)
    apg = Apg()

    def velocity(x: torch.Tensor, i: int, remember: bool = True) -> torch.Tensor:
        return guide(model, x, float(times[i]), course, apg, remember)

    x = noise
    yield first
    for i in range(first, course.steps):
        t, t_next = times[i].to(x.device), times[i + 1].to(x.device)
        v = velocity(x, i)
        if course.method == "sde":
            clean = x - t * v
            fresh = torch.randn(x.shape, generator=generator).to(x.device)
            x = t_next * fresh + (1 - t_next) * clean
        else:
            ahead = x + (t_next - t) * v
            if course.method == "heun" and i + 1 < course.steps:
                ahead = x + (t_next - t) * (v + velocity(ahead, i + 1, remember=False)) / 2
            x = ahead
        x = hold(x, i + 1, t_next) if hold else x
        yield i + 1
    return x


def guide(
    model: Model, x: torch.Tensor, t: float, course: SamplerConfig, apg: Apg, remember: bool = True
) -> torch.Tensor:
    """The velocity at (x, t) with the guidance that `course` asks for there."""
    guided = course.guided_at(t)
    v = model(x, t, guided)
    if not guided:
        return v.cond
    if course.adg:
        return adg(x, v, t, course.guidance)
    return apg(v, course.guidance, remember)


def step_at(course: SamplerConfig, t: float) -> int:
    """The step of `course` whose time is nearest to `t`."""
    times = schedule(course.steps, course.shift)[:-1]
    return int((times - t).abs().argmin())


def morph(
    source: Model,
    target: Model,
    clean: torch.Tensor,
    course: SamplerConfig,
    generator: torch.Generator,
    *,
    n_min: float,
    n_max: float,
    n_avg: int,
) -> Iterator[int]:
    """Flow editing: carry clean latents from one description to another without inverting them.

    While n_min < t <= n_max the difference between both velocities, at equally noised points,
    moves the edit; from n_min on the target alone finishes it. Always Euler. Yields steps done.
    Source: Kulikov et al., FlowEdit, arXiv 2412.08629, as in ACE-Step 1.5's morph.

    Args:
        source, target: the model under the old and the new description.
        clean: float32 [1, frames, channels], the source's latents.
        n_avg: draws of noise averaged in each step.

    Returns:
        The edited latents; `clean` itself where n_max is 0 (as the generator's return value).
    """
    import torch

    times = schedule(course.steps, course.shift)
    apg_source, apg_target = Apg(), Apg()
    edit = clean
    path: torch.Tensor | None = None
    yield 0
    for i in range(course.steps):
        t, t_next = times[i].to(clean.device), times[i + 1].to(clean.device)
        now = float(times[i])
        if now > n_max:
            yield i + 1
            continue
        if now > n_min:
            moved = torch.zeros_like(clean)
            for draw in range(n_avg):
                noise = torch.randn(clean.shape, generator=generator).to(clean.device)
                there = (1 - t) * clean + t * noise
                last = draw + 1 == n_avg
                v_target = guide(target, edit + there - clean, now, course, apg_target, last)
                v_source = guide(source, there, now, course, apg_source, last)
                moved = moved + (v_target - v_source) / n_avg
            edit = edit + (t_next - t) * moved
        else:
            if path is None:
                noise = torch.randn(clean.shape, generator=generator).to(clean.device)
                path = edit + t * (noise - clean)
            path = path + (t_next - t) * guide(target, path, now, course, apg_target)
        yield i + 1
    return edit if path is None else path


class Apg:
    """Adaptive projected guidance with ACE-Step's constants; keeps its momentum between calls.

    Only the part of (cond - uncond) that is orthogonal to cond is added, per channel over time:
    it steers without overdriving. Source: Sadat et al., arXiv 2410.02416.
    """

    def __init__(self) -> None:
        self._average: torch.Tensor | float = 0.0

    def __call__(self, v: Velocity, scale: float, remember: bool = True) -> torch.Tensor:
        """The guided velocity, shaped like `v.cond`. `remember=False` leaves the momentum alone."""
        import torch

        average = (v.cond - v.uncond) + APG_MOMENTUM * self._average
        if remember:
            self._average = average
        norm = average.norm(p=2, dim=1, keepdim=True)
        update = average * torch.minimum(torch.ones_like(norm), APG_NORM_LIMIT / norm)
        wide, along = _widened(update), _widened(v.cond)
        along = torch.nn.functional.normalize(along, dim=1)
        across = wide - (wide * along).sum(dim=1, keepdim=True) * along
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

    at, cond, uncond = _widened(x), _widened(v.cond), _widened(v.uncond)
    clean, plain = at - t * cond, at - t * uncond
    weight = max(scale - 1.0, 0.0) + 1e-3
    cosine = torch.nn.functional.cosine_similarity(clean, plain, dim=-1).unsqueeze(-1)
    angle = torch.arccos(cosine.clamp(-1.0, 1.0))
    turned = (weight * angle).clamp(-ADG_MAX_ANGLE, ADG_MAX_ANGLE)
    apart = clean - plain
    unit = torch.nn.functional.normalize(plain, dim=-1)
    across = apart - (apart * unit).sum(dim=-1, keepdim=True) * unit
    sine = torch.sin(angle)
    gain = torch.where(sine > 1e-3, torch.sin(turned) / sine.clamp_min(1e-3), weight)
    guided = torch.cos(turned) * clean + gain * across
    return ((at - guided) / t).to(v.cond.device, v.cond.dtype)


def _widened(x: torch.Tensor) -> torch.Tensor:
    """`x` in float64, on the CPU where the device has none (Apple's)."""
    return x.cpu().double() if x.device.type == "mps" else x.double()


def evaluations(course: SamplerConfig) -> int:
    """How many rows the model computes in this course: what a time estimate multiplies.

    Needs no torch, so that a page can estimate before anything heavy is imported.
    """
    even = (1 - i / course.steps for i in range(course.steps))
    asked = [course.shift * t / (1 + (course.shift - 1) * t) for t in even]
    if course.method == "heun":
        asked += asked[1:]
    return sum(2 if course.guided_at(t) else 1 for t in asked)


def is_finite(x: torch.Tensor) -> bool:
    """No NaN and no infinity in `x`."""
    return math.isfinite(float(x.abs().max())) if x.numel() else True
