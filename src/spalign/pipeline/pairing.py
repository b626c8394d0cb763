"""4-denoise and 5-pair: part by part, by several processes where there are many prompts, in memory of about 0.3 KB a prompt.

Each goes over the parts, decides what only the whole run decides (tau; the balance of lengths and the mean gap), and then writes. The
functions of `spalign.preference` say what is kept; here stands only how the rows come to them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Container, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice
from typing import Any, TypeVar

import msgspec
import numpy as np
from numpy.typing import NDArray

from spalign.config import DenoiseConfig, PairsConfig, RunConfig
from spalign.constitution import Objective
from spalign.errors import RunFolderError
from spalign.pipeline.context import Context, Policy, Step
from spalign.pipeline.judging import Judging
from spalign.pipeline.rows import (
    StoredDrafts,
    StoredGroup,
    StoredResponse,
    drafts_decoder,
    group_decoder,
    pair_row,
    read_row,
    verdict_decoder,
)
from spalign.pipeline.workers import cores, in_order
from spalign.preference import (
    best,
    capped,
    check,
    is_scored,
    longer,
    pair_places,
    passes,
    places_of,
    resolve_tau,
    unbalanced,
    unstable,
    usable_candidates,
    weights,
)
from spalign.rollout import Drafts, choose
from spalign.store import Part, Stage, encode_row
from spalign.types import DropReason, Message, Prompt, PromptGroup, Response

T = TypeVar("T")
MANY = 20_000
"""From so many prompts on, several processes do the work."""
COUNTS = ("candidates", "unfinished", "empty", "refined passed", "refined tested", "placebo passed", "placebo tested")


def denoise_step(run: Context, base: str, judging: Judging, config: RunConfig, scored: Stage, refined: Stage) -> Step:
    """4-denoise: both criteria, one verdict a group."""
    stage = run.folder.stage(
        f"{base}/4-denoise", {"from": refined.digest, "levels": judging.levels, "denoise": config.denoise.model_dump()}
    )

    def do() -> dict[str, Any]:
        stage.begin()
        judged = list(_over(partial(_judge_part, judging.resolved(), config.denoise), list(_both(scored, refined)), scored))
        dets = [det for part in judged for _, det in part.kept]
        tau = resolve_tau(dets, config.denoise) if dets else None
        dropped = sum((part.dropped for part in judged), Counter[str]())
        stage.write_stream(_bounded(part, tau, dropped) for part in judged)
        groups = sum(part.groups for part in judged)
        counts = {name: sum(part.counts[name] for part in judged) for name in COUNTS}
        return stage.finish(
            groups=groups,
            kept=groups - dropped.total(),
            dropped=dict(dropped),
            tau=tau,
            consistency={kind: {what: counts[f"{kind} {what}"] for what in ("passed", "tested")} for kind in ("refined", "placebo")},
            responses={name: counts[name] for name in ("candidates", "unfinished", "empty")},
        )

    return Step("denoise", stage, do)


def pair_step(
    run: Context, base: str, policy: Policy, judging: Judging, config: RunConfig, scored: Stage, refined: Stage, denoised: Stage
) -> Step:
    """5-pair: preference pairs in TRL's format, with the exact tokens, scores, margins and weights."""
    inputs = {
        "from": denoised.digest,
        "levels": judging.levels,
        "pairs": config.pairs.model_dump(),
        "alpha": config.train.alpha,
        "policy": policy.digest,
    }
    stage = run.folder.stage(f"{base}/5-pair", inputs)

    def do() -> dict[str, Any]:
        facts, objectives = denoised.manifest() or {}, judging.resolved()
        if "responses" not in facts:
            raise RunFolderError(
                f"{denoised.folder}: an earlier version of spalign made it",
                hint="remove this folder to have the stage done again; it is quick",
            )
        stage.begin()
        parts = list(_with_verdicts(scored, refined, denoised))
        made = list(_over(partial(_pair_part, objectives, config.pairs), parts, scored))
        chosen = _selected(made, config)
        tasks = [(*part, pairs) for part, pairs in zip(parts, chosen, strict=True)]
        encode = _encoder(policy, scored)
        render = partial(_render_part, [o.name for o in objectives], encode)
        stage.write_stream(_over(render, tasks, scored, here=encode is not None))
        dropped = Counter(facts["dropped"])
        if without := facts["kept"] - sum(len(part.names) for part in made):
            dropped[str(DropReason.BELOW_MARGIN)] = without
        decided = sum((Counter(objectives[k].name for k in pairs["decided_by"].tolist()) for pairs in chosen), Counter[str]())
        total, kept = sum(part.given for part in made), sum(len(pairs) for pairs in chosen)
        under_cap = sum(len(part.pairs) for part in made)
        return stage.finish(
            funnel={
                "prompts": facts["groups"],
                "kept": facts["groups"] - dropped.total(),
                "pairs": kept,
                "dropped": dict(sorted(dropped.items())),
                "responses": facts["responses"],
                "pairs_removed": {"above the cap": total - under_cap, "to balance length": under_cap - kept},
                "decided_by": dict(decided),
                "winner_shorter": sum(int((pairs["longer"] < 0).sum()) for pairs in chosen),
            }
        )

    return Step("pair", stage, do)


