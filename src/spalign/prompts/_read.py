"""Files and hub data sets as tables; the libraries for Parquet and the hub are imported only where they are needed."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from spalign.config import PromptSource
from spalign.errors import PromptError
from spalign.prompts._rows import Mistake, Row, Table
from spalign.text import one_line, printable, shorten
from spalign.yamlfile import read_text

INSTALL = "pip install 'spalign[data]'"


def exists(path: Path) -> bool:
    """Whether the path stands; one that the system cannot even look up (too long, say) does not."""
    try:
        return path.exists()
    except OSError:
        return False


def read_file(path: Path, wanted: Sequence[str]) -> Table:
    """The table in a file, by its suffix, with at least the columns `wanted` that it has.

    Raises PromptError if the file is missing, of another kind, or broken as a whole.
    """
    if not exists(path):
        raise PromptError(f"{path}: no such file", hint="check the path; it is relative to the folder you stand in")
    if path.suffix.lower() not in READERS:
        raise PromptError(f"{path}: not a known kind of prompt file", hint=f"use one of: {', '.join(READERS)}")
    return READERS[path.suffix.lower()](path, wanted)


def _read_jsonl(path: Path, _wanted: Sequence[str]) -> Table:
    rows: list[Row | Mistake] = []
    columns: dict[str, str] = {}
    # Only "\n" ends a line: `splitlines` would also cut at the U+2028 that JSON allows inside a text.
    for number, line in enumerate(read_text(path, PromptError).split("\n"), 1):
        if line.strip():
            row = _json_row(line, f"{path}:{number}")
            rows.append(row)
            if isinstance(row, Row):
                columns.update(dict.fromkeys(row.values, row.where))
    head = next((row.where for row in rows if isinstance(row, Row)), str(path))
    return Table(str(path), head, tuple(columns), rows)


def _read_json(path: Path, _wanted: Sequence[str]) -> Table:
    shape = 'write a list of objects, such as [{"prompt": "..."}]; for one object a line use .jsonl'
    try:
        values = json.loads(read_text(path, PromptError), strict=False)
    except json.JSONDecodeError as e:
        raise PromptError(f"{path}:{e.lineno}: not valid JSON: {e.msg} (column {e.colno})", hint=shape) from None
    except (ValueError, RecursionError):
        raise PromptError(f"{path}: not valid JSON: too long a number or too deeply nested", hint=shape) from None
    if not isinstance(values, list):
        raise PromptError(f"{path}: not a list of objects", hint=shape)
    wheres = [f"{path}: row {n}" for n in range(1, len(values) + 1)]
    rows = [Row(w, v) if isinstance(v, dict) else Mistake(w, "not a JSON object", shape) for w, v in zip(wheres, values, strict=True)]
    columns = dict.fromkeys(name for row in rows if isinstance(row, Row) for name in row.values)
    return Table(str(path), str(path), tuple(columns), rows)


def _json_row(line: str, where: str) -> Row | Mistake:
    shape = 'write one object a line, such as {"prompt": "..."}'
    try:
        value = json.loads(line, strict=False)  # a raw tab or NUL inside a text is fine
    except json.JSONDecodeError as e:
        return Mistake(where, f"not valid JSON: {e.msg} (column {e.colno})", shape)
    except (ValueError, RecursionError):  # a number of thousands of digits, or thousands of brackets
        return Mistake(where, "not valid JSON: too long a number or too deeply nested", shape)
    return Row(where, value) if isinstance(value, dict) else Mistake(where, "not a JSON object", shape)


def _read_csv(path: Path, _wanted: Sequence[str]) -> Table:
    text = read_text(path, PromptError)
    rows: list[Row | Mistake] = []
    header: list[str] = []
    head = str(path)
    line = 1
    with _field_limit(len(text) + 1):
        reader = csv.reader(io.StringIO(text, newline=""), strict=True)
        try:
            for fields in reader:
                where, line = f"{path}:{line}", reader.line_num + 1
                if fields and not header:
                    header, head = _header(fields, where), where
                elif fields:
                    rows.append(_csv_row(header, fields, where))
        except csv.Error as e:
            rows.append(
                Mistake(f"{path}:{line}", f"not valid CSV: {e}", 'quote a text that holds commas or line breaks, and write " as "" in it')
            )
    return Table(str(path), head, tuple(header), rows)


def _header(fields: list[str], where: str) -> list[str]:
    twice = next((f for f in fields if fields.count(f) > 1), None)
    if twice is not None:
        raise PromptError(f"{where}: two columns are named '{one_line(printable(twice))}'", hint="give every column its own name")
    return fields


def _csv_row(header: list[str], fields: list[str], where: str) -> Row | Mistake:
    if len(fields) != len(header):
        fix = "separate columns with commas, and quote a text that holds one"
        return Mistake(where, f"the number of fields is {len(fields)}, not {len(header)} as in the header", fix)
    return Row(where, dict(zip(header, fields, strict=True)))


@contextmanager
def _field_limit(size: int) -> Iterator[None]:
    """Lets `csv` read fields of `size`; a long prompt is then refused by its length, with its row, like everywhere else."""
    before = csv.field_size_limit(size)
    try:
        yield
    finally:
        csv.field_size_limit(before)


def _read_parquet(path: Path, wanted: Sequence[str]) -> Table:
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError:
        raise PromptError(f"{path}: reading a Parquet file needs pyarrow", hint=INSTALL) from None
    try:
        with parquet.ParquetFile(path) as file:
            columns = tuple(file.schema_arrow.names)
            values = file.read(columns=_needed(columns, wanted)).to_pylist()
    except (OSError, ValueError, pyarrow.ArrowException) as e:
        raise PromptError(
            f"{path}: cannot be read as Parquet: {_brief(e)}", hint="check that the file is complete, or save it as .jsonl"
        ) from e
    return Table(str(path), str(path), columns, _numbered(str(path), values))


def read_hub(source: PromptSource, wanted: Sequence[str]) -> Table:
    """The table of a hub data set, or of a folder that `datasets` can load, as `read_file`; every failure is a PromptError."""
    name = source.source
    try:
        import datasets
    except ImportError:
        raise PromptError(f"{name}: loading a Hugging Face data set needs datasets", hint=INSTALL) from None
    try:
        data = datasets.load_dataset(name, source.subset, split=source.split)
        columns = tuple(data.column_names)
        values = data.select_columns(_needed(columns, wanted)).to_list()
    except Exception as e:  # whatever the hub, the network or the files answer
        raise PromptError(f"{name} (split '{source.split}'): cannot be loaded: {_brief(e)}", hint=_advice(e, name)) from e
    return Table(name, name, columns, _numbered(name, values))


def _advice(error: Exception, name: str) -> str:
    """What to do about a failure of `datasets`, by what it says."""
    text = str(error).replace(name, "")
    page = f"https://huggingface.co/datasets/{name}"
    if "gated" in text.lower():
        return f"accept its terms on {page}, then run `hf auth login`"
    if isinstance(error, ConnectionError):
        return "check your network, load it once without HF_HUB_OFFLINE so that it is cached, or save the prompts as a .jsonl file"
    if "doesn't exist" in text:
        return f"check the name ({page}); for a private data set run `hf auth login`"
    if "split" in text:
        return "set the source's `split` to one that the data set has"
    if "onfig" in text:  # "Config name is missing", "BuilderConfig 'x' not found"
        return "set the source's `subset` to one that the data set has"
    return "check the name, the split and the subset, or save the prompts as a .jsonl file"


def _needed(columns: Sequence[str], wanted: Sequence[str]) -> list[str]:
    """The columns to read: pictures and the like beside the prompts stay where they are."""
    return [c for c in columns if c in {*wanted, "id", "topic", "intent"}]


def _numbered(source: str, values: Sequence[dict[str, Any]]) -> list[Row | Mistake]:
    return [Row(f"{source}: row {number}", row) for number, row in enumerate(values, 1)]


def _brief(error: Exception) -> str:
    return shorten(one_line(printable(str(error))), 300) or type(error).__name__


READERS: dict[str, Callable[[Path, Sequence[str]], Table]] = {
    ".jsonl": _read_jsonl,
    ".json-lines": _read_jsonl,
    ".json": _read_json,
    ".csv": _read_csv,
    ".parquet": _read_parquet,
}
