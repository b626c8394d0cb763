"""4-denoise and 5-pair stream over parts, and come to exactly what plain code comes to that has all groups in memory."""

from __future__ import annotations

import hashlib
import json
import math
from collections import Counter
from itertools import permutations
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from spalign.config import PairsConfig, RunConfig, config_from
from spalign.constitution import Objective, load_constitution
from spalign.engines.scripted import ScriptedEngine
from spalign.errors import RunFolderError, SpalignError
from spalign.pipeline import parts as parts_module
from spalign.pipeline.context import Context, Policy
from spalign.pipeline.judging import Judging
from spalign.pipeline.pairing import denoise_step, pair_step
from spalign.pipeline.workers import in_order
from spalign.preference import best, consistent_yield, denoise, is_scored, levels, make_pairs, resolve_tau, usable, weights
from spalign.report import Progress
from spalign.rollout import Drafts, choose
from spalign.selfeval import Judgement
from spalign.store import Part, RunFolder, Stage, run_in_parts
from spalign.types import DropReason, Message, PreferencePair, Prompt, PromptGroup, Response, group_to_json, response_to_json

NAMES = ("first", "second", "third")
Asked = tuple[PromptGroup, Drafts]


def objective(name: str, threshold: float | None = None, resolution: float | None = None) -> Objective:
    text = {"principle": "p", "question": "q", "good_system": "g", "bad_system": "b"}
    return Objective(name=name, good_answer="yes", threshold=threshold, resolution=resolution, **text)


# what the steps should come to


def plain_pairs(group: PromptGroup, objectives: list[Objective], delta: float) -> list[PreferencePair]:
    """Eq. 2 over all ordered pairs."""
    distinct: dict[tuple[int, ...], Response] = {}
    for r in sorted(usable((*group.candidates, group.refined), objectives), key=lambda r: r.id):
        distinct.setdefault(r.token_ids, r)
    found = []
    for y, z in permutations(distinct.values(), 2):
        up, down = levels(y, objectives), levels(z, objectives)
        differences = [a - b for a, b in zip(up, down, strict=True)]
        margin, gap = math.fsum(map(abs, differences)), abs(math.fsum(differences))
        if up > down and margin >= delta - 1e-9:
            by = next(o.name for o, d in zip(objectives, differences, strict=True) if d)
            found.append(PreferencePair(group.prompt, y, z, margin, gap if gap > 1e-9 else 0.0, by))
    return sorted(found, key=rank)


def rank(p: PreferencePair) -> tuple[float, str, str, str]:
    return -p.margin, p.prompt.id, p.chosen.id, p.rejected.id


def sign(p: PreferencePair) -> int:
    a, b = len(p.chosen.token_ids), len(p.rejected.token_ids)
    return (a > b) - (a < b)


def plain_selection(groups: list[list[PreferencePair]], config: PairsConfig) -> list[list[PreferencePair]]:
    """The cap by taking turns; then the balance by sorting all pairs of the run."""
    capped = []
    for pairs in groups:
        left, taken = list(pairs), []
        turn = next((s for s in map(sign, pairs) if s), 1)
        while left and (config.max_per_prompt is None or len(taken) < config.max_per_prompt):
            kinds = (turn, 0, -turn) if config.balance_length and config.max_per_prompt and len(pairs) > config.max_per_prompt else (None,)
            p = next(p for kind in kinds for p in left if kind is None or sign(p) == kind)
            left.remove(p)
            taken.append(p)
            turn = -turn
        capped.append(sorted(taken, key=rank))
    if not config.balance_length:
        return capped
    excess = sum(sign(p) for pairs in capped for p in pairs)
    frequent = sorted((p for pairs in capped for p in pairs if sign(p) == (1 if excess > 0 else -1)), key=rank, reverse=True)
    left = Counter(p.prompt.id for pairs in capped for p in pairs)
    gone: list[PreferencePair] = []
    for p in frequent:
        if len(gone) < abs(excess) and left[p.prompt.id] > 1:
            gone.append(p)
            left[p.prompt.id] -= 1
    names = {(p.prompt.id, p.id) for p in gone}
    return [[p for p in pairs if (p.prompt.id, p.id) not in names] for pairs in capped]


