import itertools
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from meshuffle.data import (
    ArraySource,
    AugmentConfig,
    Batch,
    EpochSampler,
    Preprocess,
    SkipLog,
    auto_workers,
    build_train_transform,
    eval_loader,
    open_data,
    train_loader,
)
from meshuffle.errors import ImageError, MeshuffleError

SMALL = Preprocess(crop=(6, 8), resize=8)
TRANSFORM = build_train_transform(AugmentConfig(random_resized_crop=0.3, flip=0.5), SMALL)
FIELDS = ("images", "targets", "indices", "draws", "positions")


def in_memory(num: int) -> ArraySource:
    pixels = np.random.default_rng(0).integers(0, 256, (num, 9, 9, 3), dtype=np.uint8)
    return ArraySource("noise", ("a", "b", "c"), pixels, np.arange(num) % 3)


def same(first: Batch, second: Batch) -> bool:
    tensors = all(torch.equal(getattr(first, f), getattr(second, f)) for f in FIELDS)
    return tensors and first.skipped == second.skipped


def joined(batches: list[Batch]) -> dict[str, torch.Tensor]:
    return {field: torch.cat([getattr(batch, field) for batch in batches]) for field in FIELDS}


@pytest.fixture
def broken_folder(make_folder):
    """Ten images, of which b/001.png and b/003.png are broken."""
    root = make_folder({"a": 5, "b": 5})
    (root / "b" / "001.png").write_bytes(b"")
    (root / "b" / "003.png").write_text("no image")
    return open_data(str(root), need=("test",)).splits["test"]


def test_a_batch_holds_what_its_keys_say():
    source, sampler = in_memory(10), EpochSampler(10, 4, seed=1)
    for batch, keys in zip(
        train_loader(source, TRANSFORM, sampler, 2), sampler.batches(2), strict=True
    ):
        assert batch.images.shape == (len(keys), 3, 6, 8)
        assert batch.images.dtype == torch.uint8
        assert batch.images.is_contiguous(memory_format=torch.channels_last)
        assert batch.indices.tolist() == [key.index for key in keys]
        assert batch.draws.tolist() == [key.draw for key in keys]
        assert batch.targets.tolist() == [key.index % 3 for key in keys]
        assert batch.positions.tolist() == list(range(len(batch)))
        for image, key in zip(batch.images, keys, strict=True):
            assert torch.equal(image, TRANSFORM(source.image(key.index), key.draw))


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 23), st.integers(1, 9), st.integers(1, 4))
def test_ranks_together_load_what_one_process_loads(num, batch_size, world):
    source = in_memory(num)
    sampler = EpochSampler(num, batch_size, seed=4)
    whole = list(train_loader(source, TRANSFORM, sampler, 1))
    ranks = [
        list(train_loader(source, TRANSFORM, EpochSampler(num, batch_size, r, world, 4), 1))
        for r in range(world)
    ]
    assert all(len(batches) == len(whole) for batches in ranks)
    for step, expected in enumerate(whole):
        parts = joined([batches[step] for batches in ranks])
        for field in ("images", "targets", "indices", "draws"):
            assert torch.equal(parts[field], getattr(expected, field))


def test_resuming_in_the_middle_gives_the_same_batches():
    source, sampler = in_memory(20), EpochSampler(20, 6)
    whole = list(train_loader(source, TRANSFORM, sampler, 3))
    tail = list(train_loader(source, TRANSFORM, sampler, 3, start_step=2))
    assert len(tail) == 2
    assert all(same(a, b) for a, b in zip(whole[2:], tail, strict=True))


def test_a_rank_without_samples_has_an_empty_batch():
    sampler = EpochSampler(5, 4, rank=3, world=4)
    last = list(train_loader(in_memory(5), TRANSFORM, sampler, 0))[-1]
    assert len(last) == 0
    assert last.images.shape == (0, 3, 6, 8)
    assert last.images.dtype == torch.uint8 and last.targets.dtype == torch.int64
    assert SMALL.normalise(last.images).shape == (0, 3, 6, 8)


