"""What a process of ours need not load and need not do. A program that uses the library is left alone."""

from __future__ import annotations

import atexit
import gc
import sys
from typing import Any

_UNUSED = "sklearn"
_modules: dict[str, Any] = sys.modules


def slim() -> None:
    """A command starts one second sooner, three where scikit-learn is installed, and ends one second sooner.

    transformers is to think that scikit-learn is not installed: it brings pandas and SciPy, for assisted generation alone. Python looks for
    garbage every 700 new objects, also in the million that imports make and keep, and in all of them again when it ends. Objects in cycles
    are not finalised then: what must be closed is closed, not left to Python.
    """
    _modules.setdefault(_UNUSED, None)
    gc.set_threshold(10_000, 10, 10)
    atexit.register(gc.freeze)


def whole() -> None:
    """Have scikit-learn again, for what does use it (lm-eval)."""
    if _modules.get(_UNUSED, slim) is None:
        del _modules[_UNUSED]
