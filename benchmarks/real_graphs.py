"""Compiles graphs that were not made for pi05c, and writes the table of docs/real-graphs.md.

    make real-graphs

Architectures of transformers, and a U-Net, are exported with random weights at small size, at opset 21; other graphs
are those that packages of the registry ship. Samples are seeded and random.
"""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch

OPSET = 21
SAMPLES = 4
PIPELINES = ("exact", "fp16", "default")
BUILD_TARGET = "sm120"
LIMIT_S = 300

HEAD = """\
# Graphs of others

`make real-graphs` compiles graphs that were not made for pi05c. Architectures are exported with random weights
at small size; the other graphs are those that packages ship. A cell holds the worst relative L2 error of the outputs on
held-back random samples, or why the command ended. The last column is the plan of the last pipeline that went through,
by TensorRT-RTX for sm120.

| graph | from | nodes | exact | fp16 | default | plan |
|---|---|---|---|---|---|---|
"""


@dataclass(frozen=True)
class Case:
    """A graph: how it is made, from what, and the sizes of its dynamic dimensions."""

    name: str
    source: str
    write: Callable[[Path], None]
    sizes: dict[str, tuple[int, ...]]


def exported(module: Callable[[], torch.nn.Module], *inputs: torch.Tensor) -> Callable[[Path], None]:
    """A writer of a module in evaluation mode."""

    def write(path: Path) -> None:
        torch.manual_seed(0)
        program = torch.onnx.export(module().eval(), inputs, dynamo=True, opset_version=OPSET, verbose=False)
        assert program is not None
        program.save(path)

    return write


def shipped(package: str, pattern: str) -> Callable[[Path], None]:
    """A writer of a file that an installed package holds."""

    def write(path: Path) -> None:
        spec = importlib.util.find_spec(package)
        assert spec is not None, package
        assert spec.origin is not None, package
        (found,) = Path(spec.origin).parent.glob(pattern)
        path.write_bytes(found.read_bytes())

    return write


class _First(torch.nn.Module):
    """The first output of a module of transformers."""

    def __init__(self, module: torch.nn.Module, **fixed: Any) -> None:
        super().__init__()
        self.module, self.fixed = module, fixed

    def forward(self, value: torch.Tensor) -> torch.Tensor:
        result = self.module(value, return_dict=False, **self.fixed)[0]
        assert isinstance(result, torch.Tensor)
        return result


class _UNet(torch.nn.Module):
    """Convolutions down and up again, with skips, GroupNorm and SiLU."""

    def __init__(self, channels: tuple[int, ...] = (16, 32, 64)) -> None:
        super().__init__()
        sizes = [3, *channels]
        self.down = torch.nn.ModuleList(map(self._block, sizes[:-1], sizes[1:]))
        self.up = torch.nn.ModuleList(
            self._block(low + high, high) for low, high in zip(channels[:0:-1], channels[-2::-1], strict=True)
        )
        self.out = torch.nn.Conv2d(channels[0], 3, 1)

    def _block(self, before: int, after: int) -> torch.nn.Module:
        return torch.nn.Sequential(
            torch.nn.Conv2d(before, after, 3, padding=1), torch.nn.GroupNorm(8, after), torch.nn.SiLU(),
            torch.nn.Conv2d(after, after, 3, padding=1), torch.nn.GroupNorm(8, after), torch.nn.SiLU(),
        )  # fmt: skip

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        skips: list[torch.Tensor] = []
        for block in self.down:
            image = block(image if not skips else torch.nn.functional.max_pool2d(image, 2))
            skips.append(image)
        for block, skip in zip(self.up, skips[-2::-1], strict=True):
            image = block(torch.cat([torch.nn.functional.interpolate(image, scale_factor=2.0), skip], 1))
        result = self.out(image)
        assert isinstance(result, torch.Tensor)
        return result


