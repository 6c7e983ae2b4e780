"""Who am I among the ranks, and the process group that joins us.

The environment of torchrun, of SLURM, or of neither (one rank) is read by `rank_env`;
`process_group` opens and always closes the group, one rank or thousands.
"""

from __future__ import annotations

import contextlib
import datetime
import os
import platform
import re
import socket
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d

from meshuffle.comm.device import backend_for
from meshuffle.errors import ConfigError, RankFailed, in_words


@dataclass(frozen=True)
class RankEnv:
    """One rank's place: `rank` of `world`, and `local_rank` of `local_world` on its host."""

    rank: int = 0
    world: int = 1
    local_rank: int = 0
    local_world: int = 1

    @property
    def is_main(self) -> bool:
        """True on the one rank that prints and writes."""
        return self.rank == 0


def rank_env(environ: Mapping[str, str] | None = None) -> RankEnv | None:
    """Return the rank that a launcher gave this process, or None when nobody launched it.

    torchrun's variables come first; where only RANK and WORLD_SIZE are set (Kubernetes), each
    rank has a host of its own. SLURM's count only inside `srun` (a job step), with more than
    one task.

    Raises:
        ConfigError: a launcher's variable is missing or not a number.
    """
    env = os.environ if environ is None else environ
    if "RANK" in env and "WORLD_SIZE" in env:
        rank, world = _integer(env, "RANK"), _integer(env, "WORLD_SIZE")
        local_rank = _integer(env, "LOCAL_RANK", 0)
        return RankEnv(rank, world, local_rank, _integer(env, "LOCAL_WORLD_SIZE", 1))
    if "SLURM_STEP_ID" in env and _integer(env, "SLURM_NTASKS", 1) > 1:
        rank, world = _integer(env, "SLURM_PROCID"), _integer(env, "SLURM_NTASKS")
        return RankEnv(rank, world, _integer(env, "SLURM_LOCALID", 0), _tasks_here(env, world))
    return None


def _tasks_here(env: Mapping[str, str], world: int) -> int:
    """Return SLURM's number of tasks on this node; its list `2(x3),1` means 2, 2, 2, 1."""
    text = env.get("SLURM_STEP_TASKS_PER_NODE", "")
    parts = re.findall(r"(\d+)(?:\(x(\d+)\))?", text)
    counts = [int(tasks) for tasks, times in parts for _ in range(int(times or 1))]
    node = _integer(env, "SLURM_NODEID", 0)
    if node < len(counts):
        return counts[node]
    return world if _integer(env, "SLURM_STEP_NUM_NODES", 1) == 1 else 1


def _integer(env: Mapping[str, str], key: str, default: int | None = None) -> int:
    text = env.get(key)
    if text is None and default is not None:
        return default
    try:
        return int(text or "")
    except ValueError:
        raise ConfigError(f"the launcher set {key}={text!r}, which is not a number") from None


def fill_rendezvous(environ: dict[str, str]) -> None:
    """Set MASTER_ADDR and MASTER_PORT from SLURM's variables where torchrun did not."""
    if "MASTER_ADDR" not in environ:
        nodes = environ.get("SLURM_STEP_NODELIST", environ.get("SLURM_NODELIST", "127.0.0.1"))
        environ["MASTER_ADDR"] = first_host(nodes)
    if "MASTER_PORT" not in environ:
        environ["MASTER_PORT"] = str(20000 + int(environ.get("SLURM_JOB_ID", "0")) % 20000)


def choose_interface(environ: dict[str, str]) -> None:
    """Let gloo use the network interface that leads to MASTER_ADDR, unless the user chose one.

    By itself it takes the address of the host's name, which is often the loopback's, so that ranks
    of other hosts are never reached. Sets GLOO_SOCKET_IFNAME; on Linux, for IPv4.
    """
    if "GLOO_SOCKET_IFNAME" in environ or platform.system() != "Linux":
        return
    with contextlib.suppress(OSError), socket.socket(type=socket.SOCK_DGRAM) as probe:
        probe.connect((environ["MASTER_ADDR"], int(environ["MASTER_PORT"])))  # sends nothing
        own = probe.getsockname()[0]
        for _, name in socket.if_nameindex():
            with contextlib.suppress(OSError):  # an interface without an address
                if _address_of(name, probe) == own:
                    environ["GLOO_SOCKET_IFNAME"] = name
                    return


