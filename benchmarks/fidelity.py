"""How far the actions of each recipe are from float32, what its weights take and how much it multiplies: a table.

    python benchmarks/fidelity.py [--models tiny,wide] [--sets N] [--only WORD] [--tuned] [-o FILE.json]

Two models: `pi05_tiny`, the reference model of the tests, on its three cases with the float32 actions of an independent
implementation; and `wide` (`wide_model.py`), a random model with outliers, on samples that no calibration saw, against
its plain graph. Each recipe is compiled once for each set of calibration samples, which are made up of seeds, for the
reference model of the kind that its cases are; `worst` is the largest relative L2 error over all cases and sets. All
recipes see the same model and samples, the vendor's (`vendor_recipe.py`) among them.

Bytes: `stored` is what the weights of the rewritten graph take, each once, the embedding table included; `read` is what
its kernels read of them in one run (`pi05c cost`), where the action expert counts once for each denoising step. So do
multiplications. With `-o` each row is written as soon as it is measured, and a run goes on with those that are missing.

What bounds a recipe: `weights alone` has activations in two terms and attention in float16; `activations alone` has
exact weights (`exact_weights.py`); `attention alone` has all linears in float16.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from exact_weights import PASS as EXACT_WEIGHTS
from prototypes import AHEAD, BEHIND
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
from pi05c.graph.ranges import Ranges, Wanted
from pi05c.graph.runner import Array
from pi05c.inspection import weight_totals
from pi05c.kernels import kernels_of
from pi05c.passes import pipeline
from pi05c.pipelinefile import read_pipeline_file
from pi05c.plugins import parse_passes
from pi05c.samples import Samples
from pi05c.tuning import tune

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent / "tests" / "passes"))

from reference_samples import CASES, drawn_like_the_cases  # noqa: E402

REFERENCE = HERE.parent / "tests" / "data" / "pi05_tiny"
RESULTS = HERE / "results" / "fidelity.json"

CALIBRATION_SAMPLES = 8
"""Of the wide model; the reference model has `reference_samples.COUNT`."""

PROMPT_LENGTH = 24
"""Tokens of the reference cases, padding included; the wide model has as many."""

TEST_SEED, TEST_SAMPLES = 1000, 4
"""Samples of the wide model that recipes are measured on."""

WIDEST = "lower_precision,quantize_linears{rounding=compensated},insert_attention_qdq"
"""Passes that ask calibration for all that a recipe does."""

KEPT_ATTENTION = "insert_attention_qdq{keep=prefix,denoise}"
"""Attention in float16."""


@dataclass(frozen=True)
class Recipe:
    """One row of the table.

    Attributes:
        family: what it is compared within.
        label: how the table calls it.
        passes: pipeline text.
        ahead: passes before those, whose ranges are measured by themselves.
    """

    family: str
    label: str
    passes: str
    ahead: str = "none"


def in_mlps(preset: str) -> str:
    """A preset with NVFP4 whose language model has it in the MLPs alone."""
    (step,) = [step for step in parse_passes(preset) if step.spec.name == "quantize_linears"]
    chosen = (*step.options.get("fp8", ()), "*self_attn*")
    return f"{preset},{dataclasses.replace(step, options={**step.options, 'fp8': chosen}).text}"


def _tried(family: str, what: str, options: str) -> tuple[Recipe, ...]:
    """What is simulated by `prototypes.py`."""
    return tuple(
        Recipe(
            family,
            f"{what}: {label}",
            BEHIND.format(options=f"{options}keep=rotation*"),
            f"{AHEAD},{passes}",
        )
        for label, passes in (
            ("SmoothQuant, alpha 0.5", "smooth"),
            ("SmoothQuant, alpha 0.8", "smooth{alpha=0.8}"),
            ("Hadamard rotation", "rotate"),
            ("Hadamard rotation, blocks of 16", "rotate{size=16}"),
        )
    )


RECIPES = (
    Recipe("FP8", "the vendor's FP8", VENDOR.format(nvfp4="false")),
    Recipe("FP8", "`default`", "default"),
    Recipe("FP8", "`fp8_accurate`", "fp8_accurate"),
    Recipe("NVFP4", "the vendor's FP8 + NVFP4", VENDOR.format(nvfp4="true")),
    Recipe("NVFP4", "`nvfp4`", "nvfp4"),
    Recipe("NVFP4", "`nvfp4_accurate`", "nvfp4_accurate"),
    Recipe("NVFP4", "`nvfp4` in the MLPs alone", in_mlps("nvfp4")),
    Recipe("NVFP4", "`nvfp4_accurate` in the MLPs alone", in_mlps("nvfp4_accurate")),
    Recipe("float16", "`fp16`", "fp16"),
    Recipe("FP8", "FP8: activations alone", f"default,{EXACT_WEIGHTS}"),
    Recipe("FP8", "FP8: weights alone, nearest", f"default,quantize_linears{{two_terms=*}},{KEPT_ATTENTION}"),
    Recipe(
        "FP8",
        "FP8: weights alone, compensated",
        f"default,quantize_linears{{two_terms=*,rounding=compensated}},{KEPT_ATTENTION}",
    ),
    Recipe("FP8", "FP8: attention alone", "default,quantize_linears{keep=*}"),
    Recipe("NVFP4", "NVFP4: activations alone", f"nvfp4,{EXACT_WEIGHTS}"),
    Recipe(
        "NVFP4",
        "NVFP4: weights alone, nearest",
        f"default,quantize_linears{{llm=nvfp4,two_terms=*}},{KEPT_ATTENTION}",
    ),
    Recipe(
        "NVFP4",
        "NVFP4: weights alone, compensated",
        f"default,quantize_linears{{llm=nvfp4,two_terms=*,rounding=compensated}},{KEPT_ATTENTION}",
    ),
    *_tried("FP8", "FP8", ""),
    *_tried("NVFP4", "NVFP4", "llm=nvfp4,"),
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
    """One compiled shape of a model: its plain graph, what it is calibrated on by seed, and what it is measured on."""

    path: Path
    config: Pi05Config
    calibration: Callable[[int], list[dict[str, Array]]]
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
        flops: of products.
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
    flops: int = 0
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
        settings.append(Setting(path, config, partial(drawn_like_the_cases, batch=batch), inputs, reference))
    return settings


def wide(folder: Path) -> list[Setting]:
    """The wide model."""
    path, config = write_wide_model(folder)
    inputs = tuple(made_up(TEST_SEED, config, TEST_SAMPLES))
    runner = load_runner(path)
    reference = tuple(runner.run(sample) for sample in inputs)
    return [Setting(path, config, partial(made_up, config=config), inputs, reference)]


def made_up(seed: int, config: Pi05Config, count: int = CALIBRATION_SAMPLES) -> list[dict[str, Array]]:
    """Samples as `pi05c export --random` makes them."""
    drawn = synthetic_samples(config, seed, count)
    return [{name: values[index] for name, values in drawn.items()} for index in range(count)]


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
    return Recipe(wanted.family, _label(wanted, name), read_pipeline_file(result.recipe).text)


def _label(wanted: Recipe | Tuned, model: str) -> str:
    return wanted.label if isinstance(wanted, Recipe) else f"{wanted.label}, {wanted.limits[model]:g}"


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
                cost = total(kernels_of(model))
                row.stored, row.read, row.flops = stored_bytes(model), cost.weight_bytes, cost.flops
        row.errors.append([error.relative_l2 for comparison in found for error in comparison.errors])
        row.cosine = min(row.cosine, *(error.cosine for each in found for error in each.errors))
    row.worst = max(max(errors) for errors in row.errors)
    row.mean = statistics.fmean(error for errors in row.errors for error in errors)
    row.seconds = (time.perf_counter() - start) / (sets * len(settings))
    return row


def compiled(recipe: Recipe, setting: Setting, seed: int, folder: Path) -> Model:
    """The rewritten graph."""
    samples = Samples.of(setting.calibration(seed), synthetic=True)
    model = load(setting.path)

    def calibrate(current: Model, wanted: Wanted) -> Ranges:
        asked = pipeline.wanted(current, parse_passes(WIDEST))
        if set(wanted.tensors) <= set(asked.tensors):
            wanted = asked  # measured once for all recipes that make this graph
        return cached_ranges(current, wanted.tensors, samples, folder / "cache", rows=wanted.rows)

    for passes in (recipe.ahead, recipe.passes):
        pipeline.run(model, parse_passes(passes), calibrate=calibrate)
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
    """A table in Markdown; bytes and multiplications relative to `default`."""
    default = next((row for row in rows if row.passes == "default"), rows[0])
    lines = [
        "| recipe | worst | mean | cosine | bytes stored | bytes read | multiplications |",
        "|---|---:|---:|---:|---:|---:|---:|",
    ]
    lines += [
        f"| {row.label} | {row.worst:.4f} | {row.mean:.4f} | {row.cosine:.5f} | {row.stored / default.stored:.2f} | "
        f"{row.read / default.read:.2f} | {row.flops / default.flops:.2f} |"
        for row in rows
    ]
    return "\n".join(lines)


MODELS = {"tiny": tiny, "wide": wide}


def main(arguments: argparse.Namespace) -> None:
    """Measure, print the table of each model, and write everything as JSON."""
    results: dict[str, Any] = {"sets": arguments.sets, "models": {}}
    if arguments.output is not None and arguments.output.is_file():
        results["models"] = json.loads(arguments.output.read_text())["models"]
    wanted = [
        each for each in (*RECIPES, *(TUNED if arguments.tuned else ())) if arguments.only in each.label
    ]
    for name in arguments.models.split(","):
        rows = [Row(**row) for row in results["models"].get(name, ())]
        known = {row.label for row in rows}
        left = [each for each in wanted if _label(each, name) not in known]
        with tempfile.TemporaryDirectory(prefix="fidelity-") as scratch:
            folder = Path(scratch)
            settings = MODELS[name](folder) if left else []
            for each in left:
                recipe = each if isinstance(each, Recipe) else tuned(each, name, settings[0], folder)
                rows.append(measured(recipe, settings, arguments.sets, folder))
                print(f"{name}: {recipe.label}: {rows[-1].worst:.4f}", file=sys.stderr, flush=True)
                results["models"][name] = [asdict(row) for row in rows]
                if arguments.output is not None:
                    arguments.output.write_text(json.dumps(results, indent=2) + "\n")
        print(f"\n{name}\n\n{table(rows)}", flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--models", default=",".join(MODELS), help="tiny, wide or both")
    parser.add_argument("--sets", type=int, default=3, help="sets of calibration samples")
    parser.add_argument("--only", default="", help="recipes whose label holds this word")
    parser.add_argument("--tuned", action="store_true", help="let pi05c tune make recipes too")
    parser.add_argument("-o", "--output", type=Path, help=f"JSON file, such as {RESULTS.name} in results/")
    main(parser.parse_args())
