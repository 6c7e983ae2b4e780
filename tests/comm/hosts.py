"""One rank per host, of two hosts that are network namespaces: `python -m tests.comm.hosts`.

Prints what the counter over c10d says this rank sent, and what its network interface did.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn

from meshuffle.comm.sent_bytes import SentBytes
from meshuffle.parallel.api import parallelize

STEPS = 4


def sent_by(interface: str) -> int:
    return int(Path(f"/sys/class/net/{interface}/statistics/tx_bytes").read_text())


def main() -> None:
    torch.manual_seed(0)
    torch.set_num_threads(1)
    net = nn.Sequential(
        *(nn.Conv2d(16, 64, 3, padding=1), nn.BatchNorm2d(64), nn.ReLU()),
        *(nn.Conv2d(64, 64, 3, padding=1, groups=2), nn.ChannelShuffle(2)),
        *(nn.Conv2d(64, 64, 3, padding=1, groups=2), nn.Flatten(), nn.Linear(64 * 48 * 48, 8)),
    )
    x = torch.randn(8, 16, 48, 48)
    model = parallelize(net, x, os.environ["PLAN"])
    interface = os.environ["GLOO_SOCKET_IFNAME"]
    with SentBytes():
        model(x).sum().backward()  # connections are made at first use
    dist.barrier()
    before = sent_by(interface)
    with SentBytes() as counted:
        for _ in range(STEPS):
            model(x).sum().backward()
    dist.barrier()
    sys.stdout.write(
        json.dumps({"counted": float(counted.total), "sent": sent_by(interface) - before}) + "\n"
    )


if __name__ == "__main__":
    main()
