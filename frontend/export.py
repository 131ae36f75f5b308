"""`pi05c export`: from a checkpoint, or from a seed, to the plain graph on disk with what belongs beside it."""

from __future__ import annotations

import json
import platform
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING

from pi05c.frontend.config import Pi05Config, named_config
from pi05c.frontend.samples import is_synthetic, read_samples, synthetic_samples, write_samples
from pi05c.graph.errors import Pi05cError, UsageError
from pi05c.graph.files import refuse_replacing
from pi05c.graph.io import model_from_proto, save
from pi05c.graph.requirements import WITH_TORCH, refuse_unsupported

if TYPE_CHECKING:
    from pi05c.frontend.checkpoint import Checkpoint
    from pi05c.graph.weights import Weight

FORMAT_VERSION = "1"
"""Version of the metadata keys below."""

FORMAT_KEY = "pi05c.format"
CONFIG_KEY = "pi05c.config"
WEIGHTS_KEY = "pi05c.weights"
SEED_KEY = "pi05c.seed"
CHECKPOINT_KEY = "pi05c.checkpoint"
VERSIONS_KEY = "pi05c.versions"
ROBOT_KEY = "pi05c.robot"

_RECORDED_VERSIONS = ("pi05c", "torch", "onnx", "onnx-ir", "onnxscript", "numpy", "ml_dtypes")


@dataclass(frozen=True)
class ExportResult:
    """What an export wrote.

    Attributes:
        model: the graph; its weights lie beside it in `<name>.data`.
        calibration: the samples beside it, if any.
        synthetic: whether those samples are made up.
        config: the configuration that the graph was made for.
        parameters: number of weights that the graph holds (elements, not tensors).
        nbytes: their size.
        seconds: wall time.
    """

    model: Path
    calibration: Path | None
    synthetic: bool
    config: Pi05Config
    parameters: int
    nbytes: int
    seconds: float


