"""The golden cases of the exact rewrites."""

from __future__ import annotations

import onnx
import test_fuse_denoise_loop as loops
from golden_cases import bfloat16, case
from pass_graphs import graph_text, normal

# fuse_denoise_loop


@case(
    "fuse_denoise_loop",
    "Three steps of torch's while_loop become one straight graph; time MLP and adaRMS dense go.",
)
def fuse_denoise_loop__unrolled() -> onnx.ModelProto:
    return loops.while_loop()


@case(
    "fuse_denoise_loop",
    "mode=loop keeps the loop: what depends on the step alone is read from tables.",
    options={"mode": "loop"},
)
def fuse_denoise_loop__kept_with_tables() -> onnx.ModelProto:
    return loops.while_loop()


@case("fuse_denoise_loop", "A Scan has as many steps as its scanned axis is long.")
def fuse_denoise_loop__scan() -> onnx.ModelProto:
    return loops.scan()


@case(
    "fuse_denoise_loop",
    "A condition that depends on what the loop computes: its number of steps is not known.",
)
def fuse_denoise_loop__refused() -> onnx.ModelProto:
    return loops.data_dependent()


# fuse_projections


@case(
    "fuse_projections",
    "Gate and up read one tensor: their weights are joined as stored, the product is split.",
)
def fuse_projections__gate_up() -> onnx.ModelProto:
    return graph_text(
        """
        mlp (float[2,4,32] x) => (float[2,4,48] y) {
          gate_w = Cast<to = 1>(w_gate)
          gate = MatMul(x, gate_w)
          up_w = Cast<to = 1>(w_up)
          up = MatMul(x, up_w)
          act = Sigmoid(gate)
          y = Mul(act, up)
        }""",
        {"w_gate": bfloat16(1, 32, 48), "w_up": bfloat16(2, 32, 48)},
    )


@case("fuse_projections", "Biases that follow all of the linears are joined too.")
def fuse_projections__with_bias() -> onnx.ModelProto:
    return graph_text(
        """
        projections (float[2,4,32] x) => (float[2,4,16] y) {
          q0 = MatMul(x, w_q)
          q = Add(q0, b_q)
          k0 = MatMul(x, w_k)
          k = Add(k0, b_k)
          y = Mul(q, k)
        }""",
        {"w_q": normal(1, 32, 16), "b_q": normal(2, 16), "w_k": normal(3, 32, 16), "b_k": normal(4, 16)},
    )


@case("fuse_projections", "Two steps that share their weights share the joined weight.")
def fuse_projections__two_steps() -> onnx.ModelProto:
    return graph_text(
        """
        steps (float[4,16] x) => (float[4,16] z) {
          a0 = MatMul(x, w_a)
          b0 = MatMul(x, w_b)
          y = Add(a0, b0)
          a1 = MatMul(y, w_a)
          b1 = MatMul(y, w_b)
          z = Mul(a1, b1)
        }""",
        {"w_a": normal(1, 16, 16), "w_b": normal(2, 16, 16)},
    )


@case(
    "fuse_projections",
    "An exporter that flattens for each Gemm gives each linear a tensor of its own: their values are one.",
)
def fuse_projections__flattened_for_each() -> onnx.ModelProto:
    return graph_text(
        """
        mlp (float[2,4,16] x) => (float[8,16] y) <int64[2] flat = {8, 16}, int64[2] rows = {-1, 16}> {
          for_a = Reshape(x, flat)
          a = MatMul(for_a, w_a)
          for_b = Reshape(x, flat)
          b = MatMul(for_b, w_b)
          for_c = Reshape(x, rows)
          c = MatMul(for_c, w_c)
          ab = Mul(a, b)
          y = Add(ab, c)
        }""",
        {"w_a": normal(1, 16, 16), "w_b": normal(2, 16, 16), "w_c": normal(3, 16, 16)},
    )


