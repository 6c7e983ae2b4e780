"""One training step of one rank: micro-batches, one gradient over all ranks, one update."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from meshuffle.comm.device import Precision, autocast
from meshuffle.comm.exchange import Exchange
from meshuffle.data import AugmentConfig, Batch, Preprocess, mix_batch, shard_bounds
from meshuffle.parallel.data_parallel import DataParallel
from meshuffle.parallel.random_masks import DrawState
from meshuffle.parallel.rank_module import RankModule
from meshuffle.parallel.ranks import Ranks
from meshuffle.parallel.runner import Runner
from meshuffle.tasks.base import Task
from meshuffle.train.optimiser import clip_gradients


@dataclass
class Step:
    """What a step needs; `forward` is the model, compiled or not.

    The loss of a step is the mean over all ranks' valid samples, so a sample weighs the same in
    an uneven last batch, with an unreadable neighbour, or on any number of ranks.
    """

    model: nn.Module
    forward: Callable[[Tensor], Tensor]
    optimizer: Optimizer
    parallel: DataParallel
    task: Task
    preprocess: Preprocess
    augment: AugmentConfig
    device: torch.device
    precision: Precision = "float32"
    channels_last: bool = True
    num_micro_batches: int = 1
    clip_norm: float = 0.0
    ranks: Ranks | None = None
    """The mesh, where the model is split within its layers or into stages."""
    draw_state: DrawState | None = None
    """What the model's random numbers depend on."""

    def micro_batches(self, batch: Batch, nominal: int | None = None) -> list[Batch]:
        """Cut this rank's batch by position; a broken image shortens its own micro-batch only.

        Args:
            nominal: its samples before any has left; None counts those in `batch.skipped`.
        """
        if self.num_micro_batches == 1:
            return [batch]
        nominal = len(batch) + len(batch.skipped) if nominal is None else nominal
        unit = 2 if self.augment.mixes else 1
        bounds = shard_bounds(nominal, self.num_micro_batches, unit)
        return [_between(batch, start, stop) for start, stop in bounds]

    def run(
        self,
        micro_batches: list[Batch],
        counts: list[int],
        lr: float,
        draws: Sequence[tuple[int, int]] = (),
    ) -> Tensor:
        """Do one step; returns [loss sum, score sum, samples] of this rank, float64 (3,).

        Args:
            micro_batches: this rank's, possibly empty ones.
            counts: valid samples of each micro-batch over all ranks.
            lr: learning rate.
            draws: of each micro-batch, its key and this rank's first sample; see `DrawState`.
        """
        total, sums = sum(counts), torch.zeros(3, dtype=self._sum_dtype, device=self.device)
        self.optimizer.zero_grad(set_to_none=True)
        used = [i for i, count in enumerate(counts) if count]
        if not used:
            return sums
        if self.pipeline is not None:
            sums += self._run_pipeline(self.pipeline, micro_batches, used, total, draws)
        else:
            for i in used:
                if i == used[-1]:
                    self.parallel.expect_last_backward()
                if self.draw_state is not None and draws:
                    self.draw_state.set(*draws[i], len(micro_batches[i]))
                sums += self._forward_backward(micro_batches[i], total)
        self.parallel.reduce_gradients()
        if self.pipeline is not None:
            self.pipeline.sum_tied()
        self._update(lr)
        self.parallel.share_update()
        return sums

    def _forward_backward(self, batch: Batch, total: int) -> Tensor:
        x_NCHW, targets = self._inputs(batch)
        loss, sums = self._forward(x_NCHW, targets, total)
        self._backward(loss)
        return sums

    def _forward(self, x_NCHW: Tensor, targets: Tensor, total: int) -> tuple[Tensor, Tensor]:
        with autocast(self.device, self.precision):
            outputs = self.forward(x_NCHW)
        return self._loss(outputs, targets, total)

    def _backward(self, loss: Tensor) -> None:
        loss.backward()

    def _run_pipeline(
        self,
        pipeline: Runner,
        micro_batches: list[Batch],
        used: list[int],
        total: int,
        draws: Sequence[tuple[int, int]],
    ) -> Tensor:
        """Go forward and backward through the stages of this rank; arguments as of `run`."""
        given = [self._inputs(micro_batches[i]) for i in used]
        sums = torch.zeros(3, dtype=self._sum_dtype, device=self.device)

        def loss(i: int, outputs: Tensor) -> Tensor:
            found, own = self._loss(outputs, given[i][1], total)
            sums.add_(own)
            return found

        def prepare(i: int) -> None:
            if self.draw_state is not None and draws:
                self.draw_state.set(*draws[used[i]], len(given[i][0]))

        pipeline.train(
            [len(micro_batches[i]) for i in used],
            lambda i: (given[i][0],),
            loss,
            prepare,
            self.parallel.expect_last_backward,
            lambda: autocast(self.device, self.precision),
        )
        return sums

    def _update(self, lr: float) -> None:
        if self.parallel.updates_here:
            for group in self.optimizer.param_groups:
                group["lr"] = lr * group.get("factor", 1.0)
            clip_gradients(self.model, self.clip_norm, self.ranks)
            self.parallel.drop_others()
            self.optimizer.step()

    def _loss(self, outputs: Tensor, targets: Tensor, total: int) -> tuple[Tensor, Tensor]:
        """Return what goes backward, and [loss sum, score sum, samples], (3,)."""
        if not len(outputs):  # another rank has samples of this micro-batch
            return outputs.sum(), torch.zeros(3, dtype=self._sum_dtype, device=self.device)
        loss_sum = self.task.loss_sum(outputs, targets)
        with torch.no_grad():
            score = self.task.score_sum(outputs, targets)
            values = [loss_sum.detach(), score, torch.full_like(loss_sum, len(outputs))]
            sums = torch.stack([value.to(self._sum_dtype) for value in values])
        return loss_sum / total, sums

    def _inputs(self, batch: Batch) -> tuple[Tensor, Tensor]:
        x_NCHW = self.preprocess.normalise(batch.images.to(self.device, non_blocking=True))
        targets = batch.targets.to(self.device, non_blocking=True)
        if self.augment.mixes:
            x_NCHW, targets = mix_batch(
                x_NCHW,
                targets,
                self.task.num_classes,
                self.augment,
                batch.draws,
                batch.positions,
            )
        layout = torch.channels_last if self.channels_last else torch.contiguous_format
        return x_NCHW.contiguous(memory_format=layout), targets

    @property
    def pipeline(self) -> Runner | None:
        """What runs a model that is cut into stages."""
        return self.model.pipeline if isinstance(self.model, RankModule) else None

    @property
    def has_loss(self) -> bool:
        """True on the one rank of a replica whose sums are counted."""
        if self.ranks is None:
            return True
        return self.ranks.tp_rank == 0 and (self.pipeline is None or self.pipeline.has_last)

    @property
    def _sum_dtype(self) -> torch.dtype:
        return torch.float32 if self.device.type == "mps" else torch.float64


