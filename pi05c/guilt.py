"""What `pi05c bisect` found: as values, as text, and as the README of the reproducer."""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from html import escape
from pathlib import Path
from typing import Any

from pi05c.criterion import Verdict
from pi05c.cutout import Border, Cutout
from pi05c.diffing import ModelDiff
from pi05c.diffview import Line, code, fenced, text_lines
from pi05c.graph.files import write_text
from pi05c.stages import RANGES, SAMPLES
from pi05c.terminal import printable

BEFORE, AFTER = "before.onnx", "after.onnx"
PIPELINE, README, LOADER, RECORD = "pipeline.txt", "README.md", "load_inputs.py", "bisect.json"


@dataclass(frozen=True)
class Trial:
    """One graph that was judged: `03-fold_gqa`, or `03-fold_gqa.5` with the first 5 rewrites of that pass."""

    title: str
    verdict: Verdict


@dataclass(frozen=True)
class Guilty:
    """What broke the graph.

    Attributes:
        stage: number and name of the pass, as its stage is called.
        step: the pass as pipeline text.
        rewrite: which of its rewrites, counted from 1; 0 for what comes before the first, such as another opset; one
            more than `rewrites` for what comes behind the last; None where the pass alone was found.
        rewrites: how many it makes; None where it does not get that far.
        names: the nodes and tensors that the rewrite names.
        before, after: what the criterion says of the graph without it and with it.
        diff: of those two graphs; None where there is no second one.
        cutout: the nodes in which they differ; None where there are none.
        trouble: why the rewrite was not looked for or cut out; empty where it was.
    """

    stage: str
    step: str
    rewrite: int | None
    rewrites: int | None
    names: tuple[str, ...]
    before: Verdict
    after: Verdict
    diff: ModelDiff | None = None
    cutout: Cutout | None = None
    trouble: str = ""

    @property
    def pass_name(self) -> str:
        """`fold_gqa` of the stage `03-fold_gqa`."""
        return self.stage.split("-", 1)[1]

    @property
    def title(self) -> str:
        """One phrase for the rewrite."""
        if self.rewrite is None:
            return f"{self.stage} is the first bad pass"
        if self.rewrite == 0:
            return f"{self.stage} is the first bad pass, before its first rewrite: by raising the opset"
        if self.rewrites is not None and self.rewrite > self.rewrites:
            return f"{self.stage} is the first bad pass, by what it does without recording it as a rewrite"
        of = "" if self.rewrites is None else f" of {self.rewrites}"
        named = f": {', '.join(self.names)}" if self.names else ""
        return f"{self.stage} is the first bad pass, by rewrite {self.rewrite}{of}{named}"


@dataclass(frozen=True)
class BisectResult:
    """What `pi05c.bisection.bisect` found.

    Attributes:
        trials: each graph that was judged, in that order.
        guilty: None where nothing is wrong.
        start: the dumped stage in `folder` that the guilty pass runs on.
        folder: the reproducer; None where there is none.
    """

    trials: tuple[Trial, ...]
    guilty: Guilty | None = None
    start: Path | None = None
    folder: Path | None = None

    def as_json(self) -> dict[str, Any]:
        """Plain values for `--json`."""
        return {
            "trials": [{"graph": trial.title, **trial.verdict.as_json()} for trial in self.trials],
            "guilty": None if self.guilty is None else _guilty_json(self.guilty),
            "folder": None if self.folder is None else str(self.folder),
        }


def _guilty_json(guilty: Guilty) -> dict[str, Any]:
    record = {
        "stage": guilty.stage,
        "pass": guilty.pass_name,
        "step": guilty.step,
        "rewrite": guilty.rewrite,
        "rewrites": guilty.rewrites,
        "names": list(guilty.names),
        "before": guilty.before.as_json(),
        "after": guilty.after.as_json(),
        "diff": None if guilty.diff is None else guilty.diff.as_json(),
        "cutout": None,
        "trouble": guilty.trouble,
    }
    if (cutout := guilty.cutout) is not None:
        record["cutout"] = {
            "before": {"graph": cutout.before.name, **asdict(cutout.cut.before)},
            "after": {"graph": cutout.after.name, **asdict(cutout.cut.after)},
            "relative_l2": {name: _number(error.relative_l2) for name, error in cutout.errors.items()},
        }
    return record


