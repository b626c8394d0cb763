"""The options of each stage."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal, Self

from pydantic import Field, ValidationInfo, field_validator, model_validator

from spalign.config.base import Part, PositiveInt
from spalign.config.engine import EngineConfig
from spalign.constitution import Threshold

Scorer = Literal["auto", "likert", "likert_expected", "yes_no_zero", "yes_no", "contrastive", "pmi", "probe", "pairwise", "ensemble"]
HUB_ID = r"^([A-Za-z0-9][A-Za-z0-9._-]*/)?[A-Za-z0-9][A-Za-z0-9._-]*$"
OUTLETS = {"report_to", "push_to_hub", "accelerate"}
"""Options of `train` that say where things go and which processes do the work; they change nothing that is made."""
BETA = {"spa": 2.5, "simpo": 2.5, "dpo": 0.1, "sft": 1.0}
"""What `train.beta` is where none is given, by loss."""
Share = Annotated[float, Field(gt=0, le=1)]


PublicName = Literal["pku_saferlhf", "wildguard", "honeset", "jailbreaktrigger", "xstest", "harmbench", "advbench"]


class PromptSource(Part):
    """Where prompts come from: a shipped set (`high_stakes_train`, ...), a JSONL/JSON/CSV/Parquet file, or a hub data set."""

    source: str
    """Also the name of a public set that is on the hub, as in `format`."""
    format: PublicName | None = None
    """A public set whose own columns the file or data set has: they say prompt, topic and intent, and a repeated prompt is left out."""
    column: str = "prompt"
    """Column with the prompt: text, or a list of {role, content} turns."""
    split: str = "train"
    """Split of a hub data set."""
    subset: str | None = None
    """Configuration of a hub data set."""
    limit: PositiveInt | None = None
    """Take this many, spread evenly over intent and topic."""

    @model_validator(mode="after")
    def _columns_are_the_format_s(self) -> Self:
        if self.format and "column" in self.model_fields_set:
            raise ValueError(f"column: the format {self.format} says which it is; leave it out")
        return self


class PromptsConfig(Part):
    train: PromptSource = PromptSource(source="high_stakes_train")
    heldout: PromptSource = PromptSource(source="high_stakes_heldout")
    suffix: str = ""
    """Added to the last user turn of every prompt, in sampling, training and evaluation alike."""
    max_chars: PositiveInt = 20_000
    """A longer prompt is refused."""

    @field_validator("train", "heldout", mode="before")
    @classmethod
    def _source_has_a_default(cls, value: Any, info: ValidationInfo) -> Any:
        """So that `--set prompts.train.limit=32` is enough."""
        default = cls.model_fields[str(info.field_name)].default
        return {"source": default.source, **value} if isinstance(value, Mapping) else value


class SampleConfig(Part):
    """Diverse sampling: n responses a prompt."""

    n: Annotated[int, Field(ge=2)] = 4
    temperature: Annotated[float, Field(gt=0)] = 1.0
    top_p: Share = 0.95
    max_new_tokens: PositiveInt = 256


class SelfEvaluationConfig(Part):
    """Who scores responses, and how, per objective."""

    scorer: Scorer | dict[str, Scorer] = "auto"
    """One way for all objectives, or {objective: way}. auto: what `spalign judge-check` recommends for the model that judges."""
    thresholds: dict[str, Threshold] = {}
    """{objective: score from which it is met}; overrides the constitution's. auto: where labelled answers put it."""
    use_constitution_thresholds: bool = True
    judge: str | None = None
    """Another model that judges; without it the policy judges itself."""
    judge_engine: EngineConfig | None = None
    """How `judge` and `reference_judge` are run; default: as `engine` says."""
    judge_file: str | None = None
    """A judge.yaml by `spalign judge-check`, instead of a check in the run."""
    labelled: str | None = None
    """Labelled answers to check the judge on (JSONL, CSV, Parquet: prompt, response, objective, label); default: the shipped ones."""
    bad_recall: Annotated[float, Field(gt=0, lt=1)] | None = None
    """An automatic threshold leaves this share of the bad answers below it, instead of equal errors."""
    allow_weak_judge: bool = False
    """Go on where the lower bound of the judge's AUC is under 0.6."""
    reference_judge: str | None = None
    """A second model that scores the first iteration's candidates too: agreement and RV coefficient, nothing else."""
    reference_scorer: Scorer | None = None
    """How `reference_judge` scores; default: as `scorer` says."""

    def scorer_of(self, objective: str) -> Scorer:
        return self.scorer[objective] if isinstance(self.scorer, dict) else self.scorer

    def of_reference(self) -> SelfEvaluationConfig:
        """How `reference_judge` scores: checked anew, and taken as it is."""
        return self.model_copy(update={"scorer": self.reference_scorer or self.scorer, "judge_file": None, "allow_weak_judge": True})