def _both(scored: Stage, refined: Stage) -> Iterator[tuple[Part, Part]]:
    """The parts of both stages, which hold the same prompts: 3-refine was made part by part from 2-evaluate."""
    return zip(scored.finished_parts(), refined.finished_parts(), strict=True)


def _with_verdicts(scored: Stage, refined: Stage, denoised: Stage) -> Iterator[tuple[Part, Part, bytes]]:
    """The parts with their verdicts."""
    verdicts = (line for part in denoised.finished_parts() for line in part.lines())
    size = scored.inputs["shard_size"]
    for mine, drafts in _both(scored, refined):
        yield mine, drafts, b"\n".join(islice(verdicts, size))


def _over(function: Callable[[T], Any], tasks: Sequence[T], scored: Stage, *, here: bool = False) -> Iterator[Any]:
    """`function` of every task; by this process alone where it has to be `here`."""
    many = (scored.manifest() or {})["items"] >= MANY
    return in_order(function, tasks, cores() if many and not here else 1)


# 4-denoise


@dataclass(frozen=True, slots=True)
class _Judged:
    """What denoising says of one part under no tau: its rows; of those kept so far, which row and det(Sigma); reasons; and counts."""

    lines: bytes
    kept: list[tuple[int, float]]
    dropped: Counter[str]
    groups: int
    counts: Counter[str]


def _judge_part(objectives: Sequence[Objective], config: DenoiseConfig, parts: tuple[Part, Part]) -> _Judged:
    pick = partial(_best_scored, objectives=objectives)
    lines: list[bytes] = []
    kept, dropped, counts = [], Counter[str](), Counter[str](dict.fromkeys(COUNTS, 0))
    for stored, drafts in _read(*parts):
        group = choose(_group(stored), Drafts(drafts.refined, drafts.placebo), pick)
        verdict = check(group, objectives, config, None)
        reason = str(verdict.reason) if verdict.reason else None
        if reason:
            dropped[reason] += 1
        elif verdict.det is not None:
            kept.append((len(lines), verdict.det))
        names = {"refined": group.refined.id if group.refined else None, "placebo": group.placebo.id if group.placebo else None}
        lines.append(encode_row({"prompt_id": stored.prompt.id, "reason": reason, "det": verdict.det, "detail": verdict.detail, **names}))
        counts["candidates"] += len(group.candidates)
        counts["unfinished"] += sum(not r.finished for r in group.candidates)
        counts["empty"] += sum(not r.text.strip() for r in group.candidates)
        of_placebo = passes(group.placebo, usable_candidates(group, objectives), objectives, config.consistency) if group.placebo else None
        for kind, passed in (("refined", verdict.consistent), ("placebo", of_placebo)):
            counts[f"{kind} passed"] += passed is True
            counts[f"{kind} tested"] += passed is not None
    return _Judged(b"".join(lines), kept, dropped, len(lines), counts)


