"""Valid small ONNX graphs, made from choices: of Hypothesis, which shrinks them, or of a seed.

A graph is a chain of blocks on a stream [batch, rows, width]: linears in many spellings, norms, attention, control flow
whose bodies capture what lies around them, quantized parts, and the detours that exporters take. Every graph passes
onnx's checker with strict type inference and runs in onnxruntime as `pi05c.backend.onnxruntime` lowers it.
"""

from __future__ import annotations

import os
import random
from collections.abc import Callable, Sequence
from typing import Any

from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st

from random_graphs.control import Control
from random_graphs.core import NESTING, OPSETS, WORKING, Generated, all_nodes
from random_graphs.described import described
from random_graphs.distinct import BINARY, UNARY, distinct_model, distinct_values
from random_graphs.spoiled import spoiled

BLOCKS = (
    *(
        "linear",
        "linear",
        "mlp",
        "norm",
        "attention",
        "attention",
        "elementwise",
        "detour",
        "quantized",
        "function",
        "views",
    ),
    *NESTING,
)


def examples(count: int) -> Callable[[Any], Any]:
    """So many examples of a property, the same ones each time; with `PI05C_FUZZ=N` N times as many, other ones each time.

    The same but for constants: Hypothesis draws some from the modules that are imported by then, which differ between
    runs that hand tests to workers in another order.

    What fails is shrunk in the latter case alone, which takes minutes. Generation is not stopped for being slow, nor an
    example: processors are shared.
    """
    more = int(os.environ.get("PI05C_FUZZ", "0"))
    return settings(
        max_examples=count * max(more, 1),
        derandomize=not more,
        deadline=None,
        phases=list(Phase) if more else [Phase.explicit, Phase.generate],
        print_blob=True,
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
    )


def generated(
    *,
    blocks: Sequence[str] | None = None,
    most: int = 4,
    opsets: Sequence[int] = OPSETS,
    dtypes: Sequence[int] = WORKING,
) -> st.SearchStrategy[Generated]:
    """Graphs as Hypothesis draws them; see `make`."""
    return st.randoms(use_true_random=False, note_method_calls=False).map(
        lambda rng: make(rng, blocks=blocks, most=most, opsets=opsets, dtypes=dtypes)
    )


def make(
    rng: random.Random,
    *,
    blocks: Sequence[str] | None = None,
    most: int = 4,
    opsets: Sequence[int] = OPSETS,
    dtypes: Sequence[int] = WORKING,
) -> Generated:
    """A graph of at most `most` blocks of the given kinds (all of `BLOCKS` by default)."""
    maker = Control(rng, rng.choice(list(opsets)), rng.choice(list(dtypes)), tuple(blocks or BLOCKS), most)
    return maker.model()


__all__ = [
    "BINARY",
    "BLOCKS",
    "OPSETS",
    "UNARY",
    "WORKING",
    "Generated",
    "all_nodes",
    "described",
    "distinct_model",
    "distinct_values",
    "examples",
    "generated",
    "make",
    "spoiled",
]
