"""The report: what it shows, what it survives, and that nothing in it can act."""

from __future__ import annotations

import base64
import dataclasses
import doctest
import io
import json
import re
from html.parser import HTMLParser
from pathlib import Path

import matplotlib as mpl
import numpy as np
import pytest
from PIL import Image

from meshuffle.data import ArraySource, Preprocess
from meshuffle.errors import ImageError
from meshuffle.infer.evaluation import Evaluation
from meshuffle.report import page, plots, record
from meshuffle.report.report import write_report
from meshuffle.tasks import make_task
from meshuffle.tasks.card import Card

HOSTILE = "<script>alert(1)</script>"
ATTRIBUTE = '"><img src="http://example.com/x" onerror="alert(1)">'
COLUMNS = (
    "epoch,step,lr,train_loss,train_top1,val_loss,val_top1,val_top5,images_per_s,data_wait,seconds"
)


class Page(HTMLParser):
    """What a browser would see: elements, their attributes, and the text."""

    VOID = frozenset({"meta", "img", "source"})

    def __init__(self, content: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self.open: list[str] = []
        self.feed(content)
        assert not self.open, f"not closed: {self.open}"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] != "style":
            self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())

    def count(self, tag: str, **attributes: str) -> int:
        return sum(t == tag and attributes.items() <= a.items() for t, a in self.tags)

    @property
    def addresses(self) -> list[str]:
        keys = ("src", "srcset", "href", "action", "data")
        return [value or "" for _, attrs in self.tags for k, value in attrs.items() if k in keys]


class Broken(ArraySource):
    def image(self, index: int) -> Image.Image:
        if index % 2:
            raise ImageError(f"{self.name(index)}: broken")
        return super().image(index)


def make_source(num_images: int, names: tuple[str, ...], kind: type = ArraySource) -> ArraySource:
    pixels = np.random.default_rng(0).integers(0, 256, (num_images, 8, 8), np.uint8)
    labels = np.arange(num_images) % len(names)
    return kind("digits", names, pixels, labels)


def make_evaluation(source: ArraySource, wrong: tuple[int, ...] = ()) -> Evaluation:
    """All right, except for `wrong`, whose loss grows with the index."""
    num_classes, labels = len(source.classes), source.labels
    top = min(5, num_classes)
    likeliest = (labels[:, None] + np.arange(top)) % num_classes
    losses = np.full(len(labels), 0.01, np.float32)
    for index in wrong:
        likeliest[index] = np.roll(likeliest[index], 1 if top == num_classes else -1)
        losses[index] = 1 + index / 100
    probabilities = np.tile(np.linspace(0.9, 0.01, top, dtype=np.float32), (len(labels), 1))
    indices = np.arange(len(labels))
    rows = {
        "labels": labels,
        "losses": losses,
        "top_classes": likeliest,
        "top_probabilities": probabilities,
    }
    metrics = make_task(make_card(source.classes)).conclude(rows) if len(labels) else {}
    loss = {"loss": float(losses.mean())} if len(labels) else {}
    return Evaluation("classify", source.classes, indices, rows, {**metrics, **loss})


def make_card(names: tuple[str, ...], **values: object) -> Card:
    given = {"model": "shufflenet_v2_x0_5", "data": "digits", **values}
    return Card(classes=names, preprocess=Preprocess(crop=48, resize=48), **given)  # type: ignore[arg-type]


def fill_run(run: Path) -> None:
    """What a finished run of three epochs leaves."""
    rows = [COLUMNS]
    rows += [
        f"{e},{10 * e},0.1,{2 / e},{30 * e},{3 / e},{31 * e},99,1234.5,0,2.5" for e in (1, 2, 3)
    ]
    (run / "metrics.csv").write_text("\n".join(rows) + "\n")
    steps = [
        {"kind": "step", "step": s, "epoch": 1 + s // 10, "loss": 2 / (s + 1), "lr": 0.1,
         "images_per_s": 1000 + s, "time": 1.7e9 + s}
        for s in range(30)
    ]  # fmt: skip
    events = [
        {"kind": "event", "text": "epoch 1/3  loss 2.0", "time": 1.7e9},
        {"kind": "event", "text": f"plan auto takes dp=2 {HOSTILE}", "time": 1.7e9},
    ]
    (run / "log.jsonl").write_text("\n".join(json.dumps(line) for line in steps + events))
    (run / "plan.json").write_text(json.dumps({"text": "dp=2,threads=1", "dp": 2}))
    (run / "env.json").write_text(
        json.dumps({"torch": "2.15", "host": {"gpus": [], "at": HOSTILE}})
    )
    (run / "config.toml").write_text(f"epochs = 3  # flag\nname = '{HOSTILE}'\n")
    result = {
        "splits": {
            "val": {"top1": 93.0, "top5": 99.0, "loss": 1.0},
            "test": {"top1": 97.5, "top5": 100.0, "loss": 0.25},
        },
        "skipped_inputs": 0, "measured_step_ms": 41.7, "predicted_step_ms": None, "best_epoch": 2,
    }  # fmt: skip
    (run / "result.json").write_text(json.dumps(result))


