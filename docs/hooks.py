"""The site also holds what stands beside docs/ (measured figures, changes, how to contribute), and the notebook with its outputs."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[1]
BESIDE = ("CHANGELOG.md", "CONTRIBUTING.md", "SECURITY.md")


def on_files(files: Files, *, config: Any) -> Files:
    results = sorted((ROOT / "benchmarks/results").glob("*.md"), reverse=True)
    for path in (*(ROOT / name for name in BESIDE), *results):
        files.append(File.generated(config, str(path.relative_to(ROOT)), abs_src_path=str(path)))
    files.append(File.generated(config, "tutorial.md", content=_notebook(ROOT / "docs/tutorial.ipynb")))
    rows = "\n".join(f"- [{path.stem}](benchmarks/results/{path.name})" for path in results)
    figures = f"# Measured figures\n\nEach by a command in `benchmarks/`, with its machine.\n\n{rows}\n"
    files.append(File.generated(config, "figures.md", content=figures))
    return files


def on_page_markdown(markdown: str, *, page: Any, config: Any, files: Files) -> str:
    """Pages of docs/ name what is beside it as ../NAME; pages from beside it name docs/NAME."""
    markdown = re.sub(r"\]\(\.\./(?=benchmarks/results/|CHANGELOG|CONTRIBUTING|SECURITY)", "](", markdown)
    return markdown.replace("](docs/", "](") if page.file.src_uri in BESIDE else re.sub(r"\]\((?:\.\./)+docs/", "](../../", markdown)


def _notebook(path: Path) -> str:
    """Cells in order: prose as it stands, code and what it printed as blocks of code."""
    out = []
    for cell in json.loads(path.read_text())["cells"]:
        source = "".join(cell["source"])
        out.append(source if cell["cell_type"] == "markdown" else f"```python\n{source}\n```")
        for output in cell.get("outputs", ()):
            text = "".join(output.get("text") or output.get("data", {}).get("text/plain", ""))
            out.append("\n".join(f"    {line}" for line in text.splitlines()))
    return "\n\n".join(out) + "\n"
