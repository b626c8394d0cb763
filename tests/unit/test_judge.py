"""Calibration and judge.yaml: raw values on 0-10, and a file that comes back as it was or says all that is wrong with it."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from spalign.errors import ConfigError
from spalign.selfeval import JudgeFile, Judgement, Raw, all_scorers, load_judge, save_judge
from spalign.selfeval.judge import KNOWN, Calibration, Member, sigmoid

properties = settings(deadline=None, max_examples=150)
IDENTITY = Calibration(kind="identity")
calibrations = st.just(IDENTITY) | st.builds(Calibration, slope=st.floats(1e-3, 1e3), centre=st.floats(-100, 100))
values = st.floats(-1e4, 1e4)


# Calibration


def test_sigmoid_by_hand() -> None:
    assert sigmoid(0.0) == 0.5
    assert sigmoid(math.log(3)) == pytest.approx(0.75)
    assert sigmoid(-2.0) == pytest.approx(1 - sigmoid(2.0), abs=1e-15)


def test_the_ends_of_the_scale_are_reached_without_an_overflow() -> None:
    steep = Calibration(slope=1e3)
    assert (steep.score(Raw(1e300, 0.0)), steep.score(Raw(-1e300, 0.0))) == (10.0, 0.0)


def test_logistic_by_hand() -> None:
    # slope 2 about 1: at 1 + ln(3) / 2 the odds are 3 to 1
    fitted = Calibration(slope=2, centre=1)
    assert fitted.score(Raw(1 + math.log(3) / 2, 0.0)) == pytest.approx(7.5)
    assert fitted.score(Raw(1.0, 0.0)) == 5.0


@pytest.mark.parametrize(("raw", "score"), [(-3.0, 0.0), (0.0, 0.0), (6.5, 6.5), (10.0, 10.0), (12.0, 10.0)])
def test_identity_clamps(raw: float, score: float) -> None:
    assert IDENTITY.score(Raw(raw, 0.0)) == score


def test_spread_by_hand() -> None:
    # one deviation of ln 3 about the centre: from 2.5 to 7.5, half of that is 2.5
    assert Calibration().spread(Raw(0.0, math.log(3))) == pytest.approx(2.5)
    # from 8.5 to 10, where the scale ends
    assert IDENTITY.spread(Raw(9.5, 1.0)) == 0.75


@properties
@given(calibrations, values, values)
def test_a_higher_raw_value_never_scores_lower(calibration: Calibration, a: float, b: float) -> None:
    low, high = sorted((a, b))
    assert 0 <= calibration.score(Raw(low, 0.0)) <= calibration.score(Raw(high, 0.0)) <= 10


@properties
@given(calibrations, values, st.floats(0, 1e3), st.floats(0, 1e3))
def test_a_wider_spread_is_never_narrower_on_the_scale(calibration: Calibration, value: float, a: float, b: float) -> None:
    low, high = sorted((a, b))
    assert 0 <= calibration.spread(Raw(value, low)) <= calibration.spread(Raw(value, high)) + 1e-12 <= 5 + 1e-9
    assert calibration.spread(Raw(value, 0.0)) == 0


@pytest.mark.parametrize("slope", [0.0, -1.0, math.nan, math.inf])
def test_a_slope_that_does_not_rise_is_refused(slope: float) -> None:
    with pytest.raises(ValueError, match="slope"):
        Calibration(slope=slope)


# Scorers named without a check


@pytest.mark.parametrize(
    ("scorer", "raw", "score"),
    [
        ("likert", 8.0, 8.0),
        ("likert_expected", 8.25, 8.25),
        ("yes_no", math.log(3), 7.5),
        ("yes_no_zero", math.log(3), 7.5),
        ("pairwise", math.log(3), 7.5),
        ("contrastive", math.log(3) / 10, 7.5),  # tenths of nats a token are much
        ("pmi", 0.5 + math.log(3) / 2, 7.5),
        ("probe", math.log(3) / 3, 7.5),  # 1 and -1 are what it is fitted to
    ],
)
def test_an_unchecked_scorer_is_on_its_own_scale(scorer: str, raw: float, score: float) -> None:
    assert Judgement.unchecked(scorer).calibration.score(Raw(raw, 0.0)) == pytest.approx(score)


def test_an_unchecked_scorer_claims_nothing() -> None:
    claims = Judgement.unchecked("yes_no").model_dump(exclude_none=True, exclude={"calibration"})
    assert claims == {"scorer": "yes_no", "members": {}}


# judge.yaml


FULL = JudgeFile(
    model="org/modèle",
    fingerprint="ab" * 32,
    rows="cd" * 32,
    objectives={
        "kindness": Judgement(
            scorer="ensemble",
            calibration=Calibration(slope=1.25, centre=-0.5),
            members={"yes_no": Member(mean=0.5, deviation=2), "contrastive": Member(mean=-0.125, deviation=0.0625)},
            threshold=6.75,
            threshold_ci=(6.0, 7.5),
            auc=0.8125,
            auc_ci=(0.75, 0.875),
            on="sampled",
            asked="ef" * 32,
            injection_shift=-0.25,
            verdict="trustworthy",
        ),
        "brevity": Judgement.unchecked("likert"),
    },
)


def test_what_is_saved_is_loaded(tmp_path: Path) -> None:
    save_judge(tmp_path / "judge.yaml", FULL)
    assert load_judge(tmp_path / "judge.yaml") == FULL


def test_what_was_loaded_saves_as_the_same_bytes(tmp_path: Path) -> None:
    one, two = tmp_path / "one.yaml", tmp_path / "two.yaml"
    how = FULL.objectives["kindness"].model_copy(update={"threshold": 20 / 3, "auc": 1 / 7})
    save_judge(one, FULL.model_copy(update={"objectives": {"kindness": how}}))
    save_judge(two, load_judge(one))
    assert two.read_bytes() == one.read_bytes()


def test_numbers_have_six_digits(tmp_path: Path) -> None:
    how = Judgement(scorer="pmi", calibration=Calibration(slope=200 / 3, centre=-1e-7 / 3))
    save_judge(tmp_path / "judge.yaml", FULL.model_copy(update={"objectives": {"kindness": how}}))
    loaded = load_judge(tmp_path / "judge.yaml").objectives["kindness"].calibration
    assert (loaded.slope, loaded.centre) == (66.6667, -3.33333e-8)


def test_the_order_of_objectives_and_members_stays(tmp_path: Path) -> None:
    save_judge(tmp_path / "judge.yaml", FULL)
    loaded = load_judge(tmp_path / "judge.yaml")
    assert list(loaded.objectives) == ["kindness", "brevity"]
    assert list(loaded.objectives["kindness"].members) == ["yes_no", "contrastive"]


def test_a_file_may_name_every_scorer_there_is() -> None:
    assert sorted(KNOWN) == sorted(all_scorers())


def refused(folder: Path, text: str) -> list[str]:
    """The lines of the error's message, without the path of the file."""
    path = folder / "judge.yaml"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(ConfigError) as caught:
        load_judge(path)
    assert caught.value.hint
    return caught.value.message.replace(str(path), "FILE").splitlines()


