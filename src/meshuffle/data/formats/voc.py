"""Pascal VOC: one XML per image, lists of the splits, and masks for some images.

(host.robots.ox.ac.uk/pascal/VOC, development kit of 2012)
"""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
from numpy.typing import NDArray

from meshuffle.data.annotated import NUM_IDS, AnnotatedSource, Colours, MaskTargets, image_size
from meshuffle.data.base import Data, shortened
from meshuffle.data.entries import (
    NEED,
    SPLITS,
    Need,
    Problems,
    absent,
    assemble,
    check_names,
    image_names,
    only_split,
    read_text,
    repeated,
    stem,
    suffix,
)
from meshuffle.data.formats.mask_files import count_ids, read_colours
from meshuffle.data.image import IS_POINTER, POINTER
from meshuffle.data.objects import BoxList, Objects, check_classes, object_source, path_table
from meshuffle.data.paired import IMAGES, Folders, is_shared, paired_folders, split_folders
from meshuffle.data.scan import contents, existing_folder, find_folder, subfolders
from meshuffle.data.target import VOID
from meshuffle.errors import DataError, ImageError

BACKGROUND = "background"
OFFICIAL = (
    *("aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow"),
    *("diningtable", "dog", "horse", "motorbike", "person", "pottedplant", "sheep", "sofa"),
    *("train", "tvmonitor"),
)
_LISTS = {"train": ("train", "trainval"), "val": ("val",), "test": ("test",)}
_MASKS = ("SegmentationClassPNG", "SegmentationClass")  # the first is labelme's, beside arrays
_ANNOTATIONS = ("Annotations", "annotation", "annots", "xmls", "xml", "labels")


@dataclass(frozen=True)
class _Annotation:
    """One XML. `boxes`: (class, left, top, right, bottom); `difficult`: how many more."""

    size: tuple[int, int]
    boxes: Sequence[tuple[str, float, float, float, float]] = ()
    difficult: int = 0


@dataclass(frozen=True, eq=False)
class _Split:
    """The images of a split, checked, with their annotations; paths below the root."""

    paths: Sequence[str]
    files: Sequence[str]
    masks: Sequence[str]
    annotations: Sequence[_Annotation]


def open_voc(
    path: str, *, task: str = "classify", seed: int = 0, need: Need = NEED, strict: bool = False
) -> Data:
    """Open a folder with Annotations/, JPEGImages/ and, where there are any, ImageSets/.

    Also images/ with annotations/, in any case, in the root or in each of train/, val/ and test/,
    and Roboflow's x.jpg with x.xml beside it.

    Splits are ImageSets/Main/{train,val,test}.txt (for segment Segmentation/ instead of
    Main/ where it is there); trainval.txt is train where train.txt is missing. Where val is
    missing, or there are no lists, 20 % of train chosen by `seed` become val. Classes are
    sorted by name.

    Objects that are `difficult` are left out, and counted in `Data.ignored`. classify takes
    the class of the largest object, multilabel all of them. segment reads
    SegmentationClass/*.png: palette index k is class k (class_names.txt where it is there,
    else those of VOC's own 20 that occur, else the sorted names), 0 the background, 255 counts
    nothing; a class without a pixel in train is an error. With CVAT's labelmap.txt the masks are
    read by its colours. Boxes are VOC's: pixels count from 1, and the last one belongs to the
    box. One without area is left out and named in `Data.ignored`; with `strict` it is an error.
    Raises `DataError`.
    """
    root = existing_folder(path)
    layout, folders = _layout(root, task)
    problems = Problems(str(root), strict=strict)
    one = folders.get("")
    lists = {split: _stems(root, task, pair) for split, pair in folders.items()}
    if one is not None and (listed := _lists(root, task, one, need, problems)):
        lists = listed
    else:
        _note_bare(root, folders, lists, problems)
        lists = {split or only_split(need): stems for split, stems in lists.items()}
    if one is not None:
        _check_disjoint(lists, problems)
    splits = {
        split: _read_split(root, one or folders[split], stems, task, problems)
        for split, stems in lists.items()
    }
    layout = f"VOC: {layout}"
    shown = None
    if task == "segment":
        classes, sources, shown = _mask_sources(root, splits, need, problems)
    else:
        classes, sources = _box_sources(root, task, splits, problems)
    return assemble(
        path, task, classes, sources, problems, seed=seed, need=need, layout=layout, shown=shown
    )


