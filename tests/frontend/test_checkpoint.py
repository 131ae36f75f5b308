"""Checkpoint folders are opened strictly: what does not fit is named, all of it, in one error."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

torch = pytest.importorskip("torch", reason="checkpoints are checked against the model, which needs [torch]")

from safetensors.torch import load_file, save_file  # noqa: E402

from pi05c.frontend.checkpoint import EMBEDDING, EXPERT_HEAD, LANGUAGE_HEAD, open_checkpoint  # noqa: E402
from pi05c.frontend.config import CONFIGS  # noqa: E402
from pi05c.graph.errors import Pi05cError  # noqa: E402
from pi05c.graph.weights import Stored  # noqa: E402

if TYPE_CHECKING:
    from torch import Tensor

DATA = Path(__file__).parents[1] / "data"
Tensors = dict[str, "Tensor"]
Edit = Callable[[Tensors], object]


@pytest.fixture
def edited(tmp_path: Path) -> Callable[[Edit], Path]:
    """Makes a copy of the reference checkpoint whose tensors an edit has changed."""

    def make(edit: Edit) -> Path:
        tensors = load_file(DATA / "pi05_tiny/model.safetensors")
        edit(tensors)
        save_file(tensors, tmp_path / "model.safetensors")
        shutil.copy(DATA / "pi05_tiny/config.json", tmp_path)
        return tmp_path

    return make


def test_both_layouts_hold_the_same_weights() -> None:
    openpi, lerobot = open_checkpoint(DATA / "pi05_tiny"), open_checkpoint(DATA / "pi05_tiny_lerobot")
    assert set(openpi.weights) == set(lerobot.weights)
    assert len(openpi.weights) == 113
    for name, weight in openpi.weights.items():
        assert weight.checksum() == lerobot.weights[name].checksum(), name


def test_weights_are_byte_ranges_of_the_file(reference_dir: Path) -> None:
    checkpoint = open_checkpoint(reference_dir)
    assert all(isinstance(weight, Stored) for weight in checkpoint.weights.values())
    assert checkpoint.weights[EMBEDDING] is checkpoint.weights[LANGUAGE_HEAD]


def test_provenance_names_and_hashes_the_files(reference_dir: Path) -> None:
    provenance = open_checkpoint(reference_dir).provenance()
    assert provenance["folder"] == "pi05_tiny"
    assert [len(value) for value in provenance["sha256"].values()] == [64]


@pytest.mark.parametrize("absent", [EMBEDDING, LANGUAGE_HEAD])
def test_either_name_of_the_tied_table_will_do(edited: Callable[[Edit], Path], absent: str) -> None:
    def edit(tensors: Tensors) -> None:
        table = tensors.pop(LANGUAGE_HEAD)
        tensors[EMBEDDING if absent == LANGUAGE_HEAD else LANGUAGE_HEAD] = table

    expected = open_checkpoint(DATA / "pi05_tiny").weights[EMBEDDING].checksum()
    assert open_checkpoint(edited(edit)).weights[EMBEDDING].checksum() == expected


def test_an_untied_table_is_the_embedding(edited: Callable[[Edit], Path]) -> None:
    folder = edited(lambda tensors: tensors.update({EMBEDDING: tensors[LANGUAGE_HEAD] * 2}))
    weights = open_checkpoint(folder).weights
    assert weights[EMBEDDING].amax() == 2 * weights[LANGUAGE_HEAD].amax()


def test_the_dead_head_may_be_absent(edited: Callable[[Edit], Path]) -> None:
    assert EXPERT_HEAD not in open_checkpoint(edited(lambda tensors: tensors.pop(EXPERT_HEAD))).weights


def test_other_float_types_are_kept(edited: Callable[[Edit], Path]) -> None:
    name = "time_mlp_in.weight"
    folder = edited(lambda tensors: tensors.update({name: tensors[name].float()}))
    assert str(open_checkpoint(folder).weights[name].dtype) == "float32"


def test_everything_that_does_not_fit_is_in_one_error(edited: Callable[[Edit], Path]) -> None:
    def edit(tensors: Tensors) -> None:
        del tensors["time_mlp_in.bias"], tensors[LANGUAGE_HEAD]
        tensors["something.else"] = torch.zeros(3)
        tensors["action_in_proj.weight"] = torch.zeros(64, 7, dtype=torch.bfloat16)

    with pytest.raises(Pi05cError) as raised:
        open_checkpoint(edited(edit))
    for part in (
        "missing: time_mlp_in.bias",
        "embed_tokens.weight (or paligemma_with_expert.paligemma.lm_head.weight",
        "unknown: something.else",
        "action_in_proj.weight is [64, 7] instead of [64, 32]",
    ):
        assert part in str(raised.value)


def test_many_names_are_counted(edited: Callable[[Edit], Path]) -> None:
    folder = edited(lambda tensors: [tensors.pop(name) for name in list(tensors) if "mlp" in name])
    with pytest.raises(Pi05cError, match=r"and \d+ more"):
        open_checkpoint(folder)


def test_pi0_is_refused_by_name(edited: Callable[[Edit], Path]) -> None:
    def edit(tensors: Tensors) -> None:
        for name in [name for name in tensors if name.startswith("time_mlp")]:
            tensors[f"action_{name}"] = tensors.pop(name)
        tensors["state_proj.weight"] = torch.zeros(64, 32)

    with pytest.raises(Pi05cError, match=r"checkpoint of pi0, not of pi0\.5 .*state_proj\.weight"):
        open_checkpoint(edited(edit))


def test_types_that_no_checkpoint_has_are_named(edited: Callable[[Edit], Path]) -> None:
    folder = edited(
        lambda tensors: tensors.update({"time_mlp_in.bias": torch.zeros(64, dtype=torch.float64)})
    )
    with pytest.raises(Pi05cError, match=r"time_mlp_in\.bias \(F64\)"):
        open_checkpoint(folder)


class TestShards:
    """A checkpoint in two files with an index."""

    @pytest.fixture
    def folder(self, tmp_path: Path) -> Path:
        tensors = load_file(DATA / "pi05_tiny/model.safetensors")
        names = sorted(tensors)
        shards = {
            "model-00001-of-00002.safetensors": names[:50],
            "model-00002-of-00002.safetensors": names[50:],
        }
        for shard, held in shards.items():
            save_file({name: tensors[name] for name in held}, tmp_path / shard)
        index = {"weight_map": {name: shard for shard, held in shards.items() for name in held}}
        (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
        shutil.copy(DATA / "pi05_tiny/config.json", tmp_path)
        return tmp_path

    def test_shards_are_one_checkpoint(self, folder: Path) -> None:
        whole, sharded = open_checkpoint(DATA / "pi05_tiny"), open_checkpoint(folder)
        assert {n: w.checksum() for n, w in sharded.weights.items()} == {
            n: w.checksum() for n, w in whole.weights.items()
        }
        assert len(sharded.provenance()["sha256"]) == 2

    def test_a_missing_shard_is_named(self, folder: Path) -> None:
        (folder / "model-00002-of-00002.safetensors").unlink()
        with pytest.raises(Pi05cError, match=r"model-00002-of-00002\.safetensors"):
            open_checkpoint(folder)

    def test_a_tensor_that_its_shard_lacks_is_named(self, folder: Path) -> None:
        path = folder / "model.safetensors.index.json"
        index = json.loads(path.read_text())
        index["weight_map"]["time_mlp_in.bias"] = "model-00001-of-00002.safetensors"
        path.write_text(json.dumps(index))
        with pytest.raises(Pi05cError, match=r"time_mlp_in\.bias"):
            open_checkpoint(folder)


class TestFolders:
    """What is not a checkpoint says so."""

    def test_no_folder(self, tmp_path: Path) -> None:
        with pytest.raises(Pi05cError, match="is not a checkpoint folder"):
            open_checkpoint(tmp_path / "absent")

    def test_an_empty_folder(self, tmp_path: Path) -> None:
        with pytest.raises(Pi05cError, match=r"neither model\.safetensors nor"):
            open_checkpoint(tmp_path)

    def test_a_jax_checkpoint(self, tmp_path: Path) -> None:
        (tmp_path / "params").mkdir()
        with pytest.raises(Pi05cError, match="convert_jax_model_to_pytorch"):
            open_checkpoint(tmp_path)

    def test_without_a_configuration_one_must_be_named(self, tmp_path: Path) -> None:
        shutil.copy(DATA / "pi05_tiny/model.safetensors", tmp_path)
        with pytest.raises(Pi05cError, match="--config"):
            open_checkpoint(tmp_path)
        assert open_checkpoint(tmp_path, CONFIGS["pi05_tiny"]).config.prompt_length == 24

    @pytest.mark.parametrize("size", [0, 4, 2000, -1])
    def test_a_truncated_file(self, tmp_path: Path, size: int) -> None:
        content = (DATA / "pi05_tiny/model.safetensors").read_bytes()
        (tmp_path / "model.safetensors").write_bytes(content[:size])
        shutil.copy(DATA / "pi05_tiny/config.json", tmp_path)
        with pytest.raises(Pi05cError, match="truncated"):
            open_checkpoint(tmp_path)

    def test_the_wrong_configuration(self, tmp_path: Path) -> None:
        shutil.copy(DATA / "pi05_tiny/model.safetensors", tmp_path)
        with pytest.raises(
            Pi05cError, match=r"of another shape: action_in_proj\.bias is \[64\] instead of \[1024\]"
        ):
            open_checkpoint(tmp_path, CONFIGS["pi05_libero"])
