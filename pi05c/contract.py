"""What a policy may be fed: names, types, shapes, and values that a graph was made for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from pi05c.backend.signature import TensorSpec, check_inputs
from pi05c.graph.dtypes import BOOL
from pi05c.graph.errors import Pi05cError
from pi05c.graph.runner import Array
from pi05c.graph.specialization import FixedInput
from pi05c.manifest import Manifest


class Contract:
    """The inputs of a policy, and the check of an observation.

    Args:
        inputs: what is fed.
        fixed: what the graph was specialized for. An input that is fixed as a whole may be fed too, and is checked.
        vocabulary: number of token ids; None where it is not known.
    """

    def __init__(
        self, inputs: Sequence[TensorSpec], fixed: Sequence[FixedInput] = (), vocabulary: int | None = None
    ) -> None:
        names = {spec.name for spec in inputs}
        self.inputs = tuple(inputs)
        self._fixed = tuple(fixed)
        self._extra = tuple(TensorSpec(f.name, BOOL, f.shape) for f in fixed if f.name not in names)
        self.vocabulary = vocabulary

    def check(self, observation: Mapping[str, Any]) -> dict[str, Any]:
        """The inputs of the graph out of an observation of numpy arrays or torch tensors.

        Values are looked at where they are in host memory: token ids must be in the vocabulary, floats finite, and
        masks what the graph was specialized for. Of tensors on a GPU only name, type and shape are checked.

        Raises:
            Pi05cError: one sentence that names the input, what it holds and what is expected.
        """
        seen = {name: _Described(value) for name, value in observation.items()}
        specs = [*self.inputs, *(spec for spec in self._extra if spec.name in observation)]
        check_inputs(specs, seen)  # type: ignore[arg-type]
        for name, described in seen.items():
            if (values := described.host()) is not None:
                self._check_values(name, values)
        return {spec.name: observation[spec.name] for spec in self.inputs}

    def fixed_values(self) -> dict[str, Array]:
        """What inputs hold that the graph was specialized for; elements that the caller gives are true."""
        return {
            fixed.name: np.array([value is not False for value in fixed.values]).reshape(fixed.shape)
            for fixed in self._fixed
        }

    def _check_values(self, name: str, values: Array) -> None:
        for fixed in self._fixed:
            if fixed.name == name and (reason := fixed.obstacle(values)):
                raise Pi05cError(reason)
        if values.dtype.kind == "f" and not np.isfinite(values).all():
            kind = "NaN" if np.isnan(values).any() else "infinity"
            raise Pi05cError(f"input {name!r} holds {kind}: drop the observation")
        if values.dtype.kind == "i" and values.size and self.vocabulary is not None:
            low, high = int(values.min()), int(values.max())
            if low < 0 or high >= self.vocabulary:
                wrong = low if low < 0 else high
                raise Pi05cError(
                    f"input {name!r} holds {wrong}, but token ids go from 0 to {self.vocabulary - 1}: use the "
                    "tokenizer of the checkpoint"
                )


class _Described:
    """Type and shape of an array or a tensor, in numpy's words."""

    def __init__(self, value: Any) -> None:
        self._value = value
        if isinstance(value, np.ndarray):
            self.dtype: Any = value.dtype
        elif type(value).__module__.partition(".")[0] == "torch":
            name = str(value.dtype).removeprefix("torch.")
            self.dtype = np.dtype(name) if name != "bfloat16" else name
        else:
            raise Pi05cError(
                f"an input is a {type(value).__name__}, but numpy arrays and torch tensors are taken: convert it"
            )
        self.shape = tuple(value.shape)

    def host(self) -> Array | None:
        """The values, where reading them does not wait for a GPU."""
        if isinstance(self._value, np.ndarray):
            return self._value
        return None if self._value.is_cuda else self._value.detach().numpy()


def vocabulary_of(manifest: Manifest) -> int | None:
    """Number of token ids of the model that a folder was compiled from, where its exporter wrote it."""
    config = manifest.source.config
    try:
        size = int(config["architecture"]["llm"]["vocab_size"])
    except (TypeError, KeyError, ValueError, OverflowError):
        return None
    return size if size > 0 else None


__all__ = ["Contract", "vocabulary_of"]
