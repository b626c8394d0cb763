"""Drawing the next token. The random number of a step belongs to the completion's seed, so results do not depend on the batch."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

_SHORTLISTS = (256, 4096)


def uniforms(seed: int, count: int) -> np.ndarray:
    """`count` numbers in [0, 1) of a counter-based generator: the completion's own stream."""
    return np.random.Generator(np.random.Philox(key=seed)).random(count)


def next_tokens(logits: Tensor, u: Tensor, *, temperature: float, top_p: float) -> Tensor:
    """Nucleus sampling by inverse transform.

    logits: (rows, vocabulary); u: (rows,) in [0, 1). Returns (rows,) token ids. temperature 0 is greedy.
    Exact: the nucleus is looked for among the few most likely tokens first, and among all only for rows where those are not enough.
    """
    if temperature == 0:
        return logits.argmax(-1)
    scaled = logits.float() / temperature
    log_z = scaled.logsumexp(-1, keepdim=True)
    out = torch.empty(len(scaled), dtype=torch.long, device=logits.device)
    todo = torch.arange(len(scaled), device=logits.device)
    for size in (*_SHORTLISTS, scaled.shape[-1]):
        k = min(size, scaled.shape[-1])
        top, ids = scaled[todo].topk(k, dim=-1)
        mass = (top - log_z[todo]).exp().cumsum(-1)
        enough = (mass[:, -1] >= top_p) | (k == scaled.shape[-1])
        mass, ids = mass[enough], ids[enough]
        last = (mass < top_p).sum(-1, keepdim=True).clamp(max=k - 1)  # the token that completes the nucleus
        aim = u[todo[enough]].unsqueeze(-1).to(mass.dtype) * mass.gather(-1, last)
        chosen = torch.minimum((mass <= aim).sum(-1, keepdim=True), last)
        out[todo[enough]] = ids.gather(-1, chosen).squeeze(-1)
        todo = todo[~enough]
        if len(todo) == 0:
            break
    return out
