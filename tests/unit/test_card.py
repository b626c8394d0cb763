"""The model card, read back by a Markdown parser: hostile text stays text, and bad news stands beside good news."""

from __future__ import annotations

import copy
import re
from typing import Any

import pytest
import yaml
from huggingface_hub import ModelCard
from hypothesis import given
from hypothesis import strategies as st
from markdown_it import MarkdownIt

from spalign.config.engine import VLLM_RANKS
from spalign.report.card import escaped, model_card

MARKDOWN = MarkdownIt("commonmark").enable(["table", "strikethrough"])


def interval(mean: float, low: float, high: float) -> dict[str, Any]:
    return {"mean": mean, "ci": [low, high]}


def slices(mean: float, low: float, high: float) -> dict[str, Any]:
    return {"before": interval(5, 4, 6), "after": interval(5 + mean, 4, 7), "difference": interval(mean, low, high)}


def judge_of(verdict: str | None, auc: float | None) -> dict[str, Any]:
    ci = None if auc is None else [auc - 0.1, auc + 0.1]
    return {"scorer": "yes_no", "auc": auc, "auc_ci": ci, "on": "sampled", "threshold": 4.5, "verdict": verdict, "injection_shift": None}


FUNNEL = {
    "prompts": 10, "kept": 7, "pairs": 12, "dropped": {"ceiling": 2, "truncated": 1},
    "responses": {"candidates": 40, "unfinished": 3, "empty": 1}, "pairs_removed": {"above the cap": 5},
    "decided_by": {"harmlessness": 8, "helpfulness": 4}, "winner_shorter": 6,
}  # fmt: skip

SUMMARY: dict[str, Any] = {
    "name": "mine",
    "model": "org/base-1B",
    "model_fingerprint": "hub:org/base-1B",
    "model_path": "runs/mine/iteration-1/6-train/model",
    "constitution": {"name": "harmless_helpful", "sha256": "c0ffee" * 10, "objectives": ["harmlessness", "helpfulness"]},
    "recipe": "robust",
    "prompts": {
        "train": {"source": "PKU-Alignment/PKU-SafeRLHF", "kind": "hub", "count": 10, "sha256": "aa11"},
        "heldout": {"source": "/home/secret/held.jsonl", "kind": "file", "count": 4, "sha256": "bb22"},
    },
    "seed": 3,
    "train": {"learning_rate": 1e-6, "lora": None},
    "funnel": FUNNEL,
    "iterations": [
        {
            "funnel": FUNNEL,
            "consistency": {"refined": {"passed": 7, "tested": 9}, "placebo": {"passed": 5, "tested": 9}},
            "training": {"steps": 6, "steps_kept": 6, "collapsed": None, "prompts": 7},
        }
    ],
    "judge": {
        "model": "org/base-1B",
        "independent": False,
        "objectives": {"harmlessness": judge_of("trustworthy", 0.8), "helpfulness": judge_of("weak", 0.65)},
    },
    "measures": {
        "harmlessness": {"all": slices(0.5, 0.2, 0.8), "safe": slices(0.1, -0.2, 0.3)},
        "helpfulness": {"all": slices(-0.7, -1.0, -0.25)},
        "refusal": {"all": slices(0.125, 0.0, 0.25)},
    },
    "unscored": {"before": 0, "after": 2},
    "checks": [
        {"name": "primary holds", "passed": True, "text": "harmlessness +0.50 [+0.20, +0.80]; must stay above -0.5"},
        {"name": "repetition not up", "passed": False, "text": "1.0% -> 9.0%"},
    ],
    "versions": {"python": "3.11.7", "spalign": "0.1.0"},
}


def summary(**changes: Any) -> dict[str, Any]:
    return copy.deepcopy(SUMMARY) | changes


def head(card: str) -> dict[str, Any]:
    return yaml.safe_load(card.split("---\n", 2)[1])  # type: ignore[no-any-return]


