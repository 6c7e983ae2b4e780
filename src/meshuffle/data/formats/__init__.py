"""The data formats, a file each; `data/source.py` lists them by their prefix."""
