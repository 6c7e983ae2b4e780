"""The examples run as their first lines say, and learn."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    "command",
    [
        "mlp.py",
        "lstm.py",
        "gpt2.py",
        f"gpt2.py {ROOT / 'README.md'} pp=2:zero-bubble,mb=4",
        "bert.py",
        "wav2vec2.py",
        "image_classifier.py shufflenet_v1_x1_0_g8 tp=2:channel",
        "image_classifier.py torchvision:resnet50 tp=2:spatial",
        "image_classifier.py torchvision:vgg16 tp=2:channel",
    ],
)
def test_example(command: str) -> None:
    script, *arguments = command.split()
    found = subprocess.run(
        [
            *(sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"),
            *(str(ROOT / "examples" / script), *arguments),
        ],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert found.returncode == 0, found.stderr[-2000:]
    losses = [float(text) for text in re.findall(r"loss ([\d.]+)", found.stdout)]
    assert len(losses) >= 5 and losses[-1] < 0.9 * losses[0]
    assert "% of the FLOPs are split" in found.stdout
    assert ("pipeline stages" in found.stdout) == ("pp=2" in command)
