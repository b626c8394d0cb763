"""Labelled answers: the shipped ones, the user's own, every mistake with its line, and who is whose rival."""

from __future__ import annotations

import csv
import json
from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest

from spalign.constitution import load_constitution, shipped
from spalign.errors import PromptError
from spalign.selfeval import LabelledCase, fingerprint, load_labelled, shipped_objectives

COLUMNS = ("prompt", "response", "objective", "label")


def row(prompt: str, response: str, label: object, objective: str = "kindness") -> dict[str, Any]:
    return {"prompt": prompt, "response": response, "objective": objective, "label": label}


ROWS = [
    row("Hi?", "Hello!", 1),
    row("Hi?", 'Go, "away"!', 0),
    row("Why?", "Because\nso.", 1),
    row("Why?", "None of your business.", 0),
]


def jsonl(folder: Path, rows: list[Any], name: str = "own.jsonl") -> Path:
    path = folder / name
    path.write_text("".join(f"{r if isinstance(r, str) else json.dumps(r)}\n" for r in rows), encoding="utf-8")
    return path


def table(folder: Path, rows: list[dict[str, Any]]) -> Path:
    path = folder / "own.csv"
    with path.open("w", encoding="utf-8", newline="") as f:
        writer = csv.DictWriter(f, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return path


def facts(cases: list[LabelledCase]) -> list[tuple[str, str, str, int]]:
    return [(c.case.prompt.text, c.case.response.text, c.objective, c.label) for c in cases]


def refused(path: Path | None, *objectives: str) -> list[str]:
    """The lines of the error's message, without the path of the file."""
    with pytest.raises(PromptError) as caught:
        load_labelled(path, objectives)
    assert caught.value.hint
    return caught.value.message.replace(str(path), "FILE").splitlines()


# Those that ship


@pytest.mark.parametrize("objective", shipped_objectives())
def test_every_shipped_row_loads(objective: str) -> None:
    text = files("spalign").joinpath("calibration", f"{objective}.jsonl").read_text(encoding="utf-8")
    expected = [json.loads(line) for line in text.splitlines()]
    assert facts(load_labelled(None, [objective])) == [(r["prompt"], r["response"], objective, r["label"]) for r in expected]


def test_every_objective_of_the_shipped_constitutions_has_rows() -> None:
    objectives = {name for c in shipped() for name in load_constitution(c).objective_names}
    assert set(shipped_objectives()) == objectives


def test_several_objectives_come_one_after_the_other() -> None:
    both = load_labelled(None, ["honesty", "harmlessness"])
    assert facts(both) == [*facts(load_labelled(None, ["honesty"])), *facts(load_labelled(None, ["harmlessness"]))]


def test_an_objective_without_shipped_rows() -> None:
    (line,) = refused(None, "honesty", "kindness")
    assert line == "the package: objective 'kindness' has 0 good and 0 bad labelled answers; both need at least two"


# The user's own


def test_jsonl_and_csv_say_the_same(tmp_path: Path) -> None:
    from_jsonl, from_csv = load_labelled(jsonl(tmp_path, ROWS), ["kindness"]), load_labelled(table(tmp_path, ROWS), ["kindness"])
    assert from_csv == from_jsonl
    assert facts(from_jsonl) == [(r["prompt"], r["response"], "kindness", r["label"]) for r in ROWS]


def test_an_own_file_takes_the_place_of_the_shipped_rows(tmp_path: Path) -> None:
    own = [{**r, "objective": "honesty"} for r in ROWS]
    assert len(load_labelled(jsonl(tmp_path, own), ["honesty"])) == 4


def test_rows_of_other_objectives_and_further_columns_are_left_alone(tmp_path: Path) -> None:
    rows = [row("Hi?", "x", 1, "other"), *({**r, "kind": "k", "id": 3} for r in ROWS)]
    assert facts(load_labelled(jsonl(tmp_path, rows), ["kindness"])) == [(r["prompt"], r["response"], "kindness", r["label"]) for r in ROWS]


@pytest.mark.parametrize(
    ("good", "bad"), [(1, 0), (True, False), ("1", "0"), ("good", "bad"), ("Yes", " NO "), ("true", "false"), ("Good", "Bad")]
)
def test_ways_to_write_a_label(tmp_path: Path, good: object, bad: object) -> None:
    path = jsonl(tmp_path, [{**r, "label": good if r["label"] else bad} for r in ROWS])
    assert [c.label for c in load_labelled(path, ["kindness"])] == [1, 0, 1, 0]


def test_a_prompt_is_one_turn_of_the_user(tmp_path: Path) -> None:
    first = load_labelled(jsonl(tmp_path, ROWS), ["kindness"])[0].case
    assert [(m.role, m.content) for m in first.prompt.messages] == [("user", "Hi?")]
    assert first.response.finished


def test_a_source_tells_kinds_of_text_apart_and_may_be_missing(tmp_path: Path) -> None:
    rows = [{**ROWS[0], "source": "sampled"}, ROWS[1], {**ROWS[2], "source": ""}, {**ROWS[3], "source": "written"}]
    assert [c.source for c in load_labelled(jsonl(tmp_path, rows), ["kindness"])] == ["sampled", "all", "all", "written"]


# Rivals


def test_rivals_are_the_answers_to_the_same_prompt(tmp_path: Path) -> None:
    rows = [ROWS[0], ROWS[2], ROWS[1], ROWS[3]]  # the two prompts in turn
    cases = load_labelled(jsonl(tmp_path, rows), ["kindness"])
    assert [[r.text for r in c.case.rivals] for c in cases] == [
        ["Hello!", 'Go, "away"!'],
        ["Because\nso.", "None of your business."],
    ] * 2


def test_answers_to_one_prompt_under_two_objectives_are_no_rivals(tmp_path: Path) -> None:
    rows = [*ROWS, *({**r, "response": f"{r['response']} Again.", "objective": "truth"} for r in ROWS)]
    cases = load_labelled(jsonl(tmp_path, rows), ["kindness", "truth"])
    assert [{r.text.endswith("Again.") for r in c.case.rivals} for c in cases] == [{False}] * 4 + [{True}] * 4


# Mistakes


def test_all_mistakes_at_once_each_with_its_line(tmp_path: Path) -> None:
    rows = [
        ROWS[0],
        {"prompt": " ", "response": "x", "objective": "kindness", "label": 1},  # line 2
        {"prompt": "Hi?", "response": 7, "objective": "kindness", "label": 0},  # line 3
        "{broken",  # line 4
        {"prompt": "Hi?", "response": "x", "objective": "kindness"},  # line 5
        "",
        {"prompt": "Hi?", "response": "x", "label": "maybe"},  # line 7: two
    ]
    lines = refused(jsonl(tmp_path, rows), "kindness")
    assert lines[0] == "6 mistakes:"
    assert lines[1:3] == ["FILE:2: no text in the column 'prompt'", "FILE:3: no text in the column 'response'"]
    assert lines[3].startswith("FILE:4: not valid JSON")
    assert lines[4:] == [
        "FILE:5: the label is None",
        "FILE:7: no text in the column 'objective'",
        "FILE:7: the label is 'maybe'",
    ]


def test_lines_of_a_csv_count_the_header_and_breaks_inside_texts(tmp_path: Path) -> None:
    rows = [ROWS[0], ROWS[2], {**ROWS[1], "label": "2"}, {**ROWS[3], "response": ""}]  # the second answer is on two lines
    assert refused(table(tmp_path, rows), "kindness") == [
        "2 mistakes:",
        "FILE:5: the label is '2'",
        "FILE:6: no text in the column 'response'",
    ]


def test_a_mistake_in_a_row_of_another_objective_counts_too(tmp_path: Path) -> None:
    assert refused(jsonl(tmp_path, [*ROWS, row("Hi?", "x", "hm", "other")]), "kindness") == ["FILE:5: the label is 'hm'"]


def test_an_objective_that_the_file_lacks(tmp_path: Path) -> None:
    (line,) = refused(jsonl(tmp_path, ROWS), "kindness", "truth")
    assert line == "FILE: objective 'truth' has 0 good and 0 bad labelled answers; both need at least two"


@pytest.mark.parametrize(
    ("labels", "counts"), [((1, 1, 1), "3 good and 0 bad"), ((0, 0), "0 good and 2 bad"), ((1, 1, 1, 0), "3 good and 1 bad")]
)
def test_one_label_only_is_refused_and_so_is_one_answer_of_a_label(tmp_path: Path, labels: tuple[int, ...], counts: str) -> None:
    (line,) = refused(jsonl(tmp_path, [row("Hi?", f"x{i}", y) for i, y in enumerate(labels)]), "kindness")
    assert line == f"FILE: objective 'kindness' has {counts} labelled answers; both need at least two"


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    assert refused(tmp_path / "none.jsonl", "kindness") == ["FILE: no such file"]


# The fingerprint


@pytest.mark.parametrize(
    "changed",
    [
        [{**ROWS[0], "label": 0}, {**ROWS[1], "label": 1}, *ROWS[2:]],
        [{**ROWS[0], "prompt": "Hi!"}, *ROWS[1:]],
        [{**ROWS[0], "response": "Hello."}, *ROWS[1:]],
        [{**r, "objective": "truth"} for r in ROWS],
        [{**ROWS[0], "source": "sampled"}, *ROWS[1:]],
        ROWS[::-1],
    ],
    ids=["labels", "prompt", "response", "objective", "source", "order"],
)
def test_the_fingerprint_follows_what_is_labelled(tmp_path: Path, changed: list[dict[str, Any]]) -> None:
    before, after = jsonl(tmp_path, ROWS), jsonl(tmp_path, changed, "changed.jsonl")
    objective = changed[0]["objective"]
    assert fingerprint(load_labelled(after, [objective])) != fingerprint(load_labelled(before, ["kindness"]))


def test_the_fingerprint_is_the_same_wherever_the_rows_stand(tmp_path: Path) -> None:
    one, two = jsonl(tmp_path, ROWS), table(tmp_path, ROWS)
    assert fingerprint(load_labelled(one, ["kindness"])) == fingerprint(load_labelled(two, ["kindness"]))
