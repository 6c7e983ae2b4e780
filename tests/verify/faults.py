"""Ranks that break one thing per case: `python -m tests.verify.faults FOLDER WORK`.

The model of a case is `tests.verify.faults:NAME`; its name says which fault. Each fault leaves a
file in the folder MESHUFFLE_TEST_FIRED when it changes something.
"""

from __future__ import annotations

import contextlib
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from meshuffle.comm import collectives
from meshuffle.comm.exchange import SharedExchange
from meshuffle.parallel import batch_norm, data_parallel, pipeline, redistribute
from meshuffle.parallel.random_masks import Draw
from meshuffle.verify import rank
from meshuffle.verify.__main__ import main as work
from meshuffle.verify.job import Job
from tests.verify import models

Patches = list[Any]
CASES = {
    "skip_an_all_reduce": (models.tokens, "tp=2:channel", "6:int"),
    "skip_an_all_reduce_backward": (models.tokens, "tp=2:channel", "6:int"),
    "mean_for_sum": (models.wide, "tp=2:channel", "3x16x16"),
    "drop_a_shuffle": (models.wide, "tp=2:channel", "3x16x16"),
    "forget_a_halo_row": (models.net, "tp=2:spatial", "3x16x16"),
    "stale_buffer": (models.net, "tp=2:batch", "3x16x16"),
    "double_count_of_the_last_batch": (models.net, "dp=2", "3x16x16"),
    "one_ranks_mask": (models.net, "tp=2:batch", "3x16x16"),
    "skip_the_gradients": (models.net, "dp=2", "3x16x16"),
    "nobody_shares_a_shard": (models.net, "dp=2:shard", "3x16x16"),
    "nobody_shares_the_update": (models.net, "dp=2:central", "3x16x16"),
    "the_exchange_of_a_host_is_late": (models.net, "dp=2", "3x16x16"),
    "evaluated_in_train_mode": (models.net, "dp=2", "3x16x16"),
    "a_stage_gets_half": (models.net, "pp=2", "3x16x16"),
    "a_stage_gets_the_wrong_micro_batch": (models.net, "pp=2,mb=4", "3x16x16"),
    "a_gradient_does_not_cross": (models.net, "pp=2:zbv,mb=4", "3x16x16"),
    "a_tied_parameter_alone": (models.tied, "pp=2", "6:int"),
    "a_rank_raises": (models.wide, "tp=2:channel", "3x16x16"),
    "a_rank_does_not_come": (models.wide, "tp=2:channel", "3x16x16"),
    "nothing": (models.wide, "tp=2:channel", "3x16x16"),
}


def __getattr__(name: str) -> Any:
    if name in CASES:
        return CASES[name][0]
    raise AttributeError(name)