def plain(asked: list[Asked], objectives: list[Objective], config: RunConfig) -> dict[str, Any]:
    def pick(drafts: Any) -> Response:
        scored = [r for r in drafts if is_scored(r, objectives)]
        return best(scored, objectives) if scored else drafts[0]

    groups = [choose(g, drafts, pick) for g, drafts in asked]
    verdicts = denoise(groups, objectives, config.denoise)
    kept = [v.group for v in verdicts if v.kept]
    made = [plain_pairs(g, objectives, config.pairs.delta) for g in kept]
    assert made == [make_pairs(g, objectives, config.pairs) for g in kept]
    chosen = plain_selection(made, config.pairs)
    pairs = [p for some in chosen for p in some]
    dets = [v.det for v in verdicts if v.det is not None and v.reason in (None, DropReason.UNSTABLE)]
    dropped = Counter(str(v.reason) for v in verdicts if v.reason)
    if without := sum(not some for some in chosen):
        dropped[str(DropReason.BELOW_MARGIN)] += without
    every = [r for g in groups for r in g.candidates]
    given_, capped = sum(map(len, made)), sum(min(len(m), config.pairs.max_per_prompt or len(m)) for m in made)
    return {
        "verdicts": [(v.group.prompt.id, v.reason, v.det, v.detail) for v in verdicts],
        "tau": resolve_tau(dets, config.denoise) if dets else None,
        "consistency": {
            of: dict(zip(("passed", "tested"), consistent_yield(groups, objectives, config.denoise, of=of), strict=True))  # type: ignore[arg-type]
            for of in ("refined", "placebo")
        },
        "rows": list(zip(pairs, weights([p.gap for p in pairs], config.train.alpha), strict=True)),
        "funnel": {
            "prompts": len(groups),
            "kept": len(groups) - dropped.total(),
            "pairs": len(pairs),
            "dropped": dict(dropped),
            "responses": {
                "candidates": len(every),
                "unfinished": sum(not r.finished for r in every),
                "empty": sum(not r.text.strip() for r in every),
            },
            "pairs_removed": {"above the cap": given_ - capped, "to balance length": capped - len(pairs)},
            "decided_by": dict(Counter(p.decided_by for p in pairs)),
            "winner_shorter": sum(sign(p) < 0 for p in pairs),
        },
    }


# the steps


def no_model(_: str) -> Any:
    raise AssertionError("nothing here needs a model")


class Steps:
    """The stages of `asked` on disk in parts of `size`, and the two steps over them."""

    def __init__(self, folder: Path, asked: list[Asked], objectives: list[Objective], size: int, model: Any = no_model, **options: Any):
        self.config = config_from({"name": "t", "model": "m", "runs_dir": str(folder), **options})
        run_folder = RunFolder(folder)
        run = Context(self.config, load_constitution("harmless_helpful"), run_folder, Progress(quiet=True), [], [], no_model, no_model)
        policy = Policy("m", "m", model)
        judging = Judging(policy, tuple(objectives), {o.name: Judgement.unchecked("yes_no") for o in objectives})
        self.scored = run_folder.stage("1/2-evaluate", {"shard_size": size})
        self.refined = run_folder.stage("1/3-refine", {"from": self.scored.digest})
        run_in_parts(self.scored, asked, size, lambda some: [group_to_json(g) for g, _ in some])
        run_in_parts(self.refined, asked, size, lambda some: [drafts_row(g, d) for g, d in some])
        self.denoise = denoise_step(run, "1", judging, self.config, self.scored, self.refined)
        self.pair = pair_step(run, "1", policy, judging, self.config, self.scored, self.refined, self.denoise.stage)

    def do(self) -> dict[str, Any]:
        denoised, paired = self.denoise.do(), self.pair.do()
        verdicts = [(r["prompt_id"], r["reason"], r["det"], r["detail"]) for r in self.denoise.stage.rows()]
        return {
            "verdicts": verdicts,
            "tau": denoised["tau"],
            "consistency": denoised["consistency"],
            "rows": list(self.pair.stage.rows()),
            "funnel": paired["funnel"],
        }


