import sys
from pathlib import Path

import numpy as np
import pytest
from pictures import noise

from meshuffle.data.formats.yolo import open_yolo
from meshuffle.errors import DataError

pytest.importorskip("yaml", reason="PyYAML is not installed")


def write(root: Path, image: str, labels: str | None) -> None:
    """An image of 20×10 pixels below images/, and its text below labels/."""
    path = root / "images" / image
    path.parent.mkdir(parents=True, exist_ok=True)
    noise(1, (20, 10)).save(path)
    if labels is not None:
        text = (root / "labels" / image).with_suffix(".txt")
        text.parent.mkdir(parents=True, exist_ok=True)
        text.write_text(labels)


def error_of(path: Path, task: str = "detect", **options) -> str:
    with pytest.raises(DataError) as caught:
        open_yolo(str(path), task=task, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


YAML = "path: .\ntrain: images/train\nval: images/val\nnames: {0: cat, 1: dog}\nnc: 2\n"


@pytest.fixture
def pets(tmp_path: Path) -> Path:
    write(tmp_path, "train/a.png", "1 0.5 0.5 0.2 0.4\n0 0.25 0.5 0.5 1\n")
    write(tmp_path, "train/b.jpg", "\n1 0.1 0.1 0.2 0.2\n\n")
    write(tmp_path, "train/deep/c.png", None)
    write(tmp_path, "val/d.png", "0 0.1 0.1 0.6 0.1 0.6 0.8\n")
    (tmp_path / "data.yaml").write_text(YAML)
    return tmp_path


def test_detect(pets):
    for path in (pets, pets / "data.yaml"):
        data = open_yolo(str(path), task="detect")
    assert data.classes == ("cat", "dog")
    train = data.splits["train"]
    assert [Path(train.name(i)).name for i in range(3)] == ["a.png", "b.jpg", "c.png"]
    np.testing.assert_allclose(train.target(0).xyxy, [[8, 3, 12, 7], [0, 0, 10, 10]], atol=1e-4)
    assert train.target(0).labels.tolist() == [1, 0] and train.target(0).xyxy.dtype == np.float32
    assert train.target(2).xyxy.shape == (0, 4)
    assert train.labels.tolist() == [0, 1, 0]
    outline = data.splits["val"].target(0)
    np.testing.assert_allclose(outline.xyxy, [[2, 1, 12, 8]], atol=1e-4)
    assert data.ignored == (
        f"1 images in {pets / 'images' / 'train'} have no text: without objects",
    )
    assert train.image(0).size == (20, 10)


def test_a_folder_without_an_image(pets):
    """Supervisely names images/val also where all images are in train."""
    (pets / "images/val/d.png").unlink()
    expected = "its val holds no image for detect: add images, or remove it; without it a fifth"
    assert expected in error_of(pets) and expected in error_of(pets, need=())


def test_other_tasks(pets):
    train = open_yolo(str(pets)).splits["train"]
    assert [train.target(i) for i in range(len(train))] == [0, 1]
    rows = open_yolo(str(pets), task="multilabel").splits["train"]
    assert [rows.target(i).tolist() for i in range(3)] == [[1, 1], [0, 1], [0, 0]]
    assert open_yolo(str(pets), task="generate").splits["train"].target(2) == 0


@pytest.mark.parametrize(
    "text",
    [
        "path: /of/another/machine\ntrain: images/train\nval: [images/val]\nnames: [cat, dog]\n",
        "train: ../images/train\nvalidation: ../images/val\nnames: [cat, dog]\n",
        "train: train.txt\nval: images/val\nnames: [cat, dog]\n",
    ],
)
def test_ways_to_say_where_the_images_are(pets, text):
    (pets / "data.yaml").write_text(text)
    (pets / "train.txt").write_text("./images/train/a.png\nimages/train/b.jpg\n")
    data = open_yolo(str(pets), task="detect")
    assert len(data.splits["train"]) >= 2 and len(data.splits["val"]) == 1
    assert len(data.splits["train"].target(0)) == 2


def test_val_that_is_train_or_not_there(pets):
    for i in range(8):
        write(pets, f"train/{i}.png", f"{i % 2} 0.5 0.5 0.2 0.4")
    (pets / "data.yaml").write_text(YAML.replace("images/val", "images/train"))
    data = open_yolo(str(pets))
    assert len(data.splits["val"]) == 2 and len(data.splits["train"]) == 8
    assert data.ignored[0].startswith("val is the same folder as train")
    (pets / "data.yaml").write_text(YAML.replace("val: images/val", ""))
    assert len(open_yolo(str(pets)).splits["val"]) == 2


def test_texts_beside_the_images(tmp_path):
    (tmp_path / "train").mkdir()
    noise(1).save(tmp_path / "train" / "a.png")
    (tmp_path / "train" / "a.txt").write_text("0 .5 .5 .5 .5")
    (tmp_path / "x.yml").write_text("train: train\nnames: [cat]")
    data = open_yolo(str(tmp_path), task="detect", need=("train",))
    assert len(data.splits["train"].target(0)) == 1


def test_a_box_that_reaches_out_is_cut(pets):
    write(pets, "train/a.png", "1 0.1 0.5 0.4 0.4\n0 0.5 0.5 1.001 1\n")
    data = open_yolo(str(pets), task="detect")
    np.testing.assert_allclose(
        data.splits["train"].target(0).xyxy, [[0, 3, 6, 7], [0, 0, 20, 10]], atol=1e-4
    )
    assert data.ignored[1] == (
        "labels/train/a.txt, line 1: box [-0.1, 0.3, 0.3, 0.7] reaches out of its image: cut"
    )


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("2 0.5 0.5 0.2 0.2", "class 2 is unknown; there are 0 … 1"),
        ("-1 0.5 0.5 0.2 0.2", "class -1 is unknown"),
        ("0.5 0.5 0.5 0.2 0.2", "class 0.5 is unknown"),
        ("0 0.5 0.5 0.2", "has 4 numbers; wanted: class cx cy w h"),
        ("0 0.5 0.5 0.2 0.2 0.9", "has 6 numbers"),
        ("0 0.5 0.5 0.2 x", "'0 0.5 0.5 0.2 x' are not all numbers"),
        ("0 0.5 0.5 0.2 nan", "is not finite"),
        ("0 0.5 0.5 0 0.2", "box [0.5, 0.4, 0.5, 0.6] has no area"),
        ("0 0.5 0.5 -0.1 0.2", "has no area"),
        ("0 1.5 0.5 0.2 0.2", "box [1.4, 0.4, 1.6, 0.6] lies outside its image"),
        ("0 300 200 40 40", "lies outside its image"),
    ],
)
def test_bad_lines(pets, line, expected):
    write(pets, "train/a.png", f"1 0.5 0.5 0.2 0.4\n{line}\n")
    found = error_of(pets, strict=True)
    assert f"{pets / 'data.yaml'}: labels/train/a.txt, line 2: " in found and expected in found
    if "has no area" in expected:
        data = open_yolo(str(pets), task="detect")
        assert expected in data.ignored[1] and data.ignored[1].endswith(": left out")
        assert len(data.splits["train"].target(0)) == 1


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("names: [a\nnc: 2", "line 2: no YAML"),
        ("- a", "lacks `names`"),
        ("name: [a]", "lacks `names`, the list of classes; did you mean 'name'?"),
        ("names: cat", "names is 'cat'; wanted: a list"),
        ("names: {1: a, 2: b}", "the keys of names are not 0 … 1"),
        ("names: [a, a]", "class names that come twice: a"),
        ("names: [a, b]\nnc: 3", "nc is 3, but there are 2 names"),
        ("names: [a, b]\ntrain: 3", "train is 3; wanted: a folder"),
        ("names: [a, b]\ntrain: nowhere", "nowhere, which does not exist"),
        ("names: [a, b]\ntrain: data.yaml", "is neither a folder of images nor a text"),
    ],
)
def test_bad_yaml(pets, text, expected):
    (pets / "data.yaml").write_text(text)
    found = error_of(pets)
    assert str(pets / "data.yaml") in found and expected in found


