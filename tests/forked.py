"""What the ranks of the tests are forked from: a process that has loaded and captured before.

A rank that begins with nothing takes five seconds for its imports, and five for its first capture.
"""

from __future__ import annotations

import torch
from torch import nn

import meshuffle.deploy.serve.split
import meshuffle.train.rank
import meshuffle.verify.rank  # noqa: F401
from meshuffle.graph.capture import capture

torch.set_num_threads(1)  # a thread of this process would be missing in the ranks
capture(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)), torch.randn(2, 3, 8, 8))
