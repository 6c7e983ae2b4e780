import pickle
import sys

import numpy as np
import pytest
from pictures import encoded, noise
from PIL import Image

from meshuffle.data.formats.hf import open_hf
from meshuffle.errors import DataError, ImageError


def error_of(path: str, **options) -> str:
    with pytest.raises(DataError) as caught:
        open_hf(path, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def picture(split: str, i: int) -> Image.Image:
    return noise(100 * len(split) + i)


@pytest.fixture
def library(tmp_path, monkeypatch):
    """The datasets library, with its cache in the test's folder and no network."""
    found = pytest.importorskip("datasets", reason="datasets is not installed")
    monkeypatch.setattr(found.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    found.disable_progress_bars()
    return found


@pytest.fixture
def save(library, tmp_path):
    """save({"train": [0, 1]}, …) writes a set with such labels, and returns its folder."""

    def write(splits: dict[str, list], classes=("ant", "bee"), **columns) -> str:
        features = {"image": library.Image(), "label": library.ClassLabel(names=list(classes))}
        features |= {name: library.ClassLabel(names=list(classes)) for name in columns}
        tables = {}
        for split, labels in splits.items():
            images = [
                {"bytes": encoded(picture(split, i), "PNG"), "path": None}
                for i in range(len(labels))
            ]
            rows = {"image": images, "label": labels, **columns}
            tables[split] = library.Dataset.from_dict(rows, library.Features(features))
        library.DatasetDict(tables).save_to_disk(str(tmp_path / "saved"))
        return str(tmp_path / "saved")

    return write


def test_a_saved_set(save):
    path = save({"train": [0, 1, 1], "validation": [1], "extra": [0]})
    data = open_hf(path)
    assert data.classes == ("ant", "bee") and data.ignored == ("split extra: left out",)
    train = data.splits["train"]
    assert train.labels.tolist() == [0, 1, 1] and train.target(2) == 1 and not train.in_memory
    assert train.name(2) == f"{path}/train[2]"
    expected = np.asarray(picture("train", 2))
    np.testing.assert_array_equal(np.asarray(train.image(2)), expected)
    again = pickle.loads(pickle.dumps(train))
    assert again.content(2) == train.content(2) == encoded(picture("train", 2), "PNG")
    assert len(data.splits["val"]) == 1


def test_val_is_set_aside(save):
    data = open_hf(save({"train": [0, 1] * 10, "test": [-1, -1]}), seed=2)
    assert len(data.splits["val"]) == 4 and len(data.splits["train"]) == 16
    assert data.ignored == ("the test split has no labels: left out",)


def test_one_table(library, save):
    path = save({"train": [0, 1] * 5})
    library.load_from_disk(path)["train"].save_to_disk(path + "_flat")
    data = open_hf(path + "_flat")
    assert len(data.splits["train"]) == 8
    assert list(open_hf(path + "_flat", need=("test",)).splits) == ["test"]


def test_a_folder_of_images(library, tmp_path):
    for name in ("ant", "bee"):
        (tmp_path / "photos" / "train" / name).mkdir(parents=True)
        for i in range(5):
            noise(i).save(tmp_path / "photos" / "train" / name / f"{i}.png")
    data = open_hf(str(tmp_path / "photos"))
    assert data.classes == ("ant", "bee") and len(data.splits["train"]) == 8
    train = data.splits["train"]
    assert train.image(0).size == (12, 10)
    for file in (tmp_path / "photos").rglob("*.png"):
        file.unlink()
    with pytest.raises(ImageError, match=r"train\[0\]: .*png: No such file"):
        train.image(0)


def test_columns(save, library):
    path = save({"train": [0, 1, 0]}, coarse=[1, 0, 1])
    assert open_hf(path, need=()).splits["train"].labels.tolist() == [0, 1, 0]
    assert open_hf(f"{path}?label=coarse", need=()).splits["train"].labels.tolist() == [1, 0, 1]
    assert "choose ?label=… of its class labels: label, coarse" in error_of(f"{path}?label=x")
    found = _without_images(library, path)
    assert "no column of images (the type Image); it has text (string)" in found


def _without_images(library, path: str) -> str:
    library.Dataset.from_dict({"text": ["a"]}).save_to_disk(path + "_text")
    return error_of(path + "_text")


@pytest.mark.parametrize(
    ("labels", "expected"),
    [
        ([0, 1, None], "1 rows of train have no label in 'label'"),
        ([0, 1, -1], "1 rows of train have no label in 'label'"),
        ([0, 0], "1 classes without any image in train: bee"),
    ],
)
def test_bad_labels(save, labels, expected):
    assert expected in error_of(save({"train": labels, "test": [0, 1]}))


def test_a_broken_image(library, tmp_path):
    features = library.Features(
        {"image": library.Image(), "label": library.ClassLabel(names=["a", "b"])}
    )
    images = [{"bytes": b"no", "path": None}, None]
    rows = {"image": images, "label": [0, 1]}
    library.Dataset.from_dict(rows, features).save_to_disk(str(tmp_path / "x"))
    source = open_hf(str(tmp_path / "x"), need=()).splits["train"]
    for i, expected in enumerate(["not a JPEG", "has no image"]):
        with pytest.raises(ImageError, match=expected):
            source.image(i)


def test_no_network(library, monkeypatch):
    def unreachable(*_, **__):
        raise ConnectionError("Couldn't reach 'x' on the Hub\nmore")

    monkeypatch.setattr(library, "load_dataset", unreachable)
    monkeypatch.setattr("huggingface_hub.HfApi.dataset_info", unreachable)
    found = error_of("some/name")
    assert found.startswith("hf:some/name: no such folder, and the hub, which was tried")
    assert not library.config.HF_HUB_OFFLINE


def test_a_set_that_does_not_exist(library, tmp_path):
    (tmp_path / "empty").mkdir()
    assert error_of(str(tmp_path / "empty")).startswith(f"hf:{tmp_path / 'empty'}: ")


def test_an_old_library(library, monkeypatch):
    monkeypatch.setattr(library, "__version__", "2.21.0")
    assert "datasets 2.21.0 would run code that a data set brings" in error_of("x")


def test_without_the_library(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    assert error_of("beans") == "hf:beans needs the datasets library: pip install 'meshuffle[hub]'"


def test_whole_numbers_without_names(library, tmp_path):
    """As WebDataset's .cls files, and tables on the hub without a ClassLabel."""
    image = {"bytes": encoded(noise(1), "PNG"), "path": None}
    kinds = {"jpg": library.Image(), "cls": library.Value("int64")}
    rows = {"jpg": [image] * 4, "cls": [10, 2, 0, 2]}
    library.Dataset.from_dict(rows, library.Features(kinds)).save_to_disk(str(tmp_path / "saved"))
    data = open_hf(str(tmp_path / "saved"), need=())
    assert data.classes == ("0", "2", "10")
    assert data.splits["train"].labels.tolist() == [2, 1, 0, 1]
    assert "?label=NAME); it has jpg (PIL" in error_of(f"{tmp_path}/saved?label=x", need=())


def test_names_in_a_column_of_text(library, tmp_path):
    """As the metadata.csv of an imagefolder has them."""
    image = {"bytes": encoded(noise(1), "PNG"), "path": None}
    kinds = {"image": library.Image(), "label": library.Value("string")}
    tables = {}
    for split, names in (("train", ["Bär", "ant", "Bär"]), ("validation", ["ant"])):
        rows = {"image": [image] * len(names), "label": names}
        tables[split] = library.Dataset.from_dict(rows, library.Features(kinds))
    library.DatasetDict(tables).save_to_disk(str(tmp_path / "saved"))
    data = open_hf(str(tmp_path / "saved"))
    assert data.classes == ("Bär", "ant")
    assert data.splits["train"].labels.tolist() == [0, 1, 0]
    assert data.splits["val"].labels.tolist() == [1]
    tables["train"] = library.Dataset.from_dict(
        {"image": [image] * 2, "label": ["ant", None]}, library.Features(kinds)
    )
    library.DatasetDict(tables).save_to_disk(str(tmp_path / "gap"))
    assert "1 rows of train have no label in 'label'" in error_of(str(tmp_path / "gap"))
