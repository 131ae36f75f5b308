"""The plain model in torch as a policy to measure engines against: op by op, or compiled by Inductor."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from pi05c.backend.signature import TensorSpec
from pi05c.chain import StageCall
from pi05c.contract import Contract
from pi05c.frontend.samples import input_specs
from pi05c.graph.errors import Pi05cError
from pi05c.graph.requirements import WITH_TORCH, refuse_unsupported
from pi05c.runtime import DeviceSession, Policy

if TYPE_CHECKING:
    from pi05c.frontend.config import Pi05Config

EAGER, COMPILED = "torch-eager", "torch-compile"
BASELINES = (EAGER, COMPILED)
"""Op by op, as Python launches it; and prefix and denoising step under `torch.compile`, on a GPU in one CUDA graph."""


def load_baseline(config: Pi05Config, kind: str, seed: int = 0) -> Policy:
    """The plain model with random weights: in BF16 on the GPU at hand, in float32 on the CPU where there is none.

    Raises:
        Pi05cError: torch is not installed, or not of a supported version.
    """
    refuse_unsupported(WITH_TORCH)
    try:
        import torch
    except ImportError as error:
        raise Pi05cError(
            f"--baseline needs torch, which is not installed: pip install '{WITH_TORCH}'"
        ) from error
    from pi05c.backend.torch_device import TorchCpu, TorchCuda
    from pi05c.frontend.plain import half_precision, random_policy

    device = TorchCuda() if torch.cuda.is_available() else TorchCpu()
    model = random_policy(config, device.device, seed)
    if device.on_gpu:
        model = half_precision(model)
    engine = _Plain(model, device, compiled=kind == COMPILED)
    inputs = [TensorSpec(spec.name, spec.dtype, spec.shape) for spec in input_specs(config)]
    session = DeviceSession(
        device, [engine], engine.run, inputs, engine.calls, capture=device.on_gpu and kind == COMPILED
    )
    actions = TensorSpec("actions", np.dtype(np.float32), (config.batch, config.horizon, config.action_dim))
    contract = Contract(inputs, vocabulary=config.architecture.llm.vocab_size)
    precision = "BF16" if device.on_gpu else "float32"
    return Policy(contract, [actions], kind, f"the plain model in {precision} on {device.name}", session)


class _Plain:
    """Prefix and denoising steps as a part of a session."""

    def __init__(self, model: Any, device: Any, *, compiled: bool) -> None:
        import torch

        def prefix(images: Any, image_masks: Any, tokens: Any, token_masks: Any) -> Any:
            return model.read_prefix(model.embed_images(images), image_masks, tokens, token_masks)

        step = model.denoise_step
        if compiled:
            prefix, step = (torch.compile(function, fullgraph=True) for function in (prefix, step))
        self.inputs: tuple[TensorSpec, ...] = ()
        self._model, self._device = model, device
        self._prefix: Any = prefix
        self._step: Any = step

    def run(self, inputs: Mapping[str, Any]) -> dict[str, Any]:
        """Put one run on the device's stream."""

        def work() -> Any:
            border = self._read(inputs)
            x, time = inputs["noise"], self._model.start_time
            for _ in range(self._model.config.steps):
                x, time = self._step(x, time, *border)
            return x

        return {"actions": self._device.run(work)}

    def calls(self, inputs: Mapping[str, Any]) -> list[StageCall]:
        """Prefix and step, each by itself."""
        run = self._device.run
        border = run(lambda: self._read(inputs))
        state = (inputs["noise"], self._model.start_time)
        return [
            StageCall("prefix", 1, lambda: run(lambda: self._read(inputs))),
            StageCall("step", self._model.config.steps, lambda: run(lambda: self._step(*state, *border))),
        ]

    def _read(self, inputs: Mapping[str, Any]) -> Any:
        names = ("images", "image_masks", "tokens", "token_masks")
        return self._prefix(*(inputs[name] for name in names))

    def begin(self) -> None:
        """Start a run of the policy."""

    def save_cache(self) -> None:
        """Nothing is kept."""

    def close(self) -> None:
        """Let go of the model."""
        self._model = self._prefix = self._step = None


__all__ = ["BASELINES", "load_baseline"]