def _layout(root: Path, task: str) -> tuple[str, Mapping[str, Folders]]:
    """Return the layout in words, and by split the folders of images and annotations, or masks."""
    images, others = ("JPEGImages", *IMAGES), _MASKS if task == "segment" else _ANNOTATIONS
    layout, found = paired_folders(root, images, others)
    if found:
        return layout, found
    if task != "segment":
        names = split_folders(root)
        beside = {SPLITS[n.lower()]: (n, n) for n in names if _files(root / n, ".xml")}
        if beside or _files(root, ".xml"):
            return "x.jpg with x.xml", beside or {"": ("", "")}
    names = [
        *subfolders(root),
        *(f"{a}/{b}" for a in subfolders(root) for b in subfolders(root / a)),
    ]
    inner = [name for name in names if paired_folders(root / name, images, others)[1]]
    hint = f"; did you mean {root / inner[0]}?" if inner else ""
    besides = "" if task == "segment" else ", and x.jpg with x.xml"
    usual = others[0].removesuffix("PNG")
    raise DataError(
        f"{root} is not recognised as VOC: looked for JPEGImages/ or images/ with {usual}/, the "
        f"same in train/ and val/{besides}; saw {contents(root)}{hint}"
    )


def _files(folder: Path, extension: str) -> list[str]:
    """Return the stems of the files in `folder` of this extension, sorted by their bytes."""
    names = (path.name for path in folder.iterdir()) if folder.is_dir() else ()
    return sorted(
        (stem(n) for n in names if suffix(n) == extension and n[0] != "."), key=os.fsencode
    )


def _stems(root: Path, task: str, folders: Folders) -> list[str]:
    stems = _files(root / folders[1], ".png" if task == "segment" else ".xml")
    own = {*map(stem, image_names(root / folders[0]))} if is_shared(folders) else {*stems}
    return [name for name in stems if name in own]


def _lists(
    root: Path, task: str, folders: Folders, need: Need, problems: Problems
) -> dict[str, list[str]]:
    """Return {split: names of its images without extension}, as the lists in ImageSets/ say.

    A test list of which no image is annotated is left out, if it is not needed.
    """
    sets = root / (find_folder(root, ["ImageSets"]) or "ImageSets")
    names = ["Segmentation", "Main"] if task == "segment" else ["Main"]
    folder = sets / (find_folder(sets, names) or "")
    found: dict[str, list[str]] = {}
    images = {stem(name) for name in image_names(root / folders[0])}
    for split, texts in _LISTS.items():
        for file in (folder / f"{text}.txt" for text in texts):
            if split not in found and file.is_file():
                found[split] = _listed(file, images)
    if not found and len(others := _files(folder, ".txt")) == 1:  # CVAT's default.txt
        found[only_split(need)] = _listed(folder / f"{others[0]}.txt", images)
    known = set(_stems(root, task, folders))
    if "test" in found and "test" not in need and not known.intersection(found["test"]):
        problems.notes.append("test.txt: its images have no annotations: left out")
        del found["test"]
    return found


def _listed(file: Path, images: Collection[str]) -> list[str]:
    """Return the images of a list; VOC's own lists of a class have a number behind each name."""
    lines = [line.strip() for line in read_text(file).splitlines() if line.strip()]
    return [line if line in images else line.split()[0] for line in lines]


def _note_bare(
    root: Path,
    folders: Mapping[str, Folders],
    lists: Mapping[str, Sequence[str]],
    problems: Problems,
) -> None:
    """Note the images that no annotation names, where no list says which images there are."""
    named = {name for stems in lists.values() for name in stems}
    every = [name for pair in folders.values() for name in image_names(root / pair[0])]
    if bare := [name for name in every if stem(name) not in named]:
        problems.notes.append(f"{len(bare)} images without annotations left out: {shortened(bare)}")


def _check_disjoint(lists: Mapping[str, Sequence[str]], problems: Problems) -> None:
    for split, stems in lists.items():
        for name in repeated(stems):
            problems.add(f"{split}.txt: {name} comes twice")
    every = [name for stems in lists.values() for name in dict.fromkeys(stems)]
    for name in repeated(every):
        splits = [f"{split}.txt" for split, stems in lists.items() if name in set(stems)]
        problems.add(f"{' and '.join(splits)} both list {name}")