@pytest.mark.parametrize("world", [1, 2, 3])
def test_evaluation_sees_every_sample_once_in_order(world):
    source = in_memory(11)
    ranks = [
        list(eval_loader(source, SMALL, batch_size=4, rank=r, world=world)) for r in range(world)
    ]
    assert {len(batches) for batches in ranks} == {3}
    in_order = [batch for of_step in zip(*ranks, strict=True) for batch in of_step]
    everything = joined(in_order)
    assert everything["indices"].tolist() == list(range(11))
    for index, image in enumerate(everything["images"]):
        assert torch.equal(image, SMALL.to_uint8(source.image(index)))


def test_broken_images_leave_their_batch(broken_folder):
    batches = list(eval_loader(broken_folder, SMALL, batch_size=5))
    assert [len(batch) for batch in batches] == [5, 3]
    assert batches[1].indices.tolist() == [5, 7, 9]
    assert batches[1].positions.tolist() == [0, 2, 4]
    assert batches[1].targets.tolist() == [1, 1, 1]
    messages = [message for batch in batches for message in batch.skipped]
    assert len(messages) == 2
    assert "001.png: empty file" in messages[0]
    assert "003.png: not a JPEG" in messages[1]


def test_a_batch_of_broken_images_only(broken_folder):
    batch = list(eval_loader(broken_folder, SMALL, batch_size=1))[6]
    assert len(batch) == 0 and len(batch.skipped) == 1
    assert batch.images.shape == (0, 3, 6, 8)


def test_skip_log_tells_each_image_once(broken_folder):
    log = SkipLog()
    for _ in range(3):
        told = [
            log.note(batch.skipped) for batch in eval_loader(broken_folder, SMALL, batch_size=4)
        ]
    assert sum(map(len, told)) == 0
    assert len(log) == 2 == len(log.messages)
    assert log.note(["x", "x", log.messages[0]]) == ["x"]


def test_strict_stops_at_the_first(broken_folder):
    log = SkipLog(strict=True)
    assert log.note([]) == []
    with pytest.raises(ImageError, match=r"001\.png: empty file"):
        for batch in eval_loader(broken_folder, SMALL, batch_size=4):
            log.note(batch.skipped)


def test_auto_workers(broken_folder, monkeypatch):
    monkeypatch.setattr("meshuffle.data.loader.num_cores", lambda: 16)
    assert auto_workers(in_memory(3), 1) == 0
    assert [auto_workers(in_memory(3), ranks, 1) for ranks in (1, 4, 9)] == [1, 1, 0]
    assert auto_workers(in_memory(3), 1, threads=16) == 0
    assert [auto_workers(broken_folder, ranks) for ranks in (1, 2, 4, 16, 32)] == [8, 7, 3, 0, 0]


# --- worker processes ------------------------------------------------------------------------


def test_workers_change_nothing(broken_folder):
    sampler = EpochSampler(10, 3, seed=2)
    plain = list(train_loader(broken_folder, TRANSFORM, sampler, 1))
    workers = list(train_loader(broken_folder, TRANSFORM, sampler, 1, num_workers=2))
    assert all(same(a, b) for a, b in zip(plain, workers, strict=True))
    assert all(batch.images.is_contiguous(memory_format=torch.channels_last) for batch in workers)
    assert multiprocessing.active_children() == []


@pytest.mark.parametrize("how", ["close", "drop", "error"])
def test_workers_end_with_an_abandoned_epoch(how):
    batches = train_loader(in_memory(40), TRANSFORM, EpochSampler(40, 2), 0, num_workers=2)
    next(batches)
    workers = multiprocessing.active_children()
    assert len(workers) == 2
    if how == "close":
        batches.close()
    elif how == "drop":
        del batches
    else:
        with pytest.raises(ZeroDivisionError):
            for _ in batches:
                _ = 1 / 0
        batches.close()
    assert not any(worker.is_alive() for worker in workers)