class Fault:
    """Ways to break a rank; `fired` is called where something really changes."""

    def __init__(self, name: str) -> None:
        self.name, self.rank = name, int(os.environ["RANK"])

    def fired(self) -> None:
        (Path(os.environ["MESHUFFLE_TEST_FIRED"]) / self.name).touch()

    def patches(self) -> Patches:
        return getattr(self, self.name)()

    def _all_reduce(self, change: Callable[[Tensor, Tensor], Tensor], function: str) -> Patches:
        whole, linear = collectives.all_reduce, collectives._Linear.apply

        def changed(x: Tensor, group: Any) -> Tensor:
            self.fired()
            return change(x, whole(x, group))

        def psum(x: Tensor, group: Any) -> Any:
            return linear(x, changed, collectives._identity, group)

        def pvary(x: Tensor, group: Any) -> Any:
            return linear(x, collectives._aliased, changed, group)

        changed_ones = {"psum": psum, "pvary": pvary}
        return [mock.patch.object(collectives, function, changed_ones[function])]

    def skip_an_all_reduce(self) -> Patches:
        return self._all_reduce(lambda x, total: x.clone(), "psum")

    def skip_an_all_reduce_backward(self) -> Patches:
        return self._all_reduce(lambda x, total: x.clone(), "pvary")

    def mean_for_sum(self) -> Patches:
        return self._all_reduce(lambda x, total: total / 2, "psum")

    def drop_a_shuffle(self) -> Patches:
        def stays(x: Tensor, *_: Any) -> Tensor:
            self.fired()
            return x.clone()

        return [mock.patch.object(collectives, "all_to_all", stays)]

    def forget_a_halo_row(self) -> Patches:
        prepare = redistribute.Redistribute._prepare

        def without(move: redistribute.Redistribute, batch: int) -> Any:
            run = prepare(move, batch)
            if move.step.name != "halo" or self.rank != 0:
                return run

            def forgetful(x: Tensor, group: Any) -> Tensor:
                self.fired()
                y = run(x, group).clone()
                y.select(move.step.target.dim, -1).zero_()
                return y

            return forgetful

        return [mock.patch.object(redistribute.Redistribute, "_prepare", without)]

    def stale_buffer(self) -> Patches:
        return [mock.patch.object(batch_norm, "update_running", lambda *_: self.fired())]

    def double_count_of_the_last_batch(self) -> Patches:
        loss_of = rank.loss_of

        def doubled(outputs: Any, dims: Any, samples: Tensor, job: Job) -> Tensor:
            loss = loss_of(outputs, dims, samples, job)
            if int(samples[-1]) < job.batch - 1:
                return loss
            self.fired()
            return 2 * loss

        return [mock.patch.object(rank, "loss_of", doubled)]

    def one_ranks_mask(self) -> Patches:
        bits = Draw.bits

        def other(draw: Draw, shape: Any, batch: int) -> Tensor:
            if self.rank == 1:
                self.fired()
                return bits(draw, shape, batch) ^ (1 << 52)
            return bits(draw, shape, batch)

        return [mock.patch.object(Draw, "bits", other)]

    def skip_the_gradients(self) -> Patches:
        return [mock.patch.object(data_parallel, "fill_buckets", lambda *_: [self.fired()][:0])]

    def nobody_shares_a_shard(self) -> Patches:
        shared = data_parallel.DataParallel
        return [mock.patch.object(shared, "share_update", lambda _: self.fired())]

    nobody_shares_the_update = nobody_shares_a_shard

    def the_exchange_of_a_host_is_late(self) -> Patches:
        gather, before = SharedExchange.all_gather, []

        def late(exchange: SharedExchange, vector: Tensor) -> Tensor:
            self.fired()
            before.append(gather(exchange, vector))
            same = [found for found in before if found.shape == before[-1].shape]
            return same[-2:][0]

        return [mock.patch.object(SharedExchange, "all_gather", late)]

    def evaluated_in_train_mode(self) -> Patches:
        return [mock.patch.object(rank.Parallel, "eval", lambda module: [self.fired(), module][1])]

    def _arrived(self, way: str, change: Callable[[int, list[Tensor]], list[Tensor]]) -> Patches:
        arrived = pipeline.Pipeline._arrived

        def changed(pipe: Any, step: Any, side: str, sender: int, i: int) -> list[Tensor]:
            found = arrived(pipe, step, side, sender, i)
            if side != way:
                return found
            self.fired()
            return change(i, found)

        return [mock.patch.object(pipeline.Pipeline, "_arrived", changed)]

    def a_stage_gets_half(self) -> Patches:
        return self._arrived("F", lambda _, found: [x / 2 for x in found])

    def a_stage_gets_the_wrong_micro_batch(self) -> Patches:
        first: list[list[Tensor]] = []

        def stale(i: int, found: list[Tensor]) -> list[Tensor]:
            first.append([x.clone() for x in found])
            return found if i != 1 else first[-2]

        return self._arrived("F", stale)

    def a_gradient_does_not_cross(self) -> Patches:
        return self._arrived("B", lambda _, found: [torch.zeros_like(x) for x in found])

    def a_tied_parameter_alone(self) -> Patches:
        return [mock.patch.object(pipeline.Pipeline, "sum_tied", lambda _: self.fired())]

    def a_rank_raises(self) -> Patches:
        def broken(x: Tensor, group: Any) -> Tensor:
            if self.rank == 1:
                self.fired()
                raise RuntimeError("planted")
            return whole(x, group)

        whole = collectives.psum
        return [mock.patch.object(collectives, "psum", broken)]

    def a_rank_does_not_come(self) -> Patches:
        def absent(x: Tensor, group: Any) -> Tensor:
            if self.rank == 1:
                self.fired()
                time.sleep(60)
            return whole(x, group)

        whole = collectives.psum
        return [mock.patch.object(collectives, "psum", absent)]

    def nothing(self) -> Patches:
        return []


def run_job(job: Job, *rest: Any) -> Any:
    """Do a job with its fault planted."""
    with contextlib.ExitStack() as stack:
        for patch in Fault(job.model.partition(":")[2]).patches():
            stack.enter_context(patch)
        return _run_job(job, *rest)


_run_job = rank.run_job


def main() -> int:
    """Do what a rank of `verify` does, with faults."""
    rank.run_job = run_job
    return work()


if __name__ == "__main__":
    sys.exit(main())
