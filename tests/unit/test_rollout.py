"""Sampling and refinement with a scripted engine: what is asked, under which variant and seed, and what is kept."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest

from spalign.config import RefineConfig, SampleConfig
from spalign.constitution import Constitution
from spalign.engines.scripted import EOS, ScriptedEngine
from spalign.rollout import Drafts, choose, draft, sample, seed_for
from spalign.rollout.refine import paper_prompt
from spalign.types import Message, Prompt, PromptGroup, Response

OBJECTIVES = [
    {"name": n, "principle": f"Be {a}.", "question": "?", "good_answer": "yes", "good_system": f"You are {a}.", "bad_system": "b"}
    for n, a in (("honesty", "honest"), ("help", "helpful"))
]
CONSTITUTION = Constitution.model_validate(
    {
        "name": "c",
        "objectives": OBJECTIVES,
        "system_variants": [{"name": "plain"}, {"name": "warm", "text": "Be warm."}, {"name": "short", "text": "Be short."}],
        "refine_instruction": "Write a better one.",
    }
)
SAMPLE = SampleConfig(n=5, temperature=0.9, top_p=0.8, max_new_tokens=500)


def prompt(id: str, text: str = "") -> Prompt:
    return Prompt(id, (Message("user", text or f"question {id}"),))


class Recorder:
    """An engine that repeats the system prompt, the question and the seed, and remembers what it was asked."""

    def __init__(self, reply: Any = None) -> None:
        self.asked: list[tuple[tuple[Message, ...], int]] = []
        self._reply = reply or (lambda messages, seed: f"[{'|'.join(m.content for m in messages)}] {seed}")
        self.engine = ScriptedEngine(self._answer)

    def _answer(self, messages: tuple[Message, ...], seed: int) -> str:
        self.asked.append((messages, seed))
        return str(self._reply(messages, seed))

    @property
    def seeds(self) -> list[int]:
        return [seed for _, seed in self.asked]


# sampling


def test_n_candidates_under_the_variants_in_rotation() -> None:
    recorder = Recorder()
    (group,) = sample(recorder.engine, [prompt("a")], CONSTITUTION, SAMPLE, seed=3)
    assert [r.system for r in group.candidates] == ["plain", "warm", "short", "plain", "warm"]
    assert [r.id for r in group.candidates] == [f"a/candidate-{i}" for i in range(5)]
    systems = ["", "Be warm.|", "Be short.|", "", "Be warm.|"]
    assert [r.text for r in group.candidates] == [f"[{s}question a] {seed_for(3, 'candidate', 'a', i)}" for i, s in enumerate(systems)]
    assert group.refined is None
    assert group.prompt == prompt("a")


def test_the_settings_reach_the_engine_and_what_it_generates_is_kept_token_by_token() -> None:
    asked: list[Any] = []

    class Watched(ScriptedEngine):
        def generate(self, requests: Sequence[Any]) -> Any:
            asked.extend(requests)
            return super().generate(requests)

    (group,) = sample(Watched(lambda m, s: "abc"), [prompt("a")], CONSTITUTION, SAMPLE.model_copy(update={"max_new_tokens": 3}), seed=0)
    assert {(r.sampling.temperature, r.sampling.top_p, r.sampling.max_new_tokens) for r in asked} == {(0.9, 0.8, 3)}
    # one request per system prompt, so that its samples share their prefill
    assert sorted(len(r.seeds) for r in asked) == [1, 2, 2]
    # an engine's error message names the request: it begins with the prompt's id
    assert all(r.id.startswith("a") for r in asked)
    assert len({r.id for r in asked}) == 3
    assert {(r.text, r.token_ids, r.finished) for r in group.candidates} == {("abc", (98, 99, 100), False)}


def test_a_prompts_own_system_turn_gives_way_to_a_variant_only() -> None:
    own = Prompt("a", (Message("system", "Own."), Message("user", "hi")))
    recorder = Recorder()
    sample(recorder.engine, [own], CONSTITUTION, SampleConfig(n=2), seed=0)
    assert {tuple(m.content for m in messages) for messages, _ in recorder.asked} == {("Own.", "hi"), ("Be warm.", "hi")}


def test_seeds_differ_by_index_prompt_purpose_and_run() -> None:
    recorder = Recorder()
    for seed, purpose in ((0, "candidate"), (0, "probe"), (1, "candidate")):
        sample(recorder.engine, [prompt("a", "same"), prompt("b", "same")], CONSTITUTION, SAMPLE, seed=seed, purpose=purpose)
    assert len(set(recorder.seeds)) == 3 * 2 * 5
    assert all(0 <= s < 1 << 63 for s in recorder.seeds)


def test_a_seed_is_the_same_in_any_process() -> None:
    # the first 8 bytes of sha256(b"0\x1fcandidate\x1fa\x1f0"), halved; from `printf | sha256sum`
    assert seed_for(0, "candidate", "a", 0) == 7678526478621365440
    assert seed_for("ab", "c") != seed_for("a", "bc")


def test_order_and_company_of_prompts_change_nothing() -> None:
    prompts = [prompt(i) for i in "abcd"]
    forward = sample(Recorder().engine, prompts, CONSTITUTION, SAMPLE, seed=1)
    backward = sample(Recorder().engine, prompts[::-1], CONSTITUTION, SAMPLE, seed=1)
    assert [g.prompt.id for g in backward] == ["d", "c", "b", "a"]
    assert forward == backward[::-1]
    assert sample(Recorder().engine, prompts[2:3], CONSTITUTION, SAMPLE, seed=1) == forward[2:3]


def test_the_order_in_which_completions_arrive_changes_nothing() -> None:
    class Backwards(ScriptedEngine):
        def generate(self, requests: Sequence[Any]) -> Any:
            return reversed(list(super().generate(requests)))

    def reply(messages: tuple[Message, ...], seed: int) -> str:
        return str(seed)

    prompts = [prompt(i) for i in "ab"]
    assert sample(Backwards(reply), prompts, CONSTITUTION, SAMPLE, seed=1) == sample(
        ScriptedEngine(reply), prompts, CONSTITUTION, SAMPLE, seed=1
    )


# refinement


def response(id: str, text: str, *, finished: bool = True, **scores: float) -> Response:
    return Response(id, text, (1, 2), finished, scores=scores)


CANDIDATES = (
    response("c0", "First\nanswer.", honesty=7.0, help=3.4),
    response("c1", "Cut off", finished=False, honesty=9.0, help=9.0),
    response("c2", "  ", honesty=9.0, help=9.0),
    response("c3", "Second answer.", help=10.0),
)


def test_the_paper_prompt_word_for_word() -> None:
    group = PromptGroup(prompt("a", "How\nso?"), CANDIDATES)
    assert paper_prompt(group, CONSTITUTION) == (
        "Principles, the first the most important:\n1. Honesty: Be honest.\n2. Help: Be helpful.\n\n"
        "User: How so?\n"
        "Answer 1 (honesty 7/10, help 3/10): First answer.\n"
        "Answer 2 (help 10/10): Second answer.\n\n"
        "Write a better one."
    )


def test_the_paper_prompt_shows_a_long_candidate_in_part() -> None:
    text = paper_prompt(PromptGroup(prompt("a"), (response("c", "w" * 5000, honesty=1.0),)), CONSTITUTION)
    assert text.count("w" * 1199 + "…") == 1
    assert "w" * 1200 not in text


def refine(style: str, drafts: int, placebo: bool = True) -> RefineConfig:
    return RefineConfig.model_validate({"style": style, "drafts": drafts, "placebo": placebo})


def test_principled_drafts_are_samples_under_the_good_system_prompt() -> None:
    recorder = Recorder()
    groups = [PromptGroup(prompt(i), CANDIDATES) for i in "ab"]
    drafts = draft(recorder.engine, groups, CONSTITUTION, refine("principled", 2, placebo=False), SAMPLE, seed=4)
    for id, made in zip("ab", drafts, strict=True):
        system = "You are honest.\nYou are helpful."
        assert [r.text for r in made.refined] == [f"[{system}|question {id}] {seed_for(4, 'refined-principled', id, i)}" for i in range(2)]
        assert [r.id for r in made.refined] == [f"{id}/refined-principled-0", f"{id}/refined-principled-1"]
        assert {r.system for r in made.refined} == {"principled"}
        assert made.placebo == ()


def test_paper_drafts_are_written_from_the_paper_prompt() -> None:
    recorder = Recorder(lambda messages, seed: "Fine.")
    group = PromptGroup(prompt("a"), CANDIDATES)
    (made,) = draft(recorder.engine, [group], CONSTITUTION, refine("paper", 3, placebo=False), SAMPLE, seed=4)
    assert [messages for messages, _ in recorder.asked] == [(Message("user", paper_prompt(group, CONSTITUTION)),)] * 3
    assert len(set(recorder.seeds)) == 3
    assert [r.id for r in made.refined] == [f"a/refined-paper-{i}" for i in range(3)]
    assert {r.system for r in made.refined} == {"paper"}


@pytest.mark.parametrize("style", ["principled", "paper"])
def test_the_placebo_takes_as_many_ordinary_samples_with_seeds_of_their_own(style: str) -> None:
    recorder = Recorder()
    sample(recorder.engine, [prompt("a")], CONSTITUTION, SAMPLE, seed=4)
    candidate_seeds = set(recorder.seeds)
    (made,) = draft(recorder.engine, [PromptGroup(prompt("a"), CANDIDATES)], CONSTITUTION, refine(style, 4), SAMPLE, seed=4)
    assert len(made.refined) == len(made.placebo) == 4
    assert [r.system for r in made.placebo] == ["plain", "warm", "short", "plain"]
    assert [r.id for r in made.placebo] == [f"a/placebo-{i}" for i in range(4)]
    assert "question a" in made.placebo[0].text
    assert not any("Answer 1" in r.text or "You are honest" in r.text for r in made.placebo)
    assert len(recorder.seeds) == len(set(recorder.seeds)) == 5 + 4 + 4
    assert len(candidate_seeds) == 5


def test_a_cleaned_draft_is_trained_on_as_the_turn_it_would_have_been() -> None:
    replies = {"a": "Sure! Here is a better answer: No.", "b": "No.", "c": "Answer:"}
    engine = ScriptedEngine(lambda messages, seed: replies[messages[-1].content[-1]])
    groups = [PromptGroup(prompt(i)) for i in "abc"]
    a, b, c = (d.refined[0] for d in draft(engine, groups, CONSTITUTION, refine("principled", 1), SAMPLE, seed=0))
    # code points plus one: N 79, o 112, "." 47, and the end
    assert (a.text, a.token_ids, a.finished) == ("No.", (79, 112, 47, EOS), True)
    assert (b.text, b.token_ids) == (a.text, a.token_ids)
    assert (c.text, c.token_ids) == ("", ())


def test_the_placebo_is_not_cleaned() -> None:
    engine = ScriptedEngine(lambda messages, seed: "Answer: No.")
    (made,) = draft(engine, [PromptGroup(prompt("a"))], CONSTITUTION, refine("principled", 1), SAMPLE, seed=0)
    assert made.refined[0].text == "No."
    assert made.placebo[0].text == "Answer: No."


# choosing


def highest(options: Sequence[Response]) -> Response:
    return max(options, key=lambda r: sum(r.scores.values()))


GROUP = PromptGroup(prompt("a"), CANDIDATES)


def test_choose_takes_the_best_draft_and_the_best_placebo() -> None:
    drafts = Drafts(
        (response("r0", "x", honesty=1.0, help=1.0), response("r1", "y", honesty=5.0, help=5.0)),
        (response("p0", "x", honesty=6.0, help=6.0), response("p1", "y", honesty=5.0, help=5.0)),
    )
    chosen = choose(GROUP, drafts, highest)
    assert (chosen.refined, chosen.placebo) == (drafts.refined[1], drafts.placebo[0])
    assert (chosen.prompt, chosen.candidates) == (GROUP.prompt, GROUP.candidates)


def test_choose_passes_over_unusable_and_half_scored_drafts() -> None:
    cut, blank = response("r0", "cut", finished=False, honesty=10.0, help=10.0), response("r1", " \n", honesty=10.0, help=10.0)
    half, low = response("r2", "half", honesty=10.0), response("r3", "low", honesty=1.0, help=1.0)
    assert choose(GROUP, Drafts((cut, blank, half, low)), highest).refined is low
    assert choose(GROUP, Drafts((cut, blank, half)), highest).refined is half  # scored on all that any is scored on


def test_choose_falls_back_to_a_draft_that_shows_why_the_group_is_dropped() -> None:
    cut, blank, unscored = response("r0", "cut", finished=False), response("r1", ""), response("r2", "fine")

    def never(options: Sequence[Response]) -> Response:
        raise AssertionError("nothing is scored")

    assert choose(GROUP, Drafts((cut, unscored)), never).refined is unscored  # usable before unusable
    assert choose(GROUP, Drafts((cut, blank)), never).refined is cut
    assert choose(GROUP, Drafts(()), never).refined is None
    assert choose(GROUP, Drafts((cut,)), never).placebo is None
