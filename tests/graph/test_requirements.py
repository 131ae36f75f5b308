"""Versions that are not supported are refused in a sentence, by the bounds that the package states."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.version import Version

from pi05c.graph.errors import Pi05cError
from pi05c.graph.requirements import refuse_unsupported, unsupported

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).parents[2]


def pretend(folder: Path, name: str, version: str) -> None:
    """Let a folder on the path hold the metadata of a package, as pip writes them."""
    place = folder / f"{name.replace('-', '_')}-{version}.dist-info"
    place.mkdir()
    (place / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")


def needed(name: str) -> Requirement:
    """What pi05c requires of a package."""
    return next(found for found in map(Requirement, metadata.requires("pi05c") or ()) if found.name == name)


def test_what_the_tests_run_with_is_supported() -> None:
    assert unsupported() is None


@pytest.mark.parametrize(
    ("name", "version"), [("onnx", "1.2.0"), ("onnx-graphsurgeon", "0.7.0"), ("numpy", "1.20")]
)
def test_too_old_or_too_new(name: str, version: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(tmp_path, name, version)
    monkeypatch.syspath_prepend(str(tmp_path))
    wanted = f"{name}{needed(name).specifier}"
    with pytest.raises(Pi05cError) as error:
        refuse_unsupported()
    assert (
        str(error.value) == f"{name} {version} is installed, but pi05c needs {wanted}: pip install '{wanted}'"
    )


def test_all_of_them_are_in_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(tmp_path, "onnx", "1.2.0")
    pretend(tmp_path, "onnxruntime", "1.3.0")
    monkeypatch.syspath_prepend(str(tmp_path))
    said = unsupported()
    assert said is not None
    assert said.startswith("onnx 1.2.0 and onnxruntime 1.3.0 are installed, but pi05c needs onnx>=")
    assert re.search(r": pip install 'onnx>=[\d.]+' 'onnxruntime>=[\d.]+'$", said)


def test_an_extra_is_looked_at_where_it_is_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(tmp_path, "tensorrt-rtx", "1.0.0.21")
    pretend(tmp_path, "torch", "1.13.1+cpu")
    monkeypatch.syspath_prepend(str(tmp_path))
    assert unsupported() is None
    assert (unsupported("pi05c[rtx]") or "").startswith("tensorrt-rtx 1.0.0.21 is installed")
    assert (unsupported("pi05c[torch,modelopt]") or "").startswith("torch 1.13.1+cpu is installed")


@pytest.mark.parametrize("suffix", ["+cpu", "a0+872d972e41.nv25.08", "rc1"])
def test_a_build_of_the_oldest_version(suffix: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (oldest,) = (each.version for each in needed("torch").specifier if each.operator == ">=")
    pretend(tmp_path, "torch", f"{oldest}.0{suffix}")
    monkeypatch.syspath_prepend(str(tmp_path))
    assert unsupported("pi05c[torch]") is None


@pytest.mark.parametrize(
    ("words", "status"),
    [(["passes"], 1), (["model.onnx", "-o", "engine"], 1), (["diff", "a.onnx", "b.onnx"], 2)],
)
def test_every_command_refuses_before_it_reads_anything(
    words: list[str], status: int, tmp_path: Path
) -> None:
    pretend(tmp_path, "onnxruntime", "1.3.0")
    command = [sys.executable, "-m", "pi05c", *words]
    path = os.pathsep.join((str(tmp_path), str(ROOT)))
    done = subprocess.run(
        command,
        env={**os.environ, "PYTHONPATH": path},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == status
    assert done.stdout == ""
    assert done.stderr.startswith("error: onnxruntime 1.3.0 is installed, but pi05c needs onnxruntime>=")
    assert len(done.stderr.splitlines()) == 1


def test_so_does_the_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import pi05c

    pretend(tmp_path, "polygraphy", "0.40.0")
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(Pi05cError, match=r"polygraphy 0\.40\.0 is installed"):
        pi05c.load  # noqa: B018


def test_a_tree_that_is_not_installed_is_not_held_to_bounds(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> list[str]:
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "requires", missing)
    assert unsupported() is None


def test_make_versions_runs_the_oldest_versions_that_are_supported() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    stated = [*project["dependencies"], *extras["rtx"], *extras["lerobot"]]
    bounds = {
        requirement.name: each.version
        for requirement in map(Requirement, stated)
        for each in requirement.specifier
        if each.operator == ">="
    }
    lines = (ROOT / "constraints-oldest.txt").read_text().splitlines()
    pins = [Requirement(line) for line in lines if not line.startswith("#")]
    pinned = {pin.name: str(pin.specifier).removeprefix("==") for pin in pins}
    assert pinned.keys() == bounds.keys()
    for name, bound in bounds.items():
        assert Version(pinned[name]).release[: len(Version(bound).release)] == Version(bound).release, name
