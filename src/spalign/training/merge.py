"""An adapter and its base as one model. The same code hands over a run's model and serves `spalign merge`."""

from __future__ import annotations

import json
import math
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from spalign.config import EngineConfig
from spalign.engines.models import locate
from spalign.errors import ModelError
from spalign.store import clear_errors

DTYPES = ("auto", "float32", "bfloat16", "float16")
_CONFIG, _WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_KNOWN = (
    "Found missing adapter keys",  # an error of ours
    "`lora_bias=True` was passed but",  # an error when it is merged
    r"Adapter .* LoRA tensor\(s\) have invalid shape",  # of lora_bias, which is a vector; what does not fit is an error
    "Model has `tie_word_embeddings=True`",  # it is untied before it is merged
)
"""What PEFT warns of where it puts an adapter on its base."""
_ROUNDING = 1e-4
"""Of the largest logit: by so much two orders of the same float32 sums may differ."""


@dataclass(frozen=True, slots=True)
class Merged:
    """What was written."""

    folder: Path
    parameters: int
    dtype: str
    modules: int
    """Modules of the base that the adapter changed."""


def merge(adapter: Path, out: Path, *, model: str | None = None, dtype: str = "auto", trust_remote_code: bool = False) -> Merged:
    """Merge the LoRA or DoRA adapter in the folder `adapter` into its base and save it as `out`, whole or not at all.

    model: the base (hub id, folder, GGUF, `demo`) where it is not what the adapter names. dtype: of the saved weights; `auto` is the
    base's own. The sum itself is taken in float32. The tokenizer is the adapter's where it brings one, else the base's.
    Raises ModelError; RunFolderError where `out` cannot be written.
    """
    if dtype not in DTYPES:
        raise ModelError(f"dtype '{dtype}' is unknown", hint=f"use one of: {', '.join(DTYPES)}")
    config = _adapter_config(adapter)
    _check_out(out)
    base = model or _named_base(adapter, config)

    import torch
    from transformers import AutoConfig

    from spalign.engines.loading import load_model, load_tokenizer
    from spalign.engines.models import resolve

    engine = EngineConfig(device="cpu", trust_remote_code=trust_remote_code)
    whole, tokenizer = load_model(base, engine, dtype=torch.float32)
    saved_as = AutoConfig.from_pretrained(resolve(base), trust_remote_code=trust_remote_code).dtype if dtype == "auto" else dtype
    if (adapter / "tokenizer_config.json").exists():
        tokenizer = load_tokenizer(str(adapter), trust_remote_code=trust_remote_code)
    merged, modules = _merged(whole, adapter, base)
    merged = merged.to(saved_as if isinstance(saved_as, torch.dtype) else getattr(torch, saved_as or "float32"))
    with clear_errors(out):
        _save(merged, tokenizer, out)
    return Merged(out, sum(p.numel() for p in merged.parameters()), str(merged.dtype).removeprefix("torch."), modules)


def _adapter_config(adapter: Path) -> dict[str, Any]:
    if not adapter.is_dir():
        raise ModelError(
            f"adapter '{adapter}': no such folder", hint="name the folder that holds adapter_config.json; `hf download` gets one"
        )
    if not (adapter / _CONFIG).exists():
        raise ModelError(f"{adapter}: no {_CONFIG}, so this is not an adapter", hint="a run's adapter is in iteration-N/6-train/adapter")
    if not (adapter / _WEIGHTS).exists():
        raise ModelError(f"{adapter}: no {_WEIGHTS}", hint="save it with safetensors; pickled weights are not loaded")
    try:
        config = json.loads((adapter / _CONFIG).read_bytes())
        kind = config.get("peft_type")
    except (OSError, ValueError, AttributeError) as e:
        raise ModelError(f"{adapter / _CONFIG}: cannot be read: {e}", hint="restore it from where the adapter came from") from e
    if kind != "LORA":
        raise ModelError(f"{adapter}: its kind is {kind!r}; only LoRA and DoRA adapters are merged", hint="merge it with peft itself")
    return dict(config)


def _check_out(out: Path) -> None:
    with clear_errors(out):
        if out.is_symlink() or (out.exists() and (not out.is_dir() or any(out.iterdir()))):
            raise ModelError(f"{out}: exists and is not an empty folder", hint="name a new folder; nothing is overwritten")


def _named_base(adapter: Path, config: dict[str, Any]) -> str:
    named = config.get("base_model_name_or_path")
    if not isinstance(named, str) or not named:
        raise ModelError(f"{adapter}: the adapter names no base model", hint="name it with --model")
    try:
        locate(named)
    except ModelError as e:
        raise ModelError(
            f"{adapter}: its base model '{named}' cannot be used here: {e.message}",
            hint="name the base with --model (`--model demo` for an adapter trained on the demo model)",
        ) from e
    return named