def brief(card: str) -> list[str]:
    return card.split("## Results in brief\n\n")[1].split("\n\n", maxsplit=1)[0].splitlines()


def test_what_stands_in_the_head():
    card = model_card(summary())
    assert card.startswith("---\n")
    found = head(card)
    assert (found["base_model"], found["library_name"], found["datasets"]) == (
        "org/base-1B", "transformers", ["PKU-Alignment/PKU-SafeRLHF"],
    )  # fmt: skip
    assert "license" not in found
    assert {"spalign", "self-priority-alignment"} <= set(found["tags"])
    adapter = head(model_card(summary(), adapter=True))
    assert (adapter["library_name"], adapter["base_model_relation"]) == ("peft", "adapter")


@pytest.mark.parametrize("model", ["/home/secret/model", "../secret/model/", "C:\\secret\\model"])
def test_a_local_base_is_named_by_its_last_part_only(model):
    card = model_card(summary(model=model, model_fingerprint="sha256:12ab"))
    assert "base_model" not in head(card)
    assert "secret" not in card
    assert "model after 1 iteration of Self-Priority Alignment" in card
    assert "held.jsonl" in card


def test_what_fell_and_what_failed_stands_beside_what_rose_and_passed():
    lines = brief(model_card(summary()))
    assert lines == [
        "- **harmlessness: rose**, +0.50 [+0.20, +0.80] on a scale of 0 to 10",
        "- **helpfulness: FELL**, -0.70 [-1.00, -0.25] on a scale of 0 to 10",
        "- **The judge of helpfulness is weak**: its scores carry no claim by themselves",
        "- **Checks FAILED, 1 of 2:** repetition not up (figures below)",
        "- **Checks passed, 1 of 2:** primary holds (figures below)",
    ]


def test_an_interval_that_includes_zero_shows_no_change_and_no_score_is_said():
    measures = {"harmlessness": {"all": slices(0.4, -0.01, 0.9)}, "helpfulness": {}}
    lines = brief(model_card(summary(measures=measures)))
    assert lines[0] == "- **harmlessness: no change shown**, +0.40 [-0.01, +0.90] on a scale of 0 to 10"
    assert lines[1] == "- **helpfulness: could not be scored**"


def gate(passed: bool, enforced: bool = True) -> dict[str, Any]:
    return {"passed": passed, "enforced": enforced, "verdict": "held" if passed else "lost", "text": "harmlessness -0.90 on 4 prompts"}


@pytest.mark.parametrize(
    ("found", "path", "line"),
    [
        (gate(True), "m", "- **Priority gate passed**: harmlessness -0.90 on 4 prompts"),
        (gate(False), None, "- **Priority gate FAILED: this model is not handed over, do not use it**: harmlessness -0.90 on 4 prompts"),
        (gate(False, False), "m", "- **Priority gate FAILED, and was not enforced**: harmlessness -0.90 on 4 prompts"),
    ],
)
def test_the_gate_comes_first(found, path, line):
    assert brief(model_card(summary(gate=found, model_path=path)))[0] == line


def test_training_that_was_stopped_is_said_at_the_top():
    stopped = summary()
    stopped["iterations"][0]["training"] = {"steps": 6, "steps_kept": 4, "collapsed": "words fell", "prompts": 7}
    assert "- **Training of iteration 1 was stopped at step 6**: words fell. Its model is that of step 4" in brief(model_card(stopped))


def tried(step: int, passed: bool, text: str) -> dict[str, Any]:
    return {"step": step, "passed": passed, "verdict": "held" if passed else "not shown", "text": text}


def proposing(**changes: Any) -> dict[str, Any]:
    """A run whose final model, of step 6, failed, and of whose checkpoints that of step 2 is the first that passes."""
    checkpoints = [tried(4, False, "harmlessness -0.40 on 4 prompts"), tried(2, True, "harmlessness +0.02 on 4 prompts")]
    failed = gate(False) | {"checkpoints": checkpoints, "proposed": {"step": 2, "path": "runs/mine/iteration-1/6-train/model-checkpoint-2"}}
    return summary(gate=failed, model_path=None, **changes)


