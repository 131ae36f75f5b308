"""Legal graphs that stretch what finders take for granted: an exact pass keeps the numbers or leaves them alone."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from pass_graphs import (
    Array,
    editable,
    graph_text,
    normal,
    outputs_of,
    ranges_of,
    relative_error,
    run_pass,
    seeded_inputs,
    text_of,
)

from pi05c.graph.check import problems
from pi05c.graph.dtypes import is_float, to_numpy
from pi05c.graph.io import model_from_proto, to_proto
from pi05c.graph.weights import array_of
from pi05c.passes import PRESETS
from pi05c.passes.pipeline import parse, run

LOW = -1e9


@dataclass(frozen=True)
class Odd:
    """A graph in ONNX's text form, with its weights, for one pass; `returns` makes a weight an output."""

    graph_pass: str
    name: str
    text: str
    weights: dict[str, Array] = field(default_factory=dict)
    returns: str | None = None

    def model(self) -> onnx.ModelProto:
        proto = graph_text(f"g {self.text}", self.weights)
        if self.returns is not None:
            shape = self.weights[self.returns].shape
            proto.graph.output.append(onnx.helper.make_tensor_value_info(self.returns, 1, shape))
        return proto


def attention(mask: str, axis: int = -1, inputs: str = "") -> str:
    return f"""(float[1,2,3,4] q, float[1,2,4,5] k, float[1,2,5,6] v{inputs}) => (float[1,2,3,6] y) {{
      logits = MatMul(q, k)
      masked = {mask}
      probs = Softmax<axis={axis}>(masked)
      y = MatMul(probs, v)
    }}"""


BOTH_WAYS = """(float[2,8] x, float[2,8] z) => (float[2,8] y, float[2,8] v) {
  turned = Transpose<perm=[1,0]>(w)
  a = MatMul(x, w)
  scaled_a = Mul(a, c)
  b = MatMul(z, turned)
  scaled_b = Mul(b, c)
  y = Tanh(scaled_a)
  v = Tanh(scaled_b)
}"""

REPEATED = {
    "axis": np.array([2]),
    "size": np.array([1, 1, 2, 1, 1]),
    "heads": np.array([0, 4, 5, 8]),
    "mask": normal(9, 2, 1, 3, 5),
}


def repeated_heads(q: tuple[int, ...], k: tuple[int, ...], mask: tuple[int, ...]) -> str:
    batch = max(shape[0] for shape in (q, k, mask or q))
    shapes = [",".join(map(str, shape)) for shape in (q, k, (batch, 4, q[2], 8))]
    masked = "Add(logits, mask)" if mask else "Identity(logits)"
    return f"""(float[{shapes[0]}] q, float[{shapes[1]}] k) => (float[{shapes[2]}] y) {{
      raised = Unsqueeze(k, axis)
      many = Expand(raised, size)
      keys = Reshape(many, heads)
      turned = Transpose<perm=[0,1,3,2]>(keys)
      logits = MatMul(q, turned)
      masked = {masked}
      probs = Softmax<axis=-1>(masked)
      y = MatMul(probs, keys)
    }}"""


