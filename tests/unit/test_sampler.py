"""Schedules, guidance and solvers against their formulas, in float64 and plain numpy."""

from __future__ import annotations

import itertools
import math
import typing

import numpy as np
import pytest
import torch
from conftest import drain

from core.requests import SongRequest
from models import sampler
from models.sampler import SamplerConfig, Variation, Velocity

FRAMES, CHANNELS = 40, 6


class Field:
    """A model with a known velocity field, which records its calls."""

    def __init__(self, seed: int = 3) -> None:
        g = torch.Generator().manual_seed(seed)
        self.a = torch.randn(CHANNELS, CHANNELS, generator=g, dtype=torch.float64) * 0.4
        self.b = torch.randn(CHANNELS, CHANNELS, generator=g, dtype=torch.float64) * 0.4
        self.calls: list[tuple[float, bool]] = []

    def cond(self, x: np.ndarray, t: float) -> np.ndarray:
        return np.tanh(x @ self.a.numpy()) + t

    def uncond(self, x: np.ndarray, t: float) -> np.ndarray:
        return np.tanh(x @ self.b.numpy()) - t

    def __call__(self, x: torch.Tensor, t: float, guided: bool) -> Velocity:
        self.calls.append((t, guided))
        wide = x.numpy().astype(np.float64)
        cond = torch.from_numpy(self.cond(wide, t)).float()
        return Velocity(cond, torch.from_numpy(self.uncond(wide, t)).float() if guided else None)


def noise(seed: int = 11) -> tuple[torch.Tensor, torch.Generator]:
    return sampler.draw_noise(seed, FRAMES, CHANNELS)


def times(steps: int, shift: float) -> list[float]:
    even = [1 - i / steps for i in range(steps + 1)]
    return [shift * t / (1 + (shift - 1) * t) for t in even]


def close(a: torch.Tensor, b: np.ndarray, tolerance: float = 2e-5) -> bool:
    return float(np.abs(a.numpy().astype(np.float64) - b).max()) < tolerance


def test_schedule_equals_the_published_turbo_table():
    table = [1.0, 0.9545, 0.9, 0.8333, 0.75, 0.6429, 0.5, 0.3, 0.0]
    assert np.allclose(sampler.schedule(8, 3.0).numpy(), table, atol=1e-4)


def test_noise_depends_on_the_seed_alone():
    one, _ = sampler.draw_noise(5, 309, 64)
    again, _ = sampler.draw_noise(5, 309, 64)
    other, _ = sampler.draw_noise(6, 309, 64)
    assert torch.equal(one, again)
    assert not torch.equal(one, other)
    assert one.dtype == torch.float32
    assert abs(float(one.std()) - 1) < 0.02


def test_a_variation_moves_steadily_from_the_first_noise_to_the_second():
    first, _ = sampler.draw_noise(5, 309, 64)
    second, _ = sampler.draw_noise(6, 309, 64)
    draws = {
        v: sampler.draw_noise(5, 309, 64, Variation(6, v)) for v in (0.0, 0.1, 0.3, 0.5, 0.8, 1.0)
    }
    assert torch.equal(draws[0.0][0], first)
    assert torch.allclose(draws[1.0][0], second, atol=1e-6)
    likeness = [
        float(torch.cosine_similarity(n.flatten(), first.flatten(), 0)) for n, _ in draws.values()
    ]
    assert likeness == sorted(likeness, reverse=True)
    assert likeness[3] == pytest.approx(math.cos(math.pi / 4), abs=0.02)
    assert all(abs(float(n.std()) - 1) < 0.02 for n, _ in draws.values())
    drawn_next = {float(torch.randn(1, generator=g)) for _, g in draws.values()}
    assert len(drawn_next) == 1


def test_there_is_a_solver_for_every_method_of_a_request():
    assert set(sampler.SOLVERS) == set(
        typing.get_args(SongRequest.model_fields["infer_method"].annotation)
    )


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_ode_is_euler(shift):
    x, g = noise()
    field = Field()
    got = drain(sampler.sample(field, x, SamplerConfig(steps=6, shift=shift), g))
    want, t = x.numpy().astype(np.float64), times(6, shift)
    for now, then in itertools.pairwise(t):
        want = want - (now - then) * field.cond(want, now)
    assert close(got, want)
    assert [a for a, _ in field.calls] == pytest.approx(t[:-1])


