import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pictures import noise

from meshuffle.data.entries import repeated, split_options
from meshuffle.data.formats.table import open_csv, open_json
from meshuffle.errors import DataError


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Ten images in a/."""
    (tmp_path / "a").mkdir()
    for i in range(10):
        noise(i).save(tmp_path / "a" / f"{i}.png")
    return tmp_path


def table(root: Path, *lines: str, name: str = "t.csv") -> str:
    (root / name).write_text("\n".join(lines) + "\n", encoding="utf-8")
    return str(root / name)


def objects(root: Path, *entries: object, lines: bool = False) -> str:
    text = "\n".join(map(json.dumps, entries)) if lines else json.dumps(entries)
    return table(root, text, name="t.json")


def error_of(opener, path: str, **options) -> str:
    with pytest.raises(DataError) as caught:
        opener(path, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def targets(source) -> list:
    return [np.asarray(source.target(i)).tolist() for i in range(len(source))]


TRAIN = {"need": ("train",)}


@pytest.mark.parametrize("image", ["image", "file", "path", "filename", "photo"])
@pytest.mark.parametrize("label", ["label", "class"])
def test_classify(photos, image, label):
    rows = [f"a/{i}.png,{('bee', 'ant')[i % 2]},{('train', 'valid')[i // 8]}" for i in range(10)]
    data = open_csv(table(photos, f"{image},{label},split", *rows))
    assert data.classes == ("ant", "bee") and data.task == "classify"
    train, val = data.splits["train"], data.splits["val"]
    assert targets(train) == [1, 0] * 4 == train.labels.tolist() and targets(val) == [1, 0]
    assert type(train.target(0)) is int
    assert train.name(3) == str(photos / "a/3.png")
    np.testing.assert_array_equal(np.asarray(train.image(3)), np.asarray(noise(3)))


def test_without_a_split_column(photos):
    path = table(photos, "image,label", *[f"a/{i}.png,{i % 2}" for i in range(10)])
    data = open_csv(path, seed=3)
    assert (len(data.splits["train"]), len(data.splits["val"])) == (8, 2)
    assert data.splits["val"].labels.tolist() in ([0, 1], [1, 0])
    assert data.splits["val"].name(0) == open_csv(path, seed=3).splits["val"].name(0)
    assert list(open_csv(path, need=("test",)).splits) == ["test"]
    assert list(open_csv(path, need=()).splits) == ["train"]


def test_multilabel_by_names(photos):
    path = table(photos, "image,labels", "a/0.png,red|big", "a/1.png,", "a/2.png,blue; red")
    data = open_csv(path, task="multilabel", **TRAIN)
    assert data.classes == ("big", "blue", "red")
    assert targets(open_csv(path, task="multilabel", need=()).splits["train"]) == [
        [1, 0, 1],
        [0, 0, 0],
        [0, 1, 1],
    ]


def test_a_label_that_train_lacks_is_noted(photos):
    path = table(photos, "image,labels,split", "a/0.png,red,train", "a/1.png,big|red,val")
    data = open_csv(path, task="multilabel")
    assert data.ignored == ("train has no object of big",)
    assert targets(data.splits["val"]) == [[1, 1]]


def test_multilabel_by_columns(photos):
    path = table(
        photos,
        "image,red,big,age,name",
        "a/0.png,1,0,12,x",
        "a/1.png,0,1.0,30,y",
        "a/2.png,False,TRUE,7,z",
    )
    data = open_csv(path, task="multilabel", need=())
    assert data.classes == ("red", "big")
    assert targets(data.splits["train"]) == [[1, 0], [0, 1], [0, 1]]
    assert data.splits["train"].target(0).dtype == np.float32
    assert data.splits["train"].labels.tolist() == [0, 1, 1]
    assert data.ignored == (
        "column age does not hold 0 or 1: left out",
        "column name does not hold 0 or 1: left out",
    )
    assert open_csv(f"{path}?targets=big", task="multilabel", need=()).classes == ("big",)


def test_regress(photos):
    path = table(
        photos, "image,x,split,y,note", "a/0.png,1.5,train,-3,ok", "a/1.png,2e1,val,0,fine"
    )
    data = open_csv(path, task="regress")
    assert data.classes == ("x", "y") and data.task == "regress"
    assert targets(data.splits["train"]) == [[1.5, -3]] and targets(data.splits["val"]) == [[20, 0]]
    assert data.splits["train"].target(0).dtype == np.float32
    assert data.splits["train"].labels.tolist() == [0]
    assert data.ignored == ("column note does not hold numbers: left out",)
    data = open_csv(f"{path}?targets=y", task="regress")
    assert data.classes == ("y",) and targets(data.splits["train"]) == [[-3]]


def test_generate_needs_images_only(photos):
    path = table(photos, "image", "a/0.png", "a/1.png")
    assert targets(open_csv(path, task="generate", need=()).splits["train"]) == [0, 0]


@pytest.mark.parametrize("lines", [False, True])
def test_json(photos, lines):
    path = objects(
        photos,
        {"image": "a/0.png", "labels": ["red", 3], "label": "x", "targets": {"h": 1, "w": 2.5}},
        {"image": "a/1.png", "labels": "blue|red", "label": 7, "targets": {"h": 0, "w": -1}},
        lines=lines,
    )
    data = open_json(path, task="multilabel", need=())
    assert data.classes == ("3", "blue", "red")
    assert targets(data.splits["train"]) == [[1, 0, 1], [0, 1, 1]]
    assert open_json(path, need=()).classes == ("7", "x")
    data = open_json(path, task="regress", need=())
    assert data.classes == ("h", "w") and targets(data.splits["train"]) == [[1, 2.5], [0, -1]]


def test_tabs_quotes_blank_lines_and_a_byte_order_mark(photos):
    (photos / "a" / "x, y.png").write_bytes((photos / "a" / "0.png").read_bytes())
    path = table(photos, "﻿image,label", '"a/x, y.png",cat', "", "a/1.png,dog")
    assert open_csv(path, need=()).splits["train"].name(0).endswith("a/x, y.png")
    path = table(photos, "image\tlabel", "a/0.png\tcat, big", "a/1.png\tdog", name="t.tsv")
    assert open_csv(path, need=()).classes == ("cat, big", "dog")


@pytest.mark.parametrize(
    ("task", "lines", "expected"),
    [
        ("regress", ["image,x", "a/0.png,1", "a/1.png,", "a/2.png,4"], "line 3: x is '', no n"),
        ("regress", ["image,x", "a/0.png,1", "a/1.png,n/a", "a/2.png,4"], "x is 'n/a', no number"),
        ("regress", ["image,x", "a/0.png,1", "a/1.png,nan", "a/2.png,4"], "x is 'nan', no number"),
        ("regress", ["image,x", "a/0.png,1", "a/1.png,inf", "a/2.png,4"], "x is 'inf', no number"),
        ("regress", ["image,note", "a/0.png,x"], "lacks a column of numbers; it has image, note"),
        ("multilabel", ["image,x", "a/0.png,1", "a/1.png,2", "a/2.png,0"], "x is '2', not 0 or 1"),
        ("multilabel", ["image,lables", "a/0.png,b"], "; did you mean 'lables'?; it has image"),
        ("multilabel", ["image,labels", "a/0.png,"], "its column labels names no class"),
        ("classify", ["image,lable", "a/0.png,b"], ", or ?targets=NAME; did you mean 'lable'?"),
        ("classify", ["image,label", "a/0.png,", "a/1.png,b"], "label is '', no name of a class"),
        ("classify", ["image,label", "a/0.png,b,c"], "line 2: 3 cells for 2 columns"),
        ("classify", ["image,label", "a/0.png"], "line 2: 1 cells for 2 columns"),
        ("classify", ["image,label", ",b"], "line 2: image is '', not the path of an image"),
        ("classify", ["image,label", "b/0.png,b"], "line 2: no such image in {}: b/0.png"),
        ("classify", ["image,label", "a,b"], "line 2: no such image in {}: a"),
        ("classify", ["image,label", "a/0.png,b", "./a/0.png,c"], "image is './a/0.png', as"),
        ("classify", ["image,label,split", "a/0.png,b,dev"], "split is 'dev'; wanted: train, val"),
        ("classify", ["image,label"], "holds no row"),
        ("classify", [""], "holds no row"),
        ("classify", ["image,label,label", "a/0.png,b,b"], "has a column twice or without a name"),
        ("classify", ["image,label", 'a/0.png,"b'], "line 2: unexpected end of data"),
        ("classify", ["image,label", "a/0.png,b"], "only one class, 'b'"),
    ],
)  # fmt: skip
def test_bad_csv(photos, task, lines, expected):
    path = table(photos, *lines)
    found = error_of(open_csv, path, task=task, **TRAIN)
    assert found.startswith(path) and expected.format(photos) in found


def test_a_table_that_is_no_text(photos):
    (photos / "t.csv").write_bytes(b"PAR1\x15\x04")
    assert "t.csv is binary, not text: save" in error_of(open_csv, str(photos / "t.csv"))


def test_a_long_cell_is_cut(photos):
    (photos / "t.json").write_text(json.dumps([{"image": "a.png", "label": [[0] * 999]}]))
    assert " …, no name of a class" in (found := error_of(open_json, str(photos / "t.json")))
    assert len(found) < 600


def test_bad_entries_are_shown_and_counted(photos):
    rows = [f"a/{i}.png,{'x' if i > 5 else i}" for i in range(10)]
    found = error_of(open_csv, table(photos, "image,y", *rows), task="regress", **TRAIN)
    assert found.endswith(
        "line 8: y is 'x', no number; line 9: y is 'x', no number; line 10: y is 'x', no number; "
        "and 1 more such entries"
    )


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ('[{"image": "a/0.png",}]', "line 1, column"),
        ('{"image": "a/0.png"}\n{"image": \n', "line 2, column"),
        ('{"images": [],\n"annotations": []}', "wanted: a list of objects, or one object a line"),
        ("3", "wanted: a list of objects, or one object a line"),
        ("[]", "holds no row"),
        ("[1, 2]", "entry 1: 1 is no object; entry 2: 2 is no object"),
        ('[{"image": 3, "label": "x"}]', "entry 1: image is 3, not the path of an image"),
        ('[{"image": "a/0.png", "label": null}]', "entry 1: label is None, no name of a class"),
        ('[{"image": "a/0.png"}, {"label": "x"}]', "entry 2: image is None, not the path"),
        ("[" * 100_000, "nested too deeply"),
    ],
)
def test_bad_json(photos, text, expected):
    path = table(photos, text, name="t.json")
    found = error_of(open_json, path, **TRAIN)
    assert found.startswith(path) and expected in found


def test_labels_that_are_no_list(photos):
    path = objects(photos, {"image": "a/0.png", "labels": {"x": 1}}, {"image": "a/1.png"})
    found = error_of(open_json, path, task="multilabel")
    assert "entry 1: labels is {'x': 1}, no list of names; entry 2: labels is None" in found


def test_a_class_that_train_lacks(photos):
    rows = [f"a/{i}.png,{name},{split}" for i, (name, split) in enumerate(
        [("x", "train"), ("y", "train"), ("z", "val")]
    )]  # fmt: skip
    path = table(photos, "image,label,split", *rows)
    assert "1 classes without any row in train: z" in error_of(open_csv, path)
    assert open_csv(path, need=()).classes == ("x", "y", "z")
    assert "has no test images; it has train (2), val (1)" in error_of(
        open_csv, table(photos, "image,label,split", *rows[:2], "a/2.png,x,val"), need=("test",)
    )


def test_what_is_not_there(photos):
    path = table(photos, "image,y", "a/0.png,1")
    assert "; did you mean 't.csv'?" in error_of(open_csv, str(photos / "tt.csv"))
    assert "is a folder; a file is needed here" in error_of(open_csv, str(photos))
    assert "lacks the column 'z'" in error_of(open_csv, f"{path}?targets=z", task="regress")
    found = error_of(open_csv, f"{path}?target=y", task="regress")
    assert "'target=y' is no option; did you mean 'targets'?; known: ?targets=…" in found
    (photos / "t.json").write_bytes(b"[\xff]")
    assert "byte 1 is not UTF-8 text; save it" in error_of(open_json, str(photos / "t.json"))
    (photos / "t.csv").write_bytes(b"\xff\xfei\x00m")
    assert "is not UTF-16 text" in error_of(open_csv, path)


@pytest.mark.parametrize(("mark", "words"), [(",", "commas"), (";", "semicolons"), ("\t", "tabs")])
@pytest.mark.parametrize("name", ["t.csv", "t.tsv"])
def test_separators(photos, mark, words, name):
    rows = [mark.join((f"a/{i}.png", ("x|y", "y")[i % 2], "")) for i in range(10)]
    path = table(photos, mark.join(("Image", "Labels", "")), *rows, name=name)
    data = open_csv(path, task="multilabel")
    assert data.classes == ("x", "y") and not data.ignored
    assert data.layout == f"CSV: {words} between columns, UTF-8"


@pytest.mark.parametrize(
    ("encoding", "name", "notices"),
    [
        ("utf-8-sig", "UTF-8", ()),
        ("utf-16", "UTF-16", ()),
        ("latin-1", "cp1252", ("t.csv is not UTF-8; it is read as cp1252 (latin-1)",)),
        ("cp1252", "cp1252", ("t.csv is not UTF-8; it is read as cp1252 (latin-1)",)),
    ],
)
def test_encodings(photos, encoding, name, notices):
    rows = [f"a/{i}.png,{('Bär', 'Maïs')[i % 2]}" for i in range(10)]
    text = "\n".join(["Image,Label", *rows]) + "\n"
    (photos / "t.csv").write_bytes(text.encode(encoding))
    data = open_csv(str(photos / "t.csv"))
    assert data.classes == ("Bär", "Maïs") and data.notices == notices
    assert data.layout == f"CSV: commas between columns, {name}"


@pytest.mark.parametrize(
    ("header", "note"),
    [
        ("", ()),
        ("index", ("column index numbers the rows: left out; ?targets=index,… takes it",)),
        ("ID", ("column ID numbers the rows: left out; ?targets=ID,… takes it",)),
        ("Unnamed: 0", ("column Unnamed: 0 numbers the rows: left out",)),
    ],
)
@pytest.mark.parametrize("first", [0, 1, 1000])
@pytest.mark.parametrize("place", [0, 2])
def test_an_index_is_no_target(photos, header, note, first, place):
    rows = [[f"a/{i}.png", str(i / 2)] for i in range(10)]
    order = np.random.default_rng(0).permutation(10) + first
    rows.insert(0, ["image", "x"])
    for row, number in zip(rows, [header, *order], strict=True):
        row.insert(place, str(number))
    path = table(photos, *map(",".join, rows))
    data = open_csv(path, task="regress", need=())
    assert data.classes == ("x",) and data.ignored + data.notices == note
    if header:
        chosen = open_csv(f"{path}?targets={header}", task="regress", need=())
        assert chosen.classes == (header,)


def test_numbers_that_are_no_index_are_targets(photos):
    rows = [f"a/{i}.png,{i + 5},{i // 2},{2 * i}" for i in range(10)]
    data = open_csv(table(photos, "image,row,id,fluid", *rows), task="regress")
    assert data.classes == ("id", "fluid") and "column row numbers" in data.notices[0]
    data = open_csv(table(photos, "image,day,id,y", *rows[:9]), task="regress")
    assert data.classes == ("day", "id", "y")
    path = table(photos, "image,day", *(row.rsplit(",", 2)[0] for row in rows))
    assert "numbers the rows: left out; ?targets=day" in error_of(open_csv, path, task="regress")
    rows = [f"{7 * i},a/{i}.png,{2 * i}" for i in range(10)]
    data = open_csv(table(photos, ",image,y", *rows), task="regress")
    assert data.classes == ("y",), "pandas' index of the rows that were chosen"
    rows = [f"a/{i}.png,{2 * i}" for i in range(10)]
    data = open_csv(table(photos, ",y", *rows), task="regress")
    assert data.classes == ("y",), "a column without a name that holds the images"
    entries = [{"index": i, "image": f"a/{i}.png", "y": 3 * i} for i in range(10)]
    assert open_json(objects(photos, *entries), task="regress").classes == ("y",)


def test_ids_of_images(photos):
    """Kaggle's train.csv names 1000 for train_images/1000.png."""
    path = table(photos, "id,x,male", *(f"{i},{i / 2},{i > 4}" for i in range(10)))
    data = open_csv(path, task="regress", need=())
    assert data.classes == ("x", "male")
    assert data.splits["train"].name(9) == str(photos / "a/9.png")
    assert data.notices[0].endswith("extension or folder in the table: 0 is read as a/0.png, …")
    assert data.notices[1].startswith("male: true and false are the targets 1 and 0")
    noise(1).save(photos / "3.png")
    assert f"line 5: 3 is 3.png or a/3.png in {photos}: write its folder too" in error_of(
        open_csv, path, task="regress"
    )


