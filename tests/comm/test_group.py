"""Who am I: the environments of torchrun, SLURM, Kubernetes and of none."""

from __future__ import annotations

import os

import pytest
import torch
import torch.distributed as dist

from meshuffle.comm.device import backend_for, check_device, pick_device
from meshuffle.comm.group import (
    RankEnv,
    fill_rendezvous,
    first_host,
    new_group,
    process_group,
    rank_env,
)
from meshuffle.errors import ConfigError
from tests.ranks import run_ranks

TORCHRUN = {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"}
SLURM = {"SLURM_STEP_ID": "0", "SLURM_NTASKS": "5", "SLURM_PROCID": "4", "SLURM_LOCALID": "1"}


@pytest.mark.parametrize(
    ("environ", "expected"),
    [
        ({}, None),
        (TORCHRUN, RankEnv(3, 4, 1, 2)),
        ({**SLURM, **TORCHRUN}, RankEnv(3, 4, 1, 2)),
        ({"RANK": "1", "WORLD_SIZE": "2"}, RankEnv(1, 2, 0, 1)),  # one pod per rank
        ({"WORLD_SIZE": "2"}, None),
        (SLURM, RankEnv(4, 5, 1, 5)),  # one node
        ({**SLURM, "SLURM_STEP_NUM_NODES": "2"}, RankEnv(4, 5, 1, 1)),
        (
            {**SLURM, "SLURM_STEP_TASKS_PER_NODE": "3,2", "SLURM_NODEID": "1"},
            RankEnv(4, 5, 1, 2),
        ),
        (
            {**SLURM, "SLURM_STEP_TASKS_PER_NODE": "2(x2),1", "SLURM_NODEID": "2"},
            RankEnv(4, 5, 1, 1),
        ),
        ({**SLURM, "SLURM_NTASKS": "1"}, None),
        ({"SLURM_NTASKS": "4", "SLURM_JOB_ID": "7"}, None),  # salloc's shell, not a job step
    ],
)
def test_rank(environ: dict[str, str], expected: RankEnv | None) -> None:
    assert rank_env(environ) == expected


@pytest.mark.parametrize(
    ("environ", "says"),
    [
        ({**TORCHRUN, "RANK": "one"}, "RANK='one', which is not a number"),
        ({**TORCHRUN, "WORLD_SIZE": ""}, "WORLD_SIZE=''"),
        ({"SLURM_STEP_ID": "0", "SLURM_NTASKS": "2"}, "SLURM_PROCID=None"),
    ],
)
def test_broken_environments(environ: dict[str, str], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        rank_env(environ)


def test_only_rank_0_is_main() -> None:
    assert RankEnv().is_main
    assert not RankEnv(1, 2, 0, 1).is_main


@pytest.mark.parametrize(
    ("nodes", "host"),
    [
        ("node1", "node1"),
        ("node1,node2", "node1"),
        ("gpu[03-05,9],login1", "gpu03"),
        ("gpu[7,9-10]", "gpu7"),
        ("login1,gpu[03-05]", "login1"),
        ("rack[1-2]n,other", "rack1n"),
        ("rack[1-2]-node[3-4]", "rack1-node3"),
        ("127.0.0.1", "127.0.0.1"),
        ("a-b-c[001-100]", "a-b-c001"),
    ],
)
def test_first_host(nodes: str, host: str) -> None:
    assert first_host(nodes) == host


def test_rendezvous_of_slurm() -> None:
    environ = {"SLURM_STEP_NODELIST": "n[1-2]", "SLURM_JOB_ID": "123456"}
    fill_rendezvous(environ)
    assert environ["MASTER_ADDR"] == "n1"
    assert environ["MASTER_PORT"] == str(20000 + 123456 % 20000)
    given = {"MASTER_ADDR": "x", "MASTER_PORT": "1"}
    fill_rendezvous(given)
    assert given == {"MASTER_ADDR": "x", "MASTER_PORT": "1"}


def test_one_rank_needs_no_rendezvous(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    with process_group(RankEnv(), torch.device("cpu")) as group:
        assert dist.get_world_size(group) == 1
        with process_group(RankEnv(), torch.device("cpu")) as inner:
            assert inner is group
        assert dist.is_initialized()
    assert not dist.is_initialized()
    assert "MASTER_ADDR" not in os.environ


def test_the_group_closes_after_an_error() -> None:
    with (
        pytest.raises(ZeroDivisionError),
        process_group(RankEnv(), torch.device("cpu")),
    ):
        raise ZeroDivisionError
    assert not dist.is_initialized()


def subgroups(group: dist.ProcessGroup) -> tuple[float, float]:
    rank = dist.get_rank(group)
    pair, own = new_group([0, 1]), new_group([rank], local=True)
    total = torch.tensor([float(rank + 1)])
    if rank < 2:
        dist.all_reduce(total, group=pair)
    alone = torch.tensor([5.0])
    dist.all_reduce(alone, group=own)
    return float(total), float(alone)


@pytest.mark.slow
def test_subgroups() -> None:
    assert run_ranks(subgroups, 3) == [(3.0, 5.0)] * 3


def test_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    assert pick_device("cpu", 7) == torch.device("cpu")
    assert backend_for(torch.device("cpu")) == "gloo"
    assert backend_for(torch.device("cuda", 0)) == "nccl"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert check_device("auto", 8) == "cpu"
    with pytest.raises(ConfigError, match="device 'cuda' is not available"):
        pick_device("cuda")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert check_device("auto", 2) == "cuda"
    with pytest.raises(ConfigError, match="3 ranks on this host, which has 2 GPUs"):
        check_device("cuda", 3)
