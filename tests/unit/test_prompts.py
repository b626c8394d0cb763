"""Prompts from JSONL and CSV files: what is taken, and what is refused and how."""

import csv
import json
from pathlib import Path

import pytest

from spalign.config import PromptsConfig, PromptSource
from spalign.errors import PromptError
from spalign.prompts import load_prompts
from spalign.types import Message, Prompt


def load(source: Path | str, *, suffix: str = "", max_chars: int = 20_000, **options) -> list[Prompt]:
    return load_prompts(PromptSource(source=str(source), **options), PromptsConfig(suffix=suffix, max_chars=max_chars))


def refused(source: Path | str, **options) -> str:
    """The whole text of the error, message and fix."""
    with pytest.raises(PromptError) as caught:
        load(source, **options)
    assert caught.value.hint, "every error says what to do"
    return str(caught.value)


def jsonl(folder: Path, *rows: object, name: str = "p.jsonl") -> Path:
    path = folder / name
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows), encoding="utf-8")
    return path


def csv_file(folder: Path, text: str) -> Path:
    path = folder / "p.csv"
    path.write_bytes(text.encode())
    return path


def user(text: str, id: str = "a", **labels: str) -> Prompt:
    return Prompt(id, (Message("user", text),), **labels)


# What is taken


def test_a_text_becomes_one_user_message(tmp_path):
    path = jsonl(tmp_path, {"id": "x", "prompt": "Hello?", "topic": "t", "intent": "i", "other": [1]})
    assert load(path) == [user("Hello?", "x", topic="t", intent="i")]


@pytest.mark.parametrize("name", ["p.jsonl", "p.JSONL", "p.json-lines"])
def test_suffixes_of_json_lines(tmp_path, name):
    assert load(jsonl(tmp_path, {"prompt": "Hello?"}, name=name))[0].text == "Hello?"


def test_turns_become_messages(tmp_path):
    turns = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Hi!"},
        {"role": "user", "content": "And now?"},
    ]
    (prompt,) = load(jsonl(tmp_path, {"chat": turns}), column="chat")
    assert prompt.messages == tuple(Message(t["role"], t["content"]) for t in turns)


def test_missing_ids_are_row_numbers_and_whole_numbers_are_digits(tmp_path):
    path = jsonl(tmp_path, {"prompt": "a", "id": 7}, "", {"prompt": "b"}, {"prompt": "c", "id": None}, {"prompt": "d", "id": ""})
    # the blank line 2 is no row, so b is row 2
    assert [p.id for p in load(path)] == ["7", "row-00002", "row-00003", "row-00004"]


def test_control_characters_and_line_separators_are_text(tmp_path):
    text = "a\x00b\x1b[31m\x85c\u2028d\te\x0c"
    escaped, raw = {"prompt": text}, '{"prompt": "' + text + '"}'
    assert [p.text for p in load(jsonl(tmp_path, escaped, raw))] == [text, text]
    assert load(csv_file(tmp_path, f'prompt\r\n"{text}"\r\n'))[0].text == text


def test_utf8_mark_and_windows_line_ends(tmp_path):
    path = tmp_path / "p.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"prompt": "na\xc3\xafve"}\r\n{"prompt": "b"}\r\n')
    assert [p.text for p in load(path)] == ["naïve", "b"]


def test_csv_holds_text_only(tmp_path):
    path = csv_file(tmp_path, 'id,prompt,topic\n1,"[{""role"": ""user"", ""content"": ""Hi""}]",t\n,"two\nlines",\n')
    assert load(path) == [user('[{"role": "user", "content": "Hi"}]', "1", topic="t"), user("two\nlines", "row-00002")]


def test_suffix_goes_to_the_last_turn_after_one_space(tmp_path):
    turns = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hi!"}, {"role": "user", "content": "Why? \n"}]
    path = jsonl(tmp_path, {"prompt": turns}, {"prompt": "How?"})
    first, second = load(path, suffix=" Be brief.")
    assert [m.content for m in first.messages] == ["Hi", "Hi!", "Why? Be brief."]
    assert second.text == "How? Be brief."


