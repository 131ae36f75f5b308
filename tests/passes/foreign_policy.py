"""A small pi0.5 as other exporters would write it: a camera tower, a language prefix, ten flow-matching steps.

The mathematics is that of FACTS in the tables of the model (SigLIP block, Gemma block, adaRMS expert); what varies is
how an exporter spells it. Weights are seeded and alike for all spellings of one size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import onnx
from pass_graphs import Array, graph_text, renamed

PATCH, PATCHES, VIEWS = 4, 4, 2
"""Images of 8 x 8 in patches of 4 x 4."""

HEAD = 16


@dataclass(frozen=True)
class Style:
    """How an exporter writes the policy, and its sizes.

    Attributes:
        linear: a MatMul by the weight as stored; by its transpose; or TorchScript's Gemm on two dimensions.
        loop: the steps as a Loop with a trip count; else unrolled.
        repeat: how key and value heads meet the query heads.
        views: the cameras' images as one batch; one after another by index; or as inputs of their own.
        operators: normalization and rotation as operators of opset 23.
        slashes: names like `/layers.0/q_proj/MatMul_output_0`.
    """

    opset: int = 21
    dtype: Literal["float", "float16"] = "float"
    linear: Literal["matmul", "transposed", "gemm"] = "matmul"
    loop: bool = False
    repeat: Literal["expand", "tile", "broadcast"] = "expand"
    mask: Literal["add", "where"] = "add"
    scale: Literal["logits", "div", "query"] = "logits"
    rope: Literal["rotate half", "parts"] = "rotate half"
    views: Literal["batch", "index", "inputs"] = "batch"
    layer_norm_operator: bool = True
    operators: bool = False
    slashes: bool = False
    batch: int = 1
    heads: int = 2
    kv_heads: int = 1
    layers: int = 2
    tokens: int = 60
    horizon: int = 5
    steps: int = 10
    width: int = 32

    @property
    def prefix(self) -> int:
        """Positions of the prefix."""
        return VIEWS * PATCHES + self.tokens


@dataclass
class _Writer:
    style: Style
    lines: list[str] = field(default_factory=list)
    weights: dict[str, Array] = field(default_factory=dict)
    turned: set[str] = field(default_factory=set)
    count: int = 0

    @property
    def numpy(self) -> type:
        return np.float16 if self.style.dtype == "float16" else np.float32

    def op(self, op: str, *inputs: str, name: str = "t") -> str:
        """Write one node, its attributes in `op` as ONNX's text form has them; the name of its output."""
        self.count += 1
        output = f"{name}_{self.count}"
        self.lines.append(f"{output} = {op}({', '.join(inputs)})")
        return output

    def weight(self, name: str, *shape: int, scale: float | None = None, around: float = 0.0) -> str:
        if name not in self.weights:
            rng = np.random.default_rng([ord(letter) for letter in name])
            size = shape[-1] ** -0.5 if scale is None else scale
            self.weights[name] = (around + size * rng.standard_normal(shape)).astype(self.numpy)
        return name

    def number(self, value: float, name: str = "number") -> str:
        key = f"{name}_{value}".replace("-", "m").replace(".", "p").replace("+", "")
        self.weights.setdefault(key, np.asarray(value, self.numpy))
        return key

    def integers(self, *values: int) -> str:
        key = "shape_" + "_".join(map(str, values)).replace("-", "m")
        self.weights.setdefault(key, np.array(values, np.int64))
        return key

    def reshape(self, tensor: str, *shape: int) -> str:
        return self.op("Reshape", tensor, self.integers(*shape))

    def reduce(self, op: str, tensor: str) -> str:
        if self.style.opset < 18:
            return self.op(f"{op}<keepdims = 1, axes = [-1]>", tensor)
        return self.op(f"{op}<keepdims = 1>", tensor, self.integers(-1))

    def linear(
        self, tensor: str, name: str, rows: int, columns: int, shape: Sequence[int], bias: bool = False
    ) -> str:
        """`tensor` of `shape` (its last dimension `rows`) times a weight [columns, rows]."""
        weight = self.weight(name, columns, rows)
        if self.style.linear == "gemm":
            flat = self.reshape(tensor, int(np.prod(shape[:-1])), rows)
            biases = [self.weight(f"{name}_bias", columns, scale=0.1)] if bias else []
            return self.reshape(self.op("Gemm<transB = 1>", flat, weight, *biases), *shape[:-1], columns)
        if self.style.linear == "matmul":
            if name not in self.turned:
                self.turned.add(name)
                self.weights[name] = np.ascontiguousarray(self.weights[name].T)
            factor = weight
        else:
            factor = self.op("Transpose<perm = [1, 0]>", weight)
        result = self.op("MatMul", tensor, factor)
        if bias:
            result = self.op("Add", result, self.weight(f"{name}_bias", columns, scale=0.1))
        return result

    def rms_statistics(self, tensor: str) -> str:
        square = self.op("Mul", tensor, tensor)
        shifted = self.op("Add", self.reduce("ReduceMean", square), self.number(1e-5))
        root = self.op("Sqrt", shifted)
        if self.style.linear == "gemm":
            return self.op("Div", tensor, root)
        return self.op("Mul", tensor, self.op("Reciprocal", root))

    def rms_norm(self, tensor: str, name: str) -> str:
        weight = self.weight(name, self.style.width, scale=0.1)
        gain = self.op("Add", weight, self.number(1.0))
        if self.style.operators:
            return self.op("RMSNormalization<axis = -1, epsilon = 1e-5>", tensor, gain)
        return self.op("Mul", self.rms_statistics(tensor), gain)

    def ada_norm(self, tensor: str, condition: str, name: str) -> tuple[str, str]:
        """The normalized tensor and the gate; `condition` is [1, width]."""
        width = self.style.width
        modulation = self.linear(condition, name, width, 3 * width, (1, width), bias=True)
        row = self.op("Unsqueeze", modulation, self.integers(1))
        self.count += 1
        scale, shift, gate = (f"{part}_{self.count}" for part in ("scale", "shift", "gate"))
        sizes = self.integers(width, width, width)
        self.lines.append(f"{scale}, {shift}, {gate} = Split<axis = -1>({row}, {sizes})")
        gain = self.op("Add", scale, self.number(1.0))
        normed = self.op("Mul", self.rms_statistics(tensor), gain)
        return self.op("Add", normed, shift), gate

    def layer_norm(self, tensor: str, name: str) -> str:
        weight = self.weight(f"{name}_weight", self.style.width, scale=0.1, around=1.0)
        bias = self.weight(f"{name}_bias", self.style.width, scale=0.1)
        if self.style.layer_norm_operator:
            return self.op("LayerNormalization<axis = -1, epsilon = 1e-5>", tensor, weight, bias)
        centred = self.op("Sub", tensor, self.reduce("ReduceMean", tensor))
        square = self.op("Pow", centred, self.number(2.0))
        shifted = self.op("Add", self.reduce("ReduceMean", square), self.number(1e-5))
        unit = self.op("Div", centred, self.op("Sqrt", shifted))
        return self.op("Add", self.op("Mul", unit, weight), bias)

    def gelu(self, tensor: str) -> str:
        cubed = self.op("Mul", tensor, self.op("Mul", tensor, tensor))
        inner = self.op("Add", tensor, self.op("Mul", cubed, self.number(0.044715)))
        gate = self.op("Tanh", self.op("Mul", inner, self.number(0.7978845)))
        half = self.op("Mul", tensor, self.number(0.5))
        return self.op("Mul", half, self.op("Add", gate, self.number(1.0)))

    def silu(self, tensor: str) -> str:
        return self.op("Mul", tensor, self.op("Sigmoid", tensor))

    def rotate(self, tensor: str, cos: str, sin: str) -> str:
        """Rotate [B, heads, L, HEAD] by the angles of [B, 1, L, HEAD]."""
        half, last = HEAD // 2, self.integers(-1)
        x1 = self.op("Slice", tensor, self.integers(0), self.integers(half), last)
        x2 = self.op("Slice", tensor, self.integers(half), self.integers(HEAD), last)
        if self.style.rope == "rotate half":
            turned = self.op("Concat<axis = -1>", self.op("Neg", x2), x1)
            straight = self.op("Mul", tensor, cos)
            return self.op("Add", straight, self.op("Mul", turned, sin))
        c = self.op("Slice", cos, self.integers(0), self.integers(half), last)
        s = self.op("Slice", sin, self.integers(0), self.integers(half), last)
        left = self.op("Sub", self.op("Mul", x1, c), self.op("Mul", x2, s))
        right = self.op("Add", self.op("Mul", x2, c), self.op("Mul", x1, s))
        return self.op("Concat<axis = -1>", left, right)

    def angles(self, positions: str) -> tuple[str, str]:
        """Cosine and sine [B, 1, L, HEAD] of integer positions [B, L]."""
        number = 10 if self.style.dtype == "float16" else 1
        p = self.op("Unsqueeze", self.op(f"Cast<to = {number}>", positions), self.integers(2))
        frequency = (100.0 ** -(np.arange(HEAD // 2) / (HEAD // 2))).astype(self.numpy)
        self.weights.setdefault("inv_freq", frequency)
        angle = self.op("Mul", p, "inv_freq")
        both = self.op("Unsqueeze", self.op("Concat<axis = -1>", angle, angle), self.integers(1))
        return self.op("Cos", both), self.op("Sin", both)

    def heads(self, tensor: str, length: int, heads: int, batch: int) -> str:
        return self.op("Transpose<perm = [0, 2, 1, 3]>", self.reshape(tensor, batch, length, heads, HEAD))

    def repeated(self, tensor: str, length: int) -> str:
        """Key or value heads for each query head."""
        style = self.style
        groups = style.heads // style.kv_heads
        if groups == 1 or (style.repeat == "broadcast" and style.kv_heads == 1):
            return tensor
        raised = self.op("Unsqueeze", tensor, self.integers(2))
        if style.repeat == "tile":
            many = self.op("Tile", raised, self.integers(1, 1, groups, 1, 1))
        else:
            many = self.op("Expand", raised, self.integers(style.batch, style.kv_heads, groups, length, HEAD))
        return self.reshape(many, style.batch, style.heads, length, HEAD)

    def attention(self, q: str, k: str, v: str, mask: str | None, rows: int, batch: int) -> str:
        """[batch, rows, heads * HEAD]."""
        style = self.style
        if style.scale == "query":
            q = self.op("Mul", q, self.number(HEAD**-0.5))
        logits = self.op("MatMul", q, self.op("Transpose<perm = [0, 1, 3, 2]>", k), name="logits")
        if style.scale == "logits":
            logits = self.op("Mul", logits, self.number(HEAD**-0.5))
        elif style.scale == "div":
            logits = self.op("Div", logits, self.number(HEAD**0.5))
        if mask is not None and style.mask == "where":
            logits = self.op("Where", mask, logits, self.number(-65504.0))
        elif mask is not None:
            logits = self.op("Add", logits, mask)
        mixed = self.op("MatMul", self.op("Softmax<axis = -1>", logits), v)
        return self.reshape(self.op("Transpose<perm = [0, 2, 1, 3]>", mixed), batch, rows, style.heads * HEAD)

    def gated_mlp(self, tensor: str, name: str, shape: Sequence[int]) -> str:
        width = self.style.width
        gate = self.gelu(self.linear(tensor, f"{name}_gate", width, 2 * width, shape))
        up = self.linear(tensor, f"{name}_up", width, 2 * width, shape)
        return self.linear(
            self.op("Mul", gate, up), f"{name}_down", 2 * width, width, (*shape[:-1], 2 * width)
        )

    def mask(self, allowed: str) -> str:
        if self.style.mask == "where":
            return allowed
        return self.op("Where", allowed, self.number(0.0), self.number(-65504.0), name="mask")


def _vision(w: _Writer) -> list[str]:
    """What the cameras saw, [batch, positions, width], of all together or of each."""
    s = w.style
    if s.views == "batch":
        flat = w.reshape("images", s.batch * VIEWS, 3, 2 * PATCH, 2 * PATCH)
        return [w.reshape(_tower(w, flat, s.batch * VIEWS), s.batch, VIEWS * PATCHES, s.width)]
    if s.views == "inputs":
        return [_tower(w, f"image_{view}", s.batch) for view in range(VIEWS)]
    indices = [w.integers(view) for view in range(VIEWS)]
    views = [w.op("Gather<axis = 1>", "images", index) for index in indices]
    return [_tower(w, w.reshape(view, s.batch, 3, 2 * PATCH, 2 * PATCH), s.batch) for view in views]


def _tower(w: _Writer, flat: str, images: int) -> str:
    """[images, PATCHES, width] of [images, 3, 8, 8]."""
    s = w.style
    width = s.width
    shape = (images, PATCHES, width)
    kernel = w.weight("patch_weight", width, 3, PATCH, PATCH, scale=0.15)
    conv = w.op(f"Conv<strides = [{PATCH}, {PATCH}]>", flat, kernel, w.weight("patch_bias", width, scale=0.1))
    x = w.op("Transpose<perm = [0, 2, 1]>", w.reshape(conv, images, width, PATCHES))
    x = w.op("Add", x, w.weight("patch_position", 1, PATCHES, width, scale=0.3))
    normed = w.layer_norm(x, "vision_norm1")
    q, k, v = (
        w.heads(
            w.linear(normed, f"vision_{name}", width, s.heads * HEAD, shape, bias=True),
            PATCHES,
            s.heads,
            images,
        )
        for name in "qkv"
    )
    mixed = w.attention(q, k, v, None, PATCHES, images)
    attended = w.linear(mixed, "vision_o", s.heads * HEAD, width, (*shape[:-1], s.heads * HEAD), bias=True)
    x = w.op("Add", x, attended)
    hidden = w.gelu(
        w.linear(w.layer_norm(x, "vision_norm2"), "vision_up", width, 2 * width, shape, bias=True)
    )
    x = w.op("Add", x, w.linear(hidden, "vision_down", 2 * width, width, (*shape[:-1], 2 * width), bias=True))
    return w.linear(w.layer_norm(x, "vision_norm3"), "projector", width, width, shape, bias=True)


def _prefix(w: _Writer) -> list[tuple[str, str]]:
    """Rotated keys, and values, of each layer: [batch, kv_heads, prefix, HEAD]."""
    s = w.style
    shape = (s.batch, s.prefix, s.width)
    text = w.op("Gather", w.weight("embed_tokens", 16, s.width, scale=0.2), "tokens")
    text = w.op("Mul", text, w.number(s.width**0.5))
    x = w.op("Concat<axis = 1>", *_vision(w), text)
    mask = w.mask(w.op("Unsqueeze", "valid", w.integers(1, 2)))
    cos, sin = w.angles("prefix_positions")
    cache = []
    for layer in range(s.layers):
        name = f"layers_{layer}"
        normed = w.rms_norm(x, f"{name}_input_norm")
        q = w.heads(
            w.linear(normed, f"{name}_q_proj", s.width, s.heads * HEAD, shape), s.prefix, s.heads, s.batch
        )
        k = w.heads(
            w.linear(normed, f"{name}_k_proj", s.width, s.kv_heads * HEAD, shape),
            s.prefix,
            s.kv_heads,
            s.batch,
        )
        v = w.heads(
            w.linear(normed, f"{name}_v_proj", s.width, s.kv_heads * HEAD, shape),
            s.prefix,
            s.kv_heads,
            s.batch,
        )
        k = w.rotate(k, cos, sin)
        cache.append((k, v))
        if layer + 1 == s.layers:
            break
        keys, values = w.repeated(k, s.prefix), w.repeated(v, s.prefix)
        mixed = w.attention(w.rotate(q, cos, sin), keys, values, mask, s.prefix, s.batch)
        wide = (*shape[:-1], s.heads * HEAD)
        x = w.op("Add", x, w.linear(mixed, f"{name}_o_proj", s.heads * HEAD, s.width, wide))
        normed = w.rms_norm(x, f"{name}_post_norm")
        x = w.op("Add", x, w.gated_mlp(normed, f"{name}_mlp", shape))
    return cache


def _condition(w: _Writer, time: str) -> str:
    """[1, width] of one number, as SiLU(linear(SiLU(linear(sines))))."""
    width = w.style.width
    period = 0.004 * 1000 ** np.linspace(0, 1, width // 2)
    w.weights.setdefault("time_frequency", (2 * np.pi / period).astype(w.numpy).reshape(1, -1))
    angle = w.op("Mul", time, "time_frequency")
    e = w.op("Concat<axis = -1>", w.op("Sin", angle), w.op("Cos", angle))
    for name in ("time_mlp_in", "time_mlp_out"):
        e = w.silu(w.linear(e, name, width, width, (1, width), bias=True))
    return e


def _velocity(
    w: _Writer, x: str, time: str, cache: list[tuple[str, str]], mask: str, cos: str, sin: str
) -> str:
    s = w.style
    shape, keys = (s.batch, s.horizon, s.width), s.prefix + s.horizon
    condition = _condition(w, time)
    h = w.linear(x, "action_in_proj", s.width, s.width, shape, bias=True)
    for layer, (prefix_keys, prefix_values) in enumerate(cache):
        name = f"expert_{layer}"
        normed, gate = w.ada_norm(h, condition, f"{name}_input_dense")
        q = w.heads(
            w.linear(normed, f"{name}_q_proj", s.width, s.heads * HEAD, shape), s.horizon, s.heads, s.batch
        )
        k = w.heads(
            w.linear(normed, f"{name}_k_proj", s.width, s.kv_heads * HEAD, shape),
            s.horizon,
            s.kv_heads,
            s.batch,
        )
        v = w.heads(
            w.linear(normed, f"{name}_v_proj", s.width, s.kv_heads * HEAD, shape),
            s.horizon,
            s.kv_heads,
            s.batch,
        )
        k = w.op("Concat<axis = 2>", prefix_keys, w.rotate(k, cos, sin))
        v = w.op("Concat<axis = 2>", prefix_values, v)
        q = w.rotate(q, cos, sin)
        mixed = w.attention(q, w.repeated(k, keys), w.repeated(v, keys), mask, s.horizon, s.batch)
        branch = w.linear(mixed, f"{name}_o_proj", s.heads * HEAD, s.width, (*shape[:-1], s.heads * HEAD))
        h = w.op("Add", h, w.op("Mul", branch, gate))
        normed, gate = w.ada_norm(h, condition, f"{name}_post_dense")
        h = w.op("Add", h, w.op("Mul", w.gated_mlp(normed, f"{name}_mlp", shape), gate))
    normed, _ = w.ada_norm(h, condition, "expert_norm_dense")
    return w.linear(normed, "action_out_proj", s.width, s.width, shape, bias=True)


def policy(style: Style) -> onnx.ModelProto:
    """The policy in one style; all styles of one size and type compute the same up to rounding."""
    w, s = _Writer(style), style
    cache = _prefix(w)
    ones = w.weights.setdefault("ones", np.ones((s.batch, s.horizon), bool))
    assert ones.dtype == bool
    mask = w.mask(w.op("Unsqueeze", w.op("Concat<axis = 1>", "valid", "ones"), w.integers(1, 2)))
    cos, sin = w.angles("action_positions")
    dt = w.number(-1 / s.steps, "dt")
    if s.loop:
        w.weights |= {"trip": np.array(s.steps), "go": np.array(True), "t_start": np.array([[1.0]], w.numpy)}
        outer, w.lines = w.lines, []
        v = _velocity(w, "x_in", "t_in", cache, mask, cos, sin)
        w.lines += [f"scaled = Mul({v}, {dt})", "x_out = Add(x_in, scaled)", f"t_out = Add(t_in, {dt})"]
        body = "\n".join(["keep = Identity(again)", *w.lines])
        kind, x = s.dtype, f"{s.dtype}[{s.batch},{s.horizon},{s.width}]"
        w.lines = outer
        w.lines.append(
            f"t_end, actions = Loop(trip, go, t_start, noise) <body = step (int64 i, bool again, {kind}[1,1] t_in, {x} x_in)"
            f" => (bool keep, {kind}[1,1] t_out, {x} x_out) {{\n{body}\n}}>"
        )
    else:
        x = "noise"
        for step in range(s.steps):
            w.weights[f"time_{step}"] = np.array([[1 - step / s.steps]], w.numpy)
            v = _velocity(w, x, f"time_{step}", cache, mask, cos, sin)
            x = w.op("Add", x, w.op("Mul", v, dt), name="x")
        w.lines[-1] = w.lines[-1].replace(f"{x} =", "actions =")
    body = "\n".join(w.lines)
    images = f"{s.dtype}[{s.batch},{VIEWS},3,8,8] images"
    if s.views == "inputs":
        images = ", ".join(f"{s.dtype}[{s.batch},3,8,8] image_{view}" for view in range(VIEWS))
    text = f"""
    policy ({images}, int64[{s.batch},{s.tokens}] tokens, bool[{s.batch},{s.prefix}] valid,
      int64[{s.batch},{s.prefix}] prefix_positions, int64[{s.batch},{s.horizon}] action_positions,
      {s.dtype}[{s.batch},{s.horizon},{s.width}] noise) => ({s.dtype}[{s.batch},{s.horizon},{s.width}] actions) {{
      {body}
    }}"""
    model = graph_text(text, w.weights, opset=s.opset)
    return renamed(model, lambda name: "/" + name.replace("_", "/", 1) + "_output_0") if s.slashes else model


def last_layer(style: Style, rows: int) -> onnx.ModelProto:
    """A language layer run on all positions, of which the last `rows` are returned, and all keys and values."""
    w, s = _Writer(style), style
    shape = (s.batch, s.prefix, s.width)
    mask = w.mask(w.op("Unsqueeze", "valid", w.integers(1, 2)))
    cos, sin = w.angles("positions")
    normed = w.rms_norm("x", "input_norm")
    q, k, v = (
        w.heads(w.linear(normed, name, s.width, heads * HEAD, shape), s.prefix, heads, s.batch)
        for name, heads in (("q_proj", s.heads), ("k_proj", s.kv_heads), ("v_proj", s.kv_heads))
    )
    k = w.rotate(k, cos, sin)
    keys, values = w.repeated(k, s.prefix), w.repeated(v, s.prefix)
    mixed = w.attention(w.rotate(q, cos, sin), keys, values, mask, s.prefix, s.batch)
    x = w.op("Add", "x", w.linear(mixed, "o_proj", s.heads * HEAD, s.width, (*shape[:-1], s.heads * HEAD)))
    x = w.op("Add", x, w.gated_mlp(w.rms_norm(x, "post_norm"), "mlp", shape))
    x = w.rms_norm(x, "final_norm")
    w.lines += [
        f"y = Slice({x}, {w.integers(s.prefix - rows)}, {w.integers(s.prefix)}, {w.integers(1)})",
        f"keys = Identity({k})",
        f"values = Identity({v})",
    ]
    body = "\n".join(w.lines)
    heads = f"{s.dtype}[{s.batch},{s.kv_heads},{s.prefix},{HEAD}]"
    text = f"""
    layer ({s.dtype}[{s.batch},{s.prefix},{s.width}] x, bool[{s.batch},{s.prefix}] valid,
      int64[{s.batch},{s.prefix}] positions) => ({s.dtype}[{s.batch},{rows},{s.width}] y, {heads} keys, {heads} values) {{
      {body}
    }}"""
    return graph_text(text, w.weights, opset=s.opset)
