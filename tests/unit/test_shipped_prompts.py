"""The prompts in the package: how many, how mixed, and nothing said twice."""

from collections import Counter
from itertools import combinations

import pytest

from spalign.config import PromptsConfig, PromptSource
from spalign.prompts import check_disjoint, load_prompts, shipped_sets
from spalign.text import words
from spalign.types import Prompt

HIGH_STAKES_TOPICS = {"self_harm", "medical", "legal", "privacy", "violence", "fraud", "drugs", "abuse"}
HONESTY_TOPICS = {"knowledge_cutoff", "missing_input", "wrong_premise", "no_modality", "self_knowledge", "professional_limits"}
SETS = {
    "high_stakes_train": (300, HIGH_STAKES_TOPICS),
    "high_stakes_heldout": (100, HIGH_STAKES_TOPICS),
    "honesty_train": (180, HONESTY_TOPICS),
    "honesty_heldout": (60, HONESTY_TOPICS),
}


def load(name: str) -> list[Prompt]:
    return load_prompts(PromptSource(source=name), PromptsConfig())


@pytest.mark.parametrize("name", SETS)
def test_enough_prompts_over_all_topics(name):
    least, topics = SETS[name]
    prompts = load(name)
    assert len(prompts) >= least
    counts = Counter(p.topic for p in prompts)
    assert set(counts) == topics
    assert min(counts.values()) >= 0.8 * len(prompts) / len(topics)


@pytest.mark.parametrize("name", ["high_stakes_train", "high_stakes_heldout"])
def test_half_legitimate_a_quarter_benign_a_quarter_ill_meant(name):
    prompts = load(name)
    shares = {intent: n / len(prompts) for intent, n in Counter(p.intent for p in prompts).items()}
    assert shares == pytest.approx({"legitimate": 0.5, "benign": 0.25, "ill_meant": 0.25}, abs=0.05)
    for topic in HIGH_STAKES_TOPICS:
        assert {p.intent for p in prompts if p.topic == topic} == {"legitimate", "benign", "ill_meant"}


@pytest.mark.parametrize("name", ["honesty_train", "honesty_heldout"])
def test_honesty_meets_limits_and_plain_questions(name):
    prompts = load(name)
    shares = {intent: n / len(prompts) for intent, n in Counter(p.intent for p in prompts).items()}
    assert shares == pytest.approx({"limit": 0.75, "benign": 0.25}, abs=0.05)


def test_ids_are_unique_over_all_sets():
    ids = [p.id for name in shipped_sets() for p in load(name)]
    assert len(set(ids)) == len(ids)


def test_every_prompt_is_one_short_user_turn():
    for prompt in (p for name in shipped_sets() for p in load(name)):
        assert [m.role for m in prompt.messages] == ["user"], prompt.id
        assert 10 <= len(prompt.text) <= 400, prompt.id
        assert prompt.text == prompt.text.strip(), prompt.id


def test_no_training_prompt_is_held_out():
    check_disjoint(load("high_stakes_train") + load("honesty_train"), load("high_stakes_heldout") + load("honesty_heldout"))


def trigrams(text: str) -> set[tuple[str, ...]]:
    w = words(text)
    return {tuple(w[i : i + 3]) for i in range(max(1, len(w) - 2))}  # of a text shorter than three words, the one shorter n-gram


def test_no_near_duplicates_within_or_across_the_split():
    """Jaccard overlap of word 3-grams: below 0.2 between training and held-out prompts, below 0.3 on one side."""
    prompts = [(name.endswith("heldout"), p, trigrams(p.text)) for name in shipped_sets() for p in load(name)]
    near = [
        f"{a.id} ~ {b.id}: {overlap:.2f}"
        for (a_held, a, a_grams), (b_held, b, b_grams) in combinations(prompts, 2)
        if (overlap := len(a_grams & b_grams) / len(a_grams | b_grams)) >= (0.3 if a_held == b_held else 0.2)
    ]
    assert not near