# What is refused


def test_missing_file_and_unknown_kind(tmp_path):
    assert "no such file" in refused(tmp_path / "none.jsonl")
    assert "no such file" in refused("./folder/none")
    assert "no such file" in refused("folder/none.d/prompts")
    assert "no such file" in refused("/none")
    assert "no such file" in refused("x" * 5000 + ".jsonl")
    (tmp_path / "p.txt").write_text("hello")
    assert "use one of: .jsonl" in refused(tmp_path / "p.txt")


@pytest.mark.parametrize("name", ["high_stakes_trian", "", " "])
def test_unknown_name_lists_the_shipped_sets(name):
    message = refused(name)
    assert "high_stakes_train, honesty_heldout" in message
    assert ("did you mean 'high_stakes_train'?" in message) == (name == "high_stakes_trian")


@pytest.mark.parametrize("name", ["p.jsonl", "p.csv"])
def test_invalid_utf8_says_the_line(tmp_path, name):
    path = tmp_path / name
    path.write_bytes(b"prompt\n" if name == "p.csv" else b'{"prompt": "a"}\n')
    path.write_bytes(path.read_bytes() + b"\xff\n")
    assert f"{path}:2: not valid UTF-8" in refused(path)


@pytest.mark.parametrize("text", ["", "\n\n", "prompt\n", "\n\nid,prompt\n\n"])
def test_no_prompts(tmp_path, text):
    if not text.strip():
        assert "no prompts in it" in refused(jsonl(tmp_path, text))
    assert "no prompts in it" in refused(csv_file(tmp_path, text))


def test_missing_column_lists_the_columns_and_the_nearest_once(tmp_path):
    rows = [{"id": n, "promt": "x"} for n in range(50)]
    path = jsonl(tmp_path, *rows)
    assert refused(path).startswith(
        f"{path}:1: no column 'prompt'; did you mean 'promt'? (columns: id, promt)\n  fix: set the source's `column`"
    )
    path = csv_file(tmp_path, "\nid,question\n1,x\n")
    assert f"{path}:2: no column 'prompt' (columns: id, question)" in refused(path)


def test_a_row_without_the_column(tmp_path):
    path = jsonl(tmp_path, {"prompt": "a"}, {"Prompt": "b"}, {})
    message = refused(path)
    assert f"{path}:2: no column 'prompt'; did you mean 'Prompt'? (columns: Prompt)" in message
    assert f"{path}:3: no column 'prompt' (columns: none)" in message