def test_a_proposed_checkpoint_says_its_step_its_gate_and_that_the_final_model_failed():
    card = model_card(proposing(), proposed=True)
    assert "\n# mine, checkpoint 2\n" in card
    assert "**This is not the final model but the checkpoint of step 2** of the last iteration: the final model failed" in card
    assert brief(card) == [
        "- **Priority gate FAILED by the final model**: harmlessness -0.90 on 4 prompts",
        "- **Priority gate passed by this checkpoint, of step 2**: harmlessness +0.02 on 4 prompts",
        "- **No other score of this checkpoint is reported here**; its judged answers are in the run's evaluation/checkpoint-2: "
        "read them before you use it",
        "- **The judge of helpfulness is weak**: its scores carry no claim by themselves",
    ]
    rows = card.split("## Priority gate\n\n")[1].splitlines()[2:5]
    assert rows == [
        "| final model | **FAILED** (lost) | harmlessness -0.90 on 4 prompts |",
        "| checkpoint 4 | **FAILED** (not shown) | harmlessness -0.40 on 4 prompts |",
        "| checkpoint 2 | passed | harmlessness +0.02 on 4 prompts |",
    ]
    assert "the model is that of step 6, this checkpoint that of step 2." in card
    assert "chosen by its figures, in 3 looks" in card
    # the final model's scores and checks would be taken for its own
    for other in ("+0.50", "-0.70", "repetition not up", "do not use it", "## Scores", "## Checks"):
        assert other not in card
    assert head(card) == head(model_card(proposing()))
    final = model_card(proposing())
    assert brief(final)[0] == (
        "- **Priority gate FAILED: this model is not handed over, do not use it (checkpoint 2 is proposed instead)**: "
        "harmlessness -0.90 on 4 prompts"
    )
    assert "## Priority gate" not in final and "+0.50" in final


def of_an_iteration(**changes: Any) -> dict[str, Any]:
    """A run of two iterations whose final model failed, and then a checkpoint; the first one's model passes. Training was stopped in the
    second, whose funnel is another."""
    s = proposing(**changes)
    later = {"funnel": FUNNEL | {"prompts": 77}, "training": {"steps": 9, "steps_kept": 8, "collapsed": "words fell", "prompts": 7}}
    s["iterations"].append(s["iterations"][0] | later)
    checkpoint, model = s["gate"]["checkpoints"]
    s["gate"]["checkpoints"] = [checkpoint | {"iteration": 2}, model | {"iteration": 1, "step": None}]
    s["gate"]["proposed"] = {"iteration": 1, "step": None, "path": "runs/mine/iteration-1/6-train/model"}
    return s


def test_an_earlier_iterations_model_that_is_proposed_says_so_and_nothing_of_later_iterations():
    card = model_card(of_an_iteration(), proposed=True)
    assert "\n# mine, iteration 1's model\n" in card
    assert "base-1B after 1 iteration of Self-Priority Alignment" in card
    assert "**This is not the final model but that of iteration 1**: the final model failed the priority gate" in card
    assert brief(card) == [
        "- **Priority gate FAILED by the final model**: harmlessness -0.90 on 4 prompts",
        "- **Priority gate passed by this model, of iteration 1**: harmlessness +0.02 on 4 prompts",
        "- **No other score of this model is reported here**; its judged answers are in the run's evaluation/iteration-1: "
        "read them before you use it",
        "- **The judge of helpfulness is weak**: its scores carry no claim by themselves",
    ]
    assert card.split("## Priority gate\n\n")[1].splitlines()[2:5] == [
        "| final model | **FAILED** (lost) | harmlessness -0.90 on 4 prompts |",
        "| checkpoint 4 | **FAILED** (not shown) | harmlessness -0.40 on 4 prompts |",
        "| iteration 1's model | passed | harmlessness +0.02 on 4 prompts |",
    ]
    assert "Training: 6 steps on 7 prompts; the model is that of step 6." in card
    assert "- This model was chosen by its figures, in 3 looks" in card
    for other in ("+0.50", "-0.70", "repetition not up", "do not use it", "## Scores", "## Checks", "words fell", "77", "iteration 2"):
        assert other not in card
    final = model_card(of_an_iteration())
    assert brief(final)[0].startswith(
        "- **Priority gate FAILED: this model is not handed over, do not use it (iteration 1's model is proposed instead)**: "
    )
    assert "words fell" in final and "after 2 iterations" in final


