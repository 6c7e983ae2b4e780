import json
import pickle
from pathlib import Path

import numpy as np
import pytest
from pictures import noise
from test_shapes import compressed, runs_of, square

from meshuffle.data.base import relabel
from meshuffle.data.formats.coco import open_coco
from meshuffle.data.shapes import fill_polygon
from meshuffle.data.source import open_data
from meshuffle.errors import DataError, ImageError

CATEGORIES = [{"id": 7, "name": "cat"}, {"id": 3, "name": "dog"}]
WIDTH, HEIGHT = 12, 10


def image(key: int, **more) -> dict:
    return {"id": key, "file_name": f"{key}.png", "width": WIDTH, "height": HEIGHT, **more}


def thing(key: int, image_id: int, category: int, box: list[float], **more) -> dict:
    found = {"id": key, "image_id": image_id, "category_id": category, "bbox": box, "iscrowd": 0}
    return {**found, **more}


def tree(images: list, annotations: list, categories: list = CATEGORIES) -> dict:
    return {"images": images, "annotations": annotations, "categories": categories}


def write(folder: Path, name: str, content: dict | str, images: str = "") -> Path:
    """Write a JSON, and those of its images that are not there."""
    file = folder / name
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(content if isinstance(content, str) else json.dumps(content))
    (folder / images).mkdir(parents=True, exist_ok=True)
    for entry in content["images"] if isinstance(content, dict) else ():
        path = folder / images / (entry.get("file_name") or "unnamed.png")
        if not path.exists():
            noise(entry["id"], (WIDTH, HEIGHT)).save(path)
    return file


