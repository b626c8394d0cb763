"""A run's configuration from its YAML file and `--set`, with every mistake at its place."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from spalign.config.assess import AssessConfig
from spalign.config.engine import EngineConfig
from spalign.config.run import RECIPES, RunConfig, merge
from spalign.errors import ConfigError
from spalign.yamlfile import Location, build, load_yaml


def parse_set(text: str) -> tuple[list[str], Any]:
    """`a.b=c` as (["a", "b"], c); the value is read as YAML, so numbers, lists and null work."""
    key, eq, value = text.partition("=")
    if not eq or not all(key.split(".")):
        raise ConfigError(f"--set {text!r} is not KEY=VALUE", hint="for example --set train.learning_rate=1e-6")
    try:
        parsed = yaml.safe_load(value)
    except (yaml.YAMLError, ValueError, RecursionError):
        raise ConfigError(
            f"--set {text!r}: the value is not valid YAML", hint="quote it for the shell, for example --set 'prompts.suffix=\"Be brief.\"'"
        ) from None
    return key.split("."), parsed


def engine_at(base_url: str | None) -> EngineConfig:
    """The engine of a model that is served there; None: of one that runs here. Raises ConfigError."""
    data = {"kind": "openai", "base_url": base_url} if base_url is not None else {}
    return build(EngineConfig, data, source="--base-url", lines={}, error=ConfigError)


def load_config(path: str | Path, sets: tuple[str, ...] = ()) -> RunConfig:
    """The run's configuration: recipe, then the file, then each `--set a.b=c`.

    Raises ConfigError with every mistake at once, each with its line where it stands in the file.
    """
    data, lines = load_yaml(Path(path), ConfigError)
    return config_from(data, sets, source=str(path), lines=lines)


def config_from(
    data: Mapping[str, Any], sets: tuple[str, ...] = (), *, source: str = "config", lines: dict[Location, int] | None = None
) -> RunConfig:
    """As `load_config`, from a mapping."""
    merged, places = with_sets(data, sets, lines or {})
    recipe = RECIPES.get(str(merged.get("recipe", "robust")), {})
    return build(RunConfig, merge(recipe, merged), source=source, lines=places, error=ConfigError)


def load_assess(path: str | Path, sets: tuple[str, ...] = ()) -> AssessConfig:
    """A judged evaluation's configuration, likewise. Raises ConfigError with every mistake at once."""
    data, lines = load_yaml(Path(path), ConfigError)
    merged, places = with_sets(data, sets, lines)
    return build(AssessConfig, merged, source=str(path), lines=places, error=ConfigError)


def with_sets(
    data: Mapping[str, Any], sets: tuple[str, ...], lines: Mapping[Location, int]
) -> tuple[dict[str, Any], dict[Location, int | str]]:
    """The mapping with each `--set a.b=c` laid on it, and the place of every value."""
    merged = dict(data)
    places: dict[Location, int | str] = dict(lines)
    for text in sets:
        keys, value = parse_set(text)
        nested: Any = value
        for key in reversed(keys):
            nested = {key: nested}
        merged = merge(merged, nested)
        # what --set says is not in the file: point at the flag instead of a line
        places = {at: place for at, place in places.items() if at[: len(keys)] != tuple(keys)}
        places[tuple(keys)] = f"--set {text}"
    return merged, places