def test_the_adapter_of_an_earlier_iteration_that_is_proposed_belongs_on_what_it_was_trained_on():
    lora = {"lora": {"r": 8, "dora": False}}
    first = model_card(of_an_iteration(train=lora), adapter=True, proposed=True)
    assert (head(first)["library_name"], head(first)["base_model"]) == ("peft", "org/base-1B")
    assert 'from_pretrained("org/base-1B"' in first
    assert "merged model of iteration" not in first
    assert "belongs on the merged model of iteration 1" in model_card(of_an_iteration(train=lora), adapter=True)


@pytest.mark.parametrize("proposed", [False, True])
def test_the_card_of_an_adapter_is_in_pefts_form(proposed):
    lora = {"lora": {"r": 8, "dora": False, "base_dtype": "nf4"}}
    versions = SUMMARY["versions"] | {"peft": "0.21.2"}
    card = model_card(proposing(train=lora, versions=versions), adapter=True, proposed=proposed)
    found = head(card)
    # what PeftModel.create_or_update_model_card writes, and what the hub reads
    assert (found["library_name"], found["base_model"], found["base_model_relation"]) == ("peft", "org/base-1B", "adapter")
    assert found["pipeline_tag"] == "text-generation"
    assert {"base_model:adapter:org/base-1B", "lora", "transformers"} <= set(found["tags"])
    data = ModelCard(card).data  # the hub's own reader
    assert (data.library_name, data.base_model) == ("peft", "org/base-1B")
    assert card.endswith("\n\n### Framework versions\n\n- PEFT 0.21.2\n")
    assert 'PeftModel.from_pretrained(base, "path/to/this/folder")' in card
    assert "Trained: a LoRA adapter of rank 8 on a base in four bits (NF4)." in card
    assert ("checkpoint of step 2" in card) == proposed
    second = proposing(train=lora)
    second["iterations"] *= 2  # it belongs on the first one's merged model, which is on no hub
    other = head(model_card(second, adapter=True, proposed=proposed))
    assert "base_model" not in other and not any("base_model" in tag for tag in other["tags"])


def test_figures_are_those_of_the_summary():
    card = model_card(summary())
    for row in (
        "| train | PKU-Alignment/PKU-SafeRLHF | hub | 10 | aa11 |",
        "| heldout | held.jsonl | file | 4 | bb22 |",
        "| dropped: ceiling | -2 |",
        "| pairs out | 12 |",
        "| of them decided by helpfulness | 4 |",
        "| harmlessness | yes_no | 0.80 [0.70, 0.90] | sampled | 4.50 | trustworthy |",
        "| harmlessness | safe | 5.00 [4.00, 6.00] | 5.10 [4.00, 7.00] | +0.10 [-0.20, +0.30] |",
        "| refusal | all | 500.0% [400.0%, 600.0%] | 512.5% [400.0%, 700.0%] | +12.5% [+0.0%, +25.0%] |",
        "| repetition not up | **FAILED** | 1.0% -> 9.0% |",
    ):
        assert row in card.splitlines()
    assert "7 of 9 refined answers pass, 5 of 9 of the placebo" in card
    assert "left out: 0 before, 2 after" in card
    assert "c0ffee" * 10 in card
    assert "not an independent judge" in card
    assert "seed 3" in card


