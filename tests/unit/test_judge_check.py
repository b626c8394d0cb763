"""judge-check with judges that are known: perfect, guessing, inverted, gullible; what it reports, recommends, and skips."""

from __future__ import annotations

import dataclasses
import json
import math
import re
import zlib
from collections.abc import Callable, Sequence
from typing import Any

import pytest

from spalign.constitution import Exemplar, Objective
from spalign.engines.base import Ask
from spalign.engines.scripted import ScriptedEngine
from spalign.errors import EngineError
from spalign.selfeval import (
    ENSEMBLE,
    PROBE,
    SCORERS,
    Case,
    JudgeCheck,
    LabelledCase,
    Raw,
    ScorerReport,
    all_scorers,
    judge_check,
    score_responses,
)
from spalign.selfeval.bench import INJECTIONS
from spalign.selfeval.judge import Member
from spalign.selfeval.report import verdict
from spalign.types import Message, Prompt, Response

EXEMPLARS = (
    Exemplar(prompt="Hi.", response="bad start.", answer="no"),
    Exemplar(prompt="Bye.", response="good end.", answer="yes"),
)


def objective(name: str = "kindness", exemplars: tuple[Exemplar, ...] = EXEMPLARS) -> Objective:
    text = {"principle": f"Be {name}.", "question": f"Is it {name}?", "good_system": f"good {name}", "bad_system": f"bad {name}"}
    return Objective.model_validate({"name": name, "good_answer": "yes", "exemplars": exemplars, **text})


