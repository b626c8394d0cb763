"""Decoding attention on this machine: grouped queries against PyTorch's own handling of grouped-query attention, in one run.

    python benchmarks/decode_attention.py

Shapes are SmolLM2-135M's: 64 rows, 9 query heads, 3 key/value heads, 150 cached tokens. Prints one JSON line last.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable

import torch
from torch.nn.functional import scaled_dot_product_attention as sdpa

ROWS, HEADS, KV_HEADS, KEYS, DIM = 64, 9, 3, 150, 64


def milliseconds(run: Callable[[], torch.Tensor], times: int = 30) -> float:
    seen = []
    for _ in range(times):
        start = time.perf_counter()
        run()
        seen.append((time.perf_counter() - start) * 1000)
    return statistics.median(seen)


@torch.inference_mode()
def main() -> None:
    out = {}
    for dtype in (torch.bfloat16, torch.float32):
        query = torch.randn(ROWS, HEADS, 1, DIM, dtype=dtype)
        key, value = (torch.randn(ROWS, KV_HEADS, KEYS, DIM, dtype=dtype) for _ in range(2))
        mask = torch.ones(ROWS, 1, 1, KEYS, dtype=torch.bool)
        grouped = query.view(ROWS, KV_HEADS, HEADS // KV_HEADS, DIM)
        plain = milliseconds(lambda q=query, k=key, v=value, m=mask: sdpa(q, k, v, attn_mask=m, enable_gqa=True))  # type: ignore[misc]
        ours = milliseconds(lambda q=grouped, k=key, v=value, m=mask: sdpa(q, k, v, attn_mask=m))  # type: ignore[misc]
        out[str(dtype).removeprefix("torch.")] = {
            "plain_ms": round(plain, 3),
            "grouped_ms": round(ours, 3),
            "ratio": round(plain / ours, 2),
        }
    print(json.dumps(out))


if __name__ == "__main__":
    main()
