"""Packaging, the Space's configuration, licences, no torchaudio."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
import tomllib
from importlib.metadata import distribution, version

import pytest
import yaml
from conftest import ROOT
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from models import catalog

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
BROUGHT_BY_THE_SPACE = {"gradio", "spaces", "huggingface-hub"}
ZEROGPU_TORCH = ("2.8.0", "2.9.1", "2.10.0", "2.11.0")
"""What ZeroGPU documents to support."""


def plain(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def requirements(lines) -> dict[str, Requirement]:
    found = [Requirement(line) for line in lines if line.strip() and not line.startswith("#")]
    return {plain(r.name): r for r in found}


OURS = requirements(PROJECT["dependencies"])
SPACE = requirements((ROOT / "requirements.txt").read_text().splitlines())
TESTED = requirements((ROOT / "constraints.txt").read_text().splitlines())


def test_the_space_installs_what_the_project_needs_and_not_what_it_brings():
    assert SPACE.keys() == OURS.keys() - BROUGHT_BY_THE_SPACE
    for name, requirement in SPACE.items():
        if name != "torch":
            assert requirement.specifier == OURS[name].specifier


def test_the_space_takes_a_torch_that_zerogpu_has():
    assert all(SPACE["torch"].specifier.contains(v) for v in ZEROGPU_TORCH)
    assert not SPACE["torch"].specifier.contains("2.12.0")


def test_every_dependency_has_the_exact_version_that_was_tested():
    extras = [r for rows in PROJECT["optional-dependencies"].values() for r in rows]
    for name, requirement in (OURS | requirements(extras)).items():
        (pin,) = TESTED[name].specifier
        assert pin.operator == "=="
        assert requirement.specifier.contains(pin.version), name
        assert version(name).split("+")[0] == pin.version, f"{name}: make install again"
    assert str(TESTED["torch"].specifier) == "==2.13.0"


def test_every_range_has_a_lower_and_an_upper_end():
    extras = [r for rows in PROJECT["optional-dependencies"].values() for r in rows]
    for name, requirement in {**OURS, **requirements(extras), **SPACE}.items():
        if name != "spaces":
            assert {part.operator for part in requirement.specifier} == {">=", "<"}, name


def test_spaces_is_never_pinned_by_us():
    assert str(OURS["spaces"].specifier) == ""


def test_both_pythons_are_declared():
    assert all(v in SpecifierSet(PROJECT["requires-python"]) for v in ("3.11.7", "3.12.12"))
    assert "3.13.0" not in SpecifierSet(PROJECT["requires-python"])


def test_torchaudio_never_comes_in():
    assert importlib.util.find_spec("torchaudio") is None
    assert "torchaudio" not in TESTED
    for name in OURS:
        needs = distribution(name).requires or []
        assert not [n for n in needs if n.startswith("torchaudio") and "extra" not in n], name


def test_every_package_is_installed():
    tool = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]
    modules = {p.stem for p in ROOT.glob("*.py")} - {"bench"}
    packages = {p.parent.name for p in ROOT.glob("*/__init__.py")} - {"mini"}
    assert set(tool["setuptools"]["py-modules"]) == modules
    assert set(tool["setuptools"]["packages"]) == packages


FRONT = yaml.safe_load((ROOT / "README.md").read_text().split("---\n")[1])
KEYS = {
    *("title", "emoji", "colorFrom", "colorTo", "sdk", "sdk_version", "python_version"),
    *("app_file", "base_path", "fullWidth", "header", "short_description", "models", "datasets"),
    *("tags", "license", "pinned", "thumbnail", "suggested_hardware", "suggested_storage"),
    *("preload_from_hub", "startup_duration_timeout", "hf_oauth", "disable_embedding"),
}
COLOURS = {"red", "yellow", "green", "blue", "indigo", "purple", "pink", "gray"}


def test_front_matter_has_known_keys_and_legal_values():
    from huggingface_hub import SpaceHardware

    assert FRONT.keys() <= KEYS
    assert {FRONT["colorFrom"], FRONT["colorTo"]} <= COLOURS
    assert FRONT["sdk"] == "gradio"
    assert FRONT["sdk_version"] == version("gradio")
    assert FRONT["python_version"] in ("3.10", "3.12"), "a string, and one ZeroGPU documents"
    assert (ROOT / FRONT["app_file"]).is_file()
    assert len(FRONT["short_description"]) <= 60
    assert FRONT["header"] in ("mini", "default")
    assert FRONT["license"] == "mit"
    assert FRONT["suggested_hardware"] in {h.value for h in SpaceHardware}
    assert re.fullmatch(r"\d+[smh]", FRONT["startup_duration_timeout"])


def test_the_space_preloads_the_model_it_plays():
    wanted = catalog.MODELS[catalog.default_name("cuda")].repo
    assert FRONT["preload_from_hub"] == [wanted]
    assert wanted in FRONT["models"]


def test_the_readme_and_the_table_of_models_agree():
    rows = re.findall(r"^\| `([\w-]+)` \|.*\| ([^|]+) \|([^|]+)\|([^|]+)\|$", README, re.M)
    assert {row[0] for row in rows} == catalog.MODELS.keys()
    for name, size, sold, defaults in rows:
        model = catalog.MODELS[name]
        assert size.strip() == model.size
        assert (sold.split()[0] == "yes") == model.may_sell
        guidance = "none" if model.guidance == 1 else f"{model.guidance:g}"
        assert defaults.strip() == f"{model.steps}, {guidance}, {model.shift:g}"


README = (ROOT / "README.md").read_text()


@pytest.mark.parametrize("name", sorted(OURS))
def test_notice_names_every_dependency(name):
    assert re.search(rf"^  {name.replace('-', '[-_]')}\b", (ROOT / "NOTICE").read_text(), re.M)


def test_the_commands_of_the_readme_are_in_the_makefile():
    targets = set(re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), re.M))
    assert set(re.findall(r"^make (\w+)", README, re.M)) <= targets
    assert {"install", "run", "test", "check", "bench"} <= targets


def test_nothing_that_a_file_contains_is_executed():
    listed = subprocess.run(
        ["git", "ls-files", "*.py"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.split()
    for name in listed:
        if name.startswith("tests/") or name == "vendor":
            continue
        text = (ROOT / name).read_text()
        assert "trust_remote_code=True" not in text, name
        assert not re.search(r"pickle\.loads?\(", text), name
        assert not re.search(r"torch\.load\((?!.*weights_only=True)", text), name


def test_the_container_installs_the_dependencies_of_the_project():
    """Its build reads them from pyproject.toml with this one line."""
    steps = (ROOT / "Dockerfile").read_text("utf-8").replace("\\\n", " ")
    (code,) = re.findall(r'RUN python -c "(.*?)" >', steps)
    printed = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    expected = PROJECT["dependencies"] + PROJECT["optional-dependencies"]["mcp"]
    assert printed.stdout.splitlines() == expected
    assert "--constraint constraints.txt" in steps
    assert steps.index("USER studio") < steps.index("ENTRYPOINT")


def test_the_container_gets_every_package_and_file_that_the_studio_reads():
    ignored = (ROOT / ".dockerignore").read_text("utf-8").splitlines()
    setup = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    needed = {*setup["packages"], *(f"{name}.py" for name in setup["py-modules"])}
    needed |= {"assets", "vendor", "pyproject.toml", "constraints.txt", "LICENSE", "NOTICE"}
    assert not needed & set(ignored)


def test_the_compose_file_serves_this_computer_alone():
    compose = yaml.safe_load((ROOT / "compose.yaml").read_text("utf-8"))
    assert set(compose["services"]) == {"studio", "cuda", "rocm"}
    for name, service in compose["services"].items():
        assert all(port.startswith("127.0.0.1:") for port in service["ports"])
        assert service["volumes"] == ["models:/models"]
        assert service.get("profiles", [name]) == [name], "only the first starts by itself"
