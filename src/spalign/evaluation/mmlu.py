"""MMLU by lm-eval: its own task from the hub, or the same task on a local file of questions."""

from __future__ import annotations

import contextlib
import json
import os
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from spalign.config import EngineConfig, MMLUConfig
from spalign.errors import EngineError
from spalign.evaluation.question_files import questions_in, spread
from spalign.startup import whole
from spalign.text import printable, shorten

_LETTERS = "ABCD"
_TEMPLATE = "{{question.strip()}}\nA. {{choices[0]}}\nB. {{choices[1]}}\nC. {{choices[2]}}\nD. {{choices[3]}}\nAnswer:"


def mmlu(model: str, config: MMLUConfig, engine: EngineConfig) -> list[dict[str, Any]]:
    """One row a question: subject, id, and correct (0 or 1). The answer is the most likely of the four letters after the question.

    Raises PromptError for a file that is none, EngineError where lm-eval fails.
    """
    local = config.file is not None
    questions = load_mmlu(config)
    with _left_as_it_was(local), tempfile.TemporaryDirectory() as folder:
        whole()
        from lm_eval import simple_evaluate
        from lm_eval.models.huggingface import HFLM

        from spalign.engines.loading import device_of, inference_dtype, load_model

        weights, tokenizer = load_model(model, engine, dtype=inference_dtype(engine))
        weights.to(device_of(engine)).eval()
        lm = HFLM(pretrained=weights, tokenizer=tokenizer, batch_size=config.batch_size, trust_remote_code=engine.trust_remote_code)
        try:
            found = simple_evaluate(
                lm,
                tasks=[_task(questions, Path(folder))] if local else [config.source],
                num_fewshot=config.fewshot,
                limit=None if local else config.limit,
                bootstrap_iters=0,
                log_samples=True,
            )
        except Exception as e:  # of the hub, of data sets, of the task's own code
            raise EngineError(
                f"lm-eval failed on '{config.source}': {type(e).__name__}: {shorten(printable(' '.join(str(e).split())), 300)}",
                hint="a task of lm-eval needs the hub; without it give a JSONL file (subject, question, choices, answer)",
            ) from e
    rows = [
        {"subject": sample["doc"].get("subject", task), "id": f"{task}/{sample['doc_id']}", "correct": int(sample["acc"])}
        for task, samples in (found or {})["samples"].items()
        for sample in samples
    ]
    if not rows:
        raise EngineError(f"lm-eval gave no answers for '{config.source}'", hint="name a task with the metric acc, such as mmlu")
    return sorted(rows, key=lambda r: (r["subject"], r["id"]))


def load_mmlu(config: MMLUConfig) -> list[dict[str, Any]]:
    """The file's questions, answers as numbers 0..3; none for a task of lm-eval. Raises PromptError with all mistakes at once."""
    if config.file is None:
        return []
    needs = "each row needs subject, question, choices (four texts), answer (A to D)"
    columns = ("subject", "question", "choices", "answer")
    return spread(questions_in(config.file, _question, columns=columns, what="a question of MMLU", needs=needs), config.limit)


def _question(row: Mapping[str, Any]) -> dict[str, Any]:
    """Raises TypeError, KeyError or ValueError for what is none."""
    choices, answer = row["choices"], row["answer"]
    texts = isinstance(choices, list) and len(choices) == len(_LETTERS) and all(isinstance(c, str) for c in choices)
    number = _LETTERS.index(answer) if isinstance(answer, str) and len(answer) == 1 and answer in _LETTERS else answer
    if not (isinstance(row["question"], str) and texts and type(number) is int and 0 <= number < len(_LETTERS)):
        raise TypeError
    return {"subject": str(row.get("subject", "")), "question": row["question"], "choices": choices, "answer": number}


def _task(questions: list[dict[str, Any]], folder: Path) -> dict[str, Any]:
    """A task of lm-eval with MMLU's own template on these questions."""
    path = folder / "questions.jsonl"
    path.write_text("".join(json.dumps(q) + "\n" for q in questions), encoding="utf-8")
    return {
        "task": "mmlu_file",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(path)}, "cache_dir": str(folder / "cache")},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": _TEMPLATE,
        "doc_to_choice": list(_LETTERS),
        "doc_to_target": "answer",
        "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
        "metadata": {"version": 1.0},
    }


@contextlib.contextmanager
def _left_as_it_was(local: bool) -> Iterator[None]:
    """lm-eval asks the hub for metrics and modules even where all is local, and leaves torch with fewer threads."""
    import torch

    before, threads = os.environ.get("HF_HUB_OFFLINE"), torch.get_num_threads()
    if local:
        os.environ["HF_HUB_OFFLINE"] = "1"
    try:
        yield
    finally:
        torch.set_num_threads(threads)
        if local:
            os.environ.pop("HF_HUB_OFFLINE")
            if before is not None:
                os.environ["HF_HUB_OFFLINE"] = before
