import pickle
from pathlib import Path

import numpy as np
import pytest
from pictures import noise
from PIL import Image

from meshuffle.data.annotated import image_size, read_ids
from meshuffle.data.check import check_data
from meshuffle.data.formats import mask_files
from meshuffle.data.formats.masks import open_masks
from meshuffle.data.source import open_data
from meshuffle.errors import DataError, ImageError

SIZE = (6, 4)


def write(root: Path, name: str, ids: np.ndarray | list, folder: str = "", suffix: str = ".jpg"):
    for kind in ("images", "masks"):
        (root / kind / folder).mkdir(parents=True, exist_ok=True)
    noise(len(name), SIZE).save(root / "images" / folder / f"{name}{suffix}")
    array = np.asarray(ids, dtype=np.uint8)
    if array.ndim < 2:
        array = np.resize(array, (SIZE[1], SIZE[0]))
    Image.fromarray(array).save(root / "masks" / folder / f"{name}.png")


def error_of(path: Path | str, **options) -> str:
    with pytest.raises(DataError) as caught:
        open_masks(str(path), **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.fixture
def street(tmp_path: Path) -> Path:
    write(tmp_path, "a", [0, 1, 1, 3], "train")
    write(tmp_path, "b", [0, 0, 0, 7], "train", ".png")
    write(tmp_path, "c", [0, 1, 255], "val")
    return tmp_path


def test_ids_that_are_found(street):
    data = open_masks(str(street))
    assert data.classes == ("class 0", "class 1", "class 3", "class 7") and data.task == "segment"
    train = data.splits["train"]
    first = train.target(0)
    assert first.shape == (4, 6) and first.dtype == np.uint8
    assert first[0].tolist() == [0, 1, 1, 2, 0, 1]
    assert data.splits["val"].target(0)[0].tolist() == [0, 1, 255] * 2
    assert train.labels.tolist() == [1, 0]
    assert train.name(1) == str(street / "images" / "train" / "b.png")
    assert pickle.loads(pickle.dumps(train)).target(0).tolist() == first.tolist()


def test_a_folder_without_an_image(street):
    for kind, name in (("images", "c.jpg"), ("masks", "c.png")):
        (street / kind / "val" / name).unlink()
    assert "its val holds no image for segment: add images, or remove it" in error_of(street)


def test_the_void_id_of_the_caller(street):
    data = open_masks(f"{street}?void=1")
    assert data.classes == ("class 0", "class 3", "class 7")
    assert data.splits["train"].target(0)[0].tolist() == [0, 255, 255, 1, 0, 255]
    for text, expected in {
        "void=x": "'x' is no label id: 0 … 255",
        "void=256": "'256' is no label id",
        "vod=1": "'vod=1' is no option; did you mean 'void'?",
        "void": "'void' is no option",
    }.items():
        assert expected in error_of(f"{street}?{text}")


def test_names_and_void_from_a_file(street):
    (street / "classes.txt").write_text("# by id\nsky\nroad  # grey\n\ntree\ncar\nvoid: 7\n")
    data = open_masks(str(street), need=())
    assert data.classes == ("sky", "road", "tree", "car")
    assert data.splits["train"].target(1)[0].tolist() == [0, 0, 0, 255, 0, 0]
    assert data.splits["train"].labels.tolist() == [1, 0]
    assert "train has no object of tree" in data.ignored
    assert "1 classes without any pixel in train: tree; remove them" in error_of(street)
    assert open_masks(f"{street}?void=2").classes == ("sky", "road", "car")


def test_no_more_masks_are_read_than_show_every_class(street, monkeypatch):
    (street / "classes.txt").write_text("sky\nroad\n")
    for i in range(200):
        write(street, f"m{i}", [0, 1], "train")
    read: list[str] = []
    monkeypatch.setattr(mask_files, "read_ids", lambda path, _: read.append(path) or read_ids(path))
    data = open_masks(str(street))
    assert 0 < len(read) <= 64 and not data.splits["train"].labels.any()


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("sky\nsky\n", "class names that come twice: sky"),
        ("sky\nroad\nvoid: none\n", "classes.txt: 'none' is no label id"),
        ("sky\n", "its masks have 1 classes (ids 0); segmentation needs two or more"),
        ("\n".join(map(str, range(256))), "256 classes; a mask holds at most 255"),
    ],
)
def test_a_bad_classes_txt(street, text, expected):
    (street / "classes.txt").write_text(text)
    assert expected in error_of(street)


