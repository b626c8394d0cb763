"""YAML read with line numbers, checked by pydantic, every mistake reported at once with its line and a fix."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar, get_origin

import yaml
from pydantic import BaseModel, ValidationError

from spalign.errors import SpalignError

Location = tuple[str | int, ...]
Model = TypeVar("Model", bound=BaseModel)


def read_text(path: Path, error: type[SpalignError]) -> str:
    """The file's text; a missing, unreadable or wrongly encoded file is an `error` that says which."""
    try:
        return path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as e:
        line = e.object[: e.start].count(b"\n") + 1
        raise error(f"{path}:{line}: not valid UTF-8 (byte {e.start})", hint="save the file as UTF-8") from None
    except FileNotFoundError:
        raise error(f"{path}: no such file", hint="check the path; it is relative to the folder you stand in") from None
    except OSError as e:
        raise error(f"{path}: cannot be read ({e.strerror})", hint="check that it is a file you may read") from None


def load_yaml(path: Path, error: type[SpalignError]) -> tuple[dict[str, Any], dict[Location, int]]:
    """The mapping in the file, and the line (from 1) of every key and item in it."""
    text = read_text(path, error)
    lines: dict[Location, int] = {}
    try:
        data = yaml.safe_load(text)  # first: it refuses keys that are lists
        node = yaml.compose(text, Loader=yaml.SafeLoader)
        if node is not None:
            _collect_lines(node, (), lines, str(path), error)
    except yaml.MarkedYAMLError as e:
        at = f":{e.problem_mark.line + 1}" if e.problem_mark else ""
        raise error(f"{path}{at}: not valid YAML: {e.problem}", hint="indent with spaces; quote text that holds ': ' or '#'") from None
    except yaml.YAMLError as e:
        raise error(f"{path}: not valid YAML: {e}", hint="the file holds characters that YAML does not allow") from None
    except ValueError as e:  # what looks like a date and is none
        raise error(f"{path}: not valid YAML: {e}", hint="quote what looks like a date but is text") from None
    except RecursionError:
        raise error(f"{path}: nested too deeply, or an anchor holds itself", hint="write it out with fewer levels") from None
    if not isinstance(data, dict):
        found = {type(None): "nothing", list: "a list", str: "text"}.get(type(data), type(data).__name__)
        raise error(f"{path}: expected 'key: value' lines, found {found}", hint="start from configs/demo.yaml")
    return data, lines


def _collect_lines(node: yaml.Node, at: Location, lines: dict[Location, int], path: str, error: type[SpalignError]) -> None:
    lines.setdefault(at, node.start_mark.line + 1)
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            here = (*at, key.value)
            if here in lines:
                raise error(f"{path}:{key.start_mark.line + 1}: '{key.value}' stands twice", hint="keep one of the two")
            lines[here] = key.start_mark.line + 1
            _collect_lines(value, here, lines, path, error)
    elif isinstance(node, yaml.SequenceNode):
        for i, item in enumerate(node.value):
            _collect_lines(item, (*at, i), lines, path, error)


def build(
    model: type[Model], data: dict[str, Any], *, source: str, lines: Mapping[Location, int | str], error: type[SpalignError]
) -> Model:
    """`data` as a checked `model`; all mistakes in one `error`, each with where it stands: a line of `source`, or as `lines` says."""
    try:
        return model.model_validate(data)
    except ValidationError as e:
        found = [(p["loc"], p["type"], p["msg"]) for p in e.errors()]
    inner = {loc[:n] for loc, _, _ in found for n in range(len(loc))}
    # a list whose only item is wrong is also "too short" to pydantic; the item's own mistake says it all
    problems = [_describe(model, *p, source, lines) for p in found if not (p[1] == "too_short" and p[0] in inner)]
    many = f"{len(problems)} mistakes:\n" if len(problems) > 1 else ""
    raise error(many + "\n".join(problems), hint="mend the lines above") from None


def _describe(model: type[BaseModel], loc: Location, kind: str, message: str, source: str, lines: Mapping[Location, int | str]) -> str:
    named = ".".join(str(p) for p in loc if "[" not in str(p))  # without pydantic's names for the sides of a union
    at = next((lines[loc[:n]] for n in range(len(loc), -1, -1) if loc[:n] in lines), None)
    where = f"{source}:{at}" if isinstance(at, int) else at or source
    if kind == "extra_forbidden":
        *place, key = map(str, loc)
        names = _field_names(model, loc[:-1])
        deeper = [".".join([*place, n, key]) for n in names if key in _field_names(model, (*loc[:-1], n))]
        close = deeper or difflib.get_close_matches(key, names, n=1)
        does = f"did you mean '{close[0]}'?" if close else f"known here: {', '.join(names)}"
        return f"{where}: unknown key '{named}'; {does}"
    if kind == "missing":
        return f"{where}: '{named}' is missing"
    return f"{where}: {named or 'file'}: {message.removeprefix('Value error, ')}"


def _field_names(model: type[BaseModel], loc: Location) -> list[str]:
    """The fields of the model that stands at `loc` inside `model`."""
    current: type[BaseModel] | None = model
    a_key = False
    for part in loc:
        if current is None or isinstance(part, int) or a_key:
            a_key = False
            continue
        field = current.model_fields.get(part)
        current = _model_in(field.annotation) if field else None
        a_key = field is not None and get_origin(field.annotation) is dict  # what comes next is a key of the mapping, no field
    return list(current.model_fields) if current else []


def _model_in(annotation: Any) -> type[BaseModel] | None:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    for inner in getattr(annotation, "__args__", ()):
        if found := _model_in(inner):
            return found
    return None