CASES = [
    Odd(
        "fuse_projections",
        "weights that are rounded to bfloat16 and read in float16",
        """(float16[2,8] x) => (float16[2,8] y, float16[2,8] z) {
          rough_a = Cast<to=16>(a)
          rough_b = Cast<to=16>(b)
          read_a = Cast<to=10>(rough_a)
          read_b = Cast<to=10>(rough_b)
          left = MatMul(x, read_a)
          right = MatMul(x, read_b)
          y = Tanh(left)
          z = Tanh(right)
        }""",
        {"a": normal(1, 8, 8), "b": normal(2, 8, 8)},
    ),
    Odd(
        "drop_dead_prefix",
        "a constant mask that sets logits to 0",
        attention("Where(seen, logits, zero)"),
        {"seen": np.array([1, 1, 0, 1, 0], np.bool_), "zero": np.float32(0)},
    ),
    Odd(
        "drop_dead_prefix",
        "a mask of the run that sets logits to 0",
        attention("Where(seen, logits, zero)", inputs=", bool[5] seen"),
        {"zero": np.float32(0)},
    ),
    Odd(
        "drop_dead_prefix",
        "a Scan of which nothing that it stacks is read",
        """(float[3,4] x, float[4] start) => (float[4] y) {
          y, rows = Scan<num_scan_inputs=1, scan_output_axes=[0], scan_output_directions=[1], body = step
            (float[4] s, float[4] row) => (float[4] added, float[4] square) {
              added = Add(s, row)
              square = Mul(row, row)
            }>(start, x)
        }""",
    ),
    Odd(
        "drop_dead_prefix",
        "a softmax over the queries",
        attention("Add(logits, mask)", axis=2),
        {"mask": np.array([0, 0, 0, 0, LOW], np.float32)},
    ),
    Odd(
        "drop_dead_prefix",
        "a Squeeze without axes of what becomes one row",
        """(float[1,5,8] x) => (float[1,4] y) {
          made = MatMul(x, w)
          rows = Squeeze(made)
          bent = Tanh(rows)
          y = Slice(bent, start, end, axis)
        }""",
        {"w": normal(1, 8, 4), "start": np.array([0]), "end": np.array([1]), "axis": np.array([0])},
    ),
    Odd(
        "batch_views",
        "views joined along an axis of one",
        """(float[2,3,8,8] a, float[2,3,8,8] b) => (float[2,2,4] y) {
          seen_a = Conv(a, w)
          seen_b = Conv(b, w)
          mean_a = GlobalAveragePool(seen_a)
          mean_b = GlobalAveragePool(seen_b)
          row_a = Reshape(mean_a, shape)
          row_b = Reshape(mean_b, shape)
          y = Concat<axis=1>(row_a, row_b)
        }""",
        {"w": normal(1, 4, 3, 3, 3), "shape": np.array([2, 1, 4])},
    ),
    Odd(
        "batch_views",
        "indices of a pooling",
        """(float[1,3,8,8] a, float[1,3,8,8] b)
          => (float[1,4,2,2] y, float[1,4,2,2] z, int64[1,4,2,2] i, int64[1,4,2,2] j) {
          seen_a = Conv(a, w)
          seen_b = Conv(b, w)
          y, i = MaxPool<kernel_shape=[3,3], strides=[3,3]>(seen_a)
          z, j = MaxPool<kernel_shape=[3,3], strides=[3,3]>(seen_b)
        }""",
        {"w": normal(1, 4, 3, 3, 3)},
    ),
    Odd(
        "canonicalize",
        "a weight that the graph returns",
        """(double[2,4] x) => (double[2,4] y) {
          wide = Cast<to=11>(w)
          turned = Transpose<perm=[1,0]>(wide)
          y = MatMul(x, turned)
        }""",
        {"w": normal(1, 4, 4)},
        returns="w",
    ),
    Odd(
        "fold_norms",
        "a weight that the graph returns",
        """(float[2,8] x) => (float[2,4] y) {
          normed = LayerNormalization(x, gain)
          y = MatMul(normed, w)
        }""",
        {"w": normal(1, 8, 4), "gain": normal(2, 8)},
        returns="w",
    ),
    Odd(
        "fold_scales",
        "a weight that the graph returns",
        """(float[2,8] x) => (float[2,4] y) {
          made = MatMul(x, w)
          scaled = Mul(made, c)
          y = Tanh(scaled)
        }""",
        {"w": normal(1, 8, 4), "c": np.float32(2)},
        returns="w",
    ),
    Odd(
        "fold_scales",
        "a weight read as it is and transposed",
        BOTH_WAYS,
        {"w": normal(1, 8, 8), "c": np.abs(normal(2, 8)) + np.float32(0.5)},
    ),
    Odd(
        "fold_scales",
        "a number behind a weight read as it is and transposed",
        BOTH_WAYS,
        {"w": normal(1, 8, 8), "c": np.float32(2.5)},
    ),
    Odd(
        "fold_scales",
        "Q that is K as well",
        """(float[1,4,4] x) => (float[1,4,4] y) {
          both = MatMul(x, w)
          logits = MatMul(both, both)
          scaled = Mul(logits, c)
          probs = Softmax<axis=-1>(scaled)
          y = MatMul(probs, x)
        }""",
        {"w": normal(1, 4, 4), "c": np.float32(0.5)},
    ),
    *(
        Odd(
            "drop_dead_prefix",
            f"rows of a {which} of a norm",
            """(float[2,5,8] x) => (float[2,1,4] y) {
              normed = LayerNormalization(x, gain, bias)
              made = MatMul(normed, w)
              y = Slice(made, start, end, axis)
            }""",
            {
                "w": normal(1, 8, 4),
                "gain": normal(2, 5, 8) if which == "weight" else normal(2, 8),
                "bias": normal(3, 2, 5, 8) if which == "bias" else normal(3, 8),
                "start": np.array([1]),
                "end": np.array([2]),
                "axis": np.array([1]),
            },
        )
        for which in ("weight", "bias")
    ),
    Odd(
        "batch_views",
        "a norm whose weight has an entry for each of the batch",
        """(float[2,3,8,8] a, float[2,3,8,8] b) => (float[2,4,6,6] y, float[2,4,6,6] z) {
          seen_a = Conv(a, w)
          seen_b = Conv(b, w)
          y = LayerNormalization(seen_a, gain)
          z = LayerNormalization(seen_b, gain)
        }""",
        {"w": normal(1, 4, 3, 3, 3), "gain": normal(2, 2, 1, 1, 6)},
    ),
    *(
        Odd(
            "fold_gqa",
            f"queries {q} for keys {k}{' and a mask' * bool(mask)}",
            repeated_heads(q, k, mask),
            REPEATED,
        )
        for q, k, mask in (
            ((1, 4, 3, 8), (2, 2, 5, 8), ()),
            ((2, 1, 3, 8), (2, 2, 5, 8), ()),
            ((2, 4, 3, 8), (1, 2, 5, 8), ()),
            ((1, 4, 3, 8), (1, 2, 5, 8), (2, 1, 3, 5)),
        )
    ),
    Odd(
        "fold_gqa",
        "a softmax in a body",
        """(float[1,4,3,8] q, float[1,2,5,8] k, bool c) => (float[1,4,3,8] y) {
          raised = Unsqueeze(k, axis)
          many = Expand(raised, size)
          keys = Reshape(many, heads)
          turned = Transpose<perm=[0,1,3,2]>(keys)
          logits = MatMul(q, turned)
          y = If(c)<
            then_branch = yes () => (float[1,4,3,8] a) { probs = Softmax<axis=-1>(logits) a = MatMul(probs, keys) },
            else_branch = no () => (float[1,4,3,8] b) { b = Neg(q) }
          >
        }""",
        {"axis": np.array([2]), "size": np.array([1, 2, 2, 5, 8]), "heads": np.array([1, 4, 5, 8])},
    ),
    Odd(
        "split_prefix_attention",
        "rows that only a run knows",
        """(float[1,r,8] x, float[1,1,2,8] a, float[1,1,3,8] b) => (float[1,r,8] y) {
          made = MatMul(x, w)
          query = Reshape(made, apart)
          turned_query = Transpose<perm=[0,2,1,3]>(query)
          first = Tanh(a)
          second = Tanh(b)
          keys = Concat<axis=2>(first, second)
          turned = Transpose<perm=[0,1,3,2]>(keys)
          logits = MatMul(turned_query, turned)
          probs = Softmax<axis=-1>(logits)
          mixed = MatMul(probs, keys)
          back = Transpose<perm=[0,2,1,3]>(mixed)
          flat = Reshape(back, together)
          v = MatMul(flat, w)
          moved = Mul(v, dt)
          y = Add(x, moved)
        }""",
        {
            "w": normal(1, 8, 8),
            "apart": np.array([1, -1, 1, 8]),
            "together": np.array([1, -1, 8]),
            "dt": np.float32(-0.1),
        },
    ),
    Odd(
        "fuse_projections",
        "biases that bodies add",
        """(float[2,8] x, bool c) => (float[2,8] y) {
          first = MatMul(x, w)
          second = MatMul(x, v)
          y = If(c)<
            then_branch = yes () => (float[2,8] a) { a = Add(first, b) },
            else_branch = no () => (float[2,8] d) { d = Add(second, e) }
          >
        }""",
        {"w": normal(1, 8, 8), "v": normal(2, 8, 8), "b": normal(3, 8), "e": normal(4, 8)},
    ),
    Odd(
        "canonicalize",
        "a body that returns a Cast of what lies outside",
        """(float[2,8] x, bool c) => (float[2,8] y) {
          outside = Tanh(x)
          y = If(c)<
            then_branch = yes () => (float[2,8] a) { a = Cast<to=1>(outside) },
            else_branch = no () => (float[2,8] b) { b = Neg(x) }
          >
        }""",
    ),
    Odd(
        "canonicalize",
        "a body that returns what is folded",
        """(float[4] x, bool c) => (float[400] y) {
          y = If(c)<
            then_branch = yes () => (float[400] a) { a = Neg(w) },
            else_branch = no () => (float[400] b) { b = Tanh(w) }
          >
        }""",
        {"w": normal(1, 400)},
    ),
    Odd(
        "disable_conv2d_quant",
        "a weight with a scale for each block",
        """(float[1,5,4,4] x) => (float[1,8,4,4] y) {
          kernel = DequantizeLinear<axis=1, block_size=2>(w, scales, points)
          y = Conv(x, kernel)
        }""",
        {
            "w": np.arange(-20, 20, dtype=np.int8).reshape(8, 5, 1, 1),
            "scales": np.abs(normal(1, 8, 3, 1, 1)) + np.float32(0.1),
            "points": np.arange(24, dtype=np.int8).reshape(8, 3, 1, 1),
        },
    ),
    Odd(
        "disable_conv2d_quant",
        "a zero point that only a run knows",
        """(float[1,5,4,4] x, int8 point) => (float[1,8,4,4] y) {
          kernel = DequantizeLinear(w, scale, point)
          y = Conv(x, kernel)
        }""",
        {"w": np.arange(-20, 20, dtype=np.int8).reshape(8, 5, 1, 1), "scale": np.float32(0.1)},
    ),
    Odd(
        "disable_conv2d_quant",
        "a zero point that is left out",
        """(float[1,5,4,4] x) => (float[1,8,4,4] y) {
          kernel = DequantizeLinear(w, scale,)
          y = Conv(x, kernel)
        }""",
        {"w": np.arange(-20, 20, dtype=np.int8).reshape(8, 5, 1, 1), "scale": np.float32(0.1)},
    ),
    Odd(
        "fold_scales",
        "a bias that widens one column",
        """(float[2,8] x) => (float[2,5] y) {
          made = MatMul(x, w)
          wide = Add(made, b)
          scaled = Mul(wide, c)
          y = Tanh(scaled)
        }""",
        {"w": normal(1, 8, 1), "b": normal(3, 5), "c": np.abs(normal(2, 5)) + np.float32(0.5)},
    ),
]


