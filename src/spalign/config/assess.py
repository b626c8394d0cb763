"""A judged evaluation: which models answer which prompts, and who judges the answers."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Self

from pydantic import Field, field_validator, model_validator

from spalign.config.base import Part, PositiveInt
from spalign.config.engine import EngineConfig, checked_address
from spalign.config.parts import PromptsConfig, PromptSource
from spalign.constitution import Constitution, load_constitution

Label = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._:-]*$")]
OWN = "spalign/"
"""Before the name of a model that judges as `spalign judge-check` finds best; any other name is one of Inspect's."""


class JudgeConfig(Part):
    """Who judges."""

    model: Annotated[str, Field(pattern=r"^[^/\s]+/\S+$")]
    """Inspect's name of a model (openai/gpt-4o, anthropic/..., vllm/..., hf/...), which is asked in words; or spalign/NAME: a local model,
    read in the way that its check finds best per objective."""
    base_url: str | None = None
    """Server of an Inspect model."""
    args: dict[str, Any] = {}
    """What else Inspect's model takes, for example {model_path: FOLDER} for hf/local."""
    engine: EngineConfig | None = None
    """How a model of spalign/ is run; default: as those that answer."""
    judge_file: str | None = None
    """spalign/: a judge.yaml by `spalign judge-check`, instead of a check now."""
    max_tokens: PositiveInt = 512
    """Of a reply."""
    connections: PositiveInt = 10
    """Questions under way at a time."""
    max_retries: Annotated[int, Field(ge=0)] = 6
    """How often Inspect asks again after a lost connection, 429 or 5xx."""
    timeout: PositiveInt = 300
    """Seconds for one try."""

    @property
    def own(self) -> str | None:
        """The model of spalign/."""
        return self.model.removeprefix(OWN) if self.model.startswith(OWN) else None

    @model_validator(mode="after")
    def _of_its_kind(self) -> Self:
        if self.own and self.base_url:
            raise ValueError("base_url is for a model of Inspect's; of a spalign/ one set engine: {kind: openai, base_url: ...}")
        if not self.own and (self.engine or self.judge_file):
            raise ValueError("engine and judge_file are for a spalign/ model")
        if self.own and self.args:
            raise ValueError("args are for a model of Inspect's")
        return self

    @field_validator("base_url")
    @classmethod
    def _an_address_without_a_secret(cls, value: str | None) -> str | None:
        return checked_address(value)


class AnswerConfig(Part):
    """How the models answer: without a system prompt."""

    samples: PositiveInt = 1
    temperature: Annotated[float, Field(ge=0)] = 0.7
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    max_new_tokens: PositiveInt = 512


class MMLUConfig(Part):
    """MMLU by lm-eval."""

    source: str = "mmlu"
    """A task of lm-eval, or a JSONL file with subject, question, choices (four), answer (A to D)."""
    limit: PositiveInt | None = None
    """Questions; of a task of lm-eval for each subject."""
    fewshot: Annotated[int, Field(ge=0)] = 0
    """Examples before a question; of a task of lm-eval, which has some that are not asked."""
    batch_size: PositiveInt = 16

    @property
    def file(self) -> Path | None:
        """The local file."""
        return Path(self.source) if self.source.endswith((".jsonl", ".json")) else None

    @model_validator(mode="after")
    def _no_examples_in_a_file(self) -> Self:
        if self.file and self.fewshot:
            raise ValueError("fewshot: a file has no examples apart from its questions; use a task of lm-eval, or 0")
        return self


class MTBenchConfig(Part):
    """MT-Bench: two turns, each judged 1-10 for its quality."""

    source: str
    """Its questions: JSONL with question_id, category, turns (two), and reference where there is one."""
    references: str | None = None
    """A second file with question_id and the reference answers to both turns."""
    limit: PositiveInt | None = None


class AssessConfig(Part):
    """A judged evaluation of one model or several on the same prompts. The first is what the others are compared with."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]
    models: Annotated[dict[Label, str], Field(min_length=1)]
    """{label: hub id, folder, GGUF file or `demo`}."""
    judge: JudgeConfig | None = None
    """Needed for anything but MMLU."""
    constitution: str = "harmless_helpful"
    prompts: PromptSource | None = PromptSource(source="high_stakes_heldout")
    """What they answer; null: only utility."""
    trained_on: tuple[PromptSource, ...] = ()
    """Prompts that a model was trained on: that one of them stands in `prompts` is refused."""
    suffix: str = ""
    """Added to every prompt, as in training."""
    max_chars: PositiveInt = 20_000
    engine: EngineConfig = EngineConfig()
    answer: AnswerConfig = AnswerConfig()
    pairwise: bool = False
    """Also have each model's answers compared with the first's, in both orders."""
    lambdas: tuple[Annotated[float, Field(ge=0)], ...] = (5, 10, 20)
    """HH_lambda = (lambda * primary + secondary) / (lambda + 1)."""
    check: Annotated[int, Field(ge=0)] = 40
    """Labelled answers an objective, good and bad ones, that the judge is checked on; 0: none."""
    mmlu: MMLUConfig | None = None
    mt_bench: MTBenchConfig | None = None
    bootstrap: Annotated[int, Field(ge=100)] = 2000
    seed: Annotated[int, Field(ge=0)] = 0
    shard_size: PositiveInt = 64
    runs_dir: str = "runs"

    @model_validator(mode="after")
    def _a_judge_where_one_is_needed(self) -> Self:
        if self.judge is None and (self.prompts or self.mt_bench):
            raise ValueError("judge: who judges the answers? for example {model: openai/gpt-4o}")
        return self

    @field_validator("engine")
    @classmethod
    def _answers_here(cls, value: EngineConfig) -> EngineConfig:
        if value.served:
            raise ValueError("models answer here (transformers, vllm, ray); a served model can judge")
        return value

    @property
    def folder(self) -> Path:
        return Path(self.runs_dir) / self.name

    @property
    def prompts_config(self) -> PromptsConfig:
        """How prompts are read."""
        return PromptsConfig(suffix=self.suffix, max_chars=self.max_chars)

    def constitution_loaded(self) -> Constitution:
        return load_constitution(self.constitution)
