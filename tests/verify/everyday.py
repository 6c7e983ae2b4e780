"""Models of everyday kinds, each with something that a zoo does not hold; built by name."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm, weight_norm
from torch.utils.checkpoint import checkpoint


class Base(nn.Module):
    """A convolution, `middle`, and a classifier; images of 3 channels."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.head = nn.Conv2d(3, 8, 3, padding=1), nn.Linear(8, 5)

    def middle(self, x: Tensor) -> Tensor:
        return x

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.middle(torch.relu(self.stem(x))).mean((2, 3)))


class Gate(Base):
    """A gate of trained weights, computed without gradients."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Conv2d(8, 8, 1)

    @torch.no_grad()
    def gates(self, x: Tensor) -> Tensor:
        return self.gate(x).sigmoid()

    def middle(self, x: Tensor) -> Tensor:
        return x * self.gates(x)


class GradAgain(Base):
    """Gradients within a region that has none."""

    def middle(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            y = x.cos()
            with torch.enable_grad():
                z = x.sin()
            w = x.exp()
        return x * y + z * w


class Bounded(Base):
    """Weights kept in bounds at each step."""

    def middle(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            self.head.weight.clamp_(-0.1, 0.1)
        return x


class Recomputed(Base):
    """Activation checkpointing of both kinds, with dropout in it."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Conv2d(8, 8, 1), nn.Conv2d(8, 8, 1)
        self.drop = nn.Dropout(0.3)

    def middle(self, x: Tensor) -> Tensor:
        x = checkpoint(lambda y: self.drop(self.one(y).relu()), x, use_reentrant=True)
        return checkpoint(lambda y: self.drop(self.two(y).relu()), x, use_reentrant=False)


class Average(Base):
    """A running average in two steps."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("seen", torch.zeros(8))

    def middle(self, x: Tensor) -> Tensor:
        self.seen.mul_(0.9).add_(x.detach().mean((0, 2, 3)), alpha=0.1)
        return x + self.seen[:, None, None]


class NormTwice(Base):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(8)

    def middle(self, x: Tensor) -> Tensor:
        return self.norm(self.norm(x).relu() + x)


class Counting(Base):
    """Norms for the sake of their statistics alone, and a constant."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.scale = nn.BatchNorm2d(8), torch.tensor(0.5)

    def middle(self, x: Tensor) -> Tensor:
        self.norm(x)
        return x * self.scale + torch.tensor(2.0)


class Frozen(Base):
    """A batch norm that keeps its statistics."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(8)

    def train(self, mode: bool = True) -> Frozen:
        super().train(mode)
        self.norm.eval()
        return self

    def middle(self, x: Tensor) -> Tensor:
        return self.norm(x)


class Complex(Base):
    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.Conv2d(8, 8, 1)

    def middle(self, x: Tensor) -> Tensor:
        return self.mix(torch.fft.fft2(x, norm="ortho").real).relu()


class ComplexWeights(Base):
    """A trained filter of frequencies, and weights that a function of others makes."""

    def __init__(self) -> None:
        super().__init__()
        self.filter = nn.Parameter(torch.randn(8, 2) * 0.3)
        self.one = weight_norm(nn.Conv2d(8, 8, 1))
        self.two = spectral_norm(nn.Conv2d(8, 8, 1))

    def middle(self, x: Tensor) -> Tensor:
        waves = torch.fft.rfft2(self.one(x)) * torch.view_as_complex(self.filter)[:, None, None]
        return self.two(torch.fft.irfft2(waves, s=x.shape[2:]))


class Erased(Base):
    """Read split, changed through a view, read split again."""

    def __init__(self) -> None:
        super().__init__()
        self.zero, self.one = nn.Conv2d(8, 8, 1), nn.Conv2d(8, 8, 3, padding=1)
        self.two = nn.Conv2d(8, 8, 3, padding=1)

    def middle(self, x: Tensor) -> Tensor:
        x = self.zero(x)
        a = self.one(x + 1)
        x[:, :4].zero_()
        return a + self.two(x)


class Narrow(Base):
    def middle(self, x: Tensor) -> Tensor:
        return x.narrow(1, 0, 8)


class DropPath(Base):
    """Stochastic depth as transformers draws it, and noise."""

    def middle(self, x: Tensor) -> Tensor:
        if not self.training:
            return x
        shape = (x.shape[0],) + (1,) * (x.ndim - 1)
        kept = (0.8 + torch.rand(shape, dtype=x.dtype, device=x.device)).floor_()
        x = x.div(0.8) * kept + 0.1 * torch.randn_like(x)
        return x * torch.rand_like(x) + torch.randn(x.shape, dtype=x.dtype)


class Centred(nn.Module):
    """Mixes the samples of a batch."""

    def __init__(self) -> None:
        super().__init__()
        self.f = nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        y = self.f(x)
        return y - y.mean(0, keepdim=True)


class Rows(nn.Module):
    """Its rows are steps of time, and samples within them."""

    def __init__(self) -> None:
        super().__init__()
        self.f = nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        return self.f(x).transpose(0, 1).reshape(-1, 16)


class Instance(Base):
    """Running statistics of single images."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.InstanceNorm2d(8, affine=True, track_running_stats=True)

    def middle(self, x: Tensor) -> Tensor:
        return self.norm(x)


