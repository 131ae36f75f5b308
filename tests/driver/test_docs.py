"""The README and docs/ say what is true of the code, as far as that can be checked without compiling a model."""

from __future__ import annotations

import argparse
import json
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import onnx_graphsurgeon as gs
import pytest
import typer
from onnx import parser
from polygraphy.tools.registry import TOOL_REGISTRY

import pi05c
from pi05c import passdocs
from pi05c.backend.inductor import INDUCTOR
from pi05c.backend.targets import TARGETS, Flavour
from pi05c.cli import app
from pi05c.frontend.config import CONFIGS
from pi05c.graph.io import model_from_proto
from pi05c.passes import PRESETS, REGISTRY, graph_pass
from pi05c.passes.contract import PassContext
from pi05c.passes.patterns.walk import each_node, made_by, output_ids
from pi05c.passes.pipeline import Step, parse, run
from pi05c.pipelinefile import MARK
from pi05c.splitting import parse_part_passes, parse_split

ROOT = Path(__file__).parents[2]
README = ROOT / "README.md"
DOCS = ROOT / "docs"
PAGES = (README, *sorted(DOCS.rglob("*.md")))

_FENCE = re.compile(r"^```\w*\n(?P<body>.*?)^```$", re.MULTILINE | re.DOTALL)
_INDENTED = re.compile(r"(?:^ {4}.+\n)+", re.MULTILINE)
_CODE_SPAN = re.compile(r"`(?P<body>[^`\n]+)`")
_OPTION = re.compile(r"(?<![\w-])--[a-z]+(?:-[a-z]+)*(?![\w-])")
_LINK = re.compile(r"\]\((?P<target>[^)#\s]+)[^)]*\)")
_PROMPT = re.compile(r"^\$ ")


def _polygraphy_options() -> set[str]:
    """The options of Polygraphy's tools, with those that pi05c adds to `run`."""
    parser = argparse.ArgumentParser()
    tools = parser.add_subparsers()
    for tool in TOOL_REGISTRY:
        tool.setup_parser(tools)
    return set(_options_of(parser))


def _options_of(parser: argparse.ArgumentParser) -> Iterator[str]:
    for action in parser._actions:
        yield from action.option_strings
        if isinstance(action, argparse._SubParsersAction):
            for tool in action.choices.values():
                yield from _options_of(tool)


OTHER_TOOLS = {"--update-golden", *_polygraphy_options()}
"""Options of other programs that the pages name: pytest's, of `tests/conftest.py`, and Polygraphy's."""


@dataclass(frozen=True)
class Invocation:
    """One pi05c command line that a page shows."""

    page: str
    words: tuple[str, ...]

    def __str__(self) -> str:
        return f"{self.page}: {' '.join(self.words)}"


def _snippets(text: str) -> list[str]:
    """Lines of code blocks, and code spans."""
    fenced = [match["body"] for match in _FENCE.finditer(text)]
    rest = _FENCE.sub("", text)
    blocks = [*fenced, *(match[0] for match in _INDENTED.finditer(rest))]
    lines = [_PROMPT.sub("", line.strip()) for block in blocks for line in block.splitlines()]
    return [*lines, *(match["body"] for match in _CODE_SPAN.finditer(_INDENTED.sub("", rest)))]


def _invocations() -> list[Invocation]:
    found = []
    for page in PAGES:
        for snippet in _snippets(page.read_text()):
            if snippet.startswith("pi05c "):
                words = shlex.split(snippet, comments=True)[1:]
                if words[0].isupper() or words[0] == "--help":  # `pi05c COMMAND --help`, `pi05c --help`
                    continue
                found.append(Invocation(page.name, tuple(words)))
    return found


