"""A command of ours does not load scikit-learn, and lm-eval gets it back."""

from __future__ import annotations

import subprocess
import sys

import pytest

CODE = """
import sys
from spalign.startup import slim, whole
slim()
from transformers import AutoModelForCausalLM
AutoModelForCausalLM.from_config
assert sys.modules["sklearn"] is None and "sklearn.metrics" not in sys.modules
whole()
import sklearn.metrics
whole()
assert sys.modules["sklearn"] is sklearn
"""


def test_it_is_loaded_when_it_is_asked_for() -> None:
    pytest.importorskip("sklearn", reason="needs scikit-learn, which lm-eval brings")
    done = subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
