"""Attention with grouped heads, masks, rotations and keys from outside, and networks of cameras."""

from __future__ import annotations

import numpy as np

from random_graphs.core import (
    BOOL,
    FLOAT,
    HALF,
    INT64,
    MASKED,
    T,
    numpy_type,
)
from random_graphs.linears import Linears


class Attention(Linears):
    def attention(self, x: T) -> T:
        groups, kv_heads, size = (
            self.rng.choice((1, 1, 2, 4)),
            self.rng.choice((1, 2)),
            self.rng.choice((2, 4)),
        )
        prefix = self.rng.choice(self.prefixes) if self.prefixes and self.chance(0.6) else None
        if prefix is not None and prefix[0].dtype == x.dtype:
            kv_heads, size = prefix[0].shape[1], prefix[0].width
        else:
            prefix = None
        heads = groups * kv_heads
        q, k, v = self.projected(x, heads * size, kv_heads * size)
        q, k, v = self.heads(q, heads), self.heads(k, kv_heads), self.heads(v, kv_heads)
        if self.chance(0.5):
            q, k = self.rotated(q, k)
        if prefix is not None:
            k, v = (self.concat(2, before, own) for before, own in zip(prefix, (k, v), strict=True))
        if self.has("Attention") and prefix is None and self.chance(0.4):
            mixed = self.attention_operator(q, k, v)
        else:
            mixed = self.spelled_attention(q, k, v, groups)
        joined = self.reshape(self.transpose(mixed, 0, 2, 1, 3), *x.shape[:2], heads * size)
        return self.linear(joined, x.width)

    def projected(self, x: T, q_width: int, kv_width: int) -> list[T]:
        """Q, K and V by linears of their own, or by one that is split."""
        if self.chance(0.7):
            return [self.linear(x, width) for width in (q_width, kv_width, kv_width)]
        joined = self.linear(x, q_width + 2 * kv_width)
        widths = (q_width, kv_width, kv_width)
        sizes = [(x.dtype, (*x.shape[:2], width)) for width in widths]
        parts: list[T] = self.node("Split", [joined, self.ints(*widths)], *sizes, axis=-1)
        return parts

    def heads(self, x: T, heads: int) -> T:
        """[batch, heads, rows, size]."""
        return self.transpose(self.reshape(x, *x.shape[:2], heads, x.width // heads), 0, 2, 1, 3)

    def rotated(self, *tensors: T) -> list[T]:
        """By one angle a row, half-split."""
        half = tensors[0].width // 2
        frequencies = 10.0 ** -np.arange(half)
        positions = np.arange(self.rows)[:, None] * frequencies
        if self.dynamic_rows:
            ids = self.position_input()
            wide = self.node("Unsqueeze", [self.cast(ids, FLOAT), self.ints(1)], (FLOAT, (self.rows, 1)))
            angles = self.binary("Mul", wide, self.store(frequencies.astype(np.float32)))
            cos, sin = (self.cast(self.same(op, angles), self.dtype) for op in ("Cos", "Sin"))
        else:
            cos, sin = (self.store(f(positions).astype(numpy_type(self.dtype))) for f in (np.cos, np.sin))
        if self.has("RotaryEmbedding") and not self.dynamic_rows and self.chance(0.4):
            caches = [
                self.node(
                    "Expand",
                    [angle, self.ints(self.batch, self.rows, half)],
                    (self.dtype, (self.batch, self.rows, half)),
                )
                if self.dynamic_batch is False
                else None
                for angle in (cos, sin)
            ]
            if None not in caches:
                return [self.same("RotaryEmbedding", x, *caches) for x in tensors]
        spelling = self.rng.choice((self.rotated_half, self.rotated_parts))
        return [spelling(x, cos, sin) for x in tensors]

    def position_input(self) -> T:
        known = [t for t in self.scopes[0].tensors if t.name == "positions"]
        return known[0] if known else self.input("positions", INT64, [self.row_dim()], np.arange(self.rows))

    def halves(self, x: T) -> tuple[T, T]:
        half = x.width // 2
        if self.chance(0.5):
            attrs = {"num_outputs": 2} if self.opset >= 18 else {}
            first, second = self.node("Split", [x], *[(x.dtype, (*x.shape[:-1], half))] * 2, axis=-1, **attrs)
            return first, second
        return self.slice(x, 3, 0, half), self.slice(x, 3, half, x.width)

    def rotated_half(self, x: T, cos: T, sin: T) -> T:
        cos, sin = (self.concat(1, angle, angle) for angle in (cos, sin))
        first, second = self.halves(x)
        turned = self.concat(3, self.same("Neg", second), first)
        return self.binary("Add", self.binary("Mul", x, cos), self.binary("Mul", turned, sin))

    def rotated_parts(self, x: T, cos: T, sin: T) -> T:
        first, second = self.halves(x)
        minus = self.binary("Sub", self.binary("Mul", first, cos), self.binary("Mul", second, sin))
        plus = self.binary("Add", self.binary("Mul", second, cos), self.binary("Mul", first, sin))
        return self.concat(3, minus, plus)

    def repeated(self, x: T, groups: int) -> T:
        """Each head for its group of query heads."""
        batch, heads, rows, size = x.shape
        if groups == 1 or heads == 1:
            return x
        if self.dynamic_batch or self.dynamic_rows:
            index = self.store(np.repeat(np.arange(heads), groups))
            made: T = self.node("Gather", [x, index], (x.dtype, (batch, heads * groups, rows, size)), axis=1)
            return made
        raised = self.node("Unsqueeze", [x, self.ints(2)], (x.dtype, (batch, heads, 1, rows, size)))
        wide = (batch, heads, groups, rows, size)
        if self.chance(0.5):
            widened = self.node("Expand", [raised, self.ints(*wide)], (x.dtype, wide))
        else:
            widened = self.node("Tile", [raised, self.ints(1, 1, groups, 1, 1)], (x.dtype, wide))
        return self.reshape(widened, batch, heads * groups, rows, size)

    def spelled_attention(self, q: T, k: T, v: T, groups: int) -> T:
        k, v = self.repeated(k, groups), self.repeated(v, groups)
        scale = self.scalar(q.width**-0.5)
        where = self.rng.choice(("q", "k", "logits", "div", "none"))
        if where in "qk":
            q, k = (self.binary("Mul", x, scale) if where == name else x for name, x in (("q", q), ("k", k)))
        logits = self.matmul(q, self.transpose(k, 0, 1, 3, 2))
        if where == "logits":
            logits = self.binary("Mul", *self.rng.sample([logits, scale], 2))
        elif where == "div":
            logits = self.binary("Div", logits, self.scalar(q.width**0.5))
        wide = self.chance(0.3)
        logits = self.masked(self.cast(logits, FLOAT) if wide else logits)
        probs = self.cast(self.softmax(logits), q.dtype)
        return self.matmul(probs, v)

    def masked(self, logits: T) -> T:
        kind = self.rng.choice(("none", "constant", "where", "added", "selected"))
        keys = logits.width
        if keys != self.rows and kind != "constant":
            kind = "none"
        lowest = -1e4 if logits.dtype == HALF else MASKED
        if kind == "none" or (kind == "constant" and self.dynamic_rows):
            return logits
        if kind == "constant":
            shape = self.rng.choice(((self.rows, keys), (1, 1, self.rows, keys), (1, 1, 1, keys)))
            hidden = self.values.random(shape) < 0.3
            hidden[..., 0] = False
            mask = self.store(np.where(hidden, lowest, 0).astype(numpy_type(logits.dtype)))
            return self.binary("Add", *self.rng.sample([logits, mask], 2))
        valid = self.valid_keys()
        low = self.scalar(lowest, logits.dtype)
        if kind == "selected":
            made: T = self.node("Where", [valid, logits, low], (logits.dtype, logits.shape))
            return made
        zero = self.scalar(0.0, logits.dtype)
        mask = self.node("Where", [valid, zero, low], (logits.dtype, valid.shape))
        return self.binary("Add", logits, mask)

    def valid_keys(self) -> T:
        """Bool [batch, 1, 1, rows], made of an input."""
        known = [t for t in self.scopes[0].tensors if t.name == "valid"]
        values = self.values.random((self.batch, self.rows)) < 0.7
        values[:, 0] = True
        valid = known[0] if known else self.input("valid", BOOL, [self.batch_dim(), self.row_dim()], values)
        made: T = self.node("Unsqueeze", [valid, self.ints(1, 2)], (BOOL, (self.batch, 1, 1, self.rows)))
        return made

    def softmax(self, x: T) -> T:
        if self.chance(0.7):
            return self.same("Softmax", x, axis=self.rng.choice((-1, len(x.shape) - 1)))
        shifted = self.binary("Sub", x, self.reduce("ReduceMax", x))
        exp = self.same("Exp", shifted)
        return self.binary("Div", exp, self.reduce("ReduceSum", exp))

    def attention_operator(self, q: T, k: T, v: T) -> T:
        inputs: list[T | None] = [q, k, v]
        if not (self.dynamic_batch or self.dynamic_rows) and self.chance(0.5):
            inputs.append(self.valid_keys_square())
        attrs = {"scale": float(q.width**-0.5)} if self.chance(0.5) else {}
        made: T = self.node("Attention", inputs, (q.dtype, q.shape), **attrs)
        return made

    def valid_keys_square(self) -> T:
        valid = self.valid_keys()
        shape = (self.batch, 1, self.rows, self.rows)
        made: T = self.node("Expand", [valid, self.ints(*shape)], (BOOL, shape))
        return made

    # Cameras

    def views(self, x: T) -> T:
        """One network on each of several images, whose results stand side by side and are averaged."""
        if not self.takes("Conv", x.dtype) or self.dynamic_batch:
            return self.elementwise(x)
        count, width = self.rng.choice((1, 2, 3)), self.rng.choice((4, 8))
        images = self.values.standard_normal((self.batch, count, 3, 4, 4)).astype(numpy_type(x.dtype))
        seen = self.input(f"images{len(self.inputs)}", x.dtype, images.shape, images)
        own = self.chance(0.15)
        weights: list[T] = []
        rows = [self.view(seen, index, width, weights if not own or index else []) for index in range(count)]
        joined = self.concat(1, *rows)
        axes = {"axes": [1]} if self.opset < 18 else {}
        inputs = [joined] if axes else [joined, self.ints(1)]
        mean = self.node("ReduceMean", inputs, (x.dtype, (self.batch, 1, width)), keepdims=1, **axes)
        return self.binary("Add", x, self.matmul(mean, self.weight(width, x.width)))

    def view(self, images: T, index: int, width: int, weights: list[T]) -> T:
        """[batch, 4, width] of one image; `weights` are those of the views before, or are made."""
        if self.batch_first:
            single = self.slice(images, 1, index, index + 1)
            made = (images.dtype, (self.batch, 3, 4, 4))
            image = self.node("Squeeze", [single, self.ints(1)], made)
        else:
            place = self.store(np.asarray(index))
            image = self.node("Gather", [images, place], (images.dtype, (self.batch, 3, 4, 4)), axis=1)
        if not weights:
            weights += [self.weight(width, 3, 2, 2, scale=0.3), self.weight(width, scale=0.1)]
            weights += [self.weight(width, scale=1.0), self.weight(width, width)]
        shape = (self.batch, width, 2, 2)
        patches = self.node("Conv", [image, *weights[:2]], (image.dtype, shape), strides=[2, 2])
        rows = self.transpose(self.reshape(patches, self.batch, width, 4, static=True), 0, 2, 1)
        normed = self.same("LayerNormalization", rows, weights[2], epsilon=1e-5)
        return self.binary("Add", rows, self.matmul(normed, weights[3]))
