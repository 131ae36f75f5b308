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
import textwrap
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
at small size; the other graphs are those that packages ship, or make of such exports. A cell holds the worst relative L2
error of the outputs on held-back random samples, or why the command ended. The last column is the plan of the last pipeline
that went through, by TensorRT-RTX for sm120.

| graph | from | nodes | exact | fp16 | default | plan |
|---|---|---|---|---|---|---|
"""

NOTES = """
Why some end:

- RapidOCR detection gives a map of probabilities, which on random images stay below 4e-6. In float16 its logits are within
  0.0012, and an error of 0.04 in a logit of -13 is one of 4% in the probability: that is float16, not a defect of a pass.
- CLIP: FP8 costs the text embedding of this network of random weights 0.10, and its products with that of the image 0.16.
- ResNet in INT8: `default` lets no convolution run quantized. What it makes is 0.020 from the graph and 0.032 from the
  float32 network, from which the graph itself is 0.037; with `default,-disable_conv2d_quant` it is 0.030 from the graph.
- TensorRT has no zero points other than 0, which onnxruntime's quantizer makes by default, and no operators of `ai.onnx.ml`.
- TensorRT-RTX 1.7 fails on the nested branches of Silero VAD.
"""

_MESSAGE_CHARACTERS = 160


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


class _WithPast(torch.nn.Module):
    """A decoder that takes the keys and values of earlier tokens and gives those of all."""

    def __init__(self, module: torch.nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(
        self, tokens: torch.Tensor, keys: torch.Tensor, values: torch.Tensor
    ) -> tuple[torch.Tensor, ...]:
        from transformers import DynamicCache

        past = DynamicCache()
        for layer in range(keys.shape[0]):
            past.update(keys[layer], values[layer], layer)
        positions = torch.arange(keys.shape[3], keys.shape[3] + tokens.shape[1])[None]
        result = self.module(tokens, past_key_values=past, position_ids=positions, use_cache=True)
        layers = result.past_key_values.layers
        return (
            result.logits,
            torch.stack([layer.keys for layer in layers]),
            torch.stack([layer.values for layer in layers]),
        )


class _Named(torch.nn.Module):
    """A module of transformers called by keywords, and some of its results."""

    def __init__(
        self, module: torch.nn.Module, takes: tuple[str, ...], gives: tuple[str, ...], **fixed: Any
    ) -> None:
        super().__init__()
        self.module, self.takes, self.gives, self.fixed = module, takes, gives, fixed

    def forward(self, *inputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
        result = self.module(**dict(zip(self.takes, inputs, strict=True)), **self.fixed)
        return tuple(result[name] for name in self.gives)


class _Recurrent(torch.nn.Module):
    """Two layers of LSTM in both directions, and a linear on the last step."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm = torch.nn.LSTM(16, 32, num_layers=2, bidirectional=True, batch_first=True)
        self.out = torch.nn.Linear(64, 8)

    def forward(self, steps: torch.Tensor) -> torch.Tensor:
        result = self.out(self.lstm(steps)[0][:, -1])
        assert isinstance(result, torch.Tensor)
        return result


def _upsampler() -> torch.nn.Module:
    return torch.nn.Sequential(
        torch.nn.ConvTranspose2d(16, 32, 4, 2, 1), torch.nn.BatchNorm2d(32), torch.nn.LeakyReLU(0.2),
        torch.nn.ConvTranspose2d(32, 16, 3, 2, 1, output_padding=1), torch.nn.InstanceNorm2d(16), torch.nn.ELU(),
        torch.nn.Conv2d(16, 3, 3, padding=1), torch.nn.Sigmoid(),
    )  # fmt: skip


def traced(
    module: Callable[[], torch.nn.Module], value: torch.Tensor, axes: dict[int, str]
) -> Callable[[Path], None]:
    """A writer by the TorchScript exporter, at opset 17, with axes of the input `x` that vary."""

    def write(path: Path) -> None:
        torch.manual_seed(0)
        torch.onnx.export(
            module().eval(), (value,), str(path), dynamo=False, opset_version=17, input_names=["x"], dynamic_axes={"x": axes}
        )  # fmt: skip

    return write


def quantized(
    write: Callable[[Path], None], *, static: bool, symmetric: bool = False
) -> Callable[[Path], None]:
    """A writer of what onnxruntime makes of a model: Q/DQ with INT8 and measured scales, or integer products."""

    def write_quantized(path: Path) -> None:
        from onnxruntime.quantization import (
            CalibrationDataReader,
            QuantFormat,
            quantize_dynamic,
            quantize_static,
        )

        plain = path.with_name("plain.onnx")
        write(plain)

        class Reader(CalibrationDataReader):  # type: ignore[misc]
            def __init__(self) -> None:
                write_samples(plain, {})
                arrays = dict(np.load(plain.with_name("samples.npz")))
                self.rows = iter(
                    [{name: each[row] for name, each in arrays.items()} for row in range(SAMPLES)]
                )

            def get_next(self) -> Any:
                return next(self.rows, None)

        if static:
            chosen = {"ActivationSymmetric": symmetric}
            quantize_static(plain, path, Reader(), quant_format=QuantFormat.QDQ, extra_options=chosen)
        else:
            quantize_dynamic(plain, path)

    return write_quantized


