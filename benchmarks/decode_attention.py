"""Decoding attention: grouped queries against what transformers and PyTorch do with grouped-query attention and a mask, in one run.

    python benchmarks/decode_attention.py [--device cuda]

On a CPU the shape is SmolLM2-135M's: 64 rows, 9 query heads, 3 key/value heads, 150 cached tokens; on a GPU Llama 8B's: 128 rows, 32 and 8
heads, 400 tokens. `repeated`: keys and values are repeated for every query head, as transformers does where there is a mask; `pytorch`:
PyTorch is told of the groups. Prints one JSON line last.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable

import torch
from torch.nn.functional import scaled_dot_product_attention as sdpa

SHAPES = {"cpu": (64, 9, 3, 150, 64), "cuda": (128, 32, 8, 400, 128)}
"""Rows, query heads, key/value heads, cached tokens, head size."""


def milliseconds(run: Callable[[], torch.Tensor], device: str, times: int = 30) -> float:
    def wait() -> None:
        if device != "cpu":
            torch.cuda.synchronize()

    seen = []
    for _ in range(times):
        wait()
        start = time.perf_counter()
        run()
        wait()
        seen.append((time.perf_counter() - start) * 1000)
    return statistics.median(seen)


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    device = parser.parse_args().device
    rows, heads, kv_heads, keys, dim = SHAPES["cpu" if device == "cpu" else "cuda"]
    group = heads // kv_heads
    out = {}
    for dtype in (torch.bfloat16, torch.float32):
        q = torch.randn(rows, heads, 1, dim, dtype=dtype, device=device)
        k, v = (torch.randn(rows, kv_heads, keys, dim, dtype=dtype, device=device) for _ in range(2))
        mask = torch.ones(rows, 1, 1, keys, dtype=torch.bool, device=device)
        ways: dict[str, Callable[[], torch.Tensor]] = {
            "repeated": lambda: sdpa(q, k.repeat_interleave(group, 1), v.repeat_interleave(group, 1), attn_mask=mask),  # noqa: B023
            "pytorch": lambda: sdpa(q, k, v, attn_mask=mask, enable_gqa=True),  # noqa: B023
            "grouped": lambda: sdpa(q.view(rows, kv_heads, group, dim), k, v, attn_mask=mask).view_as(q),  # noqa: B023
        }
        spent = {name: milliseconds(way, device) for name, way in ways.items()}
        found = {f"{name}_ms": round(ms, 3) for name, ms in spent.items()}
        out[str(dtype).removeprefix("torch.")] = found | {"ratio": round(spent["repeated"] / spent["grouped"], 2)}
    print(json.dumps(out))


if __name__ == "__main__":
    main()
