"""Checkpoints of a training stage: which are whole, which weights are kept, and the model that is made of one."""

from __future__ import annotations

import contextlib
import shutil
from pathlib import Path
from typing import Any

from spalign.engines.make import MERGED
from spalign.errors import RunFolderError
from spalign.files import move_folder, sync, write_json
from spalign.store import clear_errors, link, read_json

KEPT = "kept"
"""Beside `checkpoints`, which ends with training: the weights of the last ones, until the priority gate has passed."""


def whole_checkpoints(folder: Path) -> list[Path]:
    """Complete checkpoints, oldest first; trainer_state.json is what transformers writes last."""
    found = []
    for p in folder.glob("checkpoint-*"):
        with contextlib.suppress(RunFolderError):  # torn by a kill
            if read_json(p / "trainer_state.json"):
                found.append(p)
    return sorted(found, key=step_of)


def last_checkpoint(folder: Path) -> Path | None:
    return next(reversed(whole_checkpoints(folder)), None)


def step_of(checkpoint: Path) -> int:
    return int(checkpoint.name.removeprefix("checkpoint-"))


def keep_weights(folder: Path, keep: int) -> None:
    """Weights of the newest checkpoint and of `keep` before it, in `kept/`: links where the file system has them, so they cost no space
    while the checkpoint itself is there, and stay when the trainer removes that."""
    if not keep:
        return
    with clear_errors(folder):
        for checkpoint in whole_checkpoints(folder / "checkpoints"):
            target = folder / KEPT / checkpoint.name
            if target.exists():
                continue
            half = target.with_name(target.name + ".tmp")
            shutil.rmtree(half, ignore_errors=True)
            half.mkdir(parents=True)
            for file in _weights(checkpoint):
                link(file, half / file.name)
            half.rename(target)
        for old in kept_checkpoints(folder)[keep + 1 :]:
            shutil.rmtree(old)


def kept_checkpoints(folder: Path) -> list[Path]:
    """What `keep_weights` has kept, newest first."""
    return sorted((p for p in (folder / KEPT).glob("checkpoint-*") if p.suffix != ".tmp"), key=step_of, reverse=True)


def _weights(checkpoint: Path) -> list[Path]:
    """With the code of a model that brings its own."""
    return [f for f in checkpoint.iterdir() if f.suffix in {".safetensors", ".json", ".py"} and f.name != "trainer_state.json"]


def hand_over(checkpoint: Path, folder: Path, base: str, *, trust_remote_code: bool, suffix: str = "") -> Path:
    """The checkpoint's model as `model{suffix}/` (and `adapter{suffix}/` where one was trained on the model `base`, merged into it).

    The model appears whole or not at all; one that is there is replaced.
    """
    from spalign.engines.loading import load_tokenizer
    from spalign.engines.models import fingerprint, resolve

    target, adapter = folder / f"model{suffix}", folder / f"adapter{suffix}"
    half = target.with_name(target.name + ".tmp")
    shutil.rmtree(half, ignore_errors=True)
    half.mkdir()
    if (checkpoint / "adapter_config.json").exists():
        from spalign.training.merge import merge

        merge(checkpoint, half, model=base, dtype="float32", trust_remote_code=trust_remote_code)
        shutil.rmtree(adapter, ignore_errors=True)
        adapter.mkdir()
        for name in ("adapter_config.json", "adapter_model.safetensors"):
            shutil.copy2(checkpoint / name, adapter / name)
            sync(adapter / name)
    else:
        for file in _weights(checkpoint):  # copied, not moved: the checkpoint stays whole until the stage is done
            shutil.copy2(file, half / file.name)
    tokenizer = load_tokenizer(resolve(base), trust_remote_code=trust_remote_code)
    tokenizer.save_pretrained(half)
    shutil.rmtree(target, ignore_errors=True)
    move_folder(half, target)
    if adapter.exists():
        write_json(adapter / MERGED, {"sha256": fingerprint(str(target))})
    return target


def check_space(model: Any, folder: Path, *, adapter: bool, keep: int) -> None:
    """Refuse to begin where the checkpoints cannot fit: weights and two moments, three times while one replaces the oldest, and the kept
    weights that are no link to one of them; of an adapter next to nothing, but its merged model."""
    weights = 4 * model.num_parameters()  # saved in float32, in whatever type they are held
    there = sum({(s := f.stat()).st_ino: s.st_size for f in folder.rglob("*") if f.is_file()}.values())  # a link is no second file
    need = (1.2 if adapter else 9 + max(0, keep - 1)) * weights - there
    free = shutil.disk_usage(folder).free
    if free < need:
        raise RunFolderError(
            f"{folder}: training needs up to {need / 1e9:.1f} GB for checkpoints, {free / 1e9:.1f} GB are free",
            hint="free some space, or choose another runs_dir, or lower train.keep_checkpoints; everything finished is kept",
        )