def test_black_and_white(tmp_path):
    for name in "abcdefghij":
        write(tmp_path, name, [0, 255, 255])
    data = open_masks(str(tmp_path), seed=1)
    assert data.classes == ("background", "thing")
    assert data.notices == ("masks hold 0 and 255 only: 0 is background, and 255 is thing",)
    assert len(data.splits["train"]) == 8 and len(data.splits["val"]) == 2
    assert data.splits["train"].target(0)[0].tolist() == [0, 1, 1] * 2
    assert "1 classes (ids 0)" in error_of(f"{tmp_path}?void=255")
    assert list(open_masks(str(tmp_path), need=("test",)).splits) == ["test"]


def test_black_and_white_with_grey_edges(tmp_path):
    """As resizing with interpolation leaves it: 255 would be void, and each grey a class."""
    ids = np.full((80, 80), 255)
    ids[0], ids[1:] = np.arange(80) * 3, np.where(np.arange(80) > 40, 255, 0)
    write(tmp_path, "a", ids)
    assert "black and white with 79 greys between; save them with 0" in error_of(tmp_path)


@pytest.mark.parametrize("splits", [(), ("train", "val")])
def test_two_names_for_black_and_white(tmp_path, splits):
    """As most tools write binary masks: 255 was void, and the thing was never learned."""
    for name in "abcdefghij":
        write(tmp_path, name, [0, 255, 255], "train" if splits else "")
    if splits:
        write(tmp_path, "k", [255], "val")
    (tmp_path / "classes.txt").write_text("road\ncrack\n")
    for need in ((), ("train", "val")):
        data = open_masks(str(tmp_path), need=need)
        assert data.classes == ("road", "crack")
        assert data.notices == ("masks hold 0 and 255 only: 0 is road, and 255 is crack",)
        assert data.splits["train"].target(0)[0].tolist() == [0, 1, 1] * 2
    assert "1 classes without any pixel in train: crack" in error_of(f"{tmp_path}?void=255")
    (tmp_path / "classes.txt").write_text("road\ncrack\nhole\n")
    assert "2 classes without any pixel in train: crack, hole" in error_of(tmp_path)


def test_255_beside_both_classes_is_void(street):
    (street / "classes.txt").write_text("sky\nroad\n")
    data = open_masks(str(street))
    assert not data.notices and data.splits["val"].target(0)[0].tolist() == [0, 1, 255] * 2


def test_instances(tmp_path):
    """Each value but 0 is an object: ids of 16 bits, and 255, are objects too."""
    for i, name in enumerate("abcdefghij"):
        write(tmp_path, name, [0, 7 + i, 255])
    wide = np.resize(np.array([0, 1, 300, 256, 65535, 0], np.uint16), (4, 6))
    Image.fromarray(wide).save(tmp_path / "masks" / "a.png")
    data = open_masks(f"{tmp_path}?instances=1", need=())
    assert data.classes == ("background", "thing") and not data.notices
    assert data.splits["train"].target(0)[0].tolist() == [0, 1, 1, 1, 1, 0]
    assert data.splits["train"].target(1)[0].tolist() == [0, 1, 1] * 2
    without = open_masks(f"{tmp_path}?instances=1&void=255", need=()).splits["train"]
    assert without.target(1)[0].tolist() == [0, 1, 255] * 2
    assert "?instances=2: write ?instances=1" in error_of(f"{tmp_path}?instances=2")
    (tmp_path / "classes.txt").write_text("soil\nleaf\n")
    assert open_masks(f"{tmp_path}?instances=1").classes == ("soil", "leaf")
    (tmp_path / "classes.txt").write_text("a\nb\nc\n")
    assert "3 classes; ?instances=1 makes two: background and thing" in (
        error_of(f"{tmp_path}?instances=1")
    )


def pairs_in(root: Path, *names: str) -> None:
    """Write images ….jpg and masks ….png of ids 0 and 1."""
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        image = noise(len(name), SIZE)
        mask = Image.fromarray(np.resize(np.array([0, 1], np.uint8), (4, 6)))
        (image if name.endswith(".jpg") else mask).save(root / name)


