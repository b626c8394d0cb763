"""Every experiment that ships, at every scale: its runs are valid configurations; what is wrong in a file is said with the file."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from spalign.config import DATA_ARM, experiment_names, load_experiment
from spalign.errors import ConfigError
from spalign.pipeline.experiment import cell_folder, cost, trained_arms

NAMES = ("figure3", "figure4", "iterations", "rv", "samples", "table1", "table2", "table3", "table4")


def test_all_are_there() -> None:
    assert tuple(experiment_names()) == NAMES


@pytest.mark.parametrize("scale", ["full", "demo"])
@pytest.mark.parametrize("name", NAMES)
def test_every_run_of_it_is_valid(name: str, scale: str) -> None:
    config = load_experiment(name, scale)
    assert set(config.paper) <= set(config.policies) or scale == "demo"
    for policy in config.policies:
        for data in config.data:
            for arm in trained_arms(config):
                run = config.run_of(policy, data, 1, arm, cell_folder(config, policy, data, 1))
                run.constitution_for_run()
                assert run.seed == 1
                assert (run.data_from is None) == (arm == DATA_ARM)
            known = {arm: by for arms in config.paper.values() for arm, by in arms.items()}
            assert set(known) <= set(config.own_arms)
            for by in known.values():
                assert all(len(figures) == len(config.columns) for figures in by.values())


def test_the_data_come_first() -> None:
    assert trained_arms(load_experiment("table3", "demo"))[0] == DATA_ARM
    assert {"primary-only", "secondary-only"} <= set(trained_arms(load_experiment("table3", "demo")))


def test_costs_by_hand() -> None:
    config = load_experiment("figure4", "demo", ("seeds=[0]",))
    found = cost(config)
    # spa and no-denoising train on the same data; 72 prompts x (4 candidates + draft + placebo); 48 prompts answered by three arms
    assert found["trainings"] == 2
    assert found["generated_tokens"] == 72 * 6 * 80 + 3 * 48 * 80
    assert found["judge_questions"] == 3 * 48 * 2 + 80
    assert found["answers"] == 3 * 48


def test_sets_and_mistakes(tmp_path: Path) -> None:
    assert load_experiment("table1", "demo", ("judge.model=openai/gpt-4o",)).judge.model == "openai/gpt-4o"  # type: ignore[union-attr]
    with pytest.raises(ConfigError, match="no experiment 'table9'"):
        load_experiment("table9")
    with pytest.raises(ConfigError, match="no scale 'huge'"):
        load_experiment("table1", "huge")
    data = {"title": "t", "policies": {"p": {"model": "demo"}}, "data": {"d": {}}, "arms": ["vanilla", "nothing"]}
    path = tmp_path / "own.yaml"
    path.write_text(yaml.safe_dump(data))
    with pytest.raises(ConfigError, match="no arm 'nothing'"):
        load_experiment(str(path))
    path.write_text(yaml.safe_dump({**data, "arms": ["vanilla", "spa"], "measure": "rv", "run": {"sample": {"n": 1}}}))
    config = load_experiment(str(path))
    with pytest.raises(ConfigError, match="experiment: p, d, spa"):
        config.run_of("p", "d", 0, "spa", tmp_path)
    path.write_text("extends: own.yaml\n")
    with pytest.raises(ConfigError, match="extends"):
        load_experiment(str(path))


def test_dpo_has_a_beta_of_its_own_and_a_second_iteration_is_each_arms_own() -> None:
    config = load_experiment("table1")
    for policy in config.policies:
        folder = cell_folder(config, policy, "saferlhf", 0)
        assert config.run_of(policy, "saferlhf", 0, "spa-dpo", folder).train.beta == 0.1
        assert config.run_of(policy, "saferlhf", 0, "spa", folder).train.beta == 2.5
    # two policies, three data sets, three seeds: the first iteration once, the second by each of four arms; 5 candidates, draft, placebo
    made = 2 * 3 * 3 * (1 + 4) * 400 * 7 * 512
    answered = 2 * 3 * 3 * 5 * 400 * 512
    assert cost(config)["generated_tokens"] == made + answered


@pytest.mark.parametrize(
    ("sets", "says"),
    [
        (("columns=[primary,HH_7]",), "HH_7"),
        (("bootstrap=50",), "bootstrap"),
        (("own_arms.bad.soup.spa=0", "own_arms.bad.soup.sft=0"), "above 0"),
        (('data.shipped.evaluate={"a:b": {source: x}}',), "evaluate"),
    ],
)
def test_what_would_fail_later_is_said_at_once(sets: tuple[str, ...], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        load_experiment("table1", "demo", sets)
