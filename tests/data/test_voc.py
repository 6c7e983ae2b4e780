from pathlib import Path

import numpy as np
import pytest
from pictures import noise
from PIL import Image

from meshuffle.data.entries import read_text
from meshuffle.data.formats.voc import open_voc
from meshuffle.data.image import decode_image
from meshuffle.errors import DataError, ImageError

WIDTH, HEIGHT = 12, 10
BOX = "<bndbox><xmin>{}</xmin><ymin>{}</ymin><xmax>{}</xmax><ymax>{}</ymax></bndbox>"


def thing(name: str, box: tuple, more: str = "") -> str:
    return f"<object><name>{name}</name>{more}{BOX.format(*box)}</object>"


def xml(*things: str, size: str = f"<width>{WIDTH}</width><height>{HEIGHT}</height>") -> str:
    return f"<annotation><size>{size}<depth>3</depth></size>{''.join(things)}</annotation>"


def write(root: Path, name: str, content: str, suffix: str = ".jpg") -> None:
    for folder in ("Annotations", "JPEGImages"):
        (root / folder).mkdir(parents=True, exist_ok=True)
    (root / "Annotations" / f"{name}.xml").write_text(content)
    noise(1, (WIDTH, HEIGHT)).save(root / "JPEGImages" / f"{name}{suffix}")


def lists(root: Path, folder: str = "Main", **splits: str) -> None:
    (root / "ImageSets" / folder).mkdir(parents=True, exist_ok=True)
    for split, names in splits.items():
        (root / "ImageSets" / folder / f"{split}.txt").write_text(names.replace(" ", "\n"))


def mask(root: Path, name: str, ids: np.ndarray) -> None:
    """A PNG with a palette, as VOC has them."""
    (root / "SegmentationClass").mkdir(exist_ok=True)
    image = Image.fromarray(ids)
    image.putpalette(np.random.default_rng(0).integers(0, 256, 768).tolist())
    image.save(root / "SegmentationClass" / f"{name}.png")