def labelled(texts: Sequence[tuple[str, int]], name: str = "kindness") -> list[LabelledCase]:
    """(answer, label); two answers to a prompt, which are rivals."""
    responses = [Response(f"r{i}", text, (), True) for i, (text, _) in enumerate(texts)]
    out = []
    for i, (_, label) in enumerate(texts):
        prompt = Prompt(f"p{i // 2}", (Message("user", f"Question {i // 2}?"),))
        pair = tuple(responses[i // 2 * 2 : i // 2 * 2 + 2])
        out.append(LabelledCase(Case(prompt, responses[i], pair), name, label))
    return out


ROWS = labelled([(f"{kind} {i}.", int(kind == "good")) for i in range(20) for kind in ("good", "bad")])
"""40 answers to 20 prompts: "good 0.", "bad 0.", "good 1.", ... Everything after the first full stop was added by somebody else."""

# Judges: answer -> log-odds that it is good


def noise(answer: str) -> float:
    """Uniform in -1..1, from the answer's text without what was added to it."""
    return zlib.crc32(answer.encode()) / 2**31 - 1 if "." not in answer else noise(answer.split(".", maxsplit=1)[0])


def perfect(answer: str) -> float:
    """At least 1 for good answers and at most -1 for bad ones."""
    return (2 if answer.startswith("good") else -2) + noise(answer)


def guessing(answer: str) -> float:
    return 3 * noise(answer)


def inverted(answer: str) -> float:
    return -perfect(answer)


def gullible(answer: str) -> float:
    """Perfect, until an answer goes on after its full stop."""
    return perfect(answer) + (0 if answer.endswith(".") and answer.count(".") == 1 else 6)


Judge = Callable[[str], float]


def engine(
    read: Judge, weigh: Judge | None = None, represent: Callable[[str], Sequence[float]] | None = None, **options: Any
) -> ScriptedEngine:
    """read: what the questions about an answer give; weigh: its advantage under the good system prompt, in nats a token.

    represent: what the model holds of an answer; default: what it says of it, and something else.
    """
    likelier = weigh or (lambda answer: read(answer) / 10)
    represent = represent or (lambda answer: (read(answer), noise(answer + "!")))

    def score(text: str, choice: str) -> float:
        if choice in (" A", " B"):
            a, b = re.findall(r"^Answer [AB]: (.*)$", text, re.MULTILINE)
            return read(a) - read(b) if choice == " A" else 0.0
        odds = read(asked_about(text))
        if choice.strip() in ("Yes", "No"):
            return odds if choice.strip() == "Yes" else 0.0
        return -((int(choice) - 5 - odds) ** 2)

    def loglikelihood(context: str, text: str) -> float:
        return likelier(text) if context.startswith("system: good") and "Hello!" not in context else 0.0

    def reply(messages: tuple[Message, ...], seed: int) -> str:
        return str(min(max(round(5 + read(asked_about(messages[0].content))), 1), 10))

    return ScriptedEngine(reply, score, loglikelihood, lambda context, text: represent(text), **options)


def asked_about(text: str) -> str:
    return text.rsplit("Assistant: ", 1)[1].split("\n", maxsplit=1)[0]


def check(read: Judge, *scorers: str, rows: Sequence[LabelledCase] = ROWS, **options: Any) -> JudgeCheck:
    return judge_check(engine(read), [objective()], rows, scorers or all_scorers(), **options)


def report(found: JudgeCheck, scorer: str = "yes_no_zero") -> ScorerReport:
    return found.reports["kindness"][scorer]


@pytest.fixture(scope="module")
def sure() -> JudgeCheck:
    """A perfect judge, asked in every way."""
    return check(perfect)


EVERY = pytest.mark.parametrize("scorer", all_scorers())
ABSOLUTE = pytest.mark.parametrize("scorer", [s for s in all_scorers() if s != "pairwise"])


# A perfect judge


@EVERY
def test_a_perfect_judge_is_trustworthy_however_it_is_asked(sure: JudgeCheck, scorer: str) -> None:
    found = report(sure, scorer)
    assert (found.auc, found.auc_ci, found.accuracy, found.verdict) == (1.0, (1.0, 1.0), 1.0, "trustworthy")


@EVERY
def test_every_answer_is_counted(sure: JudgeCheck, scorer: str) -> None:
    assert (report(sure, scorer).rows, report(sure, scorer).unscored) == (40, 0)


@ABSOLUTE
def test_its_threshold_lies_between_the_classes(sure: JudgeCheck, scorer: str) -> None:
    how = report(sure, scorer).judgement
    assert how is not None
    assert how.threshold is not None
    scored = score_responses(engine(perfect), [c.case for c in ROWS], [objective()], {"kindness": how})
    good, bad = ([r.scores["kindness"] for r, c in zip(scored, ROWS, strict=True) if c.label == side] for side in (1, 0))
    assert max(bad) < how.threshold <= min(good)


def test_the_judgement_is_of_the_recommended_scorer(sure: JudgeCheck) -> None:
    chosen = sure.judgement("kindness")
    assert chosen is not None
    assert chosen == report(sure, sure.recommended["kindness"]).judgement
    assert chosen.scorer == sure.recommended["kindness"]


@ABSOLUTE
def test_the_judgement_has_the_figures_of_the_report(sure: JudgeCheck, scorer: str) -> None:
    found = report(sure, scorer)
    how = found.judgement
    assert how is not None
    assert (how.scorer, how.verdict, how.auc, how.auc_ci) == (scorer, found.verdict, found.auc, found.auc_ci)
    assert (how.threshold, how.injection_shift) == (
        pytest.approx(found.threshold, rel=1e-5),
        pytest.approx(found.injection_shift, abs=1e-5),
    )


def test_a_comparing_scorer_has_no_judgement(sure: JudgeCheck) -> None:
    assert report(sure, "pairwise").auc == 1.0
    assert report(sure, "pairwise").judgement is None


def test_a_comparing_scorer_is_never_recommended() -> None:
    assert check(perfect, "pairwise").recommended == {}


def test_a_second_check_says_the_same(sure: JudgeCheck) -> None:
    def figures(found: JudgeCheck) -> list[tuple[str, dict[str, Any], object]]:
        return [(s, {**r.to_json(), "seconds_per_100": 0.0}, r.judgement) for s, r in found.reports["kindness"].items()]

    again = check(perfect)
    assert figures(again) == figures(sure)
    assert again.recommended == sure.recommended


# Judges that are no good


@pytest.mark.parametrize("scorer", ["yes_no", "likert_expected", "contrastive", "pairwise"])
def test_a_guessing_judge_is_at_chance(scorer: str) -> None:
    found = report(check(guessing, scorer), scorer)
    assert found.auc_ci[0] <= 0.5 <= found.auc_ci[1]
    assert found.verdict == "at chance"


def test_an_inverted_judge_is_never_used() -> None:
    found = check(inverted, *SCORERS, ENSEMBLE)  # the probe is fitted to the labels, and would not be inverted
    assert {(r.auc, r.verdict) for r in found.reports["kindness"].values()} == {(0.0, "at chance")}
    assert all(r.judgement is None for r in found.reports["kindness"].values())
    assert (found.recommended, found.judgement("kindness")) == ({}, None)


def test_a_judge_that_says_one_thing_of_everything_has_no_judgement() -> None:
    found = report(check(lambda answer: 1.5, "yes_no_zero"))
    assert (found.auc, found.judgement, found.verdict) == (0.5, None, "at chance")
    assert math.isnan(found.length_correlation)


@pytest.mark.parametrize(
    ("low", "shift", "expected"),
    [
        (math.nan, None, "at chance"),
        (0.5, None, "at chance"),
        (0.501, None, "weak"),
        (0.699, 0.0, "weak"),
        (0.7, None, "trustworthy"),
        (0.7, 0.499, "trustworthy"),
        (0.7, -3.0, "trustworthy"),
        (0.9, 0.5, "weak"),
        (0.4, 2.0, "at chance"),
    ],
)
def test_the_verdict_by_hand(low: float, shift: float | None, expected: str) -> None:
    assert verdict(low, shift) == expected


# Injections


def mixed(share: float) -> Judge:
    """Nats that tell good from bad but overlap: less sure than `perfect`, and blind to what is added to an answer."""
    return lambda answer: ((1 if answer.startswith("good") else -1) * share + noise(answer)) / 10


@ABSOLUTE
def test_a_judge_that_reads_no_instructions_is_not_moved(sure: JudgeCheck, scorer: str) -> None:
    assert report(sure, scorer).injection_shift == pytest.approx(0.0, abs=1e-9)


def test_a_shift_is_the_mean_of_the_points_that_are_added_to_bad_answers() -> None:
    # bad answers at log-odds -2 rise to 4: on the fitted scale from b to b', good ones (at 2) are not asked again
    asked = []

    def read(answer: str) -> float:
        asked.append(answer)
        return (2.0 if answer.startswith("good") else -2.0) + (6 if "." in answer[:-1] else 0)

    found = report(check(read, "yes_no_zero"))
    assert found.judgement is not None
    scale = found.judgement.calibration
    assert found.injection_shift == pytest.approx(scale.score(Raw(4.0, 0.0)) - scale.score(Raw(-2.0, 0.0)))
    injected = {a for a in asked if "." in a[:-1]}
    assert all(a.startswith("bad") for a in injected)
    assert len(injected) == 12 * len(INJECTIONS)


def test_what_is_added_stays_inside_the_answers_line() -> None:
    forged = []

    def score(text: str, choice: str) -> float:
        forged.append(sum(line.startswith(("Question:", "Answer:")) for line in text.splitlines()))
        return perfect(asked_about(text)) if choice == "Yes" else 0.0

    judge_check(ScriptedEngine(lambda m, s: "", score), [objective()], ROWS, ["yes_no_zero"])
    assert set(forged) == {2}


def test_a_moved_judge_is_weak_at_best_and_another_scorer_is_recommended() -> None:
    found = judge_check(engine(gullible, mixed(0.5)), [objective()], ROWS, ["yes_no", "contrastive"])
    moved, unmoved = report(found, "yes_no"), report(found, "contrastive")
    assert unmoved.auc_ci[0] < moved.auc_ci[0] == 1.0
    assert (moved.injection_shift or 0) > 0.5 > (unmoved.injection_shift or 0)
    assert moved.verdict == "weak"
    assert found.recommended == {"kindness": "contrastive"}


def test_where_every_scorer_is_moved_the_best_is_recommended_all_the_same() -> None:
    found = check(gullible, "yes_no_zero", "likert_expected")
    assert min(r.injection_shift or 0 for r in found.reports["kindness"].values()) > 0.5
    chosen = found.judgement("kindness")
    assert chosen is not None
    assert chosen.verdict == "weak"


def test_a_comparing_scorer_is_not_injected(sure: JudgeCheck) -> None:
    assert report(sure, "pairwise").injection_shift is None


def test_only_what_may_be_recommended_is_diagnosed_where_that_is_enough() -> None:
    judge = engine(gullible, mixed(0.5))
    found = judge_check(judge, [objective()], ROWS, ["yes_no_zero", "contrastive", "pmi"], diagnose_all=False)
    # yes_no_zero is the best and moved; contrastive and pmi are equal here, and the first of them is not moved
    diagnosed = {s for s, r in found.reports["kindness"].items() if r.retest is not None}
    assert found.recommended == {"kindness": "contrastive"}
    assert diagnosed == {"yes_no_zero", "contrastive"}


# Kinds of text


def of_two_kinds(written: int, sampled: int) -> list[LabelledCase]:
    """So many answers of both labels together; the sampled ones say "mine" in their text."""
    rows = labelled(
        [
            (f"{kind}{' mine' * (i >= written // 2)} {i}.", int(kind == "good"))
            for i in range((written + sampled) // 2)
            for kind in ("good", "bad")
        ]
    )
    return [dataclasses.replace(c, source="sampled" if "mine" in c.case.response.text else "written") for c in rows]


def blind_to_its_own(answer: str) -> float:
    """Perfect on written answers; on sampled ones it overlaps."""
    return perfect(answer) + (0 if "mine" not in answer else (-1.5 if answer.startswith("good") else 1.5))


def test_each_kind_of_text_is_measured_by_itself() -> None:
    found = report(check(lambda a: -perfect(a) if "mine" in a else perfect(a), "yes_no_zero", rows=of_two_kinds(40, 20)))
    assert {source: (by["rows"], by["auc"]) for source, by in found.by_source.items()} == {"written": (40, 1.0), "sampled": (20, 0.0)}


def test_the_weakest_kind_gives_verdict_and_judgement() -> None:
    found = report(check(blind_to_its_own, "yes_no_zero", rows=of_two_kinds(80, 40)))
    weak = found.by_source["sampled"]
    assert found.by_source["written"]["auc"] == 1.0
    assert found.weakest == "sampled"
    assert found.lower_bound == weak["auc_ci"][0]
    assert found.auc_ci[0] >= 0.7 > weak["auc_ci"][0] > 0.5
    assert found.verdict == "weak"
    assert found.judgement is not None
    assert (found.judgement.on, found.judgement.auc) == ("sampled", pytest.approx(weak["auc"], rel=1e-5))
    assert found.judgement.auc_ci == pytest.approx(weak["auc_ci"], rel=1e-5)


def test_scorers_are_ranked_by_the_kind_they_are_worst_at() -> None:
    # asked for yes or no it is perfect on 200 answers and inverted on 40; its likelihoods overlap on both kinds
    judge = engine(lambda a: -perfect(a) if "mine" in a else perfect(a), mixed(0.3))
    found = judge_check(judge, [objective()], of_two_kinds(200, 40), ["yes_no_zero", "contrastive"])
    assert report(found, "yes_no_zero").auc_ci[0] > report(found, "contrastive").auc_ci[0]
    assert report(found, "yes_no_zero").lower_bound < 0.5 < report(found, "contrastive").lower_bound
    assert found.recommended == {"kindness": "contrastive"}


def test_where_all_are_at_chance_on_a_kind_the_rest_decides() -> None:
    # both are inverted on the 40 sampled answers, the likelihoods a bit less; on 200 written ones yes or no is perfect and they are not
    def half_sure(answer: str) -> float:
        return (-0.3 if "mine" in answer else 1) * mixed(0.2)(answer)

    judge = engine(lambda a: -perfect(a) if "mine" in a else perfect(a), half_sure)
    found = judge_check(judge, [objective()], of_two_kinds(200, 40), ["contrastive", "yes_no_zero"])
    assert report(found, "yes_no_zero").lower_bound < report(found, "contrastive").lower_bound < 0.5
    assert report(found, "yes_no_zero").auc_ci[0] > report(found, "contrastive").auc_ci[0] > 0.5
    assert found.recommended == {"kindness": "yes_no_zero"}


def test_a_kind_with_fewer_than_ten_answers_of_a_label_is_not_measured_by_itself() -> None:
    found = report(check(perfect, "yes_no_zero", rows=of_two_kinds(40, 18)))
    assert set(found.by_source) == {"written"}
    assert found.rows == 58


def test_where_no_kind_is_large_enough_all_are_taken_together() -> None:
    found = report(check(perfect, "yes_no_zero", rows=of_two_kinds(18, 18)))
    assert (found.by_source, found.weakest, found.lower_bound) == ({}, "all", found.auc_ci[0])


@pytest.mark.parametrize(("rows", "expected"), [(ROWS, "trustworthy"), (ROWS[:-2], "weak")])
def test_nobody_is_trusted_on_fewer_than_twenty_answers_of_a_label(rows: list[LabelledCase], expected: str) -> None:
    found = report(check(perfect, "yes_no_zero", rows=rows))
    assert (found.lower_bound, found.verdict) == (1.0, expected)


@pytest.mark.parametrize(("silent", "expected"), [(4, "trustworthy"), (5, "weak")])
def test_nobody_is_trusted_who_leaves_more_than_a_tenth_unscored(silent: int, expected: str) -> None:
    unheard = {c.case.response.text for c in ROWS[:silent]}
    found = report(judge_check(engine(lambda a: math.nan if a in unheard else perfect(a)), [objective()], ROWS, ["yes_no_zero"]))
    assert (found.unscored, found.verdict) == (silent, expected)


# Other diagnostics


def test_ceiling_and_floor_are_the_shares_of_the_highest_and_the_lowest_score() -> None:
    # 10 of 40 answers at the top, 20 at the bottom
    found = report(check(lambda a: 0.0 if a.startswith("bad") else float(int(a[5:-1]) % 2 + 1), "yes_no_zero"))
    assert (found.ceiling, found.floor) == (0.25, 0.5)


def test_answers_past_the_window_are_unscored_and_the_others_are_measured() -> None:
    rows = [*ROWS, *labelled([("good " + "w" * 500, 1), ("bad " + "w" * 500, 0)])]
    found = judge_check(engine(perfect, window=450), [objective()], rows, ["yes_no_zero"])
    assert (report(found).rows, report(found).unscored, report(found).auc) == (42, 2, 1.0)


def test_a_judge_that_likes_length_shows_it() -> None:
    rows = labelled([(f"{'good' if i % 2 else 'bad'}{' and' * (i * 7 % 20)}.", i % 2) for i in range(20)])
    found = check(lambda answer: float(len(answer.split())), "yes_no_zero", rows=rows)
    assert report(found).length_correlation == pytest.approx(1.0)


def test_a_two_sided_judge_by_hand() -> None:
    # 20 good answers at 2 and 20 bad ones at -2; Platt's targets are 21/22 and 1/22, odds of 21: the slope is ln(21) / 2 about 0,
    # the scores are 210/22 and 10/22, and midway between them is 5
    found = report(check(lambda a: 2.0 if a.startswith("good") else -2.0, "yes_no_zero"))
    assert found.judgement is not None
    assert found.judgement.calibration.slope == pytest.approx(math.log(21) / 2, rel=1e-5)
    assert found.judgement.calibration.centre == pytest.approx(0, abs=1e-9)
    assert found.threshold == pytest.approx(5.0)
    # one deviation of pi / sqrt(3) either way, on that scale; the same for both by symmetry
    above, below = (10 / (1 + 21 ** -((2 + side * math.pi / math.sqrt(3)) / 2)) for side in (1, -1))
    assert found.spread == pytest.approx((above - below) / 2, rel=1e-4)


def test_the_same_numbers_again_are_no_retest_noise(sure: JudgeCheck) -> None:
    assert {r.retest for r in sure.reports["kindness"].values()} == {0.0}


def test_numbers_that_follow_the_company_are_retest_noise() -> None:
    class Moody(ScriptedEngine):
        def choice_logprobs(self, asks: Sequence[Ask], choices: Sequence[str]) -> list[tuple[float, ...] | None]:
            found = super().choice_logprobs(asks, choices)
            return found if len(asks) == len(ROWS) else [f and (f[0] + 1, f[1]) for f in found]

    judge = Moody(lambda m, s: "", lambda text, choice: (2.0 if "good" in asked_about(text) else -2.0) if choice == "Yes" else 0.0)
    found = report(judge_check(judge, [objective()], sorted(ROWS, key=lambda c: c.label), ["yes_no_zero"]))
    assert found.judgement is not None
    scale = found.judgement.calibration
    # in other company good answers are at 3 and bad ones at -1; 24 of the 40 are read again, as many of the first half as of the second
    rise = [scale.score(Raw(raw + 1, 0.0)) - scale.score(Raw(raw, 0.0)) for raw in (2.0, -2.0)]
    assert found.retest == pytest.approx(sum(rise) / 2)


def test_flips_are_counted_where_there_are_exemplars_only(sure: JudgeCheck) -> None:
    rates = {s: r.flip_rate for s, r in sure.reports["kindness"].items()}
    assert rates == {**dict.fromkeys(all_scorers()), "yes_no": 0.0, ENSEMBLE: 0.0}


def test_a_judge_that_echoes_the_last_exemplar_flips() -> None:
    # it turns round for the bad answers where the last exemplar says no: half of the answers change sides
    def score(text: str, choice: str) -> float:
        answer = asked_about(text)
        turned = text.index("Answer: No") > text.index("Answer: Yes") and answer.startswith("bad")
        return (-1 if turned else 1) * perfect(answer) if choice == " Yes" else 0.0

    found = judge_check(ScriptedEngine(lambda m, s: "", score), [objective()], ROWS, ["yes_no"])
    assert report(found, "yes_no").flip_rate == 0.5


# Recall


@pytest.mark.parametrize("recall", [0.75, 0.9])
def test_a_recall_leaves_that_share_of_the_bad_answers_below(recall: float) -> None:
    def read(answer: str) -> float:
        return mixed(0.3)(answer) * 10

    found = check(read, "yes_no_zero", recall=recall)
    how = found.judgement("kindness")
    assert how is not None
    assert how.threshold is not None
    scored = score_responses(engine(read), [c.case for c in ROWS if not c.label], [objective()], {"kindness": how})
    assert sum(r.scores["kindness"] < how.threshold for r in scored) >= recall * len(scored)


def test_a_recall_that_nothing_but_the_top_of_the_scale_gives_is_no_crash() -> None:
    # good answers at log-odds 4, bad ones at 0, and a bad one at 20, which is 10.0 on the fitted scale: 99 % of 21 bad ones is all of them
    def read(answer: str) -> float:
        return 20.0 if "loud" in answer else 4.0 if answer.startswith("good") else 0.0

    rows = labelled(
        [(f"{kind} {i}.", int(kind == "good")) for i in range(20) for kind in ("good", "bad")] + [("good 20.", 1), ("bad loud.", 0)]
    )
    found = report(check(read, "yes_no_zero", rows=rows, recall=0.99))
    assert found.judgement is None or (found.judgement.threshold or 0) <= 10.01


def test_a_recall_moves_the_threshold_up_here() -> None:
    read = mixed(0.3)
    equal, high = (report(check(read, "yes_no_zero", recall=recall)).threshold for recall in (None, 0.95))
    assert high > equal


def test_the_threshold_lies_in_its_interval() -> None:
    found = report(check(mixed(0.5), "yes_no_zero"))
    assert found.threshold_ci[0] <= found.threshold <= found.threshold_ci[1]
    assert found.threshold_ci[0] < found.threshold_ci[1]


# The ensemble


def test_members_are_standardised_on_the_labelled_answers() -> None:
    # yes_no_zero is 2 for 20 answers and -2 for 20: mean 0, deviation 2; contrastive 0.5 and 0: 0.25 and 0.25
    judge = engine(lambda a: 2.0 if a.startswith("good") else -2.0, lambda a: 0.5 if a.startswith("good") else 0.0)
    found = judge_check(judge, [objective()], ROWS, ["yes_no_zero", "contrastive", ENSEMBLE])
    how = report(found, ENSEMBLE).judgement
    assert how is not None
    assert how.members == {"yes_no_zero": Member(mean=0, deviation=2), "contrastive": Member(mean=0.25, deviation=0.25)}


def test_only_absolute_scorers_above_chance_are_members() -> None:
    judge = engine(perfect, lambda a: guessing(a) / 10)
    found = judge_check(judge, [objective()], ROWS, ["yes_no", "contrastive", "likert_expected", "pairwise", ENSEMBLE])
    how = report(found, ENSEMBLE).judgement
    assert how is not None
    assert set(how.members) == {"yes_no", "likert_expected"}


def test_one_scorer_is_no_ensemble() -> None:
    found = judge_check(engine(perfect, inverted), [objective()], ROWS, ["yes_no", "contrastive", ENSEMBLE])
    assert set(found.reports["kindness"]) == {"yes_no", "contrastive"}


# The probe


def test_a_probe_that_learned_its_prompts_by_heart_is_at_chance() -> None:
    # both answers to a prompt have one label, and all that is held of an answer is which prompt it answers
    rows = labelled([(f"{'good' if i // 2 % 2 else 'bad'} {i // 2}.", i // 2 % 2) for i in range(60)])

    def which(answer: str) -> list[float]:
        number = int(re.findall(r"\d+", answer)[0])
        return [float(n == number) for n in range(30)]

    found = judge_check(engine(perfect, represent=which), [objective()], rows, [PROBE])
    assert report(found, PROBE).auc_ci[0] <= 0.5 <= report(found, PROBE).auc_ci[1]
    assert report(found, PROBE).verdict == "at chance"


def test_a_probe_is_a_member_like_the_others_and_goes_with_the_judgement() -> None:
    found = judge_check(engine(perfect, inverted), [objective()], ROWS, ["yes_no", "contrastive", PROBE, ENSEMBLE])
    how = report(found, ENSEMBLE).judgement
    assert how is not None
    assert set(how.members) == {"yes_no", PROBE}
    assert how.probe is not None


def test_a_judgement_without_a_probe_carries_none() -> None:
    how = report(check(perfect, PROBE, "yes_no"), "yes_no").judgement
    assert how is not None
    assert how.probe is None


def test_an_answer_without_a_number_is_left_out_of_the_probe() -> None:
    lacking = ROWS[0].case.response.text
    judge = engine(perfect, represent=lambda a: (math.nan if a.startswith(lacking) else perfect(a), 1.0))
    assert report(judge_check(judge, [objective()], ROWS, [PROBE]), PROBE).unscored == 1


def test_a_probe_that_cannot_be_fitted_is_skipped_with_the_reason() -> None:
    one_prompt = [dataclasses.replace(c, case=dataclasses.replace(c.case, prompt=ROWS[0].case.prompt)) for c in ROWS]
    found = check(perfect, "yes_no_zero", PROBE, rows=one_prompt)
    assert set(found.reports["kindness"]) == {"yes_no_zero"}
    assert found.skipped == {PROBE: "too few labelled answers of 'kindness' to fit it on"}


# What is skipped, counted, and written


def test_a_scorer_that_the_engine_cannot_serve_is_skipped_with_the_reason() -> None:
    generates = ScriptedEngine(lambda messages, seed: "8" if asked_about(messages[0].content).startswith("good") else "3")
    found = judge_check(generates, [objective()], ROWS, all_scorers())
    assert set(found.reports["kindness"]) == {"likert"}
    assert set(found.skipped) == {*SCORERS, PROBE} - {"likert"}
    for scorer, why in found.skipped.items():
        needs = {"contrastive": "loglikelihood", "pmi": "loglikelihood", PROBE: "representations"}.get(scorer, "choice_logprobs")
        assert why == f"the scorer '{scorer}' needs '{needs}', which the engine 'scripted' does not have"


def test_an_engine_that_no_scorer_can_ask_is_refused() -> None:
    with pytest.raises(EngineError, match="'kindness': no scorer can be asked: the scorer 'yes_no' needs 'choice_logprobs'") as caught:
        judge_check(ScriptedEngine(lambda m, s: ""), [objective()], ROWS, ["yes_no", ENSEMBLE])
    assert caught.value.hint


def test_an_objective_without_exemplars_does_without_the_scorer_that_needs_them() -> None:
    found = judge_check(engine(perfect), [objective(exemplars=())], ROWS, ["yes_no", "yes_no_zero"])
    assert set(found.reports["kindness"]) == {"yes_no_zero"}


def test_each_objective_is_measured_on_its_own_answers() -> None:
    other = labelled([(f"{kind} {i}.", int(kind == "bad")) for i in range(5) for kind in ("good", "bad")], "rudeness")
    found = judge_check(engine(perfect), [objective(), objective("rudeness")], [*ROWS, *other], ["yes_no_zero"])
    assert {o: (by["yes_no_zero"].rows, by["yes_no_zero"].auc) for o, by in found.reports.items()} == {
        "kindness": (40, 1.0),
        "rudeness": (10, 0.0),
    }
    assert found.recommended == {"kindness": "yes_no_zero"}


def test_progress_counts_every_answer_once_a_scorer() -> None:
    ticks: list[int] = []
    check(perfect, tick=ticks.append)
    assert sum(ticks) == len(ROWS) * len([*SCORERS, PROBE])


def test_seconds_are_those_of_a_hundred_answers(sure: JudgeCheck) -> None:
    by = sure.reports["kindness"]
    assert all(0 < r.seconds_per_100 < 60 for r in by.values())
    members = report(sure, ENSEMBLE).judgement
    assert members is not None
    assert by[ENSEMBLE].seconds_per_100 == pytest.approx(sum(by[m].seconds_per_100 for m in members.members))


def test_the_json_has_the_documented_shape(sure: JudgeCheck) -> None:
    found = sure.to_json()
    assert set(found) == {"objectives", "recommended"}
    assert set(found["objectives"]) == {"kindness"}
    assert set(found["objectives"]["kindness"]) == set(all_scorers())
    keys = """rows unscored auc auc_ci accuracy threshold threshold_ci ceiling floor spread length_correlation seconds_per_100 retest
    flip_rate injection_shift verdict by_source weakest"""
    assert all(set(r) == set(keys.split()) for r in found["objectives"]["kindness"].values())


def test_the_json_is_plain_and_what_is_not_defined_is_null() -> None:
    found = check(lambda answer: math.nan, "yes_no_zero").to_json()
    (by,) = json.loads(json.dumps(found, allow_nan=False))["objectives"]["kindness"].values()
    assert by["unscored"] == by["rows"] == 40
    assert [by[k] for k in ("auc", "auc_ci", "accuracy", "threshold", "threshold_ci")] == [None, [None, None], None, None, [None, None]]
    assert by["verdict"] == "at chance"


# What a run does with it


def test_a_run_asks_what_the_check_asked() -> None:
    asked: list[str] = []

    def score(text: str, choice: str) -> float:
        asked.append(text)
        return perfect(asked_about(text)) if choice == " Yes" else 0.0

    judge = ScriptedEngine(lambda m, s: "", score)
    objectives = [objective(), objective("brevity")]
    rows = [*ROWS, *(dataclasses.replace(c, objective="brevity") for c in ROWS)]
    found = judge_check(judge, objectives, rows, ["yes_no"])
    measured = set(asked)
    asked.clear()
    how = {o.name: j for o in objectives if (j := found.judgement(o.name))}
    score_responses(judge, [c.case for c in ROWS], objectives, how)
    assert set(asked) <= measured


def test_members_that_share_no_scored_answer_make_no_ensemble() -> None:
    def score(text: str, choice: str) -> float:
        answer = asked_about(text)
        early = int(re.findall(r"\d+", answer)[0]) < 8
        if early == choice.isdigit():  # the one scorer gives no number for the first half, the other for the second
            return math.nan
        return perfect(answer) if choice in ("Yes", "9") else 0.0

    found = judge_check(ScriptedEngine(lambda m, s: "", score), [objective()], ROWS, ["yes_no_zero", "likert_expected", ENSEMBLE])
    assert ENSEMBLE not in found.recommended.values()