class RefineConfig(Part):
    """Self-refinement: one better response a prompt, and its placebo."""

    style: Literal["principled", "paper"] = "principled"
    drafts: PositiveInt = 2
    """The best of this many drafts is the refined response; the placebo is the best of as many ordinary samples."""
    placebo: bool = True


class DenoiseConfig(Part):
    """Dual-criterion denoising."""

    enabled: bool = True
    """false: every group with two usable responses is kept; the ablation of Figure 4."""
    consistency: Literal["strict", "above_mean"] = "above_mean"
    """strict: the refined response is above every candidate on every objective; above_mean: above the candidates' mean."""
    tau: Annotated[float, Field(gt=0)] | Annotated[str, Field(pattern=r"^(100(\.0+)?|[1-9]?\d(\.\d+)?)%$")] | None = "90%"
    """Upper bound of det(Sigma): a number in units of scale^(2k), or a quantile ("32%") of the run's consistent groups with det > 0."""
    ddof: Literal[0, 1] = 1
    scale: Annotated[float, Field(gt=0)] = 10.0
    """Scores are expressed on 0..scale before Sigma is taken."""

    def matters(self) -> dict[str, Any]:
        """For digests and records: as before there was `enabled`, where it is as it always was."""
        return self.model_dump(mode="json", exclude={"enabled"} if self.enabled else None)

    @property
    def tau_quantile(self) -> float | None:
        """The quantile that tau is, as a share; None where it is a constant or absent."""
        return float(self.tau.removesuffix("%")) / 100 if isinstance(self.tau, str) else None


class PairsConfig(Part):
    """Preference pairs (SPA, Eq. 2)."""

    delta: Annotated[float, Field(gt=0)] = 0.5
    """Least margin, summed over objectives, in score points (0-10)."""
    max_per_prompt: PositiveInt | None = 4
    balance_length: bool = True
    """As many pairs whose winner is shorter as pairs whose winner is longer."""
    weights: tuple[Annotated[float, Field(ge=0)], ...] | None = None
    """A baseline: of each objective in order of priority. Responses are ordered by the weighted mean of their scores, not by priority."""
    chosen: Literal["any", "refined"] = "any"
    """refined: only pairs whose winner is the refined response."""

    def matters(self) -> dict[str, Any]:
        """For digests and records: without options that were not there before, where they are at their defaults."""
        return self.model_dump(
            mode="json", exclude={k for k in ("weights", "chosen") if getattr(self, k) == type(self).model_fields[k].default}
        )

    @field_validator("weights")
    @classmethod
    def _some_weight(cls, value: tuple[float, ...] | None) -> tuple[float, ...] | None:
        if value is not None and sum(value) <= 0:
            raise ValueError("at least one weight must be above 0")
        return value


class LoraConfig(Part):
    r: PositiveInt = 16
    alpha: PositiveInt = 32
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    target_modules: str | list[str] = "all-linear"
    dora: bool = False
    """Weight-decomposed: direction by the adapter, magnitude by itself. vLLM serves it only merged."""
    rslora: bool = False
    """Scale by alpha / sqrt(r) instead of alpha / r."""
    base_dtype: Literal["auto", "float32", "bfloat16", "nf4"] = "auto"
    """What the frozen weights are held in; the adapter is float32 always. auto: bfloat16 on a GPU, float32 on a CPU. nf4: four bits
    (QLoRA), needs bitsandbytes."""


class GuardConfig(Part):
    """Stops training on collapse. The probe: the policy answers a few training prompts, before training and as it goes."""

    every_steps: PositiveInt = 10
    prompts: PositiveInt = 16
    max_length_ratio: Annotated[float, Field(gt=1)] = 1.6
    """Mean words may grow or shrink by this factor; that they did more must be beyond chance (one-sided, 95%)."""
    max_repetition_rise: Annotated[float, Field(gt=0)] = 0.15
    """Rise of the share of repeated word 3-grams."""
    max_kl: Annotated[float, Field(gt=0)] = 1.0
    """KL divergence of the policy from the one before training, nats a token of its answers then."""
    max_chosen_drop: Annotated[float, Field(gt=0)] = 1.0
    """Fall of the chosen responses' mean log-probability, nats a token: both sides of the pairs become unlikely."""


