"""One image that is large: a segmenter split by space against one device.

    python benchmarks/big_image.py [--size 4096] [--model shufflenet_v2_x1_0] [--ranks 2]

Makes random weights whose batch norms have seen the image (a photo, enlarged), and lets
`meshuffle predict` segment it with one process and under tp=N:spatial. Then the logits themselves
are compared, in float64 and float32. Prints and appends to results/big_image.csv: the largest
error as a share of the largest logit, the pixels whose class differs, and the memory of the
largest process at its peak, also without what an empty one has (Python, PyTorch and us).
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.multiprocessing as mp
from PIL import Image
from sklearn.datasets import load_sample_images
from torch import Tensor
from torch.distributed.elastic.utils.distributed import get_free_port

from memory import empty_mb, watched
from meshuffle.comm.group import RankEnv, process_group
from meshuffle.data import Preprocess, decode_image
from meshuffle.infer.split import own_part
from meshuffle.planner.plan import parse_plan
from meshuffle.tasks import make_task
from meshuffle.tasks.card import Card
from meshuffle.weights import load_model, save_weights
from rows import append

CLASSES = ("road", "wall", "sky", "tree", "car", "person")


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--size", type=int, default=4096)
    parser.add_argument("--model", default="shufflenet_v2_x1_0")
    parser.add_argument("--ranks", type=int, default=2)
    asked = parser.parse_args()
    plan = f"tp={asked.ranks}:spatial"
    row: dict[str, Any] = {
        "model": asked.model, "size": asked.size, "plan": plan, "torch": torch.__version__,
    }  # fmt: skip
    empty = empty_mb()
    with tempfile.TemporaryDirectory() as name:
        home = Path(name)
        photo = Image.fromarray(load_sample_images().images[0])
        photo.resize((asked.size, asked.size), Image.Resampling.BICUBIC).save(home / "big.png")
        make_weights(home, asked.model, asked.size)
        masks = {}
        for key in ("dp=1", plan):
            masks[key], row[f"{kind(key)}_s"], row[f"{kind(key)}_mb"] = predicted(home, key)
            row[f"{kind(key)}_above_empty_mb"] = row[f"{kind(key)}_mb"] - empty
            print(f"predict --plan {key}: {row[f'{kind(key)}_s']} s", flush=True)
        row["pixels"] = masks[plan].size
        row["pixels_that_differ"] = int((masks[plan] != masks["dp=1"]).sum())
        row["classes"] = len(np.unique(masks["dp=1"]))
        for dtype in (torch.float64, torch.float32):
            torch.save(logits(home, dtype, "dp=1", RankEnv()), home / "whole.pt")
            arguments = (asked.ranks, get_free_port(), home, dtype, plan)
            mp.spawn(compare, arguments, nprocs=asked.ranks)
            row[f"error_{str(dtype)[6:]}"] = json.loads((home / "error.json").read_text())
    print(row)
    append("big_image", [row])
    return 0


def kind(plan: str) -> str:
    return "whole" if plan == "dp=1" else "split"


def make_weights(home: Path, model: str, size: int) -> None:
    """Write weights whose batch norms fit the image: else a signal dies out on its way."""
    preprocess = Preprocess(crop=size, resize=None, fit="stretch")
    settings = {"head": "lraspp"}
    card = Card(model, CLASSES, preprocess, task="segment", settings=settings)
    network = make_task(card).network(seed=0).train()
    small = Preprocess(crop=512, resize=None, fit="stretch")
    view = small.normalise(small.to_uint8(decode_image(home / "big.png"))[None])
    with torch.no_grad():
        for _ in range(20):
            network(torch.cat([view, view.flip(3)]))
    save_weights(home / "w.safetensors", network.state_dict(), card)


def predicted(home: Path, plan: str) -> tuple[np.ndarray, float, float]:
    """Return the mask that the command writes, its seconds, and MB of its largest process."""
    command = [sys.executable, "-m", "meshuffle", "predict", str(home / "w.safetensors")]
    command += [str(home / "big.png"), "--plan", plan, "--out", str(home / kind(plan)), "--json"]
    said, seconds, peak = watched(command)
    (told,) = json.loads(said)
    return np.asarray(Image.open(told["mask"])), seconds, peak


def logits(home: Path, dtype: torch.dtype, plan: str, env: RankEnv) -> Tensor:
    """Return the logits [1, C, H, W] of the image, as one rank of a plan."""
    network, card = load_model(home / "w.safetensors")
    x = card.preprocess.normalise(card.preprocess.to_uint8(decode_image(home / "big.png"))[None])
    example = torch.empty(2, *x.shape[1:], device="meta", dtype=dtype)
    part = own_part(network.to(dtype), example, parse_plan(plan), env, torch.device("cpu"))
    with torch.inference_mode():
        outputs: Tensor = part(x.to(dtype))
    return outputs


def compare(rank: int, world: int, port: int, home: Path, dtype: torch.dtype, plan: str) -> None:
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    env = RankEnv(rank, world, rank, world)
    with process_group(env, torch.device("cpu")):
        found = logits(home, dtype, plan, env)
    if env.is_main:
        whole = torch.load(home / "whole.pt", weights_only=True)
        error = float((found - whole).abs().max() / whole.abs().max())
        (home / "error.json").write_text(json.dumps(error))


if __name__ == "__main__":
    raise SystemExit(main())
