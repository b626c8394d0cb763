"""The configuration of a run. Every option has a documented default; unknown keys are refused; nothing heavy is imported.

The defaults are the `robust` recipe; `paper` is the method as published. They differ only in the options listed in `RECIPES`,
each of which can be set by itself, so an ablation is one `--set`.
"""

from spalign.config.assess import AssessConfig, JudgeConfig, MMLUConfig, MTBenchConfig
from spalign.config.engine import EngineConfig
from spalign.config.experiment import DATA_ARM, Arm, ExperimentConfig, experiment_names, load_experiment
from spalign.config.load import config_from, engine_at, load_assess, load_config, parse_set
from spalign.config.parts import (
    HUB_ID,
    OUTLETS,
    DenoiseConfig,
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
    "DATA_ARM",
    "HUB_ID",
    "OUTLETS",
    "RECIPES",
    "Arm",
    "AssessConfig",
    "DenoiseConfig",
    "EngineConfig",
    "EvaluationConfig",
    "ExperimentConfig",
    "GateConfig",
    "GuardConfig",
    "JudgeConfig",
    "LoraConfig",
    "MMLUConfig",
    "MTBenchConfig",
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
    "experiment_names",
    "load_assess",
    "load_config",
    "load_experiment",
    "parse_set",
]
