"""Stops training when the policy collapses: measured on its own answers to a few training prompts, as it learns."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from spalign.config import GuardConfig


@dataclass(frozen=True, slots=True)
class Probe:
    """words: mean per answer. repetition: share of repeated word 3-grams. empty: share of blank answers.

    kl: nats a token that the policy's answers before training have lost: an estimate of KL(before || now), its samples being drawn before.
    chosen: mean nats a token of some chosen responses.
    """

    words: float
    repetition: float
    empty: float
    kl: float = 0.0
    chosen: float = 0.0


def collapse(before: Probe, now: Probe, config: GuardConfig) -> str | None:
    """What has collapsed, in words, or None."""
    ratio = now.words / before.words if before.words else (float("inf") if now.words else 1.0)
    found = {
        f"length collapse: answers fell from {before.words:.0f} to {now.words:.0f} words": ratio < 1 / config.max_length_ratio,
        f"length explosion: answers grew from {before.words:.0f} to {now.words:.0f} words": ratio > config.max_length_ratio,
        f"repetition: repeated 3-grams rose from {before.repetition:.0%} to {now.repetition:.0%}": now.repetition - before.repetition
        > config.max_repetition_rise,
        f"empty answers: {before.empty:.0%} before, {now.empty:.0%} now": now.empty - before.empty > 0.1,
        # `not <=`: a number that is none is a collapse too
        f"drift: KL from the policy before training is {now.kl:.2f} nats a token": not now.kl <= config.max_kl,
        f"chosen responses became unlikely: from {before.chosen:.2f} to {now.chosen:.2f} nats a token": not before.chosen - now.chosen
        <= config.max_chosen_drop,
    }
    return next((what for what, so in found.items() if so), None)


class CollapseGuard(TrainerCallback):  # type: ignore[misc]
    """Probes every config.every_steps steps and after the last.

    A passing probe saves a checkpoint; a failing one stops training. Nothing else saves one, whatever `save_strategy` says, so every
    checkpoint is of a policy that passed. Probes stand in the trainer's `log_history`, which checkpoints carry over a resume.
    """

    def __init__(self, probe: Callable[[Any], Probe], before: Probe, config: GuardConfig) -> None:
        self._probe, self._before, self._config = probe, before, config
        self.collapsed: str | None = None

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> TrainerControl:
        last = state.global_step >= state.max_steps
        if state.global_step % self._config.every_steps and not last:
            control.should_save = False
            return control
        now = self._probe(kwargs["model"])
        state.log_history.append({"step": state.global_step, **asdict(now)})
        self.collapsed = collapse(self._before, now, self._config)
        control.should_save = self.collapsed is None
        control.should_training_stop = control.should_training_stop or self.collapsed is not None
        return control

    def on_epoch_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> TrainerControl:
        control.should_save = False  # save_strategy="epoch" has just asked for an unprobed checkpoint
        return control