DIGITS = tuple("0123456789")


@pytest.fixture
def run(tmp_path: Path) -> Path:
    folder = tmp_path / "runs" / "a-1"
    folder.mkdir(parents=True)
    return folder


def report(run: Path, source: ArraySource, wrong: tuple[int, ...] = (), **card: object) -> Page:
    evaluation = make_evaluation(source, wrong)
    path = write_report(run, evaluation, source, make_card(source.classes, **card), split="test")
    return Page(path.read_text(encoding="utf-8"))


def test_a_finished_run_shows_all_of_it(run: Path) -> None:
    fill_run(run)
    before = dict(mpl.rcParams)
    shown = report(run, make_source(60, DIGITS), wrong=tuple(range(20)))
    assert dict(mpl.rcParams) == before
    for words in (
        "shufflenet_v2_x0_5 on digits", "test top-1 66.67 %", "val top-1 93.00 %",
        "epochs 3 best: 2", "training time 7.5 s", "images per second 1,234",
        "20 of 60 images wrong, the 16 with the highest loss", "dp=2,threads=1",
        "measured step 41.7 ms", "host.gpus none", "epochs = 3  # flag".replace("  ", " "),
        "plan auto takes dp=2",
    ):  # fmt: skip
        assert words in shown.text, words
    assert "not recorded" not in shown.text
    assert "epoch 1/3" not in shown.text
    assert shown.count("picture") == 4
    assert shown.count("figure") == 32


def test_it_is_one_small_file_that_loads_and_runs_nothing(run: Path) -> None:
    fill_run(run)
    shown = report(run, make_source(60, DIGITS), wrong=(1, 2))
    assert all(address.startswith("data:image/") for address in shown.addresses)
    assert not {"script", "link", "iframe", "object", "form", "a"} & {tag for tag, _ in shown.tags}
    policy = next(a["content"] for t, a in shown.tags if t == "meta" and "http-equiv" in a)
    assert policy is not None and policy.startswith("default-src 'none'")
    assert (run / "report.html").stat().st_size < 1_000_000
    assert [path.name for path in run.iterdir() if path.name.endswith(".tmp")] == []


def test_the_plots_are_files_too(run: Path) -> None:
    fill_run(run)
    report(run, make_source(60, DIGITS))
    names = ["accuracy", "confusion", "learning_rate", "loss", "throughput"]
    assert sorted(path.stem for path in (run / "plots").iterdir()) == names
    for path in (run / "plots").iterdir():
        with Image.open(path) as image:
            assert image.format == "PNG" and image.width > 600


def test_an_empty_folder_is_reported_as_not_recorded(run: Path) -> None:
    shown = report(run, make_source(20, DIGITS))
    for words in (
        "test top-1 100.00 %", "Training not recorded", "epochs – not recorded",
        "training time – not recorded", "Plan not recorded", "Environment not recorded",
        "Configuration not recorded", "No mistake on 20 images",
    ):  # fmt: skip
        assert words in shown.text, words


def test_a_run_stopped_in_its_first_epoch_shows_its_steps(run: Path) -> None:
    fill_run(run)
    (run / "metrics.csv").write_text(COLUMNS + "\n")
    (run / "result.json").unlink()
    half_a_line = (run / "log.jsonl").read_text()[:-20]
    (run / "log.jsonl").write_text(half_a_line)
    shown = report(run, make_source(20, DIGITS))
    assert shown.count("picture") == 3
    assert "not recorded: top-1 accuracy" in shown.text
    assert "training time 29 s" in shown.text


@pytest.mark.parametrize(
    "name", ["metrics.csv", "log.jsonl", "plan.json", "env.json", "result.json"]
)
@pytest.mark.parametrize(
    "content", [b"\xff\xfe\0garbage", b"[1, 2", b'{"splits": 3}', b"3,nan,,x\n4"]
)
def test_a_broken_record_is_no_reason_to_fail(run: Path, name: str, content: bytes) -> None:
    (run / name).write_bytes(content)
    found = record.read_record(run)
    assert found.splits == {}
    assert found.seconds is None
    assert all(
        chart.is_empty for chart in plots.training_charts(found, make_task(make_card(DIGITS)))
    )


