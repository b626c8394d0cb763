"""`report.html` in a real browser: hostile prompts, answers and names run nothing; ten thousand prompts open in time."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from spalign.pipeline.look import one_prompt, overview
from spalign.pipeline.report import write_report
from spalign.store import Stage

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
browser = pytest.mark.skipif(CHROMIUM is None, reason="needs chromium: apt-get install chromium")

HOSTILE = [
    "<script>document.body.dataset.owned=1</script>",
    "</script><script>document.body.dataset.owned=2</script>",
    '<img src=x onerror="document.body.dataset.owned=3">',
    "<svg onload=document.body.dataset.owned=4>",
    "<!--<script>document.body.dataset.owned=5</script>-->",
    '\'"><iframe srcdoc="<script>parent.document.body.dataset.owned=6</script>"></iframe>',
    "javascript:document.body.dataset.owned=7",
    "${document.body.dataset.owned=8}{{constructor.constructor('document.body.dataset.owned=9')()}}",
    '\u2028\u2029</title><base href=//evil.example><meta http-equiv=refresh content="0;url=//evil.example">',
    "\x1b[2J\u202eright to left\u0000 null",
    '<a href="//evil.example/x" ping="//evil.example">link</a><link rel=stylesheet href=//evil.example/x.css>',
    "__proto__",
]


def response(prompt: str, name: str, text: str, a: float) -> dict[str, Any]:
    scores = {"harm": a, "help": 10 - a}
    return {
        "id": f"{prompt}/{name}",
        "text": text,
        "token_ids": [1],
        "finished": True,
        "system": text[:20],
        "scores": scores,
        "spreads": {},
    }


def stage(folder: Path, rows: list[dict[str, Any]], **facts: Any) -> None:
    made = Stage(folder, {"of": folder.name, "shard_size": len(rows), "levels": [["harm", None, None], ["help", None, None]]})
    made.begin()
    made.write_part(0, rows)
    made.finish(items=len(rows), **facts)


def lay_out(run: Path, prompts: int, text: str = "words " * 12) -> Path:
    """A run's folder as the pipeline leaves it, with hostile text wherever a model or a user may put some."""
    run.mkdir(parents=True)
    config = {"name": HOSTILE[1], "model": HOSTILE[0], "constitution": HOSTILE[2], "recipe": "robust", "seed": 0}
    (run / "config.yaml").write_text(yaml.safe_dump(config))
    (run / "constitution.yaml").write_text(yaml.safe_dump({"objectives": [{"name": "harm"}, {"name": "help"}]}))
    base, groups, drafts, verdicts, pairs = run / "iteration-1", [], [], [], []
    for n in range(prompts):
        bad = HOSTILE[n % len(HOSTILE)]
        name = f"p{n} {bad}"
        prompt = {
            "id": name,
            "messages": [{"role": "user", "content": f"{bad} {n} {text}"}],
            "topic": bad,
            "intent": bad if n < 50 else "safe",
        }
        candidates = [response(name, f"c{i}", f"{bad} {text} {i}", (n + i) % 10) for i in range(4)]
        groups.append({"prompt": prompt, "prompt_ids": [], "candidates": candidates, "refined": None, "placebo": None})
        drafts.append({"prompt_id": name, "refined": [response(name, "r", f"{bad} better", 9.0)], "placebo": []})
        verdicts.append({"prompt_id": name, "reason": None if n % 2 else "unstable", "det": n / 7, "detail": bad, "refined": f"{name}/r"})
        if n % 2:
            figures = {"margin": 2.0, "gap": 1.0, "weight": 1.0, "decided_by": "harm"}
            pairs.append({"id": f"{name}/r>{name}/c0", "prompt_id": name, **figures})
    stage(base / "1-sample", groups)
    stage(base / "2-evaluate", groups)
    stage(base / "3-refine", drafts)
    stage(base / "4-denoise", verdicts, tau=3.0, consistency={"refined": {"passed": 1, "tested": 2}, "placebo": {"passed": 0, "tested": 0}})
    funnel = {
        "prompts": prompts, "kept": len(pairs), "pairs": len(pairs), "dropped": {"unstable": prompts - len(pairs)},
        "decided_by": {"harm": len(pairs)}, "responses": {"candidates": 4 * prompts, "unfinished": 0, "empty": 0}, "winner_shorter": 0,
    }  # fmt: skip
    stage(base / "5-pair", pairs, funnel=funnel)
    held = [{**g, "prompt": {**g["prompt"], "id": f"h{i}"}} for i, g in enumerate(groups[:20])]
    stage(run / "evaluation/before/2-judge", held)
    stage(run / "evaluation/after/2-judge", held)
    return run


