"""Rows as token ids: where an answer ends, what a prompt is, and what is refused."""

from __future__ import annotations

from typing import Any

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from spalign.errors import DataError
from spalign.training.rows import RowTokens, encode_row

WORDS = {"<s>": 0, "</s>": 1, "<end>": 2, "<user>": 3, "<bot>": 4, "\n": 5, "stop": 6, "<think>": 7}
WORDS |= {f"w{i}": i for i in range(10, 60)}
TURN = "{% for m in messages %}{{ '<user> ' if m.role == 'user' else '<bot> ' }}{{ m.content }}"
OPEN = "{% endfor %}{% if add_generation_prompt %}<bot> {% endif %}"
SPECIAL, PLAIN, NOTHING = TURN + "<end> \n " + OPEN, TURN + " stop " + OPEN, TURN + " " + OPEN


def tokenizer(template: str | None, *, eos: bool = False, special: bool = True) -> PreTrainedTokenizerFast:
    """Words and marks; eos: every plain text ends with it, as some tokenizers do."""
    raw = Tokenizer(models.WordLevel(WORDS, unk_token="w59"))
    raw.pre_tokenizer = pre_tokenizers.Split(" ", "removed")  # type: ignore[no-untyped-call]
    single = "<s> $A </s>" if eos else "<s> $A"
    raw.post_processor = processors.TemplateProcessing(single=single, special_tokens=[("<s>", 0), ("</s>", 1)])
    out = PreTrainedTokenizerFast(tokenizer_object=raw, bos_token="<s>", eos_token="</s>")
    if special:
        out.add_special_tokens({"additional_special_tokens": ["<end>", "<bot>", "<user>"]})
    out.chat_template = template
    return out


def chat(*turns: str) -> list[dict[str, str]]:
    return [{"role": "assistant" if n % 2 else "user", "content": text} for n, text in enumerate(turns)]


def answer(text: str) -> list[dict[str, str]]:
    return [{"role": "assistant", "content": text}]


def sides(row: dict[str, Any], template: str | None = SPECIAL, **how: bool) -> tuple[tuple[int, ...], ...]:
    found = encode_row(row, 7, tokens=RowTokens(tokenizer(template, **how)))
    return found.prompt, found.chosen, found.rejected


ROW = {"prompt": chat("w10"), "chosen": answer("w11 w12"), "rejected": answer("w13")}


@pytest.mark.parametrize(
    ("template", "end"),
    [
        (SPECIAL, (2,)),  # the end of turn is not the tokenizer's EOS, which is what many instruct models come with
        (TURN + "<end> \n </s>" + OPEN, (2,)),  # what stands behind it is never generated
        (PLAIN, (6,)),  # an end that is no special token
        (NOTHING, (1,)),  # none: EOS
    ],
)
def test_an_answer_ends_as_the_template_ends_it(template: str, end: tuple[int, ...]) -> None:
    assert sides(ROW, template) == ((3, 10, *((2, 5) if template == SPECIAL else _between(template)), 4), (11, 12, *end), (13, *end))


def _between(template: str) -> tuple[int, ...]:
    return {PLAIN: (6,), NOTHING: ()}.get(template, (2, 5, 1))


def test_an_end_that_is_written_out_is_not_doubled() -> None:
    assert sides({**ROW, "chosen": answer("w11 <end>")})[1] == (11, 2)


def test_a_template_that_writes_finished_turns_in_another_way() -> None:
    """It opens a turn with a thought that it leaves out of turns that are over: the answer stands behind what is opened."""
    thinks = TURN + "<end> \n " + "{% endfor %}{% if add_generation_prompt %}<bot> <think> {% endif %}"
    assert sides(ROW, thinks) == ((3, 10, 2, 5, 4, 7), (11, 12, 2), (13, 2))


def test_a_prompt_that_ends_within_the_answer_is_left_open() -> None:
    begun = [*chat("w10"), {"role": "assistant", "content": "w20"}]
    assert sides({**ROW, "prompt": begun}) == ((3, 10, 2, 5, 4, 20), (11, 12, 2), (13, 2))


def test_plain_text_ends_with_eos_and_a_prompt_does_not() -> None:
    row = {"prompt": "w10", "chosen": "w11", "rejected": "w13 </s>"}
    assert sides(row) == sides(row, eos=True) == sides(row, None) == ((0, 10), (11, 1), (13, 1))


def test_options_go_to_the_template() -> None:
    template = "{% if loud %}w40 {% endif %}{% if tools %}w41 {% endif %}" + SPECIAL
    assert sides({**ROW, "chat_template_kwargs": {"loud": True}}, template)[0][:2] == (40, 3)
    for tools in ([{"type": "function"}], '[{"type": "function"}]'):
        assert sides({**ROW, "tools": tools}, template)[0][:2] == (41, 3)


CALLS = "{% for m in messages %}{{ '<user> ' if m.role == 'user' else '<bot> ' }}{{ m.content or '' }}"
CALLS += "{% for c in m.tool_calls or [] %}{{ ' ' + c.name }}{% endfor %}<end> \n " + OPEN
LOOK = [{"role": "assistant", "content": "w11", "tool_calls": [{"name": "w40"}]}]


