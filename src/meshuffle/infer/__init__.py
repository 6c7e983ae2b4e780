"""Evaluate, predict and compute features, on one rank or many."""