def drafts_row(group: PromptGroup, drafts: Drafts) -> dict[str, Any]:
    sides = {"refined": drafts.refined, "placebo": drafts.placebo}
    return {"prompt_id": group.prompt.id, **{k: [response_to_json(r) for r in v] for k, v in sides.items()}}


def row(pair: PreferencePair, weight: float, prompt_ids: tuple[int, ...]) -> dict[str, Any]:
    return {
        "id": pair.id,
        "prompt_id": pair.prompt.id,
        "topic": pair.prompt.topic,
        "intent": pair.prompt.intent,
        "prompt": [{"role": m.role, "content": m.content} for m in pair.prompt.messages],
        "chosen": [{"role": "assistant", "content": pair.chosen.text}],
        "rejected": [{"role": "assistant", "content": pair.rejected.text}],
        "scores_chosen": pair.chosen.scores,
        "scores_rejected": pair.rejected.scores,
        "margin": pair.margin,
        "gap": pair.gap,
        "weight": weight,
        "decided_by": pair.decided_by,
        "prompt_ids": list(prompt_ids),
        "chosen_ids": list(pair.chosen.token_ids),
        "rejected_ids": list(pair.rejected.token_ids),
    }


@st.composite
def runs(draw: st.DrawFn) -> tuple[list[Asked], list[Objective]]:
    k = draw(st.integers(1, 3))
    thresholds = st.sampled_from([None, None, 6.0])
    objectives = [objective(n, draw(thresholds), draw(st.sampled_from([None, 0.5]))) for n in NAMES[:k]]
    scores = st.integers(0, 20).map(lambda n: n / 2) | st.floats(0, 10).map(lambda x: round(x, 3))  # ties, and none
    texts = st.sampled_from(["fine", "fine", "fine", "  ", "h\u00e9 \u2028\x1b[2J"])

    def response(name: str) -> Response:
        given_ = {o.name: draw(scores) for o in objectives if draw(st.integers(0, 19))}
        tokens = tuple(draw(st.lists(st.integers(0, 3), max_size=4)))
        return Response(name, draw(texts), tokens, draw(st.integers(0, 9)) > 0, scores=given_, spreads=given_)

    asked = []
    for i in range(draw(st.integers(1, 7))):
        prompt = Prompt(f"p{(i * 7) % 5}{i}", (Message("user", f"ask {i} \u00e9"),), "topic", "legitimate")
        candidates = tuple(response(f"{prompt.id}/candidate-{n}") for n in range(draw(st.integers(0, 5))))
        sides = [tuple(response(f"{prompt.id}/{kind}-{n}") for n in range(draw(st.integers(0, 2)))) for kind in ("refined", "placebo")]
        asked.append((PromptGroup(prompt, candidates, prompt_ids=(i, 5)), Drafts(*sides)))
    return asked, objectives


