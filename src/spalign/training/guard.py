"""Stops training when the policy collapses: measured on its own answers to a few training prompts, as it learns."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any, Protocol

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from spalign.config import GuardConfig
from spalign.errors import DataError


@dataclass(frozen=True, slots=True)
class Probe:
    """words: mean per answer. repetition: share of repeated word 3-grams. empty: share of blank answers.

    kl: nats a token that the policy's answers before training have lost: an estimate of KL(before || now), its samples being drawn before.
    chosen: mean nats a token of some chosen responses. words_error: standard error of `words`.
    """

    words: float
    repetition: float
    empty: float
    kl: float = 0.0
    chosen: float = 0.0
    words_error: float = 0.0


Z = 1.645
"""A length is another one where it is so beyond chance: one-sided, 95%. A dozen short answers vary by half from draw to draw."""


def collapse(before: Probe, now: Probe, config: GuardConfig) -> str | None:
    """What has collapsed, in words, or None."""
    ratio = now.words / before.words if before.words else (math.inf if now.words else 1.0)
    chance = math.exp(Z * math.hypot(*(p.words_error / p.words for p in (before, now) if p.words)))
    found = {
        f"length collapse: answers fell from {before.words:.0f} to {now.words:.0f} words": ratio * chance < 1 / config.max_length_ratio,
        f"length explosion: answers grew from {before.words:.0f} to {now.words:.0f} words": ratio / chance > config.max_length_ratio,
        f"repetition: repeated 3-grams rose from {before.repetition:.0%} to {now.repetition:.0%}": now.repetition - before.repetition
        > config.max_repetition_rise,
        f"empty answers: {before.empty:.0%} before, {now.empty:.0%} now": now.empty - before.empty > 0.1,
        # `not <=`: a number that is none is a collapse too
        f"drift: KL from the policy before training is {now.kl:.2f} nats a token": not now.kl <= config.max_kl,
        f"chosen responses became unlikely: from {before.chosen:.2f} to {now.chosen:.2f} nats a token": not before.chosen - now.chosen
        <= config.max_chosen_drop,
    }
    return next((what for what, so in found.items() if so), None)


class Prober(Protocol):
    """Looks at a policy by what it answers."""

    def first(self, model: Any) -> dict[str, Any]:
        """As JSON: `figures`, a `Probe`'s, and what else later looks are held against."""
        ...

    def again(self, model: Any, first: dict[str, Any]) -> Probe: ...


class CollapseGuard(TrainerCallback):  # type: ignore[misc]
    """Probes before the first step, every config.every_steps steps and after the last.

    A passing probe saves a checkpoint; a failing one stops training. Nothing else saves one, whatever `save_strategy` says, so every
    checkpoint is of a policy that passed. Probes, and what the first one found, stand in the trainer's `log_history`, which checkpoints
    carry over a resume.
    """

    def __init__(self, prober: Prober, config: GuardConfig) -> None:
        self._prober, self._config = prober, config
        self._first: dict[str, Any] = {}
        self.collapsed: str | None = None

    @property
    def before(self) -> Probe:
        """Of the policy as it was before training."""
        return Probe(**self._first["figures"])

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> TrainerControl:
        kept = next((h["before"] for h in state.log_history if "before" in h), None)
        if kept is None and state.global_step:  # what it was cannot be found out any more
            raise DataError(
                f"the checkpoint of step {state.global_step} is of an earlier version: what the policy was before training is not in it",
                hint=f"remove {args.output_dir} to train from the start",
            )
        self._first = kept or self._prober.first(kwargs["model"])
        if kept is None:
            state.log_history.append({"step": 0, "before": self._first})
        return control

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> TrainerControl:
        last = state.global_step >= state.max_steps
        if state.global_step % self._config.every_steps and not last:
            control.should_save = False
            return control
        now = self._prober.again(kwargs["model"], self._first)
        state.log_history.append({"step": state.global_step, **asdict(now)})
        self.collapsed = collapse(self.before, now, self._config)
        control.should_save = self.collapsed is None
        control.should_training_stop = control.should_training_stop or self.collapsed is not None
        return control

    def on_epoch_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> TrainerControl:
        control.should_save = False  # save_strategy="epoch" has just asked for an unprobed checkpoint
        return control
