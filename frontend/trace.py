"""From the torch model to an ONNX proto without weights: one `Loop`, names from the module path.

The parameters that are traced have the real shapes and types and one element of memory, so that the full-size
model is traced in less than a gigabyte. The proto refers to them as external data; whoever loads it supplies them.
"""

from __future__ import annotations

import ast
import logging
import math
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import torch
from torch import Tensor, nn

from pi05c.frontend.config import Pi05Config
from pi05c.frontend.model import Cache, LoopedPi05, Pi05, Suffix
from pi05c.frontend.samples import input_specs
from pi05c.graph.dtypes import BFLOAT16, FLOAT16, FLOAT32
from pi05c.graph.errors import Pi05cError
from pi05c.graph.runner import Array

OPSET = 21
"""ONNX opset of the plain graph: TensorRT 10.13 reads it."""

OUTPUT = "actions"

_UNSUPPLIED = "weights"
"""Location that weights have in the traced proto; no such file exists."""

_TORCH_DTYPES = {BFLOAT16: torch.bfloat16, FLOAT16: torch.float16, FLOAT32: torch.float32}

_ALIASES = (
    ("paligemma_with_expert.paligemma.model.vision_tower.vision_model", "vision"),
    ("paligemma_with_expert.paligemma.model.multi_modal_projector", "projector"),
    ("paligemma_with_expert.paligemma.model.language_model", "prefix"),
    ("paligemma_with_expert.gemma_expert.model", "expert"),
)
"""Module paths as they begin, and what names in the graph begin with instead."""

_OUTER, _STEP = "policy", "denoise"
"""What names begin with where an operator belongs to no module: around the loop, and inside it."""

_LOOP_STATE = ("step", "x", "time")
"""What the loop carries, in order."""


def trace(config: Pi05Config, dtypes: Mapping[str, np.dtype[Any]]) -> onnx.ModelProto:
    """The plain graph of the policy.

    Args:
        config: sizes, all of them static in the graph.
        dtypes: stored type of each parameter that is not bfloat16, by openpi's name.

    Returns:
        A model of opset 21 whose parameters are external tensors under openpi's names, to be supplied by name.

    Raises:
        Pi05cError: this version of torch makes another graph of the denoising loop than one ONNX Loop.
    """
    policy = _hollow_policy(config, dtypes)
    with _quiet():
        program = torch.onnx.export(
            policy,
            _example_inputs(config),
            dynamo=True,
            optimize=False,
            opset_version=OPSET,
            input_names=[spec.name for spec in input_specs(config)],
            output_names=[OUTPUT],
            verbose=False,
        )
        scopes = _step_scopes(policy, config, _body_nodes(program))
    assert program is not None
    model = program.model
    _fold_shapes(model.graph)
    _name(model.graph, scopes)
    parameters = set(policy.state_dict())
    for name, value in model.graph.initializers.items():
        if name in parameters:
            assert value.const_value is not None
            value.const_value = _unsupplied(name, value.const_value)
    model.metadata_props.clear()
    model.graph.metadata_props.clear()
    model.graph.name = "pi05"
    model.producer_name, model.producer_version = "pi05c", ""
    return ir.to_proto(model)


def _hollow_policy(config: Pi05Config, dtypes: Mapping[str, np.dtype[Any]]) -> LoopedPi05:
    """The policy with parameters of the real shapes that take no memory (stride 0)."""
    with torch.device("meta"):
        policy = LoopedPi05(config)
    parameters = {
        name: torch.zeros(1, dtype=_TORCH_DTYPES[dtypes.get(name, BFLOAT16)]).expand(parameter.shape)
        for name, parameter in policy.state_dict().items()
    }
    policy.load_state_dict(parameters, assign=True)
    return policy.eval()


def _example_inputs(config: Pi05Config) -> tuple[Tensor, ...]:
    return tuple(torch.from_numpy(np.zeros(spec.shape, spec.dtype)) for spec in input_specs(config))


def _unsupplied(name: str, tensor: ir.TensorProtocol) -> ir.ExternalTensor:
    size = math.prod(tensor.shape.numpy()) * tensor.dtype.itemsize
    return ir.ExternalTensor(
        _UNSUPPLIED, 0, int(size), ir.DataType(tensor.dtype), shape=ir.Shape(tensor.shape.numpy()), name=name
    )


