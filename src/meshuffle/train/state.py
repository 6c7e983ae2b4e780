"""Everything that changes while a run trains: built from its settings, saved, restored."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.optim.swa_utils import AveragedModel

from meshuffle import weights
from meshuffle.comm.exchange import GroupExchange
from meshuffle.comm.group import RankEnv
from meshuffle.config import TrainConfig, parse_knobs
from meshuffle.data import AugmentConfig, Data, Preprocess
from meshuffle.errors import RunError
from meshuffle.parallel.batch_norm import synchronise_batch_norm
from meshuffle.parallel.data_parallel import MODES, DataParallel, broadcast_from_main
from meshuffle.parallel.parts import gather_named
from meshuffle.parallel.place import Place, join_ranks, place_of
from meshuffle.parallel.random_masks import DrawState, key_dropout
from meshuffle.parallel.rank_module import RankModule
from meshuffle.parallel.ranks import Ranks
from meshuffle.planner.plan import Plan
from meshuffle.tasks import find_task, make_task
from meshuffle.tasks.card import Card
from meshuffle.train import optimiser
from meshuffle.train.checkpoint import checkpoint
from meshuffle.train.checkpoint.saver import Saver
from meshuffle.train.gan_step import GanStep
from meshuffle.train.initial_weights import InitialWeights
from meshuffle.train.split import num_micro_batches, split_model
from meshuffle.train.step import Step

AUGMENT_FIELDS = {
    "crop_scale": "random_resized_crop",
    "flip": "flip",
    "affine_degrees": "affine_degrees",
    "affine_translate": "affine_translate",
    "affine_scale": "affine_scale",
    "trivial_augment": "trivial_augment",
    "erasing": "random_erasing",
    "mixup": "mixup",
    "cutmix": "cutmix",
    "repeats": "repeats",
}


def augment_config(config: TrainConfig) -> AugmentConfig:
    """Return the augmentation that a resolved `config` describes."""
    values = {theirs: getattr(config, ours) for ours, theirs in AUGMENT_FIELDS.items()}
    values["random_resized_crop"] = values["random_resized_crop"] or None
    return AugmentConfig(**values)


def augment_values(augment: AugmentConfig) -> dict[str, Any]:
    """Return the fields of TrainConfig that describe `augment`."""
    values = {ours: getattr(augment, theirs) for ours, theirs in AUGMENT_FIELDS.items()}
    return {**values, "crop_scale": values["crop_scale"] or 0.0}


STEPS: Mapping[str, type[Step]] = {"generate": GanStep}
"""What a training step is, by task; the others take `Step`."""


@dataclass
class Progress:
    """Where a run stands; plain numbers, stored beside the tensors.

    `epoch` and `epoch_step` count what is finished; `sums` are [loss, score, samples] of the
    current epoch so far, over all ranks.
    """

    step: int = 0
    epoch: int = 0
    epoch_step: int = 0
    seconds: float = 0.0
    epoch_seconds: float = 0.0
    sums: list[float] = field(default_factory=lambda: [0.0, 0.0, 0.0])
    highest_score: float = -sys.float_info.max
    best_score: float = -sys.float_info.max  # of the epoch kept as best
    best_loss: float = 0.0
    best_epoch: int = 0
    compiled: bool | None = None
    finished: bool = False
    skipped: list[str] = field(default_factory=list)
    step_ms: list[float] = field(default_factory=list)


@dataclass
class TrainState:
    """The model of one rank with all that trains it."""

    config: TrainConfig
    card: Card
    model: nn.Module
    average: AveragedModel | None
    frozen: list[str]
    step: Step
    group: dist.ProcessGroup
    plan: Plan
    rate_factors: dict[str, float] = field(default_factory=dict)
    place: Place = field(default_factory=Place)
    progress: Progress = field(default_factory=Progress)

    @property
    def judged(self) -> nn.Module:
        """The model that is evaluated and kept: the averaged one where there is one."""
        return self.model if self.average is None else self.average.module

    def unfreeze(self) -> None:
        """Train every parameter from now on; the optimiser keeps what it knows."""
        known = self.tensors(everywhere=True)
        self._train_everything()
        self._load(known)

    def _train_everything(self) -> None:
        self.step.parallel.close()
        norms = bool(self.config.freeze_norm)
        if not isinstance(self.model, RankModule):
            self.frozen = optimiser.freeze(self.model, "none", norms=norms)
        else:  # the code of a captured model depends on what is trained
            assert self.step.ranks is not None
            model = new_model(self.config, self.card)
            self.frozen = optimiser.freeze(model, "none", norms=norms)
            self._split(model, self.step.ranks)
        self.step.optimizer = optimiser.build_optimizer(self.model, self.config, self.rate_factors)
        self.step.parallel = _data_parallel(self.model, self.group, self.plan, self.step.ranks)

    def _split(self, model: nn.Module, ranks: Ranks) -> None:
        """Replace this rank's part of the model, and of the average, by that of `model`."""
        device = self.step.device
        self.model = _own_part(model, self.frozen, self.config, self.plan, ranks, device)
        self.step.model = self.step.forward = self.model
        if self.average is not None:
            self.average = optimiser.average(self.model, self.config.ema)

    def tensors(self, *, everywhere: bool = False) -> dict[str, Tensor]:
        """Return all tensors of a checkpoint, whole, on the ranks of the first replica.

        Each of those calls it; under dp=N:shard every rank, and there all get them.

        Args:
            everywhere: also on ranks that do not write.
        """
        tensors = {f"model.{k}": v for k, v in self.model.state_dict().items()}
        own = checkpoint.optimizer_tensors(self.model, self.step.optimizer)
        if self.plan.dp_kind == "shard":
            own = gather_named(own, self.step.parallel.group, everywhere=everywhere)
            if self.place.dp_rank and not everywhere:
                return {}
        tensors |= own
        if self.average is not None:
            tensors |= {f"ema.{k}": v for k, v in self.average.state_dict().items()}
        return checkpoint.whole_tensors(self.model, tensors, self.step.ranks, everywhere)

    @property
    def _has_part_of_checkpoint(self) -> bool:
        return self.place.dp_rank == 0 or self.plan.dp_kind == "shard"

    def save(self, folder: Path, saver: Saver, *, write: bool) -> None:
        """Copy the state, and let `saver` write the checkpoint and `weights/last.safetensors`.

        Args:
            write: True on the main rank. All other ranks call this too.
        """
        tensors = self.tensors() if self._has_part_of_checkpoint else {}
        if not write:
            return
        tensors = saver.copy(tensors)
        step, meta = self.progress.step, dataclasses.asdict(self.progress)
        judged = _under(tensors, "model." if self.average is None else "ema.module.")
        card = dataclasses.replace(self.card, epoch=self.progress.epoch)

        def job() -> None:
            checkpoint.save_checkpoint(folder / "state", step, tensors, meta)
            weights.save_weights(folder / "weights" / "last.safetensors", judged, card)

        saver.submit(job)

    def save_weights(
        self, path: Path, metrics: Mapping[str, float], saver: Saver, *, write: bool
    ) -> None:
        """Let `saver` write the judged model's weights with their card; `write` as of `save`."""
        judged = {f"model.{k}": v for k, v in self.judged.state_dict().items()}
        whole = checkpoint.whole_tensors(self.model, judged, self.step.ranks)
        if not write:
            return
        tensors = saver.copy(_under(whole, "model."))
        card = dataclasses.replace(self.card, epoch=self.progress.epoch, metrics=dict(metrics))
        saver.submit(lambda: weights.save_weights(path, tensors, card))

    def judge(self, tensors: Mapping[str, Tensor]) -> None:
        """Load the weights of a plain model into the judged one."""
        whole = {f"model.{k}": v for k, v in tensors.items()}
        own = _under(checkpoint.own_tensors(self.model, whole), "model.")
        weights.load_tensors(self.judged, own)

    def restore(self, folder: Path) -> None:
        """Continue from a checkpoint, whatever plan wrote it.

        Raises:
            RunError: it cannot be read, or does not fit the model.
        """
        tensors, meta = checkpoint.read_checkpoint(folder)
        known = {f.name for f in dataclasses.fields(Progress)}
        self.progress = Progress(**{k: v for k, v in meta.items() if k in known})
        if self.config.unfreeze_epoch and self.progress.epoch >= self.config.unfreeze_epoch - 1:
            self._train_everything()
        try:
            self._load(tensors)
        except RuntimeError as error:
            reason = " ".join(str(error).split())[:200]
            raise RunError(
                f"{folder}: does not fit the model of the run's config.toml; "
                f"was that edited? ({reason})"
            ) from None

    def _load(self, whole: Mapping[str, Tensor]) -> None:
        tensors = checkpoint.own_tensors(self.model, whole)
        weights.load_tensors(self.model, _under(tensors, "model."))
        if self.average is not None:
            weights.load_tensors(self.average, _under(tensors, "ema."))
        if self.step.parallel.updates_here:
            keeps = self.step.parallel.keeps_state_of
            checkpoint.load_optimizer(self.model, self.step.optimizer, tensors, keeps)