def test_bare_names_of_images_that_lie_in_a_folder(photos):
    path = table(photos, "image,x", *(f"{i}.png,{i / 2}" for i in range(10)))
    data = open_csv(path, task="regress", need=())
    assert data.splits["train"].name(9) == str(photos / "a/9.png")
    assert data.notices[0].endswith(": 0.png is read as a/0.png, …")
    (photos / "b").mkdir(exist_ok=True)
    noise(1).save(photos / "b/3.png")
    found = error_of(open_csv, path, task="regress")
    assert f"line 5: 3.png is a/3.png or b/3.png in {photos}: write its folder too" in found


def test_labels_without_the_names_of_images(photos):
    """A line for each image, in the order of their names."""
    found = error_of(open_csv, table(photos, *"012"))
    assert "; wanted: a header such as image,label; a row names a file" in found


@pytest.mark.parametrize("header", ["Image,Label,Split", "FILE NAME,CLASS,SPLIT"])
def test_headings_in_any_case(photos, header):
    rows = [f"{i % 2},a/{i}.png,{('train', 'val')[i // 8]}" for i in range(10)]
    first, second, third = header.split(",")
    data = open_csv(table(photos, f"{second},{first},{third}", *rows))
    assert data.classes == ("0", "1") and len(data.splits["val"]) == 2