def test_names_from_outside_appear_as_text(run: Path) -> None:
    fill_run(run)
    names = (HOSTILE, ATTRIBUTE, "$x^$", "蟻", "a\nb", "r\u202egnp", "\udcff")
    plain = make_source(14, names)
    source = ArraySource(f"folder/{ATTRIBUTE}", names, plain.pixels, plain.labels)
    shown = report(run, source, wrong=(0, 1), data=ATTRIBUTE, model=HOSTILE)
    assert shown.count("img") == 4 + 2 + 14  # curves, mistakes, samples: none from a name
    assert shown.count("script") == 0
    assert not any(key.startswith("on") for _, attrs in shown.tags for key in attrs)
    for printed in (HOSTILE, ATTRIBUTE, "$x^$", "蟻", r"a\nb", r"r\u202egnp", r"\udcff"):
        assert shown.text.count(printed) > 2, printed
    configuration = shown.text.partition("Environment")[2]
    assert configuration.count(HOSTILE) == 3  # from env.json, log.jsonl and config.toml


def test_an_image_that_cannot_be_read_gets_a_placeholder(run: Path) -> None:
    shown = report(run, make_source(12, DIGITS, Broken), wrong=(1, 2))
    assert shown.text.count("cannot be read") == 1 + 6


def test_worst_mistakes_come_first(run: Path) -> None:
    shown = report(run, make_source(60, DIGITS), wrong=tuple(range(20)))
    mistakes = shown.text.partition("Worst mistakes")[2].partition("Sample predictions")[0]
    shown_indices = [int(i) for i in re.findall(r"digits\[(\d+)\]", mistakes)]
    assert shown_indices == list(range(19, 3, -1))
    assert "is 9 30.4 %" in mistakes  # e^-1.19


def test_samples_are_the_same_each_time(run: Path) -> None:
    source = make_source(60, DIGITS)
    first, second = report(run, source).text, report(run, source).text
    assert re.findall(r"digits\[\d+\]", first) == re.findall(r"digits\[\d+\]", second)
    assert len(set(re.findall(r"digits\[\d+\]", first))) == 16


def test_a_loss_that_is_not_a_number_is_shown_all_the_same(run: Path) -> None:
    fill_run(run)
    source = make_source(20, DIGITS)
    evaluation = make_evaluation(source, wrong=(3, 4))
    evaluation.rows["losses"][3] = np.nan
    (run / "log.jsonl").write_text('{"kind": "step", "step": 1, "loss": NaN, "lr": 1e-3}\n')
    path = write_report(run, evaluation, source, make_card(DIGITS))
    assert "digits[3]" in path.read_text(encoding="utf-8")


def test_no_readable_image_at_all(run: Path) -> None:
    empty = ArraySource("none", DIGITS, np.zeros((0, 8, 8), np.uint8), np.zeros(0, np.int64))
    shown = report(run, empty)
    assert "Confusion on the test split not recorded" in shown.text
    assert "top-1 – not recorded" in shown.text


def test_many_classes_become_a_table_of_pairs(run: Path) -> None:
    names = tuple(f"class {i}" for i in range(50))
    shown = report(run, make_source(200, names), wrong=(7, 57, 107), titles={"class 7": "seven"})
    assert "Most confused pairs of 50 classes" in shown.text
    assert "seven class 8 3 75.0 %" in shown.text
    assert "30 more classes at 100.0 % or above" in shown.text
    assert not (run / "plots" / "confusion.png").exists()


def test_the_matrix_counts_and_shades(run: Path) -> None:
    shown = report(run, make_source(8, ("a", "b")), wrong=(1,))
    rows = shown.text.partition("Columns: predicted.")[2].partition("Accuracy")[0].split()
    assert rows == ["a", "b", "a", "4", "b", "1", "3"]
    assert shown.count("td", **{"class": "h9"}) == 1
    assert shown.count("td", **{"class": "m5"}) == 1  # ceil(9 · sqrt(1/4))