def error_of(path: Path, task: str = "detect", **options) -> str:
    with pytest.raises(DataError) as caught:
        open_coco(str(path), task=task, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.fixture
def pair(tmp_path: Path) -> Path:
    """COCO's own layout: two images in train, one in val, a crowd, and an image with nothing."""
    crowd = {"counts": [0, 20, 100], "size": [HEIGHT, WIDTH]}
    train = tree(
        [image(1), image(2), image(3)],
        [
            thing(1, 1, 3, [0, 0, 2, 2], segmentation=[square(0, 0, 2).tolist()], area=4),
            thing(2, 2, 7, [1, 1, 8, 8], segmentation=[square(1, 1, 8).tolist()], area=64),
            thing(3, 2, 3, [2, 2, 3, 3], segmentation=[square(2, 2, 3).tolist()], area=9),
            thing(4, 1, 7, [0, 0, 2, 10], segmentation=crowd, area=20, iscrowd=1),
        ],
    )
    val = tree([image(9)], [thing(1, 9, 1, [0, 0, 4, 4], segmentation=[])], CATEGORIES)
    val["categories"] = [{"id": 1, "name": "cat"}, {"id": 2, "name": "dog"}]
    val["annotations"][0]["segmentation"] = [square(0, 0, 4).tolist()]
    write(tmp_path, "annotations/instances_train2017.json", train, "train2017")
    write(tmp_path, "annotations/instances_val2017.json", val, "val2017")
    write(tmp_path, "annotations/captions_train2017.json", "{}")
    return tmp_path


def test_detect(pair):
    data = open_coco(str(pair), task="detect")
    assert data.classes == ("dog", "cat") and data.task == "detect"  # by category id
    train, val = data.splits["train"], data.splits["val"]
    assert [train.name(i) for i in range(3)] == [
        str(pair / f"train2017/{i}.png") for i in (1, 2, 3)
    ]
    boxes = train.target(1)
    assert boxes.xyxy.tolist() == [[1, 1, 9, 9], [2, 2, 5, 5]] and boxes.xyxy.dtype == np.float32
    assert boxes.labels.tolist() == [1, 0] and boxes.labels.dtype == np.int64
    assert train.target(0).labels.tolist() == [0], "the crowd is left out"
    assert train.target(2).xyxy.shape == (0, 4)
    assert train.labels.tolist() == [0, 1, 0] and val.target(0).labels.tolist() == [1]
    assert data.ignored == ("instances_train2017.json: 1 crowds (iscrowd) left out",)
    np.testing.assert_array_equal(np.asarray(train.image(0)), np.asarray(noise(1)))
    assert train.content(0) == (pair / "train2017/1.png").read_bytes()


def test_classify_by_the_largest_object(pair):
    data = open_coco(str(pair))
    train = data.splits["train"]
    assert [train.target(i) for i in range(len(train))] == [0, 1] == train.labels.tolist()
    assert Path(train.name(1)).name == "2.png"
    assert "instances_train2017.json: 1 images show no object: left out" in data.ignored


def test_multilabel_sees_the_crowd(pair):
    train = open_coco(str(pair), task="multilabel").splits["train"]
    rows = [train.target(i) for i in range(3)]
    assert np.stack(rows).tolist() == [[1, 1], [1, 1], [0, 0]] and rows[0].dtype == np.float32


def test_generate_needs_images_only(pair):
    train = open_coco(str(pair), task="generate").splits["train"]
    assert [train.target(i) for i in range(3)] == [0, 0, 0]


def test_segment(pair):
    data = open_coco(str(pair), task="segment")
    assert data.classes == ("background", "dog", "cat")
    train = data.splits["train"]
    first, second = train.target(0), train.target(1)
    assert first.shape == (HEIGHT, WIDTH) and first.dtype == np.uint8
    assert (first[:2, :2] == 1).all(), "the dog lies on the crowd"
    assert (first[2:, :2] == 255).all() and not first[:, 2:].any()
    assert (second[2:5, 2:5] == 1).all() and (second == 2).sum() == 64 - 9
    assert not train.target(2).any() and train.labels.tolist() == [2, 2, 0]


def test_a_source_survives_pickle_and_relabel(pair):
    for task in ("detect", "segment"):
        data = open_coco(str(pair), task=task)
        again = pickle.loads(pickle.dumps(data.splits["train"]))
        names = ("bird", *reversed(data.classes))
        wider = relabel(data, names).splits["train"]
        for i in range(3):
            a, b, c = again.target(i), data.splits["train"].target(i), wider.target(i)
            if task == "detect":
                assert a.xyxy.tolist() == b.xyxy.tolist() == c.xyxy.tolist()
                assert [names[k] for k in c.labels] == [data.classes[k] for k in b.labels]
            else:
                assert a.tolist() == b.tolist()
                assert set(c[b == 255]) <= {255} and (c[b == 1] == 2).all()


@pytest.mark.parametrize("folder", ["", "images"])
def test_one_json_with_images_beside_or_below(tmp_path, folder):
    annotations = [thing(i, i, (3, 7)[i % 2], [0, 0, 4, 4]) for i in range(20)]
    file = write(tmp_path, "all.json", tree([image(i) for i in range(20)], annotations), folder)
    for path in (file, tmp_path):
        data = open_coco(str(path), task="detect", seed=5)
        train, val = data.splits["train"], data.splits["val"]
        assert (len(train), len(val)) == (16, 4)
        assert np.bincount(val.labels).tolist() == [2, 2]
    again = open_coco(str(file), task="detect", seed=5).splits["val"]
    assert [again.name(i) for i in range(4)] == [val.name(i) for i in range(4)]
    assert list(open_coco(str(file), need=("test",)).splits) == ["test"]
    assert list(open_coco(str(file), need=()).splits) == ["train"]


def test_a_json_in_each_split_folder(tmp_path):
    for split, keys in {"train": (1, 2), "valid": (3,), "test": (4,)}.items():
        annotations = [thing(i, i, 3, [0, 0, 4, 4]) for i in keys]
        content = tree([image(i) for i in keys], annotations)
        write(tmp_path, f"{split}/_annotations.coco.json", content, split)
    data = open_coco(str(tmp_path), task="detect")
    assert {key: len(source) for key, source in data.splits.items()} == {
        "train": 2, "val": 1, "test": 1,
    }  # fmt: skip
    assert data.ignored == ("_annotations.coco.json: train has no object of cat",)
    assert "1 classes without any object in train: cat" in error_of(tmp_path, "classify")


def test_files_of_another_name_beside_the_folders_of_coco(tmp_path):
    """As DETR's fine-tuning has it: custom_train.json for train2017/."""
    for split in ("train", "val"):
        name = f"annotations/custom_{split}.json"
        content = tree([image(1)], [thing(1, 1, 3, [1, 1, 7, 7])], [{"id": 3, "name": "cat"}])
        write(tmp_path, name, content, images=f"{split}2017")
    data = open_coco(str(tmp_path), task="detect")
    assert {key: len(source) for key, source in data.splits.items()} == {"train": 1, "val": 1}


def test_the_split_folders_of_supervisely(tmp_path):
    for split in ("train", "val"):
        content = tree([image(1)], [thing(1, 1, 3, [0, 0, 4, 4])], CATEGORIES[1:])
        write(tmp_path / "a" / split, "annotations/coco_instances.json", content, "images")
    assert list(open_coco(str(tmp_path / "a"), task="detect").splits) == ["train", "val"]
    assert error_of(tmp_path).endswith(f"saw a/; did you mean coco:{tmp_path / 'a'}?")


def test_labels_of_whole_images(tmp_path):
    """Datumaro writes labels_train.json, and image_info_train.json without annotations."""
    labels = [{"id": i, "image_id": 1, "category_id": key} for i, key in enumerate((3, 7))]
    write(tmp_path, "annotations/labels_train.json", tree([image(1)], labels), "images")
    write(tmp_path, "annotations/image_info_train.json", tree([image(1)], []), "images")
    data = open_coco(str(tmp_path), task="multilabel", need=("train",))
    assert data.splits["train"].target(0).tolist() == [1, 1]
    assert "bbox is None, not 4 numbers" in error_of(tmp_path)


def test_a_size_that_is_missing_is_read(tmp_path):
    bare = {"id": 1, "file_name": "1.png"}
    write(tmp_path, "a.json", tree([bare], [thing(1, 1, 3, [6, 5, 6, 5])]))
    data = open_coco(str(tmp_path), task="detect", need=("train",))
    assert data.splits["train"].target(0).xyxy.tolist() == [[6, 5, 12, 10]]


def test_an_image_of_another_size_than_annotated(tmp_path):
    write(tmp_path, "a.json", tree([image(1, width=10, height=12)], [thing(1, 1, 3, [0, 0, 2, 2])]))
    source = open_coco(str(tmp_path), task="detect", need=("train",)).splits["train"]
    with pytest.raises(ImageError, match=r"1\.png: 12×10, but annotated as 10×12"):
        source.image(0)


def test_boxes_that_reach_out_are_cut_and_noted(tmp_path):
    annotations = [
        thing(1, 1, 3, [-3, 2, 5, 5]),
        thing(2, 1, 3, [8, 8, 4.5, 2.5]),  # half a pixel is rounding
    ]
    write(tmp_path, "a.json", tree([image(1)], annotations, CATEGORIES[1:]))
    data = open_coco(str(tmp_path), task="detect", need=("train",))
    assert data.splits["train"].target(0).xyxy.tolist() == [[0, 2, 2, 7], [8, 8, 12, 10]]
    assert data.ignored == (
        "a.json: annotation 1 (1.png): box [-3, 2, 2, 7] reaches out of its image (12×10): cut",
    )


BAD_ANNOTATIONS = {
    "lies outside its image (12×10)": {"bbox": [20, 2, 3, 3]},
    "annotation 5: unknown image_id 44": {"image_id": 44},
    "annotation 5 (1.png): unknown category_id 2": {"category_id": 2},
    "annotation 5 (1.png): unknown category_id None": {"category_id": None},
    "annotation 5: unknown image_id [1]": {"image_id": [1]},
    "bbox is [1, 2, 3], not 4 numbers": {"bbox": [1, 2, 3]},
    "bbox is None, not 4 numbers": {"bbox": None},
    "bbox is [1, 2, 3, nan], not 4 numbers": {"bbox": [1, 2, 3, float("nan")]},
}


@pytest.mark.parametrize("expected", BAD_ANNOTATIONS)
@pytest.mark.parametrize("task", ["detect", "classify", "multilabel"])
def test_bad_annotations(tmp_path, expected, task):
    bad = {**thing(5, 1, 3, [0, 0, 1, 1]), **BAD_ANNOTATIONS[expected]}
    file = write(tmp_path, "a.json", tree([image(1)], [thing(1, 1, 7, [0, 0, 9, 9]), bad]))
    found = error_of(tmp_path, task, need=("train",))
    assert found.startswith(f"{file}: annotation 5") and expected in found


BAD_SEGMENTATIONS = {
    "has no segmentation": [],
    "has a polygon of less than 3 points": [[1, 1, 4, 4]],
    "not a list of polygons": [[1, 1, 4, 4, 2]],
    "not a list of polygons, each [x, y, x, y, …]": [1, 1, 4, 4, 3, 3],
    "segmentation: not a list of polygons": [["a", 1, 4, 4, 3, 3]],
    "segmentation: not a list": [[1, 1, 4, 4, 3, float("inf")]],
    "its size [12, 10] is not the image's, [10, 12]": {"counts": [120], "size": [12, 10]},
    "run lengths cover 121 pixels, not 12×10": {"counts": [120, 1], "size": [10, 12]},
    "segmentation: no run lengths": {"counts": "~~", "size": [10, 12]},
    "counts are neither text nor whole numbers": {"counts": [60.0, 60], "size": [10, 12]},
    "annotation 5 (1.png): segmentation": 7,
}


@pytest.mark.parametrize("expected", BAD_SEGMENTATIONS)
def test_bad_segmentations(tmp_path, expected):
    bad = thing(5, 1, 3, [0, 0, 1, 1], segmentation=BAD_SEGMENTATIONS[expected])
    write(tmp_path, "a.json", tree([image(1)], [bad]))
    assert expected in error_of(tmp_path, "segment", need=("train",), strict=True)


def test_a_mask_as_text(tmp_path):
    mask = np.zeros((HEIGHT, WIDTH), np.uint8)
    mask[3:7, 2:9] = 1
    runs = {"counts": compressed(runs_of(mask)), "size": [HEIGHT, WIDTH]}
    write(tmp_path, "a.json", tree([image(1)], [thing(5, 1, 7, [0, 0, 1, 1], segmentation=runs)]))
    source = open_coco(str(tmp_path), task="segment", need=()).splits["train"]
    np.testing.assert_array_equal(source.target(0), mask * 2)


@pytest.mark.parametrize("task", ["detect", "classify", "multilabel", "segment"])
@pytest.mark.parametrize(
    ("bbox", "shown"), [([2, 2, 3, 0], "[2, 2, 5, 2]"), ([2, 2, 3, -1], "[2, 2, 5, 1]")]
)
def test_objects_without_area_are_left_out_and_named(tmp_path, task, bbox, shown):
    """COCO's train2017 has two boxes of height 0."""
    outline = {"segmentation": [square(0, 0, 4).tolist()]}
    things = [thing(i, i, (3, 7)[i % 2], [0, 0, 4, 4], **outline) for i in range(4)]
    things.append(thing(50, 1, 7, bbox, segmentation=[[2, 2, 2, 2, 5, 2, 5, 2]]))
    write(tmp_path, "a.json", tree([image(i) for i in range(4)], things))
    data = open_coco(str(tmp_path), task=task, need=("train",))
    what = "its segmentation has no area" if task == "segment" else f"box {shown} has no area"
    assert data.ignored == (f"a.json: annotation 50 (1.png): {what}: left out",)
    with pytest.raises(DataError, match=r"annotation 50 \(1\.png\): .* has no area"):
        open_data(f"coco:{tmp_path}", task=task, strict=True)


@pytest.mark.parametrize("task", ["detect", "multilabel", "segment"])
def test_train_without_any_object(tmp_path, task):
    things = [thing(5, 1, 7, [2, 2, 3, 0], segmentation=[])]
    write(tmp_path, "a.json", tree([image(1), image(2)], things))
    expected = f"a.json: train has no object; {task} needs annotated images"
    if task == "segment":
        expected = "2 classes without any pixel in train: dog, cat"
    assert expected in error_of(tmp_path, task)


def test_a_class_without_a_pixel_in_train(pair):
    outline = {"segmentation": [square(1, 1, 8).tolist()]}
    content = tree([image(i) for i in (1, 2, 3)], [thing(1, 1, 7, [1, 1, 8, 8], **outline)])
    write(pair, "annotations/instances_train2017.json", content, "train2017")
    assert "1 classes without any pixel in train: dog; remove them" in error_of(pair, "segment")
    assert open_coco(str(pair), task="segment", need=()).classes == ("background", "dog", "cat")


def test_a_project_that_is_called_as_its_class(tmp_path):
    """Roboflow's first category is the project; here the project's name is a class's as well."""
    categories = [
        {"id": 0, "name": "house", "supercategory": "none"},
        {"id": 1, "name": "car", "supercategory": "house"},
        {"id": 2, "name": "house", "supercategory": "house"},
    ]
    things = [thing(1, 1, 1, [1, 1, 7, 7]), thing(2, 1, 2, [1, 1, 7, 7])]
    data = open_coco(
        str(write(tmp_path, "x.json", tree([image(1)], things, categories))), task="detect", need=()
    )
    assert data.classes == ("car", "house")
    assert data.splits["train"].target(0).labels.tolist() == [0, 1]


def test_the_background_of_labelme_is_no_class_of_its_own(tmp_path):
    categories = [{"id": 0, "name": "_background_"}, {"id": 1, "name": "cat"}]
    outline = {"segmentation": [[1, 1, 8, 1, 8, 8]]}
    file = write(
        tmp_path, "x.json", tree([image(1)], [thing(1, 1, 1, [1, 1, 7, 7], **outline)], categories)
    )
    assert open_coco(str(file), task="segment", need=()).classes == ("background", "cat")


def test_a_class_whose_pixels_are_all_set_aside(tmp_path):
    """A dog in one image of ten: the seed decides on which side it is."""
    outline = {"segmentation": [square(0, 0, 4).tolist()]}
    things = [thing(i, i, 7, [0, 0, 4, 4], area=16, **outline) for i in range(10)]
    things.append(thing(99, 4, 3, [0, 0, 4, 4], area=4, **outline))
    write(tmp_path, "a.json", tree([image(i) for i in range(10)], things))
    refused = 0
    for seed in range(12):
        try:
            train = open_coco(str(tmp_path), task="segment", seed=seed).splits["train"]
            assert any((train.target(i) == 1).any() for i in range(len(train)))
        except DataError as error:
            assert "1 classes without any pixel in train: dog" in str(error)
            refused += 1
    assert 0 < refused < 12


def test_a_category_that_is_only_a_supercategory(tmp_path):
    """As Roboflow exports it: the project is category 0."""
    own = [{"id": 0, "name": "pets", "supercategory": "none"}]
    own += [{**entry, "supercategory": "pets"} for entry in CATEGORIES]
    outline = {"segmentation": [square(0, 0, 4).tolist()]}
    things = [thing(i, i, (3, 7)[i % 2], [0, 0, 4, 4], **outline) for i in range(10)]
    write(tmp_path, "a.json", tree([image(i) for i in range(10)], things, own))
    for task, first in (("classify", ()), ("detect", ()), ("segment", ("background",))):
        data = open_coco(str(tmp_path), task=task)
        assert data.classes == (*first, "dog", "cat")
        assert data.ignored == ("category pets: only a supercategory, left out",)
    things.append(thing(99, 1, 0, [0, 0, 4, 4]))
    write(tmp_path, "a.json", tree([image(i) for i in range(10)], things, own))
    assert open_coco(str(tmp_path), task="detect").classes == ("pets", "dog", "cat")


BAD_IMAGES = {
    "image 1.png comes twice": [image(1), image(2, file_name="1.png")],
    "image id 1 comes twice": [image(1), image(1, file_name="one.png")],
    "image 1.png has the size 0×10": [image(1, width=0)],
    "image 1.png has the size '12'×10": [image(1, width="12")],
    "image 1.png has the size None×10": [image(1, width=None)],
    "image 1.png has the size 1000000×1000000": [image(1, width=10**6, height=10**6)],
    "image 1 needs an id and a file_name; it has None": [image(1, file_name=None)],
}


@pytest.mark.parametrize("expected", BAD_IMAGES)
def test_bad_images(tmp_path, expected):
    write(tmp_path, "a.json", tree(BAD_IMAGES[expected], []))
    assert expected in error_of(tmp_path)


BAD_CATEGORIES = {
    "category id 3 comes twice": [{"id": 3, "name": "a"}, {"id": 3, "name": "b"}],
    "category 3 needs an id and a name; it has ''": [{"id": 3, "name": ""}],
    "class names that come twice: a": [{"id": 3, "name": "a"}, {"id": 7, "name": "a"}],
    "its list of categories is empty": [],
}


@pytest.mark.parametrize("expected", BAD_CATEGORIES)
def test_bad_categories(tmp_path, expected):
    write(tmp_path, "a.json", tree([image(1)], [], BAD_CATEGORIES[expected]))
    assert expected in error_of(tmp_path)


def test_missing_images_are_counted(tmp_path):
    write(tmp_path, "a.json", tree([image(i) for i in range(9)], []))
    for i in range(2, 9):
        (tmp_path / f"{i}.png").unlink()
    found = error_of(tmp_path)
    assert f"image 2.png is not in {tmp_path}; image 3.png" in found
    assert found.endswith("; and 4 more such entries")
    for i in range(2):
        (tmp_path / f"{i}.png").unlink()
    assert "none of its 9 images (0.png, …) is in" in error_of(tmp_path)


def test_val_with_another_category(pair):
    content = tree([image(9)], [], [*CATEGORIES, {"id": 1, "name": "bird"}])
    write(pair, "annotations/instances_val2017.json", content, "val2017")
    assert "1 categories that instances_train2017.json lacks: bird" in error_of(pair)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ('{"images": [\n{"id": 1,}]}', "line 2, column"),
        ("", "line 1, column 1"),
        ("[]", "lacks its list of images"),
        ('{"images": [], "annotations": {}}', "lacks its list of annotations"),
        ('{"images": [1]}', "lacks its list of images"),
        ("[" * 100_000, "nested too deeply"),
    ],
)
def test_a_broken_json(tmp_path, text, expected):
    file = write(tmp_path, "a.json", text)
    found = error_of(tmp_path)
    assert found.startswith(f"{file}: ") and expected in found


