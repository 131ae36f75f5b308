"""The golden cases of `drop_dead_prefix`."""

from __future__ import annotations

import numpy as np
import onnx
from golden_cases import case
from pass_graphs import graph_text, normal


@case(
    "drop_dead_prefix",
    "Only the last two rows are returned: queries, output and MLP move to them; keys and values keep all rows.",
)
def drop_dead_prefix__last_layer() -> onnx.ModelProto:
    return graph_text(
        """
        layer (float[1,6,16] x) => (float[1,2,16] y, float[1,6,16] k, float[1,6,16] v)
          <int64[1] start = {4}, int64[1] end = {6}, int64[1] axis = {1}> {
          q = MatMul(x, w_q)
          k = MatMul(x, w_k)
          v = MatMul(x, w_v)
          kt = Transpose<perm = [0, 2, 1]>(k)
          logits = MatMul(q, kt)
          probs = Softmax<axis = -1>(logits)
          mixed = MatMul(probs, v)
          out = MatMul(mixed, w_o)
          sum = Add(x, out)
          up = MatMul(sum, w_up)
          act = Gelu(up)
          down = MatMul(act, w_down)
          all_rows = Add(sum, down)
          y = Slice(all_rows, start, end, axis)
        }""",
        {
            name: normal(seed, *shape)
            for seed, (name, shape) in enumerate(
                {
                    **dict.fromkeys(("w_q", "w_k", "w_v", "w_o"), (16, 16)),
                    "w_up": (16, 32),
                    "w_down": (32, 16),
                }.items()
            )
        },
    )


@case(
    "drop_dead_prefix",
    "The mask leaves out the second camera and the last text token: its image is not encoded, the token not looked up, "
    "and a mask that lets the rest through goes.",
)
def drop_dead_prefix__constant_mask() -> onnx.ModelProto:
    low = np.float32(-2.3819763e38)
    mask = np.zeros((1, 1, 7), np.float32)
    mask[..., [2, 3, 6]] = low
    return graph_text(
        """
        prefix (float[1,2,2,16] images, int64[1,3] tokens, float[1,2,16] q) => (float[1,2,16] y)
          <int64[3] batch = {2, 2, 16}, int64[3] rows = {1, 4, 16}> {
          views = Reshape(images, batch)
          seen = MatMul(views, w_vision)
          joined = Reshape(seen, rows)
          text = Gather(table, tokens)
          x = Concat<axis = 1>(joined, text)
          k = MatMul(x, w_k)
          v = MatMul(x, w_v)
          kt = Transpose<perm = [0, 2, 1]>(k)
          logits = MatMul(q, kt)
          masked = Add(logits, mask)
          probs = Softmax<axis = -1>(masked)
          y = MatMul(probs, v)
        }""",
        {
            "w_vision": normal(1, 16, 16),
            "table": normal(2, 16, 16),
            "w_k": normal(3, 16, 16),
            "w_v": normal(4, 16, 16),
            "mask": mask,
        },
    )


@case(
    "drop_dead_prefix",
    "The last token is padding in any run and the first two are decided by `valid`: one row less, and the sum of valid "
    "tokens is the same without it.",
)
def drop_dead_prefix__partly_known_mask() -> onnx.ModelProto:
    return graph_text(
        """
        prefix (float[1,4,16] x, bool[1,2] valid, float[1,2,16] q) => (float[1,2,16] y, int64[1,1] count)
          <int64[1] one = {1}, bool[1,1] yes = {1}, bool[1,1] no = {0}, float open = {0}, float closed = {-2.3819763e38}> {
          both = Concat<axis = 1>(yes, valid, no)
          numbers = Cast<to = 7>(both)
          count = ReduceSum(numbers, one)
          row = Unsqueeze(both, one)
          column = Transpose<perm = [0, 2, 1]>(row)
          pairs = And(row, column)
          mask = Where(pairs, open, closed)
          qk = MatMul(x, w_q)
          k = MatMul(x, w_k)
          v = MatMul(x, w_v)
          kt = Transpose<perm = [0, 2, 1]>(k)
          logits = MatMul(qk, kt)
          masked = Add(logits, mask)
          probs = Softmax<axis = -1>(masked)
          mixed = MatMul(probs, v)
          x1 = Add(x, mixed)
          k1 = MatMul(x1, w_k)
          v1 = MatMul(x1, w_v)
          kt1 = Transpose<perm = [0, 2, 1]>(k1)
          logits1 = MatMul(q, kt1)
          mask1 = Where(row, open, closed)
          masked1 = Add(logits1, mask1)
          probs1 = Softmax<axis = -1>(masked1)
          y = MatMul(probs1, v1)
        }""",
        {"w_q": normal(1, 16, 16), "w_k": normal(2, 16, 16), "w_v": normal(3, 16, 16)},
    )


@case(
    "drop_dead_prefix",
    "Nothing needs the second carried value and the collected one: the loop hands them out no more.",
)
def drop_dead_prefix__loop_outputs() -> onnx.ModelProto:
    return graph_text(
        """
        steps (float[4,16] x0, float[4,16] z0) => (float[4,16] x_end) <int64 trip = {3}, bool go = {1}> {
          x_end, z_end, history = Loop(trip, go, x0, z0) <
            body = step (int64 i, bool again, float[4,16] x, float[4,16] z)
              => (bool keep, float[4,16] x1, float[4,16] z1, float[4,16] seen) {
              keep = Identity(again)
              x1 = Relu(x)
              z1 = Add(z, x1)
              seen = Neg(z1)
            }>
        }"""
    )


@case("drop_dead_prefix", "Each head leaves out other keys, so that every key is needed by one of them.")
def drop_dead_prefix__refused() -> onnx.ModelProto:
    mask = np.zeros((1, 2, 1, 5), np.float32)
    mask[0, 0, 0, 4] = mask[0, 1, 0, 3] = -2.3819763e38
    return graph_text(
        """
        attention (float[1,2,3,8] q, float[1,2,5,8] k, float[1,2,5,8] v) => (float[1,2,3,8] y) {
          kt = Transpose<perm = [0, 1, 3, 2]>(k)
          logits = MatMul(q, kt)
          masked = Add(logits, mask)
          probs = Softmax<axis = -1>(masked)
          y = MatMul(probs, v)
        }""",
        {"mask": mask},
    )


@case("drop_dead_prefix", "A mask that only a run knows leaves out nothing.")
def drop_dead_prefix__unknown_mask() -> onnx.ModelProto:
    return graph_text(
        """
        attention (float[1,2,3,8] q, float[1,2,5,8] k, float[1,2,5,8] v, float[1,1,1,5] mask) => (float[1,2,3,8] y) {
          kt = Transpose<perm = [0, 1, 3, 2]>(k)
          logits = MatMul(q, kt)
          masked = Add(logits, mask)
          probs = Softmax<axis = -1>(masked)
          y = MatMul(probs, v)
        }"""
    )