def _merged(whole: Any, adapter: Path, base: str) -> tuple[Any, int]:
    """The base with the adapter in it, and how many modules that changed. Raises ModelError where the two do not fit exactly, and where
    they say another thing merged than they do side by side."""
    import torch

    embedding, head = whole.get_input_embeddings(), whole.get_output_embeddings()
    tied = getattr(head, "weight", None) is embedding.weight
    model, modules = _fitted(whole, adapter, base)
    apart = _logits(model)
    untied = tied and (whole.get_input_embeddings() is not embedding or whole.get_output_embeddings() is not head)
    if untied:  # the adapter is on one of them, and what it adds must not reach the other
        head.weight = torch.nn.Parameter(head.weight.detach().clone())
        _say_tied(whole, False)
    try:
        merged = model.merge_and_unload(safe_merge=True)
    except (ValueError, RuntimeError) as e:
        broken = isinstance(e, ValueError)
        raise ModelError(
            f"{adapter}: cannot be merged: {str(e).splitlines()[0]}",
            hint="its training went wrong; use an earlier one" if broken else "use it as it is: on its base, with peft",
        ) from e
    if apart is not None and not _same(apart, _logits(merged)):
        raise ModelError(
            f"{adapter}: merged into '{base}' it gives other logits than on it", hint="use it as it is: on its base, with peft"
        )
    if untied and torch.equal((one := merged.get_input_embeddings()).weight, (other := merged.get_output_embeddings()).weight):
        other.weight = one.weight
        _say_tied(merged, True)
    return merged, modules


def _fitted(whole: Any, adapter: Path, base: str) -> tuple[Any, int]:
    """The base with the adapter on it, and on how many modules. Raises ModelError where the two do not fit exactly."""
    import warnings

    from peft import PeftModel, get_peft_model_state_dict
    from safetensors import SafetensorError, safe_open

    hint = "name the model it was trained on with --model"
    try:
        with safe_open(adapter / _WEIGHTS, "pt") as f:
            saved = {key for key in f.keys() if "lora_" in key}  # noqa: SIM118
        with warnings.catch_warnings():
            for known in _KNOWN:
                warnings.filterwarnings("ignore", message=known)
            model = PeftModel.from_pretrained(whole, adapter)
            wanted = {key for key in get_peft_model_state_dict(model, save_embedding_layers=False) if "lora_" in key}
    except SafetensorError as e:
        raise ModelError(f"{adapter / _WEIGHTS}: cannot be read: {e}", hint="the file is damaged; copy it again") from e
    except (RuntimeError, ValueError, KeyError, TypeError) as e:
        why = "its shapes are others" if "size mismatch" in str(e) else str(e).splitlines()[0]
        raise ModelError(f"{adapter}: the adapter does not fit the model '{base}': {why}", hint=hint) from e
    if not saved or saved != wanted:
        odd = sorted(saved ^ wanted)
        raise ModelError(
            f"{adapter}: the adapter does not fit the model '{base}': {len(saved - wanted)} of its weights have no place there and "
            f"{len(wanted - saved)} places get none" + (f" ({odd[0]})" if odd else ""),
            hint=hint,
        )
    return model, sum(".lora_A." in key or "lora_embedding_A" in key for key in saved)


def _say_tied(model: Any, tied: bool) -> None:
    for config in (model.config, model.config.get_text_config()):
        config.tie_word_embeddings = tied


def _logits(model: Any) -> Any:
    """(2, vocabulary), after two rows of four tokens; None where the model does not run on a CPU, or not on tokens alone."""
    import torch

    try:
        ids = torch.arange(8).view(2, 4) * (model.config.get_text_config().vocab_size // 8)
        with torch.no_grad():
            return model.eval()(input_ids=ids).logits[:, -1].float()
    except Exception:  # whatever its own code raises
        return None


def _same(apart: Any, merged: Any) -> bool:
    """Whether they differ by rounding only, after one of the rows at least: rounding may send the tokens of one to another expert."""
    import torch

    scale = float(apart.amax(-1).abs().max())  # not of the lowest: some models mask with them
    if not math.isfinite(scale):
        return True
    return merged is not None and bool(torch.isclose(merged, apart, rtol=0, atol=_ROUNDING * scale).all(-1).any())


def _save(model: Any, tokenizer: Any, out: Path) -> None:
    """Beside `out`, then renamed: a kill leaves no half model under its name."""
    out.parent.mkdir(parents=True, exist_ok=True)
    half = out.with_name(f".{out.name}.{os.getpid()}.tmp")
    try:
        model.save_pretrained(half)
        tokenizer.save_pretrained(half)
        half.rename(out)
    finally:
        shutil.rmtree(half, ignore_errors=True)