@pytest.mark.parametrize("odd", CASES, ids=lambda odd: f"{odd.graph_pass}: {odd.name}")
def test_numbers_stay(odd: Odd) -> None:
    proto = odd.model()
    after = editable(proto)
    run_pass(after, odd.graph_pass)
    inputs = seeded_inputs(proto, 11)
    if "seen" in inputs:
        inputs["seen"] = np.array([1, 0, 1, 0, 1], np.bool_)
    assert relative_error(outputs_of(after, inputs), outputs_of(proto, inputs)) <= 1e-6


def test_a_number_behind_both_readings_of_a_weight_is_folded_once() -> None:
    after = editable(graph_text(f"g {BOTH_WAYS}", {"w": normal(1, 8, 8), "c": np.float32(2.5)}))
    assert run_pass(after, "fold_scales").changes == ("scaled_a.Mul", "scaled_b.Mul")


def test_a_mask_that_broadcasts_the_heads_of_an_unknown_batch_stays() -> None:
    proto = graph_text(
        """
        g (float[n,1,3,4] q, float[n,1,4,5] k, float[n,1,5,6] v) => (float[n,h,3,6] y) {
          logits = MatMul(q, k)
          masked = Add(logits, mask)
          probs = Softmax<axis=-1>(masked)
          y = MatMul(probs, v)
        }""",
        {"mask": np.zeros((1, 2, 1, 1), np.float32)},
    )
    after = editable(proto)
    run_pass(after, "drop_dead_prefix")
    inputs = {"q": normal(1, 2, 1, 3, 4), "k": normal(2, 2, 1, 4, 5), "v": normal(3, 2, 1, 5, 6)}
    assert relative_error(outputs_of(after, inputs), outputs_of(proto, inputs)) <= 1e-6