def _read_split(
    root: Path, folders: Folders, stems: Sequence[str], task: str, problems: Problems
) -> _Split:
    """Read the annotations of a split; those of segment name classes and may be missing."""
    before, behind = (f"{name}/" if name else "" for name in folders)
    if task == "segment":
        behind = f"{find_folder(root, _ANNOTATIONS) or _ANNOTATIONS[0]}/"
    images = {stem(name): before + name for name in image_names(root / folders[0])}
    kept, annotations = [], []
    for name in stems:
        file = f"{behind}{name}.xml"
        no_image = f"{folders[0] or root} has no image {name}"
        if name not in images and not (root / file).is_file():
            problems.add(no_image)
        elif (found := _read(root, file, images.get(name, ""), task, problems)) is None:
            continue
        elif name not in images:
            problems.add(no_image)
        else:
            kept.append(name)
            annotations.append(found)
    masks = [f"{folders[1]}/{name}.png" for name in kept]
    files = [f"{behind}{name}.xml" for name in kept]
    bare = absent(root, files) if task != "segment" else []
    if 2 * len(bare) > len(files):
        problems.add(f"{shortened(bare)}: {len(bare)} of {len(files)} annotations are missing")
    elif bare:
        problems.notes.append(f"{len(bare)} images have no XML and so no object: {shortened(bare)}")
    return _Split([images[name] for name in kept], files, masks, annotations)


def _read(root: Path, file: str, image: str, task: str, problems: Problems) -> _Annotation | None:
    """Return what the XML says; None where that is a problem."""
    is_there = (root / file).is_file()
    if task == "segment" and not is_there:
        return _Annotation((0, 0))
    try:
        if not is_there:
            return _Annotation(image_size(str(root / image)))
        return _parsed(_tree(root / file), root / image)
    except (OSError, ValueError, ImageError) as error:
        problems.add(f"{file}: {getattr(error, 'strerror', None) or error}")
    return None


class _NoDoctype(ElementTree.TreeBuilder):
    """Refuses what could declare entities that grow without bound."""

    def doctype(self, *_: Any) -> None:
        raise ValueError("has a DOCTYPE, which no annotation needs and which is not read")


def _tree(file: Path) -> ElementTree.Element:
    parser = ElementTree.XMLParser(target=_NoDoctype())
    if (content := file.read_bytes()).startswith(POINTER):
        raise ValueError(IS_POINTER)
    try:
        return ElementTree.fromstring(content, parser)
    except ElementTree.ParseError as error:
        line, column = error.position
        raise ValueError(f"line {line}, column {column}: no XML, or cut short") from error


def _parsed(tree: ElementTree.Element, image: Path) -> _Annotation:
    if tree.tag == "annotations":  # CVAT's own
        raise ValueError(f"is <{tree.tag}>, not VOC's <annotation>")
    boxes, difficult = [], 0
    for i, entry in enumerate(tree.iter("object"), 1):
        name = (entry.findtext("name") or "").strip()
        box = entry.find("bndbox")
        if not name or box is None:
            raise ValueError(f"object {i} lacks its {'name' if not name else 'bndbox'}")
        if (entry.findtext("difficult") or "0").strip() == "1":
            difficult += 1
            continue
        corners = [_number(box, key, i) for key in ("xmin", "ymin", "xmax", "ymax")]
        boxes.append((name, corners[0] - 1, corners[1] - 1, corners[2], corners[3]))
    size = [tree.findtext(f"size/{key}") or "0" for key in ("width", "height")]
    if not all(text.strip().isdecimal() and int(text) > 0 for text in size):
        return _Annotation(image_size(str(image)), boxes, difficult)
    return _Annotation((int(size[0]), int(size[1])), boxes, difficult)


def _number(box: ElementTree.Element, key: str, i: int) -> float:
    text = box.findtext(key)
    try:
        return float(text or "")
    except ValueError:
        raise ValueError(f"object {i}: {key} is {text!r}, not a number") from None


