"""Evaluate and predict under a plan: what one device finds, whatever the ranks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from PIL import Image

from meshuffle.comm import launch
from meshuffle.comm.group import RankEnv
from meshuffle.data import Batch, Preprocess, decode_image
from meshuffle.errors import DataError, PlanError
from meshuffle.infer.evaluation import Evaluation
from meshuffle.infer.predict import evaluate, predict
from meshuffle.infer.rank import Question, judge_rank
from meshuffle.infer.replica_batches import broadcast_batches, replica_group
from meshuffle.infer.split import Normalised, own_part
from meshuffle.models import create_model
from meshuffle.parallel.place import place_of
from meshuffle.planner.plan import parse_plan
from meshuffle.tasks.card import Card
from meshuffle.weights import build_model, load_model, save_weights
from tests.conftest import SMALL
from tests.ranks import run_ranks

PLANS = ("tp=2:spatial", "pp=2", "tp=2,pp=2:zbv", "dp=2,tp=2")


@pytest.fixture(scope="module")
def weights(photos: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with random weights whose batch norms have seen something."""
    knobs = {"width": 0.25, "depths": [1, 1, 1], "head_channels": 32}
    assert knobs.keys() == SMALL.keys()
    model = create_model("shufflenet_v2_x0_5", num_classes=2, seed=1, **knobs).train()
    model(torch.rand(16, 3, 32, 32))
    card = Card(
        *("shufflenet_v2_x0_5", ("blue", "red"), Preprocess(crop=32, resize=32)),
        knobs=knobs,
        data=str(photos),
    )
    path = tmp_path_factory.mktemp("weights") / "small.safetensors"
    save_weights(path, model.state_dict(), card)
    return path


def judge(group: dist.ProcessGroup, weights: str, files: list[str], texts: list[str]) -> list[Any]:
    env = RankEnv(dist.get_rank(group), dist.get_world_size(group), dist.get_rank(group), 4)
    question = Question(weights, None, 5, files=files)
    found = []
    for text in texts:
        found.append(judge_rank(question, parse_plan(text), env)[0])
    return found


@pytest.mark.parametrize("world", [2, 4])
def test_every_rank_finds_what_one_device_finds(
    weights: Path, photos: Path, tmp_path: Path, world: int
) -> None:
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"no image")
    files = [str(path) for path in sorted((photos / "val").rglob("*.png"))]
    files.insert(3, str(broken))
    texts = [text for text in PLANS if parse_plan(text).num_ranks == world]
    expected, _ = judge_rank(
        Question(str(weights), None, 5, files=files), parse_plan(""), RankEnv()
    )
    assert expected.num_samples == 12
    for rank in run_ranks(judge, world, str(weights), files, texts):
        for found in rank:
            assert_same(found, expected)


def one_image(group: dist.ProcessGroup, weights: str, file: str) -> Evaluation:
    env = RankEnv(dist.get_rank(group), 2, dist.get_rank(group), 2)
    question = Question(weights, None, 1, files=[file])
    return judge_rank(question, parse_plan("tp=2:spatial"), env)[0]


def test_one_large_image_is_shared_by_its_rows(tmp_path: Path) -> None:
    path, file = tmp_path / "w.safetensors", tmp_path / "x.png"
    noise = np.random.default_rng(0).integers(0, 256, (16, 16, 3), np.uint8)
    Image.fromarray(noise).resize((300, 300)).save(file)
    card = Card(
        *("shufflenet_v2_x0_5", ("a", "b", "c"), Preprocess(crop=256, resize=None, fit="stretch")),
        task="segment",
        settings={"head": "lraspp"},
    )
    model = build_model(card).train()
    last = [part for part in model.modules() if getattr(part, "out_channels", 0) == 3][-1]
    with torch.no_grad():
        model(torch.rand(4, 3, 64, 64))
        view = card.preprocess.to_uint8(decode_image(str(file)))
        last.bias -= model.eval()(card.preprocess.normalise(view[None])).mean((0, 2, 3))
    save_weights(path, model.state_dict(), card)
    expected, _ = judge_rank(
        Question(str(path), None, 1, files=[str(file)]), parse_plan(""), RankEnv()
    )
    assert len(np.unique(expected.rows["mask"])) > 1
    for found in run_ranks(one_image, 2, str(path), str(file)):
        different = found.rows["mask"] != expected.rows["mask"]
        assert different.shape == (1, 256, 256) and different.mean() < 1e-3


def assert_same(found: Evaluation, expected: Evaluation) -> None:
    assert (found.indices == expected.indices).all()
    assert found.rows.keys() == {"top_classes", "top_probabilities"} and not found.metrics
    assert np.array_equal(found.rows["top_classes"], expected.rows["top_classes"])
    probabilities = (each.rows["top_probabilities"] for each in (found, expected))
    np.testing.assert_allclose(*probabilities, rtol=1e-4)
    assert found.skipped == expected.skipped
    assert len(found.skipped) == 1