def test_heun_is_the_trapezoidal_rule_with_an_euler_last_step():
    x, g = noise()
    field = Field()
    got = drain(sampler.sample(field, x, SamplerConfig(steps=5, method="heun", shift=2.0), g))
    want, t = x.numpy().astype(np.float64), times(5, 2.0)
    for i in range(5):
        v = field.cond(want, t[i])
        ahead = want + (t[i + 1] - t[i]) * v
        if i < 4:
            ahead = want + (t[i + 1] - t[i]) * (v + field.cond(ahead, t[i + 1])) / 2
        want = ahead
    assert close(got, want)
    assert len(field.calls) == 9


def test_heun_is_more_accurate_than_euler_at_equal_cost():
    def end(config):
        x, g = noise()
        return drain(sampler.sample(Field(), x, config, g))

    truth = end(SamplerConfig(steps=2000))
    heun = float((end(SamplerConfig(steps=10, method="heun")) - truth).abs().mean())
    euler = float((end(SamplerConfig(steps=19)) - truth).abs().mean())
    assert heun < 0.5 * euler


def test_sde_renoises_to_the_next_time_of_the_schedule():
    x, g = noise()
    field = Field()
    got = drain(sampler.sample(field, x, SamplerConfig(steps=4, method="sde", shift=3.0), g))
    _, g = noise()
    want, t = x.numpy().astype(np.float64), times(4, 3.0)
    for i in range(4):
        clean = want - t[i] * field.cond(want, t[i])
        fresh = torch.randn(x.shape, generator=g).numpy()
        want = t[i + 1] * fresh + (1 - t[i + 1]) * clean
    assert close(got, want)
    x, g = noise()
    again = drain(sampler.sample(Field(), x, SamplerConfig(steps=4, method="sde", shift=3.0), g))
    assert torch.equal(got, again)


def apg64(cond, uncond, scale, average):
    """Adaptive projected guidance by the paper's formulas; returns (velocity, new average)."""
    average = (cond - uncond) - 0.75 * average
    norm = np.sqrt((average**2).sum(axis=1, keepdims=True))
    update = average * np.minimum(1.0, 2.5 / norm)
    unit = cond / np.maximum(np.sqrt((cond**2).sum(axis=1, keepdims=True)), 1e-12)
    across = update - (update * unit).sum(axis=1, keepdims=True) * unit
    return cond + (scale - 1) * across, average


def test_apg_follows_its_formula_and_keeps_momentum():
    x, g = noise()
    field = Field()
    got = drain(sampler.sample(field, x, SamplerConfig(steps=5, guidance=6.0), g))
    want, t, average = x.numpy().astype(np.float64), times(5, 1.0), 0.0
    for now, then in itertools.pairwise(t):
        v, average = apg64(field.cond(want, now), field.uncond(want, now), 6.0, average)
        want = want - (now - then) * v
    assert close(got, want, 1e-4)


def adg64(x, cond, uncond, t, scale):
    """Angle guidance by its formula, frame by frame."""
    clean, plain = x - t * cond, x - t * uncond
    weight = max(scale - 1, 0) + 1e-3
    out = np.empty_like(x)
    for f in range(x.shape[1]):
        a, b = clean[0, f], plain[0, f]
        theta = math.acos(np.clip(a @ b / (np.linalg.norm(a) * np.linalg.norm(b)), -1, 1))
        turned = np.clip(weight * theta, -3.14 / 6, 3.14 / 6)
        p = (a - b) - ((a - b) @ b) / (b @ b) * b
        gain = math.sin(turned) / math.sin(theta) if math.sin(theta) > 1e-3 else weight
        out[0, f] = math.cos(turned) * a + gain * p
    return (x - out) / t


def test_adg_follows_its_formula():
    x, g = noise()
    field = Field()
    got = drain(sampler.sample(field, x, SamplerConfig(steps=5, guidance=4.0, adg=True), g))
    want, t = x.numpy().astype(np.float64), times(5, 1.0)
    for now, then in itertools.pairwise(t):
        v = adg64(want, field.cond(want, now), field.uncond(want, now), now, 4.0)
        want = want - (now - then) * v
    assert close(got, want, 1e-4)


