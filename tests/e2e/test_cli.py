"""The command line, as a person uses it: a process of its own each time, with the tiny model."""

from __future__ import annotations

import fcntl
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

LIGHT = """
import sys
from spalign.cli import main
try:
    main()
finally:
    print("heavy:", sorted({"torch", "transformers", "trl", "peft", "datasets"} & set(sys.modules)))
"""
"""The command line, and then which heavy libraries it has imported."""

KEYS = {
    *("schema", "digest", "name", "recipe", "model", "model_fingerprint", "model_path", "constitution", "funnel", "iterations", "recipes"),
    *("judge", "evaluation", "measures", "unscored", "checks", "transcripts", "seconds", "tokens", "peak_rss_bytes", "versions"),
}


def fastest(call: Callable[[], object], times: int = 3):
    """The quickest of a few: what the program takes, not what else the machine does."""
    return min((call() for _ in range(times)), key=lambda done: done.seconds)


def files_of(folder: Path) -> dict[str, tuple[int, bytes]]:
    return {str(p.relative_to(folder)): (p.stat().st_mtime_ns, p.read_bytes()) for p in folder.rglob("*") if p.is_file()}


# without a run


def test_help_is_quick_and_imports_nothing_heavy(spalign, tmp_path):
    done = fastest(lambda: spalign(tmp_path, "--help", shim=LIGHT))
    assert done.code == 0
    assert "heavy: []" in done.out
    assert done.seconds < 3
    for command in ("run", "sample", "evaluate", "refine", "denoise", "pair", "train"):
        assert re.search(rf"^\W*{command}\s", done.out, re.MULTILINE), command


def test_version(spalign, tmp_path):
    from spalign import __version__

    assert spalign(tmp_path, "--version").out.strip() == __version__


# a whole run


def test_a_run_ends_well(reference):
    assert reference.done.code == 0, reference.done.err
    assert reference.done.err == ""


def test_the_summary_has_the_documented_keys(reference):
    summary = json.loads((reference.run / "summary.json").read_text())
    assert set(summary) >= KEYS
    documented = {k for row in Path("docs/summary.md").read_text().splitlines() if row.startswith("| `") for k in _names(row)}
    assert documented == set(summary)
    assert summary["schema"] == 1
    assert set(summary["funnel"]) == {"prompts", "kept", "pairs", "dropped", "responses", "pairs_removed", "decided_by", "winner_shorter"}
    assert summary["funnel"]["prompts"] == summary["funnel"]["kept"] + sum(summary["funnel"]["dropped"].values()) == 12
    assert list(summary["evaluation"]) == ["harmlessness", "helpfulness"]
    assert set(summary["iterations"][0]) == {"funnel", "tau", "consistency", "training"}
    assert set(summary["iterations"][0]["training"]) == {"steps", "steps_kept", "collapsed", "prompts", "loss", "accuracy"}
    assert [set(c) for c in summary["checks"]] == [{"name", "passed", "text"}] * len(summary["checks"])
    assert len(summary["transcripts"]) == 3


def _names(row: str) -> list[str]:
    """The top-level keys of the first column of a row."""
    return [k.split(".")[0] for k in re.findall(r"`([^`]+)`", row.split("|")[1])]


def test_only_safetensors_and_text_are_handed_over(reference):
    model = reference.run / "iteration-1/6-train/model"
    assert (model / "model.safetensors").exists()
    assert {p.suffix for p in model.iterdir()} <= {".safetensors", ".json", ".jinja", ".txt", ".md"}
    assert not [p for p in reference.run.rglob("*") if p.suffix in {".bin", ".pt", ".pth", ".pkl", ".tmp"}]
    assert not (model.parent / "checkpoints").exists()


def test_the_model_loads_with_transformers(reference):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = reference.run / "iteration-1/6-train/model"
    assert AutoModelForCausalLM.from_pretrained(model).config.num_hidden_layers == 2
    assert AutoTokenizer.from_pretrained(model).chat_template


