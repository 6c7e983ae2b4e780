"""Write six test images of the digits as PNG files, the label in the name, for `predict`."""

from __future__ import annotations

import sys
from pathlib import Path

from meshuffle.data import open_data

NUM_IMAGES = 6


def main() -> None:
    folder = Path(sys.argv[1])
    folder.mkdir(parents=True, exist_ok=True)
    source = open_data("digits", need=("test",)).splits["test"]
    for index in range(NUM_IMAGES):
        label = source.classes[source.labels[index]]
        source.image(index).save(folder / f"{index}-is-{label}.png")


if __name__ == "__main__":
    main()
