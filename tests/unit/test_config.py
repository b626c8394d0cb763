"""The configuration: defaults, recipes, `--set`, and every mistake with its place."""

import re
import subprocess
import sys
from pathlib import Path
from typing import Any, get_args

import pytest
import yaml

from spalign.config import RECIPES, RunConfig, Scorer, config_from, load_config, parse_set
from spalign.errors import ConfigError


def written(folder: Path, text: str) -> Path:
    path = folder / "run.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def refused(folder: Path, text: str, *sets: str) -> list[str]:
    """The lines of the error's message, without the path of the file."""
    path = written(folder, text)
    with pytest.raises(ConfigError) as caught:
        load_config(path, sets)
    assert caught.value.hint, "every error says what to do"
    return caught.value.message.replace(str(path), "FILE").splitlines()


def flat(value: Any, at: str = "") -> dict[str, Any]:
    """A nested mapping as {"a.b": value}; an empty mapping is a value."""
    if not isinstance(value, dict) or not value:
        return {at: value}
    return {k: v for key, inner in value.items() for k, v in flat(inner, f"{at}.{key}".strip(".")).items()}


def changed(one: RunConfig, other: RunConfig) -> set[str]:
    a, b = flat(one.model_dump()), flat(other.model_dump())
    return {key for key in a.keys() | b.keys() if a.get(key, ...) != b.get(key, ...)}


RECIPE_OPTIONS = {f"{part}.{key}" for options in RECIPES.values() for part, keys in options.items() for key in keys}


# Defaults and recipes


def test_a_name_is_enough(tmp_path):
    config = load_config(written(tmp_path, "name: first\n"))
    assert config == RunConfig(name="first")
    assert (config.recipe, config.model, config.constitution, config.sample.n) == ("robust", "demo", "harmless_helpful", 4)
    assert (config.prompts.train.source, config.prompts.heldout.source) == ("high_stakes_train", "high_stakes_heldout")
    assert config.folder == Path("runs/first")


def test_a_resolved_config_loads_as_itself(tmp_path):
    for recipe in RECIPES:
        config = config_from({"name": "a", "recipe": recipe, "train": {"lora": {"r": 8}}})
        assert load_config(written(tmp_path, yaml.safe_dump(config.model_dump(mode="json")))) == config


def test_the_paper_recipe_is_the_method_as_published():
    paper = config_from({"name": "a", "recipe": "paper"})
    assert (paper.self_evaluation.scorer, paper.refine.style, paper.refine.drafts) == ("likert", "paper", 1)
    assert (paper.denoise.consistency, paper.denoise.tau_quantile, paper.pairs.delta) == ("strict", 0.32, 1.0)
    assert paper.pairs.max_per_prompt is None
    assert not paper.pairs.balance_length


def test_recipes_differ_only_in_their_options():
    robust, paper = (config_from({"name": "a", "recipe": r}) for r in ("robust", "paper"))
    assert changed(robust, paper) <= RECIPE_OPTIONS | {"recipe"}
    assert robust.with_recipe("paper") == paper
    assert paper.with_recipe("robust") == robust


def test_every_recipe_option_exists():
    assert set(flat(RunConfig(name="a").model_dump())) >= RECIPE_OPTIONS


def test_with_recipe_keeps_everything_else():
    mine = {
        "name": "a",
        "model": "org/model",
        "seed": 7,
        "compare": ["paper"],
        "train": {"beta": 3.0, "lora": {"r": 4}},
        "prompts": {"suffix": "Be brief.", "train": {"source": "x.jsonl", "limit": 5}},
        "denoise": {"ddof": 0, "tau": 0.5},
        "refine": {"placebo": False},
        "self_evaluation": {"thresholds": {"harmlessness": 8}, "scorer": {"harmlessness": "yes_no", "helpfulness": "likert"}},
    }
    robust = config_from(mine)
    paper = robust.with_recipe("paper")
    thresholds = {"self_evaluation.thresholds.harmlessness", "self_evaluation.scorer.harmlessness", "self_evaluation.scorer.helpfulness"}
    assert changed(robust, paper) <= RECIPE_OPTIONS | {"recipe", "compare"} | thresholds
    assert (paper.denoise.tau, paper.denoise.tau_quantile, paper.denoise.ddof) == ("32%", 0.32, 0)
    assert changed(robust, paper.with_recipe("robust")) <= {"compare", "denoise.tau"} | thresholds | RECIPE_OPTIONS
    assert paper.with_recipe("robust").with_recipe("paper") == paper


