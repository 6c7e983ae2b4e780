import dataclasses
import json
import shutil
import tracemalloc

import numpy as np
import pytest
from pictures import noise
from PIL import Image

from meshuffle.config import TrainConfig
from meshuffle.data import ArraySource, check, check_data, open_data
from meshuffle.data.check import require_usable
from meshuffle.errors import DataError
from meshuffle.train.resolve import resolve_run


@pytest.fixture
def troubled(make_folder):
    """One of each trouble: a leak, a copy, a broken file, strange files, a missing class."""
    root = make_folder({"train/a": 4, "train/b": 2, "train/c": 1, "val/a": 2, "val/b": 1})
    shutil.copy(root / "train/a/000.png", root / "val/a/leak.png")
    shutil.copy(root / "train/b/000.png", root / "train/b/copy.png")
    (root / "val/b/broken.jpg").write_text("404")
    (root / "val/b/empty1.jpg").touch()
    (root / "val/b/empty2.jpg").touch()
    (root / "train/a/notes.txt").touch()
    (root / "train/.hidden.png").touch()
    Image.new("RGB", (1, 1)).save(root / "train/c/dot.png")
    return root


def test_everything_is_found(troubled):
    report = check_data(str(troubled))
    assert report.counts == {
        "train": {"a": 4, "b": 3, "c": 2},
        "val": {"a": 3, "b": 4, "c": 0},
    }
    assert report.absent == {"val": ("c",)}
    reasons = dict(report.unreadable)
    assert "not a JPEG" in reasons[str(troubled / "val/b/broken.jpg")]
    assert "empty file" in reasons[str(troubled / "val/b/empty1.jpg")]
    assert len(reasons) == 3
    assert report.leaks == ((str(troubled / "train/a/000.png"), str(troubled / "val/a/leak.png")),)
    assert [names[1] for names in report.repeated] == [str(troubled / "train/b/copy.png")]
    assert set(report.ignored) == {"train/a/notes.txt", "train/.hidden.png"}
    assert (report.smallest, report.largest) == ((1, 1), (12, 10))
    assert report.imbalance == 2.0
    assert not report.ok
    assert len(report.problems()) == 3


def test_report_as_text_and_json(troubled):
    report = check_data(str(troubled))
    text = report.render()
    assert "val lacks 1 of 3 classes: c" in text
    for part in ("1×1 … 12×10", "broken.jpg: not a JPEG", "leak.png"):
        assert part in text
    stored = json.loads(json.dumps(report.to_dict()))
    assert stored["counts"]["train"]["a"] == 4
    assert len(stored["problems"]) == 3


@pytest.mark.parametrize("split", ["train", "val"])
def test_a_split_of_which_every_image_is_left_out(make_folder, split):
    """A run would go on with a loss of 0 and say that it is done."""
    root = make_folder({"train/a": 2, "train/b": 2, "val/a": 1, "val/b": 1})
    require_usable(open_data(str(root)))
    files = sorted((root / split).rglob("*.png"))
    for file in files[1:]:
        file.write_bytes(b"")
    require_usable(open_data(str(root)))
    files[0].write_bytes(b"")
    config = TrainConfig(data=str(root), model="shufflenet_v2_x0_5")
    expected = (
        rf"none of the {len(files)} images of {split} can be used; the first: .*000\.png: empty"
    )
    with pytest.raises(DataError, match=expected):
        resolve_run(config, {})


def test_annotations_of_turned_images(tmp_path):
    """Old labelImg writes width and height of the image before it is turned."""
    for name in "abcde":
        for folder in ("images", "annotations"):
            (tmp_path / folder).mkdir(exist_ok=True)
        noise(1, (12, 10)).save(tmp_path / f"images/{name}.png")
        box = "<bndbox><xmin>1</xmin><ymin>1</ymin><xmax>5</xmax><ymax>5</ymax></bndbox>"
        (tmp_path / f"annotations/{name}.xml").write_text(
            "<a><size><width>10</width><height>12</height></size>"
            f"<object><name>cat</name>{box}</object></a>"
        )
    data = open_data(f"voc:{tmp_path}", task="detect")
    with pytest.raises(DataError, match=r"none of the 4 images of train .* annotated as 10×12"):
        require_usable(data)
    with pytest.raises(DataError, match="only one class, 'cat'; a classifier needs two or more"):
        open_data(f"voc:{tmp_path}")
    assert check_data(f"voc:{tmp_path}").problems()[0].startswith("only 1 class;")


def test_nothing_as_long_as_the_classes_is_kept_for_each_image():
    """int64[C] for each of ImageNet's images took 10 GB."""
    pixels = np.zeros((2000, 1, 1, 3), dtype=np.uint8)
    labels = np.arange(2000) % 1000
    source = ArraySource("many", tuple(map(str, range(1000))), pixels, labels)
    samples = check._look_at_all(source)
    next(samples)
    tracemalloc.start()
    kept = list(samples)
    size, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(kept) == 1999 and size < 2000 * 1500, "1000 classes are 8,000 bytes"


