"""The configuration of a run. Every option has a documented default; unknown keys are refused; nothing heavy is imported.

The defaults are the `robust` recipe; `paper` is the method as published. They differ only in the options listed in `RECIPES`,
each of which can be set by itself, so an ablation is one `--set`.
"""

from spalign.config.load import config_from, engine_at, load_config, parse_set
from spalign.config.parts import (
    HUB_ID,
    OUTLETS,
    DenoiseConfig,
    EngineConfig,
    EvaluationConfig,
    GateConfig,
    GuardConfig,
    LoraConfig,
    PairsConfig,
    PromptsConfig,
    PromptSource,
    RefineConfig,
    SampleConfig,
    Scorer,
    SelfEvaluationConfig,
    TrainConfig,
)
from spalign.config.run import RECIPES, RunConfig

__all__ = [
    "HUB_ID",
    "OUTLETS",
    "RECIPES",
    "DenoiseConfig",
    "EngineConfig",
    "EvaluationConfig",
    "GateConfig",
    "GuardConfig",
    "LoraConfig",
    "PairsConfig",
    "PromptSource",
    "PromptsConfig",
    "RefineConfig",
    "RunConfig",
    "SampleConfig",
    "Scorer",
    "SelfEvaluationConfig",
    "TrainConfig",
    "config_from",
    "engine_at",
    "load_config",
    "parse_set",
]