def test_an_option_of_the_user_beats_the_recipe(tmp_path):
    text = "name: a\nrecipe: paper\npairs: {delta: 0.25}\n"
    config = load_config(written(tmp_path, text), ("refine.drafts=3",))
    assert (config.pairs.delta, config.refine.drafts, config.refine.style) == (0.25, 3, "paper")
    assert changed(config_from({"name": "a", "recipe": "paper"}), config) == {"pairs.delta", "refine.drafts"}


@pytest.mark.parametrize("option", sorted(RECIPE_OPTIONS - {"self_evaluation.thresholds"}))
def test_an_ablation_is_one_set(option):
    part, key = option.split(".")
    paper = RECIPES["paper"][part][key]
    config = config_from({"name": "a"}, (f"{option}={yaml.safe_dump(paper).removesuffix('...' + chr(10)).strip()}",))
    assert changed(RunConfig(name="a"), config) == {option}


@pytest.mark.parametrize(
    ("tau", "constant", "quantile"), [("0.5", 0.5, None), ("32%", "32%", 0.32), ("100%", "100%", 1.0), ("null", None, None)]
)
def test_tau_is_a_constant_a_quantile_or_absent(tau, constant, quantile):
    denoise = config_from({"name": "a", "recipe": "paper"}, (f"denoise.tau={tau}",)).denoise
    assert (denoise.tau, denoise.tau_quantile) == (constant, quantile)


@pytest.mark.parametrize("tau", ["0", "-1", "101%", "100.9%", "32 %", "x", ".inf"])
def test_other_taus_are_refused(tau):
    with pytest.raises(ConfigError, match=r"denoise\.tau"):
        config_from({"name": "a"}, (f"denoise.tau={tau}",))


# --set


@pytest.mark.parametrize(
    ("text", "keys", "value"),
    [
        ("seed=3", ["seed"], 3),
        ("train.lora.r=8", ["train", "lora", "r"], 8),
        ("pairs.max_per_prompt=null", ["pairs", "max_per_prompt"], None),
        ("pairs.max_per_prompt=", ["pairs", "max_per_prompt"], None),
        ("compare=[paper, robust]", ["compare"], ["paper", "robust"]),
        ("prompts.suffix=a=b", ["prompts", "suffix"], "a=b"),
        ("self_evaluation.scorer={harmlessness: likert}", ["self_evaluation", "scorer"], {"harmlessness": "likert"}),
    ],
)
def test_parse_set(text, keys, value):
    assert parse_set(text) == (keys, value)


@pytest.mark.parametrize("text", ["seed", "=3", "train.=3", ".train=3", "a..b=3", "seed=[1", "seed=2024-13-45", "seed=" + "[" * 5000])
def test_a_set_that_cannot_be_read(text):
    with pytest.raises(ConfigError) as caught:
        parse_set(text)
    assert caught.value.message.startswith("--set '")
    assert caught.value.hint


def test_sets_are_laid_on_the_file_in_order(tmp_path):
    path = written(tmp_path, "name: a\ntrain:\n  beta: 3\n  gamma: 2\n  lora: {r: 4}\n")
    sets = (
        "train.beta=4",
        "train.learning_rate=1e-5",
        "train.beta=5",
        "train.lora.alpha=8",
        "pairs.max_per_prompt=null",
        "prompts.train.limit=9",
    )
    config = load_config(path, sets)
    assert (config.train.beta, config.train.gamma, config.train.learning_rate) == (5.0, 2.0, 1e-5)
    assert config.train.lora is not None
    assert (config.train.lora.r, config.train.lora.alpha) == (4, 8)
    assert (config.pairs.max_per_prompt, config.prompts.train.limit) == (None, 9)
    assert config.prompts.train.source == "high_stakes_train", "a part of a source keeps the rest of the default"
    assert load_config(path, ("train.lora=null",)).train.lora is None
    assert load_config(path, ("recipe=paper",)).refine.style == "paper"


