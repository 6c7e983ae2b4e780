"""Everything that changes while a run trains: built from its settings, saved, restored."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from meshuffle.data import AugmentConfig, Data, Preprocess
from meshuffle.dist.exchange import make_exchange
from meshuffle.dist.group import RankEnv
from meshuffle.errors import ConfigError, RunError
from meshuffle.models import create_model
from meshuffle.parallel.batch_norm import synchronise_batch_norm
from meshuffle.parallel.data_parallel import DataParallel, Mode, broadcast_from_main
from meshuffle.planner.plan import Plan
from meshuffle.train import checkpoint, optim, weights
from meshuffle.train.config import TrainConfig, parse_knobs
from meshuffle.train.step import Step
from meshuffle.train.task import Classify

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


@dataclass
class Progress:
    """Where a run stands; plain numbers, stored beside the tensors.

    `epoch` and `epoch_step` count what is finished; `sums` are [loss, correct, samples] of the
    current epoch so far, over all ranks.
    """

    step: int = 0
    epoch: int = 0
    epoch_step: int = 0
    seconds: float = 0.0
    epoch_seconds: float = 0.0
    sums: list[float] = field(default_factory=lambda: [0.0, 0.0, 0.0])
    highest_top1: float = -1.0
    best_top1: float = -1.0  # of the epoch kept as best
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
    card: weights.Card
    model: nn.Module
    average: AveragedModel | None
    frozen: list[str]
    step: Step
    group: dist.ProcessGroup
    plan: Plan
    progress: Progress = field(default_factory=Progress)

    @property
    def judged(self) -> nn.Module:
        """The model that is evaluated and kept: the averaged one where there is one."""
        return self.model if self.average is None else self.average.module

    def unfreeze(self) -> None:
        """Train every parameter from now on; the optimiser keeps what it knows."""
        known = checkpoint.optimizer_tensors(self.model, self.step.optimizer)
        self.frozen = optim.freeze(self.model, "none")
        self._rebuild_training()
        checkpoint.load_optimizer(self.model, self.step.optimizer, known)

    def _rebuild_training(self) -> None:
        self.step.parallel.close()
        self.step.optimizer = optim.build_optimizer(self.model, self.config)
        self.step.parallel = _data_parallel(self.model, self.group, self.plan)

    def save(self, folder: Path) -> None:
        """Write the checkpoint and `weights/last.safetensors`; only for the main rank."""
        tensors = {f"model.{k}": v for k, v in self.model.state_dict().items()}
        tensors |= checkpoint.optimizer_tensors(self.model, self.step.optimizer)
        if self.average is not None:
            tensors |= {f"ema.{k}": v for k, v in self.average.state_dict().items()}
        meta = dataclasses.asdict(self.progress)
        checkpoint.save_checkpoint(folder / "state", self.progress.step, tensors, meta)
        self.save_weights(folder / "weights" / "last.safetensors", {})

    def save_weights(self, path: Path, metrics: Mapping[str, float]) -> None:
        """Write the judged model's weights with their card."""
        epoch = self.progress.epoch
        card = dataclasses.replace(self.card, epoch=epoch, metrics=dict(metrics))
        weights.save_weights(path, self.judged.state_dict(), card)

    def restore(self, folder: Path) -> None:
        """Continue from the newest checkpoint of the run folder."""
        tensors, meta = checkpoint.latest_checkpoint(folder / "state")
        known = {f.name for f in dataclasses.fields(Progress)}
        self.progress = Progress(**{k: v for k, v in meta.items() if k in known})
        if self.config.unfreeze_epoch and self.progress.epoch >= self.config.unfreeze_epoch - 1:
            self.frozen = optim.freeze(self.model, "none")
            self._rebuild_training()
        try:
            self.model.load_state_dict(_under(tensors, "model."))
            if self.average is not None:
                self.average.load_state_dict(_under(tensors, "ema."))
        except RuntimeError as error:
            reason = " ".join(str(error).split())[:200]
            raise RunError(
                f"{folder}: its checkpoint does not fit the model of its config.toml; "
                f"was that edited? ({reason})"
            ) from None
        if self.step.parallel.updates_here:
            checkpoint.load_optimizer(self.model, self.step.optimizer, tensors)


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


