"""The exported graph: the same numbers as the torch model, one Loop, readable names, provenance."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest

torch = pytest.importorskip("torch", reason="exporting the model needs the extra [torch]")
pytest.importorskip("onnxscript", reason="exporting the model needs the extra [torch]")

from pi05c.frontend import export  # noqa: E402
from pi05c.frontend.config import CONFIGS, Pi05Config, parse_config  # noqa: E402
from pi05c.frontend.export import ExportResult, calibration_path, export_model  # noqa: E402
from pi05c.frontend.model import load_policy, parameter_shapes  # noqa: E402
from pi05c.frontend.random_weights import random_weights  # noqa: E402
from pi05c.frontend.samples import input_specs, is_synthetic  # noqa: E402
from pi05c.frontend.trace import match_scopes, trace  # noqa: E402
from pi05c.graph.errors import Pi05cError, UsageError  # noqa: E402

TOLERANCE = 1e-4
"""Largest absolute difference to the reference, and to torch."""


def run(model: Path, inputs: dict[str, np.ndarray]) -> np.ndarray:
    session = onnxruntime.InferenceSession(model)
    (actions,) = session.run(["actions"], inputs)
    return np.asarray(actions)


def reference_case(folder: Path, case: str) -> tuple[dict[str, np.ndarray], np.ndarray]:
    with np.load(folder / f"{case}.inputs.npz") as inputs, np.load(folder / f"{case}.float32.npz") as outputs:
        return dict(inputs), outputs["actions"]


def graphs(graph: onnx.GraphProto) -> Iterator[onnx.GraphProto]:
    yield graph
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.type == onnx.AttributeProto.GRAPH:
                yield from graphs(attribute.g)


def nodes(graph: onnx.GraphProto) -> Iterator[onnx.NodeProto]:
    for scope in graphs(graph):
        yield from scope.node


@pytest.mark.parametrize("case", ["three_views", "one_view_masked"])
def test_the_graph_reproduces_the_reference(tiny_model: Path, reference_dir: Path, case: str) -> None:
    inputs, expected = reference_case(reference_dir, case)
    assert np.abs(run(tiny_model, inputs) - expected).max() <= TOLERANCE


def test_a_lerobot_checkpoint_in_a_batch(reference_dir: Path, tmp_path: Path) -> None:
    inputs, expected = reference_case(reference_dir, "batch_ragged")
    lines: list[str] = []
    result = export_model(
        reference_dir.with_name("pi05_tiny_lerobot"), tmp_path / "m.onnx", batch=2, progress=lines.append
    )
    assert np.abs(run(result.model, inputs) - expected).max() <= TOLERANCE
    assert result.calibration is None
    assert [line.split()[0] for line in lines] == ["opening", "hashing", "tracing", "writing"]


def other_sizes() -> Pi05Config:
    """2 key/value heads of 3 queries each, depth 2, and odd numbers wherever one is possible."""
    architecture = {
        "vision": {"width": 48, "depth": 1, "mlp_dim": 80, "num_heads": 3, "image_size": 42, "patch_size": 14},
        "llm": {
            "width": 40, "depth": 2, "mlp_dim": 56, "num_heads": 6, "num_kv_heads": 2, "head_dim": 18,
            "vocab_size": 31,
        },
        "expert": {"width": 24, "depth": 2, "mlp_dim": 36, "num_heads": 6, "num_kv_heads": 2, "head_dim": 18},
    }  # fmt: skip
    fields = {"architecture": architecture, "action_horizon": 7, "action_dim": 5, "max_token_len": 11}
    return parse_config(fields, "other").with_options(views=2, batch=2, steps=3)


@pytest.fixture(scope="module")
def random_export(tmp_path_factory: pytest.TempPathFactory) -> ExportResult:
    """`other_sizes()` exported with seed 5."""
    config, folder = other_sizes(), tmp_path_factory.mktemp("random")
    fields = {
        "architecture": asdict(config.architecture),
        "action_horizon": config.horizon,
        "action_dim": config.action_dim,
        "max_token_len": config.prompt_length,
    }
    (folder / "other.json").write_text(json.dumps(fields))
    (folder / "out").mkdir()
    return export_model(
        None,
        folder / "out/m.onnx",
        config=str(folder / "other.json"),
        random=True,
        seed=5,
        views=config.views,
        batch=config.batch,
        steps=config.steps,
    )


def test_other_sizes_agree_with_the_python_loop(random_export: ExportResult) -> None:
    """ONNX Loop, from `while_loop`, against the Python loop over the same step."""
    config = random_export.config
    assert config == other_sizes()
    policy = load_policy(config, random_weights(parameter_shapes(config), 5))
    assert random_export.calibration is not None
    with np.load(random_export.calibration) as samples:
        for index in range(3):
            inputs = {spec.name: samples[spec.name][index] for spec in input_specs(config)}
            with torch.no_grad():
                expected = policy(*(torch.from_numpy(array) for array in inputs.values())).numpy()
            assert expected.std() > 0.1, "the random policy does something"
            assert np.abs(run(random_export.model, inputs) - expected).max() <= TOLERANCE


@pytest.fixture(scope="module")
def proto(tiny_model: Path) -> onnx.ModelProto:
    return onnx.load(tiny_model, load_external_data=False)


class TestForm:
    """What the graph looks like."""

    def test_it_is_valid(self, tiny_model: Path) -> None:
        onnx.checker.check_model(tiny_model, full_check=True)

    def test_contract(self, proto: onnx.ModelProto) -> None:
        def signature(value: onnx.ValueInfoProto) -> tuple[str, int, list[int]]:
            tensor = value.type.tensor_type
            return value.name, tensor.elem_type, [dim.dim_value for dim in tensor.shape.dim]

        assert [(item.domain, item.version) for item in proto.opset_import] == [("", 21)]
        assert [signature(value) for value in proto.graph.input] == [
            ("images", onnx.TensorProto.FLOAT, [1, 3, 3, 56, 56]),
            ("image_masks", onnx.TensorProto.BOOL, [1, 3]),
            ("tokens", onnx.TensorProto.INT64, [1, 24]),
            ("token_masks", onnx.TensorProto.BOOL, [1, 24]),
            ("noise", onnx.TensorProto.FLOAT, [1, 10, 32]),
        ]
        assert [signature(value) for value in proto.graph.output] == [
            ("actions", onnx.TensorProto.FLOAT, [1, 10, 32])
        ]

    def test_one_loop_and_standard_operators(self, proto: onnx.ModelProto) -> None:
        assert [node.op_type for node in nodes(proto.graph)].count("Loop") == 1
        assert {node.domain for node in nodes(proto.graph)} == {""}
        assert not proto.functions

    def test_shapes_axes_and_bounds_are_constants(self, proto: onnx.ModelProto) -> None:
        """TensorRT's parser wants them so, in a Loop's body too."""
        constants = {tensor.name for graph in graphs(proto.graph) for tensor in graph.initializer}
        operands = {
            "Reshape": [1],
            "ReduceMean": [1],
            "ReduceSum": [1],
            "Unsqueeze": [1],
            "Expand": [1],
            "Slice": [1, 2, 3, 4],
        }
        found = [
            (node.name, node.input[index])
            for node in nodes(proto.graph)
            for index in operands.get(node.op_type, ())
        ]
        assert len(found) > 100
        assert not [name for name, operand in found if operand not in constants]

    def test_weights_are_bfloat16_under_their_own_names_and_cast_where_used(
        self, proto: onnx.ModelProto
    ) -> None:
        shapes = parameter_shapes(CONFIGS["pi05_tiny"])
        stored = {tensor.name: tensor for graph in graphs(proto.graph) for tensor in graph.initializer}
        weights = {name for name in stored if name in shapes}
        unread = {name for name in shapes if name not in weights}
        assert {tuple(stored[name].dims) == shapes[name] for name in weights} == {True}
        assert {stored[name].data_type for name in weights} == {onnx.TensorProto.BFLOAT16}
        last = "paligemma_with_expert.paligemma.model.language_model.layers.2."
        assert {name.removeprefix(last) for name in unread if name.startswith(last)} == {
            "self_attn.q_proj.weight", "self_attn.o_proj.weight", "post_attention_layernorm.weight",
            "mlp.gate_proj.weight", "mlp.up_proj.weight", "mlp.down_proj.weight",
        }  # fmt: skip
        assert {name for name in unread if not name.startswith(last)} == {
            "paligemma_with_expert.paligemma.model.language_model.norm.weight",
            "paligemma_with_expert.paligemma.lm_head.weight",
            "paligemma_with_expert.gemma_expert.lm_head.weight",
        }
        users = {node.op_type for node in nodes(proto.graph) if set(node.input) & weights}
        assert users == {"Cast", "Gather"}

    def test_names_come_from_the_module_path(self, proto: onnx.ModelProto) -> None:
        names = [node.name for node in nodes(proto.graph)]
        assert len(set(names)) == len(names)
        assert {
            "vision.encoder.layers.1.self_attn.q_proj.MatMul",
            "projector.linear.MatMul",
            "prefix.layers.1.self_attn.Softmax",
            "prefix.layers.2.self_attn.v_proj.MatMul",
            "denoise.Loop",
            "time_mlp_in.Gemm",
            "expert.layers.0.input_layernorm.dense.Gemm",
            "expert.layers.2.self_attn.Softmax",
            "expert.layers.2.mlp.down_proj.MatMul",
            "action_out_proj.MatMul",
        } <= set(names)
        unnamed = [name for name in names if name.split(".")[0] not in (
            "vision", "projector", "prefix", "expert", "policy", "denoise",
            "time_mlp_in", "time_mlp_out", "action_in_proj", "action_out_proj",
        )]  # fmt: skip
        assert not unnamed

    def test_nothing_of_the_exporter_is_left(self, tiny_model: Path, proto: onnx.ModelProto) -> None:
        assert not any(node.metadata_props or node.doc_string for node in nodes(proto.graph))
        assert b"model.py" not in tiny_model.read_bytes()


class TestProvenance:
    """What the metadata says."""

    def test_of_a_checkpoint(self, tiny_model: Path) -> None:
        proto = onnx.load(tiny_model, load_external_data=False)
        entries = {entry.key: entry.value for entry in proto.metadata_props}
        config = json.loads(entries[export.CONFIG_KEY])
        assert entries[export.FORMAT_KEY] == "1"
        assert entries[export.WEIGHTS_KEY] == "checkpoint"
        assert export.SEED_KEY not in entries
        assert (config["batch"], config["views"], config["prompt_length"], config["steps"]) == (1, 3, 24, 10)
        assert json.loads(entries[export.CHECKPOINT_KEY])["sha256"].keys() == {"model.safetensors"}
        assert json.loads(entries[export.VERSIONS_KEY])["torch"] == torch.__version__
        assert json.loads(entries[export.ROBOT_KEY])["cameras"][0] == "base_0_rgb"

    def test_given_samples_are_not_called_synthetic(self, tiny_model: Path) -> None:
        assert calibration_path(tiny_model).is_file()
        assert not is_synthetic(calibration_path(tiny_model))

    def test_of_a_seed(self, random_export: ExportResult) -> None:
        proto = onnx.load(random_export.model, load_external_data=False)
        entries = {entry.key: entry.value for entry in proto.metadata_props}
        assert (entries[export.WEIGHTS_KEY], entries[export.SEED_KEY]) == ("random", "5")
        assert export.CHECKPOINT_KEY not in entries
        sidecar = random_export.model.with_name("m.calibration.npz")
        assert random_export.calibration == sidecar
        assert random_export.synthetic
        assert is_synthetic(sidecar)
        assert sorted(path.name for path in sidecar.parent.iterdir()) == [
            sidecar.name,
            "m.onnx",
            "m.onnx.data",
        ]
        assert random_export.nbytes == 2 * random_export.parameters


class TestRefusals:
    """Nothing is traced or written before the request is known to be right."""

    @pytest.fixture(autouse=True)
    def no_tracing(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def refuse(*_: object) -> None:
            raise AssertionError("traced before the request was checked")

        monkeypatch.setattr("pi05c.frontend.trace.trace", refuse)

    def test_checkpoint_or_random(self, reference_dir: Path, tmp_path: Path) -> None:
        for checkpoint, random in ((None, False), (reference_dir, True)):
            with pytest.raises(UsageError, match="either a checkpoint folder or --random"):
                export_model(checkpoint, tmp_path / "m.onnx", config="pi05_tiny", random=random)

    def test_random_needs_a_configuration(self, tmp_path: Path) -> None:
        with pytest.raises(UsageError, match="--random needs --config"):
            export_model(None, tmp_path / "m.onnx", random=True)

    def test_output(self, reference_dir: Path, tmp_path: Path) -> None:
        with pytest.raises(UsageError, match=r"must end in \.onnx"):
            export_model(reference_dir, tmp_path / "m")
        with pytest.raises(Pi05cError, match="does not exist"):
            export_model(reference_dir, tmp_path / "absent/m.onnx")

    def test_samples_of_another_prompt_length(self, reference_dir: Path, tmp_path: Path) -> None:
        with pytest.raises(Pi05cError, match=r"tokens .* has shape \[1, 24\], but a sample has \[1, 200\]"):
            export_model(
                reference_dir, tmp_path / "m.onnx", calibration=[reference_dir / "three_views.inputs.npz"]
            )
        assert not list(tmp_path.iterdir())


def test_the_full_size_graph_has_the_form_of_the_small_one(tiny_model: Path) -> None:
    """One layer of full width: the same operators as at small size, although nothing was folded or is small."""
    full = CONFIGS["pi05_libero"]
    sizes = asdict(full.architecture)
    for part, depth in (("vision", 2), ("llm", 3), ("expert", 3)):
        sizes[part]["depth"] = depth
    config = parse_config({"architecture": sizes, "action_horizon": 10}, "shallow")
    small = onnx.load(tiny_model, load_external_data=False)
    wide = trace(config, {})

    def operators(proto: onnx.ModelProto) -> list[tuple[str, str]]:
        return sorted((node.op_type, node.name) for node in nodes(proto.graph) if node.op_type != "Constant")

    assert operators(wide) == operators(small)


def test_scopes_are_left_out_rather_than_wrong() -> None:
    assert match_scopes([("a", (1,)), ("b", (2,))], [("x", (1,)), ("y", (2,))]) == {"a": "x", "b": "y"}
    assert match_scopes([("a", (1,)), ("b", (2,))], [("x", (1,)), ("y", (3,))]) == {}
    assert match_scopes([("a", (1,))], [("x", (1,)), ("y", (3,))]) == {}
