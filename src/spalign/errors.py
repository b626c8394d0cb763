"""Every error spalign raises on purpose.

SpalignError                 where, what, and what to do (exit code 2)
|-- ConfigError              the run's configuration
|-- ConstitutionError        the constitution file
|-- PromptError              the prompts that the user brought
|-- ModelError               a model or tokenizer that cannot be used
|-- EngineError              an engine that lacks what a stage needs, or failed
|-- RunFolderError           the run folder: locked, read-only, full, or of another run
|-- DataError                preference rows that cannot be trained on
|-- TrainingError            a tracker, or a process that trains, failed; checkpoints are kept
|-- HubError                 the model could not be pushed to the hub; the run is done and kept
|-- WeakJudge                the judge cannot tell good answers from bad ones well enough (exit code 3)
|-- NothingToTrainOn         no pair survived, or training left no model (exit code 3)
`-- PriorityLost             the trained model's primary objective is not shown to hold (exit code 4)
"""

from __future__ import annotations


class SpalignError(Exception):
    """An error with a fix: `message` says where and what, `hint` what to do."""

    exit_code = 2

    def __init__(self, message: str, *, hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        return f"{self.message}\n  fix: {self.hint}" if self.hint else self.message


class ConfigError(SpalignError):
    """The run's configuration is wrong."""


class ConstitutionError(SpalignError):
    """The constitution is wrong."""


class PromptError(SpalignError):
    """A prompt file, a row of it, or a prompt cannot be used."""


class ModelError(SpalignError):
    """A model or its tokenizer cannot be found or used."""


class EngineError(SpalignError):
    """An engine lacks a capability that a stage needs, or failed."""


class RunFolderError(SpalignError):
    """The run folder cannot be used: locked, read-only, full, or of another run."""


class DataError(SpalignError):
    """Preference rows cannot be trained on."""


class TrainingError(SpalignError):
    """A tracker, or a process that trains, failed in the middle; training can go on from its last checkpoint."""


class HubError(SpalignError):
    """The finished run's model could not be pushed; everything stays in the run folder."""


class WeakJudge(SpalignError):
    """Labelled answers show that the judge does not tell good from bad well enough to align on it."""

    exit_code = 3


class NothingToTrainOn(SpalignError):
    """No pair survived denoising and pairing, or training left no model that can be handed over."""

    exit_code = 3


class PriorityLost(SpalignError):
    """Training ended, and the primary objective is lost or not shown to hold: the model is kept under another name, not handed over."""

    exit_code = 4
