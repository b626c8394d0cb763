"""Memory and time of a training run before it is started: arithmetic on a model's shape, nothing is loaded.

Units: bytes (B; GB is 1e9 of them), FLOPs (a multiply-add is two), seconds. P prompt tokens and K responses of R tokens each are a packed
stretch of T = P + K R tokens. d: hidden size, f: intermediate size, a = heads x head size, c = kv heads x head size, H: heads,
V: vocabulary, L: layers, N: parameters, r: rank.

What is assumed and not derived has a name: `EFFICIENCY`, `RESERVE`, `NETWORK`, and that communication hides behind computation.
`benchmarks/estimate.py` holds the rest against measured runs.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

from spalign.errors import ModelError, SpalignError

Method = Literal["full", "lora", "dora", "qlora"]
Sharding = Literal["ddp", "fsdp2", "zero3"]
METHODS: tuple[Method, ...] = ("full", "lora", "dora", "qlora")
SHARDINGS: tuple[Sharding, ...] = ("ddp", "fsdp2", "zero3")

EFFICIENCY = 0.5
"""Assumed share of the device's peak that a step reaches. Not measured here."""
RESERVE = 0.05
"""Assumed share of the device's memory for the CUDA context, NCCL and fragmentation: a run fits in the other 95%."""
NETWORK = 50e9
"""Assumed B/s in one direction between nodes, a device (400 Gbit/s); counts from the ninth device on."""
NODE = 8
"""Devices that share a fast link."""
NF4 = (4 + 8 / 64 + 32 / (64 * 256)) / 8
"""B a weight in 4 bits: blocks of 64 with an 8-bit scale, 256 scales with an fp32 one (double quantisation)."""
TILE = 1 << 26
"""Logits in one tile of the LM head (`training/head.py`)."""


@dataclass(frozen=True, slots=True)
class Device:
    """memory: B. flops: dense bf16 FLOP/s. link: B/s in one direction to the other devices of its node. None: not known."""

    name: str
    memory: float | None
    flops: float
    link: float | None


# makers' data sheets: NVLink's 900 (600) GB/s count both directions
DEVICES = {
    "h200": Device("h200", 141e9, 989e12, 450e9),
    "h100": Device("h100", 80e9, 989e12, 450e9),
    "a100": Device("a100", 80e9, 312e12, 300e9),
}


@dataclass(frozen=True, slots=True)
class Shape:
    """A Llama-like decoder: RMSNorm, grouped-query attention with rotary positions, gated MLP."""

    name: str
    layers: int
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    vocab: int
    tied: bool
    head_dim: int
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False

    @property
    def attention(self) -> int:
        """a: width of the queries."""
        return self.heads * self.head_dim

    @property
    def kv(self) -> int:
        """c: width of the keys, and of the values."""
        return self.kv_heads * self.head_dim

    @property
    def linears(self) -> tuple[tuple[int, int], ...]:
        """(in, out) of a layer's q, k, v, o, gate, up, down."""
        d, f, a, c = self.hidden, self.intermediate, self.attention, self.kv
        return ((d, a), (d, c), (d, c), (a, d), (d, f), (d, f), (f, d))

    @property
    def layer_matrices(self) -> int:
        """Weights in a layer's seven matrices: 2 d a + 2 d c + 3 d f."""
        return sum(i * o for i, o in self.linears)

    @property
    def layer(self) -> int:
        """Parameters of a layer: matrices, two norms of d, and what biases and query/key norms there are."""
        d, f, a, c = self.hidden, self.intermediate, self.attention, self.kv
        biases = self.qkv_bias * (a + 2 * c) + self.o_bias * d + self.mlp_bias * (2 * f + d)
        return self.layer_matrices + 2 * d + biases + self.qk_norm * 2 * self.head_dim

    @property
    def body(self) -> int:
        """N_body: weights that every token is multiplied with, without the LM head: L (2 d a + 2 d c + 3 d f)."""
        return self.layers * self.layer_matrices

    @property
    def head(self) -> int:
        """d V."""
        return self.hidden * self.vocab

    @property
    def outer(self) -> int:
        """Parameters outside the layers: embedding, last norm, and the LM head where it is not the embedding."""
        return self.head * (1 if self.tied else 2) + self.hidden

    @property
    def parameters(self) -> int:
        """N, exact: L layers and what is outside them."""
        return self.layers * self.layer + self.outer

    def adapter(self, rank: int, *, magnitudes: bool) -> int:
        """Parameters of a LoRA adapter on all seven matrices: r (in + out) each; DoRA's magnitudes add `out` each."""
        return self.layers * sum(rank * (i + o) + magnitudes * o for i, o in self.linears)