def _between(batch: Batch, start: int, stop: int) -> Batch:
    """Return the samples whose position is in start … stop − 1, their positions from 0 on."""
    part = select(batch, (batch.positions >= start) & (batch.positions < stop))
    part.positions, part.skipped = part.positions - start, []
    return part


def seed_step(seed: int, step: int, rank: int) -> None:
    """Seed torch for one step of one rank, so that dropout needs no stored random state."""
    torch.manual_seed(((seed * 1_000_003 + step) * 65_537 + rank) % (1 << 63))


def select(batch: Batch, kept: Tensor) -> Batch:
    """Return the samples for which the mask `kept` is True."""
    return Batch(
        images=batch.images[kept],
        targets=batch.targets[kept],
        indices=batch.indices[kept],
        draws=batch.draws[kept],
        positions=batch.positions[kept],
        skipped=batch.skipped,
    )


def sum_over_ranks(values: list[float], control: Exchange) -> list[float]:
    """Return the element-wise sums of small host values over all ranks."""
    return control.all_sum(torch.tensor(values, dtype=torch.float64)).tolist()


def gather_over_ranks(values: list[float], control: Exchange) -> list[list[float]]:
    """Return small host values of every rank, in the order of the ranks."""
    if control.world == 1:
        return [values]
    return control.all_gather(torch.tensor(values, dtype=torch.float64)).tolist()