class _Step(nn.Module):
    """The body of the loop as a module of its own."""

    def __init__(self, policy: Pi05) -> None:
        super().__init__()
        self.policy = policy

    def forward(
        self, step: Tensor, x: Tensor, time: Tensor, cache: Cache, suffix: Suffix
    ) -> tuple[Tensor, Tensor, Tensor]:
        return (step + 1, *self.policy.denoise_step(x, time, cache, suffix))


def _body_nodes(program: Any) -> list[torch.fx.Node]:
    for name, module in program.exported_program.graph_module.named_children():
        if "body_graph" in name:
            return [node for node in module.graph.nodes if node.op == "call_function"]
    raise Pi05cError(
        f"torch {torch.__version__} did not keep the denoising loop as a loop: export with the torch version that "
        "constraints.txt names"
    )


def _step_scopes(policy: Pi05, config: Pi05Config, body: Sequence[torch.fx.Node]) -> dict[str, str]:
    """Module path by name of each node in the loop's body.

    torch drops module paths inside `while_loop`. The same step exported by itself keeps them, and its nodes come in
    the same order. Where a version of torch does it otherwise, the body is named by operators alone.
    """
    sizes = config.architecture
    heads, dim, length = sizes.llm.num_kv_heads, sizes.llm.head_dim, config.prefix_length
    cached = tuple(torch.zeros(config.batch, heads, length, dim) for _ in range(sizes.llm.depth))
    rotary = torch.zeros(config.batch, 1, config.horizon, dim)
    mask = torch.zeros(config.batch, 1, 1, length + config.horizon)
    program = torch.export.export(
        _Step(policy),
        (
            torch.zeros((), dtype=torch.int64),
            torch.zeros(config.batch, config.horizon, config.action_dim),
            torch.zeros(1),
            Cache(cached, cached),
            Suffix(rotary, rotary, mask),
        ),
        strict=False,
    ).run_decompositions({})
    alone = [
        node
        for node in program.graph.nodes
        if node.op == "call_function" and node.target is not torch.ops.aten._assert_tensor_metadata.default
    ]
    return match_scopes(
        [(node.name, tuple(node.meta["val"].shape)) for node in body],
        [
            (_innermost_module(node).removeprefix("policy").lstrip("."), tuple(node.meta["val"].shape))
            for node in alone
        ],
    )


def match_scopes(
    body: Sequence[tuple[str, tuple[int, ...]]], alone: Sequence[tuple[str, tuple[int, ...]]]
) -> dict[str, str]:
    """Pair (node name, shape) with (module path, shape) in order; empty where any shape or the length differs."""
    if [shape for _, shape in body] != [shape for _, shape in alone]:
        return {}
    return {name: path for (name, _), (path, _) in zip(body, alone, strict=True)}


def _innermost_module(node: torch.fx.Node) -> str:
    stack = node.meta.get("nn_module_stack") or {"": ("", None)}
    return str(list(stack.values())[-1][0])


def _fold_shapes(graph: ir.Graph) -> None:
    """Evaluate the arithmetic on shapes, axes and slice bounds that the exporter spells out in operators.

    Such a chain starts at Constant nodes and yields a vector of int64. TensorRT's parser wants these operands as
    constants, inside a Loop too; weights are never touched.
    """
    for node in list(graph):
        for attribute in node.attributes.values():
            if attribute.type == ir.AttributeType.GRAPH:
                _fold_shapes(attribute.as_graph())
        values = [_integers(value) for value in node.inputs]
        if node.op_type not in _SHAPE_OPERATORS or any(value is None for value in values):
            continue
        if node.op_type == "Cast" and node.attributes["to"].as_int() != ir.DataType.INT64:
            continue
        folded = _SHAPE_OPERATORS[node.op_type](node, [value for value in values if value is not None])
        constant = ir.node(
            "Constant", [], {"value": ir.tensor(folded)}, metadata_props=dict(node.metadata_props)
        )
        constant.outputs[0].shape, constant.outputs[0].dtype = ir.Shape(folded.shape), ir.DataType.INT64
        graph.insert_before(node, constant)
        ir.convenience.replace_all_uses_with(node.outputs, constant.outputs)
        graph.remove(node, safe=True)
    for node in list(graph):
        if node.op_type == "Constant" and not node.outputs[0].uses():
            graph.remove(node, safe=True)