def _objects(root: Path, split: _Split, label_of: Mapping[str, int], problems: Problems) -> Objects:
    boxes, names = BoxList(), []
    for owner, annotation in enumerate(split.annotations):
        for i, (name, *corners) in enumerate(annotation.boxes, 1):
            if name in label_of:
                boxes.add(owner, label_of[name], corners)
                names.append(f"{split.files[owner]}: object {i} ({name})")
    sizes = np.array([a.size for a in split.annotations], dtype=np.int32).reshape(-1, 2)
    return boxes.finish(root, split.paths, sizes, problems, names.__getitem__)


def _names(splits: Mapping[str, _Split]) -> list[str]:
    annotations = [one for split in splits.values() for one in split.annotations]
    return sorted({box[0] for one in annotations for box in one.boxes}, key=os.fsencode)


def _box_sources(
    root: Path, task: str, splits: Mapping[str, _Split], problems: Problems
) -> tuple[tuple[str, ...], dict[str, AnnotatedSource]]:
    classes = tuple(_names(splits))
    label_of = {name: label for label, name in enumerate(classes)}
    objects = {key: _objects(root, split, label_of, problems) for key, split in splits.items()}
    problems.raise_any()
    if not classes:
        if not any(split.files for split in splits.values()):
            raise DataError(f"{root}: no XML directly in its folders of annotations")
        raise DataError(f"{root}: its annotations hold no object")
    check_classes(str(root), task, objects.get("train"), classes, problems.notes)
    if difficult := sum(one.difficult for split in splits.values() for one in split.annotations):
        problems.notes.append(f"{difficult} difficult objects left out")
    return classes, {
        key: object_source(task, one, classes, key, problems.notes) for key, one in objects.items()
    }


def _mask_sources(
    root: Path, splits: Mapping[str, _Split], need: Need, problems: Problems
) -> tuple[tuple[str, ...], dict[str, AnnotatedSource], NDArray[np.bool_] | None]:
    """Return the classes and sources of segment, and which classes train's images show."""
    for file in absent(root, [file for split in splits.values() for file in split.masks]):
        problems.add(f"{file} is missing")
    problems.raise_any()
    names, colours = _mask_classes(root, _names(splits))
    enough = range(len(names)) if "val" in splits and need else ()
    counts = {key: count_ids(root, split.masks, enough, colours) for key, split in splits.items()}
    ids = list(range(len(names)))
    if names[1:] == OFFICIAL:
        shown = np.sum([count.any(axis=0) for count in counts.values()], axis=0)
        named = {0, *(names.index(name) for name in _names(splits))}
        ids = [i for i in ids if shown[i] or i in named]
    classes = tuple(names[i] for i in ids)
    table = np.full(NUM_IDS + 1, -1, dtype=np.int16)
    table[ids] = np.arange(len(ids))
    table[VOID] = VOID
    label_of = {name: label for label, name in enumerate(classes)}
    sources = {}
    for key, split in splits.items():
        labels = _objects(root, split, label_of, Problems(str(root))).heaviest(len(classes))
        images = path_table(split.paths)
        targets = MaskTargets(root, images, path_table(split.masks), table, colours)
        sources[key] = AnnotatedSource(root, images, labels, classes, targets)
    shown = counts["train"][:, ids] > 0 if "train" in counts else None
    if shown is not None:
        shown[:, 0] = True  # the background is always a class
    return classes, sources, shown


def _mask_classes(root: Path, names: Sequence[str]) -> tuple[tuple[str, ...], Colours | None]:
    """Return the class of each palette index, and the colours if CVAT's labelmap.txt has them."""
    file, colours = root / "class_names.txt", None
    if not file.is_file() and (root / "labelmap.txt").is_file():
        file = root / "labelmap.txt"
        classes, colours = read_colours(file)
    elif file.is_file():
        lines = [line.strip() for line in read_text(file).splitlines()]
        classes = [line for line in lines if line and line != "__ignore__"]
    elif names:
        classes = [BACKGROUND, *(OFFICIAL if set(names) <= set(OFFICIAL) else names)]
    else:
        raise DataError(
            f"{root}: no class_names.txt and no object in Annotations/ names a class; nor is there "
            "a labelmap.txt"
        )
    check_names(str(file if file.is_file() else root), classes)
    if len(classes) > VOID:
        raise DataError(f"{root}: {shortened(classes)}: a mask holds at most {VOID} classes")
    return tuple(classes), colours
