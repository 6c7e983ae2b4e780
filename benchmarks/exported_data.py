"""Data sets as annotation tools export them: does Meshuffle read what was drawn?

    python benchmarks/exported_data.py write FOLDER    # where the tools are installed
    python benchmarks/exported_data.py read FOLDER [NAME]    # where Meshuffle is

`write` draws 16 images with three classes of shapes, and exports them with each tool that can be
imported, by the tool's default options. `read` runs `data check` and one epoch of `train` on each
export, and compares images, classes, boxes and pixels with those that were drawn; a format that
Meshuffle does not read must be refused in one line. Prints a line for each;
results/exported_data.csv gets the rows.

What a trial wants: `read`, all that was drawn; `drawn`, without the picture that has no shape (the
tool writes no mask or XML for it); `train`, that split alone; `ids`, classes by number; `contours`,
with less area; `refused`.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import importlib
import io
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

CLASSES = ("Apfel", "Bär", "tree top")
SIZE = (96, 72)
VAL = 12
"""The images from this one on are the val split, where the export has splits."""

Trial = tuple[str, str, str]
"""The DATA, with {} for the case's folder; the task; and what is right: read, or refused."""


@dataclass
class Shape:
    """A polygon of right angles, so that every tool draws the same pixels; [K, 2] of x and y."""

    label: int
    points: NDArray[np.int64]

    @property
    def box(self) -> tuple[int, int, int, int]:
        left, top = self.points.min(axis=0).tolist()
        right, bottom = self.points.max(axis=0).tolist()
        return left, top, right, bottom

    def mask(self) -> NDArray[np.bool_]:
        """Bool [72, 96]: the pixels whose centre is inside."""
        x, y = np.meshgrid(np.arange(SIZE[0]) + 0.5, np.arange(SIZE[1]) + 0.5)
        inside = np.zeros(x.shape, dtype=bool)
        for (x1, y1), (x2, y2) in zip(self.points, np.roll(self.points, -1, axis=0), strict=True):
            if x1 == x2:
                inside ^= (x < x1) & ((y1 <= y) != (y2 <= y))
        return inside


@dataclass
class Picture:
    name: str
    shapes: Sequence[Shape]
    split: str

    @property
    def label(self) -> int:
        """The class of the largest shape; of the picture without shapes, -1."""
        return max(self.shapes, key=lambda s: s.mask().sum()).label if self.shapes else -1

    def ids(self) -> NDArray[np.uint8]:
        """The class of each pixel, from 1 on; 0 is the background."""
        found = np.zeros(SIZE[::-1], dtype=np.uint8)
        for shape in self.shapes:
            found[shape.mask()] = shape.label + 1
        return found

    def image(self) -> Image.Image:
        colours = np.array([[90, 110, 90], [220, 40, 40], [120, 70, 20], [20, 160, 40]])
        rng = np.random.default_rng(sum(map(ord, self.name)))
        pixels = colours[self.ids()] + rng.integers(-20, 20, (*SIZE[::-1], 3))
        return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


def pictures() -> list[Picture]:
    found = []
    outlines = (
        [(0, 0), (4, 0), (4, 4), (0, 4)],
        [(0, 0), (2, 0), (2, 2), (4, 2), (4, 4), (0, 4)],
        [(0, 0), (4, 0), (4, 2), (3, 2), (3, 4), (1, 4), (1, 2), (0, 2)],
    )
    for i in range(16):
        shapes = []
        for k in range(0 if i == 15 else 1 + i % 2):
            label, scale = (i + k) % 3, (7 - 3 * k, 8 - 4 * k)
            corner = np.array([6 + 50 * k + i % 5, 9 + i % 7])
            shapes.append(Shape(label, np.array(outlines[label]) * scale + corner))
        name = f"Bild {i:02} grün.jpg" if i % 4 else f"IMG_{i:02}.JPG"
        found.append(Picture(name, shapes, "train" if i < VAL else "val"))
    return found


def save(folder: Path, named: Sequence[Picture], suffix: str = "") -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for one in named:
        one.image().save(folder / (Path(one.name).stem + suffix if suffix else one.name))


def drawn() -> list[Picture]:
    """The pictures that have a class."""
    return [one for one in pictures() if one.shapes]


# --- Datumaro, the library that writes CVAT's exports