def _number(value: float) -> float | str:
    """JSON has no infinity."""
    return value if value < float("inf") else str(value)


def result_lines(result: BisectResult) -> Iterator[Line]:
    """What a terminal shows."""
    for trial in result.trials:
        yield Line(
            "." if trial.verdict.good else " ",
            f"{'good' if trial.verdict.good else 'bad '}  {trial.title}: {trial.verdict.reason}",
        )
    yield Line(" ", "")
    guilty = result.guilty
    if guilty is None:
        yield Line(
            "@", f"nothing is wrong: {result.trials[1 if len(result.trials) > 1 else 0].title} is good"
        )
        return
    yield Line("@", guilty.title)
    yield Line(" ", f"  before: {guilty.before.told}")
    yield Line(" ", f"  after: {guilty.after.told}")
    if guilty.diff is not None:
        yield Line(" ", "")
        yield from text_lines(guilty.diff)
    if guilty.cutout is not None and (worst := guilty.cutout.worst) is not None:
        cut = guilty.cutout.cut
        yield Line(" ", "")
        yield Line(
            " ",
            f"alone, the {_nodes(cut.before)} before and the {_nodes(cut.after)} after differ in {worst[0]} by a relative "
            f"L2 error of {worst[1].relative_l2:.4g}, on the same inputs",
        )
    if guilty.trouble:
        yield Line(" ", f"note: {guilty.trouble}")
    if result.folder is not None:
        yield Line(" ", f"{result.folder / README} says how to see it again")


def _nodes(border: Border) -> str:
    inside = "" if border.loop is None else f" in the body of {border.loop}"
    return f"{len(border.nodes)} node{'' if len(border.nodes) == 1 else 's'}{inside}"


# The reproducer


@dataclass(frozen=True)
class Replay:
    """What a run took.

    Attributes:
        model: the graph or the folder of stages.
        start: the stage in the reproducer that the guilty pass runs on.
        plugins, calibration, calibration_method: as they were given.
    """

    model: Path
    start: str
    plugins: tuple[str, ...] = ()
    calibration: tuple[str, ...] = ()
    calibration_method: str = "max"

    def command(self, guilty: Guilty) -> str:
        """The command line that makes the bad graph again, run in the reproducer."""
        model = self.start if self.model.is_dir() else str(self.model.resolve())
        words = ["pi05c", model, "--start-from", self.start, "--stop-after", guilty.stage]
        if guilty.rewrite is not None and (guilty.rewrites is None or guilty.rewrite <= guilty.rewrites):
            words += ["--rewrite-limit", f"{guilty.pass_name}={guilty.rewrite}"]
        for plugin in self.plugins:
            words += ["--plugin", str(Path(plugin).resolve()) if Path(plugin).exists() else plugin]
        for samples in self.calibration:
            words += ["--calibration", str(Path(samples).resolve()) if Path(samples).exists() else samples]
        if self.model.is_dir() and not self.calibration:
            words += ["--calibration", SAMPLES]
        if self.calibration_method != "max":
            words += ["--calibration-method", self.calibration_method]
        return shlex.join([*words, "--dump", "again"])


def extract_command(source: Path, border: Border, target: Path) -> str:
    """The command of Polygraphy that cuts a graph at a border."""
    inputs = [f"{name}:auto:auto" for name in border.inputs]
    outputs = [f"{name}:auto" for name in border.outputs]
    words = ["polygraphy", "surgeon", "extract", source.name, "--inputs", *inputs, "--outputs", *outputs]
    return shlex.join([*words, "-o", target.name])