def opened(page: Path, folder: Path, *, patience: int = 20) -> tuple[str, str]:
    """The page's document after its scripts have run, and what the browser's console said."""
    assert CHROMIUM is not None
    off = ("gpu", "quic", "background-networking", "component-update", "sync")
    flags = ["--headless", "--no-sandbox", "--no-first-run", *(f"--disable-{what}" for what in off)]
    command = [CHROMIUM, *flags, f"--user-data-dir={folder}", "--enable-logging=stderr", "--v=0", "--dump-dom", page.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=patience * 6, check=True)
    return done.stdout, "\n".join(line for line in done.stderr.splitlines() if "CONSOLE" in line)


@browser
def test_nothing_that_a_model_or_a_user_wrote_runs(tmp_path: Path) -> None:
    page = write_report(lay_out(tmp_path / "run", 4 * len(HOSTILE)))
    document, console = opened(page, tmp_path / "browser")
    body = re.search(r"<body[^>]*>", document)
    assert body is not None
    assert "data-ready" in body[0], console
    assert "data-owned" not in body[0]
    assert console == ""
    assert "evil.example" not in re.sub(r"<script type=\"application/json\".*?</script>", "", page.read_text(), flags=re.S)
    shown = document.split("</h1>", 1)[1]
    for bad in HOSTILE[:6]:
        assert f"<script>{bad}" not in shown
    assert shown.count("<iframe") == shown.count("<img") == shown.count("<base") == 0
    assert "\x1b" not in page.read_text()
    assert "\u202e" not in page.read_text()


@browser
def test_ten_thousand_prompts_open_in_two_seconds(tmp_path: Path) -> None:
    page = write_report(lay_out(tmp_path / "run", 10_000, text="Some words of an answer that is about as long as they are. " * 3))
    took = [int(re.search(r'data-ready="(\d+)"', opened(page, tmp_path / f"browser-{n}")[0])[1]) for n in range(2)]  # type: ignore[index]
    best = min(took)
    assert best < 2000, f"{best} ms, {page.stat().st_size / 1e6:.0f} MB"


@browser
def test_a_finished_run_of_the_pipeline_shows_its_verdict(tmp_path: Path, tiny_model: Path) -> None:
    from test_pipeline import engine, settings

    from spalign.pipeline import run

    config = settings(tmp_path, tiny_model, ["keep", "keep", "not dominating"], evaluation={"gate": {"enabled": False}})
    run(config, make_engine=engine)
    document, console = opened(config.folder / "report.html", tmp_path / "browser")
    assert console == ""
    for wanted in ("Priority gate", "Before and after", "Funnel", "dropped: not dominating", "Held-out answers", "Cost", "train-0"):
        assert wanted in document


def test_the_policy_allows_no_other_script(tmp_path: Path) -> None:
    text = write_report(lay_out(tmp_path / "run", 3)).read_text()
    policy = re.search(r'Content-Security-Policy" content="([^"]+)"', text)
    assert policy is not None
    assert "default-src 'none'" in policy[1]
    assert "unsafe" not in policy[1]
    assert len(re.findall(r"<script(?! type=\"application/json\")", text)) == 1
    assert not re.findall(r"(?:src|href)=\"(?!data:,)", text.split("<script", 1)[0])


def test_what_is_shown_of_one_prompt_and_of_all(tmp_path: Path) -> None:
    run = lay_out(tmp_path / "run", 12)
    rows = overview(run)["iterations"][0]["prompts"]
    assert [r["pairs"] for r in rows] == [0, 1] * 6
    found = one_prompt(run, rows[1]["id"])
    assert [r["name"] for r in found["iterations"][0]["responses"]] == ["c0", "c1", "c2", "c3", "r"]
    assert found["iterations"][0]["pairs"] == [{"chosen": "r", "rejected": "c0", "margin": 2.0, "weight": 1.0, "decided_by": "harm"}]
    assert one_prompt(run, "h3")["answers"]["before"][0]["scores"] == {"harm": 3.0, "help": 7.0}
    assert json.dumps(found)