def test_factors_on_one_weight_count_together() -> None:
    weight = normal(1, 8, 4)
    after = editable(
        graph_text(
            """
            g (float[2,8] x) => (float[2,4] y) {
              made = MatMul(x, w)
              once = Mul(made, c)
              twice = Mul(once, c)
              y = Tanh(twice)
            }""",
            {"w": weight, "c": np.array([1, 16, 4, 1], np.float32)},
        )
    )
    result = run_pass(after, "fold_scales")
    assert result.changes == ("once.Mul",)
    assert "256-fold" in result.skips[0].reason
    assert run_pass(after, "fold_scales").changes == ()
    (stored,) = [tensor for tensor in after.graph.tensors().values() if tensor.name == "w"]
    np.testing.assert_allclose(np.abs(array_of(stored) / weight)[0], [1, 16, 4, 1], rtol=1e-6)


FOREIGN = """
    g (float[1,3,8] x) => (float[1,3,8] y) {
      a = other.Neg(x)
      b = other.Neg(a)
      made = other.MatMul(b, w)
      turned = other.Transpose(made)
      logits = other.MatMul(turned, w)
      probs = other.Softmax(logits)
      same = other.Identity(probs)
      y = other.Cast(same)
    }"""


@pytest.mark.parametrize("passes", ["exact", "fp16", "default", "nvfp4"])
def test_operators_of_another_domain_are_not_those_of_onnx_that_have_their_names(passes: str) -> None:
    proto = graph_text(FOREIGN.replace("other.", ""), {"w": normal(1, 8, 8)})
    proto.opset_import.append(onnx.helper.make_opsetid("other", 1))
    for node in proto.graph.node:
        node.domain = "other"
        del node.attribute[:]
    model = editable(proto)
    names = [tensor.name for node in model.graph.nodes for tensor in (*node.inputs, *node.outputs)]
    ranges = ranges_of(dict.fromkeys(names, (-4.0, 4.0)))
    results = run(model, parse(passes, PRESETS), calibrate=lambda *_: ranges)
    changed = [result.step.spec.name for result in results if result.rewrites]
    assert changed == ([] if passes == "exact" else ["lower_precision", "canonicalize"])
    after = [node for node in to_proto(model)[0].graph.node if node.domain]
    assert [(n.op_type, n.domain) for n in after] == [(n.op_type, n.domain) for n in proto.graph.node]
    assert "= other::MatMul(%" in text_of(model)


