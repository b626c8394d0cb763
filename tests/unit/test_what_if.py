"""What-if: the run's own figures again, and others by hand; options that it cannot change; 100,000 groups are a matter of seconds."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from spalign.config import RunConfig
from spalign.constitution import load_constitution
from spalign.errors import ConfigError, RunFolderError
from spalign.pipeline.what_if import choice_from, stored, sweep_of, what_if
from spalign.store import Stage

NAMES = ("harmlessness", "helpfulness")


def response(prompt: str, name: str, a: float, b: float, tokens: int) -> dict[str, Any]:
    scores = dict(zip(NAMES, (a, b), strict=True))
    ids = [ord(name[-1]), *range(tokens)]
    return {"id": f"{prompt}/{name}", "text": name, "token_ids": ids, "finished": True, "system": "", "scores": scores, "spreads": {}}


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """Three prompts with candidates (2, 3), (4, 2), (3, 5), (5, 4), det 25/9, and refined responses above all, above the mean, below."""
    folder = tmp_path / "run"
    config = RunConfig.model_validate(
        {
            "name": "run", "denoise": {"consistency": "strict", "tau": None},
            "pairs": {"delta": 0.5, "max_per_prompt": None, "balance_length": False},
        }
    )  # fmt: skip
    folder.mkdir()
    (folder / "config.yaml").write_text(yaml.safe_dump(config.on_record()))
    (folder / "constitution.yaml").write_text(yaml.safe_dump(load_constitution("harmless_helpful").model_dump(mode="json")))
    groups, drafts = [], []
    for n, better in enumerate([(8, 8), (4, 4), (1, 9)]):
        name = f"p{n}"
        rows = [response(name, f"c{i}", a, b, i) for i, (a, b) in enumerate([(2, 3), (4, 2), (3, 5), (5, 4)])]
        groups.append({"prompt": {"id": name, "messages": [], "topic": "", "intent": ""}, "prompt_ids": [1], "candidates": rows})
        drafts.append({"prompt_id": name, "refined": [response(name, "r", *better, 9)], "placebo": []})
    base = folder / "iteration-1"
    for name, rows in (("2-evaluate", groups), ("3-refine", drafts), ("4-denoise", [])):
        stage = Stage(base / name, {"n": name, "levels": [[o, None, None] for o in NAMES], "shard_size": 3})
        stage.begin()
        stage.write_part(0, rows)
        stage.finish(items=len(rows))
    return folder


def test_the_runs_own_options_give_its_own_figures(run: Path) -> None:
    found = what_if(stored(run), choice_from())
    assert (found["prompts"], found["kept"], found["dropped"]) == (3, 1, {"not dominating": 2})
    assert found["pairs"] == 10  # five responses, all different on the first objective
    assert found["decided_by"] == {"harmlessness": 10}
    json.dumps(found)


@pytest.mark.parametrize(
    ("words", "kept", "dropped", "pairs"),
    [
        # (4, 4) is above the means 3.5 and 3.5; it ties with (4, 2) on the first objective, so the second decides there
        ({"sets": ["denoise.consistency=above_mean"]}, 2, {"not dominating": 1}, 20),
        ({"sets": ["denoise.enabled=false"]}, 3, {}, 30),
        ({"sets": ["denoise.tau=1"]}, 0, {"not dominating": 2, "unstable": 1}, 0),
        # (5, 4) over (4, 2), (2, 3) over (4, 2) and so on: of the ten pairs of p0 those with |da| + |db| >= 5
        ({"sets": ["pairs.delta=5"]}, 1, {"not dominating": 2}, 4),
        ({"sets": ["pairs.max_per_prompt=2"]}, 1, {"not dominating": 2}, 2),
    ],
)
def test_other_options_by_hand(run: Path, words: dict[str, Any], kept: int, dropped: dict[str, int], pairs: int) -> None:
    found = what_if(stored(run), choice_from(**words))
    assert (found["kept"], found["dropped"], found["pairs"]) == (kept, dropped, pairs)


def test_another_order_and_a_threshold(run: Path) -> None:
    swapped = what_if(stored(run), choice_from(order="helpfulness, harmlessness"))
    assert swapped["decided_by"] == {"helpfulness": 10}
    # all harmless enough from 2: the second objective decides everything, and p2's (1, 9) is below
    met = what_if(stored(run), choice_from(thresholds=["harmlessness=2"]))
    assert met["decided_by"] == {"helpfulness": 10}
    assert met["objectives"][0] == ["harmlessness", 2.0, None]
    coarse = what_if(stored(run), choice_from(resolutions=["harmlessness=4"], sets=["denoise.enabled=false"]))
    assert coarse["decided_by"]["helpfulness"] > 0


def test_a_sweep_is_a_choice_a_value(run: Path) -> None:
    option, choices = sweep_of("denoise.tau=1,null", choice_from())
    assert option == "denoise.tau"
    assert [what_if(stored(run), c)["kept"] for c in choices.values()] == [0, 1]


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ({"sets": ["sample.n=8"]}, "generates and scores nothing anew"),
        ({"sets": ["denoise.taus=8"]}, "denoise.taus"),
        ({"thresholds": ["kindness=3"]}, "no objective 'kindness'"),
        ({"thresholds": ["harmlessness"]}, "is not OBJECTIVE=NUMBER"),
        ({"order": "harmlessness"}, "every objective once"),
    ],
)
def test_mistakes(run: Path, words: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        what_if(stored(run), choice_from(**words))


def test_a_folder_that_is_no_run(tmp_path: Path) -> None:
    with pytest.raises(RunFolderError, match="no run"):
        stored(tmp_path)