@pytest.mark.parametrize(
    ("value", "says"),
    [
        ("", "the prompt is empty"),
        (" \n", "the prompt is empty"),
        (None, "'prompt' is null, not text"),
        (5, "'prompt' is a number, not text"),
        ({"role": "user"}, "'prompt' is an object, not text"),
        ([], "the prompt has no turns"),
        (["Hi"], "turn 1 is text, not a {role, content} object"),
        ([{"role": "user"}], "turn 1 has no content"),
        ([{"role": "user", "content": ["Hi"]}], "turn 1: its content is a list, not text"),
        ([{"role": "tool", "content": "Hi"}], "turn 1 has the unknown role 'tool'"),
        ([{"role": "user", "content": " "}], "the prompt is empty"),
        ([{"role": "system", "content": ""}, {"role": "user", "content": "Hi"}], "turn 1 is empty"),
        ([{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hi!"}], "the last turn is the assistant's, not the user's"),
        ([{"role": "user", "content": "Hi"}, {"role": "system", "content": "x"}], "turn 2 is a system turn after others"),
        ([{"role": "system", "content": "Hi"}], "the last turn is the system's"),
        ("\ud800", "'prompt' holds half of a surrogate pair (\\ud800) at character 1"),
        ([{"role": "user", "content": "a\udfff"}], "half of a surrogate pair (\\udfff) at character 2"),
    ],
)
def test_a_prompt_that_cannot_be_used(tmp_path, value, says):
    path = jsonl(tmp_path, {"prompt": "fine"}, {"prompt": value})
    assert f"{path}:2: " in refused(path)
    assert says in refused(path)


@pytest.mark.parametrize(("name", "value"), [("id", 1.5), ("id", True), ("topic", ["a"]), ("intent", {}), ("id", "\udc00")])
def test_labels_of_wrong_types(tmp_path, name, value):
    path = jsonl(tmp_path, {"prompt": "a", name: value})
    assert f"{path}:1: '{name}' " in refused(path)


@pytest.mark.parametrize("line", ['{"prompt": "a"', "{'prompt': 1}", "[" * 100_000, "9" * 5000, "[1]", "3", "null"])
def test_a_line_that_is_no_json_object(tmp_path, line):
    path = jsonl(tmp_path, {"prompt": "a"}, line)
    message = refused(path)
    assert f"{path}:2: not " in message
    assert len(message) < 300


def test_a_very_long_prompt_is_named_with_its_length_and_row(tmp_path):
    long = "word " * 40_000  # 200,000 characters
    field_limit = csv.field_size_limit()
    for path, line in ((jsonl(tmp_path, {"prompt": "a"}, {"prompt": long}), 2), (csv_file(tmp_path, f"prompt\na\n{long}\n"), 3)):
        message = refused(path)
        assert f"{path}:{line}: the prompt is 200,000 characters long, over the limit of 20,000" in message
        assert "prompts.max_chars" in message
        assert load(path, max_chars=200_000)[1].text == long
    assert csv.field_size_limit() == field_limit, "the limit of the csv module is everyone's"


def test_all_turns_count_towards_the_length(tmp_path):
    turns = [{"role": "system", "content": "x" * 6}, {"role": "user", "content": "y" * 6}]
    path = jsonl(tmp_path, {"prompt": turns})
    assert "12 characters" in refused(path, max_chars=11)
    assert load(path, max_chars=12)


def test_duplicate_ids_name_both_lines(tmp_path):
    path = jsonl(tmp_path, {"id": "a", "prompt": "1"}, {"id": "b", "prompt": "2"}, {"id": "a", "prompt": "3"})
    assert f"{path}:3: id 'a' stands twice, first in {path}:1" in refused(path)
    path = jsonl(tmp_path, {"id": "row-00002", "prompt": "1"}, {"prompt": "2"})
    assert "id 'row-00002' stands twice" in refused(path)


def test_all_mistakes_at_once_in_order(tmp_path):
    rows = [{"prompt": ""}, "{", {"prompt": "a", "id": 1.5, "topic": []}, {"prompt": "fine"}, {"prompt": 3}]
    lines = refused(jsonl(tmp_path, *rows)).splitlines()
    assert lines[0] == "5 mistakes:"
    assert [line.split(": ")[0].rsplit(":", 1)[1] for line in lines[1:6]] == ["1", "2", "3", "3", "5"]


def test_only_ten_mistakes_are_listed_and_the_others_counted(tmp_path):
    message = refused(jsonl(tmp_path, *[{"prompt": ""}] * 2011))
    assert message.startswith("2,011 mistakes:")
    assert "... and 2,001 more" in message
    assert message.count("write a text, or remove the row") == 1
    assert len(message.splitlines()) == 13  # heading, 10 mistakes, the count, the fix (once)


def test_an_error_cannot_drive_the_terminal(tmp_path):
    message = refused(jsonl(tmp_path, {"\x1b[2Jpromt\n\ud800": "a"}))
    assert "\x1b" not in message
    message.encode()


@pytest.mark.parametrize(
    ("text", "line", "says"),
    [
        ("id,prompt\n1,a\n2,b,c\n", 3, "the number of fields is 3, not 2"),
        ('id,prompt\n1,"a\nb"\n2\n', 4, "the number of fields is 1, not 2"),
        ('id,prompt\n1,a\n2,"never closed\n3,b\n', 3, "not valid CSV"),
        ("prompt,prompt\na,b\n", 1, "two columns are named 'prompt'"),
        ('prompt\na\n""\n', 3, "the prompt is empty"),
    ],
)
def test_broken_csv(tmp_path, text, line, says):
    path = csv_file(tmp_path, text)
    assert f"{path}:{line}: {says}" in refused(path)
