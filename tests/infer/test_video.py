"""Videos: every frame is predicted as the image that it is."""

from __future__ import annotations

import csv
import json
import struct
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from meshuffle.cli import main
from meshuffle.data import Preprocess
from meshuffle.errors import ConfigError, DataError
from meshuffle.infer.predict import predict
from meshuffle.infer.video import Film, is_video, predict_video
from meshuffle.tasks import make_task
from meshuffle.tasks.card import Card
from meshuffle.weights import save_weights
from tests.conftest import SMALL

SETTINGS = {
    "regress": {"mean": [5.0, 7.0], "std": [2.0, 3.0]},
    "detect": {"head": "ssdlite"},
    "segment": {"head": "lraspp"},
}
av = pytest.importorskip("av")


def write_video(path: Path, num: int, *, size: tuple[int, int] = (64, 48), fps: int = 30) -> Path:
    """Write a lossless video of a square that moves, red on blue."""
    with av.open(str(path), "w") as file:
        stream = file.add_stream("ffv1", Fraction(fps))
        stream.width, stream.height, stream.pix_fmt = *size, "bgr0"
        for i in range(num):
            pixels = np.full((size[1], size[0], 3), (0, 0, 200), np.uint8)
            pixels[10:30, i : i + 20] = (200, 10 * i % 255, 0)
            file.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        file.mux(stream.encode())
    return path


def weights_of(folder: Path, task: str) -> Path:
    knobs = {"width": 0.25, "depths": [1, 1, 1], "head_channels": 32}
    assert knobs.keys() == SMALL.keys()
    card = Card(
        *("shufflenet_v2_x0_5", ("ant", "bee"), Preprocess(crop=32, resize=32)),
        task=task,
        knobs=knobs,
        settings=SETTINGS.get(task, {}),
    )
    path = folder / f"{task}.safetensors"
    save_weights(path, make_task(card).network(seed=1).state_dict(), card)
    return path


def rows_of(path: str) -> list[dict[str, str]]:
    with Path(path).open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def test_every_frame_is_predicted_as_an_image(tmp_path: Path) -> None:
    weights, video = weights_of(tmp_path, "classify"), write_video(tmp_path / "ants.mkv", 20)
    lines: list[str] = []
    told = predict_video(weights, video, tmp_path / "out", progress=lines.append)
    images = []
    for i, (_, image) in enumerate(Film(video).frames()):
        images.append(tmp_path / f"{i:02d}.png")
        image.save(images[-1])
    alone = predict(weights, images)
    rows = rows_of(told["csv"])
    assert [row["text"] for row in rows] == [one["text"] for one in alone]
    found = [float(row["probability"]) for row in rows]
    np.testing.assert_allclose(found, [one["probability"] for one in alone], rtol=1e-4)
    assert json.loads(rows[0]["top"])[0]["label"] == rows[0]["label"]
    assert [row["frame"] for row in rows] == [str(i) for i in range(20)]
    assert float(rows[-1]["seconds"]) == pytest.approx(19 / 30, abs=1e-3)
    assert told["frames"] == 20 and told["rate"] == 30 and told["damaged"] == 0
    with av.open(told["video"]) as copy:
        frames = list(copy.decode(video=0))
    assert len(frames) == 20 and (frames[0].width, frames[0].height) == (384, 288)
    assert float(frames[-1].time) == pytest.approx(19 / 30, abs=1e-3)


@pytest.mark.parametrize("task", ["regress", "detect", "segment", "multilabel"])
def test_all_tasks_draw_frames_of_one_size(tmp_path: Path, task: str) -> None:
    video = write_video(tmp_path / "v.mkv", 3, size=(65, 49))  # odd
    told = predict_video(weights_of(tmp_path, task), video, tmp_path)
    with av.open(told["video"]) as copy:
        assert len({(f.width, f.height) for f in copy.decode(video=0)}) == 1
    assert len(rows_of(told["csv"])) == 3


def test_a_phone_held_upright(tmp_path: Path) -> None:
    """Phones store the frame lying, and in the track's header the matrix that turns it."""
    path = tmp_path / "v.mp4"
    with av.open(str(path), "w") as file:
        stream = file.add_stream("mpeg4", Fraction(30))
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        pixels = np.zeros((48, 64, 3), np.uint8)
        pixels[:, :32] = 255  # the left half is bright
        file.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        file.mux(stream.encode())
    content = bytearray(path.read_bytes())
    matrix = content.index(b"tkhd") + 44
    turned = struct.pack(">9i", 0, 1 << 16, 0, -1 << 16, 0, 0, 0, 0, 1 << 30)  # clockwise
    content[matrix : matrix + 36] = turned
    path.write_bytes(content)
    _, image = next(Film(path).frames())
    shown = np.asarray(image)
    assert shown.shape == (64, 48, 3)
    assert shown[:20].mean() > 200 and shown[-20:].mean() < 50  # left is above


def test_a_damaged_video_is_said(tmp_path: Path) -> None:
    video = write_video(tmp_path / "v.mkv", 12)
    content = bytearray(video.read_bytes())
    middle = len(content) // 2
    content[middle : middle + 400] = bytes(400)
    video.write_bytes(content)
    told = predict_video(weights_of(tmp_path, "classify"), video, tmp_path)
    assert 0 < told["frames"] <= 12
    assert told["damaged"] > 0 or told["frames"] < 12


def test_what_is_no_video(tmp_path: Path) -> None:
    weights = weights_of(tmp_path, "classify")
    (tmp_path / "note.mp4").write_text("no video")
    with pytest.raises(DataError, match=r"note.mp4: FFmpeg cannot read this video \(Invalid"):
        predict_video(weights, tmp_path / "note.mp4", tmp_path)
    with pytest.raises(DataError, match=r"gone.mp4: no such file"):
        predict_video(weights, tmp_path / "gone.mp4", tmp_path)
    assert not list(tmp_path.glob("*predicted*"))
    assert is_video(Path("A.MOV")) and not is_video(Path("a.jpg"))


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    weights, video = weights_of(tmp_path, "classify"), write_video(tmp_path / "v.mkv", 3)
    out = tmp_path / "drawn"
    assert main(["predict", str(weights), str(video), "--out", str(out)]) == 0
    assert "3 frames; " in capsys.readouterr().out
    assert sorted(path.name for path in out.iterdir()) == ["v-predicted.csv", "v-predicted.mp4"]
    image = tmp_path / "a.png"
    Image.new("RGB", (8, 8)).save(image)
    assert main(["predict", str(weights), str(video), str(image)]) == 2
    assert "v.mkv is a video and" in capsys.readouterr().err
    assert main(["predict", str(weights), str(video), "--plan", "dp=2"]) == 2
    assert "a video is predicted by one process" in capsys.readouterr().err


def test_without_pyav(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "av", None)
    with pytest.raises(ConfigError, match=r"pip install 'meshuffle\[video\]'"):
        predict_video(tmp_path, tmp_path / "v.mp4", tmp_path)
