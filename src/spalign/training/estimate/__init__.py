"""Memory and time of a training run before it is started: arithmetic on a model's shape, nothing is loaded.

Units: bytes (B; GB is 1e9 of them), FLOPs (a multiply-add is two), seconds. P prompt tokens and K responses of R tokens each are a packed
stretch of T = P + K R tokens. d: hidden size, f: intermediate size, a = heads x head size, c = kv heads x head size, H: heads,
V: vocabulary, L: layers, N: parameters, r: rank.

What is assumed and not derived has a name: `EFFICIENCY`, `NETWORK` (plan), `RESERVE` (result), and that communication hides behind
computation. `benchmarks/estimate.py` holds the rest against measured runs.
"""

from spalign.training.estimate.cost import flops_of, traffic_of
from spalign.training.estimate.memory import attention_rows, kept, layer_kept, memory_of
from spalign.training.estimate.plan import DEVICES, Device, Method, Plan, plan_from
from spalign.training.estimate.result import Estimate, estimate, print_estimate
from spalign.training.estimate.shape import SHAPES, Shape, shape_from, shape_of

__all__ = [
    "DEVICES",
    "SHAPES",
    "Device",
    "Estimate",
    "Method",
    "Plan",
    "Shape",
    "attention_rows",
    "estimate",
    "flops_of",
    "kept",
    "layer_kept",
    "memory_of",
    "plan_from",
    "print_estimate",
    "shape_from",
    "shape_of",
    "traffic_of",
]