def test_a_wrong_set_points_at_the_flag(tmp_path):
    lines = refused(
        tmp_path,
        "name: a\ntrain:\n  beta: 3\n  gamma: -1\n",
        "train.beta=-2",
        "train.xyzzy=1",
        "prompts.train={sauce: x}",
        "train.base_dtype=nf4",
    )
    assert set(lines[1:]) == {
        "--set train.beta=-2: train.beta: Input should be greater than 0",
        "FILE:4: train.gamma: Input should be greater than or equal to 0",
        "--set train.xyzzy=1: unknown key 'train.xyzzy'; known here: " + ", ".join(type(RunConfig(name="a").train).model_fields),
        "--set prompts.train={sauce: x}: unknown key 'prompts.train.sauce'; did you mean 'source'?",
        "--set train.base_dtype=nf4: unknown key 'train.base_dtype'; did you mean 'train.lora.base_dtype'?",  # one level too high
    }


# Mistakes


def test_all_mistakes_at_once_each_with_its_line(tmp_path):
    text = "name: a b\nsede: 3\nsample:\n  n: 1\n  top_p: 1.5\ntrain:\n  beta: .inf\n  loar: {r: 8}\nself_evaluation:\n  scorer: guess\n"
    lines = refused(tmp_path, text)
    assert "FILE:2: unknown key 'sede'; did you mean 'seed'?" in lines
    assert "FILE:8: unknown key 'train.loar'; did you mean 'lora'?" in lines
    for start in ("FILE:1: name: ", "FILE:4: sample.n: ", "FILE:5: sample.top_p: ", "FILE:7: train.beta: Input should be a finite number"):
        assert any(line.startswith(start) for line in lines), start
    (scorer,) = [line for line in lines if line.startswith("FILE:10: self_evaluation.scorer: Input should be '")]
    assert re.findall("'(.*?)'", scorer) == list(get_args(Scorer))


def test_a_missing_name(tmp_path):
    assert refused(tmp_path, "seed: 3\n") == ["FILE:1: 'name' is missing"]


@pytest.mark.parametrize("name", ["", "../a", "a/b", ".hidden", "-x", "a\n", "naïve"])
def test_a_name_is_a_plain_folder_name(name):
    with pytest.raises(ConfigError, match="name: String should match pattern"):
        config_from({"name": name})


@pytest.mark.parametrize("recipe", ["papr", ["paper"], None, 3])
def test_an_unknown_recipe(recipe):
    with pytest.raises(ConfigError, match="recipe: Input should be 'robust' or 'paper'"):
        config_from({"name": "a", "recipe": recipe})


def test_a_file_that_is_not_there(tmp_path):
    with pytest.raises(ConfigError, match="no such file"):
        load_config(tmp_path / "none.yaml")


# The constitution under this run


def test_thresholds_of_the_run_override_the_constitution(tmp_path):
    config = config_from({"name": "a", "self_evaluation": {"thresholds": {"harmlessness": 8.5}}})
    assert [o.threshold for o in config.constitution_for_run().objectives] == [8.5, None]
    shipped = Path("src/spalign/constitutions/harmless_helpful.yaml")
    own = tmp_path / "own.yaml"
    text = (Path(__file__).parents[2] / shipped).read_text(encoding="utf-8")
    own.write_text(text.replace("  - name: helpfulness\n", "  - name: helpfulness\n    threshold: 6\n"), encoding="utf-8")
    objectives = {
        recipe: config_from({"name": "a", "recipe": recipe, "constitution": str(own)}).constitution_for_run() for recipe in RECIPES
    }
    assert [o.threshold for o in objectives["robust"].objectives] == ["auto", 6.0]
    assert [o.threshold for o in objectives["paper"].objectives] == [None, None], "the published method has no thresholds"


def test_a_threshold_of_the_run_may_be_automatic():
    config = config_from({"name": "a", "self_evaluation": {"thresholds": {"helpfulness": "auto"}}})
    assert [o.threshold for o in config.constitution_for_run().objectives] == ["auto", "auto"]


@pytest.mark.parametrize("wrong", [0, 10.5, "Auto", None])
def test_a_threshold_is_on_the_scale_or_automatic(wrong):
    with pytest.raises(ConfigError, match=r"self_evaluation\.thresholds\.helpfulness"):
        config_from({"name": "a", "self_evaluation": {"thresholds": {"helpfulness": wrong}}})