@settings(max_examples=150, deadline=None)
@given(
    runs(),
    st.integers(1, 4),
    st.sampled_from(["90%", "32%", 1.0, None]),
    st.sampled_from(["strict", "above_mean"]),
    st.sampled_from([None, 1, 3]),
    st.booleans(),
    st.sampled_from([0.0, 1.0]),
)
def test_streaming_comes_to_the_same_as_plain_code(tmp_path_factory, run, size, tau, consistency, cap, balance, alpha):
    asked, objectives = run
    options = {
        "denoise": {"tau": tau, "consistency": consistency},
        "pairs": {"max_per_prompt": cap, "balance_length": balance},
        "train": {"alpha": alpha},
    }
    steps = Steps(tmp_path_factory.mktemp("run"), asked, objectives, size, **options)
    try:
        expected = plain(asked, objectives, steps.config)
    except SpalignError as e:  # all gaps 0: the weights of Eq. 3 are 0/0
        with pytest.raises(type(e)) as same:
            steps.do()
        assert str(same.value) == str(e)
        return
    got = steps.do()
    ids = {g.prompt.id: g.prompt_ids for g, _ in asked}
    expected["rows"] = [row(p, w, ids[p.prompt.id]) for p, w in expected["rows"]]
    assert got == expected


def scattered(a: int, b: int) -> dict[str, float]:
    return {"first": float(a % 7), "second": float(b % 8)}


def some_groups(count: int) -> list[Asked]:
    """Groups of which most are kept: scores that scatter, and a refined response above all."""
    asked = []
    for i in range(count):
        prompt = Prompt(f"p{i}", (Message("user", f"ask {i}"),))
        answers = [
            Response(
                f"p{i}/c{n}", f"text {n}", (n,) * (1 + (i + n) % 3), True, scores={"first": (3 * n + i) % 7, "second": (5 * n + i) % 8}
            )
            for n in range(4)
        ]
        drafts = Drafts((Response(f"p{i}/r", "better", (9, 9), True, scores={"first": 9.0, "second": 9.0}),))
        asked.append((PromptGroup(prompt, tuple(answers), prompt_ids=(i,)), drafts))
    return asked


TWO = [objective("first"), objective("second")]


def parts(steps: Steps) -> list[bytes]:
    return [p.read_bytes() for s in (steps.denoise.stage, steps.pair.stage) for p in s.parts()]


def test_several_processes_write_the_same_bytes_as_one(tmp_path, monkeypatch):
    one = Steps(tmp_path / "one", some_groups(25), TWO, 3)
    one.do()
    monkeypatch.setattr(parts_module, "MANY", 1)
    monkeypatch.setattr(parts_module, "cores", lambda: 3)
    several = Steps(tmp_path / "several", some_groups(25), TWO, 3)
    assert several.do()["funnel"]["pairs"] > 0
    assert parts(several) == parts(one)


def test_parts_are_closed_when_they_are_large_and_old_ones_of_an_interrupted_attempt_go(tmp_path, monkeypatch):
    whole = Steps(tmp_path / "one", some_groups(10), TWO, 2)
    whole.do()
    monkeypatch.setattr("spalign.store.stages.PART_BYTES", 2000)
    small = Steps(tmp_path / "small", some_groups(10), TWO, 2)
    small.pair.stage.begin()
    for n in range(50):  # left by a kill
        small.pair.stage.write_part(n, [{"id": "old"}])
    small.do()
    files = [p.read_bytes() for p in small.pair.stage.parts()]
    assert len(files) > 1
    assert b"".join(files) == whole.pair.stage.part(0).read_bytes()


def test_rows_of_an_earlier_version_without_prompt_ids_are_read(tmp_path):
    new = Steps(tmp_path / "new", some_groups(6), TWO, 2)
    new.do()
    engine = ScriptedEngine(lambda messages, seed: "")
    old = Steps(tmp_path / "old", some_groups(6), TWO, 2, model=lambda _: engine)
    rewrite(old.scored, lambda r: {k: v for k, v in r.items() if k != "prompt_ids"})
    old.do()
    expected = [{**r, "prompt_ids": engine.encode_chat([Message("user", r["prompt"][0]["content"])])} for r in new.pair.stage.rows()]
    assert list(old.pair.stage.rows()) == expected