def test_a_person_sees_funnel_scores_checks_transcripts_and_the_model(reference):
    out = reference.done.out
    summary = json.loads((reference.run / "summary.json").read_text())
    assert re.search(r"prompts in +12 *\n", out)
    for reason, count in summary["funnel"]["dropped"].items():
        assert re.search(rf"dropped: {reason} +-{count} *\n", out)
    assert re.search(rf"pairs out +{summary['funnel']['pairs']} *\n", out)
    for check in summary["checks"]:
        assert f"{'ok  ' if check['passed'] else 'FAIL'} {check['name']}: {check['text']}\n" in out
    assert out.count("  before: ") == out.count("  after:  ") == 3
    assert "NOT an independent judge" in out
    assert f"model: {summary['model_path']}\n" in out
    assert (reference.folder / summary["model_path"] / "model.safetensors").exists()


def test_hostile_text_reaches_the_terminal_harmlessly(reference):
    """Prompts and intents of the user's file that would clear the screen, rename the window or break rich's markup."""
    out = reference.done.out
    assert not [c for c in out if ord(c) < 32 and c not in "\n\t"]
    assert "\u202e" not in out
    assert "[[/foo]] What does this mean: \N{REPLACEMENT CHARACTER}[2J" in out
    assert "[red]red[/red] [/foo]" in out
    assert "\N{REPLACEMENT CHARACTER}[31mred" in out


def test_run_again_says_that_all_is_done_and_imports_nothing_heavy(reference, spalign, tmp_path):
    folder = reference.copy(tmp_path / "here")
    before = files_of(folder / "runs/tiny/iteration-1")
    done = fastest(lambda: spalign(folder, "run", "run.yaml", shim=LIGHT))
    assert done.code == 0
    assert "everything is done already" in done.out
    assert "heavy: []" in done.out
    assert done.seconds < 3
    assert files_of(folder / "runs/tiny/iteration-1") == before
    shown = reference.done.out.split("Funnel, iteration 1")[1].split("peak memory")[0]
    assert shown in done.out


def test_a_changed_configuration_is_refused_with_the_change(reference, spalign, tmp_path):
    folder = reference.copy(tmp_path / "here")
    before = files_of(folder / "runs")
    done = spalign(folder, "run", "run.yaml", "--set", "pairs.delta=0.07")
    assert done.code == 2
    assert "-pairs.delta: 0.05" in done.err
    assert "+pairs.delta: 0.07" in done.err
    assert "--resume" in done.err
    assert "--fresh" in done.err
    assert files_of(folder / "runs") == before


def test_resume_does_again_only_what_depends_on_the_change(reference, spalign, tmp_path):
    folder = reference.copy(tmp_path / "here")
    run = folder / "runs/tiny"
    before = files_of(run)
    done = spalign(folder, "run", "run.yaml", "--resume", "--set", "pairs.max_per_prompt=1", "--set", "denoise.tau=null")
    assert done.code == 0, done.err
    after = files_of(run)
    same = ("iteration-1/1-sample/", "iteration-1/2-evaluate/", "iteration-1/3-refine/", "evaluation/before/")
    assert {k: v for k, v in after.items() if k.startswith(same)} == {k: v for k, v in before.items() if k.startswith(same)}
    for stage in ("iteration-1/4-denoise", "iteration-1/5-pair", "iteration-1/6-train", "evaluation/after/1-sample"):
        assert after[f"{stage}/manifest.json"][1] != before[f"{stage}/manifest.json"][1], stage
        assert after[f"{stage}.replaced-1/manifest.json"] == before[f"{stage}/manifest.json"], stage
    funnel = json.loads((run / "summary.json").read_text())["funnel"]
    assert funnel["pairs"] == funnel["kept"]  # one a prompt
    assert "unstable" not in funnel["dropped"]


def test_fresh_sets_the_old_run_aside_and_nothing_survives(reference, spalign, tmp_path):
    """One token an answer is too few: all are empty or cut off."""
    folder = reference.copy(tmp_path / "here")
    before = files_of(folder / "runs/tiny")
    done = spalign(folder, "run", "run.yaml", "--fresh", "--set", "prompts.train.limit=4", "--set", "sample.max_new_tokens=1")
    assert "set the old run aside as runs/tiny.old-1" in done.out
    after = files_of(folder / "runs/tiny.old-1")
    assert {k: v for k, v in after.items() if k != "run.lock"} == {k: v for k, v in before.items() if k != "run.lock"}
    assert json.loads((folder / "runs/tiny/iteration-1/1-sample/manifest.json").read_text())["items"] == 4
    assert done.code == 3
    assert re.search(r"prompts in +4 *\n", done.out)
    assert re.search(r"prompts kept +0 *\n", done.out)
    assert "stopped: no preference pair is left" in done.err
    assert re.search(r"fix: \d of 4 prompts left as '(empty|truncated)': ", done.err)
    assert not (folder / "runs/tiny/iteration-1/6-train").exists()
    assert not (folder / "runs/tiny/summary.json").exists()


