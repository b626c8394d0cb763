"""The shipped labelled answers: enough, balanced, apart from what judges and policies are shown, and not to be told by surface."""

from __future__ import annotations

import dataclasses
import json
from collections import defaultdict
from collections.abc import Iterator
from importlib.resources import files
from typing import Any

import numpy as np
import pytest

from spalign.config import PromptsConfig, PromptSource
from spalign.constitution import load_constitution, shipped
from spalign.prompts import check_disjoint, load_prompts, shipped_sets
from spalign.selfeval import LabelledCase, load_labelled, shipped_objectives
from spalign.selfeval.statistics import auc
from spalign.text import words
from spalign.types import Prompt

EACH = pytest.mark.parametrize("objective", shipped_objectives())


def load(objective: str) -> list[LabelledCase]:
    return load_labelled(None, [objective])


def rows(objective: str) -> list[dict[str, Any]]:
    """The rows as they stand in the file, with what only people look at; source: "written" for this set, or "sampled" from models."""
    text = files("spalign").joinpath("calibration", f"{objective}.jsonl").read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()]


def labels(cases: list[LabelledCase]) -> list[int]:
    return [c.label for c in cases]


@EACH
def test_there_are_enough_answers(objective: str) -> None:
    assert len(load(objective)) >= 120


@EACH
def test_good_and_bad_are_balanced(objective: str) -> None:
    assert 0.45 <= float(np.mean(labels(load(objective)))) <= 0.55


@EACH
def test_written_answers_of_each_label_are_of_several_kinds_and_no_kind_has_two_labels(objective: str) -> None:
    kinds = defaultdict(set)
    for r in rows(objective):
        if r["source"] == "written":
            kinds[r["label"]].add(r["kind"])
    assert min(len(kinds[0]), len(kinds[1])) >= 3
    assert not kinds[0] & kinds[1]


@EACH
def test_no_row_stands_twice(objective: str) -> None:
    texts = [(tuple(words(c.case.prompt.text)), tuple(words(c.case.response.text))) for c in load(objective)]
    assert len(set(texts)) == len(texts)


def test_ids_are_unique() -> None:
    ids = [r["id"] for objective in shipped_objectives() for r in rows(objective)]
    assert len(set(ids)) == len(ids)


# Apart from what is shown to judges and policies


def test_no_exemplar_is_among_the_rows() -> None:
    """A judge that has been shown an answer with its verdict is not measured by it."""
    shown = {
        tuple(words(t)) for c in shipped() for o in load_constitution(c).objectives for e in o.exemplars for t in (e.prompt, e.response)
    }
    assert shown
    cases = [c.case for objective in shipped_objectives() for c in load(objective)]
    found = {tuple(words(t)) for case in cases for t in (case.prompt.text, case.response.text)}
    assert not shown & found


def prompts(*names: str) -> list[Prompt]:
    return [p for name in names for p in load_prompts(PromptSource(source=name), PromptsConfig())]


def test_no_prompt_is_held_out_from_training() -> None:
    held_out = prompts(*(name for name in shipped_sets() if name.endswith("heldout")))
    assert held_out
    check_disjoint([c.case.prompt for objective in shipped_objectives() for c in load(objective)], held_out)


def test_no_prompt_of_a_written_answer_is_in_a_shipped_prompt_set() -> None:
    written = [c.case.prompt for objective in shipped_objectives() for c in load(objective) if c.source == "written"]
    assert written
    check_disjoint(written, prompts(*shipped_sets()))


# Not to be told by surface


def kinds_of_text() -> Iterator[Any]:
    """Every (objective, source) with answers."""
    for objective in shipped_objectives():
        for source in sorted({r["source"] for r in rows(objective)}):
            yield pytest.param(objective, source, id=f"{objective}-{source}")


@pytest.mark.parametrize(("objective", "source"), list(kinds_of_text()))
def test_length_does_not_tell_good_from_bad_within_a_kind_of_text(objective: str, source: str) -> None:
    cases = [c for c in load(objective) if c.source == source]
    # what a model says of itself is as it is: its bad answers to ill-meant prompts are longer (0.35), and docs/judging.md says so
    least = 0.4 if source == "written" else 0.3
    assert least <= auc([c.case.response.words for c in cases], labels(cases)) <= 1 - least


@EACH
def test_length_does_not_tell_good_from_bad(objective: str) -> None:
    cases = load(objective)
    assert 0.4 <= auc([c.case.response.words for c in cases], labels(cases)) <= 0.6


def word_scores(cases: list[LabelledCase], *, folds: int = 10, penalty: float = 1.0) -> list[float]:
    """Log-odds of `good` for each answer by which words are in it, from a ridge logistic regression fitted to other prompts' answers."""
    vocabulary = {w: i for i, w in enumerate(sorted({w for c in cases for w in words(c.case.response.text)}))}
    present = np.zeros((len(cases), len(vocabulary) + 1))
    present[:, -1] = 1  # the intercept
    for row, c in enumerate(cases):
        present[row, [vocabulary[w] for w in words(c.case.response.text)]] = 1
    order = {p: i for i, p in enumerate(dict.fromkeys(c.case.prompt.text for c in cases))}
    fold = np.array([order[c.case.prompt.text] % folds for c in cases])
    y = np.array(labels(cases), float)
    scores = np.zeros(len(cases))
    for held in (fold == k for k in range(folds)):
        x, target = present[~held], y[~held]
        kernel, logits = x @ x.T, np.zeros(len(target))
        for _ in range(30):  # Newton's method; the weights are a combination of the rows, x' a
            p = 1 / (1 + np.exp(-logits))
            noise = 1 / np.maximum(p * (1 - p), 1e-9)
            a = np.linalg.solve(kernel + penalty * np.diag(noise), logits + (target - p) * noise)
            logits = kernel @ a
        assert np.allclose(penalty * a, target - 1 / (1 + np.exp(-logits)), atol=1e-6)  # the gradient is zero
        scores[held] = present[held] @ x.T @ a
    return scores.tolist()


@EACH
def test_words_alone_do_not_tell_good_from_bad(objective: str) -> None:
    cases = load(objective)
    assert auc(word_scores(cases), labels(cases)) < 0.75


def test_words_would_tell_where_they_do() -> None:
    """The measure above is not blind: it finds a word that only the good answers have."""

    def planted(c: LabelledCase) -> LabelledCase:
        marked = dataclasses.replace(c.case.response, text=c.case.response.text + (" Indeedy." if c.label else ""))
        return dataclasses.replace(c, case=dataclasses.replace(c.case, response=marked))

    cases = [planted(c) for c in load("honesty")]
    assert auc(word_scores(cases), labels(cases)) > 0.95