def _datumaro(folder: Path, form: str, kinds: str, splits: bool, **options: Any) -> None:
    import datumaro as dm
    from datumaro.components.media import Image as Media

    save(folder / "source", pictures())
    items = []
    for one in drawn() if kinds in ("label", "mask") else pictures():
        notes: list[Any] = []
        for i, shape in enumerate(one.shapes):
            left, top, right, bottom = shape.box
            if "box" in kinds:
                box = dm.Bbox(left, top, right - left, bottom - top, label=shape.label, id=i + 1)
                box.group = i + 1
                notes.append(box)
            if "polygon" in kinds:
                points = shape.points.astype(float).ravel().tolist()
                notes.append(dm.Polygon(points, label=shape.label, id=i + 1, group=i + 1))
            if "mask" in kinds:
                mask = dm.Mask(shape.mask(), label=shape.label, id=i + 1, group=i + 1)
                notes.append(mask)
        if "label" in kinds:
            notes.append(dm.Label(one.label))
        media = Media.from_file(str(folder / "source" / one.name))
        more = {"subset": one.split} if splits else {}
        items.append(dm.DatasetItem(Path(one.name).stem, media=media, annotations=notes, **more))
    categories: dict[Any, Any] = {
        dm.AnnotationType.label: dm.LabelCategories.from_iterable(CLASSES)
    }
    if "mask" in kinds:  # CVAT gives each class its colour
        colours = dm.MaskCategories.generate(4).colormap
        categories[dm.AnnotationType.mask] = dm.MaskCategories(
            {i: colours[i + 1] for i in range(3)}
        )
    data = dm.Dataset.from_iterable(items, categories=categories)
    data.export(str(folder / "out"), form, save_media=True, **options)
    shutil.rmtree(folder / "source")


def datumaro(form: str, kinds: str, *trials: Trial, splits: bool = False, **options: Any) -> Any:
    def write(folder: Path) -> Sequence[Trial]:
        _datumaro(folder, form, kinds, splits, **options)
        return [(data.replace("{}", "{}/out"), task, right) for data, task, right in trials]

    return write


# --- supervision, Roboflow's library


def _supervision(kind: str) -> Any:
    import supervision as sv

    paths, images, notes = [], {}, {}
    for one in pictures():
        path = one.name
        paths.append(path)
        images[path] = np.asarray(one.image())[:, :, ::-1].copy()
        empty = np.zeros((0, 4))
        notes[path] = sv.Detections(
            xyxy=np.array([s.box for s in one.shapes], dtype=float) if one.shapes else empty,
            class_id=np.array([s.label for s in one.shapes], dtype=int),
            mask=np.array([s.mask() for s in one.shapes])
            if kind == "mask" and one.shapes
            else None,
        )
    return sv.DetectionDataset(classes=list(CLASSES), images=images, annotations=notes)


def supervision_coco(folder: Path) -> Sequence[Trial]:
    _supervision("mask").as_coco(str(folder / "images"), str(folder / "annotations.json"))
    return [("coco:{}", "detect", "read"), ("coco:{}", "segment", "contours")]


def supervision_yolo(folder: Path) -> Sequence[Trial]:
    _supervision("box").as_yolo(
        str(folder / "images"), str(folder / "labels"), str(folder / "data.yaml")
    )
    return [("yolo:{}", "detect", "read"), ("yolo:{}", "classify", "read")]


def supervision_voc(folder: Path) -> Sequence[Trial]:
    _supervision("box").as_pascal_voc(str(folder / "images"), str(folder / "annotations"))
    return [("voc:{}", "detect", "read"), ("voc:{}", "multilabel", "read")]


def supervision_labelme(folder: Path) -> Sequence[Trial]:
    _supervision("box").as_labelme(str(folder / "images"), str(folder / "annotations"))
    return [("{}", "classify", "refused"), ("coco:{}", "detect", "refused")]


def supervision_createml(folder: Path) -> Sequence[Trial]:
    _supervision("box").as_createml(str(folder / "images"), str(folder / "annotations.json"))
    return [("coco:{}", "detect", "refused"), ("json:{}/annotations.json", "classify", "refused")]


def supervision_folders(folder: Path) -> Sequence[Trial]:
    import supervision as sv

    chosen = drawn()
    images = {one.name: np.asarray(one.image())[:, :, ::-1].copy() for one in chosen}
    notes = {one.name: sv.Classifications(class_id=np.array([one.label])) for one in chosen}
    data = sv.ClassificationDataset(classes=list(CLASSES), images=images, annotations=notes)
    data.as_folder_structure(str(folder / "out"))
    return [("{}/out", "classify", "read")]


# --- Label Studio's converter, from its documented JSON of tasks

_BOXES = """<View><Image name="image" value="$image"/><RectangleLabels name="label" toName="image">
  <Label value="Apfel"/><Label value="Bär"/><Label value="tree top"/></RectangleLabels></View>"""