@pytest.mark.parametrize(
    ("result", "messages", "wanted"),
    [
        ({"skipped_inputs": 0, "skipped": []}, (), "Skipped images None."),
        ({}, (), "Skipped images None."),
        ({"skipped_inputs": 7}, (), "7 could not be read."),
        (
            {"skipped_inputs": 1, "skipped": ["a.jpg: empty"]},
            ("b.jpg: broken", "a.jpg: empty"),
            "2 could not be read. a.jpg: empty b",
        ),
        (
            {"skipped_inputs": 60, "skipped": [f"{i}.jpg: empty" for i in range(60)]},
            (),
            "39.jpg: empty and 20 more",
        ),
    ],
)
def test_skipped_images_are_named(
    run: Path, result: dict[str, object], messages: tuple[str, ...], wanted: str
) -> None:
    (run / "result.json").write_text(json.dumps(result))
    source = make_source(4, DIGITS)
    rows = make_evaluation(source)
    evaluation = dataclasses.replace(rows, skipped=messages)
    path = write_report(run, evaluation, source, make_card(DIGITS))
    assert wanted in Page(path.read_text(encoding="utf-8")).text


@pytest.mark.parametrize(
    ("size", "wanted"),
    [((8, 8), (192, 192)), ((5, 3), (190, 114)), ((1, 1), (192, 192)), ((96, 2), (192, 4)),
     ((97, 50), (97, 50)), ((640, 480), (192, 144)), ((1, 60_000), (1, 192))],
)  # fmt: skip
def test_thumbnails_fit_and_small_ones_grow(size: tuple[int, int], wanted: tuple[int, int]) -> None:
    uri = page.thumbnail(Image.new("RGB", size, "red"))
    with Image.open(io.BytesIO(base64.b64decode(uri.partition(",")[2]))) as image:
        assert image.size == wanted
        assert image.format == ("PNG" if max(size) <= 96 else "JPEG")


def test_small_thumbnails_keep_their_pixels() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (8, 8, 3), np.uint8)
    uri = page.thumbnail(Image.fromarray(pixels))
    with Image.open(io.BytesIO(base64.b64decode(uri.partition(",")[2]))) as image:
        assert np.array_equal(np.asarray(image)[12::24, 12::24], pixels)


def test_a_step_that_a_resumed_run_made_again_counts_once(run: Path) -> None:
    steps = [(1, 0.9), (2, 0.8), (3, 0.7), (2, 0.5), (4, 0.4)]
    lines = [json.dumps({"kind": "step", "step": s, "loss": loss}) for s, loss in steps]
    (run / "log.jsonl").write_text("\n".join(lines))
    found = record.series(record.read_record(run).steps, "step", "loss")
    assert found == ([1, 2, 3, 4], [0.9, 0.5, 0.7, 0.4])


def test_long_curves_are_averaged_not_sampled() -> None:
    x = np.arange(10_001.0)
    thin_x, thin_y = plots._thinned(x, x % 2)
    assert len(thin_x) == len(thin_y) == plots._MAX_POINTS
    assert np.all(np.diff(thin_x) > 0)
    assert np.allclose(thin_y, 0.5, atol=0.03)


def test_ticks_are_epochs_where_they_ended(run: Path) -> None:
    fill_run(run)
    assert plots.epoch_ticks(record.read_record(run))[1] in (
        ["1", "2", "3"],
        ["1", "1.5", "2", "3"],
    )
    rows = [COLUMNS, *(f"{e},{78 * e},0.1" for e in range(1, 31))]
    (run / "metrics.csv").write_text("\n".join(rows))
    positions, labels = plots.epoch_ticks(record.read_record(run))
    assert positions == [78 * int(label) for label in labels]
    assert labels[-1] == "30"
    (run / "metrics.csv").write_text(f"{COLUMNS}\n1,78,0.1")
    assert plots.epoch_ticks(record.read_record(run)) == ([78], ["1"])
    (run / "metrics.csv").unlink()
    assert plots.epoch_ticks(record.read_record(run)) == ([], [])


def test_the_examples_in_the_docstrings_hold() -> None:
    for module in (page, record):
        assert doctest.testmod(module).failed == 0


def test_a_run_that_waits_for_its_data_says_so(run: Path) -> None:
    fill_run(run)
    quiet = report(run, make_source(20, DIGITS)).text
    assert "waited for data" not in quiet
    lines = (run / "metrics.csv").read_text().splitlines()
    place = COLUMNS.split(",").index("data_wait")
    rows = [line.split(",") for line in lines]
    for row in rows[1:]:
        row[place] = "0.31"
    (run / "metrics.csv").write_text("\n".join(",".join(row) for row in rows) + "\n")
    assert "waited for data 31.0 % of the time" in report(run, make_source(20, DIGITS)).text