LAYOUTS = {
    "masks: Images/ with Masks/": ["Images/{s}/a.jpg", "Masks/{s}/a.png"],
    "masks: img/ with mask/": ["img/{s}/{s}a.jpg", "mask/{s}a.png"],
    "masks: images/ with labels/": ["images/{s}/a.jpg", "labels/{s}/a_label.png"],
    "masks: images/ with annotations/masks/": ["images/{s}/a.jpg", "annotations/masks/{s}/a.png"],
    "masks: train/images/ with train/masks/": ["{s}/images/a.jpg", "{s}/masks/a.png"],
    "masks: train/ with trainannot/": ["{s}/a.jpg", "{s}annot/a.png"],
    "masks: train/ with train_masks/": ["{s}/a.jpg", "{s}_masks/a_mask.gif"],
    "masks: x.jpg with x_mask.png": ["{s}/a.jpg", "{s}/a_mask.png"],
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_with_splits(tmp_path, layout):
    pairs_in(tmp_path, *(name.format(s=s) for s in ("train", "val") for name in LAYOUTS[layout]))
    data = open_masks(str(tmp_path))
    assert data.layout == layout and not data.ignored
    assert {key: len(source) for key, source in data.splits.items()} == {"train": 1, "val": 1}
    for source in data.splits.values():
        assert source.target(0)[0].tolist() == [0, 1] * 3 and source.name(0).endswith("a.jpg")


@pytest.mark.parametrize("names", [("xrays", "masks"), ("images", "manual")])
@pytest.mark.parametrize("split", ["", "train"])
def test_a_folder_of_another_name_whose_files_have_the_same(tmp_path, names, split):
    for name in "ab":
        write(tmp_path / split, name, [0, 1])
    for usual, given in zip(("images", "masks"), names, strict=True):
        (tmp_path / split / usual).rename(tmp_path / split / given)
    data = open_masks(str(tmp_path), need=("train",))
    assert sum(map(len, data.splits.values())) == 2 and data.splits["train"].target(0).max() == 1
    (tmp_path / split / names[1] / "a.png").rename(tmp_path / split / names[1] / "z.png")
    assert "images with masks are not recognised" in error_of(tmp_path)


def test_masks_beside_their_images(tmp_path):
    for name in "abcde":
        pairs_in(tmp_path, f"{name}.jpg", f"{name}_label.png")
    pairs_in(tmp_path, "old_label.png")
    data = open_masks(str(tmp_path), need=())
    assert data.layout == "masks: x.jpg with x_label.png" and len(data.splits["train"]) == 5
    (tmp_path / "c_label.png").unlink()
    assert "c.jpg has no mask c.png" in error_of(tmp_path)


def test_names_in_the_table_of_roboflow(tmp_path):
    """It names classes that no mask has, and those are no classes."""
    pairs_in(tmp_path, "train/a.jpg", "train/a_mask.png", "train/b.jpg", "train/b_mask.png")
    text = "Pixel Value, Class\n0, background\n1, Cow statue\n2, Grass\n"
    (tmp_path / "train" / "_classes.csv").write_text(text)
    assert open_masks(str(tmp_path)).classes == ("background", "Cow statue")


def test_a_test_split_without_masks(tmp_path):
    pairs_in(tmp_path, "train/a.jpg", "trainannot/a.png", "val/b.jpg", "valannot/b.png")
    pairs_in(tmp_path, "test/c.jpg")
    (tmp_path / "testannot").mkdir()
    assert open_masks(str(tmp_path)).ignored == ("test/: no masks: left out",)
    assert "test/c.jpg has no mask testannot/c.png" in error_of(tmp_path, need=("test",))


def test_masks_that_are_jpegs(tmp_path):
    pairs_in(tmp_path, "images/a.jpg", "masks/a.jpg")
    assert "masks/a.jpg is a JPEG, which changes label ids; save it as PNG" in error_of(tmp_path)


def test_masks_that_are_arrays(tmp_path):
    pairs_in(tmp_path, "images/a.jpg")
    (tmp_path / "masks").mkdir()
    np.save(tmp_path / "masks" / "a.npy", np.eye(3))
    with pytest.raises(
        DataError, match=r"a\.png; .*a\.npy is a NumPy array, .* save each as a PNG"
    ):
        open_data(f"masks:{tmp_path}", task="segment")


def test_an_id_without_a_name_is_found_by_check(street):
    write(street, "d", [2], "train")
    (street / "classes.txt").write_text("sky\nroad\ntree\ncar\n")
    source = open_masks(str(street)).splits["train"]
    with pytest.raises(ImageError, match=r"b\.png: unknown label ids 7 in 25\.0% of it"):
        source.target(1)
    report = check_data(f"masks:{street}", task="segment")
    assert len(report.unreadable) == 1 and "unknown label ids 7" in report.unreadable[0][1]


def test_masks_that_are_wrong_are_errors_of_their_image(street):
    source = open_masks(str(street)).splits["train"]
    path = street / "masks" / "train" / "a.png"
    wrong = {
        r"a\.png: 5×4, but its image images/train/a\.jpg is 6×4": np.zeros((4, 5), np.uint8),
        r"a\.png: unknown label ids 300, 301 in 4": np.full((4, 6), 300, np.uint16),
        r"a\.png: holds colours \(RGB\)": np.arange(72, dtype=np.uint8).reshape(4, 6, 3),
    }
    wrong[r"a\.png: unknown label ids 300, 301 in 4"][1:3] = 1
    wrong[r"a\.png: unknown label ids 300, 301 in 4"][0] = 301
    wrong[r"a\.png: unknown label ids 300, 301 in 50"] = wrong.pop(
        r"a\.png: unknown label ids 300, 301 in 4"
    )
    for expected, array in wrong.items():
        Image.fromarray(array).save(path)
        with pytest.raises(ImageError, match=expected):
            source.target(0)
    whole = path.read_bytes()
    for content in (b"", whole[: len(whole) // 2], b"\x89PNG\r\n\x1a\n" + b"\0" * 40, b"GIF89a"):
        path.write_bytes(content)
        with pytest.raises(ImageError, match=r"a\.png: cannot be read"):
            source.target(0)
    path.unlink()
    with pytest.raises(ImageError, match=r"a\.png: cannot be read: No such file"):
        source.target(0)


def test_a_broken_mask_does_not_stop_the_search_for_ids(street):
    (street / "masks" / "train" / "b.png").write_bytes(b"none")
    data = open_masks(str(street))
    assert data.classes == ("class 0", "class 1", "class 3")


@pytest.mark.parametrize("mode", ["P", "1", "L", "RGB", "RGBA", "LA", "I;16"])
def test_modes_of_a_mask(tmp_path, mode):
    ids = np.array([[0, 1], [1, 0]], dtype=np.uint8)
    image = Image.fromarray(ids.astype(np.uint16) if mode == "I;16" else ids)
    if mode == "P":
        image.putpalette([9, 8, 7, 6, 5, 4])
    elif mode == "1":
        image = Image.fromarray(ids * 255).convert("1")
    elif mode != "I;16":
        image = image.convert(mode)
    image.save(tmp_path / "a.png")
    assert read_ids(str(tmp_path / "a.png")).tolist() == ids.tolist()


@pytest.mark.parametrize("suffix", [".jpg", ".png", ".webp"])
@pytest.mark.parametrize("orientation", [0, 1, 3, 6, 8])
def test_size_of_an_upright_image(tmp_path, suffix, orientation):
    exif = Image.Exif()
    if orientation:
        exif[0x0112] = orientation
    path = tmp_path / f"a{suffix}"
    noise(1, (12, 10)).save(path, exif=exif)
    assert image_size(str(path)) == ((10, 12) if orientation >= 5 else (12, 10))


def test_size_of_what_is_no_image(tmp_path):
    (tmp_path / "a.jpg").write_bytes(b"no")
    with pytest.raises(ImageError, match=r"a\.jpg: cannot be read"):
        image_size(str(tmp_path / "a.jpg"))


def test_pairs(street):
    (street / "masks" / "train" / "b.png").unlink()
    assert "images/train/b.png has no mask masks/train/b.png" in error_of(street)
    write(street, "b", [0, 1], "train")
    assert "images/train/b comes twice, with two extensions" in error_of(street)
    (street / "images" / "train" / "b.png").unlink()
    (street / "images" / "train" / "a.jpg").unlink()
    assert open_masks(str(street), need=("train",)).ignored == ("masks/train/a.png: no image",)


def test_folders(tmp_path):
    assert "no such folder" in error_of(tmp_path / "x")
    assert "looked for images/ with masks/, train/images/ with" in error_of(tmp_path)
    assert error_of(tmp_path).endswith("; saw nothing")
    (tmp_path / "images").mkdir()
    (tmp_path / "b.txt").touch()
    assert error_of(tmp_path).endswith("; saw images/, b.txt")
    write(tmp_path, "a", [0, 1], "val")
    write(tmp_path, "b", [0, 1], "valid")
    assert "has two folders for val" in error_of(tmp_path)


@pytest.fixture
def camvid() -> Path:
    folder = Path(__file__).parents[3] / "shared" / "data" / "camvid"
    if not folder.is_dir():
        pytest.skip("the photographs of ../shared/data/camvid are not on this machine")
    return folder


def test_real_streets(camvid):
    data = open_masks(f"{camvid}?void=11")
    assert data.classes == tuple(f"class {i}" for i in range(11)) and not data.ignored
    train, val = data.splits["train"], data.splits["val"]
    assert (len(train), len(val)) == (60, 20)
    masks = [val.target(i) for i in range(20)]
    assert {mask.shape for mask in masks} == {(360, 480)}
    assert set(np.unique(masks).tolist()) <= {*range(11), 255}
    assert train.image(0).size == (480, 360)
    assert len(open_masks(str(camvid)).classes) == 12


def coloured(root: Path, name: str, pixels: list, mode: str = "RGB") -> None:
    """An image and a mask of one row, of these colours."""
    write(root, name, 0)
    array = np.resize(np.array(pixels, dtype=np.uint8), (SIZE[1], SIZE[0], 3))
    Image.fromarray(array).convert(mode).save(root / "masks" / f"{name}.png")


@pytest.mark.parametrize("mode", ["RGB", "RGBA"])
def test_masks_in_colours(tmp_path, mode):
    """CamVid, as CVAT writes it: the background is not in the list."""
    for i in range(5):
        colours = [(0, 0, 0), (128, 0, 0), (0, 128, 0)]
        coloured(tmp_path, f"m{i}", colours, mode)
    assert "segmentation needs two or more" in error_of(tmp_path)
    (tmp_path / "label_colors.txt").write_text("128 0 0 Apfel\n0 128 0\ttree top\n")
    data = open_masks(str(tmp_path))
    assert data.classes == ("background", "Apfel", "tree top")
    assert data.splits["train"].target(0)[0].tolist() == [0, 1, 2] * 2
    (tmp_path / "label_colors.txt").write_text("128 0 0 Apfel\n0 120 0 tree\n0 0 0 Void\n")
    source = open_masks(str(tmp_path), need=()).splits["train"]
    with pytest.raises(ImageError, match=r"holds the colour \[0, 128, 0\], which is of no class"):
        source.target(0)
    (tmp_path / "label_colors.txt").write_text("128 0 Apfel\n")
    assert "label_colors.txt: '128 0 Apfel' is neither" in error_of(tmp_path)


def test_masks_of_ids_do_not_take_the_names_of_colours(tmp_path):
    for i in range(5):
        write(tmp_path, f"m{i}", [0, 1])
    (tmp_path / "label_colors.txt").write_text("128 0 0 Apfel\n0 0 0 Void\n")
    assert open_masks(str(tmp_path)).classes == ("class 0", "class 1")


def test_tiff(tmp_path):
    for i in range(5):
        write(tmp_path, f"m{i}", [0, 1], suffix=".TIF")
        Image.open(tmp_path / "masks" / f"m{i}.png").save(tmp_path / "masks" / f"m{i}.tif")
        (tmp_path / "masks" / f"m{i}.png").unlink()
    data = open_masks(str(tmp_path), need=())
    assert data.splits["train"].target(0)[0].tolist() == [0, 1] * 3
    assert data.splits["train"].image(0).size == SIZE
