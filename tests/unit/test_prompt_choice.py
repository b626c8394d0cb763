"""Which prompts a limit keeps, which two sets may be used together, and what a set is recognised by."""

import hashlib
import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from spalign.config import PromptsConfig, PromptSource
from spalign.errors import PromptError
from spalign.prompts import check_disjoint, load_prompts, sha256, shipped_sets
from spalign.types import Message, Prompt


def load(source: Path | str, limit: int) -> list[Prompt]:
    return load_prompts(PromptSource(source=str(source), limit=limit), PromptsConfig())


def jsonl(folder: Path, *rows: object) -> Path:
    path = folder / "p.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def user(text: str, id: str = "a", **labels: str) -> Prompt:
    return Prompt(id, (Message("user", text),), **labels)


def test_limit_spreads_evenly_over_intent_and_topic(tmp_path):
    rows = [
        {"id": f"{intent}{topic}{n}", "prompt": "x", "intent": intent, "topic": topic}
        for n in range(2)
        for topic in "uv"
        for intent in "ab"
    ]
    # sorted by (intent, topic): au0 au1 av0 av1 bu0 bu1 bv0 bv1; floor((i + 0.5) * 8 / 4) = 1, 3, 5, 7; n = 1 of each, in file order
    assert [p.id for p in load(jsonl(tmp_path, *rows), limit=4)] == ["au1", "bu1", "av1", "bv1"]
    # floor((i + 0.5) * 8 / 3) = 1, 4, 6
    assert [p.id for p in load(jsonl(tmp_path, *rows), limit=3)] == ["bu0", "bv0", "au1"]
    assert [p.id for p in load(jsonl(tmp_path, *rows), limit=8)] == [r["id"] for r in rows]


def test_limit_above_the_number_there_are(tmp_path):
    with pytest.raises(PromptError) as caught:
        load(jsonl(tmp_path, {"prompt": "a"}, {"prompt": "b"}), limit=3)
    assert "limit 3 is more than the 2 prompts there are" in caught.value.message
    assert "limit to 2 or less" in caught.value.hint


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 80))
def test_limit_of_a_shipped_set_keeps_the_shares(limit):
    kept = load("high_stakes_train", limit=4 * limit)
    assert len({p.id for p in kept}) == 4 * limit
    counts = [sum(p.intent == intent for p in kept) for intent in ("benign", "ill_meant", "legitimate")]
    # 80 : 80 : 160 of 320; each boundary between intents falls on a whole number of the 4 * limit slices
    assert counts == [limit, limit, 2 * limit]


def test_check_disjoint_names_both_ids():
    check_disjoint([user("How are you?")], [user("How were you?")])
    check_disjoint([user("???", "a")], [user("!!!", "b")])
    with pytest.raises(PromptError) as caught:
        check_disjoint([user("x y", "t1"), user("How  ARE you", "t2")], [user("how are you?!", "h9")])
    assert "'t2'" in caught.value.message
    assert "'h9'" in caught.value.message
    assert caught.value.hint


def test_shipped_sets_are_named():
    assert shipped_sets() == ("high_stakes_heldout", "high_stakes_train", "honesty_heldout", "honesty_train")


def test_fingerprint_changes_with_every_part_and_with_the_order():
    one = user("x", topic="t", intent="i")
    others = [
        user("y", topic="t", intent="i"),
        user("x", "b", topic="t", intent="i"),
        user("x", topic="u", intent="i"),
        user("x", topic="t", intent="j"),
        Prompt("a", (Message("system", "x"), Message("user", "x")), "t", "i"),
    ]
    prints = [sha256([p]) for p in [one, *others]] + [sha256([one, others[0]]), sha256([others[0], one]), sha256([])]
    assert len(set(prints)) == len(prints)
    assert sha256([one]) == hashlib.sha256(b'[["a", [["user", "x"]], "t", "i"]]').hexdigest()