def test_all_mistakes_at_once_each_with_its_line(tmp_path: Path) -> None:
    text = (
        "model: demo\n"  # line 1; 'fingerprint' is missing
        "rows: abc\n"
        "objectives:\n"
        "  kindness:\n"
        "    scorer: yes_no\n"
        "    calibration:\n"
        "      slope: 0\n"  # line 7
        "    treshold: 5\n"  # line 8
        "    threshold: 11\n"  # line 9
        "    auc: .nan\n"  # line 10
        "    verdict: fine\n"  # line 11
        "  brevity:\n"  # line 12: 'scorer' is missing
        "    members: {pmi: {mean: 0, deviation: -1}}\n"  # line 13
    )
    lines = refused(tmp_path, text)
    assert lines[0] == "8 mistakes:"
    assert sorted(line.split("; ")[0] for line in lines[1:]) == sorted(
        [
            "FILE:1: 'fingerprint' is missing",
            "FILE:7: objectives.kindness.calibration.slope: Input should be greater than 0",
            "FILE:8: unknown key 'objectives.kindness.treshold'",
            "FILE:9: objectives.kindness.threshold: Input should be less than or equal to 10.01",
            "FILE:10: objectives.kindness.auc: Input should be a finite number",
            "FILE:11: objectives.kindness.verdict: Input should be 'trustworthy', 'weak' or 'at chance'",
            "FILE:12: 'objectives.brevity.scorer' is missing",
            "FILE:13: objectives.brevity.members.pmi.deviation: Input should be greater than 0",
        ]
    )


def test_an_unknown_key_of_an_objective_is_put_right(tmp_path: Path) -> None:
    (line,) = refused(tmp_path, "model: demo\nfingerprint: a\nrows: b\nobjectives:\n  kindness:\n    scorer: yes_no\n    treshold: 5\n")
    assert line == "FILE:7: unknown key 'objectives.kindness.treshold'; did you mean 'threshold'?"


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no such file"):
        load_judge(tmp_path / "none.yaml")


@pytest.mark.parametrize(
    "probe",
    ["{features: 3, weights: xx}", "{features: 2, weights: AAAA}", "{features: -1, weights: ''}", "{features: 1, weights: AAAA!AAAAAAA=}"],
)
def test_broken_weights_of_a_probe_are_refused(tmp_path: Path, probe: str) -> None:
    refused(tmp_path, f"model: demo\nfingerprint: a\nrows: b\nobjectives:\n  kindness: {{scorer: probe, probe: {probe}}}\n")


@pytest.mark.parametrize("how", ["scorer: guess", "scorer: ensemble", "scorer: ensemble, members: {guess: {mean: 0, deviation: 1}}"])
def test_a_scorer_that_does_not_exist_is_refused(tmp_path: Path, how: str) -> None:
    refused(tmp_path, f"model: demo\nfingerprint: a\nrows: b\nobjectives:\n  kindness: {{{how}}}\n")