def test_images_that_are_wrong(pets):
    (pets / "train.txt").write_text("images/train/a.png\nimages/train/a.png\nimages/x.png\n")
    (pets / "data.yaml").write_text(YAML.replace("images/train", "train.txt"))
    found = error_of(pets)
    assert "images/x.png: no such image; images/train/a.png comes twice in train" in found
    (pets / "train.txt").write_text("images/train/a.png\nimages/val/d.png\n")
    assert "images/val/d.png is in two splits" in error_of(pets)


def test_no_texts_at_all(tmp_path):
    write(tmp_path, "train/a.png", None)
    (tmp_path / "data.yaml").write_text("train: images/train\nnames: [cat]")
    assert "none of 1 images has its text of boxes, such as labels/train/a.txt" in error_of(
        tmp_path
    )


def test_which_yaml(tmp_path):
    assert "no such file" in error_of(tmp_path / "x")
    assert error_of(tmp_path).endswith(
        "is not recognised as YOLO: looked for one data.yaml, obj.data, or classes.txt "
        "with images/; it holds 0 YAML files (none); saw nothing"
    )


ROBOFLOW = """train: ../train/images
val: ../valid/images
test: ../test/images

nc: 2
names: ['cat', 'dog']
"""


def test_an_export_that_names_a_test_folder_it_lacks(tmp_path):
    """As Roboflow writes it when the project has no test split."""
    for split, label in (("train", 0), ("train", 1), ("valid", 1)):
        for kind in ("images", "labels"):
            (tmp_path / split / kind).mkdir(parents=True, exist_ok=True)
        noise(label).save(tmp_path / split / "images" / f"{label}.jpg")
        (tmp_path / split / "labels" / f"{label}.txt").write_text(f"{label} 0.5 0.5 0.2 0.2\n")
    for text in (ROBOFLOW, ROBOFLOW.replace("/", "\\")):
        (tmp_path / "data.yaml").write_text(text)
        data = open_yolo(str(tmp_path), task="detect")
        assert {key: len(source) for key, source in data.splits.items()} == {"train": 2, "val": 1}
        assert data.ignored == (
            f"test names {tmp_path}/test/images, which does not exist: left out",
        )
        assert data.layout.startswith("YOLO: data.yaml with ..")
    assert "test names" in error_of(tmp_path, need=("test",))
    (tmp_path / "valid").rename(tmp_path / "dev")
    assert f"val names {tmp_path}/valid/images, which does not exist" in error_of(tmp_path)
    (tmp_path / "train").rename(tmp_path / "gone")
    assert f"train names {tmp_path}/train/images, which does" in error_of(tmp_path, need=())