def test_the_judge_is_the_policy_and_chosen_by_a_check_unless_the_run_says_otherwise():
    own = config_from({"name": "a"}).self_evaluation
    assert (own.scorer, own.judge, own.judge_file, own.labelled, own.bad_recall, own.allow_weak_judge) == (
        "auto",
        None,
        None,
        None,
        None,
        False,
    )


@pytest.mark.parametrize("scorer", get_args(Scorer))
def test_every_scorer_can_be_named_for_all_objectives_or_for_one(scorer):
    no_thresholds = "self_evaluation.use_constitution_thresholds=false"  # a comparing scorer has none
    for_all = config_from({"name": "a"}, (f"self_evaluation.scorer={scorer}", no_thresholds))
    for_one = config_from({"name": "a"}, (f"self_evaluation.scorer={{harmlessness: {scorer}, helpfulness: likert}}", no_thresholds))
    for config in (for_all, for_one):
        assert config.constitution_for_run().objective_names == ("harmlessness", "helpfulness")
    assert [for_all.self_evaluation.scorer_of(o) for o in ("harmlessness", "helpfulness")] == [scorer, scorer]
    assert [for_one.self_evaluation.scorer_of(o) for o in ("harmlessness", "helpfulness")] == [scorer, "likert"]


@pytest.mark.parametrize("threshold", [7, "auto"])
def test_a_scorer_that_only_compares_has_no_threshold(threshold):
    own = {"scorer": {"harmlessness": "pairwise", "helpfulness": "likert"}, "thresholds": {"harmlessness": threshold}}
    with pytest.raises(ConfigError, match="objective 'harmlessness' has a threshold, and its scorer 'pairwise' only compares") as caught:
        config_from({"name": "a", "self_evaluation": own}).constitution_for_run()
    assert caught.value.hint


@pytest.mark.parametrize("share", [0, 1, -0.1, 1.5])
def test_the_share_of_bad_answers_below_a_threshold_is_a_share(share):
    assert config_from({"name": "a"}, ("self_evaluation.bad_recall=0.9",)).self_evaluation.bad_recall == 0.9
    with pytest.raises(ConfigError, match=r"self_evaluation\.bad_recall"):
        config_from({"name": "a"}, (f"self_evaluation.bad_recall={share}",))


@pytest.mark.parametrize(
    ("own", "says"),
    [
        ({"thresholds": {"harmlesness": 7}}, "unknown objective 'harmlesness'"),
        ({"scorer": {"kindness": "likert", "harmlessness": "likert", "helpfulness": "likert"}}, "unknown objective 'kindness'"),
        ({"scorer": {"harmlessness": "likert"}}, "says nothing about objective 'helpfulness'"),
    ],
)
def test_an_unknown_objective(own, says):
    with pytest.raises(ConfigError, match=says) as caught:
        config_from({"name": "a", "self_evaluation": own}).constitution_for_run()
    assert caught.value.hint


def test_yes_no_needs_exemplars(tmp_path):
    fields = "principle: p, question: q, good_answer: yes, good_system: g, bad_system: b"
    path = written(tmp_path, f"name: bare\nrefine_instruction: x\nobjectives: [{{name: kind, {fields}}}]\n")
    with pytest.raises(ConfigError, match="'kind' has no exemplars") as caught:
        config_from({"name": "a", "constitution": str(path)}, ("self_evaluation.scorer=yes_no",)).constitution_for_run()
    assert "auto" in caught.value.hint
    for scorer in ("auto", "likert", "yes_no_zero"):
        config = config_from({"name": "a", "constitution": str(path)}, (f"self_evaluation.scorer={scorer}",))
        assert config.constitution_for_run().objective_names == ("kind",)


def test_importing_the_config_imports_nothing_heavy():
    code = "import sys, spalign.config; print(sorted({'torch', 'transformers', 'numpy', 'datasets', 'pyarrow', 'peft'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, check=True, timeout=600)
    assert done.stdout.strip() == "[]"


def test_forward_passes_divide_a_step():
    with pytest.raises(ConfigError, match="must divide"):
        config_from({"name": "a", "train": {"prompts_per_step": 8, "prompts_per_forward": 3}})
