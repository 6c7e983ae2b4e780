"""One training loop, and what it reads and writes.

Nothing is imported here, so that `--help` does not bring torch with it.
"""
