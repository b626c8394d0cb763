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


def test_iterations_share_new_prompts() -> None:
    again = budget(config(iterations=3), "h200", options={})
    assert again.generated["sample"] == 6000
    shared = budget(config(iterations=3, new_prompts=True), "h200", options={})  # 4, 3 and 3 of ten prompts
    assert shared.generated["sample"] == 2000
    assert isinstance(shared.training, Estimate)
    assert shared.training.plan.prompts == 4
    assert shared.training_hours == pytest.approx(3 * shared.training.hours)


def test_what_scores_again_is_counted() -> None:
    other = budget(config(self_evaluation={"reference_judge": "demo"}), "h200", options={})
    assert other.scores == 208 + 40 * 2
    # recipe paper: one draft a prompt, the same 40 candidates, on two objectives; its likert reads 3 times 8 tokens a score
    compared = budget(config(compare=["paper"]), "h200", options={})
    assert compared.generated["compare paper"] == 500
    assert compared.scores == 208 + 50 * 2
    assert compared.generated["scores by likert"] == 50 * 2 * 3 * 8
    asked = budget(config(self_evaluation={"scorer": {"harmlessness": "likert", "helpfulness": "yes_no"}}), "h200", options={})
    assert asked.generated["scores by likert"] == 104 * 3 * 8


def test_hours_and_money_by_hand() -> None:
    found = budget(config(), "h200", options={"devices": 2}, rate=100.0, price=3.0)
    # 5,200 tokens at 100 a second: one engine generates, and two devices are paid for
    assert found.generation_hours == pytest.approx(52 / 3600)
    assert found.training_hours is not None
    assert found.money == pytest.approx(3.0 * 2 * (52 / 3600 + found.training_hours))
    many = budget(config(engine={"kind": "ray", "workers": 4}), "h200", options={}, rate=100.0, price=3.0)
    assert many.generation_hours == pytest.approx(13 / 3600)
    assert many.devices == 4


def test_what_is_not_known_has_no_price() -> None:
    assert budget(config(), "h200", options={}, price=3.0).money is None  # no rate, so no hours of generation
    for model in ("org/none", "x" * 300, "~nobody/x", "weights.gguf"):  # HF_HUB_OFFLINE is set for all tests
        unknown = budget(config(model=model), "h200", options={"devices": 8}, rate=100.0, price=3.0)
        assert isinstance(unknown.training, str)
        assert unknown.money is None
        assert unknown.devices == 8
        assert unknown.as_dict()["training_unknown"] == unknown.training


def test_a_base_that_the_calculator_does_not_count_is_said() -> None:
    found = budget(config(train={"lora": {"base_dtype": "float32"}}), "h200", options={})
    assert "a base in float32 is not counted" in str(found.training)
    assert found.as_dict()["training"] is None


def test_a_served_policy_is_trained_as_the_model_that_its_tokenizer_names() -> None:
    served = config(model="served", engine={"kind": "openai", "base_url": "http://localhost:1/v1", "tokenizer": "demo"})
    assert isinstance(budget(served, "h200", options={}).training, Estimate)


def test_devices_are_those_of_the_launch_file() -> None:
    fsdp = config(train={"accelerate": str(Path(__file__).parents[2] / "configs/accelerate/fsdp2.yaml")})
    found = budget(fsdp, "h200", options={})
    assert isinstance(found.training, Estimate)
    assert (found.training.plan.devices, found.training.plan.sharding, found.devices) == (8, "fsdp2", 8)


@pytest.mark.parametrize("name", ["rate", "price"])
@pytest.mark.parametrize("value", [0.0, -1.0, float("nan"), float("inf")])
def test_prices_are_numbers_above_0(name: str, value: float) -> None:
    with pytest.raises(SpalignError, match="give a number above 0"):
        budget(config(), "h200", options={}, **{name: value})


def test_the_command_takes_a_run_and_options_for_what_it_does_not_say(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text(yaml.safe_dump(config().model_dump(mode="json")))
    runner = CliRunner()
    found = json.loads(runner.invoke(app, ["estimate", str(file), "--devices", "2", "--set", "sample.n=3", "--json"]).stdout)
    assert found["generated_tokens"]["sample"] == 1500
    assert found["training"]["plan"]["devices"] == 2
    assert found["training"]["plan"]["responses"] == 4
    assert "Training, of one iteration" in runner.invoke(app, ["estimate", str(file)]).stdout
    for said in (["--method", "lora"], ["--prompts", "5"], ["--epochs", "2"]):
        assert "is what the run says" in str(runner.invoke(app, ["estimate", str(file), *said]).exception)


@pytest.mark.parametrize("arguments", [[], ["x.yaml", "--model", "demo"], ["--model", "demo", "--price", "3"]])
def test_half_questions(arguments: list[str]) -> None:
    done = CliRunner().invoke(app, ["estimate", *arguments])
    assert isinstance(done.exception, SpalignError)
