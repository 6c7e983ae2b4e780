import re

import pytest

import meshuffle.data
from meshuffle.data import FORMATS, open_data
from meshuffle.data.source import absolute_data
from meshuffle.errors import DataError, InputError


def error_of(spec: str) -> str:
    with pytest.raises(DataError) as caught:
        open_data(spec)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    ("spec", "task", "ways"),
    [
        ("digits", "detect", "--task classify"),
        ("masks:somewhere", "classify", "--task segment"),
        ("voc:somewhere", "regress", "--task detect or --task segment or --task classify or"),
        ("coco:somewhere", "regress", "--task detect or --task segment or --task classify or"),
        ("yolo:somewhere", "segment", "--task detect or --task classify or --task multilabel"),
        ("csv:somewhere", "detect", "--task classify or --task multilabel or --task regress"),
        ("hf:somewhere", "detect", "--task classify"),
        ("coco:somewhere", "generate", None),
        ("digits", "generate", None),
    ],
)
def test_a_task_for_which_there_is_nothing(spec, task, ways):
    if ways is None:
        assert "have nothing" not in error_of_task(spec, task)
    else:
        assert f"nothing for --task {task}; use {ways}" in error_of_task(spec, task)


@pytest.mark.parametrize(
    ("name", "text", "expected"),
    [
        (
            "train/via_region_data.json",
            '{"a": {"shape_attributes": {}}}',
            "VIA's own .*: export COCO",
        ),
        (
            "annotations.xml",
            "<annotations> </annotations>",
            "CVAT's own .*: export COCO 1.0, Pascal VOC",
        ),
        ("ds0/ann/a.jpg.json", '{"objects": [{"classTitle": "eye"}]}', "Supervisely's own .*COCO,"),
        ("a.json", '{"shapes": [{"shape_type": "polygon"}]}', "labelme's own .*labelme2coco.py"),
        ("min.json", '[{"image": "a.jpg", "lead_time": 2}]', "Label Studio's own .*: export COCO"),
        (
            "labels.json",
            '{"classes": ["a"], "labels": {"1": [{"label": 0}]}}',
            "FiftyOne's own .*: export COCO, VOC",
        ),
        ("annotations/train.json", '{"dm_format_version": "1.0"}', "Datumaro's own .*coco, voc"),
    ],
)
def test_what_a_tool_keeps_for_itself(tmp_path, name, text, expected):
    """The advice was `use --task classify`, or a parser's words."""
    file = tmp_path / name
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text)
    found = [error_of_task(str(tmp_path), task) for task in ("classify", "multilabel", "detect")]
    found += [error_of_task(f"{kind}:{tmp_path}", "detect") for kind in ("coco", "voc", "yolo")]
    found += [error_of_task(f"json:{file}", task) for task in ("multilabel", "detect")]
    for one in found:
        assert re.search(f"{file} is {expected}", one) and "--task classify" not in one, one
    assert ("is XML, not JSON" in found[-2]) == (file.suffix == ".xml")


def error_of_task(spec: str, task: str) -> str:
    try:
        opened = open_data(spec, task=task)
    except DataError as error:
        return str(error)
    assert opened.task == task
    return ""


@pytest.mark.parametrize(
    ("spec", "text"),
    [
        ("cifar:x", "unknown data format 'cifar' in 'cifar:x'; did you mean 'cifar10'?"),
        ("what:x", "known: cifar10:, coco:, csv:, fashion-mnist:, folder:, hf:, imagenet:, json:,"),
        ("mnist:", "'mnist:' lacks its path: mnist:PATH"),
        ("mnist", "'mnist' lacks its path: mnist:PATH"),
        ("digits8", "no such folder or data set: digits8; did you mean 'digits'?"),
        ("imagent", "did you mean 'imagenet'?"),
        ("/no/such/place", "no such folder: /no/such/place"),
        ("cifar10:/no/such/place", "no such folder: /no/such/place"),
        ("", "the name of the data set is empty"),
    ],
)
def test_misspelt(spec, text, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert text in error_of(spec)


def test_a_table_names_the_formats_that_have_boxes(tmp_path):
    assert error_of_task(f"csv:{tmp_path}", "detect").endswith("coco:PATH, voc:PATH, yolo:PATH")


def test_a_file_needs_its_format(tmp_path):
    (tmp_path / "t.csv").write_text("image,label")
    assert "t.csv is a file; write its format before it: csv:" in error_of(str(tmp_path / "t.csv"))


def test_a_folder_with_a_colon_in_its_name(make_folder):
    root = make_folder({"a": 2, "b": 2})
    root.rename(root.with_name("day:1"))
    assert open_data(str(root.with_name("day:1"))).classes == ("a", "b")


def test_a_folder_called_like_a_data_set(make_folder, monkeypatch):
    root = make_folder({"a": 2, "b": 2})
    root.rename(root.with_name("mnist"))
    monkeypatch.chdir(root.parent)
    assert open_data("mnist").classes == ("a", "b")
    assert open_data("folder:mnist").spec == "folder:mnist"


def test_a_folder_called_digits(make_folder, monkeypatch):
    """train digits took the folder, data check digits the embedded set."""
    root = make_folder({"a": 2, "b": 2})
    root.rename(root.with_name("digits"))
    monkeypatch.chdir(root.parent)
    data = open_data(absolute_data("digits"))
    assert len(data.classes) == 10 and absolute_data("digits") == "digits"
    assert data.notices == ("digits is the embedded data set; the folder of that name is ./digits",)
    assert open_data(absolute_data("./digits")).classes == ("a", "b")
    monkeypatch.chdir(root.parent.parent)
    assert open_data("digits").notices == ()


@pytest.mark.parametrize("spec", ["", "imagenet:", "csv: ", "cifar:x", "~nosuchuser/x",
                                  "csv:~nosuchuser/x"])  # fmt: skip
def test_every_verb_refuses_the_same(spec, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError) as opened:
        open_data(spec)
    with pytest.raises(InputError) as resolved:
        absolute_data(spec)
    assert str(opened.value) == str(resolved.value) and "\n" not in str(opened.value)
    if "~" in spec:
        assert str(opened.value) == (
            "~nosuchuser/x: no home folder is known for ~nosuchuser; write the whole path, or "
            "./~nosuchuser/x for a folder of that name here"
        )


def test_absolute_paths(make_folder, monkeypatch):
    root = make_folder({"a": 2, "b?c=d": 2})
    (root / "t.csv").touch()
    monkeypatch.chdir(root)
    assert absolute_data(".") == str(root)
    assert absolute_data("folder:b?c=d") == f"folder:{root}/b?c=d"
    assert absolute_data("csv:t.csv?targets=x,y") == f"csv:{root}/t.csv?targets=x,y"
    for spec in ("digits", "hf:mnist?label=x", "./nothing", "csv:nothing.csv"):
        assert absolute_data(spec) == spec


def test_home_folder(make_folder, monkeypatch):
    root = make_folder({"a": 2, "b": 2})
    monkeypatch.setenv("HOME", str(root.parent))
    assert open_data("~/photos").classes == ("a", "b")


def test_table_of_formats():
    assert sorted(FORMATS) == [
        *("cifar10", "coco", "csv", "fashion-mnist", "folder", "hf", "imagenet", "json"),
        *("masks", "mnist", "voc", "yolo"),
    ]


def test_public_names():
    assert meshuffle.data.__all__ == [
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
    assert all(hasattr(meshuffle.data, name) for name in meshuffle.data.__all__)