def test_empty_tensors_go_through_all_exact_passes() -> None:
    """A batch of nothing, cut and joined again, convolved and attended to."""
    text = """
        g (float[2,0,3,4,4] images, float[0,3,8] x) => (float[0,4,2,2] seen, float[0,3,8] y) {
          a = Gather<axis = 0>(images, first)
          b = Gather<axis = 0>(images, second)
          seen_a = Conv<strides = [2, 2]>(a, w)
          seen_b = Conv<strides = [2, 2]>(b, w)
          seen = Concat<axis = 0>(seen_a, seen_b)
          apart = Reshape(x, shape)
          turned = Transpose<perm = [0, 2, 1, 3]>(apart)
          keys = Transpose<perm = [0, 1, 3, 2]>(turned)
          logits = MatMul(turned, keys)
          probs = Softmax(logits)
          mixed = MatMul(probs, turned)
          back = Transpose<perm = [0, 2, 1, 3]>(mixed)
          y = Reshape(back, like)
        }"""
    weights = {
        "w": normal(1, 4, 3, 2, 2),
        "first": np.array(0),
        "second": np.array(1),
        "shape": np.array([-1, 3, 2, 4]),
        "like": np.array([-1, 3, 8]),
    }
    proto = graph_text(text, weights)
    after = editable(proto)
    run(after, parse("exact", PRESETS))
    inputs = seeded_inputs(proto)
    assert {name: array.shape for name, array in outputs_of(after, inputs).items()} == {
        name: array.shape for name, array in outputs_of(proto, inputs).items()
    }


def test_what_states_its_own_type_keeps_it() -> None:
    """As the state that a recurrent network starts from (Silero VAD)."""
    graph = helper.make_graph(
        [
            helper.make_node("Shape", ["x"], ["size"]),
            helper.make_node("ConstantOfShape", ["size"], ["start"], name="zeros"),
            helper.make_node("Add", ["x", "start"], ["sum"], name="add"),
            helper.make_node("MatMul", ["x", "w"], ["product"], name="project"),
            helper.make_node("Sub", ["product", "sum"], ["y"], name="difference"),
        ],
        "states",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 4])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", 4])],
        [numpy_helper.from_array(np.eye(4, dtype=np.float32), "w")],
    )
    model = model_from_proto(
        helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    )
    run(model, parse("fp16", PRESETS))
    (made,) = (node for node in model.graph.nodes if node.op == "ConstantOfShape")
    assert to_numpy(made.outputs[0].dtype) == np.float32
    assert problems(model) == []


