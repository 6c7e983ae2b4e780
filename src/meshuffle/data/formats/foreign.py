"""Files in which labelling tools keep their own work, which is not read: what to export instead."""

from __future__ import annotations

import re
from itertools import islice
from pathlib import Path

# An error need not read all of a million files.
_NAMES, _FILES = 20_000, 40
_HEAD = 1 << 16  # bytes of a file
_EXPORTS = {
    "VIA": (r'"shape_attributes"|"_via_', "COCO"),
    "CVAT": (r"<annotations>", "COCO 1.0, Pascal VOC 1.1 or YOLO 1.1"),
    "Supervisely": (r'"classTitle"|"projectType"|"geometry_config"', "COCO, Pascal VOC or YOLO"),
    "labelme": (r'"shape_type"', "COCO or VOC, with labelme2coco.py or labelme2voc.py"),
    "Label Studio": (r'"lead_time"|"completed_by"', "COCO, Pascal VOC XML or YOLO"),
    "FiftyOne": (r'^\{"classes": ?\[[^]]*\], ?"labels"', "COCO, VOC or a directory tree"),
    "Datumaro": (r'"dm_format_version"', "coco, voc or yolo, with `datum convert`"),
}
"""A pattern in the files of each tool, and its exports that are read."""


def foreign_file(path: Path, task: str = "") -> str:
    """Return which tool's own file lies at or below `path`, and what to export, or nothing.

    Folders are entered twice: Supervisely keeps train/ann/x.jpg.json. `task`: of segment, NumPy's
    arrays are such files too.
    """
    patterns = ("*", "*/*", "*/*/*")
    inside = (file for each in patterns for file in sorted(islice(path.glob(each), _NAMES)))
    files = [path] if path.is_file() else inside
    ends = (".json", ".xml", *[".npy"] * (task == "segment"))
    for file in islice((file for file in files if file.suffix in ends), _FILES):
        if file.suffix == ".npy":
            return f"{file} is a NumPy array, which is not read: save each as a PNG of label ids"
        try:
            with file.open("rb") as stream:
                head = stream.read(_HEAD).decode("utf-8", "replace")
        except OSError:  # a folder, or a file that the reader's own error names
            continue
        for tool, (pattern, exports) in _EXPORTS.items():
            if re.search(pattern, head):
                return f"{file} is {tool}'s own format, which is not read: export {exports}"
    return ""
