"""Files of questions: every mistake at once, each with its line; Parquet like the others."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from spalign.config import MMLUConfig, MTBenchConfig
from spalign.errors import PromptError
from spalign.evaluation.mmlu import load_mmlu
from spalign.evaluation.mt_bench import load_questions
from spalign.evaluation.question_files import spread

GOOD = {"subject": "law", "question": "Q?", "choices": ["a", "b", "c", "d"], "answer": "C"}


def lines(path: Path, *rows: Any) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def test_answers_are_letters_or_places(tmp_path: Path) -> None:
    found = load_mmlu(MMLUConfig(source=lines(tmp_path / "q.jsonl", GOOD, {**GOOD, "answer": 0})))
    assert [q["answer"] for q in found] == [2, 0]


@pytest.mark.parametrize(
    "wrong",
    [
        {"choices": "abcd"},
        {"choices": [1, 2, None, {}]},
        {"choices": ["a", "b", "c"]},
        {"answer": True},
        {"answer": 1.0},
        {"answer": 4},
        {"answer": "AB"},
        {"answer": ""},
        {"answer": None},
        {"question": 7},
    ],
)
def test_what_is_no_question_is_named_by_its_line(tmp_path: Path, wrong: dict[str, Any]) -> None:
    with pytest.raises(PromptError, match=r"q\.jsonl:2: not a question of MMLU") as e:
        load_mmlu(MMLUConfig(source=lines(tmp_path / "q.jsonl", GOOD, {**GOOD, **wrong})))
    assert "choices (four texts)" in str(e.value)


def test_a_question_id_cannot_forge_a_message(tmp_path: Path) -> None:
    row = {"question_id": "1\nerror: all is lost\x1b[2J", "turns": ["a", "b"]}
    with pytest.raises(PromptError, match="stands there twice") as e:
        load_questions(MTBenchConfig(source=lines(tmp_path / "mt.jsonl", row, row)))
    assert "\nerror" not in e.value.message
    assert "\x1b" not in e.value.message


def test_a_reference_whose_id_is_a_list_is_named(tmp_path: Path) -> None:
    questions = lines(tmp_path / "mt.jsonl", {"question_id": 1, "turns": ["a", "b"]})
    references = lines(tmp_path / "ref.jsonl", {"question_id": [1], "choices": [{"turns": ["x", "y"]}]})
    with pytest.raises(PromptError, match=r"ref\.jsonl:1: not a reference of MT-Bench"):
        load_questions(MTBenchConfig(source=questions, references=references))


def test_parquet(tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(pa.Table.from_pylist([{"question_id": 1, "category": "law", "turns": ["a", "b"], "other": 1}]), tmp_path / "mt.parquet")
    (found,) = load_questions(MTBenchConfig(source=str(tmp_path / "mt.parquet")))
    assert (found.first.text, found.second, found.first.topic) == ("a", "b", "law")


def test_spread_is_even() -> None:
    assert spread(list(range(10)), 5) == [0, 2, 4, 6, 8]
    assert spread([1, 2], 5) == [1, 2]
    assert spread([1, 2], None) == [1, 2]
