"""The run folder: stages of part files with manifests and journals, so that a run can be killed anywhere and go on."""

from spalign.files import (
    Row,
    clear_errors,
    decode_row,
    digest,
    encode_row,
    encode_rows,
    link,
    read_json,
    write_atomic,
    write_json,
)
from spalign.store.folder import RunFolder
from spalign.store.journal import Journal
from spalign.store.parts import Part, read_manifest
from spalign.store.stages import Stage, versions
from spalign.store.work import Item, run_in_parts, run_over_parts

__all__ = [
    "Item",
    "Journal",
    "Part",
    "Row",
    "RunFolder",
    "Stage",
    "clear_errors",
    "decode_row",
    "digest",
    "encode_row",
    "encode_rows",
    "link",
    "read_json",
    "read_manifest",
    "run_in_parts",
    "run_over_parts",
    "versions",
    "write_atomic",
    "write_json",
]