@pytest.mark.parametrize("mode", ["unroll", "loop"])
@pytest.mark.parametrize(
    "text",
    [
        """(float[4] x) => (float[4] y) {
          y, grown = Loop(three, true, x, one)<body = step (int64 i, bool c, float[4] s, float[m] growing)
            => (bool on, float[4] added, float[n] more) {
              on = Identity(c)
              more = Concat<axis=0>(growing, one)
              first = Slice(s, start, end)
              products = Mul(growing, first)
              total = ReduceSum<keepdims=0>(products)
              added = Add(s, total)
            }>
        }""",
        """(float[3] x) => (float[3] y, float[3,3] squares) {
          y, squares = Scan<num_scan_inputs=1, scan_input_directions=[1], body = step (float[3] s, float[3] row)
            => (float[3] added, float[3] square) { added = Add(s, row) square = Mul(row, row) }>(x, rows)
        }""",
    ],
    ids=["a value whose shape changes", "a value of the step that is stacked"],
)
def test_loops_keep_their_numbers(mode: str, text: str) -> None:
    weights = {
        "three": np.array(3),
        "true": np.array(True),
        "one": np.float32([1]),
        "start": np.array([0]),
        "end": np.array([1]),
        "rows": normal(3, 3, 3),
    }
    proto = graph_text(f"g {text}", weights)
    after = editable(proto)
    run_pass(after, "fuse_denoise_loop", mode=mode)
    inputs = seeded_inputs(proto, 5)
    assert relative_error(outputs_of(after, inputs), outputs_of(proto, inputs)) <= 1e-6


def test_a_loop_that_draws_from_one_sequence_of_random_numbers_stays() -> None:
    proto = graph_text(
        """
        g (float[4] x) => (float[4] y) {
          y = Loop(two, true, x)<body = step (int64 i, bool c, float[4] s) => (bool on, float[4] added) {
            on = Identity(c)
            drawn = RandomNormal<seed=1.0, shape=[4]>()
            added = Add(s, drawn)
          }>
        }""",
        {"two": np.array(2), "true": np.array(True)},
    )
    result = run_pass(editable(proto), "fuse_denoise_loop")
    assert result.changes == ()
    assert "random numbers" in result.skips[0].reason


def test_functions_that_may_draw_random_numbers_are_called_as_often_as_before() -> None:
    noise = [helper.make_node("RandomNormalLike", ["x"], ["r"]), helper.make_node("Add", ["x", "r"], ["y"])]
    function = helper.make_function("own", "Noisy", ["x"], ["y"], noise, [helper.make_opsetid("", 21)])
    proto = graph_text("g (float[4] x) => (float[4] y) { a = Neg(x) b = Neg(x) y = Sub(a, b) }")
    for node in proto.graph.node[:2]:
        node.domain, node.op_type = "own", "Noisy"
    proto.opset_import.append(helper.make_opsetid("own", 1))
    proto.functions.append(function)
    model = editable(proto)
    run(model, parse("exact", PRESETS))
    assert [node.op for node in model.graph.nodes] == ["Noisy", "Noisy", "Sub"]


@pytest.mark.parametrize("passes", ["exact", "fp16", "default"])
def test_what_float32_rounds_between_casts_from_float64_stays_rounded(passes: str) -> None:
    proto = graph_text(
        """
        g (double[2] x) => (double[2] y) {
          narrow = Cast<to=1>(x)
          wide = Cast<to=11>(narrow)
          y = Neg(wide)
        }"""
    )
    model = editable(proto)
    run(model, parse(passes, PRESETS))
    inputs = {"x": np.array([1e300, 1 + 1e-12])}
    assert (
        outputs_of(model, inputs)["y"].tolist() == outputs_of(proto, inputs)["y"].tolist() == [-np.inf, -1.0]
    )