def rewrite(stage: Stage, change: Any) -> None:
    """The finished stage with other rows."""
    for n, part in enumerate(stage.parts()):
        stage.write_part(n, [change(json.loads(line)) for line in part.read_bytes().splitlines()])
    facts = {k: v for k, v in (stage.manifest() or {}).items() if k not in ("digest", "inputs", "parts", "versions")}
    stage.finish(**facts)


def test_a_denoise_stage_of_an_earlier_version_says_what_to_do(tmp_path):
    steps = Steps(tmp_path, some_groups(2), TWO, 2)
    steps.denoise.do()
    steps.denoise.stage.finish(groups=2, kept=2, dropped={}, tau=None)
    with pytest.raises(RunFolderError, match=r"4-denoise: an earlier version of spalign made it\n  fix: remove this folder"):
        steps.pair.do()


def test_stages_of_other_prompts_are_refused(tmp_path):
    steps = Steps(tmp_path, some_groups(2), TWO, 2)
    rewrite(steps.refined, lambda r: {**r, "prompt_id": "other"})
    with pytest.raises(RunFolderError, match=r"3-refine/part-00000\.jsonl: is of other prompts"):
        steps.denoise.do()


def test_a_row_that_is_none_of_ours_is_refused(tmp_path):
    steps = Steps(tmp_path, some_groups(2), TWO, 2)
    rewrite(steps.scored, lambda r: {"prompt": 3})
    with pytest.raises(RunFolderError, match=r"a row of the run cannot be read: .*\n  fix: "):
        steps.denoise.do()


def test_half_a_surrogate_pair_is_read_as_a_question_mark(tmp_path):
    asked = [
        (g.replace(prompt=Prompt(g.prompt.id, (Message("user", "half \ud800"),))), Drafts(tuple(as_half(r) for r in d.refined)))
        for g, d in some_groups(3)
    ]
    rows = Steps(tmp_path, asked, TWO, 2).do()["rows"]
    assert {r["prompt"][0]["content"] for r in rows} == {"half \ud800"}  # what nothing looks at stays as it is
    assert "? better" in {r["chosen"][0]["content"] for r in rows}


def as_half(r: Response) -> Response:
    return Response(r.id, "\udfff better", r.token_ids, True, scores=r.scores)


# workers


def test_results_come_in_order_whatever_the_number_of_processes():
    for processes in (1, 2, 5):
        assert list(in_order(abs, list(range(-7, 0)), processes)) == [7, 6, 5, 4, 3, 2, 1]
    assert list(in_order(abs, [], 2)) == []


def test_tasks_and_results_larger_than_a_pipe():
    big = [bytes([i]) * 1_000_000 for i in range(5)]
    assert list(in_order(bytes.upper, big, 2)) == [b.upper() for b in big]


def test_an_error_in_a_worker_is_raised_here_with_its_fix():
    with pytest.raises(RunFolderError, match=r"no such thing\n  fix: do this"):
        list(in_order(_fail, [1, 2], 2))


def test_a_worker_that_is_killed_says_so():
    with pytest.raises(SpalignError, match=r"a worker process ended with code -9\n  fix: .*memory"):
        list(in_order(_die, [1, 2, 3], 2))


def _fail(_: int) -> None:
    raise RunFolderError("no such thing", hint="do this")


def _die(n: int) -> int:
    import os
    import signal

    if n == 2:
        os.kill(os.getpid(), signal.SIGKILL)
    return n


def test_a_part_with_fewer_rows_than_the_one_beside_it_is_named(tmp_path):
    parts = []
    for name, data in (("scored", b"{}\n{}\n"), ("refined", b"{}\n")):
        (tmp_path / name).write_bytes(data)
        parts.append(Part(tmp_path / name, hashlib.sha256(data).hexdigest()))
    for read in (parts_module.read_groups(*parts), parts_module.kept_groups(*parts, b"{}\n{}\n")):
        with pytest.raises(RunFolderError, match=r"refined: has not as many rows as the stages beside it\n  fix: remove"):
            next(read)