def test_bytes_that_are_no_text(tmp_path):
    (tmp_path / "a.json").write_bytes(b'{"images": "\xff"}')
    assert "byte 12 is not UTF-8 text" in error_of(tmp_path)


def test_which_json(tmp_path):
    assert "no such folder" in error_of(tmp_path / "nowhere")
    assert "holds 0 JSON files (none); wanted: annotations/instances" in error_of(tmp_path)
    for name in ("a.json", "b.json"):
        write(tmp_path, name, tree([], []))
    assert "holds 2 JSON files (a.json, b.json)" in error_of(tmp_path)
    for year in (2014, 2017):
        write(tmp_path, f"annotations/instances_val{year}.json", tree([], []))
    found = error_of(tmp_path)
    assert "has both instances_val2014.json and instances_val2017.json for val" in found


def test_a_split_without_an_image(pair):
    file = next(pair.rglob("*val*.json"))
    file.write_text(json.dumps({**json.loads(file.read_text()), "images": [], "annotations": []}))
    assert "its val holds no image for detect: add images, or remove it" in error_of(pair)


def test_a_split_that_is_not_there(pair):
    assert "has no test images; it has train (3), val (1)" in error_of(pair, need=("test",))


@pytest.fixture
def fruits() -> Path:
    folder = Path(__file__).parents[3] / "shared" / "data" / "fruits-nuts"
    if not folder.is_dir():
        pytest.skip("the photographs of ../shared/data/fruits-nuts are not on this machine")
    return folder


