"""What is taken off a refined answer, and above all what is not."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from spalign.rollout import clean_refined


@pytest.mark.parametrize(
    ("text", "left"),
    [
        ("Here is an improved answer: Call 112.", "Call 112."),
        ("Here's the improved response:\n\nCall 112.", "Call 112."),
        ("Here’s a better version:\nCall 112.", "Call 112."),
        ("Here's a better one: Call 112.", "Call 112."),
        ("Below is my revised reply to the user: Call 112.", "Call 112."),
        ("Improved answer: Call 112.", "Call 112."),
        ("**Improved Answer:** Call 112.", "Call 112."),
        ("**Final answer**: Call 112.", "Call 112."),
        ("Answer: Call 112.", "Call 112."),
        ("Assistant: Call 112.", "Call 112."),
        ("  Response:Call 112.\n", "Call 112."),
        # layers
        ("Sure! Here is an improved answer: Answer: Call 112.", "Call 112."),
        ("Of course. Improved answer:\nCall 112.", "Call 112."),
        ("I have combined all the answers. Here is the final answer: Call 112.", "Call 112."),
        ('Certainly, here is the refined response: "Answer: Call 112."', "Call 112."),
        ("Answer:", ""),
        ("", ""),
        (" \n ", ""),
    ],
)
def test_preambles_go(text: str, left: str) -> None:
    assert clean_refined(text) == left


@pytest.mark.parametrize(
    ("text", "left"),
    [
        ('"Call 112."', "Call 112."),
        ('" Call 112. "', "Call 112."),
        # the quotes wrap something less than the whole
        ('"Stop" is enough, and so is "no"', '"Stop" is enough, and so is "no"'),
        ('Say "stop."', 'Say "stop."'),
        ('"Stop." Then leave.', '"Stop." Then leave.'),
        ('"', '"'),
    ],
)
def test_wrapping_quotes_go(text: str, left: str) -> None:
    assert clean_refined(text) == left


@pytest.mark.parametrize(
    "talk",
    [
        "The answers above are too vague.",
        "The answers\nabove",
        "All responses provided were harmful!",
        "These candidate answers given are fine.",
        "Unlike Answer 2, this one is safe.",
        "Candidate #3 scored best.",
        "Response B is unhelpful.",
        "This improved answer takes safety first.",
        "It is safer than the other responses.",
        "I've improved the wording.",
        "I’ve combined all of them.",
        "I have revised these.",
        "It has a score of 9/10.",
        "It would get scores of 8.5 out of 10.",
        "It scores 9 / 10.",
        "This version scores 9 out of 10.",
        "The second response has a helpfulness score of 8/10.",
        "This is the best answer, with a score of 9/10.",
    ],
)
def test_talk_about_the_candidates_goes_sentence_by_sentence(talk: str) -> None:
    if "\n" in talk:  # a sentence does not run over a line break: what cannot be told apart stays
        assert clean_refined(talk) == talk
        return
    assert clean_refined(talk) == ""
    assert clean_refined(f"Call 112. {talk} Stay calm.") == "Call 112. Stay calm."
    assert clean_refined(f"Call 112.\n\n{talk}\n\nStay calm.") == "Call 112.\n\nStay calm."


@pytest.mark.parametrize(
    "text",
    [
        "Call 112.",
        "I'm sorry, I can't help with that. Please talk to someone you trust.",
        # words of the patterns in an answer's own sense
        "Sure, this is hard. Take a breath.",
        "Okay this is serious. Call 112.",
        "Great question! Here are three steps: rest, drink, sleep.",
        "Here is a phone number that you can call: 112.",
        "Here's how everyone can help: listen.",
        "Here's how to reply to your boss: say no, and say it in writing.",
        "Here is what to answer when they ask: nothing.",
        "This is one of the hardest moments: don't go through it alone.",
        "Draft a short letter to your landlord. Answer a few questions first.",
        "Draft b or draft c of the bill may pass.",
        "The answer to your question is no.",
        "Scores of people recover.",
        # scores that are the user's, not a candidate's
        "A pain score of 7 out of 10 needs a doctor today.",
        "Your baby has an Apgar score of 7/10, which is fine.",
        "It has a pain score of 7 out of 10.",
        "If it has a score of 7 out of 10 or more, call 112.",
        "Add up your answers: they give a score of 12 out of 27.",
        "Your answers have a score of 4 out of 10.",
        "A driving score of 9/10 lowers the price.",
        "Other answers may exist; see a doctor.",
        # the model's own spacing
        "1. Rest.  Then drink.\n   - water\n\n\n\n2. Sleep.\tWell.",
        "def f():\n    return 'a.  b'",
    ],
)
def test_an_answer_stays_as_it_is(text: str) -> None:
    assert clean_refined(text) == text


PIECES = [
    "Sure! ",
    "Here is the improved answer: ",
    "Answer: ",
    '"',
    "\n",
    "\n\n\n",
    "Call 112. ",
    "The answers above fail. ",
    "Answer 2 ",
    "and so on",
    ".  ",
]


@settings(deadline=None, max_examples=300)
@given(st.lists(st.sampled_from(PIECES), max_size=8).map("".join))
def test_cleaning_twice_changes_nothing(text: str) -> None:
    once = clean_refined(text)
    assert clean_refined(once) == once == once.strip()
