"""The documentation builds strictly, and what its code blocks say holds: commands, options, files, configurations, Python."""

from __future__ import annotations

import ast
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.main import get_command

from spalign.cli import app
from spalign.config import RunConfig, config_from, load_assess, load_config
from spalign.constitution import load_constitution

ROOT = Path(__file__).parents[2]
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")])
KNOWN = set(RunConfig.model_fields)
RUNS = {"run", "sample", "evaluate", "refine", "denoise", "pair", "train", "validate", "what-if"}
"""Commands whose --set is for a run."""


@cache
def blocks() -> list[tuple[str, str, str]]:
    """(page, language or nothing, text) of every block of code, fenced or indented."""
    found = []
    for page in PAGES:
        text = page.read_text()
        for language, body in re.findall(r"^```(\w*)\n(.*?)^```", text, re.MULTILINE | re.DOTALL):
            found.append((page.name, language, body))
        text = re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL)
        indented = re.findall(r"(?:^|\n\n)((?: {4}[^\n]*(?:\n|$)|\n(?= {4}))+)", text)
        found += [(page.name, "", "\n".join(line[4:] for line in body.splitlines()) + "\n") for body in indented]
    return found


def lines(first: str) -> Iterator[tuple[str, list[str]]]:
    """(page, words) of every command in a block that begins with this word, `\\` at a line's end joined."""
    for page, language, body in blocks():
        if language in ("", "sh", "bash", "console"):
            for line in body.replace("\\\n", " ").splitlines():
                if line.split()[:1] == [first]:
                    yield page, shlex.split(line, comments=True)


def test_there_are_blocks_to_check() -> None:
    assert len(blocks()) > 40
    assert len(list(lines("spalign"))) > 40


def test_commands_and_their_options_exist() -> None:
    commands: Any = get_command(app)
    for page, (_, *words) in lines("spalign"):
        if words[0].startswith("-"):
            continue
        assert words[0] in commands.commands, (page, words)
        known = {name for p in commands.commands[words[0]].params for name in (*p.opts, *p.secondary_opts)} | {"--help"}
        given = {w.partition("=")[0] for w in words if w.startswith("--")}
        assert given <= known, (page, words, given - known)
        if words[0] in RUNS:
            sets = [value for option, value in pairwise(words) if option == "--set"]
            config_from({"name": "x"}, tuple(sets))


def test_files_that_are_named_exist() -> None:
    for page, words in [*lines("pytest"), *lines("python")]:
        for word in words[1:]:
            if re.match(r"(tests|benchmarks|docs)/", word):
                assert (ROOT / word.partition("::")[0]).exists(), (page, words)
    for page in PAGES:
        text = page.read_text()
        for command in re.findall(r"`(?:pytest|python) ([^`]+)`", text):
            for word in command.split():
                if re.match(r"(tests|benchmarks|docs)/", word):
                    assert (ROOT / word.partition("::")[0]).exists(), (page.name, command)
        for link in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", text):
            assert link == "tutorial.md" or link == "figures.md" or (page.parent / link).exists(), (
                page.name,
                link,
            )  # made by docs/hooks.py


def test_configurations_are_valid(tmp_path: Path) -> None:
    seen = dict.fromkeys(("run", "evaluation", "constitution"), 0)
    for page, language, body in blocks():
        if language not in ("", "yaml"):
            continue
        try:
            found = yaml.safe_load(body)
        except yaml.YAMLError:
            assert language != "yaml", (page, body)
            continue
        if not isinstance(found, dict) or (language != "yaml" and not set(found) <= KNOWN):
            continue
        path = tmp_path / "block.yaml"
        if "objectives" in found:
            path.write_text(body)
            load_constitution(str(path))
            seen["constitution"] += 1
        elif "models" in found:
            path.write_text(body)
            load_assess(path)
            seen["evaluation"] += 1
        else:
            path.write_text(yaml.safe_dump({"name": "x", "model": "demo", **found}))
            load_config(path)
            seen["run"] += 1
    assert min(seen.values()) >= 1, seen
    assert seen["run"] >= 5


def test_python_is_python() -> None:
    import spalign

    seen = 0
    for _, language, body in blocks():
        if language == "python":
            tree = ast.parse(body)
            for node in ast.walk(tree):
                if isinstance(node, ast.ImportFrom) and node.module == "spalign":
                    assert all(hasattr(spalign, name.name) for name in node.names)
            seen += 1
    assert seen


def test_the_site_builds_strictly_and_loads_nothing_from_elsewhere(tmp_path: Path) -> None:
    pytest.importorskip("mkdocs", reason="needs spalign[docs]")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path / "site")]
    env = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    pages = list((tmp_path / "site").rglob("*.html"))
    assert len(pages) > len(list((ROOT / "docs").glob("*.md")))
    for page in pages:
        for tag in re.findall(r"<(?:script|link|img|iframe)\b[^>]*>", page.read_text()):
            address = re.search(r"""(?:src|href)=["']?(https?:)?//""", tag)
            assert not address or 'rel="canonical"' in tag, (page, tag)
    api = (tmp_path / "site/api/index.html").read_text()
    for name in ("SPATrainer", "load_config", "denoise", "make_pairs", "PriorityLost"):
        assert f".{name}" in api


@pytest.mark.model
def test_the_notebook_runs(tmp_path: Path) -> None:
    nbclient = pytest.importorskip("nbclient", reason="needs nbclient and ipykernel")
    assert nbclient
    command = [sys.executable, "-m", "jupyter", "execute", str(ROOT / "docs/tutorial.ipynb"), f"--output={tmp_path / 'done'}"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=500, check=False)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "done.ipynb").exists()