def test_calls_of_tools_are_part_of_an_answer() -> None:
    silent = [{"role": "assistant", "content": None, "tool_calls": [{"name": "w40"}]}]
    assert sides({**ROW, "chosen": LOOK, "rejected": silent}, CALLS)[1:] == ((11, 40, 2), (40, 2))
    arrow = [{"role": "assistant", "content": "w11", "tool_calls": None}]  # a column that other rows fill
    assert sides({**ROW, "chosen": arrow, "rejected": LOOK}, CALLS)[1:] == ((11, 2), (11, 40, 2))
    noted = [{"role": "assistant", "content": "w11", "id": "x1", "train": True}]  # nothing that is said
    assert sides({"prompt": "w10", "chosen": noted, "rejected": "w12"}, CALLS)[1] == (11, 1)
    asked = [*chat("w10"), *silent, {"role": "user", "content": "w12"}]
    assert sides({**ROW, "prompt": asked}, CALLS)[0] == (3, 10, 2, 5, 4, 40, 2, 5, 3, 12, 2, 5, 4)


def test_calls_of_tools_that_a_template_writes_in_a_way_of_its_own_are_refused() -> None:
    thinks = CALLS.replace("%}<bot> {%", "%}<bot> <think> {%")
    with pytest.raises(DataError, match="row 7: the template writes a turn with tool_calls in a way of its own"):
        sides({**ROW, "chosen": LOOK}, thinks)
    with pytest.raises(DataError, match="row 7: a completion is more than text"):
        sides({**ROW, "prompt": "w10", "chosen": LOOK}, CALLS)


def test_parts_that_are_given_as_ids_are_taken_as_they_are() -> None:
    assert sides({"prompt": "w10", "chosen_ids": [30], "rejected_ids": [31]}) == ((0, 10), (30,), (31,))
    assert sides({"prompt": chat("w10"), "chosen_ids": [30], "rejected": answer("w13")}) == ((3, 10, 2, 5, 4), (30,), (13, 2))
    # what both begin with alike is no prompt where there is one
    alike = {"chosen": "w10 w11", "rejected": "w10 w12"}
    assert sides({"prompt_ids": [9], **alike}) == ((9,), (10, 11, 1), (10, 12, 1))
    # the prompt as it was generated for, and its turns, which say how an answer ends
    both = {"prompt": chat("w10"), "prompt_ids": [9]}
    assert sides({**both, "chosen": "w11", "rejected": answer("w12")}) == ((9,), (11, 2), (12, 2))
    with pytest.raises(DataError, match="row 7 has prompt_ids and turns"):
        sides({"prompt_ids": [9], "chosen": answer("w11"), "rejected": answer("w12")})
    with pytest.raises(DataError, match="row 7 has no rejected"):
        sides({"prompt_ids": [9], "chosen": "w11"})


@pytest.mark.parametrize(
    "row",
    [
        {"chosen": [*chat("w10"), *answer("w11 w12")], "rejected": [*chat("w10"), *answer("w13")]},
        {"prompt": "w10", "chosen": [*chat("w10"), *answer("w11 w12")], "rejected": [*chat("w10"), *answer("w13")]},
    ],
)
def test_a_prompt_in_both_sides_is_what_they_begin_with_alike(row: dict[str, Any]) -> None:
    assert sides(row) == sides(ROW)


def test_a_text_prompt_in_both_sides() -> None:
    # by letters, as TRL has it, before a space that begins a word
    assert sides({"chosen": "w10 w22", "rejected": "w10 stop"}) == sides({"prompt": "w10", "chosen": "w22", "rejected": "stop"})
    assert sides({"chosen": "w10", "rejected": "w10"})[1:] == ((), ())  # dropped as empty


def test_an_id_of_zero_is_a_name() -> None:
    tokens = RowTokens(tokenizer(SPECIAL))
    assert [encode_row({**ROW, **more}, 7, tokens=tokens).name for more in ({"id": 0}, {"id": None}, {}, {"id": "x"})] == [
        "0",
        "7",
        "7",
        "x",
    ]


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"prompt": None}, "row 7 has no prompt"),
        ({"prompt": 5}, "row 7: prompt is a int"),
        ({"prompt": []}, "row 7: the prompt's turns are none"),
        ({"prompt": [{"role": "user", "content": [{"type": "text", "text": "w10"}]}]}, "row 7: the prompt's turns are none"),
        ({"prompt": ["w10"]}, "row 7: the prompt's turns are none"),
        ({"chosen": [*chat("w10"), *answer("w11")]}, "row 7: a completion must be a string or one assistant turn"),
        ({"chosen": answer(None)}, "row 7: a completion must be a string or one assistant turn"),  # type: ignore[arg-type]
        ({"rejected": None}, "row 7 has no rejected"),
        ({"tools": "{"}, "row 7: the chat template refused it"),
        ({"chat_template_kwargs": "loud"}, "row 7: the chat template refused it"),
        ({"prompt": [{"role": "system", "content": "w10"}]}, "row 7: the chat template refused it: no system turns"),
    ],
)
def test_what_is_no_row_is_refused_by_name(change: dict[str, Any], says: str) -> None:
    strict = "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system turns') }}{% endif %}{% endfor %}" + SPECIAL
    with pytest.raises(DataError, match=says) as e:
        sides({**ROW, **change}, strict)
    assert e.value.hint


def test_rows_that_are_no_mapping_and_tokenizers_without_an_end_are_refused() -> None:
    with pytest.raises(DataError, match="row 7 is a list"):
        encode_row([1], 7, tokens=RowTokens(tokenizer(SPECIAL)))  # type: ignore[arg-type]
    endless = tokenizer(SPECIAL)
    endless.eos_token = None
    with pytest.raises(DataError, match="the tokenizer has no end-of-sequence token"):
        RowTokens(endless)