def make_card(config: TrainConfig, data: Data) -> weights.Card:
    """Return the card of a run: from its settings and its data."""
    preprocess = Preprocess.for_data(data, config.input_size)
    if config.from_:
        preprocess = _inherited(config, preprocess)
    return weights.Card(
        model=config.model,
        classes=data.classes,
        preprocess=preprocess,
        task=config.task,
        knobs=model_knobs(config),
        titles=dict(data.titles),
        data=config.data,
    )


def _inherited(config: TrainConfig, preprocess: Preprocess) -> Preprocess:
    """Return the numbers that the weights of `--from` were trained with, at this run's size."""
    _, card = weights.read_weights(weights.find_weights(Path(config.from_ or "")))
    if card is None:
        return preprocess
    return dataclasses.replace(card.preprocess, crop=preprocess.crop, resize=preprocess.resize)


def build_model(config: TrainConfig, card: weights.Card) -> tuple[nn.Module, list[str], list[str]]:
    """Return the model as training starts, the names that are frozen, and lines to tell."""
    model = create_model(card.model, num_classes=len(card.classes), seed=config.seed, **card.knobs)
    lines = _start_from(model, config.from_) if config.from_ else []
    return model, optim.freeze(model, config.freeze), lines


def build_state(
    config: TrainConfig,
    plan: Plan,
    card: weights.Card,
    env: RankEnv,
    device: torch.device,
    group: dist.ProcessGroup,
) -> tuple[TrainState, list[str]]:
    """Build the model, its optimiser and its parallel parts, in the order in which they apply.

    Returns the state, and lines to tell the user about weights that did not fit.
    """
    model, frozen, lines = build_model(config, card)
    model.to(device)
    if config.channels_last:
        _to_channels_last(model)
    average = optim.average(model, config.ema) if config.ema else None
    one_host = env.local_world >= env.world
    synchronise_batch_norm(model, make_exchange(group, device, one_host))
    broadcast_from_main(model, group)
    step = Step(
        model=model,
        forward=model,
        optimizer=optim.build_optimizer(model, config),
        parallel=_data_parallel(model, group, plan),
        task=Classify(len(card.classes), config.label_smoothing),
        preprocess=card.preprocess,
        augment=augment_config(config),
        device=device,
        precision=config.precision,
        channels_last=config.channels_last,
        num_micro_batches=config.accumulate,
        clip_norm=config.clip_norm or 0.0,
    )
    return TrainState(config, card, model, average, frozen, step, group, plan), lines


def _data_parallel(model: nn.Module, group: dist.ProcessGroup, plan: Plan) -> DataParallel:
    mode: Mode = "central" if plan.dp_kind == "central" else "replicate"
    return DataParallel(model, group, mode)


def _to_channels_last(model: nn.Module) -> None:
    """Convert 4-d parameters and buffers; others (1-d and 3-d convolutions) stay."""
    for tensor in (*model.parameters(), *model.buffers()):
        if tensor.ndim == 4:
            tensor.data = tensor.data.contiguous(memory_format=torch.channels_last)


def _start_from(model: nn.Module, target: str) -> list[str]:
    """Copy the weights that fit; return lines that list what did not."""
    path = weights.find_weights(Path(target))
    tensors, _ = weights.read_weights(path)
    missing, unexpected, reshaped = weights.load_matching(model, tensors)
    num_loaded = len(tensors) - len(unexpected) - len(reshaped)
    if not num_loaded:
        raise ConfigError(f"--from {target}: none of its {len(tensors)} tensors fits the model")
    lines = [f"loaded {num_loaded} of {len(tensors)} tensors from {path}"]
    for what, names in (("new", missing), ("left out", unexpected), ("other shape", reshaped)):
        if names:
            lines.append(f"  {what}: {', '.join(names[:6])}{' …' if len(names) > 6 else ''}")
    return lines