def test_adg_survives_equal_and_opposite_estimates():
    x = torch.ones(1, 4, CHANNELS)
    same = torch.full_like(x, 0.5)
    for uncond in (same, same + 1e-7, 2 - same):
        assert bool(sampler.adg(x, Velocity(same, uncond), 1.0, 7.0).isfinite().all())


def test_guidance_runs_on_the_cpu_where_the_device_has_no_float64(monkeypatch):
    """Apple's devices have no float64."""
    moved = []

    class Apple(torch.Tensor):
        @property
        def device(self):
            return torch.device("mps")

        def double(self):
            raise TypeError("no float64 here")

        def cpu(self):
            moved.append(self.shape)
            return self.as_subclass(torch.Tensor)

    wide = sampler._float64(torch.ones(1, 4, CHANNELS).as_subclass(Apple))
    assert wide.dtype == torch.float64
    assert moved


def test_cfg_interval_bounds_t_and_skips_the_unconditional_pass_outside():
    field, (x, g) = Field(), noise()
    config = SamplerConfig(steps=8, guidance=5.0, shift=3.0, cfg_start=0.5, cfg_end=0.9)
    drain(sampler.sample(field, x, config, g))
    for t, guided in field.calls:
        assert guided == (0.5 <= t <= 0.9)
    assert sampler.evaluations(config) == 8 + sum(guided for _, guided in field.calls)


def preview(model, steps=50, **changes):
    """Latents of a preview by `model`, and its configuration."""
    config = SamplerConfig(steps, shift=3.0, preview=True, **changes)
    x, g = noise()
    return drain(sampler.sample(sampler.Preview(model, config), x, config, g)), config


def test_a_preview_evaluates_two_of_five_steps_and_the_last():
    field = Field()
    _, config = preview(field, guidance=3.0)
    numbers = [0, 1, 2, 3, *range(6, 49, 3), 49]
    assert [t for t, _ in field.calls] == pytest.approx([times(50, 3.0)[i] for i in numbers])
    assert sampler.evaluated_steps(config) == numbers
    assert sampler.evaluations(config) == 2 * len(numbers) == 40


@pytest.mark.parametrize("guidance", [1.0, 4.0])
def test_a_preview_equals_all_steps_where_velocities_are_linear_in_time(guidance):
    g = torch.Generator().manual_seed(2)
    slopes = torch.randn(4, 1, FRAMES, CHANNELS, generator=g)

    def linear(_, t, guided):
        cond, uncond = slopes[0] + t * slopes[1], slopes[2] + t * slopes[3]
        return Velocity(cond, uncond if guided else None)

    got, config = preview(linear, guidance=guidance)
    x, generator = noise()
    want = drain(sampler.sample(linear, x, config, generator))
    assert torch.allclose(got, want, atol=1e-4)


def test_a_preview_is_nearer_to_all_steps_than_the_same_number_of_plain_steps():
    x, g = noise()
    want = drain(sampler.sample(Field(), x, SamplerConfig(50, shift=3.0, guidance=3.0), g))
    plain = drain(sampler.sample(Field(), x, SamplerConfig(20, shift=3.0, guidance=3.0), g))
    near, _ = preview(Field(), guidance=3.0)
    assert float((near - want).norm()) < 0.5 * float((plain - want).norm())


def test_a_preview_evaluates_where_guidance_begins_within_the_run():
    field = Field()
    preview(field, guidance=3.0, cfg_end=0.8)
    first = next(i for i, (_, guided) in enumerate(field.calls) if guided)
    inside = [t for t in times(50, 3.0)[:-1] if t <= 0.8]
    assert [t for t, _ in field.calls[first : first + 2]] == pytest.approx(inside[:2])


@pytest.mark.parametrize(
    "config", [SamplerConfig(steps=4), SamplerConfig(steps=4, adg=True), SamplerConfig(4, 1.0)]
)
def test_guidance_of_one_evaluates_only_the_condition(config):
    field, (x, g) = Field(), noise()
    drain(sampler.sample(field, x, config, g))
    assert not any(guided for _, guided in field.calls)


def test_each_step_is_reported_and_closing_stops_the_run():
    field, (x, g) = Field(), noise()
    steps = sampler.sample(field, x, SamplerConfig(steps=9), g)
    assert [next(steps) for _ in range(4)] == [0, 1, 2, 3]
    steps.close()
    assert len(field.calls) == 3