@pytest.mark.parametrize(
    ("images", "split"), [("images", ""), ("images", "/train"), ("Images", "")]
)
def test_names_without_a_yaml(tmp_path, images, split):
    """As Label Studio writes it."""
    for i in range(10):
        for kind in (images, "labels"):
            (tmp_path / f"{kind}{split}").mkdir(parents=True, exist_ok=True)
        noise(i).save(tmp_path / f"{images}{split}" / f"{i}.jpg")
        (tmp_path / f"labels{split}" / f"{i}.txt").write_text(f"{i % 2} 0.5 0.5 0.2 0.2\n")
    (tmp_path / "classes.txt").write_text("cat\ndog\n")
    data = open_yolo(str(tmp_path), task="detect")
    assert data.classes == ("cat", "dog") and len(data.splits["val"]) == 2
    assert data.layout == f"YOLO: classes.txt with {images}{split}"


def test_a_class_that_train_lacks(pets):
    (pets / "data.yaml").write_text("train: images/val\nnames: [cat, dog]")
    assert open_yolo(str(pets), task="detect", need=("train",)).ignored == (
        "train has no object of dog",
    )
    assert "1 classes without any object in train: dog" in error_of(pets, "classify")


def test_without_pyyaml(pets, monkeypatch):
    monkeypatch.setitem(sys.modules, "yaml", None)
    assert "reading YAML needs PyYAML: pip install pyyaml" in error_of(pets)


