"""The same module trained as a plain PyTorch script trains it: the baseline of benchmarks/tasks.py.

    python benchmarks/plain.py TASK DATA --weights FILE --epochs 10 --seed 0

Same network, weights, images, splits, epochs, loss and metric as `meshuffle train`; everything
else is what a person writes first: SGD with momentum at a rate of 0.01 that falls by a cosine, on
all parameters alike, random crops and mirror images for a classifier, mirror images for boxes and
masks. The epoch with the best validation metric is kept, and judged on the test split.
"""

from __future__ import annotations

import argparse
import copy
import json

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import v2

from meshuffle.config import TrainConfig
from meshuffle.data import Data, ImageSource, open_data
from meshuffle.data.dense import target_in
from meshuffle.data.preprocess import Preprocess, to_tensor
from meshuffle.infer.evaluation import joined
from meshuffle.tasks import make_task
from meshuffle.tasks.base import Task
from meshuffle.train.initial_weights import open_initial_weights
from meshuffle.train.state import build_model, make_card

LR, MOMENTUM, WEIGHT_DECAY, BATCH = 0.01, 0.9, 1e-4, 16


class Images(Dataset[tuple[Tensor, Tensor]]):
    """A split as tensors: uint8 views and targets."""

    def __init__(self, source: ImageSource, view: Preprocess, dense: bool, trains: bool) -> None:
        self.source, self.view, self.dense, self.trains = source, view, dense, trains
        self.crop = v2.RandomResizedCrop(view.size)

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        image, target = self.source.image(index), self.source.target(index)
        mirrored = self.trains and bool(torch.rand(()) < 0.5)
        if self.dense:
            known = target_in(target, image.size, (0, 0, *image.size), self.view.size)
            pixels = self.view.to_uint8(image)
            if mirrored and known.dtype == torch.uint8:
                known = known.flip(1)
            elif mirrored:
                known[:, [1, 3]] = 1 - known[:, [3, 1]]
        else:
            known = torch.as_tensor(target)
            pixels = to_tensor(self.crop(image)) if self.trains else self.view.to_uint8(image)
        return (pixels.flip(2) if mirrored else pixels), known


def together(samples: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    images, targets = zip(*samples, strict=True)
    if len({target.shape for target in targets}) == 1:
        return torch.stack(images), torch.stack(targets)
    boxes = nn.utils.rnn.pad_sequence(list(targets), batch_first=True, padding_value=-1)
    return torch.stack(images), boxes


@torch.inference_mode()
def judge(network: nn.Module, task: Task, images: Images) -> dict[str, float]:
    network.eval()
    pieces = []
    for x, targets in DataLoader(images, BATCH, collate_fn=together):
        outputs = network(task.card.preprocess.normalise(x))
        pieces.append({k: v.numpy() for k, v in task.judge(outputs, targets).items()})
    return task.conclude(joined(pieces))


def train(data: Data, task: Task, network: nn.Module, epochs: int) -> dict[str, float]:
    view = task.card.preprocess
    splits = {
        name: Images(source, view, task.dense, name == "train")
        for name, source in data.splits.items()
    }
    loader = DataLoader(
        splits["train"], BATCH, shuffle=True, collate_fn=together,
        drop_last=len(splits["train"]) > BATCH,
    )  # fmt: skip
    optimizer = torch.optim.SGD(
        network.parameters(), LR, momentum=MOMENTUM, weight_decay=WEIGHT_DECAY
    )
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs)
    best, kept = -1e30, copy.deepcopy(network.state_dict())
    for _ in range(epochs):
        network.train()
        for x, targets in loader:
            optimizer.zero_grad()
            (task.loss_sum(network(view.normalise(x)), targets) / len(x)).backward()
            optimizer.step()
        schedule.step()
        score = task.score(judge(network, task, splits["val"]))
        if score > best:
            best, kept = score, copy.deepcopy(network.state_dict())
    network.load_state_dict(kept)
    return judge(network, task, splits["test"])


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("task")
    parser.add_argument("data")
    parser.add_argument("--weights", required=True)
    parser.add_argument("--epochs", type=int, required=True)
    parser.add_argument("--seed", type=int, default=0)
    asked = parser.parse_args()
    torch.manual_seed(asked.seed)
    data = open_data(asked.data, task=asked.task)
    given = TrainConfig(data=asked.data, task=asked.task, from_=asked.weights, seed=asked.seed)
    start = open_initial_weights(given, None)
    assert start is not None
    config = start.adopt(given, None)
    card = make_card(config, data, start)
    network, _, _ = build_model(config, card, start)
    network = network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    print(json.dumps(train(data, make_task(card), network, asked.epochs)))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
