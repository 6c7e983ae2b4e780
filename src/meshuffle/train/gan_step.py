"""A training step of a GAN: two updates, of the discriminator and then of the generator."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from meshuffle.comm.device import autocast
from meshuffle.data import Batch
from meshuffle.parallel.data_parallel import DataParallel
from meshuffle.tasks.gan import FOR_DISCRIMINATOR, FOR_GENERATOR, Gan, hinge, told_apart
from meshuffle.train.step import Step

BETAS = (0.0, 0.99)
"""Adam has no momentum here; see `tasks/gan.py`."""


@dataclass
class GanStep(Step):
    """A step of two updates by one optimiser: of the discriminator, then of the generator.

    Each phase computes gradients of its own network alone, sums them over the ranks in buckets of
    that network, and updates; the other's parameters have no gradient then, so that the optimiser
    leaves them and their state as they are.
    """

    _reducers: Mapping[str, DataParallel] = field(default_factory=dict, init=False)
    _parallel: DataParallel | None = field(default=None, init=False)

    def run(
        self,
        micro_batches: list[Batch],
        counts: list[int],
        lr: float,
        draws: Sequence[tuple[int, int]] = (),
    ) -> Tensor:
        """Do both updates; arguments and result as of `Step.run`.

        The loss is the discriminator's; the score is `told_apart`.
        """
        total, sums = sum(counts), torch.zeros(3, dtype=self._sum_dtype, device=self.device)
        self.optimizer.zero_grad(set_to_none=True)
        used = [i for i, count in enumerate(counts) if count]
        given = draws or [(i, 0) for i in range(len(counts))]
        if not used:
            return sums

        def discriminate(i: int) -> Tensor:
            loss_N, own = self._discriminate(micro_batches[i], *given[i])
            sums.add_(own)
            return loss_N.sum() / total

        def generate(i: int) -> Tensor:
            return self._generate(len(micro_batches[i]), *given[i]).sum() / total

        self._phase("discriminator", discriminate, used, lr)
        self._phase("generator", generate, used, lr)
        return sums

    def _phase(
        self, name: str, loss_of: Callable[[int], Tensor], used: list[int], lr: float
    ) -> None:
        """Update the network `name` by the gradient of the losses of all micro-batches."""
        trained = [p for p in self.model.get_submodule(name).parameters() if p.requires_grad]
        reducer = self._reducer(name)
        for i in used:
            if i == used[-1]:
                reducer.expect_last_backward()
            loss_of(i).backward(inputs=trained)
        reducer.reduce_gradients()
        self._update(lr)
        self.parallel.share_update()
        self.optimizer.zero_grad(set_to_none=True)

    def _discriminate(self, batch: Batch, key: int, first: int) -> tuple[Tensor, Tensor]:
        """Return the loss of each sample, (N,), and [loss sum, score, samples], (3,)."""
        gan = self._gan
        x_NCHW, _ = self._inputs(batch)
        x_NCHW = x_NCHW.to(gan.discriminator.last.weight.dtype)
        with autocast(self.device, self.precision):
            with torch.no_grad():
                made_NCHW = gan.make(gan.noise(key, len(batch), FOR_DISCRIMINATOR, first))
            logits = [_exact(gan.discriminator(images)) for images in (x_NCHW, made_NCHW)]
        loss_N = hinge(*logits)
        with torch.no_grad():
            values = [loss_N.sum(), told_apart(*logits).sum(), loss_N.new_tensor(len(batch))]
            return loss_N, torch.stack([value.to(self._sum_dtype) for value in values])

    def _generate(self, num: int, key: int, first: int) -> Tensor:
        """Return the generator's loss of each of `num` images, (num, 1)."""
        gan = self._gan
        with autocast(self.device, self.precision):
            made_NCHW = gan.make(gan.noise(key, num, FOR_GENERATOR, first))
            return -_exact(gan.discriminator(made_NCHW))

    def _update(self, lr: float) -> None:
        for group in self.optimizer.param_groups:
            if "betas" in group:
                group["betas"] = BETAS
        super()._update(lr)

    @property
    def _gan(self) -> Gan:
        assert isinstance(self.model, Gan)
        return self.model

    def _reducer(self, name: str) -> DataParallel:
        """Return what sums the gradients of one network over the ranks that `parallel` knows."""
        if self._parallel is not self.parallel:
            for old in self._reducers.values():
                old.close()
            group, mode = self.parallel.group, self.parallel.mode
            self._reducers = {
                part: DataParallel(self.model.get_submodule(part), group, mode)
                for part in ("discriminator", "generator")
            }
            self._parallel = self.parallel
        return self._reducers[name]


def _exact(logits: Tensor) -> Tensor:
    return logits if logits.dtype == torch.float64 else logits.float()
