"""Builders run with mimalloc where it is installed."""

from __future__ import annotations

import sys
from importlib import metadata
from pathlib import Path

import pytest
from small_graphs import write_fp8_linear
from test_tensorrt import replace_worker

from pi05c.backend.allocator import with_mimalloc
from pi05c.backend.targets import Flavour
from pi05c.backend.tensorrt import BuildOptions, build
from pi05c.graph.errors import BuildError

COMMAND = ("build", "it")


def install(folder: Path, *, whole: bool = True) -> Path:
    """Make up an installed mimalloc in the folder; one that is not whole lacks its library."""
    library = folder / "cmeel.prefix" / "lib" / "libmimalloc.so"
    library.parent.mkdir(parents=True)
    if whole:
        library.touch()
    info = folder / "cmeel_mimalloc-3.4.3.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: cmeel-mimalloc\nVersion: 3.4.3\n")
    (info / "RECORD").write_text("cmeel.prefix/lib/libmimalloc.so,,\ncmeel.prefix/lib/libmimalloc.so.3,,\n")
    return library


@pytest.fixture(autouse=True)
def no_preload(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LD_PRELOAD", raising=False)


def test_the_library_is_preloaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    library = install(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    assert with_mimalloc(COMMAND) == ("env", f"LD_PRELOAD={library}", *COMMAND)


def test_an_allocator_of_the_user_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv("LD_PRELOAD", "libjemalloc.so.2")
    assert with_mimalloc(COMMAND) == COMMAND


def test_a_library_that_is_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install(tmp_path, whole=False)
    monkeypatch.syspath_prepend(str(tmp_path))
    assert with_mimalloc(COMMAND) == COMMAND


def test_a_package_that_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", [])
    assert with_mimalloc(COMMAND) == COMMAND


@pytest.mark.parametrize("name", ["my robot", "robot:1"])
def test_a_path_that_the_variable_cannot_name(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    install(tmp_path / name)
    monkeypatch.setattr(sys, "path", [str(tmp_path / name), *sys.path])
    assert with_mimalloc(COMMAND) == COMMAND


def installed() -> bool:
    try:
        return bool(metadata.version("cmeel-mimalloc"))
    except metadata.PackageNotFoundError:
        return False


@pytest.mark.skipif(sys.platform != "linux" or not installed(), reason="mimalloc is not installed")
@pytest.mark.parametrize(("flavour", "loaded"), [(Flavour.TENSORRT_RTX, True), (Flavour.TENSORRT, False)])
def test_tensorrt_rtx_allocates_by_it(
    flavour: Flavour, loaded: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    replace_worker(monkeypatch, "print('[E] loaded', 'libmimalloc' in open('/proc/self/maps').read())")
    model = write_fp8_linear(tmp_path / "model.onnx")
    reproducer = tmp_path / "failed"
    with pytest.raises(BuildError, match=f"loaded {loaded}"):
        build(model, tmp_path / "model.engine", BuildOptions(flavour), reproducer_dir=reproducer)
    assert ("LD_PRELOAD" in (reproducer / "reproduce.sh").read_text()) == loaded