def test_stage_by_stage(lay_out, spalign, reference, tmp_path):
    folder = lay_out(tmp_path / "here")
    stages = folder / "runs/tiny/iteration-1"

    def refused(name: str, needs: str) -> None:
        done = spalign(folder, name, "run.yaml", shim=LIGHT)
        assert done.code == 2
        assert f"'{name}' needs the stage '{needs}'" in done.err
        assert f"fix: run: spalign {needs} CONFIG" in done.err
        assert "heavy: []" in done.out

    def goes(name: str, said: str) -> None:
        done = spalign(folder, name, "run.yaml")
        assert done.code == 0, done.err
        assert f"{name}: {said}; runs/tiny" in done.out

    refused("train", "sample")
    goes("sample", "done")
    refused("denoise", "evaluate")
    shutil.copytree(reference.run / "iteration-1/2-evaluate", stages / "2-evaluate")  # what `evaluate` would come to
    goes("evaluate", "was done already")
    for number, name in enumerate(("refine", "denoise", "pair", "train"), 3):
        goes(name, "done")
        assert len(list(stages.glob("*/manifest.json"))) == number
    for stage in stages.iterdir():
        mine, theirs = (sorted(f.glob("part-*")) for f in (stage, reference.run / "iteration-1" / stage.name))
        assert [p.read_bytes() for p in mine] == [p.read_bytes() for p in theirs]
    goes("pair", "was done already")


# bad input: exit code 2, where and what and a fix, never a traceback, and the run folder as it was


def _write(name: str, content: bytes) -> Callable[[Path], None]:
    return lambda folder: (folder / name).write_bytes(content) and None


def _add(text: bytes) -> Callable[[Path], None]:
    return lambda folder: (folder / "run.yaml").write_bytes((folder / "run.yaml").read_bytes() + text) and None


def _rows(*rows: bytes) -> Callable[[Path], None]:
    return _write("bad.jsonl", b"\n".join(rows) + b"\n")


BAD = ("--set", "prompts.train={source: bad.jsonl}")

CASES = {
    "no config": (lambda f: (f / "run.yaml").unlink(), (), "run.yaml: no such file", "check the path"),
    "broken YAML": (_add(b"train: {epochs: [1\n"), (), r"run.yaml:\d+: not valid YAML", "fix: "),
    "YAML that is a list": (_write("run.yaml", b"- a\n"), (), "expected 'key: value' lines", "configs/demo.yaml"),
    "config not UTF-8": (_add(b"recipe: caf\xe9\n"), (), r"run.yaml:\d+: not valid UTF-8", "save the file as UTF-8"),
    "unknown key": (_add(b"trian: {}\n"), (), r"run.yaml:\d+: unknown key 'trian'; did you mean 'train'\?", "fix: "),
    "unknown key by --set": (None, ("--set", "train.epoch=2"), "unknown key 'train.epoch'; did you mean 'epochs'", "fix: "),
    "unknown objective": (
        None,
        ("--set", "self_evaluation.thresholds={kindness: 5}"),
        "unknown objective 'kindness'",
        "harmlessness, helpfulness",
    ),
    "empty prompt": (_rows(b'{"prompt": "Fine?"}', b'{"prompt": "  "}'), BAD, r"bad.jsonl:2: the prompt is empty", "write a text"),
    "200,000 characters": (_rows(b'{"prompt": "' + b"x" * 200_000 + b'"}'), BAD, r"bad.jsonl:1: .*200,000 characters", "shorten it"),
    "duplicate ids": (_rows(b'{"id": "a", "prompt": "One?"}', b'{"id": "a", "prompt": "Two?"}'), BAD, r"bad.jsonl:2: .*'a'", "fix: "),
    "prompts not UTF-8": (_rows(b'{"prompt": "Fine?"}', b'{"prompt": "caf\xe9"}'), BAD, "bad.jsonl:2: not valid UTF-8", "save the file"),
    "no such model path": (None, ("--set", "model=/nowhere/model"), "model '/nowhere/model': no such file or folder", "local folder"),
    "name too long": (None, ("--set", "name=" + "x" * 300), "File name too long", "choose another"),
    "runs_dir in /proc": (None, ("--set", "runs_dir=/proc/spalign"), "/proc/spalign/tiny: ", "choose another runs_dir"),
    "runs_dir in /sys": (None, ("--set", "runs_dir=/sys/spalign"), "/sys/spalign/tiny: ", "choose another runs_dir"),
    "both flags": (None, ("--resume", "--fresh"), "exclude each other", "give one of them"),
    "no run to resume": (None, ("--resume", "--set", "name=other"), "no run to resume", "leave out --resume"),
}


