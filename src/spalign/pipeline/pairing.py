"""4-denoise and 5-pair: part by part, by several processes where there are many prompts, in memory of about 0.3 KB a prompt.

Each goes over the parts, decides what only the whole run decides (tau; the balance of lengths and the mean gap), and then writes. The
functions of `spalign.preference` say what is kept; here stands only how the rows come to them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice
from typing import Any

from spalign.config import DenoiseConfig, PairsConfig, RunConfig
from spalign.constitution import Objective
from spalign.errors import RunFolderError
from spalign.pipeline.context import Context, Policy, Step
from spalign.pipeline.judging import Judging
from spalign.pipeline.pair_table import MadePairs, PairMaker, Pairs, selected
from spalign.pipeline.parts import best_scored, encoder, group_of, kept_groups, over_parts, read_groups
from spalign.pipeline.rows import StoredGroup, pair_row, read_row, verdict_decoder
from spalign.preference import check, passes, resolve_tau, unstable, usable_candidates
from spalign.rollout import Drafts, choose
from spalign.store import Part, Stage, encode_row
from spalign.types import DropReason

COUNTS = ("candidates", "unfinished", "empty", "refined passed", "refined tested", "placebo passed", "placebo tested")


def denoise_step(run: Context, base: str, judging: Judging, config: RunConfig, scored: Stage, refined: Stage) -> Step:
    """4-denoise: both criteria, one verdict a group."""
    inputs = {"from": refined.digest, "levels": judging.levels, "denoise": config.denoise.matters()}
    stage = run.folder.stage(f"{base}/4-denoise", inputs, scored, refined)

    def do() -> dict[str, Any]:
        stage.begin()
        judged = list(over_parts(partial(_judge_part, judging.resolved(), config.denoise), list(_both(scored, refined)), scored))
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
        "pairs": config.pairs.matters(),
        "alpha": config.train.alpha,
        "policy": policy.digest,
    }
    stage = run.folder.stage(f"{base}/5-pair", inputs, scored, refined, denoised)

    def do() -> dict[str, Any]:
        facts, objectives = denoised.manifest() or {}, judging.resolved()
        if "responses" not in facts:
            raise RunFolderError(
                f"{denoised.folder}: an earlier version of spalign made it",
                hint="remove this folder to have the stage done again; it is quick",
            )
        stage.begin()
        parts = list(_with_verdicts(scored, refined, denoised))
        made = list(over_parts(partial(_pair_part, objectives, config.pairs), parts, scored))
        chosen = selected(made, config)
        tasks = [(*part, pairs) for part, pairs in zip(parts, chosen, strict=True)]
        encode = encoder(policy, scored)
        render = partial(_render_part, [o.name for o in objectives], encode)
        stage.write_stream(over_parts(render, tasks, scored, here=encode is not None))
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
    pick = partial(best_scored, objectives=objectives)
    lines: list[bytes] = []
    kept, dropped, counts = [], Counter[str](), Counter[str](dict.fromkeys(COUNTS, 0))
    for stored, drafts in read_groups(*parts):
        group = choose(group_of(stored), Drafts(drafts.refined, drafts.placebo), pick)
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


# 5-pair


def _pair_part(objectives: Sequence[Objective], config: PairsConfig, task: tuple[Part, Part, bytes]) -> MadePairs:
    maker = PairMaker()
    for n, stored, responses, refined in kept_groups(*task):
        maker.add(n, stored.prompt.id, responses, refined, objectives, config)
    return maker.made()


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
    for n, stored, responses, _ in kept_groups(scored, refined, verdicts, only=wanted):
        prompt_ids = encode(stored) if encode else stored.prompt_ids
        for i in wanted[n]:
            figures = {"margin": margin[i], "gap": gap[i], "weight": weight[i], "decided_by": names[decided_by[i]]}
            rows.append(encode_row(pair_row(stored, prompt_ids, responses[chosen[i]], responses[rejected[i]], **figures)))
    return b"".join(rows)