def test_real_photographs(fruits):
    data = open_coco(str(fruits), task="detect", need=())
    source = data.splits["train"]
    assert data.classes == ("date", "fig", "hazelnut") and len(source) == 18
    assert sum(len(source.target(i)) for i in range(18)) == 165
    assert source.image(0).size == (800, 600) and not data.ignored


def test_real_outlines_have_the_area_that_is_written_with_them(fruits):
    """And lie in their boxes: the mask of an image is that of its objects."""
    masks = open_coco(str(fruits), task="segment", need=()).splits["train"]
    areas = [0.0] * 18
    for entry in json.loads((fruits / "trainval.json").read_text())["annotations"]:
        areas[entry["image_id"]] += entry["area"]
    for i in range(18):
        drawn = int((masks.target(i) > 0).sum())
        assert drawn <= areas[i] * 1.01 and drawn >= areas[i] * 0.9, "objects overlap a little"


def test_real_outlines_are_drawn_as_faster_coco_eval_draws_them(fruits):
    """Up to the pixels of the border, for which its rule is another."""
    core = pytest.importorskip("faster_coco_eval.core.mask", reason="not installed")
    for entry in json.loads((fruits / "trainval.json").read_text())["annotations"]:
        ours = np.zeros((600, 800), np.uint8)
        for polygon in entry["segmentation"]:
            fill_polygon(ours, np.array(polygon, dtype=np.float32), 1)
        theirs = core.decode(core.merge(core.frPyObjects(entry["segmentation"], 600, 800)))
        assert (ours & theirs).sum() / (ours | theirs).sum() > 0.97