def _commands() -> dict[str, set[str]]:
    """Every command with its options, as the command line declares them; a group has those of its commands."""
    group = typer.main.get_command(app)
    return {
        name: {
            option
            for inner in (command, *getattr(command, "commands", {}).values())
            for parameter in inner.params
            for option in (*parameter.opts, *parameter.secondary_opts)
        }
        | {"--help", "-h"}
        for name, command in group.commands.items()  # type: ignore[attr-defined]
    }


COMMANDS = _commands()
INVOCATIONS = _invocations()


def test_pages_show_every_command() -> None:
    shown = {words.words[0] for words in INVOCATIONS}
    assert set(COMMANDS) <= shown


@pytest.mark.parametrize("invocation", INVOCATIONS, ids=str)
def test_shown_command_lines_exist(invocation: Invocation) -> None:
    first, *_ = invocation.words
    if first not in COMMANDS:
        assert first.endswith(".onnx"), f"{first!r} is neither a command nor a model"
        first = "compile"
    options = [word.split("=")[0] for word in invocation.words if word.startswith("-")]
    assert set(options) <= COMMANDS[first]


@pytest.mark.parametrize("invocation", INVOCATIONS, ids=str)
def test_shown_values_exist(invocation: Invocation) -> None:
    names = {name for target in TARGETS for name in (target.name, *target.aliases)}
    options = dict(zip(invocation.words, invocation.words[1:], strict=False))
    for option, value in options.items():
        if option == "--passes" and "--split" in options:
            parse_part_passes(value, parse_split(options["--split"]))
        elif option == "--passes" and "--plugin" not in options and not value.startswith(MARK):
            parse(value, PRESETS)
        elif option == "--target":
            assert set(value.split(",")) <= names
        elif option == "--config":
            assert value in CONFIGS
        elif option == "--backend":
            assert value in {"onnxruntime", INDUCTOR, *(flavour.value for flavour in Flavour)}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_named_options_exist(page: Path) -> None:
    known = set().union(*COMMANDS.values(), OTHER_TOOLS)
    assert set(_OPTION.findall(page.read_text())) <= known


def test_pipelines_in_the_readme_parse() -> None:
    spans = [match["body"] for match in _CODE_SPAN.finditer(README.read_text())]
    pipelines = [span for span in spans if span.startswith("default,")]
    assert pipelines
    for text in pipelines:
        parse(text, PRESETS)


def test_readme_lists_the_default_passes_in_order() -> None:
    listed = re.findall(r"^\d+\. `(\w+)`", README.read_text(), re.MULTILINE)
    assert tuple(listed) == PRESETS["default"]


def test_readme_states_the_versions_of_python() -> None:
    oldest, newest = re.search(r"Python (3\.\d+) to (3\.\d+)", README.read_text()).groups()  # type: ignore[union-attr]
    limit = f'requires-python = ">={oldest},<3.{int(newest.split(".")[1]) + 1}"'
    assert limit in (ROOT / "pyproject.toml").read_text()


def test_readme_names_every_extra() -> None:
    text = (ROOT / "pyproject.toml").read_text()
    section = text.split("[project.optional-dependencies]\n")[1].split("\n\n")[0]
    extras = re.findall(r"^(\w+) = \[", section, re.MULTILINE)
    assert re.findall(r"^\| `\[(\w+)\]`", README.read_text(), re.MULTILINE) == extras


def test_python_example_names_what_pi05c_has() -> None:
    named = set(re.findall(r"\bpi05c\.(\w+)\(", README.read_text())) | set(
        re.findall(r"`pi05c\.([a-z]+)`", README.read_text())
    )
    assert named == set(pi05c.__all__)


def test_links_lead_somewhere() -> None:
    for page in PAGES:
        for match in _LINK.finditer(page.read_text()):
            target = match["target"]
            if "://" not in target:
                assert (page.parent / target).exists(), f"{page.name} links to {target}"


# docs/passes