def _label_studio(folder: Path, form: str, kind: str) -> Path:
    from label_studio_sdk.converter import Converter
    from label_studio_sdk.converter.brush import mask2rle

    control = {"box": "RectangleLabels", "polygon": "PolygonLabels", "brush": "BrushLabels"}
    config = _BOXES.replace("RectangleLabels", control.get(kind, "Choices"))
    if kind == "choice":
        config = config.replace("<Label ", "<Choice ")
    upload = folder / "upload" / "1"
    tasks = []
    chosen = drawn() if kind == "choice" else pictures()
    upload.mkdir(parents=True)
    for i, one in enumerate(chosen, 1):
        name = f"{i:08x}-{one.name.replace(' ', '_')}"  # as it stores an upload
        one.image().save(upload / name)
        results: list[dict[str, Any]] = []
        whole = {"original_width": SIZE[0], "original_height": SIZE[1], "image_rotation": 0,
                 "from_name": "label", "to_name": "image"}  # fmt: skip
        for k, shape in enumerate(one.shapes):
            name_of = [CLASSES[shape.label]]
            share = 100 / np.array(SIZE)
            left, top = shape.box[:2] * share
            right, bottom = shape.box[2:] * share
            value: dict[str, Any] = {}
            if kind == "box":
                value = {"x": left, "y": top, "width": right - left, "height": bottom - top,
                         "rotation": 0, "rectanglelabels": name_of}  # fmt: skip
            elif kind == "polygon":
                value = {"points": (shape.points * share).tolist(), "closed": True,
                         "polygonlabels": name_of}  # fmt: skip
            elif kind == "brush":
                value = {"format": "rle", "rle": mask2rle(shape.mask().astype(np.uint8) * 255),
                         "brushlabels": name_of}  # fmt: skip
            results.append({**whole, "id": f"r{k}", "type": control.get(kind, "").lower(),
                            "value": value})  # fmt: skip
        if kind == "choice":
            results = [{"from_name": "label", "to_name": "image", "type": "choices", "id": "c",
                        "value": {"choices": [CLASSES[one.label]]}}]  # fmt: skip
        notes = [{"id": i, "completed_by": 1, "result": results}]
        tasks.append({"id": i, "data": {"image": f"/data/upload/1/{name}"}, "annotations": notes})
    file = folder / "tasks.json"
    (folder / "out").mkdir()
    file.write_text(json.dumps(tasks), encoding="utf-8")
    converter = Converter(config, str(folder), upload_dir=str(folder / "upload"),
                          download_resources=True)  # fmt: skip
    converter.convert(str(file), str(folder / "out"), form, is_dir=False)
    file.unlink()
    if kind == "brush":  # it leaves out the images; people add them
        shutil.copytree(upload, folder / "out" / "images", dirs_exist_ok=True)
    return folder / "out"


def label_studio(form: str, kind: str, *trials: Trial) -> Any:
    def write(folder: Path) -> Sequence[Trial]:
        out = _label_studio(folder, form, kind)
        if kind != "choice":
            shutil.rmtree(folder / "upload")
        elif form == "CSV":  # as its CSV names images: where the server kept them
            for file in out.glob("*.csv"):
                text = file.read_text(encoding="utf-8")
                file.write_text(text.replace("/data/upload/", "../upload/"), encoding="utf-8")
        return [(data.replace("{}", "{}/out"), task, right) for data, task, right in trials]

    return write


# --- Hugging Face