@given(st.lists(st.text("ab", max_size=2)))
def test_repeated_names(names):
    assert repeated(names) == sorted(
        {name for name in names if names.count(name) > 1}, key=lambda n: _second(names, n)
    )


def _second(names: list[str], name: str) -> int:
    return names.index(name, names.index(name) + 1)


def test_a_question_mark_in_a_path(tmp_path):
    (tmp_path / "what?x=1").write_text("")
    assert split_options(str(tmp_path / "what?x=1"), ["x"]) == (str(tmp_path / "what?x=1"), {})
    assert split_options("a?b?x=1", ["x"]) == ("a?b", {"x": "1"})


@pytest.mark.parametrize("separator", [";", "\t"])
def test_decimal_commas(photos, separator):
    rows = [f"a/{i}.png;{i},25;{-i};1.5" for i in range(10)]
    lines = [line.replace(";", separator) for line in ("image;x;y;z", *rows)]
    data = open_csv(table(photos, *lines), task="regress", need=())
    assert data.classes == ("x", "y", "z")
    assert data.splits["train"].target(3).tolist() == [3.25, -3, 1.5]
    assert data.notices == ("decimal commas in x: 3,5 is read as 3.5",)


def test_commas_that_may_be_thousands_are_no_numbers(photos):
    for header, cells in (("image,x", '"1,234"'), ("image;x", "1.234,5")):
        lines = [f"a/{i}.png{header[5]}{cells}" for i in range(10)]
        assert "lacks a column of numbers" in error_of(
            open_csv, table(photos, header, *lines), task="regress"
        )


