"""The transformers engine, on CPU and CUDA."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel, PreTrainedTokenizerBase
from transformers.cache_utils import DynamicLayer

from spalign.config import EngineConfig
from spalign.engines.base import Ask, Capability, Completion, GenerateRequest
from spalign.engines.loading import inference_dtype, load_model
from spalign.engines.prefix_tree import Node, Tokens, prefix_tree
from spalign.engines.sampling import next_tokens, uniforms
from spalign.engines.tokens import ChatTokens, TokenEngine

T = TypeVar("T")
_SHARE_FROM = 8  # a common prefix shorter than this is not worth a pass of its own
_PASS_TOKENS = {True: 1024, False: 16_384}  # prompt tokens in one forward pass, on a CPU and elsewhere
_SCORES = 1 << 28  # of attention that holds them all: 2 GB in all its copies


class TransformersEngine(TokenEngine):
    """Batches by length; the samples of one prompt, and prompts that begin alike, share their prefill; completions stream out."""

    name = "transformers"
    capabilities: frozenset[Capability] = frozenset({"generate", "choice_logprobs", "loglikelihood", "representations"})

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, *, batch_size: int = 128) -> None:
        self.model, self.batch_size = model, batch_size
        eos = model.generation_config.eos_token_id if model.generation_config else None
        self.tokens = ChatTokens(tokenizer, eos if isinstance(eos, list) else [eos])
        self._pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else min(self.tokens.eos)

    @classmethod
    def load(cls, name: str, config: EngineConfig) -> TransformersEngine:
        """Load a model by name (see `spalign.engines.models`). Raises ModelError with what to do."""
        model, tokenizer = load_model(name, config, dtype=inference_dtype(config))
        return cls(model.eval(), tokenizer, batch_size=config.batch_size)

    @property
    def window(self) -> int:
        limit = getattr(self.model.config.get_text_config(), "max_position_embeddings", None)
        return int(limit) if limit else 1 << 20

    @torch.inference_mode()
    def generate(self, requests: Sequence[GenerateRequest]) -> Iterator[Completion]:
        for batch in self._batches(requests):
            yield from self._generate_batch(batch)

    def batches(self, requests: Sequence[GenerateRequest]) -> list[list[tuple[GenerateRequest, int]]]:
        return [[(request, i) for _, request, i in batch] for batch in self._batches(requests)]

    def _batches(self, requests: Sequence[GenerateRequest]) -> list[list[tuple[list[int], GenerateRequest, int]]]:
        """(tokens of the prompt, request, which of its seeds) by length, some at a time."""
        work = self._work(requests)
        work.sort(key=lambda w: (w[1].sampling.max_new_tokens, len(w[0]), w[1].id, w[2]))
        rows = self.batch_size
        if self._eager and work:  # a prefill may be one pass of all rows
            heads, longest = self.model.config.get_text_config().num_attention_heads, max(len(ids) for ids, _, _ in work)
            rows = max(1, min(rows, _SCORES // (heads * longest**2)))
        return [work[start : start + rows] for start in range(0, len(work), rows)]

    @property
    def _eager(self) -> bool:
        """Whether attention holds every score at once (`faithful`)."""
        return str(self.model.config._attn_implementation) == "eager"

    def _generate_batch(self, work: list[tuple[list[int], GenerateRequest, int]]) -> Iterator[Completion]:
        rows = list(range(len(work)))  # row of the batch -> index into `work`
        tokens: list[list[int]] = [[] for _ in work]
        limits = [request.sampling.max_new_tokens for _, request, _ in work]
        u = torch.stack([torch.from_numpy(uniforms(r.seeds[i], max(limits))) for _, r, i in work]).to(self.model.device)
        settings = [(r.sampling.temperature, r.sampling.top_p) for _, r, _ in work]
        logits, cache, mask = self._prefill([ids for ids, _, _ in work])
        done: set[int] = set()
        for step in range(max(limits)):
            new = torch.zeros(len(rows), dtype=torch.long, device=logits.device)
            for temperature, top_p in dict.fromkeys(settings):
                mine = [i for i, row in enumerate(rows) if settings[row] == (temperature, top_p)]
                if len(mine) == len(rows):
                    new = next_tokens(logits, u[rows, step], temperature=temperature, top_p=top_p)
                elif mine:
                    new[mine] = next_tokens(logits[mine], u[[rows[i] for i in mine], step], temperature=temperature, top_p=top_p)
            for row, token in zip(rows, new.tolist(), strict=True):
                if row in done:
                    continue
                tokens[row].append(token)
                if token in self.tokens.eos or len(tokens[row]) == limits[row]:
                    done.add(row)
                    _, request, i = work[row]
                    yield self._completion(request, i, tokens[row])
            if len(done) == len(work):
                return
            if len(rows) - sum(r in done for r in rows) <= 0.8 * len(rows):  # drop finished rows now and then, not one by one
                keep = [i for i, row in enumerate(rows) if row not in done]
                index = torch.tensor(keep, device=new.device)
                cache.batch_select_indices(index)
                mask, new, rows = mask[index], new[index], [rows[i] for i in keep]
            mask = torch.cat([mask, mask.new_ones(len(rows), 1)], dim=1)
            logits = self._forward(new.unsqueeze(1), mask, cache).logits[:, -1]

    @torch.inference_mode()
    def choice_logprobs(self, asks: Sequence[Ask], choices: Sequence[str]) -> list[tuple[float, ...] | None]:
        if not asks:
            return []
        encoded = [self._encode_ask(a) for a in asks]
        choice_ids = [self.tokens.one(c, chat=not isinstance(asks[0], str)) for c in choices]
        distinct = sorted({ids for ids in encoded if len(ids) < self.window})
        found: dict[Tokens, tuple[float, ...]] = {}
        for leaves, out in self._walk(distinct, [len(ids) - 1 for ids in distinct]):
            log_probs = out.logits[:, -1].float().log_softmax(-1)[:, choice_ids].tolist()
            found |= {distinct[i]: tuple(row) for i, row in zip(leaves, log_probs, strict=True)}
        return [found.get(ids) for ids in encoded]

    @torch.inference_mode()
    def loglikelihood(self, requests: Sequence[tuple[Sequence[int], Sequence[int]]]) -> list[tuple[float, ...] | None]:
        keys = self._fitting(requests)
        found: dict[tuple[Tokens, Tokens], tuple[float, ...]] = {}
        # the last context token stays with the continuation, whose first token it predicts
        for leaves, out in self._walk([c + y for c, y in keys], [len(c) - 1 for c, _ in keys], logits_to_keep=0):
            for row, i in enumerate(leaves):
                y = torch.tensor(keys[i][1], device=out.logits.device)
                own = out.logits[row, -len(y) - 1 : -1].float()
                found[keys[i]] = tuple((own.gather(-1, y[:, None])[:, 0] - own.logsumexp(-1)).tolist())
        return [found.get((tuple(c), tuple(y))) for c, y in requests]

    @torch.inference_mode()
    def representations(
        self, requests: Sequence[tuple[Sequence[int], Sequence[int]]], depths: Sequence[float]
    ) -> list[tuple[float, ...] | None]:
        keys = self._fitting(requests)
        found: dict[tuple[Tokens, Tokens], tuple[float, ...]] = {}
        for leaves, out in self._walk([c + y for c, y in keys], [len(c) - 1 for c, _ in keys], output_hidden_states=True):
            states = [out.hidden_states[round(d * (len(out.hidden_states) - 1))] for d in depths]
            for row, i in enumerate(leaves):
                n = len(keys[i][1])
                found[keys[i]] = tuple(torch.cat([s[row, -n:].float().mean(0) for s in states]).tolist())
        return [found.get((tuple(c), tuple(y))) for c, y in requests]

    def _walk(self, sequences: list[Tokens], limits: list[int], **asked: Any) -> Iterator[tuple[list[int], Any]]:
        """The model's output on the last piece of each sequence, some sequences at a time, padded on the left; shared beginnings run once.

        limits: as in `prefix_tree`. asked: what the model is asked for on those last pieces (default: the last position's logits).
        """
        head = DynamicCache(config=self.model.config)
        plain = all(type(layer) is DynamicLayer for layer in head.layers)
        # padding after a shared beginning would use up places of a sliding window
        roots = prefix_tree(sequences, limits if plain else [0] * len(limits), share_from=_SHARE_FROM)
        device = self.model.device
        # logits of every position are large: passes that ask for them are small
        per_pass = _PASS_TOKENS[device.type == "cpu" or self._eager or asked.get("logits_to_keep") == 0]

        def descend(nodes: list[tuple[int, Node]], cache: DynamicCache, mask: Tensor) -> Iterator[tuple[list[int], Any]]:
            """nodes: (row of the parent in `cache`, node)."""
            for leaf in (False, True):  # they keep different logits
                for some in _by_tokens(
                    [n for n in nodes if (n[1].leaf is not None) is leaf], lambda n: len(n[1].tokens), per_pass, self.batch_size
                ):
                    parents = torch.tensor([row for row, _ in some], device=device)
                    own, wide = _rows(cache, parents), max(len(n.tokens) for _, n in some)
                    pads = [wide - len(n.tokens) for _, n in some]
                    ids = torch.tensor([[self._pad] * pad + list(n.tokens) for (_, n), pad in zip(some, pads, strict=True)], device=device)
                    new = torch.tensor([[0] * pad + [1] * (wide - pad) for pad in pads], device=device)
                    seen = torch.cat([mask[parents], new], dim=1)
                    out = self._forward(ids, seen, own, **(asked if leaf else {}))
                    if leaf:
                        yield [n.leaf for _, n in some if n.leaf is not None], out
                    else:
                        children = [(row, child) for row, (_, n) in enumerate(some) for child in n.children]
                        yield from descend(children, own, seen)

        yield from descend([(0, root) for root in roots], head, torch.zeros(1, 0, dtype=torch.long, device=device))

    def _prefill(self, prompts: list[list[int]]) -> tuple[Tensor, DynamicCache, Tensor]:
        """Next-token logits (rows, vocabulary), the cache and its mask (rows, keys) after `prompts`; equal prompts run once."""
        distinct = sorted(set(map(tuple, prompts)), key=lambda ids: (len(ids), ids))
        position = {p: i for i, p in enumerate(distinct)}
        parts = list(self._prefill_parts(distinct, width=max(map(len, distinct))))
        logits, mask = torch.cat([p[1] for p in parts]), torch.cat([p[3] for p in parts])
        cache = _joined([p[2] for p in parts])
        if [tuple(p) for p in prompts] != distinct:  # another order, or several rows a prompt
            index = torch.tensor([position[tuple(p)] for p in prompts], device=logits.device)
            cache.batch_select_indices(index)
            logits, mask = logits[index], mask[index]
        return logits, cache, mask

    def _prefill_parts(
        self, prompts: list[tuple[int, ...]], width: int | None = None
    ) -> Iterator[tuple[list[tuple[int, ...]], Tensor, DynamicCache, Tensor]]:
        """As `_prefill` for distinct prompts in order of length, some at a time, with their common prefix run once.

        Passes are small: beyond some tokens a larger one is no faster, and on a CPU it falls out of the cache. width: pad all to it.
        """
        if not prompts:
            return
        head = DynamicCache(config=self.model.config)
        plain = all(type(layer) is DynamicLayer for layer in head.layers)
        # the padding of shorter prompts comes after a shared prefix, where it would use up places of a sliding window
        shared = _common_prefix(prompts) if plain else 0
        device = self.model.device
        if shared:
            ids = torch.tensor([prompts[0][:shared]], device=device)
            self._forward(ids, torch.ones_like(ids), head)
        per_pass = _PASS_TOKENS[device.type == "cpu" or self._eager] if plain else len(prompts) * max(map(len, prompts))
        for some in _by_tokens(prompts, lambda p: len(p) - shared, per_pass, self.batch_size):
            cache = copy.deepcopy(head)
            if shared:
                cache.batch_select_indices(torch.zeros(len(some), dtype=torch.long, device=device))
            wide = (width or max(map(len, some))) - shared
            pads = [wide - (len(p) - shared) for p in some]
            ids = torch.tensor([[self._pad] * pad + list(p[shared:]) for p, pad in zip(some, pads, strict=True)], device=device)
            own = torch.tensor([[1] * shared + [0] * pad + [1] * (wide - pad) for pad in pads], device=device)
            yield some, self._forward(ids, own, cache).logits[:, -1], cache, own

    def _forward(self, ids: Tensor, mask: Tensor, cache: DynamicCache, **asked: Any) -> Any:
        """The model's output for `ids` (rows, new): logits of the last position unless asked for otherwise.

        mask: (rows, cached + new), 0 where padded.
        """
        positions = (mask.cumsum(-1) - 1).clamp(min=0)[:, -ids.shape[1] :]
        with self._precision():
            model: Any = self.model
            return model(
                input_ids=ids,
                attention_mask=mask,
                position_ids=positions,
                past_key_values=cache,
                use_cache=True,
                **{"logits_to_keep": 1, **asked},
            )

    def _precision(self) -> contextlib.AbstractContextManager[Any]:
        """A model in training keeps float32 weights; it still answers in the precision that it is trained in."""
        if self.model.dtype == torch.float32 and self.autocast is not None:
            return torch.autocast(self.model.device.type, dtype=self.autocast)
        return contextlib.nullcontext()

    autocast: torch.dtype | None = None


def _common_prefix(prompts: Sequence[tuple[int, ...]]) -> int:
    """How many leading tokens all prompts share and may run once: at least one token stays for each prompt's own pass."""
    if len(prompts) < 2:
        return 0
    first, last = min(prompts), max(prompts)  # what these two share, all share
    n = next((i for i, (a, b) in enumerate(zip(first, last, strict=False)) if a != b), min(len(first), len(last)))
    n = min(n, min(map(len, prompts)) - 1)
    return n if n >= _SHARE_FROM else 0


def _by_tokens(items: Sequence[T], length: Callable[[T], int], per_pass: int, rows: int) -> Iterator[list[T]]:
    """`items` in order of length, in batches of at most `rows` and about `per_pass` tokens, padding included."""
    batch: list[T] = []
    for item in sorted(items, key=length):
        if batch and (len(batch) == rows or (len(batch) + 1) * length(item) > per_pass):
            yield batch
            batch = []
        batch.append(item)
    if batch:
        yield batch


def _rows(cache: DynamicCache, index: Tensor) -> DynamicCache:
    """Rows of a plain cache as a cache of their own."""
    out = copy.copy(cache)
    out.layers = [copy.copy(layer) for layer in cache.layers]
    if cache.get_seq_length():
        out.batch_select_indices(index)
    return out


def _joined(caches: list[DynamicCache]) -> DynamicCache:
    """Plain caches of equal length as one, row under row."""
    first, *others = caches
    if others:
        for i, layer in enumerate(first.layers):
            layer.keys = torch.cat([layer.keys, *(c.layers[i].keys for c in others)])
            layer.values = torch.cat([layer.values, *(c.layers[i].values for c in others)])
    return first
