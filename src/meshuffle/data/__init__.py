"""Data sets, exact sharded sampling, the preprocessing object, augmentation and `check`."""

from meshuffle.data.augment import AugmentConfig, EvalTransform, TrainTransform, augmentation_for
from meshuffle.data.base import ArraySource, Data, ImageSource, View, relabel, subset
from meshuffle.data.check import CheckReport, check_data
from meshuffle.data.dense import build_eval_transform, build_train_transform
from meshuffle.data.image import decode_image
from meshuffle.data.loader import (
    Batch,
    SkipLog,
    auto_workers,
    eval_loader,
    prepare_workers,
    train_loader,
)
from meshuffle.data.mix import mix_batch
from meshuffle.data.preprocess import Preprocess
from meshuffle.data.sampler import EpochSampler, SampleKey, shard_bounds
from meshuffle.data.source import FORMATS, open_data

__all__ = [
    "FORMATS",
    "ArraySource",
    "AugmentConfig",
    "Batch",
    "CheckReport",
    "Data",
    "EpochSampler",
    "EvalTransform",
    "ImageSource",
    "Preprocess",
    "SampleKey",
    "SkipLog",
    "TrainTransform",
    "View",
    "augmentation_for",
    "auto_workers",
    "build_eval_transform",
    "build_train_transform",
    "check_data",
    "decode_image",
    "eval_loader",
    "mix_batch",
    "open_data",
    "prepare_workers",
    "relabel",
    "shard_bounds",
    "subset",
    "train_loader",
]
