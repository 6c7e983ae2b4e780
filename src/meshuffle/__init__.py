"""Meshuffle: plan, prove and run parallel training of any PyTorch model; ShuffleNet first."""

__version__ = "0.1.0"
