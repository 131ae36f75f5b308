"""Parts of graphs of other exporters: in a chain they compute what the whole does, bit by bit."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from foreign_policy import Style, policy
from pass_graphs import Array, editable

from pi05c.backend.onnxruntime import load_runner
from pi05c.chain import Chain, Stage
from pi05c.extraction import StepTable, complete_grouping, extract, parse_grouping
from pi05c.graph.io import save

STYLES = {
    "matmul": Style(steps=2),
    "TorchScript, opset 17": Style(
        steps=2, opset=17, linear="gemm", slashes=True, mask="where", scale="query", repeat="broadcast"
    ),
    "opset 23 operators": Style(steps=2, opset=23, operators=True, mask="where"),
    "float16, unrolled": Style(dtype="float16", linear="transposed"),
    "loop, batch 2, two KV heads": Style(steps=4, loop=True, batch=2, heads=4, kv_heads=2, horizon=7),
    "three layers": Style(steps=2, layers=3, heads=4, kv_heads=4, loop=True, mask="where"),
}


def observation(path: Path) -> dict[str, Array]:
    rng = np.random.default_rng(0)
    sample: dict[str, Array] = {}
    for spec in load_runner(path).inputs:
        if spec.dtype.kind == "f":
            sample[spec.name] = rng.standard_normal(spec.shape).astype(spec.dtype)
        elif spec.dtype.kind == "b":
            sample[spec.name] = rng.random(spec.shape) < 0.8
        else:
            sample[spec.name] = rng.integers(0, 16, spec.shape).astype(spec.dtype)
    return sample


def chained(model: Path, split: str, folder: Path) -> Chain:
    """The plain parts of a model, loaded."""
    grouping = complete_grouping(model, parse_grouping(split))
    stages, table = [], None
    for index in range(len(grouping)):
        part = extract(model, grouping, index)
        save(part.model, folder / f"{part.name}.onnx")
        stages.append(Stage(part.name, load_runner(folder / f"{part.name}.onnx")))
        if part.step is not None:
            save(part.step.table, folder / "table.onnx")
            table = StepTable(folder / "table.onnx")
    return Chain(stages, [spec.name for spec in load_runner(model).outputs], table=table)


@pytest.mark.parametrize("style", STYLES.values(), ids=STYLES)
def test_parts_in_a_chain_are_the_whole(style: Style, tmp_path: Path) -> None:
    model = tmp_path / "model.onnx"
    save(editable(policy(style)), model)
    sample = observation(model)
    expected = load_runner(model).run(sample)
    splits = ["vision,prefix,denoise", *(["vision+prefix,step"] if style.loop else [])]
    for split in splits:
        for name, value in chained(model, split, tmp_path).run(sample).items():
            np.testing.assert_array_equal(value, expected[name])
