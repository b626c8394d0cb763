"""What a run takes at most, by hand; and `spalign estimate RUN.yaml`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

from spalign.cli import app
from spalign.config import RunConfig, config_from
from spalign.errors import SpalignError
from spalign.pipeline.budget import budget
from spalign.training.estimate import Estimate


def config(**changes: Any) -> RunConfig:
    data = {
        "name": "x",
        "model": "demo",
        "prompts": {"train": {"source": "high_stakes_train", "limit": 10}, "heldout": {"source": "high_stakes_heldout", "limit": 4}},
        "sample": {"n": 4, "max_new_tokens": 50},
        "refine": {"drafts": 2},
        "evaluation": {"samples": 3},
        **changes,
    }
    return config_from(data)


def test_tokens_and_scores_by_hand() -> None:
    found = budget(config(), "h200", options={})
    # 10 prompts x 4 answers x 50 tokens; 2 drafts and as many placebos; 4 held-out prompts x 3 answers, before and after
    assert found.generated == {"sample": 2000, "refine": 2000, "before": 600, "after": 600}
    # 40 + 40 + 12 + 12 responses on two objectives
    assert found.scores == 208
    assert isinstance(found.training, Estimate)
    plan = found.training.plan
    assert (plan.prompts, plan.responses, plan.response_tokens, plan.method, plan.step_prompts) == (10, 5, 50, "full", 8)
    assert found.generation_hours is None
    assert found.money is None


def test_iterations_share_new_prompts_and_another_judge_scores_again() -> None:
    again = budget(config(iterations=2), "h200", options={})
    assert again.generated["sample"] == 4000
    shared = budget(config(iterations=2, new_prompts=True), "h200", options={})
    assert shared.generated["sample"] == 2000
    other = budget(config(self_evaluation={"reference_judge": "demo"}), "h200", options={})
    assert other.scores == 208 + 40 * 2


def test_hours_and_money_by_hand() -> None:
    found = budget(config(), "h200", options={"devices": 2}, rate=100.0, price=3.0)
    # 5,200 tokens at 2 x 100 a second
    assert found.generation_hours == pytest.approx(26 / 3600)
    assert found.training_hours is not None
    assert found.money == pytest.approx(3.0 * 2 * (26 / 3600 + found.training_hours))
    served = budget(config(), "h200", options={}, price_per_million=10.0)
    assert served.money == pytest.approx(0.052)
    both = budget(config(), "h200", options={}, price_per_million=10.0, price=3.0)
    assert both.training_hours is not None
    assert both.money == pytest.approx(0.052 + 3.0 * both.training_hours)


def test_what_is_not_known_has_no_price(monkeypatch: pytest.MonkeyPatch) -> None:
    assert budget(config(), "h200", options={}, price=3.0).money is None  # no rate, so no hours of generation
    unknown = budget(config(model="org/none"), "h200", options={}, rate=100.0, price=3.0)  # HF_HUB_OFFLINE is set for all tests
    assert isinstance(unknown.training, str)
    assert unknown.money is None
    assert unknown.as_dict()["training_unknown"] == unknown.training


@pytest.mark.parametrize("name", ["rate", "price", "price_per_million"])
@pytest.mark.parametrize("value", [0.0, -1.0, float("nan"), float("inf")])
def test_prices_are_numbers_above_0(name: str, value: float) -> None:
    with pytest.raises(SpalignError, match="give a number above 0"):
        budget(config(), "h200", options={}, **{name: value})


def test_the_command_takes_a_run_and_what_is_given_goes_before_what_it_says(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text(yaml.safe_dump(config().model_dump(mode="json")))
    runner = CliRunner()
    found = json.loads(runner.invoke(app, ["estimate", str(file), "--method", "lora", "--set", "sample.n=3", "--json"]).stdout)
    assert found["generated_tokens"]["sample"] == 1500
    assert found["training"]["plan"]["method"] == "lora"
    assert found["training"]["plan"]["responses"] == 4
    assert "Training, of one iteration" in runner.invoke(app, ["estimate", str(file)]).stdout


@pytest.mark.parametrize("arguments", [[], ["x.yaml", "--model", "demo"], ["--model", "demo", "--price", "3"]])
def test_half_questions(arguments: list[str]) -> None:
    done = CliRunner().invoke(app, ["estimate", *arguments])
    assert isinstance(done.exception, SpalignError)
