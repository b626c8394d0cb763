"""Trackers (`train.report_to`): checked before a run, and named where they fail in the middle of it."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import Any

from spalign.errors import ConfigError, TrainingError
from spalign.text import one_line, printable, shorten, without_keys


def check_trackers(names: Sequence[str]) -> None:
    """Raises ConfigError for a tracker that is unknown or not installed."""
    from transformers.integrations import get_available_reporting_integrations
    from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK

    for name in names:
        if name not in INTEGRATION_TO_CALLBACK:
            raise ConfigError(
                f"train.report_to: there is no tracker {name!r}",
                hint=f"name some of: {', '.join(sorted(INTEGRATION_TO_CALLBACK))}; an empty list reports nowhere",
            )
    there = get_available_reporting_integrations()
    for name in names:
        if name not in there and name != "flyte":  # which transformers does not list
            raise ConfigError(f"train.report_to: {name} is not installed", hint=f"pip install {name.replace('_', '-')}, or leave it out")


def tracker_callbacks(names: Sequence[str]) -> list[Any]:
    """The callbacks of these trackers; whatever they raise is a TrainingError that names them."""
    from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK

    trackers = []
    for name in names:
        tracker = _named(name, INTEGRATION_TO_CALLBACK[name])()
        for event in (e for e in dir(tracker) if e.startswith("on_")):
            setattr(tracker, event, _named(name, getattr(tracker, event)))
        trackers.append(tracker)
    return trackers


def _named(name: str, call: Callable[..., Any]) -> Callable[..., Any]:
    def named(*args: Any, **kwargs: Any) -> Any:
        try:
            return call(*args, **kwargs)
        except Exception as e:  # a network, a service, a disk: anything
            said = shorten(one_line(printable(without_keys(f"{type(e).__name__}: {e}", os.environ))))
            raise TrainingError(
                f"the tracker '{name}' failed, and training stopped: {said}",
                hint="nothing is lost: the same command goes on from the last checkpoint; without the tracker: --set 'train.report_to=[]'",
            ) from e

    return named