def test_pass_pages_are_those_that_make_docs_writes() -> None:
    stored = {path.name: path.read_text() for path in (DOCS / "passes").iterdir()}
    made = passdocs.pages(ROOT / "golden")
    assert stored.keys() == made.keys(), "run `make docs`"
    for name, text in made.items():
        assert stored[name] == text, f"docs/passes/{name}: run `make docs`"


@pytest.mark.parametrize("name", REGISTRY)
def test_pass_page_holds_docstring_options_and_every_golden_case(name: str) -> None:
    page = (DOCS / "passes" / f"{name}.md").read_text()
    docstring = " ".join((REGISTRY[name].function.__doc__ or "").split())
    assert docstring
    assert docstring in " ".join(page.split())
    assert all(f"`{key}={option.default}`" in page for key, option in REGISTRY[name].options.items())
    cases = list((ROOT / "golden" / name).glob("*.after.txt"))
    assert len(cases) >= 3
    assert all(case.read_text() in page for case in cases)


def test_index_lists_default_order_and_presets() -> None:
    text = (DOCS / "passes" / "README.md").read_text()
    rows = re.findall(r"^\| \[(\w+)\]", text, re.MULTILINE)
    assert rows == list(dict.fromkeys([*PRESETS["default"], *REGISTRY]))
    for name, members in PRESETS.items():
        assert f"- `{name}`: {', '.join(members) or 'nothing'}\n" in text


def test_pass_pages_of_passes_that_are_gone_are_removed(tmp_path: Path) -> None:
    (tmp_path / "gone.md").write_text("old")
    passdocs.main([str(ROOT / "golden"), str(tmp_path)])
    assert {path.name for path in tmp_path.iterdir()} == {path.name for path in (DOCS / "passes").iterdir()}


# docs/targets.md


def test_target_table_is_that_of_the_code() -> None:
    rows = re.findall(r"^\| (sm\d+) \|.*$", (DOCS / "targets.md").read_text(), re.MULTILINE)
    assert rows == [target.name for target in TARGETS]
    lines = (DOCS / "targets.md").read_text().splitlines()
    for target in TARGETS:
        cells = [
            target.name,
            target.architecture,
            ", ".join(name.upper() for name in target.formats),
            ", ".join(flavour.product for flavour in target.flavours),
            ", ".join(target.aliases),
        ]
        assert f"| {' | '.join(cells)} |" in lines


# docs/architecture.md and docs/writing-a-pass.md


def test_named_files_exist() -> None:
    for page in PAGES:
        for row in re.findall(r"^\| `([\w/]+)` \|.*$", page.read_text(), re.MULTILINE):
            assert page != DOCS / "architecture.md" or (ROOT / row).is_dir(), row
    for line in (DOCS / "architecture.md").read_text().splitlines():
        cells = line.split("|")
        if len(cells) > 3 and (folder := ROOT / cells[1].strip(" `")).is_dir():
            for name in re.findall(r"`(\w+\.py|\w+/)`", line):
                assert (folder / name).exists(), f"{folder.name}/{name}"


def _example() -> str:
    return next(match["body"] for match in _FENCE.finditer((DOCS / "writing-a-pass.md").read_text()))


def test_example_pass_does_what_its_page_says() -> None:
    known = dict(REGISTRY)
    scope = {
        "graph_pass": graph_pass,
        "gs": gs,
        "PassContext": PassContext,
        "each_node": each_node,
        "made_by": made_by,
        "output_ids": output_ids,
        "__name__": "example",
    }
    try:
        exec(compile(_example(), "writing-a-pass.md", "exec", dont_inherit=True), scope)
        (name,) = REGISTRY.keys() - known.keys()
        spec = REGISTRY[name]
        model = model_from_proto(
            parser.parse_model(
                """<ir_version: 10, opset_import: ["": 21]>
                example (float[4] x) => (float[4] y, float[4] z) {
                  a = Neg(x)
                  b = Neg(a)
                  y = Exp(b)
                  z = Neg(a)
                }"""
            )
        )
        first = run(model, [Step(spec)])[0]
        assert (len(first.changes), len(first.skips)) == (1, 1)
        exp = next(node for node in model.graph.nodes if node.op == "Exp")
        assert exp.inputs[0].name == "x"
        assert run(model, [Step(spec)])[0].changes == ()
    finally:
        for added in REGISTRY.keys() - known.keys():
            del REGISTRY[added]


