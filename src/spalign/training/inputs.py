"""What users bring to `SPATrainer`, as it is trained: rows as groups, the model prepared and with its adapter."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

import torch
from transformers import set_seed

from spalign.errors import DataError
from spalign.training.adapters import fuse_adapters
from spalign.training.arguments import SPAConfig
from spalign.training.batches import Layout, prepare, window_of
from spalign.training.dropout import without_dropout
from spalign.training.groups import TrainingGroup, group_rows
from spalign.training.head import the_head
from spalign.training.rows import RowTokens, encode_row

logger = logging.getLogger(__name__)


def read_groups(rows: Any, *, model: Any, args: SPAConfig, tokenizer: Any) -> tuple[list[TrainingGroup], dict[str, int]]:
    """What is trained on, and how many rows were dropped for which reason."""
    if isinstance(rows, Mapping):
        raise DataError(f"the data is a mapping ({', '.join(map(str, rows))})", hint="give one split, or a list of rows")
    rows = [] if rows is None else list(rows)
    if not rows:
        raise DataError("the data is empty: no row", hint="see the funnel for where the pairs went")
    longest = min(args.max_length or 1 << 20, window_of(model.config))
    if all(isinstance(r, TrainingGroup) for r in rows):
        groups = [g for g in rows if len(g.prompt) + max(map(len, g.responses)) <= longest]
        dropped = {"too long": len(rows) - len(groups)} if len(groups) < len(rows) else {}
        if dropped:
            logger.warning("spalign: dropped %d groups longer than %d tokens", len(rows) - len(groups), longest)
        for column, part in ((args.weight_column, "weight"), (args.margin_column, "margin")):
            given = {getattr(p, part) is not None for g in groups for p in g.pairs}
            if column and False in given:
                raise DataError(f"a group's pairs have no {part}", hint=f"give every TrainingPair one, or leave out {part}_column")
            if not column and True in given:
                raise DataError(f"a group's pairs have a {part}, which only {part}_column makes count", hint=f"set {part}_column='{part}'")
    else:
        tokens = RowTokens(tokenizer)
        columns = {"weight_column": args.weight_column, "margin_column": args.margin_column}
        encoded = (encode_row(row, i, tokens=tokens, **columns) for i, row in enumerate(rows))
        groups, counts = group_rows(encoded, max_length=longest, needs_gap=args.weighs_by_gap)
        dropped = dict(counts)
    if not groups:
        raise DataError(f"no pair is left to train on (dropped: {dropped})", hint="see the reasons; raise max_length for 'too long'")
    vocabulary = model.config.get_text_config().vocab_size
    for g in groups:
        if max(map(max, (g.prompt, *g.responses))) >= vocabulary:
            raise DataError(f"group {g.name}: a token id is beyond the model's {vocabulary} embeddings", hint="take the model's tokenizer")
    return groups, dropped


def make_ready(model: Any, args: SPAConfig, peft_config: Any) -> tuple[Layout, Any]:
    """The layout of batches, and the model, prepared for it, with its adapter."""
    from peft import PeftModel, get_peft_model

    if args.attention == "flex" and not getattr(model, "is_quantized", False):
        model.to(args.device)  # where it is tried
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    if args.disable_dropout:
        without_dropout(base)
    layout = prepare(base, args.attention)
    if peft_config is not None:
        set_seed(args.seed)  # or the adapter's first weights would be another session's
        model = get_peft_model(model, peft_config)
    if isinstance(model, PeftModel):
        kind = model.active_peft_config
        if kind.is_prompt_learning:
            raise ValueError(f"{type(kind).__name__} puts tokens before every row; SPATrainer trains LoRA and DoRA adapters")
        fuse_adapters(model)
        if args.gradient_checkpointing:
            model.enable_input_require_grads()
    if not isinstance(the_head(base), torch.nn.Linear):
        logger.warning("spalign: an adapter is on the LM head: all logits of response tokens are made at once")
    return layout, model


def one_device(args: SPAConfig, model: Any) -> None:
    """A process trains on one GPU, or has its layers on several: torch.nn.DataParallel would cut rows of several prompts in the middle."""
    if args.n_gpu > 1:
        args._n_gpu = 1
        if len(set(getattr(model, "hf_device_map", {}).values())) > 1:
            return
        logger.warning(
            "spalign: %d GPUs are there, and this process trains on one; on all: accelerate launch (docs/training.md)",
            torch.cuda.device_count(),
        )