@case("fuse_projections", "One scale could not serve weights whose largest values differ more than twofold.")
def fuse_projections__refused() -> onnx.ModelProto:
    return graph_text(
        """
        projections (float[4,16] x) => (float[4,16] y) {
          a = MatMul(x, w_a)
          b = MatMul(x, w_b)
          y = Mul(a, b)
        }""",
        {"w_a": normal(1, 16, 16), "w_b": normal(2, 16, 16) * 8},
    )


@case("fuse_projections", "A weight that something else reads stays: joining it would store it twice.")
def fuse_projections__other_reader() -> onnx.ModelProto:
    return graph_text(
        """
        projections (float[4,16] x) => (float[4,16] y, float[16,16] t) {
          a = MatMul(x, w_a)
          b = MatMul(x, w_b)
          y = Mul(a, b)
          t = Neg(w_a)
        }""",
        {"w_a": normal(1, 16, 16), "w_b": normal(2, 16, 16)},
    )


# fold_gqa


@case("fold_gqa", "Four query heads share one key head: they become rows of one MatMul, and the Expand goes.")
def fold_gqa__one_kv_head() -> onnx.ModelProto:
    return graph_text(
        """
        attention (float[1,4,3,8] q, float[1,1,5,8] k, float[1,1,5,8] v, float[1,1,3,5] mask) => (float[1,4,3,8] y)
          <int64[1] two = {2}, int64[5] wide = {1, 1, 4, 5, 8}, int64[4] heads = {1, 4, 5, 8}, float scale = {0.25}> {
          k5 = Unsqueeze(k, two)
          kw = Expand(k5, wide)
          kr = Reshape(kw, heads)
          v5 = Unsqueeze(v, two)
          vw = Expand(v5, wide)
          vr = Reshape(vw, heads)
          kt = Transpose<perm = [0, 1, 3, 2]>(kr)
          logits = MatMul(q, kt)
          scaled = Mul(logits, scale)
          masked = Add(scaled, mask)
          probs = Softmax<axis = -1>(masked)
          y = MatMul(probs, vr)
        }"""
    )


@case("fold_gqa", "Two key heads by Tile, a mask for each query head: head h reads key head h // 2.")
def fold_gqa__tile_and_head_mask() -> onnx.ModelProto:
    return graph_text(
        """
        attention (float[2,4,3,8] q, float[2,2,5,8] k, float[2,2,5,8] v, float[1,4,3,5] mask) => (float[2,4,3,8] y)
          <int64[5] five = {2, 2, 1, 5, 8}, int64[5] repeats = {1, 1, 2, 1, 1}, int64[4] heads = {2, 4, 5, 8}> {
          k5 = Reshape(k, five)
          kw = Tile(k5, repeats)
          kr = Reshape(kw, heads)
          v5 = Reshape(v, five)
          vw = Tile(v5, repeats)
          vr = Reshape(vw, heads)
          kt = Transpose<perm = [0, 1, 3, 2]>(kr)
          logits = MatMul(q, kt)
          masked = Add(logits, mask)
          probs = Softmax<axis = -1>(masked)
          y = MatMul(probs, vr)
        }"""
    )


@case("fold_gqa", "Keys are repeated and values are not: left alone.")
def fold_gqa__refused() -> onnx.ModelProto:
    return graph_text(
        """
        attention (float[1,4,3,8] q, float[1,1,5,8] k, float[1,4,5,8] v) => (float[1,4,3,8] y)
          <int64[4] heads = {1, 4, 5, 8}> {
          kr = Expand(k, heads)
          kt = Transpose<perm = [0, 1, 3, 2]>(kr)
          logits = MatMul(q, kt)
          probs = Softmax<axis = -1>(logits)
          y = MatMul(probs, v)
        }"""
    )


# split_prefix_attention

