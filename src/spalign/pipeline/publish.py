"""What leaves the run folder: the model card beside the model, the model and its data on the hub. Trackers and hub are checked before."""

from __future__ import annotations

import os
import re
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from spalign.config import HUB_ID, RunConfig
from spalign.errors import ConfigError, HubError
from spalign.pipeline.context import Context
from spalign.pipeline.trackers import check_trackers
from spalign.report.card import model_card
from spalign.store import clear_errors, write_atomic
from spalign.text import printable, shorten

KEY = "HF_TOKEN"


def check_outlets(config: RunConfig) -> None:
    """Raises ConfigError for a tracker that is unknown or not installed, and for a push without a key."""
    if config.train.report_to:
        check_trackers(config.train.report_to)
    if config.train.push_to_hub:
        check_key("train.push_to_hub")


def check_key(option: str) -> None:
    """Raises ConfigError where the option wants a key of the hub and the environment has none."""
    if not os.environ.get(KEY, "").strip():
        raise ConfigError(
            f"{option} is set, and there is no key in the environment ({KEY})",
            hint=f"export {KEY}=... with a key that may write (huggingface.co/settings/tokens), or leave out {option}",
        )


def check_hub(repo: str, option: str) -> None:
    """Raises ConfigError for what is no name on the hub, and without a key."""
    if len(repo) > 96 or not re.fullmatch(HUB_ID, repo):
        raise ConfigError(f"{option}: '{shorten(printable(repo), 60)}' is no name on the hub", hint="OWNER/NAME, at most 96 characters")
    check_key(option)
    try:
        import huggingface_hub  # noqa: F401  before anything is written
    except ImportError as e:
        raise ConfigError(f"{option} needs the package huggingface_hub, which is not installed", hint="pip install 'spalign[data]'") from e


def publish(run: Context, summary: Mapping[str, Any]) -> None:
    """Write the cards and, where the run asks for it, push the model. Raises HubError; whatever happens, the run's results stay."""
    write_cards(summary)
    repo = run.config.train.push_to_hub
    if repo and summary["model_path"] is None:
        run.ui.line("nothing is pushed to the hub: no model is handed over", style="yellow")
    elif repo:
        run.ui.line(f"pushed to {push(Path(summary['model_path']), repo, str(summary['name']))}")


def write_cards(summary: Mapping[str, Any]) -> None:
    """README.md in the model's folder and in its adapter's, also where the gate failed, and then in those of the one that is proposed, a
    checkpoint or an earlier iteration's model; a card that says the same is left as it is."""
    gate = summary["gate"]
    folders = {Path(summary["model_path"] or gate["failed_path"]): False}
    if gate["proposed"] is not None:
        folders[Path(gate["proposed"]["path"])] = True
    for model, proposed in folders.items():
        for folder, adapter in ((model, False), (_adapter_of(model), True)):
            if folder.is_dir():
                _write(folder / "README.md", model_card(summary, adapter=adapter, proposed=proposed))


def _write(card: Path, text: str) -> None:
    data = text.encode("utf-8", "replace")
    with clear_errors(card):
        if not (card.exists() and card.read_bytes() == data):
            write_atomic(card, data)


def _adapter_of(model: Path) -> Path:
    return model.with_name(model.name.replace("model", "adapter", 1))


def push(model: Path, repo: str, name: str) -> str:
    """Push the model's folder, and its adapter's as `adapter/`; the repository's address. A new repository is private."""
    folders = {"": model} | ({"adapter": _adapter_of(model)} if _adapter_of(model).is_dir() else {})
    failed = f"the run is done and kept, and its model could not be pushed to '{repo}'"
    again = "the same command again pushes and does nothing else"
    return _pushed(folders, repo, "model", f"{name}, aligned with spalign", failed=failed, again=again)


def push_data(folder: Path, repo: str) -> str:
    """Push exported pairs as a data set; the repository's address. A new repository is private."""
    failed = f"the data is written, and could not be pushed to '{repo}'"
    return _pushed(
        {"": folder}, repo, "dataset", "Preference pairs, made with spalign", failed=failed, again="try again with another folder"
    )


def _pushed(folders: Mapping[str, Path], repo: str, kind: str, message: str, *, failed: str, again: str) -> str:
    """folders: path in the repository -> local folder."""
    import huggingface_hub

    try:
        api = huggingface_hub.HfApi(token=os.environ[KEY].strip())
        made = api.create_repo(repo, private=True, exist_ok=True, repo_type=kind)
        for inside, folder in folders.items():
            said = f"{message}: {inside}" if inside else message
            api.upload_folder(repo_id=made.repo_id, repo_type=kind, folder_path=folder, path_in_repo=inside or None, commit_message=said)
        return str(made)
    except Exception as e:  # the hub, the network, the disk: what is on this disk is done, and only this is not
        reason = printable(str(e)).strip().splitlines()[:1] or [type(e).__name__]
        data = " --repo-type dataset" if kind == "dataset" else ""
        by_hand = f"hf upload {shlex.quote(repo)} {shlex.quote(str(folders['']))} . --private{data}"
        raise HubError(f"{failed}: {reason[0]}", hint=f"{again}; or by hand: {by_hand}") from e
