"""Small random models as plain data: a few steps, which print as an `nn.Module`.

A step is a kind of op, a number that picks what it reads, and one that picks its variant; any list
of steps is a model, so that one whose plan differs can be shrunk by leaving steps out. Values are
images (C, H, W), sequences (T, D) or vectors (D), each behind a batch that may be folded: `rows` of
it belong to a sample. What a step reads is brought into its shape by a movement of data.

    >>> print(Program(0, (Step("conv", 0, 0),)).source())  # doctest: +SKIP
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from hypothesis import strategies as st

STARTS = ("4x6x6", "3x5x7", "6x8", "5:int", "6x4x4", "12")
PLANS = (
    *("tp=2", "tp=2:channel", "tp=2:batch", "tp=2:spatial", "dp=2", "pp=2,mb=1", "pp=2,mb=2"),
    *("tp=3", "tp=3:channel", "tp=3:batch", "tp=3:spatial", "dp=3", "pp=3,mb=1", "pp=3,mb=2"),
)
VOCABULARY = 11
_MOST_NUMEL = 400  # of a sample
_HEADER = """import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint


class Model(nn.Module):
    def __init__(self):
        super().__init__()
"""


@dataclass(frozen=True)
class Step:
    """A kind of op, the value that it reads (0: the latest), and the choices that it leaves."""

    kind: str
    pick: int = 0
    variant: int = 0


@dataclass(frozen=True)
class Program:
    """A model, the batch that it gets, and the plans under which it is verified.

    Attributes:
        start: which of STARTS the first input is.
        has_head: a classifier ends it; otherwise the last values that nothing reads are returned.
    """

    start: int
    steps: tuple[Step, ...]
    has_head: bool = False
    batch: int = 6
    plans: tuple[str, ...] = ("tp=2",)

    @property
    def inputs(self) -> str:
        """The sizes of the inputs, as verify takes them."""
        return ",".join(_written(self).inputs)

    def source(self) -> str:
        """Return a Python file that holds the class `Model`."""
        writer = _written(self)
        return "\n".join(
            [
                _HEADER + "\n".join(f"        {line}" for line in writer.parts),
                "",
                f"    def forward(self, {', '.join(writer.arguments)}):",
                *(f"        {line}" for line in writer.lines),
                "",
            ]
        )


@dataclass
class Value:
    """A variable of the forward.

    Attributes:
        shape: of a sample, without the batch.
        rows: of the batch dim that belong to a sample.
        base: the value whose memory it shares.
        may_change: an op in place would break no backward pass.
        is_trained: a parameter has a gradient through it.
        is_read: something depends on it.
    """

    name: str
    shape: tuple[int, ...]
    rows: int = 1
    base: Value | None = None
    may_change: bool = False
    is_trained: bool = False
    is_read: bool = False

    @property
    def root(self) -> Value:
        """The value that made the memory."""
        return self.base.root if self.base else self


@dataclass
class Writer:
    """Writes a program; each kind of step is a function below that takes it."""

    inputs: list[str] = field(default_factory=list)
    arguments: list[str] = field(default_factory=list)
    parts: list[str] = field(default_factory=list)
    lines: list[str] = field(default_factory=list)
    values: list[Value] = field(default_factory=list)
    outputs: list[Value] = field(default_factory=list)
    pick: int = 0
    variant: int = 0

    def one_of(self, *options: Any) -> Any:
        """Choose by the step's variant."""
        self.variant, i = divmod(self.variant, len(options))
        return options[i]

    def part(self, text: str) -> str:
        """Write a part of the model, and return how the forward calls it: `f` if it is trained."""
        trained = not text.startswith("nn.Dropout") and "affine=False" not in text
        name = f"{'f' if trained else 'g'}{len(self.parts)}"
        self.parts.append(f"self.{name} = {text}")
        return f"self.{name}"

    def buffer(self, text: str) -> str:
        """Write a buffer, and return it."""
        name = f"b{len(self.parts)}"
        self.parts.append(f'self.register_buffer("{name}", {text})')
        return f"self.{name}"

    def add_input(self, text: str) -> Value:
        """Let the model have another input."""
        self.inputs.append(text)
        self.arguments.append(f"i{len(self.inputs) - 1}")
        sizes = text.removesuffix(":int").split("x")
        return Value(self.arguments[-1], tuple(map(int, sizes)))

    def put(
        self,
        text: str,
        shape: Sequence[int],
        rows: int = 1,
        *,
        base: Value | None = None,
        may_change: bool = False,
    ) -> Value:
        """Write `x3 = text`."""
        read = [x for x in self.values if re.search(rf"\b{x.name}\b", text)]
        for x in read:
            x.is_read = True
            x.may_change &= x is base  # the backward pass may need it
        value = Value(f"x{len(self.lines)}", tuple(shape), rows, base, may_change)
        value.is_trained = "self.f" in text or any(x.is_trained for x in read)
        self.lines.append(f"{value.name} = {text}")
        self.values.append(value)
        return value

    def view(self, x: Value, text: str, shape: Sequence[int], rows: int | None = None) -> Value:
        """Write a movement of data; `{x}` stands for the value."""
        rows = rows or x.rows
        return self.put(text.format(x=x.name), shape, rows, base=x, may_change=x.may_change)

    def like(self, x: Value, text: str, *, may_change: bool = False) -> Value:
        """Write an op that keeps the shape; `{x}` stands for the value."""
        return self.put(text.format(x=x.name), x.shape, x.rows, may_change=may_change)

    def value(self, num_dims: int | None = None) -> Value:
        """Return the value that the step picks, brought to `num_dims` dims."""
        fitting = [x for x in self.values[::-1] if num_dims in (None, len(x.shape))]
        older = bool(self.pick and fitting)
        x = fitting[min(self.pick, len(fitting) - 1)] if older else self.values[-1]
        return x if num_dims is None else _TO[num_dims](self, x)

    def owned(self, x: Value) -> Value:
        """Return a value that may be changed in place."""
        if all(y.may_change for y in self.values if y.root is x.root):
            return x
        return self.like(x, "{x}.clone()", may_change=True)