def test_layout_and_notices_are_shown(make_folder):
    report = check_data(str(make_folder({"train/a": 1, "valid/a": 1})))
    assert report.render().splitlines()[1] == (
        "layout  folder: train/, valid/ with one folder per class"
    )
    report = dataclasses.replace(report, notices=("read as cp1252",))
    assert report.render().splitlines()[2] == "note: read as cp1252"
    assert report.to_dict()["layout"].startswith("folder: ")
    assert check_data("digits").layout == "digits"


def test_classes_that_only_val_has(make_folder):
    report = check_data(str(make_folder({"train/a": 1, "train/b": 1, "val/z": 1})))
    assert report.absent == {"train": ("z",), "val": ("a", "b")}
    assert report.imbalance is None


def test_a_flat_folder_is_looked_at_whole(make_folder):
    root = make_folder({"a": 3, "b": 5})
    shutil.copy(root / "a/000.png", root / "b/same.png")
    report = check_data(str(root))
    assert report.counts == {"train": {"a": 3, "b": 6}}
    assert len(report.repeated) == 1 and report.leaks == ()
    expected = "1 exact duplicates within a split: a fifth of train becomes val"
    assert report.problems()[0].startswith(expected) and "sizes: 12×10 (w" in report.render()
    (root / "b/same.png").unlink()
    assert "no problem found" in check_data(str(root)).render()


def test_one_class_is_a_problem_and_no_error(make_folder):
    report = check_data(str(make_folder({"a": 2})))
    assert "only 1 class; a classifier needs two or more" in report.problems()


def test_long_lists_are_cut(make_folder):
    root = make_folder({"a": 2, "b": 2})
    for i in range(25):
        (root / "a" / f"x{i:02}.txt").touch()
    text = check_data(str(root)).render()
    assert "ignored: 25" in text and "… and 15 more" in text
    assert "x09.txt" in text and "x10.txt" not in text


def test_digits_in_memory():
    report = check_data("digits")
    assert sum(sum(counts.values()) for counts in report.counts.values()) == 1797
    assert report.smallest == report.largest == (8, 8)
    assert report.leaks == () and report.ok


def test_progress_counts_every_image(make_folder):
    calls = []
    check_data(str(make_folder({"a": 3, "b": 4})), progress=lambda *call: calls.append(call))
    assert calls == [(i, 7) for i in range(1, 8)]


def test_grid(make_folder, tmp_path):
    root = make_folder({"a": 12, "b": 2})
    (root / "a" / "000.png").write_text("broken")
    Image.new("RGB", (1, 3000), "red").save(root / "b" / "strip.png")
    (root / "日本").mkdir()
    shutil.copy(root / "b/000.png", root / "日本")
    report = check_data(str(root), grid_path=tmp_path / "new" / "grid.png")
    grid = Image.open(tmp_path / "new" / "grid.png")
    assert grid.size == (140 + 8 * 100 + 4, 3 * 100 + 4)
    assert report.grid == str(tmp_path / "new" / "grid.png")
    assert [file.name for file in (tmp_path / "new").iterdir()] == ["grid.png"]
    cells = np.asarray(grid)
    assert cells[4:100, 140:940].std() > 10  # images in the first row
    assert cells[104:200, 440:940].min() == 255  # the second row has three


def test_grid_that_cannot_be_written(make_folder, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(DataError, match=r"cannot write .*grid\.png"):
        check_data(str(make_folder({"a": 1, "b": 1})), grid_path=tmp_path / "file" / "grid.png")


def test_no_data_set_is_an_error(tmp_path):
    with pytest.raises(DataError, match="no class folders"):
        check_data(str(tmp_path))


def test_real_photographs(hymenoptera):
    report = check_data(str(hymenoptera))
    assert report.counts["train"] == {"ants": 124, "bees": 121}
    assert report.unreadable == ()


def test_targets_have_ranges(make_folder):
    root = make_folder({"a": 3})
    rows = [f"a/00{i}.png,{i - 1.5},{i // 2}" for i in range(3)]
    (root / "t.csv").write_text("\n".join(["image,x,y", *rows]))
    report = check_data(f"csv:{root}/t.csv", task="regress")
    assert report.ranges == {"train": {"x": (-1.5, -0.5, 0.5), "y": (0, 1 / 3, 1)}}
    lines = [line.split() for line in report.render().splitlines()]
    assert ["target", "minimum", "mean", "maximum", "in", "train:", "3", "images"] in lines
    assert ["y", "0", "0.33333", "1"] in lines and not any("sum" in line for line in lines)
    assert "ranges" in json.loads(json.dumps(report.to_dict()))
