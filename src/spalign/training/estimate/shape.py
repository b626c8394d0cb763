"""How large a model is: from a preset or a Hugging Face config, as numbers only."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from spalign.errors import ModelError


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
