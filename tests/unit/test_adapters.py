"""A frozen layer and its adapter: the formula, its gradient by finite differences, and what is left to PEFT."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from accelerate import cpu_offload
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

from spalign.training.adapters import frozen_with_adapter, fuse_adapters


def drawn(*shapes: tuple[int, ...], dtype: torch.dtype = torch.float64) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(*s, generator=generator, dtype=torch.float64).to(dtype) for s in shapes]


def test_by_hand() -> None:
    x, weight, a, b = (torch.tensor(t) for t in ([[1.0, 2.0]], [[1.0, 0.0], [0.0, 3.0]], [[1.0, 1.0]], [[2.0], [-1.0]]))
    # W x = (1, 6); A x = 3; B A x = (6, -3); half of it, and a bias of (10, 20)
    out = frozen_with_adapter(x, weight, a, b, scaling=0.5, bias=torch.tensor([10.0, 20.0]))
    assert out.tolist() == [[14.0, 24.5]]


@pytest.mark.parametrize("lead", [(5,), (1, 5), (2, 3, 4), (0,)])
@pytest.mark.parametrize("biased", [False, True])
def test_the_gradient_by_finite_differences(lead: tuple[int, ...], biased: bool) -> None:
    x, weight, a, b, bias = drawn((*lead, 6), (7, 6), (3, 6), (7, 3), (7,))
    for t in (x, a, b):
        t.requires_grad_()
    given = bias if biased else None
    assert torch.autograd.gradcheck(lambda x, a, b: frozen_with_adapter(x, weight, a, b, scaling=1.7, bias=given), (x, a, b))
    # the first layer's input has no gradient
    out = frozen_with_adapter(x.detach(), weight, a, b, scaling=1.7, bias=given)
    plain = nn.functional.linear(x, weight, given) + (x @ a.T @ b.T) * 1.7
    torch.testing.assert_close(out, plain)
    got, want = (torch.autograd.grad(y.square().sum(), (a, b)) for y in (out, plain))
    torch.testing.assert_close(got, want)


def test_in_bf16_it_is_nearer_to_exact_than_several_roundings() -> None:
    parts = drawn((64, 96), (80, 96), (4, 96), (80, 4), dtype=torch.bfloat16)
    x, weight, a, b = parts
    exact = frozen_with_adapter(*(p.double() for p in parts), scaling=2.0)
    plain = nn.functional.linear(x, weight) + (x @ a.T @ b.T) * 2.0
    gaps = [float((y.double() - exact).norm()) for y in (frozen_with_adapter(x, weight, a, b, scaling=2.0), plain)]
    assert gaps[0] < gaps[1]


class Two(nn.Module):
    def __init__(self, bias: bool = False) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(6, 8, bias=bias), nn.Linear(8, 6, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x).tanh())  # type: ignore[no-any-return]


def with_adapter(*, biased: bool = False, **changes: Any) -> Any:
    torch.manual_seed(0)
    return get_peft_model(
        Two(biased), LoraConfig(**{"r": 2, "lora_alpha": 3, "target_modules": ["first", "second"], "init_lora_weights": False, **changes})
    )


def outcome(model: Any, x: Tensor) -> list[Tensor]:
    torch.manual_seed(1)  # for dropout
    model.zero_grad()
    out = model(x)
    if out.requires_grad:
        out.square().sum().backward()
    return [out.detach(), *(p.grad for p in model.parameters() if p.grad is not None)]


def calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    seen: list[int] = []

    def noted(*args: Any, **kwargs: Any) -> Tensor:
        seen.append(1)
        return frozen_with_adapter(*args, **kwargs)

    monkeypatch.setattr("spalign.training.adapters.frozen_with_adapter", noted)
    return seen


@pytest.mark.parametrize("bias", [False, True])
def test_plain_lora_is_fused_and_its_numbers_are_peft_s(bias: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    model, seen, (x,) = with_adapter(biased=bias), calls(monkeypatch), drawn((2, 3, 6), dtype=torch.float32)
    want = outcome(model, x)
    fuse_adapters(model)
    got = outcome(model, x)
    assert len(seen) == 2
    torch.testing.assert_close(got, want)
    # a copy computes with its own weights
    other = copy.deepcopy(model)
    nn.init.zeros_(other.base_model.model.second.lora_B["default"].weight)
    torch.testing.assert_close(outcome(model, x), want)
    assert not torch.allclose(outcome(other, x)[0], want[0])


def test_a_backward_pass_inside_autocast_after_a_forward_pass_outside() -> None:
    x, weight, a, b = drawn((5, 6), (7, 6), (3, 6), (7, 3), dtype=torch.float32)
    a.requires_grad_()
    out = frozen_with_adapter(x, weight, a, b, scaling=0.5).sum()
    (want,) = torch.autograd.grad(out, a, retain_graph=True)
    with torch.autocast("cpu", torch.bfloat16):
        (got,) = torch.autograd.grad(out, a)
    assert torch.equal(got, want)


def test_a_gradient_that_is_small_only_after_scaling_fits_into_float16() -> None:
    x, weight, a, b = drawn((1, 4), (2, 4), (3, 4), (2, 3), dtype=torch.float16)
    a, b = a.requires_grad_(), torch.full_like(b, 64).requires_grad_()
    out = frozen_with_adapter(x, weight, a, b, scaling=2**-4)
    grads = torch.autograd.grad(out, (a, b), torch.full_like(out, 1000))
    assert all(bool(g.isfinite().all()) for g in grads)


def several(model: Any) -> None:
    model.add_adapter("other", model.peft_config["default"])
    model.base_model.set_adapter(["default", "other"])


def thawed(model: Any) -> None:
    for part in ("first", "second"):
        getattr(model.base_model.model, part).base_layer.weight.requires_grad_(True)


def offloaded(model: Any) -> None:
    for part in ("first", "second"):
        cpu_offload(getattr(model.base_model.model, part).base_layer)


def hooked(model: Any) -> None:
    for part in ("first", "second"):
        getattr(model.base_model.model, part).lora_A["default"].register_forward_hook(lambda *_: None)


def halved(model: Any) -> None:
    """Adapters in float32 on a base in bf16, without autocast: PEFT casts."""
    for part in ("first", "second"):
        getattr(model.base_model.model, part).base_layer.bfloat16()


@pytest.mark.parametrize(
    ("changes", "then"),
    [
        ({"use_dora": True}, None),
        ({"lora_dropout": 0.5}, None),
        ({"biased": True, "lora_bias": True}, None),
        ({"biased": True, "bias": "all"}, None),
        ({"biased": True, "bias": "lora_only"}, None),
        ({}, hooked),
        ({}, several),
        ({}, thawed),
        ({}, offloaded),
        ({}, lambda model: model.merge_adapter()),
        ({}, lambda model: model.base_model.disable_adapter_layers()),
        ({}, halved),
    ],
)
def test_anything_else_is_peft_s_to_the_bit(
    changes: dict[str, Any], then: Callable[[Any], None] | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, seen, (x,) = with_adapter(**changes), calls(monkeypatch), drawn((4, 6), dtype=torch.float32)
    if then is not None:
        then(model)
    x = x.to(model.base_model.model.first.base_layer.weight.dtype)
    want = outcome(model, x)
    fuse_adapters(model)
    got = outcome(model, x)
    assert len(seen) == 0
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


def test_dropout_is_peft_s_and_evaluation_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    model, seen, (x,) = with_adapter(lora_dropout=0.5), calls(monkeypatch), drawn((4, 6), dtype=torch.float32)
    fuse_adapters(model)
    model(x)
    assert len(seen) == 0
    model.eval()(x)
    assert len(seen) == 2
