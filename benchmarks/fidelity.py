"""How far the actions of each recipe are from float32, and how many bytes its weights take: the table of the README.

    python benchmarks/fidelity.py [--models tiny,wide] [--sets N] [--only WORD] [-o FILE.json]

Two models: `pi05_tiny`, the reference model of the tests, on its three cases with the float32 actions of an independent
implementation; and `wide` (`wide_model.py`), a random model with outliers, on samples that no calibration saw, against
its plain graph. Each recipe is compiled once for each set of calibration samples, which are made up of seeds; `worst` is
the largest relative L2 error over all cases and sets. All recipes see the same model and samples, the vendor's
(`vendor_recipe.py`) among them.

Bytes: `stored` is what the weights of the rewritten graph take, each once, the embedding table included; `read` is what
its kernels read of them in one run (`pi05c cost`), where the action expert counts once for each denoising step.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from vendor_recipe import PIPELINE as VENDOR
from wide_model import write_wide_model

from pi05c.backend.onnxruntime import load_runner
from pi05c.calibration import cached_ranges
from pi05c.comparison import Comparison, compare
from pi05c.cost import total
from pi05c.frontend.checkpoint import open_checkpoint
from pi05c.frontend.config import Pi05Config
from pi05c.frontend.export import export_model
from pi05c.frontend.samples import synthetic_samples, write_samples
from pi05c.graph.io import Model, load, save
from pi05c.graph.runner import Array
from pi05c.inspection import weight_totals
from pi05c.kernels import kernels_of
from pi05c.passes import pipeline
from pi05c.pipelinefile import read_pipeline_file
from pi05c.plugins import parse_passes
from pi05c.samples import Samples
from pi05c.tuning import tune

HERE = Path(__file__).parent
REFERENCE = HERE.parent / "tests" / "data" / "pi05_tiny"
RESULTS = HERE / "results" / "fidelity.json"

CALIBRATION_SAMPLES = 8
PROMPT_LENGTH = 24
"""Tokens of the reference cases, padding included; the wide model has as many."""

CASES = {"three_views": 1, "one_view_masked": 1, "batch_ragged": 2}
"""The cases of the reference model and their batch sizes."""

TEST_SEED, TEST_SAMPLES = 1000, 4
"""Samples of the wide model that recipes are measured on."""

MLP_ONLY = "fp8=*self_attn*,llm=nvfp4"
"""Options of `quantize_linears` that leave NVFP4 to the MLPs of the language model."""


@dataclass(frozen=True)
class Recipe:
    """One row of the table.

    Attributes:
        family: what it is compared within.
        label: how the table calls it.
        passes: pipeline text.
    """

    family: str
    label: str
    passes: str


RECIPES = (
    Recipe("FP8", "naive FP8", "default,quantize_linears{rounding=nearest}"),
    Recipe("FP8", "vendor's FP8", VENDOR.format(nvfp4="false")),
    Recipe("FP8", "default", "default"),
    Recipe("NVFP4", "naive NVFP4", "default,quantize_linears{rounding=nearest,llm=nvfp4}"),
    Recipe("NVFP4", "vendor's FP8 + NVFP4", VENDOR.format(nvfp4="true")),
    Recipe("NVFP4", "nvfp4", "nvfp4"),
    Recipe("NVFP4", "nvfp4, MLPs only", f"nvfp4,quantize_linears{{{MLP_ONLY}}}"),
    Recipe("float16", "fp16", "fp16"),
)


@dataclass(frozen=True)
class Tuned:
    """A recipe that `pi05c tune` makes for each model, on the first set of calibration samples.

    Attributes:
        base: the pipeline that it chooses formats in.
        formats: what it chooses among.
        limits: the error allowed, by model.
        minimize: as `--minimize`.
    """

    family: str
    label: str
    base: str
    formats: tuple[str, ...]
    limits: Mapping[str, float]
    minimize: str = "time"


TUNED = (
    Tuned("FP8", "tuned FP8", "default", ("fp8", "fp8_two_terms"), {"tiny": 0.018, "wide": 0.035}),
    Tuned(
        "NVFP4",
        "tuned NVFP4",
        "nvfp4",
        ("fp8", "fp8_two_terms", "nvfp4", "nvfp4_two_terms"),
        {"tiny": 0.03, "wide": 0.09},
    ),
)

TUNE_SAMPLES = 2
TUNE_RESOLUTION = {"tiny": 3, "wide": 1}
"""Samples and groups of layers of a part that `tune` measures; see `docs/tune.md`."""


@dataclass(frozen=True)
class Setting:
    """One compiled shape of a model: its plain graph, what it is calibrated on, and what it is measured on."""

    path: Path
    config: Pi05Config
    inputs: tuple[Mapping[str, Array], ...]
    reference: tuple[Mapping[str, Array], ...]


@dataclass
class Row:
    """What one recipe did to one model.

    Attributes:
        worst, mean: relative L2 error of the actions over all cases and sets of calibration samples.
        cosine: the smallest.
        errors: relative L2 errors, a list of cases for each set.
        stored, read: bytes of weights; see above.
        seconds: wall-clock time of one compilation and its runs, the calibration included.
    """

    family: str
    label: str
    passes: str
    worst: float = 0.0
    mean: float = 0.0
    cosine: float = 1.0
    errors: list[list[float]] = field(default_factory=list)
    stored: int = 0
    read: int = 0
    seconds: float = 0.0


def tiny(folder: Path) -> list[Setting]:
    """The reference model, exported for each batch size of its cases."""
    settings = []
    for batch in sorted(set(CASES.values())):
        path = folder / f"tiny{batch}.onnx"
        export_model(REFERENCE, path, batch=batch, prompt_length=PROMPT_LENGTH)
        config = dataclasses.replace(
            open_checkpoint(REFERENCE).config, batch=batch, prompt_length=PROMPT_LENGTH
        )
        cases = [case for case, size in CASES.items() if size == batch]
        inputs = tuple(dict(np.load(REFERENCE / f"{case}.inputs.npz")) for case in cases)
        reference = tuple(
            {"actions": np.load(REFERENCE / f"{case}.float32.npz")["actions"]} for case in cases
        )
        settings.append(Setting(path, config, inputs, reference))
    return settings


def wide(folder: Path) -> list[Setting]:
    """The wide model."""
    path, config = write_wide_model(folder)
    inputs = tuple(samples_of(config, TEST_SEED, TEST_SAMPLES))
    runner = load_runner(path)
    return [Setting(path, config, inputs, tuple(runner.run(sample) for sample in inputs))]


def samples_of(config: Pi05Config, seed: int, count: int = CALIBRATION_SAMPLES) -> Iterator[dict[str, Array]]:
    """Made-up samples."""
    drawn = synthetic_samples(config, seed, count)
    for index in range(count):
        yield {name: values[index] for name, values in drawn.items()}


def tuned(wanted: Tuned, name: str, setting: Setting, folder: Path) -> Recipe:
    """Let `pi05c tune` choose; what it measured for an earlier recipe of the same model is not measured again."""
    samples = folder / "tune.npz"
    write_samples(samples, synthetic_samples(setting.config, 1, CALIBRATION_SAMPLES), synthetic=False)
    result = tune(
        setting.path,
        folder / "tuned.toml",
        passes=wanted.base,
        calibration=[samples],
        formats=wanted.formats,
        max_error=wanted.limits[name],
        minimize=wanted.minimize,
        samples=TUNE_SAMPLES,
        resolution=TUNE_RESOLUTION[name],
        cache=folder / "cache",
    )
    return Recipe(
        wanted.family, f"{wanted.label}, {wanted.limits[name]:g}", read_pipeline_file(result.recipe).text
    )


def measured(recipe: Recipe, settings: Sequence[Setting], sets: int, folder: Path) -> Row:
    """Compile and run a recipe for each setting and set of calibration samples."""
    row = Row(recipe.family, recipe.label, recipe.passes)
    start = time.perf_counter()
    for seed in range(1, sets + 1):
        found: list[Comparison] = []
        for setting in settings:
            model = compiled(recipe, setting, seed, folder)
            comparison = run(model, setting, folder)
            found.append(comparison)
            if setting is settings[0]:
                row.stored, row.read = stored_bytes(model), total(kernels_of(model)).weight_bytes
        row.errors.append([error.relative_l2 for comparison in found for error in comparison.errors])
        row.cosine = min(row.cosine, *(error.cosine for each in found for error in each.errors))
    row.worst = max(max(errors) for errors in row.errors)
    row.mean = statistics.fmean(error for errors in row.errors for error in errors)
    row.seconds = (time.perf_counter() - start) / (sets * len(settings))
    return row


def compiled(recipe: Recipe, setting: Setting, seed: int, folder: Path) -> Model:
    """The rewritten graph."""
    samples = Samples.of(samples_of(setting.config, seed), synthetic=True)
    model = load(setting.path)
    pipeline.run(
        model,
        parse_passes(recipe.passes),
        calibrate=lambda current, wanted: cached_ranges(
            current, wanted.tensors, samples, folder / "cache", rows=wanted.rows
        ),
    )
    return model


def run(model: Model, setting: Setting, folder: Path) -> Comparison:
    """The errors of a graph on what a setting is measured on."""
    path = folder / "rewritten.onnx"
    save(model, path)
    runner = load_runner(path)
    return compare(setting.reference, [runner.run(dict(sample)) for sample in setting.inputs])


def stored_bytes(model: Model) -> int:
    """Bytes of the weights of a graph, each once."""
    return sum(weights.bytes for weights in weight_totals(model.graph))


def table(rows: Sequence[Row]) -> str:
    """A table in Markdown; bytes relative to `default`."""
    default = next((row for row in rows if row.label == "default"), rows[0])
    lines = [
        "| recipe | worst | mean | cosine | bytes stored | bytes read |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    lines += [
        f"| {row.label} | {row.worst:.4f} | {row.mean:.4f} | {row.cosine:.5f} | {row.stored / default.stored:.2f} | "
        f"{row.read / default.read:.2f} |"
        for row in rows
    ]
    return "\n".join(lines)


MODELS = {"tiny": tiny, "wide": wide}


def main(arguments: argparse.Namespace) -> None:
    """Measure, print the table of each model, and write everything as JSON."""
    results: dict[str, Any] = {
        "calibration_samples": CALIBRATION_SAMPLES,
        "sets": arguments.sets,
        "models": {},
    }
    for name in arguments.models.split(","):
        with tempfile.TemporaryDirectory(prefix="fidelity-") as scratch:
            folder = Path(scratch)
            settings = MODELS[name](folder)
            rows: list[Row] = []
            for wanted in (*RECIPES, *TUNED):
                if arguments.only in wanted.label:
                    recipe = (
                        wanted if isinstance(wanted, Recipe) else tuned(wanted, name, settings[0], folder)
                    )
                    rows.append(measured(recipe, settings, arguments.sets, folder))
                    print(f"{name}: {recipe.label}: {rows[-1].worst:.4f}", file=sys.stderr, flush=True)
        print(f"\n{name}\n\n{table(rows)}", flush=True)
        results["models"][name] = [asdict(row) for row in rows]
    if arguments.output is not None:
        arguments.output.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--models", default=",".join(MODELS), help="tiny, wide or both")
    parser.add_argument("--sets", type=int, default=3, help="sets of calibration samples")
    parser.add_argument("--only", default="", help="recipes whose label holds this word")
    parser.add_argument("-o", "--output", type=Path, help=f"JSON file, such as {RESULTS.name} in results/")
    main(parser.parse_args())