def _bounded(part: _Judged, tau: float | None, dropped: Counter[str]) -> bytes:
    """The part's rows under tau; what becomes unstable counts in `dropped`."""
    lines = part.lines.splitlines(keepends=True)
    for n, det in part.kept:
        if problem := unstable(det, tau):
            verdict = read_row(verdict_decoder, lines[n])
            verdict.reason, verdict.detail = str(problem[0]), problem[1]
            lines[n] = encode_row(verdict)
            dropped[verdict.reason] += 1
    return b"".join(lines)


def _best_scored(drafts: Sequence[Response], *, objectives: Sequence[Objective]) -> Response:
    """The best draft that is scored on every objective, else the first, which is then dropped as unscored."""
    if len(drafts) == 1:
        return drafts[0]
    scored = [r for r in drafts if is_scored(r, objectives)]
    return best(scored, objectives) if scored else drafts[0]


# 5-pair


PAIR = np.dtype(
    [
        ("group", np.int32),
        ("chosen", np.int32),
        ("rejected", np.int32),
        ("margin", np.float64),
        ("gap", np.float64),
        ("decided_by", np.int32),
        ("longer", np.int8),
        ("place", np.int32),
        ("weight", np.float64),
    ]
)
"""A pair by its places: the group's row in its part; chosen and rejected among the candidates and the refined response; decided_by, which
objective; longer, as the function of that name says; place among its group's pairs by ids; weight, 0 before the run's pairs are chosen."""
Pairs = NDArray[np.void]


@dataclass(frozen=True, slots=True)
class _Made:
    """The pairs of one part under the cap. names: prompt ids of the groups that have any; sizes: how many; given: pairs before the cap."""

    names: list[str]
    sizes: list[int]
    given: int
    pairs: Pairs


def _pair_part(objectives: Sequence[Objective], config: PairsConfig, task: tuple[Part, Part, bytes]) -> _Made:
    import numpy as np

    names, sizes, given = [], [], 0
    rows: list[tuple[float, ...]] = []
    for n, stored, responses, refined in _kept(*task):
        places = pair_places(responses, [r.tokens for r in responses], objectives, config, refined=refined)
        lengths = [r.length for r in responses]
        kinds = [longer(lengths[p.chosen], lengths[p.rejected]) for p in places]
        stay = capped(kinds, config)
        by_ids = places_of([(responses[places[i].chosen].id, responses[places[i].rejected].id) for i in stay])
        given += len(places)
        if stay:
            names.append(stored.prompt.id)
            sizes.append(len(stay))
        for i, place in zip(stay, by_ids, strict=True):
            rows.append((n, *places[i], kinds[i], place, 0.0))
    return _Made(names, sizes, given, np.array(rows, dtype=PAIR))


def _selected(made: Sequence[_Made], config: RunConfig) -> list[Pairs]:
    """Of each part the pairs that stay when lengths are balanced over the run, with their weights."""
    parts = [part.pairs for part in made]
    ends = np.cumsum([len(pairs) for pairs in parts])[:-1]
    every = np.concatenate(parts) if parts else np.empty(0, dtype=PAIR)
    stays = np.ones(len(every), dtype=np.bool_)
    if config.pairs.balance_length and len(every):
        sizes = [n for part in made for n in part.sizes]
        prompts = np.array(places_of([name for part in made for name in part.names]), dtype=np.int64)
        ranks = np.repeat(prompts, sizes) * (int(every["place"].max()) + 1) + every["place"]
        stays = ~unbalanced(every["margin"], ranks, every["longer"], sizes)
    every["weight"][stays] = weights(every["gap"][stays].tolist(), config.train.alpha)
    return [pairs[stay] for pairs, stay in zip(np.split(every, ends), np.split(stays, ends), strict=True)] if parts else []


