"""pi0.5's prompt: the task, the state as numbers from 0 to 255, and the tokens of both.

The texts are those of openpi's `PaligemmaTokenizer.tokenize`, which LeRobot's processor repeats.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from pi05c.graph.errors import Pi05cError
from pi05c.graph.runner import Array

_BINS = np.linspace(-1, 1, 257)[:-1]
"""Lower ends of the 256 intervals that a normalized state falls into; what lies below all is written as -1."""

_EPSILON = {"openpi": 1e-6, "lerobot": 1e-8, "lerobot-0.4": 1e-8}

_MAX_STATE_DIM = 32
"""LeRobot's default `max_state_dim`, up to which 0.4 put zeros behind the normalized state."""

_LONGEST_SHOWN = 60


@dataclass(frozen=True)
class Tokenizer:
    """PaliGemma's tokenizer.

    Attributes:
        beginning: the token that a prompt begins with.
        encode: tokens of a text, without that one.
    """

    beginning: int
    encode: Callable[[str], list[int]]


def load_tokenizer(path: Path) -> Tokenizer:
    """A tokenizer from a sentencepiece `.model`, from a `tokenizer.json`, or from a folder that holds either.

    Raises:
        Pi05cError: there is none, or it cannot be read.
    """
    file = path
    if path.is_dir():
        names = ("tokenizer.model", "tokenizer.json")
        file = next((path / name for name in names if (path / name).is_file()), path)
        if file == path:
            raise Pi05cError(
                f"folder {path} holds neither {' nor '.join(names)}: name the folder of a tokenizer"
            )
    if not file.is_file():
        raise Pi05cError(
            f"there is no tokenizer {path}: fetch paligemma_tokenizer.model of openpi, or google/paligemma-3b-pt-224"
        )
    try:
        return _tokenizers(file) if file.suffix == ".json" else _sentencepiece(file)
    except ImportError as error:
        raise Pi05cError(
            f"{file} needs {error.name}, which is not installed: pip install 'pi05c[lerobot]'"
        ) from error


def _sentencepiece(file: Path) -> Tokenizer:
    from sentencepiece import SentencePieceProcessor

    processor = SentencePieceProcessor()
    try:
        processor.LoadFromSerializedProto(file.read_bytes())
    except (OSError, RuntimeError) as error:
        raise Pi05cError(f"{file} cannot be read as a model of sentencepiece: fetch it again") from error
    beginning = processor.bos_id()
    if beginning < 0:
        raise Pi05cError(f"{file} has no token that begins a text: it is not PaliGemma's tokenizer")
    return Tokenizer(beginning, processor.EncodeAsIds)


def _tokenizers(file: Path) -> Tokenizer:
    from tokenizers import Tokenizer as Fast

    try:
        fast = Fast.from_file(str(file))
    except Exception as error:  # tokenizers raises nothing more specific
        raise Pi05cError(f"{file} cannot be read as a tokenizer: {error}") from error
    beginning = fast.token_to_id("<bos>")
    if beginning is None:
        raise Pi05cError(f"{file} has no token <bos>: it is not PaliGemma's tokenizer")
    fast.no_truncation()
    fast.no_padding()
    return Tokenizer(beginning, lambda text: list(fast.encode(text, add_special_tokens=False).ids))


def prompt_state(
    state: Array, statistics: Mapping[str, Sequence[float]], how: str, framework: str, where: str
) -> Array:
    """A state as the policy's processor hands it to the prompt: normalized, and padded by LeRobot 0.4.

    Args:
        state: float32 [numbers].
        statistics: of the state, by name.
        how: `quantiles`, `mean_std`, `min_max` or `identity`.
        framework: `openpi` computes in float64 and leaves out statistics behind the last number of the state, LeRobot in
            float32.
        where: what to call the statistics in errors.

    Raises:
        Pi05cError: `how` is unknown; statistics are missing or of another length.
    """
    made = _normalized(state, statistics, how, framework, where)
    if framework == "lerobot-0.4":
        return np.pad(made, (0, max(0, _MAX_STATE_DIM - len(made))))
    return made


def _normalized(
    state: Array, statistics: Mapping[str, Sequence[float]], how: str, framework: str, where: str
) -> Array:
    if how == "identity":
        return state
    kinds = {"quantiles": ("q01", "q99"), "mean_std": ("mean", "std"), "min_max": ("min", "max")}
    if how not in kinds:
        raise Pi05cError(
            f"the policy normalizes states by {how!r}, which is not known here: give samples as .npz files"
        )
    if missing := [name for name in kinds[how] if name not in statistics]:
        raise Pi05cError(
            f"{where} lack {' and '.join(missing)} of the state: LeRobot's augment_dataset_quantile_stats.py adds quantiles"
        )
    exact = np.float64 if framework == "openpi" else np.float32
    first, second = (np.asarray(statistics[name], exact) for name in kinds[how])
    if framework == "openpi":
        first, second = first[: len(state)], second[: len(state)]
    if len(first) != len(state) or len(second) != len(state):
        raise Pi05cError(
            f"the state has {len(state)} numbers, but {where} are of {len(statistics[kinds[how][0]])}: they belong to "
            "another robot"
        )
    epsilon = exact(_EPSILON[framework])
    if how == "mean_std":
        return np.asarray((state - first) / (second + epsilon))
    width = second - first
    if framework == "openpi":
        return np.asarray((state - first) / (width + epsilon) * 2 - 1)
    return np.asarray(2 * (state - first) / np.where(width == 0, epsilon, width) - 1)


def prompt_tokens(tokenizer: Tokenizer, task: str, state: Array | None) -> list[int]:
    """Tokens of a prompt, the beginning one first.

    Args:
        state: as `prompt_state` makes it; None for a policy that is not told the state.
    """
    text = task.strip().replace("_", " ").replace("\n", " ")
    if state is None:
        return [tokenizer.beginning, *tokenizer.encode(text), *tokenizer.encode("\n")]
    numbers = " ".join(str(number) for number in np.digitize(state, _BINS) - 1)
    return [tokenizer.beginning, *tokenizer.encode(f"Task: {text}, State: {numbers};\nAction: ")]


def padded(tokens: Sequence[int], length: int, which: str, task: str) -> tuple[Array, Array]:
    """Tokens int64 [length], 0 behind the last, and which of them count, bool [length].

    Raises:
        Pi05cError: there are more than `length`.
    """
    if len(tokens) > length:
        shown = task if len(task) <= _LONGEST_SHOWN else f"{task[:_LONGEST_SHOWN]}..."
        raise Pi05cError(
            f"the prompt of {which} has {len(tokens)} tokens, but the model takes {length} (task {shown!r}): export it with "
            "a larger --prompt-length"
        )
    row = np.zeros(length, np.int64)
    row[: len(tokens)] = tokens
    return row, np.arange(length) < len(tokens)


__all__ = ["Tokenizer", "load_tokenizer", "padded", "prompt_state", "prompt_tokens"]