_SHAPE_OPERATORS: Mapping[str, Callable[[ir.Node, list[Array]], Array]] = {
    "Cast": lambda node, values: values[0],
    "Concat": lambda node, values: np.concatenate(values, axis=node.attributes["axis"].as_int()),
    "Reshape": lambda node, values: values[0].reshape(values[1]),
}
"""Operators of which shape arithmetic consists, on int64 vectors."""


def _integers(value: ir.Value | None) -> Array | None:
    """The value of a Constant node that holds int64 numbers in at most one dimension."""
    node = value.producer() if value is not None else None
    if node is None or node.op_type != "Constant":
        return None
    (attribute,) = node.attributes.values()
    if attribute.type == ir.AttributeType.TENSOR:
        array = attribute.as_tensor().numpy()
        return array if array.dtype == np.int64 and array.ndim <= 1 else None
    if attribute.type in (ir.AttributeType.INT, ir.AttributeType.INTS):
        return np.asarray(attribute.value, np.int64)
    return None


def _name(graph: ir.Graph, step_scopes: Mapping[str, str]) -> None:
    """Name nodes and tensors after the module they belong to; inputs, output and initializers keep their names."""
    names = _UniqueNames([value.name for value in graph.inputs], list(graph.initializers), [OUTPUT])
    for node in graph:
        path, _ = _origin(node)
        _name_node(node, names.unique(f"{_alias(path) or _OUTER}.{node.op_type}"))
        if node.op_type == "Loop":
            node.name = names.unique(f"{_STEP}.Loop")
            _name_loop(node, names, step_scopes)
    graph.outputs[0].name = OUTPUT


def _name_loop(loop: ir.Node, names: _UniqueNames, step_scopes: Mapping[str, str]) -> None:
    for output, state in zip(loop.outputs, _LOOP_STATE, strict=True):
        output.name = names.unique(f"{loop.name}.{state}")
    body = loop.attributes["body"].as_graph()
    body.name = _STEP
    for value, state in zip(body.inputs, ("iteration", "condition", *_LOOP_STATE), strict=True):
        value.name = names.unique(f"{_STEP}.{state}")
    for node in body:
        _, operator = _origin(node)
        _name_node(node, names.unique(f"{_alias(step_scopes.get(operator, '')) or _STEP}.{node.op_type}"))
    for value, state in zip(body.outputs, ("condition", *_LOOP_STATE), strict=True):
        value.name = names.unique(f"{_STEP}.next_{state}")


def _name_node(node: ir.Node, name: str) -> None:
    node.name = name
    node.metadata_props.clear()
    node.doc_string = None
    for index, output in enumerate(node.outputs):
        output.name = f"{name}.{index}" if index else name
        output.metadata_props.clear()


def _origin(node: ir.Node) -> tuple[str, str]:
    """Innermost module path and torch operator of a node, as the exporter recorded them."""
    scopes = ast.literal_eval(node.metadata_props.get("pkg.torch.onnx.name_scopes", "[]"))
    path = scopes[-2] if len(scopes) > 1 else ""
    return path, scopes[-1] if scopes else ""


def _alias(path: str) -> str:
    for long, short in _ALIASES:
        if path == long or path.startswith(f"{long}."):
            return short + path.removeprefix(long)
    return path


class _UniqueNames:
    """Hands out names, numbering what was handed out before."""

    def __init__(self, *taken: Sequence[str | None]) -> None:
        self._taken = {name for names in taken for name in names}
        self._next: dict[str, int] = {}

    def unique(self, name: str) -> str:
        candidate = name
        while candidate in self._taken:
            self._next[name] = self._next.get(name, 0) + 1
            candidate = f"{name}_{self._next[name]}"
        self._taken.add(candidate)
        return candidate


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep what torch says about itself (absent torchvision, deprecated internals) from the user."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "torch.export")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


__all__ = ["OPSET", "OUTPUT", "match_scopes", "trace"]