def _under(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}


def model_knobs(config: TrainConfig) -> dict[str, Any]:
    """Return what `create_model` takes besides the name and the number of classes."""
    knobs = parse_knobs(config.knobs)
    if config.dropout is not None:
        knobs["dropout"] = config.dropout
    if "auto" in knobs.values():  # a kernel size or branches that follow the feature map's size
        knobs.setdefault("input_size", config.input_size)
    return knobs


def make_card(config: TrainConfig, data: Data, start: InitialWeights | None = None) -> Card:
    """Return the card of a run, from its settings, its data and the weights it begins from."""
    card = Card(
        model=config.model,
        classes=data.classes,
        preprocess=Preprocess.for_data(data, config.input_size),
        task=config.task,
        settings=find_task(config.task).settings(config, data, weights.load_or_build),
        knobs=model_knobs(config),
        titles=dict(data.titles),
        data=config.data,
        channels_last=config.channels_last is not False,
    )
    return card if start is None else start.inherit(card)


def build_model(
    config: TrainConfig, card: Card, start: InitialWeights | None = None
) -> tuple[nn.Module, list[str], list[str]]:
    """Return the model as training starts, the names of frozen modules, and lines for the user.

    Args:
        start: the weights that the run begins from; the lines say which of them fit.
    """
    model = new_model(config, card)
    lines = [] if start is None else start.copy_into(model, card)
    return model, _freeze(model, config), lines