def test_float64_is_not_quantized() -> None:
    proto = graph_text(
        """
        g (double[1,2,16,16] x) => (double[1,2,16,16] y) {
          made = MatMul(x, w)
          turned = Transpose<perm=[0,1,3,2]>(made)
          logits = MatMul(x, turned)
          probs = Softmax<axis=-1>(logits)
          y = MatMul(probs, made)
        }""",
        {"w": normal(1, 16, 16, dtype=np.float64)},
    )
    model = editable(proto)
    ranges = ranges_of(dict.fromkeys(("x", "made", "turned"), (-4.0, 4.0)))
    results = run(model, parse("default", PRESETS), calibrate=lambda *_: ranges)
    assert not any(result.rewrites for result in results)
    assert [skip.reason for skip in results[-4].skips] == ["it computes in float64"]
    assert [skip.reason for skip in results[-3].skips] == ["it computes in float64"]


@pytest.mark.parametrize("name", ["fuse_projections", "batch_views", "split_prefix_attention"])
def test_a_pass_by_itself_raises_the_opset_to_the_one_that_it_writes(name: str) -> None:
    model = editable(graph_text("g (float[2,8] x) => (float[2,8] y) { y = Tanh(x) }", opset=11))
    run_pass(model, name)
    assert model.graph.opset == 13  # from which on Split takes its sizes as an input


def test_a_mask_of_which_only_the_whole_has_a_known_size() -> None:
    proto = graph_text(
        """
        g (float[1,3,4] q, float[1,4,5] k, float[1,5,6] v, bool[1,n] given) => (float[1,3,6] y) {
          seen = Concat<axis=1>(given, hidden)
          logits = MatMul(q, k)
          masked = Where(seen, logits, low)
          probs = Softmax<axis=-1>(masked)
          y = MatMul(probs, v)
        }""",
        {"hidden": np.zeros((1, 2), np.bool_), "low": np.float32(LOW)},
    )
    proto.graph.value_info.append(helper.make_tensor_value_info("seen", TensorProto.BOOL, [1, 5]))
    after = editable(proto)
    run_pass(after, "drop_dead_prefix")
    inputs = {**seeded_inputs(proto, 2), "given": np.ones((1, 3), np.bool_)}
    assert relative_error(outputs_of(after, inputs), outputs_of(proto, inputs)) <= 1e-6


@pytest.mark.parametrize(
    ("text", "opset"),
    [
        ("(int32 n, float[4] x) => (float[4] y) { w = HannWindow(n) y = Mul(x, w) }", 21),
        ("(float a, float b, float[4] x) => (float[4] y) { w = Range(a, b, a) y = Mul(x, w) }", 21),
        ("(int64 n, float[4,4] x) => (float[4,4] y) { w = MelWeightMatrix(n, n, n, low, high) y = MatMul(x, w) }", 21),
        ("(float[4] x) => (int32[4] y) { h = Mul(x, x) y = BitCast<to = 6>(h) }", 26),
        ("(int32[4] i, float[4] x) => (float[4] y) { w = BitCast<to = 1>(i) y = Mul(x, w) }", 26),
    ],
)  # fmt: skip
@pytest.mark.parametrize(
    "passes", ["canonicalize,lower_precision", "canonicalize,lower_precision{to=bfloat16}"]
)
def test_what_takes_or_makes_one_type_alone_is_not_narrowed(passes: str, text: str, opset: int) -> None:
    if opset > onnx.defs.onnx_opset_version():
        pytest.skip(f"onnx {onnx.__version__} has no opset {opset}")
    integers = {"low": np.array(0.0, np.float32), "high": np.array(2000.0, np.float32)}
    model = editable(graph_text(f"g {text}", integers if "low" in text else {}, opset=opset))
    run(model, parse(passes, PRESETS))
    assert problems(model) == []


def test_an_operator_that_is_defined_in_float32_stays_there() -> None:
    """MeanVarianceNormalization, whose default axes onnx 1.23 takes for missing."""
    proto = graph_text("g (float[2,3,4,4] x) => (float[2,3,4,4] y) { y = MeanVarianceNormalization(x) }")
    model = editable(proto)
    run(model, parse("fp16", PRESETS))
    assert problems(model) == []
    inputs = seeded_inputs(proto)
    assert relative_error(outputs_of(model, inputs), outputs_of(proto, inputs)) < 1e-2


def test_a_tensor_of_unknown_type_is_no_float() -> None:
    """numpy takes None for float64."""
    assert not is_float(None)