def write_readme(folder: Path, guilty: Guilty, pipeline: str, replay: Replay) -> None:
    """Write what makes the folder a reproducer: the README, the pipeline's text, the record, a loader of inputs.

    Raises:
        Pi05cError: a file cannot be written.
    """
    texts = {
        README: "".join(f"{printable(line, layout=False)}\n" for line in _readme(folder, guilty, replay)),
        PIPELINE: f"{pipeline}\n",
        RECORD: json.dumps(_guilty_json(guilty), indent=2, allow_nan=False) + "\n",
    }
    if guilty.cutout is not None and guilty.cutout.errors:
        texts[LOADER] = _LOADER
    for name, text in texts.items():
        write_text(folder / name, text)


_LOADER = '''"""Feeds the cut-outs: polygraphy run before.min.onnx --onnxrt --data-loader-script load_inputs.py:before"""

from pathlib import Path

import numpy as np


def before():
    yield _values("before")


def after():
    yield _values("after")


def _values(name):
    with np.load(Path(__file__).with_name(f"{name}.min.npz")) as stored:
        return {key: stored[key] for key in stored.files}
'''


def _readme(folder: Path, guilty: Guilty, replay: Replay) -> Iterator[str]:
    yield f"# {_prose(guilty.title)}"
    yield ""
    yield f"- before: {_prose(guilty.before.told)}"
    yield f"- after: {_prose(guilty.after.told)}"
    if guilty.trouble:
        yield f"- note: {_prose(guilty.trouble)}"
    if guilty.diff is not None:
        yield ""
        yield from fenced([line.plain for line in text_lines(guilty.diff)], "diff")
    yield from ("", "## Files", "", "| file | what it is |", "|---|---|")
    for name, meaning in _FILES.items():
        if (folder / name).exists() or name in (PIPELINE, RECORD):
            yield f"| `{name}` | {meaning} |"
    yield f"| `{replay.start}` | the graph that the pass runs on, as a stage to go on from |"
    yield from ("", "## Make the bad graph again", "", "In this folder:", "")
    yield from fenced([replay.command(guilty)], "sh")
    cutout = guilty.cutout
    if cutout is None:
        return
    yield from ("", "## Cut out what differs", "")
    border = cutout.cut.before
    if border.loop is not None:
        yield f"What differs lies in the body of the Loop `{code(border.loop)}`, where tools do not cut. `*.body.onnx` is that body"
        yield "as a graph of its own; inputs are those of the first iteration."
        yield ""
    sources = cutout.extracted_from
    yield from fenced(
        [
            extract_command(sources[0], cutout.cut.before, cutout.before),
            extract_command(sources[1], cutout.cut.after, cutout.after),
        ],
        "sh",
    )
    if not cutout.errors:
        return
    yield from ("", "## Run what was cut out", "")
    yield from fenced(
        [
            "polygraphy run before.min.onnx --onnxrt --data-loader-script load_inputs.py:before --save-outputs before.json",
            "polygraphy run after.min.onnx --onnxrt --data-loader-script load_inputs.py:after --load-outputs before.json",
        ],
        "sh",
    )
    yield from ("", "| output before | after | relative L2 |", "|---|---|---|")
    for old, new in cutout.cut.outputs:
        old_cell, new_cell = (code(name).replace("|", "\\|") for name in (old, new))
        yield f"| `{old_cell}` | `{new_cell}` | {cutout.errors[new].relative_l2:.4g} |"


_FILES = {
    BEFORE: "the graph without the rewrite",
    AFTER: "the graph with it",
    "before.min.onnx": "the nodes of the first that the second does not have so",
    "after.min.onnx": "the nodes of the second that the first does not have so",
    "before.min.npz": "what `before.min.onnx` takes, recorded from `before.onnx`",
    "after.min.npz": "what `after.min.onnx` takes: the same values",
    PIPELINE: "all passes",
    RANGES: "the ranges that the passes were given",
    SAMPLES: "the inputs that the graphs were judged on",
    RECORD: "what was found, for programs",
}


def _prose(text: str) -> str:
    """Text in Markdown whose names are no HTML."""
    return escape(text, quote=False)


__all__ = [
    "AFTER",
    "BEFORE",
    "BisectResult",
    "Guilty",
    "Replay",
    "Trial",
    "extract_command",
    "result_lines",
    "write_readme",
]
