"""Public prompt sets by their own columns: made-up rows of every format, and the real files where they are at hand."""

import json
from collections import Counter
from pathlib import Path

import pytest

from spalign.config import PromptsConfig, PromptSource, config_from
from spalign.errors import ConfigError, PromptError
from spalign.prompts import check_disjoint, load_prompts, sha256
from spalign.prompts._public import PUBLIC, named

SHARED = Path(__file__).parents[3] / "shared" / "data"

ROWS = {
    "pku_saferlhf": {"prompt": "P?", "response_0": "a", "is_response_0_safe": False, "safer_response_id": 1},
    "wildguard": {"prompt": "P?", "prompt_harm_label": "harmful", "subcategory": "privacy", "adversarial": True, "response": None},
    "honeset": {"instruction": "P?", "category": "Latest Information with External Services"},
    "jailbreaktrigger": {"prompt": "P?", "label": ["cot"], "source": "ITC"},
    "xstest": {"id": "7", "prompt": "P?", "type": "homonyms", "label": "safe", "focus": "kill"},
    "harmbench": {"BehaviorID": "b_1", "Behavior": "P?", "FunctionalCategory": "standard", "SemanticCategory": "illegal", "Tags": ""},
    "advbench": {"goal": "P?", "harm_categories": "x|y"},
}
EXPECTED = {
    "pku_saferlhf": ("row-00001", "", ""),
    "wildguard": ("row-00001", "privacy", "ill_meant"),
    "honeset": ("row-00001", "Latest Information with External Services", ""),
    "jailbreaktrigger": ("row-00001", "cot, ITC", "ill_meant"),
    "xstest": ("7", "homonyms", "legitimate"),
    "harmbench": ("b_1", "illegal", "ill_meant"),
    "advbench": ("row-00001", "", "ill_meant"),
}


def load(source: Path | str, notes: list[str] | None = None, **options):
    told = notes if notes is not None else []
    return load_prompts(PromptSource(source=str(source), **options), PromptsConfig(), note=told.append)


def write(folder: Path, rows: object, name: str = "p.json") -> Path:
    path = folder / name
    path.write_text(json.dumps(rows))
    return path


@pytest.mark.parametrize("name", PUBLIC)
def test_each_format_by_its_own_columns(tmp_path, name):
    (prompt,) = load(write(tmp_path, [ROWS[name]]), format=name)
    assert prompt.text == "P?"
    assert (prompt.id, prompt.topic, prompt.intent) == EXPECTED[name]


@pytest.mark.parametrize(
    ("name", "column", "values"),
    [
        ("wildguard", "prompt_harm_label", {"harmful": "ill_meant", "unharmful": "legitimate", None: "", "maybe": ""}),
        ("xstest", "label", {"safe": "legitimate", "unsafe": "ill_meant", "Unsafe ": "ill_meant"}),
    ],
)
def test_a_label_that_is_missing_says_nothing_of_the_intent(tmp_path, name, column, values):
    rows = [{**ROWS[name], "id": str(i), "prompt": f"P{i}?", column: value} for i, value in enumerate(values)]
    assert [p.intent for p in load(write(tmp_path, rows), format=name)] == list(values.values())


def test_what_a_harmbench_behaviour_refers_to_goes_before_it(tmp_path):
    row = {**ROWS["harmbench"], "ContextString": "A text."}
    assert load(write(tmp_path, [row]), format="harmbench")[0].text == "A text.\n\n---\n\nP?"
    assert load(write(tmp_path, [{**row, "ContextString": ""}]), format="harmbench")[0].text == "P?"


def test_repeated_prompts_are_left_out_and_told(tmp_path):
    rows = [{"prompt": text} for text in ("How?", "Why?", "how", "How ?", "Why not?")]
    notes: list[str] = []
    found = load(write(tmp_path, rows), notes, format="pku_saferlhf")
    assert [p.id for p in found] == ["row-00001", "row-00002", "row-00005"]
    assert len(notes) == 1
    assert "2 prompts that repeat an earlier one are left out" in notes[0]
    assert len(load(write(tmp_path, rows))) == 5  # a file of one's own is taken as it is