@pytest.fixture(scope="module")
def small(reference, tmp_path_factory) -> Path:
    """The reference run without its model: that nothing in it changes is quick to see."""
    folder = reference.copy(tmp_path_factory.mktemp("small") / "here")
    shutil.rmtree(folder / "runs/tiny/iteration-1/6-train")
    return folder


@pytest.mark.parametrize("case", CASES)
def test_bad_input_is_refused_with_a_fix(small, spalign, tmp_path, case):
    spoil, flags, where, fix = CASES[case]
    folder = Path(shutil.copytree(small, tmp_path / "here"))
    if spoil:
        spoil(folder)
    before = files_of(folder)
    done = spalign(folder, "run", "run.yaml", *flags, shim=LIGHT)
    assert done.code == 2, done.err
    assert done.err.startswith("error: ")
    assert re.search(where, done.err), done.err
    assert re.search(r"^ +fix: ", done.err, re.MULTILINE)
    assert fix in done.err
    assert "heavy: []" in done.out
    assert files_of(folder) == before


def test_an_option_that_does_not_exist(spalign, tmp_path):
    done = spalign(tmp_path, "run", "run.yaml", "--frsh")
    assert done.code == 2
    assert "--frsh" in done.err


@pytest.mark.parametrize("flags", [(), ("--resume",), ("--fresh",)])
@pytest.mark.parametrize(("missing", "where"), [("tokenizer*", "the model has no tokenizer"), ("*.safetensors", "no .safetensors weights")])
def test_a_model_folder_that_lacks_a_part_is_refused(small, spalign, tiny_model, tmp_path, missing, where, flags):
    """Also with --resume and --fresh nothing is changed or set aside for a model that cannot be used."""
    model = Path(shutil.copytree(tiny_model, tmp_path / "model"))
    for file in model.glob(missing):
        file.unlink()
    folder = Path(shutil.copytree(small, tmp_path / "here"))
    before = files_of(folder)
    done = spalign(folder, "run", "run.yaml", *flags, "--set", f"model={model}", shim=LIGHT)
    assert done.code == 2
    assert "fix: " in done.err
    assert "heavy: []" in done.out
    if flags:
        assert where in done.err
    assert files_of(folder) == before


def test_a_model_without_chat_template_is_refused(lay_out, spalign, tiny_model, tmp_path):
    model = Path(shutil.copytree(tiny_model, tmp_path / "model"))
    (model / "chat_template.jinja").unlink()
    tokenizer = json.loads((model / "tokenizer_config.json").read_text())
    tokenizer.pop("chat_template", None)
    (model / "tokenizer_config.json").write_text(json.dumps(tokenizer))
    folder = lay_out(tmp_path / "here", model=str(model))
    done = spalign(folder, "run", "run.yaml")
    assert done.code == 2
    assert "has no chat template" in done.err
    assert "use an instruct model" in done.err
    assert not list((folder / "runs").rglob("part-*"))


def test_an_unknown_hub_model_offline_is_refused(lay_out, spalign, tmp_path):
    folder = lay_out(tmp_path / "here", model="nobody/no-such-model")
    done = spalign(folder, "run", "run.yaml")
    assert done.code == 2
    assert "model 'nobody/no-such-model' cannot be loaded" in done.err
    assert "check the name, your network" in done.err
    assert not list((folder / "runs").rglob("part-*"))