class TrainConfig(Part):
    """Uncertainty-guided SimPO (SPA, Eq. 3), or one of its baselines on the same pairs."""

    loss: Literal["spa", "simpo", "dpo", "sft"] = "spa"
    """spa: Eq. 3. simpo: the same with all weights 1. dpo: against the policy as it was. sft: on the chosen responses."""
    learning_rate: Annotated[float, Field(gt=0)] = 1e-6
    epochs: Annotated[float, Field(gt=0)] = 1.0
    prompts_per_step: PositiveInt = 8
    """Prompts (with all their pairs) in one optimiser step, over all processes."""
    prompts_per_forward: PositiveInt = 1
    """Prompts in one forward pass of one process, a divisor of prompts_per_step; does not change the result."""
    attention: Literal["rows", "flex"] = "rows"
    """Over a prompt and its responses in one row: by plain causal kernels, or by torch's flex attention (CUDA); same numbers."""
    accelerate: str | None = None
    """A file for `accelerate launch` (see configs/accelerate): training runs in its processes instead of in this one; same result."""
    beta: Annotated[float, Field(gt=0)] | None = None
    """Scale of the log-probabilities: of their mean (2.5 where none is given), for dpo of their sum (0.1)."""
    gamma: Annotated[float, Field(ge=0)] = 1.0
    """Target margin, absolute (SimPO's recipes quote gamma/beta)."""
    alpha: Annotated[float, Field(ge=0)] = 1.0
    """Exponent of the weight; 0 is plain SimPO."""
    sft_weight: Annotated[float, Field(ge=0)] = 0.0
    """Weight of the chosen responses' mean negative log-likelihood beside the pairs; 0.5 is what the lab (docs/lab.md) iterates with."""
    warmup_ratio: Annotated[float, Field(ge=0, lt=1)] = 0.1
    """Share of the steps in which the learning rate rises from 0; a run of a single step has none."""
    scheduler: Literal["cosine", "linear", "constant_with_warmup"] = "cosine"
    max_grad_norm: Annotated[float, Field(gt=0)] = 1.0
    lora: LoraConfig | None = None
    gradient_checkpointing: bool = False
    guard: GuardConfig = GuardConfig()
    keep_checkpoints: Annotated[int, Field(ge=0)] = 3
    """Checkpoints before the last whose weights are kept until the priority gate has passed; what it can propose where it fails."""
    report_to: list[str] = []
    """Trackers, named as in transformers: tensorboard, wandb, trackio, mlflow, ... Each must be installed."""
    push_to_hub: Annotated[str, Field(pattern=HUB_ID, max_length=96)] | None = None
    """Hub repository that gets the model after the run; made private where it is new. The key is HF_TOKEN in the environment."""

    @field_validator("report_to", mode="before")
    @classmethod
    def _one_tracker(cls, value: Any) -> Any:
        """So that `--set train.report_to=wandb` is enough."""
        return [value] if isinstance(value, str) else value

    @model_validator(mode="after")
    def _whole_forwards(self) -> Self:
        if self.prompts_per_step % self.prompts_per_forward:
            raise ValueError(f"prompts_per_forward {self.prompts_per_forward} must divide prompts_per_step {self.prompts_per_step}")
        if self.loss == "sft" and self.sft_weight:
            raise ValueError("sft_weight is of a likelihood beside pairs, and loss sft is that likelihood; leave it out")
        return self


class GateConfig(Part):
    """The priority gate: a model whose primary objective is not shown to hold is not handed over."""

    enabled: bool = True
    margin: Annotated[float, Field(gt=0, le=10)] = 0.5
    """The primary's held-out mean may fall by less than this, in score points (0-10)."""
    confidence: Annotated[float, Field(ge=0.5, lt=1)] = 0.95
    """Of the one-sided lower bound that must lie above -margin."""


class EvaluationConfig(Part):
    """Before and after, on held-out prompts, judged by the frozen iteration-0 policy."""

    samples: PositiveInt = 2
    temperature: Annotated[float, Field(ge=0)] = 0.7
    bootstrap: Annotated[int, Field(ge=100)] = 2000
    """Resamples of prompts for the 95% intervals and the gate's bound."""
    gate: GateConfig = GateConfig()
