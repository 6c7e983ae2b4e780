"""The one training loop: epochs of steps, an evaluation after each, checkpoints between."""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import torch.distributed as dist

from meshuffle.comm.device import is_out_of_memory
from meshuffle.comm.exchange import Exchange
from meshuffle.comm.group import RankEnv
from meshuffle.config import save_interval
from meshuffle.data import (
    Batch,
    Data,
    EpochSampler,
    ImageSource,
    SkipLog,
    build_train_transform,
    eval_loader,
    train_loader,
)
from meshuffle.errors import Interrupted
from meshuffle.infer.evaluation import Evaluation, evaluate_batches
from meshuffle.infer.replica_batches import broadcast_batches, replica_group
from meshuffle.parallel.random_masks import draw_key
from meshuffle.parallel.rank_module import RankModule
from meshuffle.train.agreement import Agreement, agree
from meshuffle.train.best_epoch import implausible_loss, is_out_of_patience, update_best
from meshuffle.train.checkpoint.checkpoint import resume_command
from meshuffle.train.checkpoint.saver import Saver
from meshuffle.train.compiling import CompileChoice
from meshuffle.train.consistency import Consistency
from meshuffle.train.meter import Meter
from meshuffle.train.optimiser import hold_frozen, learning_rate
from meshuffle.train.out_of_memory import out_of_memory
from meshuffle.train.signals import StopRequest
from meshuffle.train.state import TrainState
from meshuffle.train.step import seed_step, sum_over_ranks
from meshuffle.train.watch import Watch