def _address_of(interface: str, any_socket: socket.socket) -> str:
    import fcntl  # not on Windows

    get_address = 0x8915  # SIOCGIFADDR of netdevice(7)
    request = interface.encode().ljust(32, b"\0")
    return socket.inet_ntoa(fcntl.ioctl(any_socket, get_address, request)[20:24])


def first_host(nodelist: str) -> str:
    """Return the first host of a SLURM node list.

    >>> first_host("gpu[03-05,9],login1")
    'gpu03'
    """
    head, bracket, rest = nodelist.partition("[")
    if not bracket or "," in head:
        return nodelist.partition(",")[0]
    inside, _, suffix = rest.partition("]")
    first = inside.replace("-", ",").partition(",")[0]
    return head + first + first_host(suffix)


def new_group(
    ranks: list[int] | None = None, *, backend: str | None = None, local: bool = False
) -> dist.ProcessGroup:
    """Return a group of `ranks` (None is all), as torch does; every rank calls it in turn.

    Args:
        backend: None is the default group's.
        local: only the members call it; they make no group with other ranks after it.
    """
    group = dist.new_group(ranks, backend=backend, use_local_synchronization=local)
    assert isinstance(group, dist.ProcessGroup) or dist.get_rank() not in (ranks or [])
    return group  # type: ignore[return-value]  # of those that are no member: never used


def patience(group: dist.ProcessGroup) -> datetime.timedelta:
    """Return how long a group's ranks wait for each other on the CPU."""
    options: Any = group._get_backend(torch.device("cpu")).options
    waits: datetime.timedelta = options._timeout
    return waits


def set_patience(seconds: float) -> None:
    """Let each group that exists wait so long for its ranks, not torch's half an hour."""
    apply = getattr(distributed_c10d, "set_timeout", None) or distributed_c10d._set_pg_timeout
    for group in list(distributed_c10d._world.pg_map):
        apply(datetime.timedelta(seconds=seconds), group)


def wait(work: dist.Work, group: dist.ProcessGroup, what: str) -> None:
    """Wait for a message, as long as the group does for its collectives.

    gloo's messages would wait for ever; NCCL has a watchdog of its own, and a wait with a limit
    would stop the host.

    Args:
        what: is awaited, for the error.

    Raises:
        RankFailed: the other rank is gone, or silent.
    """
    try:
        if dist.get_backend(group) == "gloo":
            work.wait(patience(group))
        else:
            work.wait()
    except RuntimeError as error:
        raise RankFailed(f"{what}: {in_words(error)}", what) from error


@contextlib.contextmanager
def process_group(
    env: RankEnv, device: torch.device, timeout_s: float = 1800
) -> Iterator[dist.ProcessGroup]:
    """Join the ranks for the length of a `with` block; yields the group of all ranks.

    Inside another such block the ranks are joined already, and its group is yielded.

    Args:
        env: this rank's place; one rank needs no rendezvous.
        device: decides the backend (gloo on CPU, NCCL on CUDA).
        timeout_s: how long a collective may wait for the others, seconds.
    """
    if dist.is_initialized():
        assert dist.group.WORLD is not None
        yield dist.group.WORLD
        return
    timeout = datetime.timedelta(seconds=timeout_s)
    backend = backend_for(device)
    if env.world == 1:
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    else:
        fill_rendezvous(os.environ)  # type: ignore[arg-type]
        if env.world > env.local_world:
            choose_interface(os.environ)  # type: ignore[arg-type]
        dist.init_process_group(
            backend,
            rank=env.rank,
            world_size=env.world,
            timeout=timeout,
            device_id=device if device.type == "cuda" else None,
        )
    try:
        group = dist.group.WORLD
        assert group is not None
        yield group
    finally:
        dist.destroy_process_group()
