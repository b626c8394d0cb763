"""spalign: make a language model trustworthy first and helpful second (SPA, AAAI 2026).

The public API. Importing it loads no torch; `SPAConfig` and `SPATrainer` load it when first used.
"""

import logging
from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

# PEFT imports bitsandbytes where it is installed, which then says that it misses a kernel: one without a backward pass, not used here
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)

if TYPE_CHECKING:
    from spalign.config import RunConfig, load_config
    from spalign.constitution import Constitution, Objective, load_constitution
    from spalign.engines.openai import OpenAIEngine
    from spalign.engines.scripted import ScriptedEngine
    from spalign.engines.transformers import TransformersEngine
    from spalign.errors import SpalignError
    from spalign.pipeline import run
    from spalign.preference import denoise, make_pairs, select_pairs
    from spalign.prompts import load_prompts
    from spalign.rollout import choose, draft, sample
    from spalign.selfeval import Case, JudgeFile, Judgement, judge_check, load_judge, load_labelled, score_groups, score_responses
    from spalign.training.loss import pair_weights, spa_loss
    from spalign.training.trainer import SPAConfig, SPATrainer
    from spalign.types import Message, PreferencePair, Prompt, PromptGroup, Response

_HOME = {
    "Case": "selfeval",
    "Constitution": "constitution",
    "JudgeFile": "selfeval",
    "Judgement": "selfeval",
    "Message": "types",
    "Objective": "constitution",
    "OpenAIEngine": "engines.openai",
    "PreferencePair": "types",
    "Prompt": "types",
    "PromptGroup": "types",
    "Response": "types",
    "RunConfig": "config",
    "SPAConfig": "training.trainer",
    "SPATrainer": "training.trainer",
    "ScriptedEngine": "engines.scripted",
    "SpalignError": "errors",
    "TransformersEngine": "engines.transformers",
    "choose": "rollout",
    "denoise": "preference",
    "draft": "rollout",
    "judge_check": "selfeval",
    "load_config": "config",
    "load_constitution": "constitution",
    "load_judge": "selfeval",
    "load_labelled": "selfeval",
    "load_prompts": "prompts",
    "make_pairs": "preference",
    "pair_weights": "training.loss",
    "run": "pipeline",
    "sample": "rollout",
    "score_groups": "selfeval",
    "score_responses": "selfeval",
    "select_pairs": "preference",
    "spa_loss": "training.loss",
}

__all__ = [
    "Case",
    "Constitution",
    "JudgeFile",
    "Judgement",
    "Message",
    "Objective",
    "OpenAIEngine",
    "PreferencePair",
    "Prompt",
    "PromptGroup",
    "Response",
    "RunConfig",
    "SPAConfig",
    "SPATrainer",
    "ScriptedEngine",
    "SpalignError",
    "TransformersEngine",
    "__version__",
    "choose",
    "denoise",
    "draft",
    "judge_check",
    "load_config",
    "load_constitution",
    "load_judge",
    "load_labelled",
    "load_prompts",
    "make_pairs",
    "pair_weights",
    "run",
    "sample",
    "score_groups",
    "score_responses",
    "select_pairs",
    "spa_loss",
]


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(import_module(f"spalign.{_HOME[name]}"), name)
    raise AttributeError(f"module 'spalign' has no attribute '{name}'")