def test_readme_sample_of_a_refusal_is_what_is_printed(tmp_path: Path) -> None:
    message = next(
        line.strip() for line in README.read_text().splitlines() if line.strip().startswith("error:")
    )
    model = tmp_path / "model.onnx"
    model.write_bytes(b"")  # the target is refused before the model is read
    command = [sys.executable, "-m", "pi05c", str(model), "--passes", "default", "--target", "orin"]
    done = subprocess.run([*command, "-o", str(tmp_path / "engine")], capture_output=True, text=True)
    assert (done.returncode, done.stderr.strip()) == (1, message)


# docs/results.md


def test_results_are_those_of_the_raw_files() -> None:
    results = ROOT / "benchmarks" / "results"
    raw = json.loads((results / "h100_pi05_libero.json").read_text())
    page = (DOCS / "results.md").read_text()
    assert raw["card"] in page
    for title, key in (("BF16, `torch.compile`", "baseline"), ("`fp16`", "fp16"), ("`default`", "default")):
        run = raw[key]
        times = [run["whole"]["median_ms"], run["whole"]["p95_ms"], run["prefix"]["median_ms"]]
        times += [run["steps"]["median_ms"], run["steps"]["p95_ms"]]
        kernels = [str(run["profile"][part]["kernels"]) for part in ("prefix", "steps")]
        assert f"| {' | '.join([title, *(f'{ms:.2f}' for ms in times), *kernels])} |" in page
    ratio = {
        key: raw[key]["whole"]["median_ms"] / raw["baseline"]["whole"]["median_ms"]
        for key in ("fp16", "default")
    }
    steps = raw["default"]["steps"]["median_ms"] / raw["baseline"]["steps"]["median_ms"]
    for figure, value in (
        ("`fp16`, whole", ratio["fp16"]),
        ("`default`, whole", ratio["default"]),
        ("`default`, ten steps", steps),
    ):
        assert re.search(
            rf"^\| {re.escape(figure)} \| [^|]+ \| {value:.2f} \| reached \|$", page, re.MULTILINE
        )
    readme = " ".join(README.read_text().split())
    assert f"the graph of `fp16` takes {ratio['fp16']:.2f} of the time of the plain model" in readme
    assert f"that of `default` {ratio['default']:.2f}" in readme

    tables = json.loads((results / "h100_pi05_libero_tables.json").read_text())
    whole = tables["pass 14 disable_conv2d_quant"]
    cells = [f"{whole[f'steps {count}']['median_ms']:.2f}" for count in (1, 2, 4, 6, 8, 10)]
    assert f"| ms | {' | '.join(cells)} |" in page
    for views, masks in ((3, "1,1,1"), (2, "1,1,0"), (1, "1,0,0")):
        times = [tables[f"views {views}"][key]["median_ms"] for key in ("whole", "prefix")]
        assert f"| `specialize{{views={masks}}}` | {times[0]:.2f} | {times[1]:.2f} |" in page
    passes = json.loads((results / "h100_pi05_libero_passes.json").read_text())
    nothing = passes.pop("passes with nothing to do")
    assert all(f"`{name}`" in page for name in nothing)
    for name, run in passes.items():
        row = rf"^\| .*`{name.split()[-1]}`(, `fuse_denoise_loop`)? \| {run['whole']['median_ms']:.2f} \| "
        row += rf"{run['prefix']['median_ms']:.2f} \| {run['kernels']} \|$"
        assert re.search(row, page, re.MULTILINE), name