@pytest.mark.usefixtures("real_torchrun")
def test_ranks_started_here(weights: Path, photos: Path) -> None:
    one, two = (evaluate(weights, plan=plan) for plan in ("dp=1", "tp=2"))
    assert one[1] == two[1]
    assert one[0].metrics == pytest.approx(two[0].metrics, rel=1e-5)
    image = photos / "val" / "red" / "0.png"
    (row,) = predict(weights, [image], plan="dp=1")
    assert row["file"] == str(image)
    assert row["label"] in ("blue", "red")


@pytest.mark.parametrize(
    ("plan", "message"),
    [
        ("dp=2:shard", "dp=2:shard: dp=N:shard is for training; use dp=2"),
        ("dp=8", "8 replicas share a batch of 4; use --batch 8 or more"),
        ("pp=2:dualpipev,mb=1", "give another mb"),
    ],
)
def test_plans_that_cannot_be(weights: Path, plan: str, message: str) -> None:
    with pytest.raises(PlanError, match=message):
        evaluate(weights, batch=4, plan=plan)


def read(group: dist.ProcessGroup) -> list[dict[str, Any] | None]:
    """Give the ranks of each replica what its first one reads: a batch, an empty one, none."""
    rank = dist.get_rank(group)
    place = place_of(parse_plan("dp=2,tp=2"), RankEnv(rank, 4, rank, 4))
    one = torch.full((3,), 7 + place.dp_rank)
    images = torch.arange(3 * 3 * 2 * 5).reshape(3, 3, 2, 5).to(torch.uint8)
    images = images.contiguous(memory_format=torch.channels_last)
    whole = Batch(images, one, one + 1, one + 2, one + 3, [f"broken on {place.dp_rank}"])
    empty = Batch(images[:0], one[:0], one[:0], one[:0], one[:0], [])
    batches = broadcast_batches(lambda: iter([whole, None, empty]), replica_group(place))
    return [None if batch is None else vars(batch) for batch in batches]


def test_ranks_of_a_replica_share_what_its_first_reads() -> None:
    found = run_ranks(read, 4)
    for replica in (0, 1):
        first, second = found[2 * replica], found[2 * replica + 1]
        assert first[0]["targets"].tolist() == [7 + replica] * 3
        assert first[0]["skipped"] == [f"broken on {replica}"]
        assert first[1] is None and second[1] is None
        for own, got in ((first[0], second[0]), (first[2], second[2])):
            for name, value in own.items():
                assert torch.equal(got[name], value) if name != "skipped" else got[name] == value
        assert second[0]["images"].is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("channels", ["RGB", "BGR"])
def test_ranks_normalise_as_one_process_does(channels: str) -> None:
    preprocess = Preprocess(crop=(5, 7), channels=channels)
    images = torch.randint(0, 256, (2, 3, 5, 7), dtype=torch.uint8)
    found = Normalised(torch.nn.Identity(), preprocess)(images)
    assert torch.equal(found, preprocess.normalise(images))
    last = images.contiguous(memory_format=torch.channels_last)
    assert torch.equal(found, preprocess.normalise(last))


def own_parameters(group: dist.ProcessGroup, path: str) -> int:
    """Return how many parameters a rank has, after the file has been overwritten in place."""
    rank = dist.get_rank(group)
    network, _ = load_model(Path(path), mapped=True)
    example = torch.empty(2, 3, 32, 32, device="meta")
    device, env = torch.device("cpu"), RankEnv(rank, 2, rank, 2)
    part = own_part(network, example, parse_plan("tp=2:channel"), env, device)
    before = [parameter.clone() for parameter in part.parameters()]
    dist.barrier(group)
    if rank == 0:
        content = Path(path).read_bytes()
        with Path(path).open("r+b") as file:
            file.write(bytes(len(content)))
    dist.barrier(group)
    assert all(map(torch.equal, before, part.parameters()))
    return sum(parameter.numel() for parameter in before)


def test_a_rank_keeps_its_part_and_no_hold_of_the_file(weights: Path, tmp_path: Path) -> None:
    path = tmp_path / "w.safetensors"
    path.write_bytes(weights.read_bytes())
    whole = sum(parameter.numel() for parameter in load_model(path)[0].parameters())
    for kept in run_ranks(own_parameters, 2, str(path)):
        assert kept < 0.7 * whole


def test_a_plan_that_fills_the_memory_is_refused(
    weights: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(launch, "free_memory_bytes", lambda: 3 * 400_000_000)
    with pytest.raises(PlanError, match=r"4 ranks need 1\.6 GB .* 1\.2 GB are free .* at most 3"):
        evaluate(weights, batch=8, plan="dp=4")
    launch.require_memory(3)
    monkeypatch.setenv(launch.FORCE, "1")
    launch.require_memory(99)


def test_no_readable_image_is_an_error(weights: Path, photos: Path, tmp_path: Path) -> None:
    for split in ("train", "val"):
        for name in ("blue", "red"):
            folder = tmp_path / "torn" / split / name
            folder.mkdir(parents=True)
            whole = (photos / split / name / "0.png").read_bytes()
            (folder / "0.png").write_bytes(whole[:100])
    with pytest.raises(
        DataError, match=r"val: none of its images could be read; the first: .*0\.png"
    ):
        evaluate(weights, data=str(tmp_path / "torn"))
