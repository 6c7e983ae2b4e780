"""Two hosts (network namespaces): ranks find each other, and bytes are those on the wire."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from meshuffle.comm.group import choose_interface

ROOT = Path(__file__).parents[2]
OVERHEAD = 1.10  # headers of Ethernet, IP and TCP, acknowledgements, and gloo's own


def run(*command: str) -> None:
    subprocess.run(command, check=True, capture_output=True)


@pytest.fixture(scope="module")
def hosts() -> Iterator[list[str]]:
    """Return the names of two namespaces, 10.73.0.1 and 10.73.0.2, with a wire between them."""
    names = [f"meshuffle{os.getpid()}{side}" for side in "ab"]
    if shutil.which("ip") is None or os.geteuid() != 0:
        pytest.skip("network namespaces need root and iproute2")
    try:
        run("ip", "netns", "add", names[0])
    except subprocess.CalledProcessError as error:
        pytest.skip(f"no network namespace can be made here: {error.stderr!r}")
    try:
        run("ip", "netns", "add", names[1])
        wire = [f"mesh{os.getpid() % 10**6}{side}" for side in "ab"]
        run("ip", "link", "add", wire[0], "type", "veth", "peer", "name", wire[1])
        for i, (name, end) in enumerate(zip(names, wire, strict=True)):
            run("ip", "link", "set", end, "netns", name)
            run("ip", "-n", name, "address", "add", f"10.73.0.{i + 1}/24", "dev", end)
            run("ip", "-n", name, "link", "set", end, "up")
            run("ip", "-n", name, "link", "set", "lo", "up")
        yield names
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "del", name], check=False, capture_output=True)


def start(host: str, rank: int, plan: str, *command: str) -> subprocess.Popen[str]:
    variables = {"RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}
    variables |= {"MASTER_ADDR": "10.73.0.1", "MASTER_PORT": "29731", "PLAN": plan}
    environment = {k: v for k, v in os.environ.items() if k != "GLOO_SOCKET_IFNAME"} | variables
    return subprocess.Popen(
        ["ip", "netns", "exec", host, sys.executable, *command],
        env=environment | {"OMP_NUM_THREADS": "1", "TORCH_CPP_LOG_LEVEL": "ERROR"},
        cwd=ROOT,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )


@pytest.mark.parametrize("plan", ["tp=2:channel", "tp=2:spatial", "dp=2"])
def test_counted_bytes_are_those_of_the_network_interface(hosts: list[str], plan: str) -> None:
    ranks = [start(host, i, plan, "-m", "tests.comm.hosts") for i, host in enumerate(hosts)]
    told = [rank.communicate(timeout=200) for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0, 0], told
    found = [json.loads(out) for out, _ in told]
    counted, sent = (sum(each[key] for each in found) for key in ("counted", "sent"))
    assert counted > 10**6 and counted <= sent <= OVERHEAD * counted


def test_the_interface_is_the_one_that_leads_to_the_main_rank() -> None:
    environ = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}
    choose_interface(environ)
    assert environ["GLOO_SOCKET_IFNAME"] == "lo"
    chosen = environ | {"GLOO_SOCKET_IFNAME": "eth7"}
    choose_interface(chosen)
    assert chosen["GLOO_SOCKET_IFNAME"] == "eth7"
    unknown = {"MASTER_ADDR": "no-such-host.invalid", "MASTER_PORT": "1"}
    choose_interface(unknown)
    assert "GLOO_SOCKET_IFNAME" not in unknown
