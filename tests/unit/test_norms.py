"""RMSNorm by torch is that of the models, to the bit on a CPU, and which models' it is. Its kernel: tests/integration/test_cuda.py."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers.models.gemma2.modeling_gemma2 import Gemma2RMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.models.mistral.modeling_mistral import MistralRMSNorm
from transformers.models.olmo2.modeling_olmo2 import Olmo2RMSNorm
from transformers.models.qwen3.modeling_qwen3 import Qwen3RMSNorm

from spalign.training.norms import fuse_norms, rms_norm


@pytest.mark.parametrize("hidden", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("weight", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("autocast", [False, True])
def test_it_is_llama_s_to_the_bit(hidden: torch.dtype, weight: torch.dtype, autocast: bool) -> None:
    torch.manual_seed(0)
    norm = LlamaRMSNorm(64, eps=1e-5).to(weight)
    nn.init.normal_(norm.weight)
    x = (3 * torch.randn(2, 5, 64)).to(hidden).requires_grad_()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        ours, theirs = rms_norm(x, norm.weight, 1e-5), norm(x)
    assert ours.dtype == theirs.dtype
    assert torch.equal(ours, theirs)
    pull = torch.randn_like(ours)
    close = {"rtol": 1e-5, "atol": 1e-5} if hidden == weight == torch.float32 else {"rtol": 0.05, "atol": 0.05}
    got, want = (torch.autograd.grad((y * pull).sum(), (x, norm.weight)) for y in (ours, theirs))
    torch.testing.assert_close(got, want, **close)


@pytest.mark.parametrize("tokens", [1, 2, 3, 7])
def test_its_gradient_by_finite_differences_over_stretches(tokens: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("spalign.training.norms.STRETCH", 2 * 6)  # two tokens at a time
    torch.manual_seed(tokens)
    norm, x = LlamaRMSNorm(6, eps=1e-5), torch.randn(tokens, 6, requires_grad=True)
    nn.init.normal_(norm.weight)
    pull = torch.randn(tokens, 6)
    got, want = (torch.autograd.grad((y * pull).sum(), (x, norm.weight)) for y in (rms_norm(x, norm.weight, 1e-5), norm(x)))
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)
    step = torch.zeros_like(x)
    step[-1, 2] = 1e-2
    double = norm.double()
    up, down = ((double((x + s).detach().double()) * pull).sum() for s in (step, -step))
    assert float(got[0][-1, 2]) == pytest.approx(float((up - down).detach() / 2e-2), rel=1e-2, abs=1e-3)


@pytest.mark.parametrize(
    ("kind", "fused"), [(LlamaRMSNorm, True), (MistralRMSNorm, True), (Qwen3RMSNorm, True), (Gemma2RMSNorm, False), (Olmo2RMSNorm, False)]
)
def test_which_are_fused(kind: type, fused: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    model = nn.Sequential(kind(8), nn.LayerNorm(8))
    x = torch.randn(3, 8)
    want = model(x)
    fuse_norms(model)
    assert torch.equal(model(x), want)
    monkeypatch.setattr("spalign.training.norms.rms_norm", lambda *_: pytest.fail("nobody wants a gradient"))
    with torch.no_grad():
        assert torch.equal(model(x), want)
    model.requires_grad_(False)
    assert ("forward" in vars(model[0])) == fused
    assert "forward" not in vars(model[1])
    assert torch.equal(model(x), want)


def test_another_s_layer_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also one that was put in the place of transformers' own, whose code it then equals."""

    class Theirs(LlamaRMSNorm):
        def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
            return (1 + self.weight) * hidden_states

    monkeypatch.setattr("transformers.models.llama.modeling_llama.LlamaRMSNorm", Theirs)
    model = nn.Sequential(Theirs(8))
    fuse_norms(model)
    assert "forward" not in vars(model[0])