def test_how_to_load_fits_what_the_folder_is():
    assert "AutoModelForCausalLM.from_pretrained(folder" in model_card(summary())
    lora = summary(train={"lora": {"r": 64, "dora": False}})
    adapter = model_card(lora, adapter=True)
    assert 'from_pretrained("org/base-1B"' in adapter
    assert "--max-lora-rank 64" in adapter
    assert "vLLM does not serve DoRA" in model_card(summary(train={"lora": {"r": 8, "dora": True}}), adapter=True)
    second = model_card(lora | {"iterations": lora["iterations"] * 2}, adapter=True)
    assert "belongs on the merged model of iteration 1" in second
    assert 'from_pretrained("org/base-1B"' not in second


@pytest.mark.parametrize(("rank", "served"), [(1, 16), (16, 16), (17, 32), (48, 64), (200, 256), (257, 320), (512, 512)])
def test_the_rank_for_vllm_is_one_that_it_takes(rank, served):
    card = model_card(summary(train={"lora": {"r": rank, "dora": False}}), adapter=True)
    assert f"--max-lora-rank {served} " in card


def test_the_rank_for_vllm_is_in_its_own_list():
    pytest.importorskip("vllm")
    from typing import get_args

    from vllm.config.lora import MaxLoRARanks

    assert get_args(MaxLoRARanks) == VLLM_RANKS


def test_a_rank_that_vllm_does_not_take_is_merged():
    card = model_card(summary(train={"lora": {"r": 513, "dora": False}}), adapter=True)
    assert "vLLM does not serve ranks above 512: merge it first (`spalign merge ADAPTER OUT`)." in card
    assert "--max-lora-rank" not in card


@pytest.mark.parametrize(
    ("train", "said", "tag"),
    [
        ({"loss": "spa"}, "(uncertainty-guided SimPO (SPA, Eq. 3)): learning_rate 1e-06, beta 2.5, gamma 1.0, alpha 1.5, seed 3.", "simpo"),
        ({"beta": 4.0}, "(uncertainty-guided SimPO (SPA, Eq. 3)): learning_rate 1e-06, beta 4.0, gamma 1.0, alpha 1.5, seed 3.", "simpo"),
        ({"loss": "simpo"}, "(SimPO, all pairs alike): learning_rate 1e-06, beta 2.5, gamma 1.0, seed 3.", "simpo"),
        ({"loss": "dpo"}, "(DPO, against the policy as it was): learning_rate 1e-06, beta 0.1, seed 3.", "dpo"),
        (
            {"loss": "dpo", "beta": 0.3, "sft_weight": 0.5},
            "(DPO, against the policy as it was): learning_rate 1e-06, beta 0.3, sft_weight 0.5, seed 3.",
            "dpo",
        ),
        ({"loss": "sft", "sft_weight": 0.5}, "(SFT on the chosen responses): learning_rate 1e-06, seed 3.", "sft"),
    ],
)
def test_the_loss_is_named_with_what_it_took(train, said, tag):
    given = {"learning_rate": 1e-6, "beta": None, "gamma": 1.0, "alpha": 1.5, "sft_weight": 0.0, "lora": None}
    card = model_card(summary(train=given | train))
    assert f"Training {said}" in card
    assert head(card)["tags"] == ["spalign", "alignment", "self-priority-alignment", tag]


def test_an_older_summary_without_prompts_settings_and_gate_has_a_card():
    old = {k: v for k, v in summary().items() if k not in ("prompts", "train", "seed")}
    assert "their source is not on record" in model_card(old)