def _render_part(names: Sequence[str], encode: Callable[[StoredGroup], list[int]] | None, task: tuple[Part, Part, bytes, Pairs]) -> bytes:
    """The rows of the part's pairs."""
    scored, refined, verdicts, pairs = task
    wanted: dict[int, list[int]] = {}
    for i, n in enumerate(pairs["group"].tolist()):
        wanted.setdefault(n, []).append(i)
    chosen, rejected, margin, gap, decided_by, weight = (
        pairs[name].tolist() for name in ("chosen", "rejected", "margin", "gap", "decided_by", "weight")
    )
    rows = []
    for n, stored, responses, _ in _kept(scored, refined, verdicts, only=wanted):
        prompt_ids = encode(stored) if encode else stored.prompt_ids
        for i in wanted[n]:
            figures = {"margin": margin[i], "gap": gap[i], "weight": weight[i], "decided_by": names[decided_by[i]]}
            rows.append(encode_row(pair_row(stored, prompt_ids, responses[chosen[i]], responses[rejected[i]], **figures)))
    return b"".join(rows)


# rows of parts


def _read(scored: Part, refined: Part) -> Iterator[tuple[StoredGroup, StoredDrafts]]:
    """The groups of a part with their drafts."""
    for line, of_drafts in zip(scored.lines(), refined.lines(), strict=True):
        group, drafts = read_row(group_decoder, line), read_row(drafts_decoder, of_drafts)
        _check_same(refined, group.prompt.id, drafts.prompt_id)
        yield group, drafts


def _kept(
    scored: Part, refined: Part, verdicts: bytes, only: Container[int] | None = None
) -> Iterator[tuple[int, StoredGroup, list[StoredResponse], int | None]]:
    """The groups of a part that denoising kept, with their row, their responses, and which of these is the refined one.

    only: rows of interest; nothing of the others is decoded. The parts were checked when the rows of interest were found.
    """
    rows = (scored.lines(checked=only is not None), refined.lines(checked=only is not None), verdicts.splitlines())
    for n, (line, of_drafts, said) in enumerate(zip(*rows, strict=True)):
        if only is not None and n not in only:
            continue
        verdict = read_row(verdict_decoder, said)
        if verdict.reason is None:
            group, drafts = read_row(group_decoder, line), read_row(drafts_decoder, of_drafts)
            _check_same(refined, group.prompt.id, drafts.prompt_id, verdict.prompt_id)
            chosen = [r for r in drafts.refined if r.id == verdict.refined]  # none only where nothing is denoised
            yield n, group, [*group.candidates, *chosen], len(group.candidates) if chosen else None


def _check_same(part: Part, *prompt_ids: str) -> None:
    if len(set(prompt_ids)) > 1:
        raise RunFolderError(
            f"{part.path}: is of other prompts than the stages beside it", hint=f"remove {part.path.parent} to have the stage done again"
        )


def _group(stored: StoredGroup) -> PromptGroup:
    """For denoising, which looks at responses alone."""
    return PromptGroup(Prompt(stored.prompt.id, ()), candidates=stored.candidates)


def _encoder(policy: Policy, scored: Stage) -> Callable[[StoredGroup], list[int]] | None:
    """What gives the prompt's tokens where they do not stand in the rows, as in runs of an earlier version; else None."""
    first = next((line for part in scored.finished_parts()[:1] for line in part.lines()), None)
    if first is None or read_row(group_decoder, first).encoded:
        return None

    def encode(group: StoredGroup) -> list[int]:
        messages = msgspec.json.decode(group.prompt.messages, type=tuple[Message, ...])
        return policy.engine.encode_chat(messages)

    return encode
