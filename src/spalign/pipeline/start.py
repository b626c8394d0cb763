"""The first two commands: a configuration to begin with, and whether one can be run."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from importlib.resources import files
from pathlib import Path
from typing import Any, TypeVar

from spalign.config import RunConfig
from spalign.engines.models import locate
from spalign.errors import ConfigError, SpalignError
from spalign.pipeline.judging import to_check
from spalign.pipeline.prepare import check_prompts, checks_of, note_candidates, prompts_of
from spalign.report import Progress
from spalign.selfeval import load_judge, load_labelled
from spalign.store import clear_errors, write_atomic

T = TypeVar("T")
_CONFIG = """\
# A run of spalign: `spalign validate {config}`, then `spalign run {config}`. Every option: docs, or the docstrings of spalign.config.
name: {name}
model: {model}          # a hub id, a local folder, a GGUF file, or demo
constitution: {constitution}     # what is good, in order of priority; yours to change
recipe: robust                     # or paper: the method as published
prompts:
  train: {{source: {train}}}       # JSONL, JSON, CSV, Parquet, org/dataset on the hub, or a shipped set
  heldout: {{source: {heldout}}}   # never trained on; before and after are compared on these
engine: {{kind: transformers}}       # vllm: faster; ray: a cluster; openai: a server (docs/engines.md)
sample: {{n: 4, max_new_tokens: 256}}
# self_evaluation: {{allow_weak_judge: true}}   # a run stops where labelled answers show that the model cannot judge itself
train:
  learning_rate: 1.0e-6
  epochs: 1
  # lora: {{r: 16, alpha: 32}}       # an adapter instead of all weights
evaluation:
  gate: {{margin: 0.5}}              # the first objective may not fall by this much, in points of 0-10
"""


def init(config: Path, *, model: str, train: str, heldout: str, constitution: str) -> list[Path]:
    """Write the configuration and a copy of the constitution beside it; both are checked. Raises ConfigError where a file is there."""
    own = config.with_name(f"{config.stem}-constitution.yaml")
    for path in (config, own):
        if path.exists():
            raise ConfigError(f"{path}: exists", hint="name another file; nothing is overwritten")
    shipped = files("spalign").joinpath("constitutions", f"{constitution}.yaml")
    if not shipped.is_file():
        raise ConfigError(f"no constitution '{constitution}' to begin with", hint="harmless_helpful or honest_helpful")
    name = "".join(c if c.isalnum() or c in "._-" else "-" for c in config.stem).strip("._-") or "run"
    said = {key: _as_yaml(value) for key, value in (("model", model), ("train", train), ("heldout", heldout), ("constitution", str(own)))}
    with clear_errors(config):
        config.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(own, shipped.read_bytes())
    write_atomic(config, _CONFIG.format(config=config, name=name, **said).encode())
    return [config, own]


def _as_yaml(text: str) -> str:
    import json

    return json.dumps(text, ensure_ascii=False)


def validate(config: RunConfig, ui: Progress) -> dict[str, Any]:
    """Everything that can be seen before a model is loaded: outlets, constitution, prompts and their overlap, models, labelled answers.

    Raises SpalignError with all mistakes at once.
    """
    mistakes: list[SpalignError] = []

    def seen(look: Callable[[], T]) -> T | None:
        try:
            return look()
        except SpalignError as e:
            mistakes.append(e)
            return None

    looks: list[Callable[[], Any]] = [*checks_of(config), partial(_judging, config), *(partial(locate, name) for name in _models(config))]
    for look in looks:
        seen(look)
    train, heldout = (seen(partial(prompts_of, config, source, ui)) or [] for source in (config.prompts.train, config.prompts.heldout))
    if train and heldout:
        seen(partial(check_prompts, config, train, heldout))
    mistakes = list({str(e): e for e in mistakes}.values())  # recipes share a constitution
    if len(mistakes) > 1:
        raise ConfigError(f"{len(mistakes)} mistakes:\n" + "\n".join(f"- {e}" for e in mistakes))
    if mistakes:
        raise mistakes[0]
    constitution = config.constitution_for_run()
    note_candidates(config, constitution, ui)
    return {
        "train": len(train),
        "heldout": len(heldout),
        "objectives": list(constitution.objective_names),
        "folder": str(config.folder),
    }


def _judging(config: RunConfig) -> None:
    """judge.yaml, or the labelled answers that the judge's check needs."""
    own = config.self_evaluation
    if own.judge_file:
        load_judge(Path(own.judge_file))
    elif needed := to_check(config.constitution_for_run().objectives, own):
        load_labelled(Path(own.labelled) if own.labelled else None, [o.name for o in needed])


def _models(config: RunConfig) -> list[str]:
    """Those whose weights are to be here."""
    own = config.self_evaluation
    judges = [] if config.judge_engine.served else [name for name in (own.judge, own.reference_judge) if name]
    return [*([] if config.engine.served else [config.model]), *judges]
