"""One training loop, and what it reads and writes.

The folder is also the function: `meshuffle.train(config)` trains (see `api.train`), whichever of
the two Python finds under that name. Nothing is imported here, so that `--help` does not bring
torch with it.
"""

import sys
from types import ModuleType
from typing import Any


class _CallableFolder(ModuleType):
    """A package that can be called."""

    def __call__(self, *arguments: Any, **keywords: Any) -> dict[str, Any]:
        """Train; the arguments and the result are those of `meshuffle.train.api.train`."""
        from meshuffle.train.api import train

        return train(*arguments, **keywords)


sys.modules[__name__].__class__ = _CallableFolder