SHAPES = {
    "demo": Shape("demo", 30, 576, 1536, 9, 3, 49152, tied=True, head_dim=64),
    "llama-8b": Shape("llama-8b", 32, 4096, 14336, 32, 8, 128256, tied=False, head_dim=128),
    "llama-70b": Shape("llama-70b", 80, 8192, 28672, 64, 8, 128256, tied=False, head_dim=128),
}
_KINDS = ("llama", "mistral", "qwen2", "qwen3")


def shape_of(model: str) -> Shape:
    """The shape of a preset, or of a local model folder (or its config.json). Raises ModelError."""
    if model in SHAPES:
        return SHAPES[model]
    path = Path(model).expanduser()
    file = path / "config.json" if path.is_dir() else path
    known = f"name one of {', '.join(SHAPES)}, or a local folder with a config.json"
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ModelError(f"model '{model}': no such preset or folder with a config.json", hint=known) from None
    except (OSError, ValueError) as e:
        raise ModelError(f"{file}: cannot be read as JSON: {e}", hint=known) from None
    return shape_from(config, model)


def shape_from(config: Any, name: str) -> Shape:
    """The shape that a Hugging Face config says. Raises ModelError for other architectures: a guess would look like a fact."""
    if isinstance(config, dict) and isinstance(config.get("text_config"), dict):
        config = config["text_config"]
    kind = config.get("model_type") if isinstance(config, dict) else None
    if kind not in _KINDS:
        raise ModelError(f"model '{name}': the size of a model of type {kind!r} is not known", hint=f"known: {', '.join(_KINDS)}")

    def number(key: str, default: int | None = None) -> int:
        value = config.get(key)
        value = default if value is None else value
        if not isinstance(value, int) or isinstance(value, bool) or value <= 0:
            raise ModelError(f"model '{name}': {key} is {value!r}", hint="config.json must have it as a positive whole number")
        return value

    heads = number("num_attention_heads")
    hidden = number("hidden_size")
    bias = bool(config.get("attention_bias", False)) and kind in ("llama", "qwen3")
    return Shape(
        name,
        layers=number("num_hidden_layers"),
        hidden=hidden,
        intermediate=number("intermediate_size"),
        heads=heads,
        kv_heads=number("num_key_value_heads", heads),
        vocab=number("vocab_size"),
        tied=bool(config.get("tie_word_embeddings", False)),
        head_dim=number("head_dim", hidden // heads),
        qkv_bias=bias or kind == "qwen2",
        o_bias=bias,
        mlp_bias=bool(config.get("mlp_bias", False)) and kind == "llama",
        qk_norm=kind == "qwen3",
    )


@dataclass(frozen=True, slots=True)
class Plan:
    """A training run. Raises SpalignError for numbers that make none.

    prompts_per_step: over all devices; none: the fewest that are at least 8 and one forward pass on each device.
    """

    model: Shape
    device: Device
    method: Method = "full"
    rank: int = 16
    devices: int = 1
    sharding: Sharding = "ddp"
    prompts: int = 10_000
    responses: int = 5
    prompt_tokens: int = 128
    response_tokens: int = 512
    prompts_per_forward: int = 1
    prompts_per_step: int | None = None
    checkpointing: bool = False
    epochs: float = 1.0
    efficiency: float = EFFICIENCY
    network: float = NETWORK

    def __post_init__(self) -> None:
        for name, known in (("method", METHODS), ("sharding", SHARDINGS)):
            if getattr(self, name) not in known:
                raise SpalignError(f"no {name} '{getattr(self, name)}'", hint=f"one of {', '.join(known)}")
        whole = ("rank", "devices", "prompts", "prompt_tokens", "response_tokens", "prompts_per_forward")
        for name in whole:
            if getattr(self, name) < 1:
                raise SpalignError(f"{name} is {getattr(self, name)}", hint="give a whole number from 1 on")
        if self.responses < 2:
            raise SpalignError(f"responses is {self.responses}", hint="a preference pair needs two")
        if not 0 < self.efficiency <= 1:
            raise SpalignError(f"efficiency is {self.efficiency}", hint="give a share of the peak, above 0 and up to 1")
        for name, value in (("epochs", self.epochs), ("network", self.network), ("the device's FLOP/s", self.device.flops)):
            if not (math.isfinite(value) and value > 0):
                raise SpalignError(f"{name} is {value}", hint="give a number above 0")
        at_once = self.devices * self.prompts_per_forward
        if self.prompts_per_step is not None and (self.prompts_per_step < 1 or self.prompts_per_step % at_once):
            raise SpalignError(
                f"prompts_per_step {self.prompts_per_step} is not a multiple of {at_once}",
                hint=f"{self.devices} devices with {self.prompts_per_forward} prompts a forward pass run {at_once} prompts at once",
            )

    @property
    def forwards(self) -> int:
        """Forward passes of each device in an optimiser step."""
        at_once = self.devices * self.prompts_per_forward
        return math.ceil(8 / at_once) if self.prompts_per_step is None else self.prompts_per_step // at_once

    @property
    def step_prompts(self) -> int:
        return self.forwards * self.devices * self.prompts_per_forward

    @property
    def tokens(self) -> int:
        """T = P + K R: tokens of a prompt with its responses, each once."""
        return self.prompt_tokens + self.responses * self.response_tokens

    @property
    def pairwise_tokens(self) -> int:
        """Tokens of a prompt trained pair by pair: K (K - 1) / 2 pairs of two sequences of P + R tokens."""
        return self.responses * (self.responses - 1) * (self.prompt_tokens + self.response_tokens)

    @property
    def adapted(self) -> bool:
        return self.method != "full"

    @property
    def adapter(self) -> int:
        return self.model.adapter(self.rank, magnitudes=self.method == "dora") if self.adapted else 0

    @property
    def trainable(self) -> int:
        return self.adapter if self.adapted else self.model.parameters

    @property
    def sharded(self) -> bool:
        return self.sharding != "ddp" and self.devices > 1


@dataclass(frozen=True, slots=True)
class Memory:
    """B on each device at the worst moment."""

    weights: float
    """The model: fp32 master weights (4 B), a bf16 base under an adapter (2 B), a 4-bit base (0.516 B; what is no layer's matrix 2 B)."""
    adapter: float
    """The adapter's weights, fp32."""
    gradients: float
    """4 B a trainable parameter."""
    optimizer: float
    """AdamW: two fp32 moments, 8 B a trainable parameter."""
    copies: float
    """What matrices are read from or sent through: see `_copies`."""
    activations: float
    """What the backward pass needs, and the gradients of one layer's activations: see `kept` and `_in_flight`."""
    head: float
    """The LM head's tile of logits and, where the head is trained, its gradient: see `_head`."""

    @property
    def total(self) -> float:
        return float(sum(asdict(self).values()))


def memory_of(plan: Plan) -> Memory:
    """Sharding divides weights, adapter, gradients and moments by the devices; activations are each device's own."""
    share = plan.devices if plan.sharded else 1
    n = plan.model
    if plan.method == "full":
        weights = 4.0 * n.parameters
    elif plan.method == "qlora":
        weights = NF4 * n.body + 2 * (n.parameters - n.body)
    else:
        weights = 2.0 * n.parameters
    return Memory(
        weights=weights / share,
        adapter=4 * plan.adapter / share,
        gradients=4 * plan.trainable / share,
        optimizer=8 * plan.trainable / share,
        copies=_copies(plan),
        activations=plan.prompts_per_forward * (kept(plan) + _in_flight(plan)),
        head=_head(plan),
    )


def _copies(plan: Plan) -> float:
    """B of copies of weights and gradients.

    One device or DDP, full: autocast keeps a bf16 copy of every layer's matrices, 2 N_body; with gradient checkpointing they live in the
    forward pass alone, when nothing is in flight yet, and one layer's in the backward pass: the larger of the two moments counts.
    DDP on several devices: its buckets are a second copy of the gradients, 4 B a trainable parameter. Sharded: bf16 of two layers (the
    one at work and the next) and of what is outside layers; for full fine-tuning also one layer's and the outer gradients before they
    are scattered. Adapters: their bf16 copies. 4 bits: the largest matrix in bf16. DoRA: PEFT multiplies the factors with an identity
    matrix, 4 + 2 B an element of in x in, and makes the product, its sum with the weight and the norm's input, 2 B each an element of
    in x out, for one matrix at a time.
    """
    n = plan.model
    copies = 2.0 * plan.adapter
    if plan.sharded:
        copies += 2 * (2 * n.layer + n.outer)
        if not plan.adapted:
            copies += 2 * (n.layer + n.outer)
    elif not plan.adapted:
        in_backward = 2 * n.layer_matrices if plan.checkpointing else 2 * n.body
        copies += max(in_backward, 2 * n.body - plan.prompts_per_forward * _in_flight(plan))
    if plan.devices > 1 and not plan.sharded:
        copies += 4 * plan.trainable
    if plan.method == "qlora":
        copies += 2 * max(i * o for i, o in n.linears)
    if plan.method == "dora":
        copies += max(6 * i * i + 6 * i * o for i, o in n.linears)
    return copies


@dataclass(frozen=True, slots=True)
class AttentionRows:
    """How `training/attention.py` lays out one prompt's tokens for attention.

    queries, keys: tokens in its rows. masked: of the keys, those of rows with a mask (there every query head has a key head of its own).
    mask: elements of the mask.
    """

    queries: int
    keys: int
    masked: int
    mask: int


def attention_rows(plan: Plan) -> AttentionRows:
    """Short prompts are repeated before each response: K rows of P + R, plainly causal. Long ones are not: the prompt's own row, and K rows
    of R queries on P + R keys under a mask. Repeated where K (P + R)^2 / 2 <= 1.5 (P^2 / 2 + K R (P + R))."""
    p, k, r = plan.prompt_tokens, plan.responses, plan.response_tokens
    if k * (p + r) ** 2 / 2 <= 1.5 * (p * p / 2 + k * r * (p + r)):
        return AttentionRows(k * (p + r), k * (p + r), 0, 0)
    return AttentionRows(p + k * r, p + k * (p + r), k * (p + r), k * r * (p + r))


def layer_kept(plan: Plan) -> float:
    """B that one layer keeps for its backward pass, of one prompt, without gradient checkpointing, under bf16 autocast.

    Attention, in bf16: its rows of queries and outputs, 2 a each a query; rows of keys and values, 2 c each a key (2 a where masked); fp32
    log-sum-exp, 4 H a query; a mask as bf16, 2 B an element. Each of the T tokens further:

    full (fp32 residual stream, for fp32 weights):
      two norms: the residual stream 4 d and its normalised form 4 d, fp32; the inverse root 4     16 d + 8
      inputs of q, k, v, gate, up, each cast to bf16 by autocast on its own                        10 d
      input of o                                                                                    2 a
      gate's output, its SiLU, up's output, their product (down's input), bf16                      8 f
    lora, qlora (bf16 base and residual stream):
      two norms: the residual stream cast to fp32; the inverse root                                 8 d + 8
      inputs of the factors A, cast for each of q, k, v, gate, up; of o; of down                   10 d + 2 a + 2 f
      gate's output, its SiLU, up's output                                                          6 f
      outputs of the seven A                                                                       14 r
    dora: lora, and for each matrix its own output and the adapter's, which the magnitude scales    4 (sum of out)
    """
    n, t = plan.model, plan.tokens
    d, f, a, c = n.hidden, n.intermediate, n.attention, n.kv
    rows = attention_rows(plan)
    keys = 4 * c * (rows.keys - rows.masked) + 4 * a * rows.masked
    attention = (4 * a + 4 * n.heads) * rows.queries + keys + 2 * rows.mask
    token = 10 * d + 2 * a + 8 * f + (16 * d + 8 if plan.method == "full" else 8 * d + 8 + 14 * plan.rank)
    if plan.method == "dora":
        token += 4 * sum(o for _, o in n.linears)
    return float(attention + token * t)


def outer_kept(plan: Plan) -> float:
    """B kept outside the layers, of one prompt: the last norm's input in fp32 and inverse root, 4 d + 4; for full fine-tuning also its
    normalised form, 4 d; sines and cosines, 2 x head size; of response tokens the head's input or, of a frozen head, its gradient, d.
    The last two in fp32 for full fine-tuning, else in bf16."""
    n = plan.model
    wide = 4 if plan.method == "full" else 2
    token = (8 if plan.method == "full" else 4) * n.hidden + 4 + 2 * wide * n.head_dim
    return float(token * plan.tokens + wide * n.hidden * plan.responses * plan.response_tokens)


def kept(plan: Plan) -> float:
    """B that one prompt keeps for the backward pass at the end of the forward pass.

    With gradient checkpointing a layer keeps only its input (d, fp32 for full fine-tuning, else bf16).
    """
    inputs = (4 if plan.method == "full" else 2) * plan.model.hidden * plan.tokens
    return outer_kept(plan) + plan.model.layers * (inputs if plan.checkpointing else layer_kept(plan))


def _in_flight(plan: Plan) -> float:
    """B of one prompt while one layer's backward pass runs: gradients of down's input and of its two factors, 6 f, of the residual stream
    and what is added to it, 8 d a token; with gradient checkpointing also what that layer keeps, made again."""
    gradients = (6 * plan.model.intermediate + 8 * plan.model.hidden) * plan.tokens
    return gradients + (layer_kept(plan) if plan.checkpointing else 0)


def _head(plan: Plan) -> float:
    """B of the LM head at work: a tile's logits in fp32 and in bf16, 6 B each; where the head is trained also its bf16 copy, a tile's
    share of its gradient in bf16, and the sum in fp32: 8 d V."""
    logits = min(TILE // plan.model.vocab, plan.prompts_per_forward * plan.responses * plan.response_tokens) * plan.model.vocab
    return 6.0 * logits + (0 if plan.adapted else 8 * plan.model.head)


def flops_of(plan: Plan) -> float:
    """FLOPs that one prompt with its responses takes, forward and backward.

    Matrices: 2 N_body a token forward; backward 4 N_body, or 2 N_body where they are frozen (the gradient of activations only);
    checkpointing runs forward again. Adapters: 2 N_adapter forward and 4 backward; DoRA's product of its factors, 2 r in (in + out) a
    matrix, once a forward pass, whatever the batch. Attention: 4 a a layer for each pair of a token and one it sees: (P + 1) / 2 of them
    for a prompt token, P + (R + 1) / 2 for a response token; backward 2.5 times that, as flash kernels make the scores again. Head: 2 d V a
    response token forward; backward the logits again and two products, or, frozen, one product (made on the way forward).
    """
    n, p, k, r = plan.model, plan.prompt_tokens, plan.responses, plan.response_tokens
    again = 1 if plan.checkpointing else 0
    body = 2 * n.body * (1 + again + (1 if plan.adapted else 2)) * plan.tokens
    adapter = 2.0 * plan.adapter * (3 + again) * plan.tokens
    if plan.method == "dora":
        adapter += 2 * plan.rank * n.layers * sum(i * (i + o) for i, o in n.linears) * (1 + again) / plan.prompts_per_forward
    seen = p * (p + 1) / 2 + k * r * (p + (r + 1) / 2)
    attention = 4 * n.attention * n.layers * seen * (1 + again + 2.5)
    head = 2 * n.head * k * r * (2 if plan.adapted else 4)
    return float(body + adapter + attention + head)


def traffic_of(plan: Plan) -> float:
    """B that each device sends in an optimiser step, in one direction.

    DDP: gradients are reduced once, 2 (n - 1) / n x 4 B a trainable parameter. Sharded: for each forward pass the weights are gathered
    twice (forward, backward) in bf16 (4 bits stay 4 bits), and the gradients scattered once, in bf16: (n - 1) / n of each.
    """
    n = plan.model
    share = (plan.devices - 1) / plan.devices
    if not plan.sharded:
        return 2 * share * 4 * plan.trainable
    weights = NF4 * n.body + 2 * (n.parameters - n.body) if plan.method == "qlora" else 2 * n.parameters
    return share * plan.forwards * (2 * (weights + 2 * plan.adapter) + 2 * plan.trainable)


@dataclass(frozen=True, slots=True)
class Estimate:
    """What a plan needs. seconds are of one optimiser step; flops of one step on all devices together."""

    plan: Plan
    memory: Memory
    fits: bool | None
    """None: the device's memory is not known."""
    steps: int
    tokens_per_step: int
    flops: float
    compute_seconds: float
    communication_seconds: float
    advice: tuple[str, ...] = ()
    """What to change if it does not fit, each with what it brings."""

    @property
    def seconds(self) -> float:
        """The longer of computation and communication: they are assumed to overlap wholly."""
        return max(self.compute_seconds, self.communication_seconds)

    @property
    def hours(self) -> float:
        return self.steps * self.seconds / 3600

    def as_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        plan = self.plan
        return {
            "plan": {**asdict(plan), "prompts_per_step": plan.step_prompts},
            "parameters": plan.model.parameters,
            "trainable": plan.trainable,
            "memory": {**asdict(self.memory), "total": self.memory.total},
            "fits": self.fits,
            "steps": self.steps,
            "tokens_per_step": self.tokens_per_step,
            "flops_per_step": self.flops,
            "compute_seconds": self.compute_seconds,
            "communication_seconds": self.communication_seconds,
            "seconds_per_step": self.seconds,
            "hours": self.hours,
            "tokens": round(plan.prompts * plan.epochs * plan.tokens),
            "pairwise_tokens": round(plan.prompts * plan.epochs * plan.pairwise_tokens),
            "advice": list(self.advice),
        }


def estimate(plan: Plan) -> Estimate:
    """Memory, time and, where it does not fit, what to change.

    Computation: FLOPs of a step / (devices x peak x efficiency). Communication: `traffic_of` / B/s of the slowest link on the way.
    """
    memory = memory_of(plan)
    fits = _fits(plan, memory)
    flops = plan.step_prompts * flops_of(plan)
    rate = plan.device.link if plan.devices <= NODE and plan.device.link else plan.network
    return Estimate(
        plan,
        memory,
        fits,
        steps=max(1, math.ceil(plan.prompts * plan.epochs / plan.step_prompts)),
        tokens_per_step=plan.step_prompts * plan.tokens,
        flops=flops,
        compute_seconds=flops / (plan.devices * plan.device.flops * plan.efficiency),
        communication_seconds=traffic_of(plan) / rate,
        advice=() if fits is not False else tuple(_advice(plan)),
    )


def _fits(plan: Plan, memory: Memory) -> bool | None:
    return None if plan.device.memory is None else memory.total <= (1 - RESERVE) * plan.device.memory


def _advice(plan: Plan) -> Iterator[str]:
    """One change on top of the other, each with the memory it leads to, until it fits."""
    changes: list[tuple[str, dict[str, Any]]] = [
        ("--gradient-checkpointing", {"checkpointing": True}),
        ("--prompts-per-forward 1", {"prompts_per_forward": 1, "prompts_per_step": plan.step_prompts}),
    ]
    if plan.devices > 1:
        changes.append(("--sharding fsdp2", {"sharding": "fsdp2" if plan.sharding == "ddp" else plan.sharding}))
    if plan.method in ("full", "dora"):
        changes.append(("--method lora", {"method": "lora"}))
    changes.append(("--method qlora", {"method": "qlora"}))
    now = plan
    for flag, change in changes:
        if all(getattr(now, key) == value for key, value in change.items() if key != "prompts_per_step"):
            continue
        now = replace(now, **change)
        memory = memory_of(now)
        fits = _fits(now, memory)
        yield f"{flag}: {memory.total / 1e9:.1f} GB, {'fits' if fits else 'still too much'}"
        if fits:
            return
    most = replace(plan, checkpointing=True, prompts_per_forward=1, prompts_per_step=None, sharding="fsdp2")
    for devices in (2**i for i in range(1, 13)):
        if devices > plan.devices and _fits(more := replace(most, devices=devices), memory_of(more)):
            yield f"or more devices: --devices {devices} --sharding fsdp2 --gradient-checkpointing"
            return
    yield "shorter responses or fewer of them: one prompt's activations alone are too much"


def plan_from(model: str, device: str, *, gflops: float | None = None, memory_gb: float | None = None, **options: Any) -> Plan:
    """A plan from names, as the command line gives them. Raises SpalignError."""
    if device in DEVICES:
        chosen = DEVICES[device]
        chosen = replace(chosen, flops=chosen.flops if gflops is None else gflops * 1e9)
    elif device == "cpu":
        if gflops is None:
            raise SpalignError(
                "a cpu's speed is not known", hint="measure a large matrix product and give --gflops (benchmarks/estimate.py)"
            )
        chosen = Device("cpu", None, gflops * 1e9, None)
    else:
        raise SpalignError(f"no device '{device}'", hint=f"one of {', '.join(DEVICES)}, cpu")
    if memory_gb is not None:
        if not (math.isfinite(memory_gb) and memory_gb > 0):
            raise SpalignError(f"memory is {memory_gb} GB", hint="give a number above 0")
        chosen = replace(chosen, memory=memory_gb * 1e9)
    return Plan(shape_of(model), chosen, **options)


def print_estimate(found: Estimate, console: Any) -> None:
    """The estimate as a table for a person."""
    from rich.table import Table
    from rich.text import Text

    plan = found.plan
    table = Table(title="Memory of each device", title_justify="left", show_header=False, box=None, padding=(0, 2, 0, 0))
    for name, size in asdict(found.memory).items():
        table.add_row(f"  {name}", f"{size / 1e9:,.1f} GB")
    table.add_row("total", f"{found.memory.total / 1e9:,.1f} GB", style="bold")
    if plan.device.memory is not None:
        table.add_row("device", f"{plan.device.memory / 1e9:,.1f} GB, of which {(1 - RESERVE):.0%} can be used")
    console.print(table)
    if found.fits is not None:
        console.print(Text("fits" if found.fits else "does not fit", style="bold green" if found.fits else "bold red"))
    for line in found.advice:
        console.print(Text(f"  {line}"))
    table = Table(title="Time", title_justify="left", show_header=False, box=None, padding=(0, 2, 0, 0))
    table.add_row("prompts a step", f"{plan.step_prompts:,} ({found.tokens_per_step:,} tokens, {found.flops:.2e} FLOPs)")
    table.add_row("computation", f"{found.compute_seconds:,.2f} s a step, at {plan.efficiency:.0%} of the peak (assumed)")
    table.add_row("communication", f"{found.communication_seconds:,.2f} s a step, assumed to hide behind it")
    table.add_row("whole run", f"{found.hours:,.2f} h for {found.steps:,} steps", style="bold")
    share = plan.pairwise_tokens / plan.tokens
    table.add_row("pair by pair", f"would run {share:.1f} times the tokens ({plan.pairwise_tokens:,} a prompt instead of {plan.tokens:,})")
    console.print(table)