class Loop:
    """One rank's walk through a run.

    `control` is a CPU group of all ranks, for objects; `exchange` is for a few numbers per step.
    """

    def __init__(
        self,
        run: Path,
        state: TrainState,
        data: Data,
        env: RankEnv,
        control: dist.ProcessGroup,
        exchange: Exchange,
        watch: Watch,
        stop: StopRequest,
        num_workers: int,
    ) -> None:
        self.run, self.state, self.data, self.env = run, state, data, env
        self.control, self.exchange, self.watch = control, exchange, watch
        self.stop, self.num_workers = stop, num_workers
        config = state.config
        assert config.batch is not None and config.epochs is not None
        self.num_epochs = config.epochs
        self.replica = replica_group(state.place)
        self.transform = build_train_transform(
            state.step.augment, state.card.preprocess, dense=state.step.task.dense
        )
        self.sampler = EpochSampler(
            len(data.splits["train"]),
            config.batch,
            rank=state.place.dp_rank,
            world=state.place.dp,
            seed=config.seed,
            repeats=state.step.augment.repeats,
            unit=2 if state.step.augment.mixes else 1,
        )
        self.skips = SkipLog(strict=config.strict)
        self.skips.note(state.progress.skipped)
        self.compile = CompileChoice(config, state.progress.compiled)
        self.consistency = Consistency(run, state, exchange, control)
        self._save_s, self._save_steps = save_interval(config.save_every)
        self._saved_at = time.monotonic()
        self.saver = Saver()

    def fit(self) -> None:
        """Train until the last epoch, or until early stopping; then all files are written."""
        with self.saver:
            self._train_epochs()
        dist.barrier(self.control)

    def _train_epochs(self) -> None:
        progress = self.state.progress
        while progress.epoch < self.num_epochs and not progress.finished:
            if progress.epoch + 1 == self.state.config.unfreeze_epoch and not progress.epoch_step:
                self.state.unfreeze()
                self.watch.event(f"epoch {progress.epoch + 1}: training all parameters")
            self._train_epoch()
            self._close_epoch()
        if not progress.finished:
            progress.finished = True
            self.consistency.before_saving()
            self._save()

    def _train_epoch(self) -> None:
        progress, sampler = self.state.progress, self.sampler
        self.watch.begin_epoch(
            progress.epoch + 1, self.num_epochs, sampler.steps_per_epoch, progress.epoch_step
        )
        self.state.model.train()
        if not isinstance(self.state.model, RankModule):
            hold_frozen(self.state.model, self.state.frozen)
        self._meter = Meter(self.state, self.watch)
        waiting = time.perf_counter()
        for batch in broadcast_batches(self._read_epoch, self.replica):
            self._meter.wait_s += time.perf_counter() - waiting
            self._step(batch)
            waiting = time.perf_counter()
        self._meter.show(self.exchange)

    def _read_epoch(self) -> Iterator[Batch | None]:
        loader = train_loader(
            self.data.splits["train"],
            self.transform,
            self.sampler,
            self.state.progress.epoch,
            start_step=self.state.progress.epoch_step,
            num_workers=self.num_workers,
            pin_memory=self.state.step.device.type == "cuda",
        )
        return self._batches(loader)

    def _batches(self, loader: Iterator[Batch]) -> Iterator[Batch | None]:
        """Yield the loader's batches, and None at the end where a signal took the others."""
        while True:
            try:
                batch: Batch | None = next(loader)
            except StopIteration:
                return
            except Exception:
                if not self.stop.number:
                    raise
                batch = None  # the signal that asks us to stop has ended the loader's processes
            yield batch
            if batch is None:
                return

    def _step(self, batch: Batch | None) -> None:
        """Agree with the other ranks on what this step is, do it, and save where it is due."""
        progress, step = self.state.progress, self.state.step
        began = time.perf_counter()
        self.saver.check()
        micro_batches = [] if batch is None else step.micro_batches(batch)
        agreed = self._agree(micro_batches, batch)
        if batch is None or agreed.lost:
            self._pause(agreed.stop)
            return
        for message in self.skips.note(batch.skipped):
            self.watch.event(f"skipped: {message}")
        place, seed = self.state.place, self.state.config.seed
        seed_step(seed, progress.step, place.dp_rank)
        counts = agreed.counts
        draws = [(draw_key(seed, progress.step, i), n) for i, n in enumerate(agreed.firsts)]
        lr = self._learning_rate(progress.epoch_step)
        try:
            if step.pipeline is None:
                step.forward = self.compile.forward(self.state.model, sum(counts), self.watch)
            sums = step.run(micro_batches, counts, lr, draws)
        except (RuntimeError, MemoryError) as error:
            if is_out_of_memory(error):
                raise out_of_memory(step, batch, self.env.world) from None
            raise
        if self.state.average is not None and any(counts):
            self.state.average.update_parameters(self.state.model)
        progress.step += 1
        progress.epoch_step += 1
        self._meter.add(sums, lr, self.exchange)
        self.compile.timed(time.perf_counter() - began, self._steps_left(), self.exchange)
        progress.compiled = self.compile.decided
        self.consistency.after_step()
        if agreed.stop or agreed.save:
            self._pause(agreed.stop)

    def _agree(self, micro_batches: list[Batch], batch: Batch | None) -> Agreement:
        """Tell the other ranks what this one has; returns the same on all ranks of a replica."""
        sizes = [len(micro) for micro in micro_batches]
        sizes += [0] * (self.state.step.num_micro_batches - len(sizes))
        save = self.env.is_main and self._save_due()
        signals = (self.stop.number, save, batch is None)
        return agree(sizes, signals, self.state.place, self.exchange)

    def _learning_rate(self, epoch_step: int) -> float:
        """By the place in the epoch: where the data have changed, so has the number of steps."""
        num = self.sampler.steps_per_epoch
        step = self.state.progress.epoch * num + min(epoch_step, num - 1)
        return learning_rate(self.state.config, step, num)

    def _steps_left(self) -> int:
        return self.num_epochs * self.sampler.steps_per_epoch - self.state.progress.step

    def _save_due(self) -> bool:
        if self._save_steps:
            return (self.state.progress.step + 1) % self._save_steps == 0
        return time.monotonic() - self._saved_at > self._save_s

    def _pause(self, stop: int | bool) -> None:
        """Save in mid-epoch; with `stop`, end the run here."""
        self._meter.show(self.exchange)
        self.consistency.before_saving()
        self._save(finish=bool(stop))
        if stop:
            progress = self.state.progress
            where = f"epoch {progress.epoch + 1}, step {progress.step}"
            text = f"stopped in {where}; continue with: {resume_command(self.run)}"
            self.watch.event(text)
            raise Interrupted(text, self.stop.number or 15, is_printed=True)

    def _save(self, *, finish: bool = False) -> None:
        """Let a checkpoint be written; with `finish`, wait for it: a rank that ends stops all."""
        self._collect_skipped()
        self.state.save(self.run, self.saver, write=self.env.is_main)
        if finish:
            self.saver.wait()
        self._saved_at = time.monotonic()
        dist.barrier(self.control)

    def _collect_skipped(self) -> None:
        """Bring the ranks' broken images together."""
        shares: list[list[str]] = [self.skips.messages]
        if self.env.world > 1:
            shares = [[] for _ in range(self.env.world)]
            dist.all_gather_object(shares, self.skips.messages, group=self.control)
        self.state.progress.skipped = sorted({text for share in shares for text in share})

    def _close_epoch(self) -> None:
        """Judge the model, keep the best, write the epoch's row, decide whether to go on."""
        state, progress = self.state, self.state.progress
        lr = self._learning_rate(progress.epoch_step - 1)
        seconds = progress.epoch_seconds
        try:
            evaluation = self.evaluate(self.data.splits["val"])
        except Interrupted:
            self._pause(stop=True)
        progress.epoch += 1
        row = self._meter.epoch_row(lr, seconds, evaluation.metrics)
        better = self._keep_best(evaluation)
        num = (state.config.batch or 1) // state.step.num_micro_batches
        warning = implausible_loss(row["train_loss"], evaluation.metrics.get("loss", 0.0), num)
        progress.sums, progress.epoch_step, progress.epoch_seconds = [0.0, 0.0, 0.0], 0, 0.0
        self.watch.end_epoch(row)
        if warning:
            self.watch.event(warning)
        patience = state.config.early_stop
        if not better and is_out_of_patience(progress.epoch, progress.best_epoch, patience):
            self.watch.event(f"no better epoch since {progress.best_epoch}: stopping early")
            progress.finished = True
            self.consistency.before_saving()
            self._save()

    def _keep_best(self, evaluation: Evaluation) -> bool:
        """Keep the weights of this epoch where it is the best so far; returns whether it is."""
        state, task = self.state, self.state.step.task
        as_good = partial(task.is_chance, num=len(self.data.splits["val"]))
        score = task.score(evaluation.metrics)
        better = update_best(state.progress, score, evaluation.objective, as_good)
        if better and state.place.dp_rank == 0:
            path = self.run / "weights" / "best.safetensors"
            state.save_weights(path, evaluation.metrics, self.saver, write=self.env.is_main)
        return better

    def evaluate(self, source: ImageSource) -> Evaluation:
        """Evaluate the judged model on all images of `source`, over all ranks.

        Raises:
            Interrupted: a signal has ended a rank's loader.
        """
        state, batch = self.state, self.state.config.batch
        assert batch is not None
        num_lost = 0

        def read() -> Iterator[Batch | None]:
            loader = eval_loader(
                source,
                state.card.preprocess,
                batch_size=-(-batch // state.step.num_micro_batches),  # as training holds
                rank=state.place.dp_rank,
                world=state.place.dp,
                num_workers=self.num_workers,
                dense=state.step.task.dense,
            )
            return self._batches(loader)

        def until_lost() -> Iterator[Batch]:
            nonlocal num_lost
            for images in broadcast_batches(read, self.replica):
                if images is None:
                    num_lost = 1
                    return
                yield images

        evaluation = evaluate_batches(
            state.judged,
            until_lost(),
            state.step.task,
            state.card.preprocess,
            state.step.device,
            group=self.control,
            is_output_rank=state.place.is_output_rank,
            channels_last=state.card.channels_last,
        )
        if sum_over_ranks([float(num_lost)], self.exchange)[0]:
            how = f"stopped; continue with: {resume_command(self.run)}"
            raise Interrupted(how, self.stop.number or 15)
        for message in self.skips.note(evaluation.skipped):
            self.watch.event(f"skipped: {message}")
        return evaluation


def median_step_ms(state: TrainState) -> float | None:
    """Return the median milliseconds of a step, or None before the first."""
    return statistics.median(state.progress.step_ms) if state.progress.step_ms else None