_STEP = """
          k{n} = Concat<axis = 2>(prefix_k, x{n})
          v{n} = Concat<axis = 2>(prefix_v, x{n})
          kt{n} = Transpose<perm = [0, 1, 3, 2]>(k{n})
          logits{n} = MatMul(x{n}, kt{n})
          probs{n} = Softmax<axis = -1>(logits{n})
          mixed{n} = MatMul(probs{n}, v{n})
          scaled{n} = Mul(mixed{n}, dt)
          x{m} = Add(x{n}, scaled{n})"""


@case(
    "split_prefix_attention",
    "Two steps over one prefix: its keys are transposed once, a step adds the few of its own.",
)
def split_prefix_attention__two_steps() -> onnx.ModelProto:
    return graph_text(
        f"""
        steps (float[1,2,3,8] x0, float[1,2,5,8] prefix_k, float[1,2,5,8] prefix_v) => (float[1,2,3,8] x2)
          <float dt = {{-0.5}}> {{{_STEP.format(n=0, m=1)}{_STEP.format(n=1, m=2)}
        }}"""
    )


@case(
    "split_prefix_attention", "In a loop's body the prefix is captured: its transpose moves out of the loop."
)
def split_prefix_attention__loop_body() -> onnx.ModelProto:
    body = _STEP.format(n=0, m=1)
    return graph_text(
        f"""
        steps (float[1,2,3,8] noise, float[1,2,5,8] prefix_k, float[1,2,5,8] prefix_v) => (float[1,2,3,8] actions)
          <float dt = {{-0.5}}, int64 trip = {{2}}, bool go = {{1}}> {{
          actions = Loop(trip, go, noise) <
            body = step (int64 i, bool again, float[1,2,3,8] x0) => (bool keep, float[1,2,3,8] x1) {{
              keep = Identity(again){body}
            }}>
        }}"""
    )


@case(
    "split_prefix_attention",
    "Keys and values are concatenated differently: no pair of parts belongs together.",
)
def split_prefix_attention__refused() -> onnx.ModelProto:
    return graph_text(
        """
        step (float[1,2,3,8] x, float[1,2,5,8] prefix_k, float[1,2,4,8] prefix_v, float[1,2,4,8] more) => (float[1,2,3,8] y)
          <float dt = {-0.5}> {
          k = Concat<axis = 2>(prefix_k, x)
          v = Concat<axis = 2>(prefix_v, more)
          kt = Transpose<perm = [0, 1, 3, 2]>(k)
          logits = MatMul(x, kt)
          probs = Softmax<axis = -1>(logits)
          mixed = MatMul(probs, v)
          scaled = Mul(mixed, dt)
          y = Add(x, scaled)
        }"""
    )


# dedupe


@case("dedupe", "Two equal initializers become one, and so do the two nodes that then do the same.")
def dedupe__twins() -> onnx.ModelProto:
    return graph_text(
        """
        twins (float[4,16] x) => (float[4,16] y) {
          a = MatMul(x, w)
          b = MatMul(x, copy)
          y = Mul(a, b)
        }""",
        {"w": normal(1, 16, 16), "copy": normal(1, 16, 16)},
    )


@case("dedupe", "A node in a branch that repeats one of the graph around it goes.")
def dedupe__in_a_body() -> onnx.ModelProto:
    return graph_text(
        """
        branches (float[4] x, bool c) => (float[4] y, float[4] e) {
          e = Exp(x)
          s = Sin(x)
          y = If(c) <
            then_branch = yes () => (float[4] out_a) { t = Sin(x)
              out_a = Add(t, s) },
            else_branch = no () => (float[4] out_b) { out_b = Neg(s) }>
        }"""
    )


@case("dedupe", "Two outputs of the graph stay two nodes.")
def dedupe__refused() -> onnx.ModelProto:
    return graph_text(
        """
        outputs (float[4] x) => (float[4] y, float[4] z) {
          y = Exp(x)
          z = Exp(x)
        }"""
    )
