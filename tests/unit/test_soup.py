"""Reward Soups: endpoints bit for bit, the mean between, models that do not fit."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from spalign.errors import ModelError
from spalign.training.soup import parse_ratio, soup


def model(folder: Path, seed: int, dtype: torch.dtype = torch.float32, size: int = 8) -> Path:
    folder.mkdir()
    generator = torch.Generator().manual_seed(seed)
    weights = {"w": torch.randn(size, 4, generator=generator).to(dtype), "steps": torch.tensor([seed])}
    save_file(weights, folder / "model.safetensors")
    (folder / "config.json").write_text('{"model_type": "llama"}')
    return folder


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_endpoints_are_the_models_bit_for_bit(tmp_path: Path, dtype: torch.dtype) -> None:
    a, b = model(tmp_path / "a", 1, dtype), model(tmp_path / "b", 2, dtype)
    for weight, end in ((1.0, a), (0.0, b)):
        made = load_file(soup(a, b, tmp_path / f"soup-{weight}", weight=weight) / "model.safetensors")
        assert all(torch.equal(made[k], v) and made[k].dtype == v.dtype for k, v in load_file(end / "model.safetensors").items())


def test_between_them_it_is_the_weighted_mean(tmp_path: Path) -> None:
    a, b = model(tmp_path / "a", 1), model(tmp_path / "b", 2)
    made = load_file(soup(a, b, tmp_path / "soup", weight=0.6) / "model.safetensors")
    x, y = (load_file(m / "model.safetensors")["w"] for m in (a, b))
    torch.testing.assert_close(made["w"], 0.6 * x + 0.4 * y)
    assert (tmp_path / "soup/config.json").exists()


@given(st.floats(0, 100), st.floats(0.01, 100))
def test_ratios(x: float, y: float) -> None:
    assert parse_ratio(f"{x}:{y}") == pytest.approx(x / (x + y))


@pytest.mark.parametrize("text", ["", "a:b", "0:0", "-1:2", "1:", "1.5", "nan:1", "inf:1"])
def test_what_is_no_ratio(text: str) -> None:
    with pytest.raises(ModelError, match="ratio"):
        parse_ratio(text)


def test_models_that_do_not_fit_and_folders_that_are_none(tmp_path: Path) -> None:
    a, b = model(tmp_path / "a", 1), model(tmp_path / "b", 2, size=6)
    with pytest.raises(ModelError, match="one shape"):
        soup(a, b, tmp_path / "soup", weight=0.5)
    with pytest.raises(ModelError, match="exists"):
        soup(a, a, b, weight=0.5)
    with pytest.raises(ModelError, match="not the folder"):
        soup(a, tmp_path / "none", tmp_path / "soup", weight=0.5)
    (a / "model.safetensors").write_bytes(b"torn")
    with pytest.raises(ModelError, match="cannot be read"):
        soup(a, a, tmp_path / "soup", weight=0.5)
    assert not (tmp_path / "soup").exists()