def _image_folder(folder: Path) -> Path:
    out = folder / "data"
    for split in ("train", "validation"):
        short = split[:5].replace("valid", "val")
        part = [one for one in drawn() if one.split == short]
        save(out / split, part)
        with (out / split / "metadata.csv").open("w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            writer.writerow(["file_name", "label"])
            writer.writerows([one.name, CLASSES[one.label]] for one in part)
    return out


def hf_metadata(folder: Path) -> Sequence[Trial]:
    """An imagefolder, as the hub's documentation says."""
    importlib.import_module("datasets")
    _image_folder(folder)
    return [("hf:{}/data", "classify", "read"), ("{}/data", "classify", "refused"),
            ("csv:{}/data/train/metadata.csv", "classify", "train")]  # fmt: skip


def hf_metadata_lines(folder: Path) -> Sequence[Trial]:
    part = drawn()
    save(folder / "data", part)
    lines = [json.dumps({"file_name": one.name, "label": CLASSES[one.label]}) for one in part]
    (folder / "data" / "metadata.jsonl").write_text("\n".join(lines), encoding="utf-8")
    return [("json:{}/data/metadata.jsonl", "classify", "read"),
            ("hf:{}/data", "classify", "read")]  # fmt: skip


def _loaded(folder: Path) -> Any:
    import datasets

    chosen = drawn()
    save(folder / "source", chosen)
    features = datasets.Features(
        {"image": datasets.Image(), "label": datasets.ClassLabel(names=list(CLASSES))}
    )
    parts = {}
    for split in ("train", "val"):
        rows = [one for one in chosen if one.split == split]
        paths = [str(folder / "source" / one.name) for one in rows]
        labels = [one.label for one in rows]
        name = {"train": "train", "val": "validation"}[split]
        parts[name] = datasets.Dataset.from_dict({"image": paths, "label": labels}, features)
    return datasets.DatasetDict(parts)


def hf_saved(folder: Path) -> Sequence[Trial]:
    _loaded(folder).save_to_disk(str(folder / "saved"))
    shutil.rmtree(folder / "source")
    return [("hf:{}/saved", "classify", "read"), ("{}/saved", "classify", "refused")]


def hf_parquet(folder: Path) -> Sequence[Trial]:
    (folder / "data").mkdir()
    for split, table in _loaded(folder).items():
        table.to_parquet(str(folder / "data" / f"{split}-00000-of-00001.parquet"))
    return [("hf:{}/data", "classify", "read"), ("{}/data", "classify", "refused")]


# --- pandas, and what spreadsheets make of its tables


def _frame(folder: Path) -> Any:
    import pandas as pd

    chosen = drawn()
    save(folder / "Bilder", chosen)
    rows = [{"image": f"Bilder/{one.name}", "label": CLASSES[one.label],
             "area": float(one.shapes[0].mask().sum()) / 16} for one in chosen]  # fmt: skip
    return pd.DataFrame(rows)


def pandas_default(folder: Path) -> Sequence[Trial]:
    _frame(folder).to_csv(folder / "table.csv")
    return [("csv:{}/table.csv", "classify", "read"), ("csv:{}/table.csv", "regress", "read")]


def pandas_german(folder: Path) -> Sequence[Trial]:
    """As Excel saves a table in Germany: semicolons, decimal commas, Windows-1252, CRLF."""
    _frame(folder).to_csv(folder / "Tabelle.CSV", sep=";", decimal=",", index=False,
                          encoding="cp1252", lineterminator="\r\n")  # fmt: skip
    return [("csv:{}/Tabelle.CSV", "regress", "read"), ("csv:{}/Tabelle.CSV", "classify", "read")]


def pandas_bom(folder: Path) -> Sequence[Trial]:
    """As Excel's `CSV UTF-8`: a byte order mark; and paths of Windows."""
    frame = _frame(folder)
    frame["image"] = frame["image"].str.replace("/", "\\")
    frame.to_csv(folder / "table.csv", index=False, encoding="utf-8-sig", lineterminator="\r\n")
    return [("csv:{}/table.csv", "classify", "read")]


def pandas_utf16(folder: Path) -> Sequence[Trial]:
    """As Excel's `Unicode text`: tabs, UTF-16."""
    _frame(folder).to_csv(folder / "table.txt", sep="\t", index=False, encoding="utf-16")
    return [("csv:{}/table.txt", "classify", "read")]


def pandas_json(folder: Path) -> Sequence[Trial]:
    _frame(folder).to_json(folder / "columns.json")
    _frame(folder).to_json(folder / "records.json", orient="records")
    return [("json:{}/records.json", "classify", "read"),
            ("json:{}/records.json", "regress", "read"),
            ("json:{}/columns.json", "classify", "read")]  # fmt: skip


# --- torchvision's layouts; torchvision opens each before Meshuffle does


def torchvision_voc(folder: Path) -> Sequence[Trial]:
    from torchvision import datasets

    _datumaro(folder, "voc", "box polygon", splits=True)
    home = folder / "VOCdevkit"
    home.mkdir()
    shutil.move(folder / "out", home / "VOC2012")
    assert len(datasets.VOCDetection(str(folder), "2012", "train")) == VAL
    return [("voc:{}", "detect", "refused"), ("voc:{}/VOCdevkit/VOC2012", "detect", "read")]


def torchvision_pets(folder: Path) -> Sequence[Trial]:
    from torchvision import datasets

    home, lines = folder / "oxford-iiit-pet", []
    for i, one in enumerate(drawn()):
        name = f"{CLASSES[one.label].replace(' ', '_').replace('ä', 'ae')}_{i}"
        (home / "images").mkdir(parents=True, exist_ok=True)
        (home / "annotations" / "trimaps").mkdir(parents=True, exist_ok=True)
        one.image().save(home / "images" / f"{name}.jpg")
        Image.fromarray(np.where(one.ids() > 0, 1, 2).astype(np.uint8)).save(
            home / "annotations" / "trimaps" / f"{name}.png"
        )
        lines.append(f"{name} {one.label + 1} 1 1")
    for file in ("trainval", "test"):
        (home / "annotations" / f"{file}.txt").write_text("\n".join(lines), encoding="utf-8")
    assert len(datasets.OxfordIIITPet(str(folder))) == len(lines)
    return [("{}", "classify", "refused"), ("{}/oxford-iiit-pet", "classify", "refused"),
            ("masks:{}/oxford-iiit-pet", "segment", "refused")]  # fmt: skip


def torchvision_eurosat(folder: Path) -> Sequence[Trial]:
    from torchvision import datasets

    for one in drawn():
        save(folder / "eurosat" / "2750" / CLASSES[one.label], [one])
    assert len(datasets.EuroSAT(str(folder))) == len(drawn())
    return [("{}/eurosat/2750", "classify", "read"), ("{}/eurosat", "classify", "refused")]


def torchvision_food(folder: Path) -> Sequence[Trial]:
    from torchvision import datasets

    home = folder / "food-101"
    (home / "meta").mkdir(parents=True)
    lists: dict[str, dict[str, list[str]]] = {"train": {}, "test": {}}
    for one in drawn():
        name, stem = CLASSES[one.label], Path(one.name).stem
        save(home / "images" / name, [one], ".jpg")
        lists["train" if one.split == "train" else "test"].setdefault(name, []).append(
            f"{name}/{stem}"
        )
    for split, found in lists.items():
        (home / "meta" / f"{split}.json").write_text(json.dumps(found), encoding="utf-8")
    assert len(datasets.Food101(str(folder), "train")) == VAL
    return [("{}/food-101/images", "classify", "read"), ("{}/food-101", "classify", "refused")]


# --- labelme, and folders that people make by hand


def labelme(folder: Path) -> Sequence[Trial]:
    """A JSON beside each image, in labelme's own words."""
    save(folder, pictures())
    version = importlib.import_module("importlib.metadata").version("labelme")
    for one in pictures():
        shapes = [{"label": CLASSES[s.label], "points": s.points.tolist(), "group_id": None,
                   "description": "", "shape_type": "polygon", "flags": {}, "mask": None}
                  for s in one.shapes]  # fmt: skip
        tree = {"version": version, "flags": {}, "shapes": shapes, "imagePath": one.name,
                "imageData": None, "imageHeight": SIZE[1], "imageWidth": SIZE[0]}  # fmt: skip
        text = json.dumps(tree, ensure_ascii=False, indent=2)
        (folder / f"{Path(one.name).stem}.json").write_text(text, encoding="utf-8")
    return [("{}", "classify", "refused"), ("coco:{}", "detect", "refused"),
            ("voc:{}", "detect", "refused")]  # fmt: skip


def pairs_without_prefix(folder: Path) -> Sequence[Trial]:
    """images/ and masks/, and the prefix forgotten."""
    save(folder / "images", pictures())
    (folder / "masks").mkdir()
    for one in pictures():
        Image.fromarray(one.ids()).save(folder / "masks" / f"{Path(one.name).stem}.png")
    return [("{}", "classify", "refused"), ("{}", "segment", "refused"),
            ("masks:{}", "segment", "ids")]  # fmt: skip


def tiff(folder: Path) -> Sequence[Trial]:
    """Images and masks as microscopes save them."""
    save(folder / "images", pictures(), ".tif")
    (folder / "masks").mkdir()
    for one in pictures():
        Image.fromarray(one.ids()).save(folder / "masks" / f"{Path(one.name).stem}.tif")
    for one in drawn():
        save(folder / "classes" / CLASSES[one.label], [one], ".TIF")
    return [("{}/classes", "classify", "read"), ("masks:{}", "segment", "ids")]


def outside(folder: Path) -> Sequence[Trial]:
    """A COCO file with a box that lies wholly outside its image."""
    _supervision("box").as_coco(str(folder / "images"), str(folder / "annotations.json"))
    file = folder / "annotations.json"
    tree = json.loads(file.read_text(encoding="utf-8"))
    tree["annotations"].append({**tree["annotations"][0], "id": 999, "bbox": [200, 5, 10, 10]})
    file.write_text(json.dumps(tree), encoding="utf-8")
    return [("coco:{}", "detect", "read")]


DEFAULT, SPLITS = {"splits": False}, {"splits": True}
TOOLS: dict[str, tuple[Callable[[Path], Sequence[Trial]], str]] = {
    "COCO, subset default": (
        datumaro("coco_instances", "polygon", ("coco:{}", "detect", "read"),
                 ("coco:{}", "segment", "read"), ("coco:{}", "classify", "read")),
        "datumaro",
    ),
    "COCO, all files, train and val": (
        datumaro("coco", "box label", ("coco:{}", "detect", "read"), splits=True), "datumaro",
    ),
    "VOC, subset default": (
        datumaro("voc", "box", ("voc:{}", "detect", "read"), ("voc:{}", "classify", "read")),
        "datumaro",
    ),
    "VOC, train and val": (
        datumaro("voc", "box", ("voc:{}", "detect", "read"), splits=True), "datumaro",
    ),
    "VOC segmentation, subset default": (
        datumaro("voc_segmentation", "mask", ("voc:{}", "segment", "drawn")), "datumaro",
    ),
    "VOC segmentation, train and val": (
        datumaro("voc_segmentation", "mask", ("voc:{}", "segment", "drawn"), splits=True),
        "datumaro",
    ),
    "YOLO, obj.names": (
        datumaro("yolo", "box", ("yolo:{}", "detect", "read"), splits=True), "datumaro",
    ),
    "YOLO, obj.names, subset default": (
        datumaro("yolo", "box", ("yolo:{}", "detect", "read")), "datumaro",
    ),
    "YOLO Ultralytics": (
        datumaro("yolo_ultralytics", "box", ("yolo:{}", "detect", "read"), splits=True),
        "datumaro",
    ),
    "ImageNet": (datumaro("imagenet", "label", ("{}", "classify", "read")), "datumaro"),
    "ImageNet with subsets": (
        datumaro("imagenet_with_subset_dirs", "label", ("{}", "classify", "read"), splits=True),
        "datumaro",
    ),
    "CamVid": (
        datumaro("camvid", "mask", ("masks:{}", "segment", "drawn"), splits=True), "datumaro",
    ),
    "Cityscapes": (
        datumaro("cityscapes", "mask", ("masks:{}", "segment", "refused"), splits=True),
        "datumaro",
    ),
    "KITTI segmentation": (
        datumaro("kitti_segmentation", "mask", ("masks:{}", "segment", "refused"), splits=True),
        "datumaro",
    ),
    "LabelMe XML": (
        datumaro("label_me", "polygon", ("voc:{}", "detect", "refused"),
                 ("{}", "classify", "refused")), "datumaro",
    ),
    "image_dir": (datumaro("image_dir", "label", ("{}", "classify", "refused")), "datumaro"),
    "CVAT XML": (
        datumaro("cvat", "box", ("{}", "classify", "refused"), ("voc:{}", "detect", "refused")),
        "datumaro",
    ),
    "Open Images": (
        datumaro("open_images", "box", ("{}", "classify", "refused"),
                 ("coco:{}", "detect", "refused"), splits=True), "datumaro",
    ),
    "Datumaro JSON": (
        datumaro("datumaro", "box", ("coco:{}", "detect", "refused"),
                 ("{}", "classify", "refused")), "datumaro",
    ),
    "KITTI detection": (
        datumaro("kitti_detection", "box", ("yolo:{}", "detect", "refused"), splits=True),
        "datumaro",
    ),
    "as_coco": (supervision_coco, "supervision"),
    "as_yolo": (supervision_yolo, "supervision"),
    "as_pascal_voc": (supervision_voc, "supervision"),
    "as_folder_structure": (supervision_folders, "supervision"),
    "as_labelme": (supervision_labelme, "supervision"),
    "as_createml": (supervision_createml, "supervision"),
    "COCO with images, boxes": (
        label_studio("COCO_WITH_IMAGES", "box", ("coco:{}", "detect", "read")), "label_studio_sdk",
    ),
    "COCO with images, polygons": (
        label_studio("COCO_WITH_IMAGES", "polygon", ("coco:{}", "segment", "read")),
        "label_studio_sdk",
    ),
    "YOLO with images": (
        label_studio("YOLO_WITH_IMAGES", "box", ("yolo:{}", "detect", "read")), "label_studio_sdk",
    ),
    "VOC": (label_studio("VOC", "box", ("voc:{}", "detect", "drawn")), "label_studio_sdk"),
    "brush to PNG": (
        label_studio("BRUSH_TO_PNG", "brush", ("masks:{}", "segment", "refused"),
                     ("{}", "classify", "refused")), "label_studio_sdk",
    ),
    "brush to COCO": (
        label_studio("BRUSH_TO_COCO", "brush", ("coco:{}", "segment", "drawn")), "label_studio_sdk",
    ),
    "CSV of choices": (
        label_studio("CSV", "choice", ("csv:{}/result.csv", "classify", "read")),
        "label_studio_sdk",
    ),
    "JSON_MIN of choices": (
        label_studio("JSON_MIN", "choice", ("json:{}/result.json", "classify", "refused")),
        "label_studio_sdk",
    ),
    "imagefolder, metadata.csv": (hf_metadata, "datasets"),
    "imagefolder, metadata.jsonl": (hf_metadata_lines, "datasets"),
    "save_to_disk": (hf_saved, "datasets"),
    "to_parquet": (hf_parquet, "datasets"),
    "to_csv": (pandas_default, "pandas"),
    "to_csv, German": (pandas_german, "pandas"),
    "to_csv, BOM and backslashes": (pandas_bom, "pandas"),
    "to_csv, UTF-16": (pandas_utf16, "pandas"),
    "to_json": (pandas_json, "pandas"),
    "VOCdevkit": (torchvision_voc, "torchvision"),
    "OxfordIIITPet": (torchvision_pets, "torchvision"),
    "EuroSAT": (torchvision_eurosat, "torchvision"),
    "Food101": (torchvision_food, "torchvision"),
    "labelme": (labelme, "labelme"),
    "images and masks": (pairs_without_prefix, "numpy"),
    "TIFF": (tiff, "PIL"),
    "box outside its image": (outside, "supervision"),
}  # fmt: skip


def write(home: Path) -> None:
    for name, (export, module) in TOOLS.items():
        folder = home / "".join(c if c.isalnum() else "-" for c in f"{module} {name}")
        if (folder.parent / f"{folder.name}.json").exists():
            continue
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        try:
            version = getattr(importlib.import_module(module), "__version__", "")
            trials = export(folder)
        except Exception as error:  # noqa: BLE001  # a tool that does not run here
            print(f"{module} {name}: not written ({type(error).__name__}: {str(error)[:200]})")
            continue
        told = {"tool": module, "version": version, "format": name, "trials": trials}
        (folder.parent / f"{folder.name}.json").write_text(json.dumps(told), encoding="utf-8")
        print(f"{module} {version}, {name}: {len(trials)} trials")


def expected(task: str, right: str) -> dict[str, Any]:
    """Return what was drawn, as `found` counts it."""
    every = [one for one in pictures() if right != "train" or one.split == "train"]
    chosen = (
        every if task in ("detect", "segment", "multilabel") else [o for o in every if o.shapes]
    )
    chosen = [one for one in chosen if one.shapes or right != "drawn"]
    if task == "regress":
        return {"images": len(chosen), "sum": sum(o.shapes[0].mask().sum() for o in chosen) / 16}
    shapes = [shape for one in chosen for shape in one.shapes]
    names = {"classes": sorted(CLASSES), "images": len(chosen)}
    if task == "detect":
        boxes = sorted((CLASSES[shape.label], *shape.box) for shape in shapes)
        return {**names, "boxes": boxes}
    if task == "segment":
        ids = np.bincount(np.concatenate([one.ids().ravel() for one in chosen]), minlength=4)
        keys = ["class 0", "class 1", "class 2", "class 3"] if right == "ids" else [
            "background", *CLASSES]  # fmt: skip
        pixels = dict(zip(keys, ids.tolist(), strict=True))
        return {"classes": sorted(pixels), "images": len(chosen), "pixels": pixels}
    present = [{one.label} if task == "classify" else {s.label for s in one.shapes}
               for one in chosen]  # fmt: skip
    return {**names, "counts": {name: sum(i in labels for labels in present)
                                for i, name in enumerate(CLASSES)}}  # fmt: skip


def found(spec: str, task: str) -> dict[str, Any]:
    """Return what Meshuffle reads."""
    from meshuffle.data import open_data

    data = open_data(spec, task=task, need=())
    targets = [source.target(i) for source in data.splits.values() for i in range(len(source))]
    for source in data.splits.values():
        for i in range(len(source)):
            source.image(i)
    if task == "regress":
        return {"images": len(targets), "sum": float(np.sum(targets))}
    names = {"classes": sorted(data.classes), "images": len(targets)}
    if task == "detect":
        rows = [
            row for t in targets for row in zip(t.labels.tolist(), t.xyxy.tolist(), strict=True)
        ]
        boxes = [(data.classes[label], *box) for label, box in rows]
        return {**names, "boxes": sorted(boxes)}
    if task == "segment":
        ids = np.bincount(np.concatenate([t.ravel() for t in targets]), minlength=256).tolist()
        return {**names, "pixels": dict(zip(data.classes, ids, strict=False))}
    counts = np.zeros(len(data.classes), dtype=int)
    for target in targets:
        counts += (
            np.eye(len(counts), dtype=int)[target] if task == "classify" else target.astype(int)
        )
    return {**names, "counts": dict(zip(data.classes, counts.tolist(), strict=True))}


def differences(wanted: dict[str, Any], got: dict[str, Any], share: float) -> list[str]:
    """Return what differs: boxes by more than a pixel, areas by more than 3 %.

    Contours, which run through the centres of an object's outermost pixels, may lose 12 %.
    """
    keys = [key for key in ("classes", "images", "counts") if wanted.get(key) != got.get(key)]
    keys += ["sum"] if abs(wanted.get("sum", 0) - got.get("sum", 0)) > 1e-3 else []
    lines = [f"{key} {got[key]}, not {wanted[key]}" for key in keys]
    if "boxes" in wanted and not lines:
        boxes, others = ([(row[0], np.array(row[1:])) for row in one["boxes"]]
                         for one in (wanted, got))  # fmt: skip
        if len(boxes) != len(others):
            lines.append(f"{len(others)} boxes, not {len(boxes)}")
        for name, box in boxes:
            if not any(n == name and abs(box - other).max() <= 1.01 for n, other in others):
                lines.append(f"no box {name} {box.tolist()}")
    if "pixels" in wanted and not lines:
        lines += [f"{got['pixels'][name]} pixels of {name}, not {count}"
                  for name, count in wanted["pixels"].items()
                  if abs(got["pixels"][name] - count) > share * count]  # fmt: skip
    return lines


def run(*words: str) -> tuple[int, str]:
    """Return the exit code of a command of Meshuffle and its last line."""
    from meshuffle.cli import main as meshuffle

    text = io.StringIO()
    with contextlib.redirect_stdout(text), contextlib.redirect_stderr(text):
        try:
            code = meshuffle(list(words))
        except SystemExit as stop:
            code = int(stop.code or 0)
    lines = [line for line in text.getvalue().splitlines() if line.strip()]
    error = next((i for i, line in enumerate(lines) if "error:" in line), len(lines) - 1)
    return int(code or 0), "\n".join(lines[error:])


def attempt(spec: str, task: str, right: str) -> tuple[bool, str]:
    """Return whether a trial is right, and what Meshuffle said."""
    from meshuffle.errors import MeshuffleError

    try:
        got = found(spec, task)
    except MeshuffleError as error:
        one_line = "\n" not in str(error)
        return right == "refused" and one_line, f"refused: {error}"
    except Exception as error:  # noqa: BLE001
        return False, f"CRASHED: {type(error).__name__}: {error}"
    wanted = expected(task, right)
    if lines := differences(wanted, got, 0.12 if right == "contours" else 0.03):
        return False, f"READ OTHERWISE: {'; '.join(lines)[:300]}"
    for verb in (("data", "check"), ("train",)):
        more = () if verb != ("train",) else (
            "--epochs", "1", "--plan", "dp=1", "--compile", "off", "--model",
            "shufflenet_v2_x0_5", "--input-size", "64", "--batch", "4")  # fmt: skip
        code, last = run(*verb, spec, "--task", task, *more)
        if code and not (verb != ("train",) and "problem" in last):
            return False, f"{' '.join(verb)}: exit {code}: {last}"
    return (
        right != "refused",
        f"{got['images']} images, {len(got.get('classes', ()))} classes: as drawn",
    )


def read(home: Path, chosen: str) -> int:
    from rows import append

    wrong = 0
    commit = subprocess.run(["git", "describe", "--always", "--dirty"], capture_output=True,
                            text=True, check=True).stdout.strip()  # fmt: skip
    work = home / "runs"
    work.mkdir(exist_ok=True)
    os.chdir(work)
    for told in sorted(home.glob("*.json")):
        case = json.loads(told.read_text(encoding="utf-8"))
        for data, task, wanted in case["trials"]:
            if chosen not in f"{told.stem} {data} {task}":
                continue
            spec = data.replace("{}", str(home / told.stem))
            right, said = attempt(spec, task, wanted)
            said = said.replace(str(home / told.stem), "FOLDER")
            wrong += not right
            name = f"{case['tool']} {case['version']}, {case['format']}"
            print(
                f"{'right' if right else 'WRONG'}  {name}, {data} --task {task}: {said}", flush=True
            )
            row = {"commit": commit, **{key: case[key] for key in ("tool", "version", "format")}}
            row |= {"data": data, "task": task, "wanted": wanted, "right": right}
            append("exported_data", [{**row, "said": " ".join(said.split())}])
    return wrong


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("verb", choices=("write", "read"))
    parser.add_argument("folder", type=Path)
    parser.add_argument("name", nargs="?", default="", help="only the trials with this in the name")
    asked = parser.parse_args()
    if asked.verb == "read":
        return read(asked.folder.resolve(), asked.name)
    write(asked.folder.resolve())
    return 0


if __name__ == "__main__":
    sys.exit(main())