def test_the_wrong_file_for_a_format(tmp_path):
    with pytest.raises(PromptError, match=r"no column 'instruction', which 'honeset' has \(columns: prompt\)\n  fix: check the file"):
        load(write(tmp_path, [{"prompt": "x"}]), format="honeset")
    with pytest.raises(PromptError, match="not a list of objects"):
        load(write(tmp_path, {"prompt": "x"}), format="honeset")
    (tmp_path / "torn.json").write_text('[{"prompt": "x"},\n {"pro')
    with pytest.raises(PromptError, match=r"torn.json:2: not valid JSON"):
        load(tmp_path / "torn.json", format="honeset")
    with pytest.raises(PromptError, match="row 2: not a JSON object"):
        load(write(tmp_path, [{"instruction": "x"}, 3]), format="honeset")


def test_names_of_sets_on_the_hub():
    assert named(PromptSource(source="wildguard")) == PromptSource(
        source="allenai/wildguardmix", subset="wildguardtest", split="test", format="wildguard"
    )
    assert named(PromptSource(source="pku_saferlhf", split="test")).split == "test"
    own = PromptSource(source="my/own", format="xstest")
    assert named(own) == own
    with pytest.raises(PromptError, match=r"'jailbreaktrigger' is not on the hub\n  fix: download its file"):
        load("jailbreaktrigger")
    with pytest.raises(PromptError, match="the source 'wildguard' is no file of format 'xstest'"):
        load("wildguard", format="xstest")
    with pytest.raises(PromptError, match="the public set 'wildguard' says which column"):
        load("wildguard", column="text")
    with pytest.raises(PromptError, match="did you mean 'wildguard'"):
        load("wildgaurd")
    with pytest.raises(PromptError, match=r"allenai/wildguardmix \(split 'test'\): cannot be loaded"):
        load("wildguard")  # the tests reach no hub


def test_a_folder_of_that_name_comes_first(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("wildguard").mkdir()
    assert named(PromptSource(source="wildguard")).source == "wildguard"


def test_the_format_says_which_column():
    with pytest.raises(ConfigError, match="column: the format xstest says which it is"):
        config_from({"name": "x", "prompts": {"heldout": {"source": "a.csv", "format": "xstest", "column": "prompt"}}})


real = pytest.mark.skipif(not SHARED.exists(), reason="the public data are not beside the project (shared/data)")


@real
@pytest.mark.parametrize(
    ("name", "file", "count", "intents"),
    [
        ("xstest", "xstest/xstest_prompts.csv", 450, {"legitimate": 250, "ill_meant": 200}),
        ("harmbench", "harmbench/test.csv", 159, {"ill_meant": 159}),
        ("harmbench", "harmbench/val.csv", 41, {"ill_meant": 41}),
        ("advbench", "advbench/goals.csv", 520, {"ill_meant": 520}),
        ("jailbreaktrigger", "jailbreaktrigger/jailbreak.json", 1400, {"ill_meant": 1400}),
    ],
)
def test_the_real_files(name, file, count, intents):
    found = load(SHARED / file, format=name)
    assert len(found) == count
    assert Counter(p.intent for p in found) == intents
    assert len(sha256(found)) == 64


@real
def test_four_hundred_jailbreaks_are_spread_over_attacks_and_sources():
    found = load(SHARED / "jailbreaktrigger/jailbreak.json", format="jailbreaktrigger", limit=400)
    per_kind = Counter(p.topic for p in found)
    assert len(per_kind) == 28  # 14 attacks, 2 sources
    assert set(per_kind.values()) == {14, 15}


@real
def test_training_on_an_evaluation_set_is_refused():
    held = load(SHARED / "xstest/xstest_prompts.csv", format="xstest")
    with pytest.raises(PromptError, match="the training prompt '1' is the held-out prompt '1'"):
        check_disjoint(held[:3], held)