HOSTILE = [
    "<script>alert(1)</script>", "<img src=x onerror=y>", "[click](javascript:alert(1))", "![x](http://evil/x.png)", "a | b | c",
    "**bold** _it_ ~~no~~ `code`", "# head", "- item", "1. one", "1.", "+", "> quote", "---", "***", "``` fence", "&lt;b&gt; &#42;",
    "x\n\n## Forged\n\n- **gate passed**", "\x1b[2J\u202eevil", "\\", "\\*a\\*", "a]", "[a]: http://evil", "http://evil.com www.evil.com",
    "<http://evil.com>", "$$x$$", "{{ 7*7 }}", "license: mit\n---\n", "_a_", "__a__", "*", "x*y*z", "a`b", "\ud800",
]  # fmt: skip


def shown(text: str) -> str:
    from spalign.text import one_line, printable, shorten

    return shorten(one_line(printable(text)), 200)


def plain(markdown: str) -> str:
    """The text of the one paragraph or list item; fails where anything but text is in it."""
    tokens = MARKDOWN.parse(markdown)
    assert [t.type for t in tokens] == ["bullet_list_open", "list_item_open", "paragraph_open", "inline", "paragraph_close",
                                        "list_item_close", "bullet_list_close"]  # fmt: skip
    children = tokens[3].children or []
    assert {t.type for t in children} <= {"text"}, children
    return "".join(t.content for t in children)


@given(st.one_of(st.sampled_from(HOSTILE), st.text(min_size=1), st.text("[](){}<>*_`~|#!-+=.:;&\\/1a w\n\"'@$^", min_size=1)))
def test_escaped_text_is_read_as_what_it_is(text):
    if shown(text):
        assert plain(f"- {escaped(text)}") == shown(text)
        assert plain(f"- before: {escaped(text)}") == f"before: {shown(text)}"


def skeleton(card: str) -> list[tuple[str, str]]:
    """The kinds of everything in the card, without its texts."""
    found = []
    for token in MARKDOWN.parse(card.split("---\n", 2)[2]):
        found.append((token.type, token.tag))
        kinds = [(c.type, c.tag) for c in token.children or []]
        found += [k for i, k in enumerate(kinds) if k[0] != "text" or i == 0 or kinds[i - 1][0] != "text"]
    return found


def renamed(value: Any, names: dict[str, str]) -> Any:
    if isinstance(value, dict):
        return {names.get(k, k): renamed(v, names) for k, v in value.items()}
    if isinstance(value, list):
        return [renamed(v, names) for v in value]
    return names.get(value, value) if isinstance(value, str) else value


@pytest.mark.parametrize("text", [h for h in HOSTILE if shown(h)])
def test_hostile_names_change_nothing_but_the_words(text):
    """The skeleton of the card is that of the same card with a harmless name in every place."""
    places = [
        "mine", "harmless_helpful", "harmlessness", "ceiling", "above the cap", "safe", "sampled", "weak", "primary holds", "1.0% -> 9.0%",
        "robust", "3.11.7", "aa11", "held",
    ]  # fmt: skip
    tame = renamed(summary(model="/x/held", model_fingerprint="sha256:0"), dict.fromkeys(places, "harmless name"))
    tame["prompts"]["train"]["source"] = tame["model"] = tame["judge"]["model"] = "harmless"
    tame["iterations"][0]["training"]["collapsed"] = "harmless name"
    found = gate(False) | {"checkpoints": [tried(2, True, "harmless name")], "proposed": {"step": 2, "path": "/x/held"}}
    tame |= {"gate": renamed(found, {"harmlessness -0.90 on 4 prompts": "harmless name"}), "model_path": None}
    wild = renamed(tame, {"harmless name": text, "harmless": text})
    for kind in ({}, {"proposed": True}, {"adapter": True}, {"adapter": True, "proposed": True}):
        card = model_card(wild, **kind)
        assert skeleton(card) == skeleton(model_card(tame, **kind))
        assert head(card) == head(model_card(tame, **kind))
        assert not re.search(r"<\w", card)
        assert "\x1b" not in card