def _freeze(model: nn.Module, config: TrainConfig) -> list[str]:
    return optimiser.freeze(model, config.freeze or "none", norms=bool(config.freeze_norm))


def new_model(config: TrainConfig, card: Card) -> nn.Module:
    """Return the model with random weights, all of it to be trained."""
    return weights.build_model(card, config.model, seed=config.seed)


def build_state(
    config: TrainConfig,
    plan: Plan,
    card: Card,
    env: RankEnv,
    device: torch.device,
    group: dist.ProcessGroup,
    start: Mapping[str, Tensor] | None = None,
    mesh: DeviceMesh | None = None,
) -> TrainState:
    """Build the model, its optimiser and its parallel parts, in the order in which they apply.

    Args:
        group: the ranks of the plan.
        start: the tensors that the run begins with; None is random ones.
        mesh: of the plan, where it has fewer ranks than were launched.
    """
    model = new_model(config, card)
    if start is not None:
        weights.load_tensors(model, start)
    frozen = _freeze(model, config)
    model.to(device)
    if card.channels_last:
        _to_channels_last(model)
    broadcast_from_main(model, group)
    factors = optimiser.rate_factors(model, config)
    ranks = join_ranks(plan, env, device, mesh)
    draw_state = DrawState() if ranks is None else ranks.draw_state
    draw_state.to(device)
    task = make_task(card, label_smoothing=config.label_smoothing or 0.0)
    if ranks is not None and task.name not in STEPS:
        model = _own_part(model, frozen, config, plan, ranks, device)
    average = optimiser.average(model, config.ema) if config.ema else None
    if not isinstance(model, RankModule):  # of one rank, or of a step that runs parts of it
        synchronise_batch_norm(model, ranks.over_dp if ranks else GroupExchange(group))
        key_dropout(model, draw_state)
    step = STEPS.get(task.name, Step)(
        model=model,
        forward=model,
        optimizer=optimiser.build_optimizer(model, config, factors),
        parallel=_data_parallel(model, group, plan, ranks),
        task=task,
        preprocess=card.preprocess,
        augment=augment_config(config),
        device=device,
        precision=config.precision,
        channels_last=card.channels_last,
        num_micro_batches=num_micro_batches(config, plan),
        clip_norm=config.clip_norm or 0.0,
        ranks=ranks,
        draw_state=draw_state,
    )
    state = TrainState(config, card, model, average, frozen, step, group, plan, factors)
    state.place = place_of(plan, env)
    return state


def _own_part(
    model: nn.Module,
    frozen: list[str],
    config: TrainConfig,
    plan: Plan,
    ranks: Ranks,
    device: torch.device,
) -> RankModule:
    """Return this rank's part of a whole model."""
    split = split_model(model, frozen, config, plan, device, ranks)
    if config.channels_last is not False:
        _to_channels_last(split)
    return split


def _data_parallel(
    model: nn.Module, group: dist.ProcessGroup, plan: Plan, ranks: Ranks | None
) -> DataParallel:
    mode = MODES[plan.dp_kind]
    if ranks is None or not isinstance(model, RankModule):
        return DataParallel(model, group, mode)
    return DataParallel(model, ranks.dp, mode, terms=model.summed_over_tp, every=ranks.every)


def _to_channels_last(model: nn.Module) -> None:
    """Convert 4-d parameters and buffers; others (1-d and 3-d convolutions) stay."""
    for tensor in (*model.parameters(), *model.buffers()):
        if tensor.ndim == 4:
            tensor.data = tensor.data.contiguous(memory_format=torch.channels_last)
