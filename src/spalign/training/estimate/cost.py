"""Work: FLOPs of a prompt with its responses, and bytes that devices send each other."""

from __future__ import annotations

from spalign.training.estimate.memory import NF4, keeps_pulls
from spalign.training.estimate.plan import Plan


def flops_of(plan: Plan) -> float:
    """FLOPs that one prompt with its responses takes, forward and backward.

    Matrices: 2 N_body a token forward; backward 4 N_body, or 2 N_body where they are frozen (the gradient of activations only);
    checkpointing runs forward again. Adapters: 2 N_adapter forward and 4 backward; DoRA's product of its factors, 2 r in (in + out) a
    matrix, once a forward pass, whatever the batch. Attention: 4 a a layer for each pair of a token and one it sees: (P + 1) / 2 of them
    for a prompt token, P + (R + 1) / 2 for a response token; backward 2.5 times that, as flash kernels make the scores again. Head: 2 d V a
    response token forward; backward two products, or, frozen, one (made on the way forward); and the logits again where they are many.
    """
    n, p, k, r = plan.model, plan.prompt_tokens, plan.responses, plan.response_tokens
    again = 1 if plan.checkpointing else 0
    body = 2 * n.body * (1 + again + (1 if plan.adapted else 2)) * plan.tokens
    adapter = 2.0 * plan.adapter * (3 + again) * plan.tokens
    if plan.method == "dora":
        adapter += 2 * plan.rank * n.layers * sum(i * (i + o) for i, o in n.linears) * (1 + again) / plan.prompts_per_forward
    seen = p * (p + 1) / 2 + k * r * (p + (r + 1) / 2)
    attention = 4 * n.attention * n.layers * seen * (1 + again + 2.5)
    head = 2 * n.head * k * r * (2 if plan.adapted else 3 if keeps_pulls(plan) else 4)
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
