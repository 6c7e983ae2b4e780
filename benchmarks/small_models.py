"""Models for small inputs: torchvision's vision transformers, a GPT-2 and an LSTM of characters.

The classifier of the transformers is not zero as their own, which lets no gradient reach the layers
in front of it in the first step.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torchvision
from torch import nn

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
from lstm import CharacterModel

SIZE = {"vit_b_16": 64, "vit_b_32": 64, "vit_l_16": 64, "vit_l_32": 64, "vit_h_14": 56}


def _make(name: str) -> nn.Module:
    model = torchvision.models.get_model(name, weights=None, image_size=SIZE[name])
    nn.init.normal_(model.heads.head.weight, std=0.02)
    return model


def vit_b_16() -> nn.Module:
    return _make("vit_b_16")


def vit_b_32() -> nn.Module:
    return _make("vit_b_32")


def vit_l_16() -> nn.Module:
    return _make("vit_l_16")


def vit_l_32() -> nn.Module:
    return _make("vit_l_32")


def vit_h_14() -> nn.Module:
    return _make("vit_h_14")


def lstm() -> nn.Module:
    return CharacterModel(width=64)


def gpt2() -> nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel

    sizes = {"vocab_size": 256, "n_positions": 64, "n_embd": 64, "n_layer": 4, "n_head": 4}
    return GPT2LMHeadModel(GPT2Config(**sizes, bos_token_id=0, eos_token_id=0, use_cache=False))