def _written(program: Program) -> Writer:
    w = Writer()
    first = w.add_input(STARTS[program.start % len(STARTS)])
    if w.inputs[0].endswith(":int"):
        _embed(w, first)
    else:
        w.values.append(first)
    for step in program.steps:
        w.pick, w.variant = step.pick, step.variant
        KINDS[step.kind](w)
        x = w.values[-1]
        if math.prod(x.shape) > _MOST_NUMEL:  # large ones only take time
            _shrink(w, x)
    w.pick = w.variant = 0
    unread = [x for x in w.values if not x.is_read and x.name not in w.arguments][-3:]
    if program.has_head or not any(x.is_trained for x in [*w.outputs, *unread]):
        x = w.value(1)
        unread = [w.put(f"{w.part(f'nn.Linear({x.shape[0]}, 5)')}({x.name})", (5,), x.rows)]
    outputs = list(dict.fromkeys(x.name for x in [*w.outputs, *unread]))
    w.lines.append(f"return {', '.join(outputs)}")
    return w


def _shrink(w: Writer, x: Value) -> None:
    if len(x.shape) == 3:
        c = x.shape[0]
        w.put(f"F.adaptive_avg_pool2d({x.name}, 3)", (c, 3, 3), x.rows)
        x = w.values[-1]
        if c > 24:
            w.view(x, "{x}[:, :24]", (24, 3, 3))
    else:
        n = x.shape[-1]
        w.view(x, f"{{x}}[..., :{max(1, n // 4)}]", (*x.shape[:-1], max(1, n // 4)))


# Movements of data that bring a value to a number of dims.


def _to_image(w: Writer, x: Value) -> Value:
    if len(x.shape) == 3:
        return x
    if len(x.shape) == 1:
        (d,) = x.shape
        if d % 4 == 0:
            return w.view(x, f"{{x}}.unflatten(1, ({d // 4}, 2, 2))", (d // 4, 2, 2))
        return w.view(x, "{x}[:, :, None, None].expand(-1, -1, 2, 2)", (d, 2, 2)) and w.like(
            w.values[-1], "{x}.contiguous()"
        )
    t, d = x.shape
    k = 2 if t % 2 == 0 else 1
    how = w.one_of(
        (f"{{x}}.transpose(1, 2).unflatten(2, ({t // k}, {k}))", (d, t // k, k)),
        (f"{{x}}.transpose(1, 2).reshape(-1, {d}, {t // k}, {k})", (d, t // k, k)),
        ("{x}.unsqueeze(1)", (1, t, d)),
    )
    return w.view(x, *how)


def _to_sequence(w: Writer, x: Value) -> Value:
    if len(x.shape) == 2:
        return x
    if len(x.shape) == 1:
        (d,) = x.shape
        k = 2 if d % 2 == 0 else 1
        how = w.one_of(
            (f"{{x}}.view(-1, {k}, {d // k})", (k, d // k)),
            ("{x}.unsqueeze(1)", (1, d)),
        )
        return w.view(x, *(how if x.base is None else (how[0].replace("view", "reshape"), how[1])))
    c, h, wide = x.shape
    how = w.one_of(
        ("{x}.flatten(2).transpose(1, 2)", (h * wide, c)),
        ("{x}.permute(0, 2, 3, 1).flatten(1, 2)", (h * wide, c)),
        ("{x}.flatten(2)", (c, h * wide)),
        ("{x}.mean(2)", (c, wide)),
        ("{x}.permute(0, 3, 1, 2).flatten(2)", (wide, c * h)),
    )
    if "mean" in how[0]:
        return w.put(how[0].format(x=x.name), how[1], x.rows)
    return w.view(x, *how)


def _to_vector(w: Writer, x: Value) -> Value:
    if len(x.shape) == 1:
        return x
    whole = (math.prod(x.shape),)
    ways: tuple[tuple[str, tuple[int, ...]], ...]
    if len(x.shape) == 3:
        ways = (
            ("{x}.mean((2, 3))", x.shape[:1]),
            ("{x}.flatten(1)", whole),
            ("{x}.amax((2, 3))", x.shape[:1]),
            ("{x}.reshape({x}.shape[0], -1)", whole),
            ("F.adaptive_avg_pool2d({x}, 1).flatten(1)", x.shape[:1]),
            ("{x}.sum(3).mean(2)", x.shape[:1]),
        )
    else:
        ways = (
            ("{x}.mean(1)", x.shape[1:]),
            ("{x}[:, -1]", x.shape[1:]),
            ("{x}.flatten(1)", whole),
            ("{x}.mean(2)", x.shape[:1]),
            ("{x}.select(1, 0)", x.shape[1:]),
            ("{x}.amax(1)", x.shape[1:]),
        )
    text, shape = w.one_of(*ways)
    return w.put(text.format(x=x.name), shape, x.rows)


_TO: dict[int, Callable[[Writer, Value], Value]] = {1: _to_vector, 2: _to_sequence, 3: _to_image}


# The kinds of steps.


def conv(w: Writer) -> None:
    x = w.value(3)
    c, h, wide = x.shape
    if w.one_of(False, False, False, True):
        out, groups = w.one_of(4, 3, 6), 1
        f = w.part(f"nn.ConvTranspose2d({c}, {out}, 2, stride=2)")
        w.put(f"{f}({x.name})", (out, 2 * h, 2 * wide), x.rows, may_change=True)
        return
    k = w.one_of(3, 1)
    groups = w.one_of(1, 1, c, 2 if c % 2 == 0 else 1)
    out = w.one_of(4, 6, 3, 8) if groups == 1 else w.one_of(c, 2 * c)
    stride = w.one_of(1, 1, 2)
    more = w.one_of("", "", ", bias=False", ', padding_mode="circular"', ', padding_mode="reflect"')
    if "mode" in more and (k == 1 or min(h, wide) < 3):
        more = ""
    f = w.part(
        f"nn.Conv2d({c}, {out}, {k}"
        + (", padding=1" if k == 3 else "")
        + (f", stride={stride}" if stride > 1 else "")
        + (f", groups={groups}" if groups > 1 else "")
        + f"{more})"
    )
    sizes = [(n - 1) // stride + 1 for n in (h, wide)]
    w.put(f"{f}({x.name})", (out, *sizes), x.rows, may_change=True)


def conv1d(w: Writer) -> None:
    x = w.value(2)
    (c, t), out = x.shape, w.one_of(4, 5, 8)
    more = w.one_of("", ", padding_mode='replicate'", ", bias=False")
    f = w.part(f"nn.Conv1d({c}, {out}, 3, padding=1{more})")
    w.put(f"{f}({x.name})", (out, t), x.rows, may_change=True)


def linear(w: Writer) -> None:
    x = w.value(w.one_of(None, 1, 2))
    out = w.one_of(8, 6, 5, 12)
    f = w.part(f"nn.Linear({x.shape[-1]}, {out}{w.one_of('', ', bias=False')})")
    w.put(f"{f}({x.name})", (*x.shape[:-1], out), x.rows, may_change=True)


def batch_norm(w: Writer) -> None:
    x = w.value(w.one_of(3, 3, 2, 1))
    more = w.one_of(
        "", "", ", momentum=0.3", ", affine=False", ", track_running_stats=False", ", eps=1e-3"
    )
    f = w.part(f"nn.BatchNorm{2 if len(x.shape) == 3 else 1}d({x.shape[0]}{more})")
    w.like(x, f"{f}({{x}})", may_change=True)


def norm(w: Writer) -> None:
    kind = w.one_of("layer", "group", "instance", "rms", "normalize", "channels", "image")
    x = w.value(3 if kind in ("group", "instance", "channels", "image") else None)
    c = x.shape[0]
    if kind == "group":
        groups = w.one_of(1, 2 if c % 2 == 0 else 1, c)
        if groups == c and math.prod(x.shape[1:]) == 1:
            groups = 1
        w.like(x, f"{w.part(f'nn.GroupNorm({groups}, {c})')}({{x}})", may_change=True)
    elif kind == "instance" and math.prod(x.shape[1:]) > 1:
        w.like(x, f"{w.part(f'nn.InstanceNorm2d({c}, affine=True)')}({{x}})", may_change=True)
    elif kind == "channels":
        f = w.part(f"nn.LayerNorm({c})")
        w.like(x, f"{f}({{x}}.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)")
    elif kind == "normalize":
        w.like(x, f"F.normalize({{x}}, dim={w.one_of(1, -1)})")
    elif kind == "image":
        w.like(x, f"{w.part(f'nn.LayerNorm({list(x.shape)})')}({{x}})", may_change=True)
    else:
        name = "RMSNorm" if kind == "rms" else "LayerNorm"
        w.like(x, f"{w.part(f'nn.{name}({x.shape[-1]})')}({{x}})", may_change=True)


def pool(w: Writer) -> None:
    x = w.value(3)
    c, h, wide = x.shape
    halves = (c, -(-h // 2), -(-wide // 2))
    if min(h, wide) < 3:
        w.put(f"F.adaptive_avg_pool2d({x.name}, 1)", (c, 1, 1), x.rows)
        return
    text, shape = w.one_of(
        ("F.max_pool2d({x}, 3, stride=2, padding=1)", halves),
        ("F.avg_pool2d({x}, 2)", (c, h // 2, wide // 2)),
        ("F.max_pool2d({x}, 2, ceil_mode=True)", halves),
        ("F.adaptive_avg_pool2d({x}, (2, 3))", (c, 2, 3)),
        ("F.avg_pool2d({x}, 3, stride=1, padding=1, count_include_pad=False)", x.shape),
        ("F.adaptive_max_pool2d({x}, 2)", (c, 2, 2)),
        ("F.lp_pool2d({x} + 3, 2, 2)", (c, h // 2, wide // 2)),
    )
    w.put(text.format(x=x.name), shape, x.rows)


def activation(w: Writer) -> None:
    x = w.value()
    last = x.shape[-1]
    text = w.one_of(
        *("{x}.relu()", "F.gelu({x})", "{x}.sigmoid()", "{x}.tanh()", "F.silu({x})"),
        *("{x}.softmax(-1)", "{x}.softmax(1)", "F.hardswish({x})", "F.leaky_relu({x}, 0.1)"),
        *("{x}.abs().clamp(max=2)", "F.log_softmax({x}, 1)", "F.elu({x})", "{x}.cumsum(1) / 4"),
        *("{x}.clamp(-1, 1) ** 2", "torch.where({x} > 0, {x}, 0.1 * {x})", "F.softplus({x})"),
    )
    if "cumsum" in text and w.one_of(True, False) and last % 2 == 0:
        w.put(f"F.glu({x.name}, -1)", (*x.shape[:-1], last // 2), x.rows)
    else:
        w.like(x, text)


def prelu(w: Writer) -> None:
    x = w.value(w.one_of(3, 2))
    w.like(x, f"{w.part(f'nn.PReLU({x.shape[0]})')}({{x}})")


def _other(w: Writer, x: Value, fits: Callable[[Value], bool]) -> Value | None:
    """Return another value that goes with `x`."""
    found = [y for y in w.values[::-1] if y is not x and y.rows == x.rows and fits(y)]
    return found[w.pick % len(found)] if found else None


def add(w: Writer) -> None:
    x = w.value()
    y = _other(w, x, lambda y: y.shape == x.shape)
    other = y.name if y else f"{x.name}.{w.one_of('flip(1)', 'tanh()', 'roll(1, -1)')}"
    how = w.one_of("{x} + {y}", "{x} * {y}.sigmoid()", "{x} - 0.5 * {y}", "torch.maximum({x}, {y})")
    w.like(x, how.replace("{y}", other), may_change=how == "{x} + {y}")


def cat(w: Writer) -> None:
    x = w.value()
    dim = w.one_of(0, 0, len(x.shape) - 1)
    rest = (x.shape[:dim], x.shape[dim + 1 :])

    def same(y: Value) -> bool:
        return len(y.shape) == len(x.shape) and (y.shape[:dim], y.shape[dim + 1 :]) == rest

    y = _other(w, x, same)
    size = x.shape[dim] + (y.shape[dim] if y else x.shape[dim])
    pair = [x.name, y.name if y else f"{x.name}.relu()"]
    shape = (*x.shape[:dim], size, *x.shape[dim + 1 :])
    if w.one_of(False, True):
        pair.reverse()
    w.put(f"torch.cat([{', '.join(pair)}], {dim + 1})", shape, x.rows, may_change=True)


def chunk(w: Writer) -> None:
    x = w.value()
    dim = w.one_of(0, 0, len(x.shape) - 1)
    n = x.shape[dim]
    if n < 2:
        return
    a = n // 2
    text, sizes = w.one_of(
        (f"{{x}}.chunk(2, {dim + 1})", (n - a, a)),
        (f"{{x}}.split([{a}, {n - a}], {dim + 1})", (a, n - a)),
        (f"{{x}}.split({n - a}, {dim + 1})", (n - a, a)),
    )
    names = [f"x{len(w.lines)}_{i}" for i in (0, 1)]
    w.lines.append(f"{', '.join(names)} = {text.format(x=x.name)}")
    for name, size in zip(names, sizes, strict=True):
        w.values.append(Value(name, (*x.shape[:dim], size, *x.shape[dim + 1 :]), x.rows))
    if w.one_of(False, True):
        w.values[-2:] = w.values[:-3:-1]
    if w.one_of(True, False):  # joined again in the other order
        text = f"torch.cat([{names[1]}, {names[0]}.tanh()], {dim + 1})"
        w.put(text, x.shape, x.rows, may_change=True)


def shuffle(w: Writer) -> None:
    x = w.value(w.one_of(3, 2))
    c, *rest = x.shape
    g = next((g for g in w.one_of((2, 3), (3, 2)) if c % g == 0), 1)
    size, own = ", ".join(map(str, rest)), x.name
    batch = w.one_of("-1", f"{own}.shape[0]")
    w.view(
        x,
        f"{{x}}.reshape({batch}, {g}, {c // g}, {size}).transpose(1, 2)"
        f".reshape({batch}, {c}, {size})",
        x.shape,
    )


def move(w: Writer) -> None:
    x = w.value(w.one_of(3, 2))
    n, last = x.shape[0], x.shape[-1]
    grown = (*x.shape[:-1], last + 2)
    text, shape = w.one_of(
        ("{x}.flip(-1)", x.shape),
        ("{x}.roll(1, 1)", x.shape),
        ("F.pad({x}, (1, 1))", grown),
        ("{x}.transpose(-1, -2)", (*x.shape[:-2], last, x.shape[-2])),
        ("{x}[..., ::2]", (*x.shape[:-1], -(-last // 2))),
        ("{x}.repeat_interleave(2, 1)", (2 * n, *x.shape[1:])),
        (f"{{x}}[:, {list(range(n))[::-1]}]", x.shape),
        ("torch.stack([{x}, {x}.tanh()], 2).flatten(1, 2)", (2 * n, *x.shape[1:])),
        (f"{{x}}.narrow(1, 0, {max(1, n - 1)})", (max(1, n - 1), *x.shape[1:])),
        (f"{{x}}.unbind(1)[{n - 1}]", x.shape[1:]),
        ("{x}.tril()", x.shape),
        ("F.pixel_shuffle({x}, 2)" if len(x.shape) == 3 and n % 4 == 0 else "{x}.flip(1)",
         (n // 4, 2 * x.shape[1], 2 * last) if len(x.shape) == 3 and n % 4 == 0 else x.shape),
        ("F.interpolate({x}, scale_factor=2)" if len(x.shape) == 3 else "{x}.roll(1, -1)",
         (n, 2 * x.shape[1], 2 * last) if len(x.shape) == 3 else x.shape),
    )  # fmt: skip
    w.put(text.format(x=x.name), tuple(shape), x.rows)


def fold(w: Writer) -> None:
    """Dims of a sample become rows of the batch."""
    x = w.value(w.one_of(3, 2))
    if len(x.shape) == 3:
        c, h, wide = x.shape
        g = 2 if c % 2 == 0 else c
        text, shape, k = w.one_of(
            (f"{{x}}.reshape(-1, {c // g}, {h}, {wide})", (c // g, h, wide), g),
            (f"{{x}}.reshape({{x}}.shape[0] * {g}, {c // g}, {h}, {wide})", (c // g, h, wide), g),
            (f"{{x}}.permute(0, 2, 3, 1).reshape(-1, {c})", (c,), h * wide),
            ("{x}.transpose(1, 2).flatten(0, 1)", (c, wide), h),
            (f"{{x}}.transpose(1, 2).reshape(-1, {c}, {wide})", (c, wide), h),
        )
    else:
        t, d = x.shape
        text, shape, k = w.one_of(
            (f"{{x}}.reshape(-1, {d})", (d,), t),
            ("{x}.flatten(0, 1)", (d,), t),
            ("{x}.flatten()[:, None]", (1,), t * d),
        )
    w.view(x, text, shape, x.rows * k)


def unfold(w: Writer) -> None:
    """Rows of a sample come back into its dims; where none are folded, the channels are."""
    folded = [x for x in w.values[::-1] if x.rows > 1]
    if not folded:
        x = w.value(2)
        t, d = x.shape
        f = w.part(f"nn.Linear({d}, {d})")
        text = w.one_of(
            f"{f}({{x}}.reshape(-1, {d})).view(-1, {t}, {d})",
            f"{f}({{x}}.flatten(0, 1)).unflatten(0, ({{x}}.shape[0], {t}))",
            f"{f}({{x}}.transpose(0, 1).reshape(-1, {d})).view({t}, -1, {d}).transpose(0, 1)",
        )
        w.like(x, text)
        return
    x = folded[min(w.pick, len(folded) - 1)]
    k, (n, *rest) = x.rows, x.shape
    sizes = "".join(f", {size}" for size in rest)
    if len(x.shape) == 3:
        w.view(x, f"{{x}}.reshape(-1, {k * n}{sizes})", (k * n, *rest), 1)
    elif len(x.shape) == 2:
        text = f"{{x}}.reshape(-1, {k}, {n}{sizes})"
        w.view(x, text + w.one_of("", ".transpose(1, 2)"), (k, n, *rest), 1)
        if w.lines[-1].endswith("transpose(1, 2)"):
            w.values[-1].shape = (n, k, *rest)
    else:
        text, shape = w.one_of(("", (k, n)), (".transpose(1, 2)", (n, k)), (".mean(1)", (n,)))
        w.put(f"{x.name}.reshape(-1, {k}, {n}){text}", shape)


def in_place(w: Writer) -> None:
    x = w.owned(w.value())
    half, name = max(1, x.shape[0] // 2), x.name
    kind = w.one_of("whole", "slice", "alias", "relu", "read", "index", "flat")
    change = w.one_of("mul_(0.5)", "add_(1)", "zero_()", "clamp_(-1, 1)", "neg_()")
    if kind == "alias":  # a view of it is read once it has changed
        y = w.view(x, f"{{x}}[:, :{half}]", (half, *x.shape[1:]))
        w.lines.append(f"{name}.{change}")
        w.like(x, f"{{x}} + {y.name}.mean(1, keepdim=True)", may_change=True)
    elif kind == "read":  # read, changed through a view, read again
        y = w.put(f"{name}.clone()", x.shape, x.rows)
        w.lines.append(f"{name}[:, :{half}].{change}")
        w.like(x, f"{{x}} + {y.name}.tanh()", may_change=True)
    elif kind == "index":
        w.lines.append(f"{name}[:, 0] = {w.one_of('0.5', f'{name}[:, -1].detach()')}")
        w.like(x, "{x} * 1")
    elif kind == "flat":
        w.lines.append(f"{name}.transpose(1, -1)[..., :{half}].{change}")
        w.like(x, "{x} * 1")
    else:
        text = {"whole": f"{name}.{change}", "slice": f"{name}[:, {half}:].{change}"}
        w.lines.append(text.get(kind, f"{name}.{w.one_of('relu_()', 'sigmoid_()', 'mul_(2)')}"))
        w.like(x, "{x} * 1" if kind != "relu" else "{x}.abs()")


def shared(w: Writer) -> None:
    """A part is used twice, or a weight."""
    x = w.value(w.one_of(3, 2, 2))
    n, last = x.shape[0], x.shape[-1]
    if len(x.shape) == 3:
        f = w.part(w.one_of(
            f"nn.Conv2d({n}, {n}, 3, padding=1)", f"nn.BatchNorm2d({n})", f"nn.Conv2d({n}, {n}, 1)"
        ))  # fmt: skip
    else:
        f = w.part(w.one_of(f"nn.Linear({last}, {last})", f"nn.LayerNorm({last})"))
    text = w.one_of(f"{f}({f}({{x}}).tanh())", f"{f}({{x}}) + {f}({{x}}.flip(1)).relu()")
    if "Linear" in w.parts[-1] and w.one_of(False, True):
        text = f"{f}({{x}}).tanh() @ {f}.weight"
    w.like(x, text)


def no_grad(w: Writer) -> None:
    x = w.value(w.one_of(3, 2))
    n, last = x.shape[0], x.shape[-1]
    f = w.part(f"nn.Conv2d({n}, {n}, 1)" if len(x.shape) == 3 else f"nn.Linear({last}, {last})")
    kind = w.one_of("gate", "bounds", "detach", "again", "target")
    name = f"y{len(w.lines)}"
    if kind == "bounds":
        w.lines += ["with torch.no_grad():", f"    {f}.weight.clamp_(-0.2, 0.2)"]
        w.like(x, f"{f}({{x}})", may_change=True)
    elif kind == "gate":
        w.lines += ["with torch.no_grad():", f"    {name} = {f}({x.name}).sigmoid()"]
        w.like(x, f"{{x}} * {name}")
    elif kind == "target":
        w.lines += ["with torch.no_grad():", f"    {name} = {x.name}.softmax(1)"]
        w.like(x, f"{f}({{x}}) - {name}")
    elif kind == "again":
        w.lines += ["with torch.no_grad():", f"    {name} = {x.name}.cos()"]
        w.lines += ["    with torch.enable_grad():", f"        {name}_2 = {f}({x.name}).sin()"]
        w.like(x, f"{{x}} * {name} + {name}_2")
    else:
        w.like(x, f"{{x}} + {f}({{x}}.detach())")
    x.may_change = False


def einsum(w: Writer) -> None:
    x = w.value(w.one_of(3, 2))
    n, last = x.shape[0], x.shape[-1]
    out = w.one_of(4, 6, 3)
    dims = "bchw" if len(x.shape) == 3 else "btd"
    i = w.one_of(1, len(dims) - 1)
    weight = w.part(f"nn.Parameter(torch.randn({x.shape[i - 1]}, {out}) * 0.3)")
    if w.one_of(True, True, False):
        made = dims[:i] + "o" + dims[i + 1 :]
        shape = (*x.shape[: i - 1], out, *x.shape[i:])
        w.put(f'torch.einsum("{dims},{dims[i]}o->{made}", {x.name}, {weight})', shape, x.rows)
    elif len(dims) == 3:
        y = w.put(f"{x.name} @ {w.part(f'nn.Parameter(torch.randn({last}, {last}) * 0.3)')}",
                  x.shape, x.rows)  # fmt: skip
        text = w.one_of(f'torch.einsum("bid,bjd->bij", {x.name}, {y.name})',
                        f"torch.bmm({x.name}, {y.name}.transpose(1, 2))",
                        f"{x.name} @ {y.name}.mT")  # fmt: skip
        w.put(text, (n, n), x.rows)
    else:
        text = f'torch.einsum("bchw,bdhw->bcd", {x.name}, {x.name}.tanh()) / {math.prod(x.shape)}'
        w.put(text, (n, n), x.rows)


def attention(w: Writer) -> None:
    x = w.value(2)
    t, d = x.shape
    if d % 2 or d > 16:
        x = w.put(f"{w.part(f'nn.Linear({d}, 8)')}({x.name})", (t, 8), x.rows)
        d = 8
    drop = w.one_of("", ", dropout=0.2")
    kind = w.one_of("module", "function", "layer", "gqa", "first")
    if kind == "module":
        f = w.part(f"nn.MultiheadAttention({d}, 2{drop}, batch_first=True)")
        w.like(x, f"{f}({{x}}, {{x}}, {{x}}{w.one_of('', ', need_weights=False')})[0]")
    elif kind == "layer":
        more = w.one_of("", ", norm_first=True", ", activation='gelu'")
        drop = drop or ", dropout=0.0"
        f = w.part(f"nn.TransformerEncoderLayer({d}, 2, 12{drop}, batch_first=True{more})")
        w.like(x, f"{f}({{x}})")
    elif kind == "first":  # the sequence comes first
        f = w.part(f"nn.MultiheadAttention({d}, 2{drop})")
        x = w.view(x, "{x}.transpose(0, 1)", x.shape)
        y = w.like(x, f"{f}({{x}}, {{x}}, {{x}})[0].transpose(0, 1)")
        w.values.remove(x)
        w.values[-1] = y
    else:
        few = 1 if kind == "gqa" else 2
        q = w.part(f"nn.Linear({d}, {d})")
        q = f"{q}({x.name}).unflatten(2, (2, {d // 2})).transpose(1, 2)"
        f = w.part(f"nn.Linear({d}, {few * d})")
        name = f"y{len(w.lines)}"
        w.lines += [
            f"{name} = {q}",
            f"{name}_k, {name}_v = {f}({x.name}).unflatten(2, ({2 * few}, {d // 2}))"
            ".transpose(1, 2).chunk(2, 1)",
        ]
        more = w.one_of("", ", is_causal=True")
        more += ", dropout_p=0.2 if self.training else 0.0" if drop else ""
        more += ", enable_gqa=True" if kind == "gqa" else ""
        text = f"F.scaled_dot_product_attention({name}, {name}_k, {name}_v{more})"
        x.may_change = False
        w.like(x, f"{text}.transpose(1, 2).flatten(2)")


def recurrent(w: Writer) -> None:
    x = w.value(2)
    (t, d), out = x.shape, w.one_of(5, 4, 6)
    kind = w.one_of("LSTM", "GRU", "RNN")
    layers, both = w.one_of(("", 1), (", 2", 2), (", 2, dropout=0.3", 2))[0], w.one_of(False, True)
    first = w.one_of(True, False)
    more = (", batch_first=True" if first else "") + (", bidirectional=True" if both else "")
    f = w.part(f"nn.{kind}({d}, {out}{layers}{more})")
    n = out * (1 + both)
    if w.one_of(True, True, False):
        ends = ("", "") if first else (".transpose(0, 1)", ".transpose(0, 1)")
        w.put(f"{f}({x.name}{ends[0]})[0]{ends[1]}", (t, n), x.rows)
    else:
        state = "[1][0][-1]" if kind == "LSTM" else "[1][-1]"
        w.put(f"{f}({x.name}{'' if first else '.transpose(0, 1)'}){state}", (out,), x.rows)


def dropout(w: Writer) -> None:
    kind = w.one_of("module", "function", "channels", "noise", "path", "uniform", "alpha")
    x = w.value(3 if kind == "channels" else None)
    ones = "".join(", 1" for _ in x.shape)
    text = {
        "module": "{f}({x})",
        "function": "F.dropout({x}, 0.3, self.training)",
        "channels": "F.dropout2d({x}, 0.3, self.training)",
        "noise": "{x} + 0.1 * torch.randn_like({x})",
        "path": f"{{x}} * (0.8 + torch.rand({{x}}.shape[0]{ones}, dtype={{x}}.dtype)).floor()",
        "uniform": "{x} * torch.rand({x}.shape, dtype={x}.dtype)",
        "alpha": "F.dropout({x}, 0.5, self.training) + {x}.relu()",
    }[kind]
    if "rand" in text:
        text += " if self.training else {x}"
    if kind == "module":
        text = text.replace("{f}", w.part(f"nn.Dropout({w.one_of(0.2, 0.5)})"))
    w.like(x, text)


def embedding(w: Writer) -> None:
    found = w.one_of("input", "input", "argmax")
    if found == "input" or len(w.values[-1].shape) < 2:
        _embed(w, w.add_input(w.one_of("5:int", "4:int")))
        return
    x = w.value(2)
    t, d = x.shape
    if d > VOCABULARY:
        return
    table = w.part(f"nn.Embedding({VOCABULARY}, {w.one_of(4, 6)})")
    size = int(w.parts[-1].split(", ")[-1].rstrip(")"))
    y = w.put(f"{table}({x.name}.argmax(-1))", (t, size), x.rows)
    w.put(f"torch.cat([{y.name}, {x.name}], 2)", (t, d + size), x.rows, may_change=True)


def _embed(w: Writer, ids: Value) -> None:
    size = w.one_of(6, 8)
    table = w.part(f"nn.Embedding({VOCABULARY}, {size}{w.one_of('', ', padding_idx=0')})")
    (t,) = ids.shape
    text = f"{table}({ids.name})"
    if w.one_of(False, True):
        text += f" + {w.part(f'nn.Parameter(torch.randn({t}, {size}) * 0.3)')}"
    y = w.put(text, (t, size), may_change=True)
    x = next((x for x in w.values[-2::-1] if x.rows == 1 and x.shape[-1:] == (size,)), None)
    if x is not None and len(x.shape) == 1:
        w.put(f"{x.name} + {y.name}.mean(1)", x.shape)


def buffer(w: Writer) -> None:
    x = w.value(w.one_of(3, 2))
    n = x.shape[0]
    kind = w.one_of("constant", "constant", "twice", "count", "mask", "average")
    ones = "".join(", 1" for _ in x.shape[1:])
    if kind == "average" and w.one_of(False, True):  # it mixes samples: refused under dp
        b = w.buffer(f"torch.zeros({n})")
        dims = "(0, 2, 3)" if len(x.shape) == 3 else "(0, 2)"
        w.lines.append(f"{b}.mul_(0.9).add_({x.name}.detach().mean({dims}), alpha=0.1)")
        text = f"{{x}} + {b}.view(-1{ones})"
    elif kind == "mask":
        last = x.shape[-1]
        b = w.buffer(f"torch.ones({last}, {last}).triu()")
        text = f"{{x}} @ {b} / {last}"
    elif kind == "count":
        b = w.buffer("torch.zeros((), dtype=torch.long)")
        w.lines.append(f"{b}.add_(1)")
        text = f"{{x}} / {b}"
    elif kind == "twice":
        b = w.buffer(f"torch.linspace(0.5, 1.5, {n})")
        w.lines.append(f"{b}.mul_(0.9)")
        x = w.like(x, f"{{x}} + {b}.view(-1{ones})")
        w.lines.append(f"{b}.add_(0.1)")
        text = f"{{x}} - {b}.view(-1{ones})"
    else:
        b = w.buffer(f"torch.linspace(-1, 1, {n}).view(-1{ones})")
        text = w.one_of(f"({{x}} - {b}) * 0.8", f"torch.cat([{b}.expand_as({{x}}), {{x}}], 1)")
        if "cat" in text:
            w.put(text.format(x=x.name), (2 * n, *x.shape[1:]), x.rows, may_change=True)
            return
    w.like(x, text)


def another_input(w: Writer) -> None:
    x = w.values[-1]
    if x.rows == 1 and w.one_of(True, False):
        y = w.add_input("x".join(map(str, x.shape)))
        w.like(x, f"{{x}} {w.one_of('+', '-', '*')} {y.name}")
    else:
        w.values.append(w.add_input(w.one_of("4x6x6", "6x8", "10")))


def another_output(w: Writer) -> None:
    w.outputs.append(w.value())


def recomputed(w: Writer) -> None:
    x = w.value(2)
    last = x.shape[-1]
    f, g = w.part(f"nn.Linear({last}, {last})"), w.part("nn.Dropout(0.3)")
    how = w.one_of("False", "True") if x.is_trained else "False"  # the other kind has no gradient
    inner = w.one_of(f"{g}({f}(y).tanh())", f"{f}({g}(y)) + y", f"{f}(y).relu()")
    w.like(x, f"checkpoint(lambda y: {inner}, {{x}}, use_reentrant={how})")


def mode(w: Writer) -> None:
    """Train and eval mode compute something else."""
    x = w.value()
    text = w.one_of("{x} * torch.tensor(2.0)", "{x} + 0.5", "{x}.tanh()", "F.dropout({x}, 0.1)")
    w.put(f"{text.format(x=x.name)} if self.training else {x.name} * torch.tensor(3.0)",
          x.shape, x.rows)  # fmt: skip


def gate(w: Writer) -> None:
    """A statistic of the value scales it."""
    x = w.value(w.one_of(3, 2))
    n, dim = x.shape[0], w.one_of(1, -1)
    text = w.one_of(
        "{x} - {x}.mean(%d, keepdim=True)",
        "{x} * {x}.amax(%d, keepdim=True).sigmoid()",
        "{x} / (1 + {x}.square().sum(%d, keepdim=True)).sqrt()",
        "{x} + {x}.logsumexp(%d, keepdim=True)",
        "{x} / ({x}.var(%d, keepdim=True, unbiased=False) + 1).sqrt()",
        "{x} * F.softmax({x}.mean(%d, keepdim=True), 1)",
        "squeeze",
    )
    if text == "squeeze" and len(x.shape) == 3:
        f, g = w.part(f"nn.Conv2d({n}, 2, 1)"), w.part(f"nn.Conv2d(2, {n}, 1)")
        text = f"{{x}} * {g}({f}({{x}}.mean((2, 3), keepdim=True)).relu()).sigmoid()"
    elif text == "squeeze":
        text = "{x} * {x}.mean(1, keepdim=True)"
    w.like(x, text.replace("%d", str(dim)))


def parameter(w: Writer) -> None:
    x = w.value(w.one_of(3, 2))
    n, last = x.shape[0], x.shape[-1]
    ones = ", 1" * (len(x.shape) - 1)
    kind = w.one_of("scale", "bias", "token", "last", "number")
    if kind == "token" and len(x.shape) == 2:
        p = w.part(f"nn.Parameter(torch.randn(1, 1, {last}) * 0.3)")
        text = f"torch.cat([{p}.expand({x.name}.shape[0], -1, -1), {x.name}], 1)"
        w.put(text, (n + 1, last), x.rows, may_change=True)
        return
    shape = {"scale": f"{n}{ones}", "last": f"{last}", "number": "1"}.get(kind, f"1, {n}{ones}")
    p = w.part(f"nn.Parameter(torch.rand({shape}) + 0.5)")
    w.like(x, f"{{x}} {w.one_of('*', '+')} {p}")


KINDS: dict[str, Callable[[Writer], None]] = {
    f.__name__: f
    for f in (
        *(conv, conv1d, linear, batch_norm, norm, pool, activation, prelu, add, cat, chunk),
        *(shuffle, move, fold, unfold, in_place, shared, no_grad, einsum, attention, recurrent),
        *(dropout, embedding, buffer, another_input, another_output, recomputed, mode, gate),
        *(parameter,),
    )
}


WORTH_SPLITTING = ("conv", "conv1d", "linear", "shared", "einsum", "attention", "recurrent")
"""One of them is in each program: others have nothing that tp splits."""


def fits(plan: str, batch: int) -> bool:
    """Tell whether each replica and micro-batch gets two samples, as batch norm needs."""
    sizes = dict(part.split(":")[0].split("=") for part in plan.split(","))
    return batch // (int(sizes.get("dp", 1)) * int(sizes.get("mb", 1))) >= 2


@st.composite
def programs(draw: st.DrawFn) -> Program:
    """Draw a program and three plans, of 2 and of 3 ranks."""
    picks = st.sampled_from((0, 0, 0, 0, 1, 2, 3))  # mostly the latest: deep rather than wide
    step = st.builds(Step, st.sampled_from(list(KINDS)), picks, st.integers(0, 99_999))
    worth = st.sampled_from(WORTH_SPLITTING)
    steps = draw(st.lists(step, min_size=(num := draw(st.integers(1, 7))), max_size=num))
    steps.insert(draw(st.integers(0, num)), Step(draw(worth), 0, draw(st.integers(0, 99_999))))
    batch = draw(st.sampled_from((6, 5, 7, 8)))
    plans = st.sampled_from([plan for plan in PLANS if fits(plan, batch)])
    return Program(
        draw(st.integers(0, len(STARTS) - 1)),
        tuple(steps),
        draw(st.booleans()),
        batch,
        tuple(draw(st.lists(plans, min_size=3, max_size=3, unique=True))),
    )