def test_backslashes_of_windows(photos):
    data = open_csv(table(photos, "image,label", *(f"a\\{i}.png,{i % 2}" for i in range(10))))
    assert data.splits["train"].name(0).endswith(".png") and len(data.splits["val"]) == 2


def test_columns_as_pandas_writes_them(photos):
    columns = {
        "image": {str(i): f"a/{i}.png" for i in range(10)},
        "label": {str(i): "xy"[i % 2] for i in range(10)},
    }
    data = open_json(objects(photos, columns, lines=True), need=())
    assert data.classes == ("x", "y") and data.splits["train"].labels.tolist() == [0, 1] * 5


@pytest.mark.parametrize("separator", [" ", "   ", ",", "\t"])
def test_a_list_without_a_header(photos, separator):
    """As Caffe, PaddlePaddle and MMPretrain read: the image and its label in each line."""
    lines = [f"a/{i}.png{separator}{i % 2}" for i in range(4)]
    data = open_csv(table(photos, *lines, name="list.txt"), need=())
    assert data.classes == ("0", "1") and data.splits["train"].labels.tolist() == [0, 1, 0, 1]
    rows = [f"a/{i}.png{separator}{i % 2}{separator}1.5" for i in range(4)]
    numbers = open_csv(table(photos, *rows), task="regress", need=())
    assert numbers.splits["train"].target(1).tolist() == [1, 1.5]


def test_the_column_of_labels_may_be_named(photos):
    path = table(photos, "image,Mood,label", "a/0.png,glad,x", "a/1.png,sad,x")
    assert open_csv(f"{path}?targets=Mood", need=("train",)).classes == ("glad", "sad")
    assert "lacks" in error_of(open_csv, f"{path}?targets=Mod")