def test_damaged_weights_are_refused(lay_out, spalign, tiny_model, tmp_path):
    model = Path(shutil.copytree(tiny_model, tmp_path / "model"))
    weights = model / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1_000_000])
    done = spalign(lay_out(tmp_path / "here", model=str(model)), "run", "run.yaml")
    assert done.code == 2
    assert "cannot be loaded" in done.err
    assert "fix: " in done.err


@pytest.mark.parametrize(("file", "damaged"), [("config.yaml", "a: [b\n"), ("iteration-1/3-refine/manifest.json", '{"digest": "')])
def test_a_run_folder_with_a_damaged_file_is_refused(small, spalign, tmp_path, file, damaged):
    folder = Path(shutil.copytree(small, tmp_path / "here"))
    (folder / "runs/tiny" / file).write_text(damaged)
    done = spalign(folder, "run", "run.yaml")
    assert done.code == 2
    assert f"{file}: cannot be read" in done.err
    assert ("fix: use --fresh" if file == "config.yaml" else "fix: restore it, or remove this file alone") in done.err


@pytest.mark.parametrize("flag", [(), ("--fresh",)])
def test_a_locked_run_is_refused(small, spalign, tmp_path, flag):
    folder = Path(shutil.copytree(small, tmp_path / "here"))
    before = files_of(folder)
    with (folder / "runs/tiny/run.lock").open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        done = spalign(folder, "run", "run.yaml", *flag)
    assert done.code == 2
    assert re.search(r"process \d+ on \S+ is working on this run", done.err)
    assert "wait for it, or give this run another name" in done.err
    assert files_of(folder) == before


def test_a_disk_too_small_for_training_is_refused_and_the_run_goes_on_elsewhere(reference, spalign, tmp_path):
    """25 MB of weights want 277 MB for checkpoints; what was done before them stays."""
    disk = tmp_path / "disk"
    disk.mkdir()
    made = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=60m", "tmpfs", disk], capture_output=True, text=True, check=False)
    if made.returncode:
        pytest.skip(f"mounting a tmpfs is not permitted here: {made.stderr.strip()}")
    try:
        folder = reference.copy(tmp_path / "here")
        shutil.copytree(folder / "runs", disk / "runs", ignore=shutil.ignore_patterns("6-train", "evaluation", "summary.json"))
        done = spalign(folder, "run", "run.yaml", "--resume", "--set", f"runs_dir={disk}/runs")
        assert done.code == 2
        assert re.search(r"6-train: training needs up to 0\.3 GB for checkpoints, 0\.1 GB are free", done.err), done.err
        assert "free some space, or choose another runs_dir" in done.err
        assert (disk / "runs/tiny/iteration-1/5-pair/manifest.json").exists()
    finally:
        subprocess.run(["umount", "--lazy", disk], check=True)


def test_an_output_on_a_full_disk_does_not_end_a_run_and_is_told(lay_out, environment, tmp_path):
    folder = lay_out(tmp_path / "here")
    command = [sys.executable, "-m", "spalign.cli", "sample", "run.yaml"]
    with Path("/dev/full").open("wb") as full:
        done = subprocess.run(command, cwd=folder, env=environment, stdout=full, stderr=subprocess.PIPE, check=False)
        deaf = subprocess.run(command, cwd=folder, env=environment, stdout=full, stderr=full, check=False)
    assert (folder / "runs/tiny/iteration-1/1-sample/manifest.json").exists()
    assert done.returncode == deaf.returncode == 2
    assert re.fullmatch(r"error: output: No space left on device: .*the work itself is done\n  fix: .*\n", done.stderr.decode())


def test_a_full_disk_is_refused(lay_out, spalign, tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    made = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4k", "tmpfs", disk], capture_output=True, text=True, check=False)
    if made.returncode:
        pytest.skip(f"mounting a tmpfs is not permitted here: {made.stderr.strip()}")
    try:
        done = spalign(lay_out(tmp_path / "here", runs_dir=str(disk)), "run", "run.yaml")
    finally:
        subprocess.run(["umount", "--lazy", disk], check=True)
    assert done.code == 2
    assert "No space left on device" in done.err
    assert "free some space" in done.err