NESTED = """
    g (float[2] x) => (float[2] y) {
      y = Loop(n, true, x)<body = outer (int64 i, bool c, float[2] s) => (bool on, float[2] after) {
        on = Identity(c)
        after = Loop(m, true, s)<body = inner (int64 j, bool d, float[2] u) => (bool still, float[2] bent) {
          still = Identity(d)
          half = Tanh(u)
          bent = Neg(half)
        }>
      }>
    }"""


@pytest.mark.parametrize(
    ("outer", "inner", "reason"), [(900, 900, "899 more loops"), (3, 70_000, "more nodes")]
)
def test_loops_that_would_be_too_many_nodes_stay(outer: int, inner: int, reason: str) -> None:
    weights = {"n": np.array(outer), "m": np.array(inner), "true": np.array(True)}
    result = run_pass(editable(graph_text(NESTED, weights)), "fuse_denoise_loop", max_steps="100000")
    assert reason in result.skips[0].reason


@pytest.mark.parametrize("which", ["weight", "bias"])
def test_what_is_rounded_before_it_is_read_is_not_joined(which: str) -> None:
    proto = graph_text(
        f"""
        g (float[2,8] x) => (float[2,8] y) {{
          low = Cast<to=16>({"w" if which == "weight" else "b"})
          wide = Cast<to=1>(low)
          first = MatMul(x, {"wide" if which == "weight" else "w"})
          first_biased = Add(first, {"wide" if which == "bias" else "b"})
          second = MatMul(x, v)
          second_biased = Add(second, d)
          y = Mul(first_biased, second_biased)
        }}""",
        {"w": normal(1, 8, 8), "b": normal(2, 8), "v": normal(3, 8, 8), "d": normal(4, 8)},
    )
    after = editable(proto)
    run_pass(after, "fuse_projections", max_scale_ratio="1000")
    inputs = seeded_inputs(proto, 3)
    assert relative_error(outputs_of(after, inputs), outputs_of(proto, inputs)) <= 1e-6


def test_a_scale_that_adds_an_axis_is_none_of_attention() -> None:
    proto = graph_text(
        """
        g (float[1,2,16,8] q, float[1,2,8,16] k, float[1,2,16,8] v) => (float[1,1,2,16,8] y) {
          logits = MatMul(q, k)
          scaled = Mul(logits, scale)
          probs = Softmax<axis=-1>(scaled)
          y = MatMul(probs, v)
        }""",
        {"scale": np.full((1,) * 5, 0.25, np.float32)},
    )
    after = editable(proto)
    result = run_pass(
        after, "insert_attention_qdq", ranges_of(dict.fromkeys("qkv", (-4.0, 4.0))), vision="true"
    )
    assert result.changes == ()
    assert problems(after) == []


@pytest.mark.parametrize("name", ["fold_scales", "fold_norms"])
def test_a_weight_that_is_returned_in_another_form_stays(name: str) -> None:
    proto = graph_text(
        """
        g (float[2,8] x) => (float[2,8] y, float[8,8] turned) {
          normed = LayerNormalization(x, gain)
          made = MatMul(normed, w)
          scaled = Mul(made, c)
          y = Tanh(scaled)
          turned = Transpose<perm=[1,0]>(w)
        }""",
        {"w": normal(1, 8, 8), "gain": normal(2, 8), "c": np.float32(0.25)},
    )
    after = editable(proto)
    run_pass(after, name)
    inputs = seeded_inputs(proto, 3)
    assert relative_error(outputs_of(after, inputs), outputs_of(proto, inputs)) <= 1e-6


def test_a_shape_that_the_file_states_wrongly_is_not_relied_on() -> None:
    """Onnx's checker does not see it in a body, to which it does not take constants from outside."""
    proto = graph_text(
        """
        g (float[2,3,4] x, bool c) => (float[r,4] y) {
          made = MatMul(x, w)
          y = If(c)<
            then_branch = yes () => (float[7,4] a) { a = Reshape(made, size) },
            else_branch = no () => (float[7,4] b) { b = Reshape(x, size) }
          >
        }""",
        {"w": normal(1, 4, 4), "size": np.array([6, 4])},
    )
    after = editable(proto)
    run_pass(after, "drop_dead_prefix")
    inputs = seeded_inputs(proto)
    assert relative_error(outputs_of(after, inputs), outputs_of(proto, inputs)) <= 1e-6