class Probe:
    """A transform that shows what its worker process is like."""

    size = (1, 3)

    def pair(self, image, target, draw):
        ignored = signal.getsignal(signal.SIGINT) is signal.SIG_IGN
        blocked = signal.SIGINT in signal.pthread_sigmask(signal.SIG_BLOCK, [])  # from birth
        facts = [torch.get_num_threads(), int(ignored) + int(blocked), os.getpid() % 251]
        view = torch.tensor(facts, dtype=torch.uint8).repeat(3, 1, 1).view(3, 1, 3)
        return view, torch.tensor(target)


def test_workers_have_one_thread_and_ignore_ctrl_c():
    (batch,) = train_loader(in_memory(1), Probe(), EpochSampler(1, 1), 0, num_workers=1)
    threads, ignored, pid = batch.images[0, 0, 0].tolist()
    assert (threads, ignored) == (1, 2)
    assert pid != os.getpid() % 251


def test_ctrl_c_is_left_to_the_rank():
    """A terminal sends it to the workers too; they go on until the rank ends them."""
    sampler = EpochSampler(40, 2)
    batches = train_loader(in_memory(40), TRANSFORM, sampler, 0, num_workers=2)
    loaded = [next(batches)]
    for worker in multiprocessing.active_children():
        os.kill(worker.pid, signal.SIGINT)
    loaded += batches
    assert len(loaded) == 20


class Suicide:
    size = (1, 1)

    def pair(self, image, target, draw):
        os.kill(os.getpid(), signal.SIGKILL)


def test_a_killed_worker_is_an_error_of_one_line():
    batches = train_loader(in_memory(4), Suicide(), EpochSampler(4, 2), 0, num_workers=1)
    with pytest.raises(MeshuffleError, match=r"DataLoader worker .*exited unexpectedly") as error:
        list(batches)
    assert "\n" not in str(error.value)


SCRIPT = """
import time, numpy as np
from meshuffle.data import *

if __name__ == "__main__":
    source = ArraySource("x", ("a",), np.zeros((10**6, 8, 8), np.uint8), np.zeros(10**6, np.int64))
    transform = build_train_transform(AugmentConfig(), Preprocess(8, 8))
    sampler = EpochSampler(len(source), 4, shuffle=False)
    for batch in train_loader(source, transform, sampler, 0, num_workers=2):
        print("batch", flush=True)
        time.sleep(0.05)
"""


def of_group(group: int) -> list[int]:
    """The living processes of a process group."""
    found = []
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit():
            continue
        try:
            fields = (entry / "stat").read_text().rpartition(")")[2].split()
        except (FileNotFoundError, ProcessLookupError):
            continue
        if int(fields[2]) == group and fields[0] != "Z":
            found.append(int(entry.name))
    return found


def wait_until_gone(group: int) -> bool:
    deadline = time.monotonic() + 15
    while of_group(group) and time.monotonic() < deadline:
        time.sleep(0.05)
    return not of_group(group)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_killed_rank_leaves_no_worker_behind(tmp_path):
    (tmp_path / "run.py").write_text(SCRIPT)
    command = [sys.executable, str(tmp_path / "run.py")]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, text=True, start_new_session=True
    ) as rank:
        assert [rank.stdout.readline() for _ in range(3)] == ["batch\n"] * 3
        assert len(of_group(rank.pid)) >= 4  # the rank, the server and two workers
        rank.kill()
        gone = wait_until_gone(rank.pid)
        for left in of_group(rank.pid):
            os.kill(left, signal.SIGKILL)
        assert gone


def test_counting_groups_can_fail():
    """The planted fault: `of_group` sees a process that is there."""
    assert os.getpid() in of_group(os.getpgrp())
    assert list(itertools.islice(of_group(2**22 + 1), 1)) == []