class Frequent(nn.Module):
    """A table whose gradient depends on how often an index is in the batch."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(11, 8, scale_grad_by_freq=True)
        self.up, self.head = nn.Linear(8, 16), nn.Linear(16, 5)

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(F.gelu(self.up(self.table(ids))).mean(1))


class Causal(nn.Module):
    """torch's own encoder with a causal mask."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.head = nn.Embedding(11, 8), nn.Linear(8, 5)
        layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
        self.layers = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.table(ids)
        mask = torch.full((x.shape[1], x.shape[1]), -torch.inf, dtype=x.dtype).triu(1)
        return self.head(self.layers(x, mask=mask).mean(1))


class Grouped(nn.Module):
    """Grouped-query attention with dropout."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = nn.Linear(32, 32), nn.Linear(32, 8), nn.Linear(32, 8)
        self.out = nn.Linear(32, 32)

    def forward(self, x: Tensor) -> Tensor:
        q = self.q(x).unflatten(2, (8, 4)).transpose(1, 2)
        k, v = (f(x).unflatten(2, (2, 4)).transpose(1, 2) for f in (self.k, self.v))
        y = F.scaled_dot_product_attention(q, k, v, dropout_p=0.1, enable_gqa=True)
        return self.out(y.transpose(1, 2).flatten(2))


IMAGES = (
    *(Gate, GradAgain, Bounded, Recomputed, NormTwice, Counting, Frozen, Complex),
    *(ComplexWeights, Erased, Narrow, DropPath),
)


class Reverse(torch.autograd.Function):
    """Has a backward of its own."""

    @staticmethod
    def forward(ctx: object, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: object, g: Tensor) -> Tensor:  # type: ignore[override]
        return -g


class Reversed(Base):
    def middle(self, x: Tensor) -> Tensor:
        return Reverse.apply(x)


class Watched(Base):
    """Has a hook on a value."""

    def middle(self, x: Tensor) -> Tensor:
        if x.requires_grad:
            x.register_hook(torch.neg)
        return x


class Hooked(Base):
    """Has a hook on a parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.stem.weight.register_hook(torch.neg)


class Uncaptured(Base):
    """Does what torch.export does not follow, and drops elements."""

    def __init__(self) -> None:
        super().__init__()
        self.drop = nn.Dropout(0.3)

    def middle(self, x: Tensor) -> Tensor:
        return self.drop(x) if float(x.detach().sum()) != 0 else x


class Counted(Base):
    """Scales by how often it has run."""

    def __init__(self) -> None:
        super().__init__()
        self.step, self.size, self.seen = 0, 0, [0]

    def middle(self, x: Tensor) -> Tensor:
        self.size = x.shape[-1]
        if self.training:
            self.step += 1
            self.seen.append(self.step)
        return x * (1 + 0.1 * self.step)


class Sized(Base):
    """Keeps a size, which is the same in each forward."""

    size = 0

    def __init__(self) -> None:
        super().__init__()
        self.size = 7

    def middle(self, x: Tensor) -> Tensor:
        self.size = int(x.shape[-1])
        return x * self.size


AS_WRITTEN = (Reversed, Watched, Hooked, Uncaptured, Counted)
