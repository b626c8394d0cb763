"""What a process of ours need not load. A program that uses the library is left alone."""

from __future__ import annotations

import sys
from typing import Any

_UNUSED = "sklearn"
_modules: dict[str, Any] = sys.modules


def slim() -> None:
    """Have transformers think that scikit-learn is not installed: with pandas and SciPy it is two seconds of every start, for assisted
    generation alone."""
    _modules.setdefault(_UNUSED, None)


def whole() -> None:
    """Take `slim` back, for what does use it (lm-eval)."""
    if _modules.get(_UNUSED, slim) is None:
        del _modules[_UNUSED]
