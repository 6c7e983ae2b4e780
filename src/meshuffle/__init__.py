"""Meshuffle."""
