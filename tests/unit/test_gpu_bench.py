"""The benchmark of a GPU, run small on the CPU, and what it counts."""

from __future__ import annotations

import re
import sys

import pytest
import torch

from models import gpu_bench, random_weights, step_counts
from models.fast_transformer import FastTransformer

ABSENT = "spaces gradio soundfile av scipy platformdirs psutil soxr demucs".split()


@pytest.mark.slow
def test_every_line_runs_on_a_cpu_without_the_packages_of_the_page(monkeypatch):
    for name in ABSENT:
        monkeypatch.setitem(sys.modules, name, None)
    rows = gpu_bench.run(tiny=True, budget_s=300)
    failed = [row for row in rows if row[1] in ("FAILED", "left out")]
    assert not failed
    sections = "machine attention launches step planner song takes decode stock"
    assert {section for section, _, _ in rows} == set(sections.split())
    equal = [re.search(r"(\d+) of (\d+) equal", value) for _, _, value in rows]
    assert [match.groups() for match in equal if match] == [("8", "8")] * 3


def test_sections_beyond_the_budget_are_left_out_by_name(capsys):
    report = gpu_bench.Report(budget_s=0)
    assert not report.has_time("step", 30)
    assert report.rows == [("step", "left out", "needs 30 s, 0 s are left")]
    with report.attempt("song"):
        raise RuntimeError("no kernel image")
    assert report.rows[1] == ("song", "FAILED", "RuntimeError: no kernel image")
    assert "no kernel image" in capsys.readouterr().out


def test_a_prepared_step_launches_half_as_often():
    stock = random_weights.build_transformer("meta", torch.bfloat16, tiny=True)
    fast = FastTransformer(random_weights.twin_of(stock))
    before, after = (
        step_counts.count_launches(each, stock.config, torch.bfloat16, frames=750, tokens=900)
        for each in (stock, fast)
    )
    assert after < 0.6 * before, (before, after)
