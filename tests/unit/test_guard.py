"""Collapse by hand. The guard at work in a training run is in tests/integration/test_trainer.py."""

from __future__ import annotations

import pytest

from spalign.config import GuardConfig
from spalign.training.guard import Probe, collapse

CONFIG = GuardConfig(max_length_ratio=1.6, max_repetition_rise=0.15)
BEFORE = Probe(words=80, repetition=0.10, empty=0.05)


def after(words: float = 80, repetition: float = 0.10, empty: float = 0.05) -> str | None:
    return collapse(BEFORE, Probe(words, repetition, empty), CONFIG)


def test_no_change_is_no_collapse() -> None:
    assert after() is None


@pytest.mark.parametrize(
    ("words", "found"),
    [  # 80 / 1.6 = 50 and 80 * 1.6 = 128: at the bounds all is well, beyond them not
        (50, None),
        (49, "length collapse: answers fell from 80 to 49 words"),
        (0, "length collapse: answers fell from 80 to 0 words"),
        (128, None),
        (129, "length explosion: answers grew from 80 to 129 words"),
    ],
)
def test_length(words: float, found: str | None) -> None:
    assert after(words=words) == found


@pytest.mark.parametrize(
    ("error", "words", "found"),
    [  # 12 answers, one as long as another by chance: 16 and 27 words with 4 and 6 of error are within a factor of 1.6 * exp(1.645 * .334)
        (4.0, 27, None),
        (0.1, 27, "length explosion: answers grew from 16 to 27 words"),
        (4.0, 50, "length explosion: answers grew from 16 to 50 words"),
        (4.0, 8, None),
        (0.1, 8, "length collapse: answers fell from 16 to 8 words"),
        (4.0, 0, "length collapse: answers fell from 16 to 0 words"),
    ],
)
def test_a_length_is_another_beyond_chance(error: float, words: float, found: str | None) -> None:
    now = Probe(words, 0, 0, words_error=error * words / 18)
    assert collapse(Probe(16, 0, 0, words_error=error), now, CONFIG) == found


def test_the_collapse_of_run_c_is_caught() -> None:
    # shared/measured.md, section 3: 72 words before, 10 after
    assert collapse(Probe(72, 0, 0), Probe(10, 0, 0), CONFIG) == "length collapse: answers fell from 72 to 10 words"


@pytest.mark.parametrize(
    ("repetition", "found"),
    [  # may rise by 0.15 over 0.10; falling is fine
        (0.24, None),
        (0.26, "repetition: repeated 3-grams rose from 10% to 26%"),
        (0.0, None),
    ],
)
def test_repetition(repetition: float, found: str | None) -> None:
    assert after(repetition=repetition) == found


@pytest.mark.parametrize(
    ("kl", "chosen", "found"),
    [  # bounds of 1 nat a token each, before at 0 and -1.5; a gain of the chosen is fine, a number that is none is not
        (1.0, -2.5, None),
        (0.0, -0.5, None),
        (1.01, -1.5, "drift: KL from the policy before training is 1.01 nats a token"),
        (0.0, -2.51, "chosen responses became unlikely: from -1.50 to -2.51 nats a token"),
        (float("nan"), -1.5, "drift: KL from the policy before training is nan nats a token"),
    ],
)
def test_drift_and_likelihood(kl: float, chosen: float, found: str | None) -> None:
    config = GuardConfig(max_kl=1.0, max_chosen_drop=1.0)
    assert collapse(Probe(80, 0.1, 0.05, 0.0, -1.5), Probe(80, 0.1, 0.05, kl, chosen), config) == found


@pytest.mark.parametrize(("empty", "found"), [(0.14, None), (0.16, "empty answers: 5% before, 16% now"), (0.0, None)])
def test_empty_answers(empty: float, found: str | None) -> None:
    assert after(empty=empty) == found


def test_a_policy_that_said_nothing_before() -> None:
    silent = Probe(words=0, repetition=0, empty=1)
    assert collapse(silent, silent, CONFIG) is None
    assert collapse(silent, Probe(10, 0, 0), CONFIG) == "length explosion: answers grew from 0 to 10 words"


def test_the_bounds_come_from_the_config() -> None:
    wide = GuardConfig(max_length_ratio=4, max_repetition_rise=0.5)
    assert collapse(BEFORE, Probe(25, 0.5, 0.05), wide) is None
    assert collapse(BEFORE, Probe(25, 0.1, 0.05), CONFIG) is not None
    assert collapse(BEFORE, Probe(80, 0.5, 0.05), CONFIG) is not None