def in_float16(write: Callable[[Path], None]) -> Callable[[Path], None]:
    """A writer of what onnxconverter_common makes of a model."""

    def write_float16(path: Path) -> None:
        from onnxconverter_common import float16

        write(path)
        onnx.save(float16.convert_float_to_float16(onnx.load(path)), path)

    return write_float16


def learned(*steps: Callable[[], Any]) -> Callable[[Path], None]:
    """A writer of a scikit-learn pipeline, fitted to made-up rows, by skl2onnx."""

    def write(path: Path) -> None:
        from skl2onnx import to_onnx
        from sklearn.pipeline import make_pipeline

        rows = np.random.default_rng(0).standard_normal((200, 16)).astype(np.float32)
        model = make_pipeline(*(step() for step in steps)).fit(
            rows, (rows[:, 0] + rows[:, 1] > 0).astype(int)
        )
        onnx.save(to_onnx(model, rows[:1], options={"zipmap": False}, target_opset=17), path)

    return write


def with_functions(path: Path) -> None:
    """Write a gated MLP whose norm and activation are functions of the model, which onnxscript makes."""
    from onnx import numpy_helper
    from onnxscript import opset18 as op
    from onnxscript import script
    from onnxscript.values import Opset

    own = Opset("own.functions", 1)
    rng = np.random.default_rng(0)
    gate, up, down = (
        numpy_helper.from_array((rng.standard_normal(shape) / 8).astype(np.float32))
        for shape in ((64, 128), (64, 128), (128, 64))
    )

    @script(own)  # type: ignore[untyped-decorator]
    def rms_norm(x):  # type: ignore[no-untyped-def]
        squares = op.ReduceMean(x * x, op.Constant(value_ints=[-1]))
        return x / op.Sqrt(squares + op.CastLike(1e-6, x))

    @script(own)  # type: ignore[untyped-decorator]
    def silu(x):  # type: ignore[no-untyped-def]
        return x * op.Sigmoid(x)

    @script()  # type: ignore[untyped-decorator]
    def mlp(x):  # type: ignore[no-untyped-def]
        normed = rms_norm(x)
        wide = silu(op.MatMul(normed, op.Constant(value=gate))) * op.MatMul(normed, op.Constant(value=up))
        return x + op.MatMul(wide, op.Constant(value=down))

    model = mlp.to_model_proto(ir_version=8)
    for value in (*model.graph.input, *model.graph.output):
        value.CopyFrom(onnx.helper.make_tensor_value_info(value.name, onnx.TensorProto.FLOAT, [1, 16, 64]))
    onnx.save(model, path)


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
    few = torch.zeros(1, 4, dtype=torch.int64)
    states = torch.zeros(1, 16, 64)
    tower = {
        key: vision[key]
        for key in ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    }

    def past(heads: int) -> tuple[torch.Tensor, torch.Tensor]:
        return torch.zeros(3, 1, heads, 8, 16), torch.zeros(3, 1, heads, 8, 16)

    gpt = {"vocab_size": 64, "n_embd": 64, "n_layer": 3, "n_head": 4, "n_positions": 64}
    yield Case(
        "GPT-2 with past",
        "transformers",
        exported(lambda: _WithPast(t.GPT2LMHeadModel(t.GPT2Config(**gpt))), few, *past(4)),
        {},
    )
    yield Case(
        "Llama with past",
        "transformers",
        exported(
            lambda: _WithPast(t.LlamaForCausalLM(t.LlamaConfig(**{**text, "use_cache": True}))), few, *past(2)
        ),
        {},
    )
    reads = ("input_ids", "encoder_hidden_states")

    def t5_decoder() -> torch.nn.Module:
        config = t.T5Config(
            vocab_size=64,
            d_model=64,
            d_kv=16,
            d_ff=128,
            num_layers=3,
            num_heads=4,
            decoder_start_token_id=0,
            attn_implementation="eager",
        )
        decoder = t.T5ForConditionalGeneration(config).get_decoder()
        return _Named(decoder, reads, ("last_hidden_state",), use_cache=False)

    yield Case("T5 decoder", "transformers", exported(t5_decoder, tokens, states), {})

    def whisper_decoder() -> torch.nn.Module:
        from transformers.models.whisper.modeling_whisper import WhisperDecoder

        config = t.WhisperConfig(
            **whisper,
            decoder_layers=3,
            decoder_attention_heads=4,
            decoder_ffn_dim=128,
            max_target_positions=32,
        )
        return _Named(WhisperDecoder(config), reads, ("last_hidden_state",), use_cache=False)

    yield Case("Whisper decoder", "transformers", exported(whisper_decoder, tokens, states), {})

    def bert() -> torch.nn.Module:
        return _Named(
            t.BertModel(t.BertConfig(**tower, vocab_size=64)),
            ("input_ids",),
            ("last_hidden_state", "pooler_output"),
        )

    yield Case("BERT", "transformers", exported(bert, tokens), {})

    def clip() -> torch.nn.Module:
        config = t.CLIPConfig(
            text_config={**tower, "vocab_size": 64, "max_position_embeddings": 16, "eos_token_id": 63},
            vision_config=vision,
            projection_dim=32,
        )
        return _Named(t.CLIPModel(config), ("pixel_values", "input_ids"), ("logits_per_image", "text_embeds"))

    yield Case("CLIP", "transformers", exported(clip, image, tokens.expand(2, 16).contiguous()), {})

    def detr() -> torch.nn.Module:
        sizes = {"decoder_layers": 2, "encoder_layers": 2, "decoder_ffn_dim": 128, "encoder_ffn_dim": 128}
        heads = {"encoder_attention_heads": 4, "decoder_attention_heads": 4}
        config = t.DetrConfig(
            **sizes, **heads, d_model=64, num_queries=10, use_timm_backbone=False, use_pretrained_backbone=False,
            backbone=None, backbone_config=t.ResNetConfig(**resnet, out_features=["stage4"]),
        )  # fmt: skip
        return _Named(t.DetrForObjectDetection(config), ("pixel_values",), ("logits", "pred_boxes"))

    yield Case("DETR", "transformers", exported(detr, image), {})
    yield Case("ConvTranspose decoder", "torch", exported(_upsampler, torch.zeros(1, 16, 16, 16)), {})
    yield Case("LSTM", "torch", exported(_Recurrent, torch.zeros(1, 12, 16)), {})
    yield Case(
        "LSTM, axes that vary",
        "torch (TorchScript)",
        traced(_Recurrent, torch.zeros(1, 12, 16), {0: "batch", 1: "time"}),
        {"x": (2, 12, 16)},
    )

    def vit() -> torch.nn.Module:
        return _First(t.ViTModel(t.ViTConfig(**vision)))

    yield Case(
        "ViT, batch that varies",
        "transformers (TorchScript)",
        traced(vit, image, {0: "batch"}),
        {"x": (2, 3, 64, 64)},
    )
    yield Case("ViT in float16", "onnxconverter-common", in_float16(exported(vit, image)), {})
    yield Case(
        "Llama in float16",
        "transformers, half()",
        exported(lambda: _First(t.LlamaModel(t.LlamaConfig(**text)).half(), use_cache=False), tokens),
        {},
    )
    plain = exported(lambda: _First(t.ResNetModel(t.ResNetConfig(**resnet))), image)
    yield Case("ResNet in INT8", "onnxruntime, static Q/DQ", quantized(plain, static=True), {})
    yield Case(
        "ResNet in INT8, zero points 0",
        "onnxruntime, static Q/DQ",
        quantized(plain, static=True, symmetric=True),
        {},
    )
    yield Case("BERT in INT8", "onnxruntime, dynamic", quantized(exported(bert, tokens), static=False), {})
    yield Case("MLP of functions", "onnxscript", with_functions, {})

    def scaler() -> Any:
        from sklearn.preprocessing import StandardScaler

        return StandardScaler()

    def perceptron() -> Any:
        from sklearn.neural_network import MLPClassifier

        return MLPClassifier((32,), max_iter=50, random_state=0)

    def forest() -> Any:
        from sklearn.ensemble import RandomForestClassifier

        return RandomForestClassifier(5, random_state=0)

    yield Case("Scaler and perceptron", "skl2onnx", learned(scaler, perceptron), {"X": (8, 16)})
    yield Case("Scaler and forest", "skl2onnx", learned(scaler, forest), {"X": (8, 16)})
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
        said = said.removeprefix("error: ").replace(str(model.parent) + "/", "").replace("|", "/")
        return shortened(said), False
    errors = json.loads((output / "manifest.json").read_text())["verification"]["errors"]
    return f"{max(float(error['relative_l2']) for error in errors):.2g}", True


def shortened(said: str) -> str:
    """A message without what it proposes, and no longer than a cell may be."""
    return textwrap.shorten(said.split(": the result is kept")[0], _MESSAGE_CHARACTERS, placeholder=" ...")


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
        page.write_text(HEAD + rows + NOTES, encoding="utf-8")
        print(rows.splitlines()[-1], flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