@pytest.mark.parametrize("before", ["../upload/1/", "/data/upload/1/", "images\\", "C:\\photos\\"])
def test_paths_of_another_machine(tmp_path, before):
    content = tree([image(1), image(2)], [thing(1, 2, 3, [0, 0, 2, 2])])
    write(tmp_path, "result.json", content, "images")
    for entry in content["images"]:
        entry["file_name"] = before + entry["file_name"]
    (tmp_path / "result.json").write_text(json.dumps(content))
    data = open_coco(str(tmp_path), task="detect", need=())
    assert data.splits["train"].name(1) == str(tmp_path / "images" / "2.png")
    assert len(data.splits["train"].target(1)) == 1


def test_images_in_data_as_fiftyone_writes_them(tmp_path):
    content = tree([image(1), image(2)], [thing(1, 1, 3, [0, 0, 2, 2])])
    write(tmp_path, "labels.json", content, images="data")
    data = open_coco(str(tmp_path), task="detect", need=())
    assert data.splits["train"].name(1) == str(tmp_path / "data" / "2.png")


def test_names_that_come_twice_elsewhere_are_not_guessed(tmp_path):
    content = tree([image(1, file_name="a/1.png"), image(2, file_name="b/1.png")], [])
    (tmp_path / "result.json").write_text(json.dumps(content))
    noise(1).save(tmp_path / "1.png")
    assert "none of its 2 images (a/1.png, …) is in" in error_of(tmp_path)
