"""The probe: fitted on labelled representations, read by folds that have not seen the prompt."""

from __future__ import annotations

import math

import numpy as np
import pytest

from spalign.constitution import Objective
from spalign.engines.scripted import ScriptedEngine
from spalign.errors import ConfigError, EngineError
from spalign.selfeval import Case, Judgement, score_responses
from spalign.selfeval.probe import FOLDS, Probe, check_probe, fit_probe, with_decoys
from spalign.selfeval.statistics import auc
from spalign.types import Message, Prompt, Response

RNG = np.random.default_rng(0)
KIND = Objective(name="kind", principle="p", question="q?", good_answer="yes", good_system="g", bad_system="b")


def answers(n: int, *, signal: float, size: int = 40) -> tuple[list[list[float]], list[int], list[str]]:
    """Representations whose first feature says the label, beside noise; two answers a prompt."""
    labels = [i % 2 for i in range(n)]
    rows = RNG.normal(0, 1, (n, size))
    rows[:, 0] += signal * (2 * np.array(labels) - 1)
    return rows.tolist(), labels, [f"prompt {i // 2}" for i in range(n)]


def test_it_reads_what_is_there_on_prompts_it_has_not_seen():
    rows, labels, prompts = answers(120, signal=2.0)
    probe = fit_probe(rows, rows, labels, prompts)
    assert probe is not None
    raws = [r.value for r in probe.read_unseen(rows, prompts) if r]
    assert auc(raws, labels) > 0.9


def test_noise_stays_at_chance_on_unseen_prompts():
    rows, labels, prompts = answers(200, signal=0.0)
    probe = fit_probe(rows, rows, labels, prompts)
    assert probe is not None
    unseen = auc([r.value for r in probe.read_unseen(rows, prompts) if r], labels)
    seen = auc([r.value for r in probe.read(rows) if r], labels)
    assert abs(unseen - 0.5) < 0.15
    assert seen > 0.7, "what it was fitted on flatters it: that is why the check reads unseen prompts"


def test_a_direction_that_decoys_move_is_read_as_nothing():
    rows, labels, prompts = answers(120, signal=0.7)
    told = np.array(rows)
    told[:, 1] = 0.7 * (2 * np.array(labels) - 1) + RNG.normal(0, 1, 120)  # as telling as feature 0 ...
    moved = told.copy()
    moved[:, 1] += 5  # ... but any flattery moves it
    plain, robust = fit_probe(told.tolist(), told.tolist(), labels, prompts), fit_probe(told.tolist(), moved.tolist(), labels, prompts)
    assert plain is not None
    assert robust is not None
    before, after = (np.mean([r.value for r in robust.read(x.tolist()) if r]) for x in (told, moved))
    naive_before, naive_after = (np.mean([r.value for r in plain.read(x.tolist()) if r]) for x in (told, moved))
    assert abs(after - before) < 0.1 * abs(naive_after - naive_before)


def test_the_order_of_the_rows_does_not_matter():
    rows, labels, prompts = answers(60, signal=1.0)
    order = RNG.permutation(60)
    a = fit_probe(rows, rows, labels, prompts)
    b = fit_probe(*([values[i] for i in order] for values in (rows, rows, labels, prompts)))
    assert a is not None
    assert b is not None
    np.testing.assert_allclose(a.matrix(), b.matrix(), atol=1e-5)


def test_spread_is_the_jackknife_error_of_the_folds():
    # readings 1, 2, 3 of one feature 1: mean 2, jackknife variance 2/3 * (1 + 0 + 1)
    probe = Probe.of(np.array([[1.0, 0.0], [2.0, 0.0], [3.0, 0.0]]))
    (raw,) = probe.read([[1.0]])
    assert raw is not None
    assert raw.value == 2
    assert raw.spread == pytest.approx(math.sqrt(4 / 3))


def test_it_needs_both_labels_outside_every_fold():
    rows, _, prompts = answers(20, signal=1.0)
    assert fit_probe(rows, rows, [1] * 20, prompts) is None
    assert fit_probe([None], [None], [1], ["p"]) is None


def test_an_answer_without_representation_is_unscored_and_not_fitted_on():
    rows, labels, prompts = answers(40, signal=1.0)
    holes = [None, *rows[1:]]
    probe = fit_probe(holes, rows, labels, prompts)
    assert probe is not None
    assert probe.read(holes)[0] is None
    assert probe.read([[math.nan] * 40]) == [None]


def test_json_round_trip_keeps_every_bit():
    rows, labels, prompts = answers(40, signal=1.0)
    probe = fit_probe(rows, rows, labels, prompts)
    assert probe is not None
    again = Probe.model_validate_json(probe.model_dump_json())
    np.testing.assert_array_equal(again.matrix(), probe.matrix())
    assert len(probe.matrix()) == FOLDS


def test_decoys_stand_at_the_end_and_change_nothing_else():
    case = Case(Prompt("p", (Message("user", "x"),)), Response("r", "An answer. ", (), True))
    (decoyed,) = with_decoys([case])
    assert decoyed.response.text.startswith("An answer. ")
    assert len(decoyed.response.text) > len("An answer. ")
    assert decoyed.prompt == case.prompt


def test_an_engine_without_representations_is_refused():
    with pytest.raises(EngineError, match="needs 'representations'"):
        check_probe(ScriptedEngine(lambda m, s: ""))


def test_a_probe_that_is_not_fitted_is_refused_before_any_work():
    engine = ScriptedEngine(lambda m, s: "", represent=lambda c, y: [1.0])
    case = Case(Prompt("p", (Message("user", "x"),)), Response("r", "text", (), True))
    with pytest.raises(ConfigError, match="probe for objective 'kind' is not fitted"):
        score_responses(engine, [case], [KIND], {"kind": Judgement.unchecked("probe")})