def test_after_step_keeps_known_latents_and_first_step_skips_steps():
    x, g = noise()
    known = torch.zeros_like(x)

    def hold(latents, done, t_next):
        latents = latents.clone()
        latents[:, :10] = t_next * x[:, :10] + (1 - t_next) * known[:, :10]
        return latents

    field = Field()
    steps = sampler.sample(field, x, SamplerConfig(steps=6), g, first_step=2, after_step=hold)
    seen = []
    while True:
        try:
            seen.append(next(steps))
        except StopIteration as end:
            got = end.value
            break
    assert seen == [2, 3, 4, 5, 6]
    assert [t for t, _ in field.calls] == pytest.approx(times(6, 1.0)[2:6])
    assert torch.equal(got[:, :10], known[:, :10])
    assert float(got[:, 10:].abs().mean()) > 0


def test_step_at_finds_the_step_nearest_to_a_noise_level():
    config = SamplerConfig(steps=10, shift=3.0)
    for level in (1.0, 0.8, 0.33, 0.0):
        i = sampler.step_at(config, level)
        times_ = times(10, 3.0)[:-1]
        assert abs(times_[i] - level) == min(abs(t - level) for t in times_)


def test_strength_is_a_share_of_the_remaining_steps_and_in_edition_1_of_all():
    config = SamplerConfig(steps=10)
    assert [sampler.switch_step(config, s) for s in (0.0, 0.29, 0.5, 1.0)] == [0, 2, 5, 10]
    assert [sampler.switch_step(config, s, 6) for s in (0.0, 0.25, 0.5, 1.0)] == [6, 7, 8, 10]
    assert [sampler.switch_step(config, s, 6, 1) for s in (0.0, 0.5, 1.0)] == [0, 5, 10]


def morph64(source, target, clean, steps, draws, n_min, n_max, n_avg):
    """Flow editing by its formulas, without guidance."""
    t = times(steps, 1.0)
    edit, path = clean.copy(), None
    for i in range(steps):
        if t[i] > n_max:
            continue
        if t[i] > n_min:
            moved = np.zeros_like(clean)
            for _ in range(n_avg):
                noised = (1 - t[i]) * clean + t[i] * next(draws)
                moved += target(edit + noised - clean, t[i]) - source(noised, t[i])
            edit = edit + (t[i + 1] - t[i]) * moved / n_avg
        else:
            if path is None:
                path = edit + t[i] * (next(draws) - clean)
            path = path + (t[i + 1] - t[i]) * target(path, t[i])
    return edit if path is None else path


@pytest.mark.parametrize(
    ("n_min", "n_max", "n_avg"), [(0.0, 1.0, 1), (0.3, 0.8, 2), (0.0, 0.5, 3), (0.4, 0.4, 1)]
)
def test_morph_follows_the_flow_edit_formulas(n_min, n_max, n_avg):
    clean, _ = sampler.draw_noise(21, FRAMES, CHANNELS)
    one, other = Field(3), Field(4)
    limits = {"n_min": n_min, "n_max": n_max, "n_avg": n_avg}
    g = torch.Generator().manual_seed(9)
    got = drain(sampler.morph(one, other, clean, SamplerConfig(steps=8), g, **limits))
    g = torch.Generator().manual_seed(9)
    draws = (torch.randn(clean.shape, generator=g).numpy().astype(np.float64) for _ in range(99))
    start = clean.numpy().astype(np.float64)
    assert close(got, morph64(one.cond, other.cond, start, 8, draws, **limits))


def test_morph_with_n_max_0_or_to_the_same_description_returns_the_source():
    clean, _ = sampler.draw_noise(21, FRAMES, CHANNELS)
    g = torch.Generator().manual_seed(9)
    calls = Field()
    none = sampler.morph(
        calls, calls, clean, SamplerConfig(steps=8), g, n_min=0.0, n_max=0.0, n_avg=1
    )
    assert torch.equal(drain(none), clean)
    assert calls.calls == []
    same = sampler.morph(
        Field(), Field(), clean, SamplerConfig(8), g, n_min=0.0, n_max=1.0, n_avg=1
    )
    assert torch.allclose(drain(same), clean, atol=1e-5)