def export_model(
    checkpoint: Path | None,
    output: Path,
    *,
    config: str | None = None,
    random: bool = False,
    seed: int = 0,
    batch: int = 1,
    views: int | None = None,
    prompt_length: int | None = None,
    horizon: int | None = None,
    steps: int | None = None,
    calibration: Sequence[Path] = (),
    progress: Callable[[str], None] | None = None,
) -> ExportResult:
    """Write the plain ONNX graph of a pi0.5 policy.

    Inputs: images [B, V, 3, S, S] float32 in [-1, 1], image_masks [B, V] bool, tokens [B, L] int64, token_masks
    [B, L] bool, noise [B, H, D] float32. Output: actions [B, H, D] float32. All dimensions are static.

    Args:
        checkpoint: folder of an openpi or LeRobot checkpoint; None with `random`.
        output: the `.onnx` file; weights go to `<output>.data`, samples to `<stem>.calibration.npz`.
        config: a named configuration, or the path of a `config.json`, for what the checkpoint leaves open.
        random: make seeded weights instead of reading a checkpoint.
        seed: of the random weights and of their synthetic samples.
        batch: B.
        views: V; the checkpoint's cameras if None.
        prompt_length: L; the configuration's if None.
        horizon: H; the configuration's if None.
        steps: denoising steps; the configuration's if None.
        calibration: `.npz` files to check and put beside the model.
        progress: called with one line before each stage that takes time.

    Raises:
        UsageError: options that contradict each other.
        Pi05cError: the checkpoint, the samples or the output's folder is wrong, or torch is not installed.
    """
    started = time.monotonic()
    say = progress or (lambda line: None)
    if random == (checkpoint is not None):
        raise UsageError("pass either a checkpoint folder or --random with --config")
    if random and config is None:
        raise UsageError("--random needs --config: it says which network to make up")
    if output.suffix != ".onnx":
        raise UsageError(f"the output {output} must end in .onnx")
    sidecar = calibration_path(output)
    for file in (output, output.with_name(f"{output.name}.data"), sidecar):
        refuse_replacing(file, ())
    if random and not calibration and sidecar.is_file() and not is_synthetic(sidecar):
        raise Pi05cError(
            f"{sidecar} holds recorded samples, which made-up ones would replace: move it away, or choose another -o"
        )
    _require_torch()
    from pi05c.frontend.checkpoint import open_checkpoint
    from pi05c.frontend.model import parameter_shapes
    from pi05c.frontend.random_weights import random_weights
    from pi05c.frontend.trace import trace

    named = named_config(config) if config is not None else None
    opened: Checkpoint | None = None
    weights: Mapping[str, Weight]
    if checkpoint is not None:
        say(f"opening {checkpoint}")
        opened = open_checkpoint(checkpoint, named)
        base, weights = opened.config, opened.weights
    else:
        assert named is not None
        base, weights = named, random_weights(parameter_shapes(named), seed)
    resolved = base.with_options(
        batch=batch, views=views, prompt_length=prompt_length, horizon=horizon, steps=steps
    )
    samples = read_samples(calibration, resolved) if calibration else None
    synthetic = any(is_synthetic(path) for path in calibration)
    if samples is None and random:
        samples, synthetic = synthetic_samples(resolved, seed), True

    described = _metadata(resolved, opened, seed, say)

    say("tracing the policy")
    proto = trace(resolved, {name: weight.dtype for name, weight in weights.items()})
    model = model_from_proto(proto, weights=weights)
    model.metadata = described
    used = [weights[tensor.name] for tensor in proto.graph.initializer if tensor.name in weights]
    nbytes = sum(weight.nbytes for weight in used)
    say(f"writing {nbytes / 1e9:.2f} GB of weights")
    save(model, output)
    if samples is not None:
        write_samples(sidecar, samples, synthetic)
    elif is_synthetic(sidecar):
        sidecar.unlink()  # left by an export with --random under the same name
    return ExportResult(
        model=output,
        calibration=sidecar if samples is not None else None,
        synthetic=synthetic,
        config=resolved,
        parameters=sum(weight.nbytes // weight.dtype.itemsize for weight in used),
        nbytes=nbytes,
        seconds=time.monotonic() - started,
    )


def calibration_path(model: Path) -> Path:
    """Where the calibration samples of a model lie."""
    return model.with_name(f"{model.stem}.calibration.npz")


def _metadata(
    config: Pi05Config, checkpoint: Checkpoint | None, seed: int, say: Callable[[str], None]
) -> dict[str, str]:
    entries = {
        FORMAT_KEY: FORMAT_VERSION,
        CONFIG_KEY: config.to_json(),
        WEIGHTS_KEY: "random" if checkpoint is None else "checkpoint",
        VERSIONS_KEY: json.dumps(_versions()),
    }
    if checkpoint is None:
        from pi05c.frontend.robot import Robot

        return {
            **entries,
            SEED_KEY: str(seed),
            ROBOT_KEY: Robot(state_in_prompt=config.state_in_prompt).to_json(),
        }
    from pi05c.frontend.robot import read_robot

    say("hashing the checkpoint")
    return {
        **entries,
        CHECKPOINT_KEY: json.dumps(checkpoint.provenance()),
        ROBOT_KEY: read_robot(checkpoint).to_json(),
    }


def _versions() -> dict[str, str]:
    installed = {package.metadata["Name"]: package.version for package in metadata.distributions()}
    versions = {name: installed[name] for name in _RECORDED_VERSIONS if name in installed}
    return {"python": platform.python_version(), **versions}


def _require_torch() -> None:
    refuse_unsupported(WITH_TORCH)
    try:
        import onnxscript  # noqa: F401
        import torch  # noqa: F401
    except ImportError as error:
        raise Pi05cError(
            f"export needs {error.name}, which is not installed: pip install '{WITH_TORCH}'"
        ) from error


__all__ = [
    "CHECKPOINT_KEY",
    "CONFIG_KEY",
    "FORMAT_KEY",
    "FORMAT_VERSION",
    "ROBOT_KEY",
    "SEED_KEY",
    "VERSIONS_KEY",
    "WEIGHTS_KEY",
    "ExportResult",
    "calibration_path",
    "export_model",
]
