"""SPAConfig: the arguments of `SPATrainer`."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Literal

from transformers import TrainingArguments

from spalign.config.parts import BETA


@dataclass
class SPAConfig(TrainingArguments):  # type: ignore[misc]
    """Arguments of `SPATrainer`: those of `TrainingArguments`, and the loss's.

    A batch counts prompts: per_device_train_batch_size=2 runs two prompts, with all their responses and pairs, in one forward pass.
    loss: `spa` (Eq. 3), `simpo` (Eq. 3 with all weights 1), `dpo` (against the policy as it was before training), `sft` (on the chosen).
    beta: scale of the mean log-probabilities, for dpo of the summed ones. gamma: target margin, absolute. alpha: exponent of the weight.
    sft_weight: of the mean negative log-probability a token of the pairs' chosen responses, added to a loss of pairs (CPO's `cpo_alpha`).
    weight_column, margin_column: columns of the data to take a pair's weight (instead of Eq. 3's, for every loss of pairs) or its margin
    (instead of gamma) from.
    attention: over a packed row: `rows`, by plain causal kernels on any device, or `flex`, by torch's flex attention on CUDA.
    disable_dropout: of the model; an adapter's own stays as it is configured.
    max_length: rows whose prompt and completion exceed it are dropped and counted (None: the model's window).
    """

    loss: str = field(default="spa", metadata={"help": "spa, simpo, dpo or sft."})
    beta: float | None = field(default=None, metadata={"help": "Scale of log-probabilities; 2.5, and 0.1 for dpo."})
    gamma: float = field(default=1.0, metadata={"help": "Target margin, absolute (not gamma/beta)."})
    alpha: float = field(default=1.0, metadata={"help": "Exponent of the pair weights; 0 is plain SimPO."})
    sft_weight: float = field(default=0.0, metadata={"help": "Weight of the chosen responses' negative log-likelihood beside the pairs."})
    weight_column: str | None = field(default=None, metadata={"help": "Column with the weights of pairs."})
    margin_column: str | None = field(default=None, metadata={"help": "Column with the target margins of pairs."})
    attention: Literal["rows", "flex"] = field(default="rows", metadata={"help": "rows or flex (CUDA)."})
    disable_dropout: bool = field(default=True, metadata={"help": "Switch the model's dropout off; an adapter's own stays."})
    max_length: int | None = field(default=None, metadata={"help": "Longest prompt plus completion, in tokens."})
    learning_rate: float = field(default=1e-6, metadata={"help": "AdamW's peak learning rate."})
    logging_steps: float = field(default=1, metadata={"help": "Log every so many steps."})
    per_device_train_batch_size: int = field(default=1, metadata={"help": "Prompts in one forward pass."})
    per_device_eval_batch_size: int = field(default=1, metadata={"help": "Prompts in one forward pass of an evaluation."})
    remove_unused_columns: bool = field(default=False, metadata={"help": "Must stay false: rows are encoded by the trainer."})

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.loss not in BETA:
            raise ValueError(f"loss must be one of {', '.join(BETA)}; got {self.loss!r}")
        if self.attention not in ("rows", "flex"):
            raise ValueError(f"attention must be rows or flex; got {self.attention!r}")
        if self.beta is None:
            self.beta = BETA[self.loss]
        if not 0 < self.beta < math.inf or not all(0 <= x < math.inf for x in (self.gamma, self.alpha, self.sft_weight)):
            numbers = f"{self.beta}, {self.gamma}, {self.alpha}, {self.sft_weight}"
            raise ValueError(f"beta must be > 0, gamma, alpha and sft_weight >= 0; got {numbers}")
        if self.max_length is not None and self.max_length < 2:
            raise ValueError(f"max_length must hold a prompt and a completion; got {self.max_length}")
        if mistake := self._without_effect() or self._other_numbers():
            raise ValueError(mistake)

    def _without_effect(self) -> str | None:
        """What is asked for and does nothing, in words."""
        pairs = self.loss in ("spa", "simpo")
        found = {
            f"margin_column: loss {self.loss} has no margin": self.margin_column is not None and not pairs,
            "weight_column: loss sft has no pairs": self.weight_column is not None and self.loss == "sft",
            "sft_weight: loss sft is that loss": self.sft_weight > 0 and self.loss == "sft",
            "bf16_full_eval, fp16_full_eval: an evaluation is in the precision of training": self.bf16_full_eval or self.fp16_full_eval,
            "label_smoothing_factor: no loss here smooths labels": self.label_smoothing_factor != 0,
        }
        return next((what for what, so in found.items() if so), None)

    def _other_numbers(self) -> str | None:
        """What would make the numbers other ones than those of the loss's equation, in words."""
        several, spread = self.world_size > 1, self.accelerator_config
        found = {
            "use_liger_kernel would replace the forward pass that the tiled LM head is part of: leave it out": self.use_liger_kernel,
            "fp16: its gradients overflow by design until their scale fits, and a gradient that is not finite stops training here; use "
            "bf16, or neither": self.fp16,
            "neftune_noise_alpha: its noise depends on what else is in a row of several prompts": self.neftune_noise_alpha is not None,
            f"train_sampling_strategy {self.train_sampling_strategy}: rows are packed without padding; use random or sequential": (
                self.train_sampling_strategy not in ("random", "sequential")
            ),
            "with several processes accelerator_config must be even_batches: true, split_batches: false, dispatch_batches: null or false": (
                several and (not spread.even_batches or spread.split_batches or bool(spread.dispatch_batches))
            ),
            "ignore_data_skip with several processes would count prompts twice": several and self.ignore_data_skip,
        }
        return next((what for what, so in found.items() if so), None)

    @property
    def weighs_by_gap(self) -> bool:
        """Whether Eq. 3's weights are in use."""
        return self.loss == "spa" and self.alpha > 0 and self.weight_column is None