def error_of(path: Path, task: str = "detect", **options) -> str:
    with pytest.raises(DataError) as caught:
        open_voc(str(path), task=task, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.fixture
def pets(tmp_path: Path) -> Path:
    hard = "<difficult>1</difficult>"
    write(tmp_path, "a", xml(thing("dog", (1, 1, 4, 4)), thing("cat", (1, 1, 12, 10))))
    write(tmp_path, "b", xml(thing("dog", (3, 3, 5, 6)), thing("cat", (1, 1, 9, 9), hard)), ".png")
    write(tmp_path, "c", xml(thing("cat", (2, 2, 3, 3))))
    write(tmp_path, "d", xml())
    lists(tmp_path, train="a b", val="c\n", trainval="a b c", test="d")
    return tmp_path


def test_detect(pets):
    data = open_voc(str(pets), task="detect")
    assert data.classes == ("cat", "dog")
    assert {key: len(source) for key, source in data.splits.items()} == {
        "train": 2, "val": 1, "test": 1,
    }  # fmt: skip
    train = data.splits["train"]
    assert train.target(0).xyxy.tolist() == [[0, 0, 4, 4], [0, 0, 12, 10]]
    assert train.target(0).labels.tolist() == [1, 0]
    assert train.target(1).xyxy.tolist() == [[2, 2, 5, 6]]
    assert train.name(1) == str(pets / "JPEGImages" / "b.png") and train.image(1).size == (12, 10)
    assert train.labels.tolist() == [0, 1]
    assert data.ignored == ("1 difficult objects left out",)


def test_other_tasks(pets):
    (pets / "ImageSets/Main/test.txt").unlink()
    train = open_voc(str(pets)).splits["train"]
    assert [train.target(0), train.target(1)] == [0, 1]
    (pets / "ImageSets/Main/test.txt").write_text("d")  # it shows nothing
    assert "its test holds no image for classify" in error_of(pets, "classify")
    rows = open_voc(str(pets), task="multilabel").splits["train"]
    assert [rows.target(i).tolist() for i in range(2)] == [[1, 1], [0, 1]]
    assert open_voc(str(pets), task="generate").splits["val"].target(0) == 0


def test_an_empty_list(pets):
    lists(pets, val="")
    assert "its val holds no image for detect" in error_of(pets)


def test_a_class_that_train_lacks(pets):
    lists(pets, train="b")
    assert open_voc(str(pets), task="detect").ignored[0] == "train has no object of cat"
    assert "1 classes without any object in train: cat" in error_of(pets, "classify")


def test_lists_that_are_not_there(pets):
    for name in ("train", "val"):
        (pets / "ImageSets" / "Main" / f"{name}.txt").unlink()
    data = open_voc(str(pets), task="multilabel")
    assert len(data.splits["train"]) + len(data.splits["val"]) == 3
    for file in (pets / "ImageSets" / "Main").iterdir():
        file.unlink()
    data = open_voc(str(pets), task="multilabel")
    assert len(data.splits["train"]) + len(data.splits["val"]) == 4
    assert list(open_voc(str(pets), task="detect", need=("test",)).splits) == ["test"]


def test_a_test_list_without_annotations(pets):
    (pets / "Annotations" / "d.xml").unlink()
    assert "test.txt: its images have no annotations: left out" in open_voc(str(pets)).ignored
    assert "d.xml: 1 of 1 annotations are missing" in error_of(pets, need=("test",))


def test_a_size_that_is_not_written_is_read(tmp_path):
    write(tmp_path, "a", xml(thing("cat", (8, 2, 30, 30)), size="<width>0</width>"))
    data = open_voc(str(tmp_path), task="detect", need=("train",))
    assert data.splits["train"].target(0).xyxy.tolist() == [[7, 1, 12, 10]]
    assert data.ignored == (
        "Annotations/a.xml: object 1 (cat): box [7, 1, 30, 30] reaches out of its image "
        "(12×10): cut",
    )
    (tmp_path / "JPEGImages" / "a.jpg").write_bytes(b"")
    assert "a.jpg: cannot be read" in error_of(tmp_path)


BOMB = '<?xml version="1.0"?><!DOCTYPE a [<!ENTITY b "c"><!ENTITY d "&b;&b;">]><a>&d;</a>'
BAD = {
    "line 1, column 12: no XML, or cut short": "<annotation>",
    "line 2, column 0: no XML, or cut short": "<annotation>\n<",
    "has a DOCTYPE": BOMB,
    "object 1 lacks its name": xml(thing(" ", (1, 1, 2, 2))),
    "object 1 lacks its bndbox": xml("<object><name>cat</name></object>"),
    "object 1: xmax is 'x', not a number": xml(thing("cat", (1, 1, "x", 2))),
    "object 1: ymin is None, not a number": xml(
        "<object><name>cat</name><bndbox><xmin>1</xmin></bndbox></object>"
    ),
    "object 2 (cat): box [7, 1, 5, 4] has no area": xml(
        thing("dog", (1, 1, 2, 2)), thing("cat", (8, 2, 5, 4))
    ),
    "object 1 (cat): box [13, 1, 20, 4] lies outside its image (12×10)": xml(
        thing("cat", (14, 2, 20, 4))
    ),
    "object 1 (cat): box [nan, 0, 2, 2] is not finite": xml(thing("cat", ("nan", 1, 2, 2))),
}


@pytest.mark.parametrize("expected", BAD)
def test_bad_annotations(pets, expected):
    write(pets, "a", BAD[expected])
    assert f"{pets}: Annotations/a.xml: {expected}" in error_of(pets, strict=True)


def test_a_box_without_area_is_left_out_and_named(pets):
    write(pets, "a", xml(thing("dog", (1, 1, 2, 2)), thing("cat", (8, 2, 5, 4))))
    data = open_voc(str(pets), task="detect")
    assert "Annotations/a.xml: object 2 (cat): box [7, 1, 5, 4] has no area: left out" in (
        data.ignored
    )
    assert len(data.splits["train"].target(0)) == 1


def test_a_bomb_in_another_encoding(pets):
    (pets / "Annotations" / "a.xml").write_bytes(BOMB.encode("utf-16"))
    assert "Annotations/a.xml: has a DOCTYPE" in error_of(pets)


def test_bad_lists(pets):
    lists(pets, train="a b a x", val="b c")
    found = error_of(pets)
    assert "train.txt: a comes twice; train.txt and val.txt both list b" in found
    assert "JPEGImages has no image x" in found
    assert "and 1 more" not in found


def test_what_is_no_voc(tmp_path):
    assert "no such folder" in error_of(tmp_path / "x")
    (tmp_path / "pictures").mkdir()
    found = error_of(tmp_path)
    assert "looked for JPEGImages/ or images/ with Annotations/, the same in train/" in found
    assert found.endswith("and x.jpg with x.xml; saw pictures/")
    assert "images/ with SegmentationClass/" in error_of(tmp_path, "segment")
    write(tmp_path / "VOC2012", "a", xml())
    assert f"did you mean {tmp_path / 'VOC2012'}?" in error_of(tmp_path)
    assert "its annotations hold no object" in error_of(tmp_path / "VOC2012")


@pytest.mark.parametrize(
    ("images", "annotations"),
    [
        *(("images", "annotations"), ("Images", "ANNOTATIONS"), ("JPEGImages", "annotation")),
        *(("images", "annots"), ("images", "annotations/xmls"), ("data", "labels")),
    ],
)
@pytest.mark.parametrize("nested", [False, True])
def test_folders_as_tools_name_them(tmp_path, images, annotations, nested):
    for split in ("train", "valid"):
        below = f"/{split}" if nested else ""
        for folder in (f"{images}{below}", f"{annotations}{below}"):
            (tmp_path / folder).mkdir(parents=True, exist_ok=True)
        noise(1, (WIDTH, HEIGHT)).save(tmp_path / f"{images}{below}/{split}.jpg")
        content = xml(thing("cat", (2, 2, 3, 3)))
        (tmp_path / f"{annotations}{below}/{split}.xml").write_text(content)
    if not nested:
        (tmp_path / "labels").mkdir(exist_ok=True)  # of YOLO's texts, beside
    data = open_voc(str(tmp_path), task="detect")
    assert data.layout == f"VOC: {images}/ with {annotations}/"
    assert {key: len(source) for key, source in data.splits.items()} == {"train": 1, "val": 1}
    assert data.splits["train"].target(0).xyxy.tolist() == [[1, 1, 3, 3]]
    assert data.splits["val"].image(0).size == (WIDTH, HEIGHT)


def test_files_that_git_lfs_did_not_fetch(tmp_path):
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:25\nsize 9901\n"
    write(tmp_path, "a", xml(thing("cat", (2, 2, 3, 3))))
    image = tmp_path / "JPEGImages" / "a.jpg"
    image.write_text(pointer)
    with pytest.raises(ImageError, match=r"a\.jpg: a Git LFS pointer; fetch .* git lfs pull"):
        decode_image(image)
    (tmp_path / "Annotations" / "a.xml").write_text(pointer)
    assert "Annotations/a.xml: a Git LFS pointer; fetch the file" in error_of(tmp_path)
    with pytest.raises(DataError, match=r"a\.xml: a Git LFS pointer"):
        read_text(tmp_path / "Annotations" / "a.xml")


def test_annotations_of_all_splits_in_one_folder(tmp_path):
    (tmp_path / "Annotations").mkdir()
    for name, split in (("a", "train"), ("b", "val"), ("c", "")):
        (tmp_path / "Annotations" / f"{name}.xml").write_text(xml(thing("cat", (2, 2, 3, 3))))
        if split:
            (tmp_path / "images" / split).mkdir(parents=True)
            (tmp_path / "Annotations" / split).mkdir()
            (tmp_path / "Annotations" / split / f"{name}.txt").touch()
            noise(1, (WIDTH, HEIGHT)).save(tmp_path / "images" / split / f"{name}.jpg")
    data = open_voc(str(tmp_path), task="detect")
    assert data.layout == "VOC: images/ with Annotations/" and not data.ignored
    assert [Path(data.splits[key].name(0)).name for key in ("train", "val")] == ["a.jpg", "b.jpg"]


@pytest.mark.parametrize("splits", [("train", "valid", "test"), ("",)])
def test_an_xml_beside_each_image(tmp_path, splits):
    """As Roboflow exports it, and labelImg by default; the splits may hold equal names."""
    for split in splits:
        (tmp_path / split).mkdir(exist_ok=True)
        for name in "abcde":
            noise(1, (WIDTH, HEIGHT)).save(tmp_path / split / f"{name}.jpg")
            (tmp_path / split / f"{name}.xml").write_text(xml(thing("cat", (2, 2, 3, 3))))
    data = open_voc(str(tmp_path), task="detect", need=())
    assert data.layout == "VOC: x.jpg with x.xml"
    assert {key: len(source) for key, source in data.splits.items()} == (
        {"train": 5, "val": 5, "test": 5} if len(splits) > 1 else {"train": 5}
    )
    (tmp_path / splits[0] / "b.jpg").unlink()
    assert f"{splits[0] or tmp_path} has no image b" in error_of(tmp_path)


def test_lists_in_lower_case(pets):
    (pets / "ImageSets" / "Main").rename(pets / "ImageSets" / "main")
    (pets / "ImageSets").rename(pets / "imagesets")
    assert len(open_voc(str(pets), task="detect").splits["test"]) == 1


def test_two_folders_of_one_split(tmp_path):
    for split in ("val", "Validation"):
        (tmp_path / split).mkdir()
    assert "has two folders for val, Validation/ and val/: keep one" in error_of(tmp_path)


def test_an_image_of_another_size_than_annotated(pets):
    write(pets, "a", xml(thing("cat", (1, 1, 2, 2)), size="<width>10</width><height>12</height>"))
    with pytest.raises(ImageError, match=r"a\.jpg: 12×10, but annotated as 10×12"):
        open_voc(str(pets), task="detect").splits["train"].image(0)


def test_segment_by_the_official_classes(tmp_path):
    write(tmp_path, "a", xml(thing("cat", (1, 1, 2, 2)), thing("dog", (1, 1, 9, 9))))
    write(tmp_path, "b", xml(thing("cat", (1, 1, 2, 2))))
    ids = np.array([[0, 8, 12], [255, 20, 0]], dtype=np.uint8).repeat(5, 0).repeat(4, 1)
    mask(tmp_path, "a", ids)
    mask(tmp_path, "b", ids[:, ::-1].copy())
    lists(tmp_path, train="a")
    lists(tmp_path, "Segmentation", train="b", val="a")
    for need in ((), ("train", "val")):
        data = open_voc(str(tmp_path), task="segment", need=need)
        assert data.classes == ("background", "cat", "dog", "tvmonitor"), "those that occur"
        expected = np.where(ids == 255, 255, np.searchsorted([0, 8, 12, 20], ids))
        np.testing.assert_array_equal(
            data.splits["val"].target(0), np.where(ids == 255, 255, expected)
        )
        assert data.splits["train"].labels.tolist() == [1], "cat"
        assert data.splits["val"].labels.tolist() == [2], "dog"
    mask(tmp_path, "b", np.where(ids == 12, 0, ids))
    assert "1 classes without any pixel in train: dog" in error_of(tmp_path, "segment")


def test_segment_by_names_of_its_own(tmp_path):
    for name in "ab":
        write(tmp_path, name, xml(thing("oak", (1, 1, 2, 2)), thing("ash", (1, 1, 2, 2))))
        mask(tmp_path, name, np.full((HEIGHT, WIDTH), 2, np.uint8))
    source = open_voc(str(tmp_path), task="segment", need=()).splits["train"]
    assert source.classes == ("background", "ash", "oak") and (source.target(0) == 2).all()
    assert "1 classes without any pixel in train: ash" in error_of(tmp_path, "segment")
    (tmp_path / "class_names.txt").write_text("__ignore__\n_background_\ntree\n")
    source = open_voc(str(tmp_path), task="segment", need=()).splits["train"]
    assert source.classes == ("_background_", "tree")
    with pytest.raises(ImageError, match=r"png: unknown label ids 2 in 100\.0% of it"):
        source.target(0)
    (tmp_path / "SegmentationClass" / "a.png").unlink()
    lists(tmp_path, train="a b")
    assert "SegmentationClass/a.png is missing" in error_of(tmp_path, "segment")


def test_masks_beside_the_arrays_of_labelme(tmp_path):
    """Its older versions name the folder of pictures SegmentationClassPNG."""
    write(tmp_path, "a", xml(thing("cat", (1, 1, 2, 2))))
    mask(tmp_path, "a", np.eye(HEIGHT, WIDTH, dtype=np.uint8))
    (tmp_path / "SegmentationClass").rename(tmp_path / "SegmentationClassPNG")
    (tmp_path / "SegmentationClass").mkdir()
    (tmp_path / "SegmentationClass" / "a.npy").write_bytes(b"")
    assert len(open_voc(str(tmp_path), task="segment", need=()).splits["train"]) == 1


def test_segment_needs_names(tmp_path):
    write(tmp_path, "a", xml())
    mask(tmp_path, "a", np.zeros((HEIGHT, WIDTH), np.uint8))
    assert "no class_names.txt and no object" in error_of(tmp_path, "segment")


@pytest.fixture
def bccd() -> Path:
    folder = Path(__file__).parents[3] / "shared" / "data" / "bccd"
    if not folder.is_dir():
        pytest.skip("the photographs of ../shared/data/bccd are not on this machine")
    return folder


def test_real_blood_cells(bccd):
    data = open_voc(str(bccd), task="detect")
    assert data.classes == ("Platelets", "RBC", "WBC")
    assert {key: len(source) for key, source in data.splits.items()} == {
        "train": 205, "val": 87, "test": 72,
    }  # fmt: skip
    sources = data.splits.values()
    boxes = [source.target(i) for source in sources for i in range(len(source))]
    assert np.bincount(np.concatenate([b.labels for b in boxes])).tolist() == [361, 4155, 372]
    assert all((b.xyxy[:, 2:] > b.xyxy[:, :2]).all() for b in boxes)
    assert data.splits["train"].image(0).size == (640, 480)


def test_lists_of_names_with_spaces(tmp_path):
    """CVAT's lists hold plain names; VOC's own lists of a class have a number behind them."""
    for name in ("Bild 1", "Bild 2", "c"):
        write(tmp_path, name, xml(thing("dog", (1, 1, 4, 4))))
    lists(tmp_path, train="", val="")
    (tmp_path / "ImageSets" / "Main" / "train.txt").write_text("Bild 1\r\nc  1\r\n")
    (tmp_path / "ImageSets" / "Main" / "val.txt").write_text("Bild 2\n")
    data = open_voc(str(tmp_path), task="detect")
    assert [Path(data.splits["train"].name(i)).name for i in range(2)] == ["Bild 1.jpg", "c.jpg"]
    assert len(data.splits["val"]) == 1


def test_images_without_annotations_are_noted(tmp_path):
    for name in "ab":
        write(tmp_path, name, xml(thing("dog", (1, 1, 4, 4))))
    (tmp_path / "Annotations" / "b.xml").unlink()
    data = open_voc(str(tmp_path), task="detect", need=())
    assert data.ignored == ("1 images without annotations left out: b.jpg",)


def test_other_xml_says_what_it_is(tmp_path):
    (tmp_path / "images").mkdir()
    (tmp_path / "annotations.xml").write_text("<annotations><image name='a.jpg'/></annotations>")
    expected = "annotations.xml: is <annotations>, not VOC's <annotation>"
    assert expected in error_of(tmp_path)


def test_a_folder_above_is_named(tmp_path):
    write(tmp_path / "VOCdevkit" / "VOC2012", "a", xml(thing("dog", (1, 1, 4, 4))))
    assert error_of(tmp_path).endswith(f"did you mean {tmp_path / 'VOCdevkit' / 'VOC2012'}?")


def test_frames_without_xml_have_no_object(tmp_path):
    """CVAT lists every frame, and writes an XML for those that show something."""
    for name in "abc":
        write(tmp_path, name, xml(thing("dog", (1, 1, 4, 4))))
    lists(tmp_path, default="a b c")
    (tmp_path / "Annotations" / "b.xml").unlink()
    data = open_voc(str(tmp_path), task="detect", need=())
    assert len(data.splits["train"]) == 3 and len(data.splits["train"].target(1)) == 0
    assert data.ignored == ("1 images have no XML and so no object: Annotations/b.xml",)
    (tmp_path / "Annotations" / "c.xml").unlink()
    assert "2 of 3 annotations are missing" in error_of(tmp_path)


def test_masks_of_cvat_in_the_colours_of_its_labelmap(tmp_path):
    colours = np.array([(0, 0, 0), (128, 0, 0), (0, 128, 0)], dtype=np.uint8)
    for name in "abcde":
        write(tmp_path, name, xml())
        (tmp_path / "SegmentationClass").mkdir(exist_ok=True)
        pixels = np.resize(colours, (HEIGHT, WIDTH, 3))
        Image.fromarray(pixels).save(tmp_path / "SegmentationClass" / f"{name}.png")
    lists(tmp_path, "Segmentation", default="a b c d e")
    lines = "# label:color_rgb:parts:actions\nbackground:0,0,0::\ntree:0,128,0::\nBär:128,0,0::\n"
    (tmp_path / "labelmap.txt").write_text(lines, encoding="utf-8")
    data = open_voc(str(tmp_path), task="segment")
    assert data.classes == ("background", "tree", "Bär")
    assert data.splits["train"].target(0)[0, :3].tolist() == [0, 2, 1]
    (tmp_path / "labelmap.txt").write_text("background:0,0,0::\ntree:0,0,0::\n")
    assert "2 classes have 1 different colours" in error_of(tmp_path, "segment")


def test_xml_one_folder_too_deep(tmp_path):
    write(tmp_path, "a", xml(thing("dog", (1, 1, 4, 4))))
    (tmp_path / "Annotations" / "default").mkdir()
    (tmp_path / "Annotations" / "a.xml").rename(tmp_path / "Annotations" / "default" / "a.xml")
    assert "no XML directly in its folders of annotations" in error_of(tmp_path)