def cases() -> Iterator[Case]:
    """All graphs."""
    import transformers as t

    image = torch.zeros(1, 3, 64, 64)
    tokens = torch.zeros(1, 16, dtype=torch.int64)
    text = {
        "vocab_size": 64, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 3, "num_attention_heads": 4,
        "num_key_value_heads": 2, "head_dim": 16, "use_cache": False,
    }  # fmt: skip
    vision = {
        "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 3, "num_attention_heads": 4, "image_size": 64,
        "patch_size": 16,
    }  # fmt: skip
    yield Case("ViT", "transformers", exported(lambda: _First(t.ViTModel(t.ViTConfig(**vision))), image), {})
    resnet = {"embedding_size": 16, "hidden_sizes": [16, 32, 64, 128], "depths": [2, 2, 2, 2]}
    yield Case(
        "ResNet", "transformers", exported(lambda: _First(t.ResNetModel(t.ResNetConfig(**resnet))), image), {}
    )
    yield Case(
        "MobileNetV2",
        "transformers",
        exported(lambda: _First(t.MobileNetV2Model(t.MobileNetV2Config(image_size=64))), image),
        {},
    )
    yield Case("U-Net", "torch", exported(_UNet, image), {})
    yield Case(
        "SigLIP",
        "transformers",
        exported(lambda: _First(t.SiglipVisionModel(t.SiglipVisionConfig(**vision))), image),
        {},
    )
    yield Case(
        "Gemma",
        "transformers",
        exported(lambda: _First(t.GemmaModel(t.GemmaConfig(**text)), use_cache=False), tokens),
        {},
    )
    yield Case(
        "Llama",
        "transformers",
        exported(lambda: _First(t.LlamaModel(t.LlamaConfig(**text)), use_cache=False), tokens),
        {},
    )
    whisper = {
        "d_model": 64, "encoder_layers": 3, "encoder_attention_heads": 4, "encoder_ffn_dim": 128, "num_mel_bins": 16,
        "max_source_positions": 32, "vocab_size": 64, "pad_token_id": 0,
    }  # fmt: skip

    def encoder() -> torch.nn.Module:
        from transformers.models.whisper.modeling_whisper import WhisperEncoder

        return _First(WhisperEncoder(t.WhisperConfig(**whisper)))

    yield Case("Whisper encoder", "transformers", exported(encoder, torch.zeros(1, 16, 64)), {})
    yield Case(
        "Silero VAD",
        "silero-vad",
        shipped("silero_vad", "data/silero_vad.onnx"),
        {"input": (1, 512), "state": (2, 1, 128), "sr": ()},
    )
    yield Case("Magika", "magika", shipped("magika", "models/standard_v3_3/model.onnx"), {"bytes": (1, 2048)})
    for part, pattern, size in (
        ("detection", "models/*det*.onnx", (1, 3, 64, 64)),
        ("recognition", "models/*rec*.onnx", (1, 3, 48, 96)),
        ("direction", "models/*cls*.onnx", (1, 3, 48, 192)),
    ):
        yield Case(
            f"RapidOCR {part}", "rapidocr-onnxruntime", shipped("rapidocr_onnxruntime", pattern), {"x": size}
        )


def write_samples(model: Path, sizes: dict[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
    """Random samples beside a model; the shape of each input."""
    rng = np.random.default_rng(0)
    arrays, shapes = {}, {}
    for value in onnx.load(model, load_external_data=False).graph.input:
        tensor = value.type.tensor_type
        shape = sizes.get(value.name, tuple(dim.dim_value for dim in tensor.shape.dim))
        dtype = onnx.helper.tensor_dtype_to_np_dtype(tensor.elem_type)
        drawn = rng.standard_normal((SAMPLES, *shape))
        if dtype.kind in "iu":
            drawn = (
                np.full((SAMPLES, *shape), 16000) if value.name == "sr" else rng.integers(0, 64, drawn.shape)
            )
        arrays[value.name], shapes[value.name] = drawn.astype(dtype), shape
    np.savez(model.with_name("samples.npz"), **arrays)
    return shapes


def compiled(model: Path, pipeline: str, *words: str) -> tuple[str, bool]:
    """What came of compiling a model: the worst error or the reason, and whether it went through."""
    output = model.with_name(f"engine-{pipeline}")
    command = [sys.executable, "-m", "pi05c", str(model), "--passes", pipeline, "-o", str(output), "--quiet"]
    command += ["--calibration", str(model.with_name("samples.npz")), *words]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=LIMIT_S)
    except subprocess.TimeoutExpired:
        return f"not finished in {LIMIT_S} s", False
    if done.returncode:
        (said,) = done.stderr.strip().splitlines()[-1:] or ["no word"]
        return said.removeprefix("error: ").replace(str(model.parent) + "/", "").replace("|", "/"), False
    errors = json.loads((output / "manifest.json").read_text())["verification"]["errors"]
    return f"{max(float(error['relative_l2']) for error in errors):.2g}", True


def row(case: Case, folder: Path) -> str:
    """One line of the table."""
    folder.mkdir(parents=True, exist_ok=True)
    model = folder / "model.onnx"
    case.write(model)
    shapes = write_samples(model, case.sizes)
    cells, last = [], ""
    for pipeline in PIPELINES:
        said, through = compiled(model, pipeline, "--backend", "onnxruntime")
        cells.append(said)
        last = pipeline if through else last
    plan = "none"
    if last:
        words = ["--backend", "tensorrt-rtx", "--target", BUILD_TARGET]
        for name in case.sizes:
            size = "x".join(map(str, shapes[name]))
            words += ["--shapes", f"{name}={size}:{size}:{size}"] if size else []
        said, through = compiled(model, last, *words)
        plan = f"built ({last})" if through else said
    nodes = len(onnx.load(model, load_external_data=False).graph.node)
    return f"| {case.name} | {case.source} | {nodes:,} | {' | '.join(cells)} | {plan} |\n"


def main(folder: Path, page: Path) -> None:
    """Try every graph; the page is written anew after each."""
    rows = ""
    for case in cases():
        try:
            rows += row(case, folder / case.name.lower().replace(" ", "-"))
        except (
            Exception
        ) as error:  # an exporter that does not take the architecture, a package without the file
            rows += f"| {case.name} | {case.source} | not made: {type(error).__name__} | | | | |\n"
        page.write_text(HEAD + rows, encoding="utf-8")
        print(rows.splitlines()[-1], flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
