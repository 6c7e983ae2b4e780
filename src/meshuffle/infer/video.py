"""Predict every frame of a video: an annotated copy, a row per frame, and how fast that went.

video ──frames──▶ batches ──▶ network ──▶ task.answer ──▶ rows of a CSV, and frames of an MP4
"""

from __future__ import annotations

import contextlib
import csv
import itertools
import json
import time
from collections.abc import Callable, Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from meshuffle.comm.device import pick_device
from meshuffle.data import Batch
from meshuffle.errors import ConfigError, DataError
from meshuffle.files import replaced
from meshuffle.infer.evaluation import evaluate_batches
from meshuffle.tasks import make_task
from meshuffle.weights import load_model

SUFFIXES = frozenset({".avi", ".m4v", ".mkv", ".mov", ".mp4", ".mpeg", ".mpg", ".webm", ".wmv"})
_BATCH = 16  # frames at a time; more is no faster, and 16 of 4K are 400 MB
_EVERY_S = 5.0  # seconds between two lines of progress
_TICK = Fraction(1, 90_000)  # seconds; the unit of MPEG's clock


def is_video(path: Path) -> bool:
    """Whether the name is that of a video file."""
    return path.suffix.lower() in SUFFIXES and not path.is_dir()


def predict_video(
    target: Path,
    video: Path,
    out: Path,
    *,
    model: str | None = None,
    progress: Callable[[str], None] = lambda line: None,
) -> dict[str, Any]:
    """Write `OUT/NAME-predicted.mp4` and `OUT/NAME-predicted.csv`, and return what was done.

    The CSV has a row per frame: `frame` from 0, `seconds` from the start of the video, `text`, the
    prediction in words, and its values, lists as JSON. The copy has the frames' times and no sound.

    Args:
        target: a run folder or a weights file.
        progress: is given a line every few seconds.

    Returns:
        `file`, `video`, `csv`, `frames`, `damaged`, the packets that could not be decoded, `rate`,
        the frames per second of the video, and `frames_per_second`, those that were predicted:
        decoding, network, drawing and encoding together.

    Raises:
        ConfigError: PyAV is not installed. DataError: no video, or one without a frame.
    """
    film = Film(video)
    network, card = load_model(target, model)
    task, device = make_task(card), pick_device()
    network = task.answering(network).to(device)
    picture, table = (out / f"{video.stem}-predicted{suffix}" for suffix in (".mp4", ".csv"))
    frames, num, began, said = film.frames(), 0, time.monotonic(), time.monotonic()
    with replaced(picture) as mp4, replaced(table) as text, contextlib.ExitStack() as files:
        rows = csv.writer(files.enter_context(text.open("w", newline="", encoding="utf-8")))
        copy = files.enter_context(Copy(mp4, film.rate))
        while batch := list(itertools.islice(frames, _BATCH)):
            images = torch.stack([card.preprocess.to_uint8(image) for _, image in batch])
            places = torch.arange(len(batch))
            asked = Batch(images, places, places, places, places, [])
            found = evaluate_batches(
                *(network, [asked], task, card.preprocess, device),
                labelled=False,
                channels_last=card.channels_last,
            )
            for i, (seconds, image) in enumerate(batch):
                prediction = task.prediction(found.rows, i, image.size)
                if not num:
                    rows.writerow(["frame", "seconds", "text", *prediction])
                words = task.sentence(prediction)
                rows.writerow(
                    [num, f"{float(seconds):.6f}", words, *map(_cell, prediction.values())]
                )
                copy.add(seconds, task.frame(image, found.rows, i))
                num += 1
            if time.monotonic() - said > _EVERY_S:
                said = time.monotonic()
                progress(f"{video}: frame {num}{film.of}, {num / (said - began):.1f} frames/s")
        if not num:
            raise DataError(f"{video}: none of its frames can be decoded")
    speed = num / (time.monotonic() - began)
    return {
        "file": str(video), "video": str(picture), "csv": str(table), "frames": num,
        "damaged": film.damaged, "rate": round(float(film.rate), 3),
        "frames_per_second": round(speed, 1),
    }  # fmt: skip


def _cell(value: Any) -> Any:
    return json.dumps(value) if isinstance(value, list | dict) else value


class Film:
    """The frames of a video file.

    Attributes:
        rate: frames per second, on average. of: ` of N` where the file says how many there are.
        damaged: packets that could not be decoded so far.
    """

    def __init__(self, path: Path) -> None:
        try:
            import av
        except ImportError:
            raise ConfigError(f"{path}: videos need PyAV: pip install 'meshuffle[video]'") from None
        self.path, self.damaged = path, 0
        if not path.exists():
            raise DataError(f"{path}: no such file")
        try:
            self._file = av.open(str(path))
        except av.FFmpegError as error:
            raise DataError(f"{path}: FFmpeg cannot read this video ({error.strerror})") from None
        if not self._file.streams.video:
            raise DataError(f"{path}: there is no video in this file")
        self._stream = self._file.streams.video[0]
        self._stream.thread_type = "AUTO"
        self.rate = self._stream.average_rate or Fraction(25)
        self.of = f" of {self._stream.frames}" if self._stream.frames else ""

    def frames(self) -> Iterator[tuple[Fraction, Image.Image]]:
        """Yield (seconds from the first frame, RGB image the right way up), in the order shown."""
        import av

        first: int | None = None
        last = -1 / self.rate
        for packet in self._file.demux(self._stream):
            try:
                decoded = packet.decode()
            except av.FFmpegError:
                self.damaged += 1
                continue
            for frame in decoded:
                shown = last + 1 / self.rate
                if frame.pts is not None and frame.time_base is not None:
                    first = frame.pts if first is None else first
                    shown = (frame.pts - first) * frame.time_base
                last = max(last + _TICK, shown)
                pixels = frame.to_ndarray(format="rgb24")
                yield last, Image.fromarray(np.rot90(pixels, round(frame.rotation / 90)).copy())


class Copy:
    """An MP4 file that is written frame by frame: H.264 without sound."""

    def __init__(self, path: Path, rate: Fraction) -> None:
        import av

        self._file = av.open(str(path), "w", format="mp4")
        self._stream = self._file.add_stream("libx264", rate, {"preset": "veryfast"})
        self._stream.pix_fmt = "yuv420p"
        self._size: tuple[int, int] | None = None

    def __enter__(self) -> Copy:
        return self

    def __exit__(self, *error: object) -> None:
        if self._size is not None:
            self._file.mux(self._stream.encode())
        self._file.close()

    def add(self, seconds: Fraction, image: Image.Image) -> None:
        """Write a frame; the first one's size is the copy's, less an odd row or column."""
        import av

        if self._size is None:
            self._size = (image.width // 2 * 2, image.height // 2 * 2)
            self._stream.width, self._stream.height = self._size
            self._stream.codec_context.time_base = _TICK
        width, height = self._size
        if (image.width // 2 * 2, image.height // 2 * 2) != self._size:
            image = image.resize(self._size)  # the video changes its size
        frame = av.VideoFrame.from_image(image.crop((0, 0, width, height)))
        frame.pts, frame.time_base = round(seconds / _TICK), _TICK
        self._file.mux(self._stream.encode(frame))
