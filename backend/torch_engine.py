"""A graph in torch as the part of a session: its nodes launched one after the other, on the CPU or a GPU."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from torch import Tensor

from pi05c.backend.signature import specs_of
from pi05c.backend.torch_device import TorchCpu, TorchCuda
from pi05c.backend.torch_graph import TorchGraph, translate


class TorchEngine:
    """A translated graph; its tensors are those of torch, on `device`.

    Attributes:
        inputs: what `run` takes.
        outputs: what `run` gives.
        module: the translation; None once it is closed.
    """

    def __init__(self, model: Path, device: TorchCpu | TorchCuda, module: TorchGraph | None = None) -> None:
        """Load the graph at `model`.

        Args:
            module: its translation on the device, where that is there already.

        Raises:
            Pi05cError: it cannot be read, or holds an operator outside the table.
        """
        self._device = device
        self.inputs, self.outputs = specs_of(model)
        self.module: TorchGraph | None = module or translate(model, str(device.device))

    def begin(self) -> None:
        """Start a run of the policy."""

    def run(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Run once, on the device's stream."""
        given = [inputs[spec.name] for spec in self.inputs]
        values = self._device.run(lambda: self._call(given))
        return {spec.name: value for spec, value in zip(self.outputs, values, strict=True)}

    def _call(self, given: list[Tensor]) -> Sequence[Tensor]:
        """The outputs, in order."""
        assert self.module is not None
        return self.module(*given)  # type: ignore[no-any-return]

    def save_cache(self) -> None:
        """Nothing is kept for the next process."""

    def close(self) -> None:
        """Let go of the weights."""
        self.module = None


__all__ = ["TorchEngine"]
