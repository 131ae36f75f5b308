"""Passes of other people: a Python file, or an installed package's entry point in the group `pi05c.passes`.

A plug-in registers its passes with `pi05c.passes.graph_pass` when it is imported, and is imported only when it is
named: by `--plugin`, or, an entry point, by the name of its pass in the pipeline's text.
"""

from __future__ import annotations

import hashlib
import importlib.machinery
import importlib.util
import sys
from collections.abc import Callable, Iterable
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path

from pi05c.graph.errors import Pi05cError
from pi05c.passes import PRESETS, REGISTRY
from pi05c.passes.pipeline import Step, named, parse
from pi05c.pipelinefile import expand

GROUP = "pi05c.passes"
"""The group of entry points; each is named after the pass that it registers, or, with several, as it likes."""

_loaded: dict[str, frozenset[str]] = {}
"""The passes that each plug-in registered, by what it was loaded from."""


def parse_passes(text: str, plugins: Iterable[str | Path] = ()) -> tuple[Step, ...]:
    """Load plug-ins and read a pipeline's text, in which their passes stand like any others, and `@FILE` for a file's.

    Args:
        plugins: as `load_plugin` takes them.

    Raises:
        Pi05cError: a plug-in or a file cannot be loaded.
        UsageError: as `pi05c.passes.pipeline.parse`.
    """
    for plugin in plugins:
        load_plugin(plugin)
    text = expand(text)
    for name in named(text):
        if name not in REGISTRY and name not in PRESETS:
            for point in entry_points(group=GROUP, name=name):
                _load_entry_point(point)
    return parse(text, PRESETS)


def load_plugin(plugin: str | Path) -> None:
    """Load a file, or the entry point of that name.

    Raises:
        Pi05cError: there is no such file or entry point, it fails, or it registers no pass.
    """
    path = Path(plugin)
    if path.suffix == ".py" or path.exists():
        if not path.is_file():
            raise Pi05cError(f"there is no plug-in {path}: name a Python file that registers passes")
        _load_file(path.resolve())
        return
    points = entry_points(group=GROUP, name=str(plugin))
    if not points:
        known = ", ".join(sorted({point.name for point in entry_points(group=GROUP)})) or "none"
        raise Pi05cError(
            f"plug-in {str(plugin)!r} is neither a .py file nor an entry point in the group {GROUP} (installed: {known})"
        )
    for point in points:
        _load_entry_point(point)


def _load_file(path: Path) -> None:
    name = f"{path.stem}_{hashlib.sha256(str(path).encode()).hexdigest()[:8]}"

    def execute() -> None:
        loader = importlib.machinery.SourceFileLoader(name, str(path))
        spec = importlib.util.spec_from_loader(name, loader)
        assert spec is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[name] = module
        loader.exec_module(module)

    _register(str(path), execute)


def _load_entry_point(point: EntryPoint) -> None:
    _register(f"{point.name} ({point.value})", lambda: point.load())


def _register(source: str, load: Callable[[], object]) -> None:
    """Run `load`, which registers passes, all of them or none."""
    if _loaded.get(source, frozenset({""})) <= REGISTRY.keys():
        return
    before = dict(REGISTRY)
    try:
        load()
    except (Exception, SystemExit) as error:
        REGISTRY.clear()
        REGISTRY.update(before)
        reason = str(error) if isinstance(error, Pi05cError) else f"{type(error).__name__}: {error}"
        raise Pi05cError(f"plug-in {source} cannot be loaded: {reason}") from error
    added = frozenset(REGISTRY.keys() - before.keys())
    if not added:
        raise Pi05cError(
            f"plug-in {source} registers no pass: decorate a function with pi05c.passes.graph_pass(exact=...)"
        )
    _loaded[source] = added


__all__ = ["GROUP", "load_plugin", "parse_passes"]
