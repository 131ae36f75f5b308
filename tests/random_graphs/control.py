"""If, Loop and Scan, whose bodies hold blocks and read what lies around them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace

import numpy as np
import onnx
from onnx import helper

from random_graphs.arithmetic import Arithmetic
from random_graphs.attention import Attention
from random_graphs.core import (
    BOOL,
    FLOAT,
    INT64,
    Scope,
    T,
)


class Control(Attention, Arithmetic):
    @contextmanager
    def body(self) -> Iterator[Scope]:
        self.scopes.append(Scope())
        yield self.scopes[-1]
        self.scopes.pop()

    def inside(self, x: T, depth: int) -> T:
        """One or two blocks that keep type and shape."""
        start = x
        for _ in range(self.rng.choice((1, 1, 2))):
            x = self.block(x, depth + 1)
        if x.width != start.width:
            with self.typed(x):
                x = self.by_matmul(x, start.width)
        return self.same("Tanh", x) if self.takes("Tanh", x.dtype) else self.wide("Tanh", x)

    def graph(
        self, scope: Scope, inputs: Sequence[onnx.ValueInfoProto], outputs: Sequence[onnx.ValueInfoProto]
    ) -> onnx.GraphProto:
        return helper.make_graph(scope.nodes, "body", inputs, outputs, scope.initializers)

    def value(self, tensor: T, *, shaped: bool = True) -> onnx.ValueInfoProto:
        shape: Sequence[int | str | None] = tensor.shape
        if self.dynamic_batch or self.dynamic_rows:
            shape = [None] * len(tensor.shape) if tensor.shape else []
        return helper.make_tensor_value_info(tensor.name, tensor.dtype, shape if shaped else None)

    def condition(self) -> T:
        if self.chance(0.2):
            return self.store(np.asarray(self.chance(0.5)))
        name = f"flag{len(self.inputs)}"
        return self.input(name, BOOL, [], np.asarray(self.chance(0.5)))

    def if_(self, x: T, depth: int) -> T:
        condition = self.condition()
        branches = []
        begun = self.rng.choice((None, None, None, self.linears_apart, self.attention_apart))
        finish = None if begun is None else begun(x)
        for _ in range(2):
            with self.body() as scope:
                if finish is not None and self.chance(0.7):
                    made = finish()
                else:
                    made = self.same("Identity", x) if self.chance(0.2) else self.inside(x, depth)
                branches.append(self.graph(scope, [], [self.value(made, shaped=self.chance(0.5))]))
        if self.chance(0.5):
            _call_alike(*branches)
        result: T = self.node(
            "If", [condition], (x.dtype, x.shape), then_branch=branches[0], else_branch=branches[1]
        )
        return result

    def linears_apart(self, x: T) -> Callable[[], T]:
        """Linears whose biases a body adds."""
        products = [self.by_matmul(x, x.width) for _ in range(2)]
        return lambda: self.binary("Add", self.rng.choice(products), self.weight(x.width, scale=0.1))

    def attention_apart(self, x: T) -> Callable[[], T]:
        """Attention of which a body holds the second half."""
        heads, size = self.rng.choice((1, 2)), self.rng.choice((2, 4))
        groups = self.rng.choice((1, 2))
        query = self.heads(self.linear(x, heads * groups * size), heads * groups)
        keys = self.repeated(self.heads(self.linear(x, heads * size), heads), groups)
        if keys.shape[1] != query.shape[1]:
            query = self.heads(self.linear(x, size), 1)
        logits = self.matmul(query, self.transpose(keys, 0, 1, 3, 2))
        within = self.rng.choice(("softmax", "product"))
        probs = self.softmax(logits) if within == "product" else None

        def finish() -> T:
            mixed = self.matmul(self.softmax(logits) if probs is None else probs, keys)
            width = mixed.shape[1] * mixed.shape[3]
            return self.by_matmul(
                self.reshape(self.transpose(mixed, 0, 2, 1, 3), *x.shape[:2], width), x.width
            )

        return finish

    def loop(self, x: T, depth: int) -> T:
        return self.looped(x, lambda carried: self.inside(carried, depth))

    def flow(self, x: T, depth: int) -> T:
        """x += dt * v(x, t), as a policy denoises; v may attend to keys and values from outside."""
        dt = self.rng.choice((-0.1, 0.25))
        before = list(self.prefixes)
        if self.chance(0.5):
            heads, size = self.rng.choice((1, 2)), self.rng.choice((2, 4))
            made = [self.heads(self.linear(x, heads * size), heads) for _ in range(2)]
            self.prefixes.append((made[0], made[1]))

        def step(carried: T) -> T:
            inner = self.modulated(carried) if self.chance(0.5) else carried
            velocity = self.inside(inner, depth)
            moved = self.binary("Mul", *self.rng.sample([velocity, self.scalar(dt, x.dtype)], 2))
            return self.binary("Add", *self.rng.sample([carried, moved], 2))

        result = self.looped(x, step)
        self.prefixes = before
        return result

    def modulated(self, x: T) -> T:
        """A norm whose scale, shift and gate follow from the number of the step."""
        if self.steps is None:
            return x
        time = self.cast(self.steps, FLOAT)
        time = self.binary("Add", self.binary("Mul", time, self.scalar(-0.1, FLOAT)), self.scalar(1.0, FLOAT))
        angles = self.binary("Mul", time, self.store(np.float32([[1, 4, 20, 100]])))
        waves = self.cast(self.concat(1, self.same("Sin", angles), self.same("Cos", angles)), x.dtype)
        parts = self.rng.choice((1, 2, 3))
        made = self.matmul(
            self.activation(self.matmul(waves, self.weight(8, 8))), self.weight(8, parts * x.width)
        )
        wide = (x.dtype, (1, 1, parts * x.width))
        raised = self.node("Unsqueeze", [made, self.ints(1)], wide)
        pieces = [self.slice(raised, 2, i * x.width, (i + 1) * x.width) for i in range(parts)]
        scaled = self.binary("Mul", self.rms(x), self.binary("Add", pieces[0], self.scalar(1.0)))
        if parts > 1:
            scaled = self.binary("Add", scaled, pieces[1])
        return self.binary("Add", x, self.binary("Mul", scaled, pieces[2])) if parts > 2 else scaled

    def looped(self, x: T, step: Callable[[T], T]) -> T:
        """A Loop that carries the stream: its count is a constant, an input, or found by the body."""
        counted = self.rng.choice(("constant", "constant", "input", "body"))
        steps = self.rng.choice((1, 2, 3))
        trips = None
        if counted == "constant":
            trips = self.store(np.asarray(steps, np.int64))
        elif counted == "input":
            trips = self.input(f"steps{len(self.inputs)}", INT64, [], np.asarray(steps, np.int64))
        going = None if counted != "body" and self.chance(0.4) else self.store(np.asarray(True))
        start = self.store(np.asarray(0, np.int64)) if counted == "body" else None
        with self.body() as scope:
            index, ongoing = T(self.new_name(), INT64, ()), T(self.new_name(), BOOL, ())
            carried = replace(x, name=self.new_name())
            given = [index, ongoing, carried]
            scope.tensors.append(carried)
            counter = None
            if start is not None:
                counter = T(self.new_name(), INT64, ())
                given.append(counter)
            before, self.steps = self.steps, self.rng.choice((index, counter or index))
            made = step(carried)
            self.steps = before
            left = [made]
            if counter is not None:
                after = self.node("Add", [counter, self.store(np.asarray(1, np.int64))], (INT64, ()))
                still = self.node("Less", [after, self.store(np.asarray(steps, np.int64))], (BOOL, ()))
                left.append(after)
            else:
                still = self.same("Identity", ongoing)
            if self.chance(0.3):
                left.append(self.rng.choice((self.same("Neg", made), made, carried)))
                scanned = True
            else:
                scanned = False
            body = self.graph(scope, [self.value(t) for t in given], [self.value(t) for t in (still, *left)])
        made_types = [(x.dtype, x.shape)]
        if start is not None:
            made_types.append((INT64, ()))
        if scanned:
            made_types.append((x.dtype, (steps, *x.shape)))
        outputs = self.node("Loop", [trips, going, x, *([start] if start else [])], *made_types, body=body)
        results: list[T] = outputs if isinstance(outputs, list) else [outputs]
        if scanned and self.chance(0.5):
            total = self.node("ReduceSum", [results[-1], self.ints(0)], (x.dtype, x.shape), keepdims=0)
            return self.binary("Add", results[0], total)
        return results[0]

    def scan(self, x: T, depth: int) -> T:
        """Over the rows, with a state of its own."""
        state = self.weight(1, x.width, scale=0.1)
        with self.body() as scope:
            held, row = T(self.new_name(), x.dtype, (1, x.width)), T(self.new_name(), x.dtype, (1, x.width))
            mixed = self.binary("Add", self.matmul(held, self.weight(x.width, x.width)), row)
            after = self.wide("Tanh", mixed)
            if self.chance(0.5):
                after = self.binary("Mul", after, self.weight(x.width, scale=1.0))
            out = row if self.chance(0.2) else self.same("Identity", after)
            infos = [self.value_exact(t) for t in (held, row)]
            body = self.graph(scope, infos, [self.value_exact(t) for t in (after, out)])
        first = self.slice(x, 0, 0, 1)
        turned = self.transpose(first, 1, 0, 2)
        _, seen = self.node(
            "Scan",
            [state, turned],
            (x.dtype, (1, x.width)),
            (x.dtype, turned.shape),
            body=body,
            num_scan_inputs=1,
        )
        return self.binary("Add", x, self.transpose(seen, 1, 0, 2))

    def value_exact(self, tensor: T) -> onnx.ValueInfoProto:
        return helper.make_tensor_value_info(tensor.name, tensor.dtype, tensor.shape)


def _call_alike(first: onnx.GraphProto, second: onnx.GraphProto) -> None:
    """Give what one body makes the names of what its sibling makes, which ONNX allows."""
    names = [[n for node in body.node for n in node.output] for body in (first, second)]
    new = dict(zip(names[1], names[0], strict=False))

    def rename(body: onnx.GraphProto) -> None:
        for value in body.output:
            value.name = new.get(value.name, value.name)
        for node in body.node:
            node.input[:] = [new.get(name, name) for name in node.input]
            node.output[:] = [new.get(name, name) for name in node.output]
            for attribute in node.attribute:
                if attribute.HasField("g"):
                    rename(attribute.g)

    rename(second)
