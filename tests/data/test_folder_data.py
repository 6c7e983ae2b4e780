import os
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from pictures import noise

from meshuffle.data import open_data, relabel
from meshuffle.data.annotated import unlabelled
from meshuffle.data.base import stratified_split
from meshuffle.data.scan import PathTable, image_files
from meshuffle.errors import DataError, ImageError


def error_of(spec, **options) -> str:
    with pytest.raises(DataError) as caught:
        open_data(str(spec), **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def names(source):
    return [Path(source.name(i)).name for i in range(len(source))]


def test_train_and_val(make_folder):
    root = make_folder({"train/bees": 3, "train/ants": 2, "val/ants": 1, "val/bees": 2})
    data = open_data(str(root))
    assert data.classes == ("ants", "bees")
    train, val = data.splits["train"], data.splits["val"]
    assert train.labels.tolist() == [0, 0, 1, 1, 1]
    assert val.labels.tolist() == [0, 1, 1]
    assert train.labels.dtype == np.int64
    assert train.name(2) == str(root / "train" / "bees" / "000.png")
    np.testing.assert_array_equal(np.asarray(train.image(0)), np.asarray(noise(4)))
    assert train.content(0) == (root / "train" / "ants" / "000.png").read_bytes()
    assert not train.in_memory and data.style == "photos" and data.input_size == 224


@pytest.mark.parametrize("folder", ["val", "validation", "valid", "Val"])
def test_names_of_val(make_folder, folder):
    root = make_folder({"train/a": 2, "train/b": 2, f"{folder}/a": 1, "test/b": 3})
    data = open_data(str(root))
    assert {split: len(source) for split, source in data.splits.items()} == {
        "train": 4,
        "val": 1,
        "test": 3,
    }


def test_training_and_testing(make_folder):
    root = make_folder({"Training/a": 5, "Training/b": 5, "Testing/a": 1, "Testing/b": 1})
    data = open_data(str(root))
    assert data.classes == ("a", "b") and len(data.splits["test"]) == 2


@pytest.mark.parametrize("layout", ["{}ing_set", "seg_{}/seg_{}", "{}/{}", "{}2017"])
def test_folders_that_are_called_like_splits(make_folder, layout):
    """The course on cats and dogs has training_set/, and Intel's scenes seg_train/seg_train/."""
    counts = {layout.format(s, s) + f"/{c}": 5 for s in ("train", "test") for c in "ab"}
    root = make_folder({**counts, "other/c": 2})
    data = open_data(str(root))
    assert data.classes == ("a", "b") and data.ignored == ("other/ is beside the splits: left out",)
    assert {key: len(source) for key, source in data.splits.items()} == {
        "train": 8,
        "val": 2,
        "test": 10,
    }


def test_classes_that_are_called_like_splits(make_folder):
    root = make_folder({"test tube/old": 5, "bowl/new": 5})
    assert open_data(str(root)).classes == ("bowl", "test tube")
    root = make_folder({"steam train": 5})
    assert open_data(str(root)).classes == ("bowl", "steam train", "test tube")


def test_both_names_of_val_are_one_too_many(make_folder):
    root = make_folder({"train/a": 2, "train/b": 2, "val/a": 1, "validation/b": 1})
    assert "has both val/ and validation/" in error_of(root)


def test_a_flat_folder_is_split(make_folder):
    root = make_folder({"a": 10, "b": 20, "c": 1})
    data = open_data(str(root), seed=3)
    train, val = data.splits["train"], data.splits["val"]
    assert np.bincount(train.labels).tolist() == [8, 16, 1]
    assert np.bincount(val.labels).tolist() == [2, 4]
    together = {train.name(i) for i in range(25)} | {val.name(i) for i in range(6)}
    assert len(together) == 31
    again = open_data(str(root), seed=3).splits["val"]
    other = open_data(str(root), seed=4).splits["val"]
    assert names(again) == names(val) != names(other)
    assert val.image(0).mode == "RGB" and val.content(0)[:4] == b"\x89PNG"
    assert [train.labels[i] for i in (0, 24)] == [0, 2]


def test_a_flat_folder_for_testing_is_whole(make_folder):
    data = open_data(str(make_folder({"a": 3, "b": 2})), need=("test",))
    assert {split: len(source) for split, source in data.splits.items()} == {"test": 5}


def test_test_never_becomes_val(make_folder):
    root = make_folder({"train/a": 10, "train/b": 10, "test/a": 5})
    data = open_data(str(root))
    sizes = {split: len(source) for split, source in data.splits.items()}
    assert sizes == {"train": 16, "val": 4, "test": 5}
    assert all("/train/" in data.splits["val"].name(i) for i in range(4))


def test_only_the_needed_split(make_folder):
    root = make_folder({"val/b": 1, "val/a": 2})
    assert open_data(str(root), need=("val",)).classes == ("a", "b")
    assert "has no train images; it has val (3)" in error_of(root)


def test_classes_named_like_splits(make_folder):
    data = open_data(str(make_folder({"train": 5, "bus": 5})))
    assert data.classes == ("bus", "train")


def test_val_may_lack_classes_but_not_add_any(make_folder):
    counts = {"train/a": 2, "train/b": 2, "val/a": 1}
    assert open_data(str(make_folder(counts))).splits["val"].labels.tolist() == [0]
    message = error_of(make_folder({"val/zebra": 1}))
    assert "val has 1 classes that train lacks: zebra; train has a, b" in message
    assert "zebra" in error_of(make_folder({}), need=("val",))
    assert open_data(str(make_folder({})), need=()).classes == ("a", "b", "zebra")


def test_one_class(make_folder):
    message = error_of(make_folder({"ants": 4}))
    assert "only one class, 'ants'" in message and "add images" in message


def test_no_class_folders(make_folder):
    root = make_folder({"": 3})
    assert "holds 3 images but no class folders; looked for one folder per class" in error_of(root)
    (root / "a").mkdir()
    (root / "b").mkdir()
    assert "no image file in 2 class folders" in error_of(root)


def test_empty_folder(tmp_path):
    assert "no class folders" in error_of(tmp_path)


def test_empty_class_folders_are_named(make_folder):
    root = make_folder({"a": 2, "b": 2, "hollow": 0})
    assert "1 classes without any image in train: hollow; remove them" in error_of(root)
    root = make_folder({"train/a": 2, "train/b": 2, "val/a": 1, "val/b": 0})
    assert len(open_data(str(root)).splits["val"]) == 1


def test_hidden_and_other_files_are_passed_over(make_folder):
    root = make_folder({"a": 2, "b": 2, ".git": 1})
    for name in ("a/.hidden.png", "a/notes.txt", "b/Thumbs.db", "README.md", "loose.png"):
        (root / name).write_bytes((root / "a" / "000.png").read_bytes())
    data = open_data(str(root))
    assert sum(map(len, data.splits.values())) == 4
    expected = ["a/.hidden.png", "a/notes.txt", "b/Thumbs.db", "README.md", "loose.png"]
    assert sorted(data.ignored) == sorted(expected)


def test_folders_inside_a_class_and_upper_case_extensions(make_folder):
    root = make_folder({"a/deep/er": 2, "a": 1, "b": 2})
    (root / "b" / "000.png").rename(root / "b" / "X.PNG")
    data = open_data(str(root), need=("test",))
    assert names(data.splits["test"]) == ["000.png", "000.png", "001.png", "001.png", "X.PNG"]


def test_symbolic_links_are_followed_but_not_in_circles(make_folder, tmp_path):
    root = make_folder({"a": 2, "elsewhere/b": 3})
    (root / "elsewhere" / "b").rename(tmp_path / "moved")
    (root / "elsewhere").rmdir()
    (root / "b").symlink_to(tmp_path / "moved", target_is_directory=True)
    (root / "a" / "loop").symlink_to(root / "a", target_is_directory=True)
    (root / "a" / "gone.png").symlink_to(tmp_path / "nowhere.png")
    source = open_data(str(root), need=("test",)).splits["test"]
    assert source.labels.tolist() == [0, 0, 0, 1, 1, 1]
    with pytest.raises(ImageError, match=r"gone\.png: cannot be read: No such file"):
        source.image(names(source).index("gone.png"))


def test_names_are_sorted_by_bytes(make_folder):
    root = make_folder({"a": 0, "b": 1})
    for name in ("ä.png", "z.png", "Z.png", "10.png", "9.png"):
        noise(1).save(root / "a" / name)
    source = open_data(str(root), need=("test",)).splits["test"]
    assert names(source)[:5] == ["10.png", "9.png", "Z.png", "z.png", "ä.png"]


def test_names_that_are_no_utf8(make_folder):
    root = make_folder({"a": 1, "b": 1})
    (root / "a" / "000.png").rename(root / "a" / os.fsdecode(b"\xff.png"))
    source = open_data(str(root), need=("test",)).splits["test"]
    assert source.image(0).size == (12, 10)


def test_wrong_path(make_folder):
    root = make_folder({"a": 1, "b": 1})
    wrong = root.with_name("photo")
    assert error_of(wrong) == f"no such folder: {wrong}; did you mean 'photos'?"
    assert "is a file" in error_of(root / "a" / "000.png")


@contextmanager
def unprivileged():
    """Tests may run as root, who may read everything."""
    if os.geteuid() != 0:
        yield
        return
    os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(0)


def test_unreadable_folder_and_file(make_folder):
    root = make_folder({"a": 1, "b": 1})
    for parent in [root, *root.parents][:4]:
        parent.chmod(0o755)
    (root / "a").chmod(0)
    (root / "b" / "000.png").chmod(0)
    with unprivileged():
        if not os.access(root, os.R_OK, effective_ids=True):
            pytest.skip("the folder of the tests is closed to other users")
        assert error_of(root) == f"{root / 'a'} cannot be read: Permission denied"
    (root / "a").chmod(0o755)
    source = open_data(str(root), need=("test",)).splits["test"]
    with unprivileged():
        for read in (source.image, source.content):
            with pytest.raises(ImageError, match=r"000\.png: cannot be read: Permission denied"):
                read(1)


def test_imagenet(make_folder):
    ants, bees = "n02219486", "n02206856"
    root = make_folder({f"{s}/{c}": 2 for s in ("train", "val") for c in (ants, bees)})
    data = open_data(f"imagenet:{root}")
    assert data.spec == f"imagenet:{root}"
    assert data.classes == (bees, ants)
    assert data.titles == {}
    (root / "LOC_synset_mapping.txt").write_text(f"{ants} ant, emmet, pismire\n{bees} bee\n")
    data = open_data(f"imagenet:{root}")
    assert data.titles[ants] == "ant, emmet, pismire"
    assert data.classes == (bees, ants)


def test_imagenet_with_val_not_sorted_into_folders(make_folder):
    root = make_folder({"train/n1": 1, "train/n2": 1, "val": 3})
    assert "holds images but no synset folders" in error_of(f"imagenet:{root}")


def test_relabel(make_folder):
    data = open_data(str(make_folder({"a": 2, "c": 1})), need=("test",))
    other = relabel(data, ["c", "b", "a"])
    assert other.splits["test"].labels.tolist() == [2, 2, 0]
    assert other.classes == ("c", "b", "a")
    with pytest.raises(DataError, match=r"1 of 2 classes are unknown to the model: c"):
        relabel(data, ["a", "b"])


def test_stratified_split_rounds_per_class():
    labels = np.repeat([0, 1, 2, 3], [1, 2, 10, 13])
    rest, part = stratified_split(labels, 0.2, seed=0)
    assert np.bincount(labels[part], minlength=4).tolist() == [0, 1, 2, 3]
    assert sorted([*rest, *part]) == list(range(26))


def test_path_table():
    table = PathTable([b"a", b"", b"b/\xff.png"])
    assert [table[i] for i in range(len(table))] == ["a", "", os.fsdecode(b"b/\xff.png")]
    for index in (3, -1):
        with pytest.raises(IndexError):
            _ = table[index]


def test_real_photographs(hymenoptera):
    data = open_data(str(hymenoptera))
    assert data.classes == ("ants", "bees")
    train = data.splits["train"]
    assert (len(train), len(data.splits["val"])) == (245, 153)
    odd = [i for i in range(len(train)) if not train.name(i).endswith(".jpg")]
    assert odd and all(train.image(i).mode == "RGB" for i in odd)


def test_image_files_are_those_that_training_reads(make_folder):
    """Of hidden files, links, .jfif and a folder with the name of an image."""
    root = make_folder({"x/a": 1, "x/b": 1, "y": 1})
    (root / "x" / "link").symlink_to(root / "y", target_is_directory=True)
    (root / "y" / "loop").symlink_to(root / "y", target_is_directory=True)
    (root / "x" / "a" / "shot.png").mkdir()
    noise(5).save(root / "x" / "a" / "old.jfif", "JPEG")
    (root / "x" / "a" / "._000.png").touch()
    (root / "x" / ".cache").mkdir()
    noise(6).save(root / "x" / ".cache" / "c.png")
    found = image_files([root / "x"])
    trained = open_data(str(root / "x"), need=()).splits["train"]
    assert [str(path) for path in found] == [trained.name(i) for i in range(len(trained))]
    names = [str(path.relative_to(root / "x")) for path in found]
    assert names == ["a/000.png", "a/old.jfif", "b/000.png", "link/000.png"]


def test_image_files(make_folder):
    root = make_folder({"a/deep": 2, "b": 1, "empty": 0})
    (root / "b" / "notes.txt").touch()
    found = image_files([root / "b" / "notes.txt", root / "a"])
    assert found == [root / "b" / "notes.txt", *(root / f"a/deep/00{i}.png" for i in range(2))]
    for path, expected in (
        (root / "empty", "no image in this folder"),
        (root / "x", "no such file"),
    ):
        with pytest.raises(DataError, match=expected):
            image_files([path])


def test_files_of_which_nothing_is_known(make_folder, monkeypatch):
    monkeypatch.chdir(make_folder({"a": 2}))
    source = unlabelled(["a/001.png", "./a/000.png"], ("x", "y"))
    assert [source.name(i) for i in range(len(source))] == ["a/001.png", "./a/000.png"]
    assert source.labels.tolist() == [0, 0] and source.target(1) == 0
    assert source.image(0).size == (12, 10) and source.classes == ("x", "y")


@pytest.mark.parametrize(
    ("counts", "expected"),
    [
        ({"images": 4, "masks": 4}, "images/ and masks/ are no classes; looked for one folder"),
        ({"train/Images": 4, "train/labels": 4}, "masks:PATH, coco:PATH, voc:PATH, yolo:PATH or"),
        ({"train": 4, "validation": 2}, "train/ and validation/ contain no class folders"),
        ({"images/train": 2, "images/val": 2}, "images/ is no class"),
        ({"data": 4}, "data/ is no class; looked for"),
        ({"2750/a": 2, "2750/b": 2}, "2750/ is no class, it holds folders; did you mean"),
        ({"x/y/a": 2, "x/y/b": 2}, "/x/y?"),
        ({"x/train/a": 2, "x/train/b": 2, "x/val/a": 2}, "/x?"),
        ({"x/y/training/a": 2, "x/y/test/a": 2, "docs": 2}, "/x/y?"),
    ],
)
def test_folders_of_another_layout_are_no_classes(make_folder, counts, expected):
    root = make_folder(counts)
    assert expected in error_of(root) and expected in error_of(root, need=())


def test_folders_of_classes_in_several_folders(make_folder):
    """As PlantVillage's color/ and grayscale/."""
    root = make_folder({"b/x": 2, "b/y": 2, "c/x": 2, "c/y": 2})
    assert open_data(str(root)).notices == (
        "all classes hold x, y: if those are the classes, give one alone",
    )
    make_folder({"c/z": 1})
    assert open_data(str(root)).notices == ()


def test_another_task_names_the_formats_that_have_it(make_folder):
    root = make_folder({"images": 4, "masks": 4})
    assert "a format for it: coco:PATH, masks:PATH, voc:PATH" in error_of(root, task="segment")


def test_a_split_that_is_there_is_not_replaced(make_folder):
    """A part of train would take its place in silence."""
    root = make_folder({"train/a": 5, "train/b": 5, "val/a": 0, "val/b": 0})
    expected = "its val holds no image for classify: add images, or remove it; without it a fifth"
    assert expected in error_of(root) and expected in error_of(root, need=())
    root = make_folder({"val": 2})
    for name in "ab":
        (root / "val" / name).rmdir()
    assert "val/ holds images but no class folders, as train has them" in error_of(root)
    (root / "val").rename(root / "test")
    data = open_data(str(root))
    assert data.ignored == ("test/ holds images but no class folders: left out",)
    assert len(data.splits["val"]) == 2


def test_images_beside_their_masks_are_no_class(make_folder):
    """Roboflow's masks, whose train/ and visualizations/ would be two classes."""
    root = make_folder({"train": 3, "visualizations": 3})
    for i in range(3):
        noise(i).save(root / "train" / f"00{i}_mask.png")
    expected = "train/ is no class: 3 of its 6 images are masks of others (000_mask); use masks:"
    assert expected in error_of(root) and expected in error_of(root, need=())
