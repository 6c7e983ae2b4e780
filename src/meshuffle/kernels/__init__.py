"""Faster ways to the values that a rank's code computes, and the rewrite that takes them."""