def test_a_yaml_that_names_no_folder(pets):
    """supervision writes only nc and names."""
    (pets / "data.yaml").write_text("nc: 2\nnames: [cat, dog]\n")
    data = open_yolo(str(pets), task="detect")
    assert {split: len(source) for split, source in data.splits.items()} == {"train": 3, "val": 1}
    (pets / "images").rename(pets / "photos")
    assert "names no folder of images" in error_of(pets)


@pytest.mark.parametrize("before", ["data/", "", "data\\"])
def test_obj_data_of_cvat(tmp_path, before):
    for split, name in (("train", "Bild 1 grün"), ("train", "b"), ("valid", "c")):
        folder = tmp_path / f"obj_{split}_data"
        folder.mkdir(exist_ok=True)
        noise(1, (20, 10)).save(folder / f"{name}.png")
        (folder / f"{name}.txt").write_text("1 0.5 0.5 0.2 0.4\r\n")
        with (tmp_path / f"{split}.txt").open("a", encoding="utf-8") as file:
            file.write(f"{before}obj_{split}_data/{name}.png\n")
    (tmp_path / "obj.names").write_text("cat\ntree top\n")
    lines = "classes = 2\ntrain = data/train.txt\nvalid = data/valid.txt\nbackup = backup/\n"
    (tmp_path / "obj.data").write_text(lines)
    data = open_yolo(str(tmp_path), task="detect")
    assert data.classes == ("cat", "tree top")
    assert {split: len(source) for split, source in data.splits.items()} == {"train": 2, "val": 1}
    assert data.splits["train"].target(0).labels.tolist() == [1]


def test_few_boxes_outside_are_left_out(pets):
    lines = "0 0.5 0.5 0.2 0.2\n" * 20 + "0 1.5 0.5 0.2 0.2\n"
    (pets / "labels" / "train" / "a.txt").write_text(lines)
    data = open_yolo(str(pets), task="detect")
    assert len(data.splits["train"].target(0)) == 20
    assert any("lies outside its image: left out" in note for note in data.ignored)
    assert "lies outside" in error_of(pets, strict=True)


def test_paths_that_begin_where_darknet_ran(tmp_path):
    """As in PyTorch-YOLOv3 and Yolo_mark: above the list and the .data file, of any name."""
    write(tmp_path / "data/own", "a.png", "1 .5 .5 .5 .5")
    write(tmp_path / "data/own", "b.png", "0 .5 .5 .5 .5")
    (tmp_path / "data/own/classes.names").write_text("cat\ndog\n")
    (tmp_path / "data/own/train.txt").write_text("data/own/images/a.png\ndata/own/images/b.png\n")
    text = "classes = 2\ntrain = data/own/train.txt\nnames = data/own/classes.names\n"
    for place in ("config", "data/own"):
        (tmp_path / place).mkdir(exist_ok=True)
        (tmp_path / place / "own.data").write_text(text)
        data = open_yolo(str(tmp_path / place), task="detect", need=("train",))
        assert data.classes == ("cat", "dog") and data.splits["train"].labels.tolist() == [1, 0]


def test_places_below_the_folder_that_roboflow_unpacks(pets):
    """Its notebooks write the name of that folder, which need not be there any more."""
    for split in ("train", "val"):
        (pets / split).mkdir()
        (pets / "images" / split).rename(pets / split / "images")
        (pets / "labels" / split).rename(pets / split / "labels")
    text = "train: Pets-2/train/images\nval: Pets-2/val/images\nnames: [cat, dog]"
    (pets / "data.yaml").write_text(text)
    data = open_yolo(str(pets), task="detect")
    assert {key: len(source) for key, source in data.splits.items()} == {"train": 3, "val": 1}


@pytest.mark.parametrize("root", ["D:/a b/c/pets", "/home/c/pets", "pets"])
def test_places_of_another_machine(pets, root):
    (pets / "data.yaml").write_text(
        f"path: {root}\ntrain: {root}/images/train\nval: {root}/images/val\nnames: [cat, dog]\n"
    )
    data = open_yolo(str(pets), task="detect")
    assert len(data.splits["train"]) and len(data.splits["val"])
