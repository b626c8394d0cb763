"""Memory of each device, part by part; `layer_kept` lists what autograd keeps."""

from __future__ import annotations

from dataclasses import asdict, dataclass

from spalign.training.estimate.plan import Plan
from spalign.training.tiles import KEPT, STRETCH, TILE

NF4 = (4 + 8 / 64 + 32 / (64 * 256)) / 8
"""B a weight in 4 bits: blocks of 64 with an 8-bit scale, 256 scales with an fp32 one (double quantisation)."""


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
      two norms (`training/norms.py`): the residual stream, on GPUs also its normalised form,
      each 4 d in fp32; the inverse root 4                                               16 d or 8 d + 8
      inputs of q, k, v, gate, up, each cast to bf16 by autocast on its own                        10 d
      input of o                                                                                    2 a
      gate's output, its SiLU, up's output, their product (down's input), bf16                      8 f
    lora, qlora (bf16 base and residual stream):
      two norms: the residual stream as it is; the inverse root                                     4 d + 8
      inputs of the factors A: one of q, k, v, one of gate, up; of o; of down                       4 d + 2 a + 2 f
      gate's output, its SiLU, up's output                                                          6 f
      outputs of the seven A                                                                       14 r
    dora: lora, but an input for each of q, k, v, gate, up                                          6 d
      and for each matrix its own output and the adapter's, which the magnitude scales             4 (sum of out)
    """
    n, t = plan.model, plan.tokens
    d, f, a, c = n.hidden, n.intermediate, n.attention, n.kv
    rows = attention_rows(plan)
    keys = 4 * c * (rows.keys - rows.masked) + 4 * a * rows.masked
    attention = (4 * a + 4 * n.heads) * rows.queries + keys + 2 * rows.mask
    token = 2 * a + 8 * f + 2 * _norm(plan) * d + 8 + (10 * d if plan.method == "full" else 4 * d + 14 * plan.rank)
    if plan.method == "dora":
        token += 6 * d + 4 * sum(o for _, o in n.linears)
    return float(attention + token * t)


def _norm(plan: Plan) -> int:
    """B that a norm keeps an element: its input, in fp32 for full fine-tuning, else in bf16, and where its weight trains on a GPU the
    normalised form."""
    if plan.adapted:
        return 2
    return 4 if plan.device.name == "cpu" else 8


def outer_kept(plan: Plan) -> float:
    """B kept outside the layers, of one prompt: what the last norm keeps, and its inverse root, 4; sines and cosines, 2 x head size; of
    response tokens the gradient of the head's input, d, and where the head is trained the input, d. The last three in fp32 for full
    fine-tuning, else in bf16. Of a trained head in a small batch also every logit's gradient, V, in bf16."""
    n = plan.model
    wide = 4 if plan.method == "full" else 2
    token = _norm(plan) * n.hidden + 4 + 2 * wide * n.head_dim
    answers = plan.responses * plan.response_tokens
    if plan.adapted:
        return float(token * plan.tokens + wide * n.hidden * answers)
    pulls = 2 * n.vocab if keeps_pulls(plan) else 0
    return float(token * plan.tokens + (2 * wide * n.hidden + pulls) * answers)


def keeps_pulls(plan: Plan) -> bool:
    """Whether the head is trained and keeps every logit's gradient from the forward pass, instead of making the logits again."""
    return (
        not plan.adapted
        and plan.prompts_per_forward * plan.responses * plan.response_tokens * plan.model.vocab <= KEPT[plan.device.name == "cpu"]
    )


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
    """B of the LM head at work: a stretch of logits in fp32, 4 B each, and a tile of them in bf16, 2 B each, where they are not kept; where
    the head is trained also its bf16 copy, a tile's share of its gradient in bf16, and the sum in fp32: 8 d V."""
    cpu, tokens = plan.device.name == "cpu", plan.prompts_per_forward * plan.responses * plan.response_tokens
    stretch, tile = (min(size[cpu] // plan.model.vocab, tokens) * plan.model.vocab for size in (STRETCH, TILE))
    return 4.0 * stretch + (0 if keeps_pulls(plan) else 2 * tile) + (0 if plan.adapted else 8 * plan.model.head)
