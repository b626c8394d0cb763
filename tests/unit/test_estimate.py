"""The calculator's numbers, derived by hand; exact parameter counts; and the page that is made with it."""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from spalign.cli import app
from spalign.errors import ModelError, SpalignError
from spalign.training.estimate import (
    DEVICES,
    SHAPES,
    Device,
    Method,
    Plan,
    attention_rows,
    estimate,
    flops_of,
    kept,
    layer_kept,
    memory_of,
    plan_from,
    shape_from,
    shape_of,
    traffic_of,
)
from spalign.training.estimate.plan import Sharding

PAGE = Path(__file__).parents[2] / "docs" / "scale.md"
SMALL = shape_from(
    {
        "model_type": "llama", "num_hidden_layers": 2, "hidden_size": 8, "intermediate_size": 16, "num_attention_heads": 2,
        "num_key_value_heads": 1, "vocab_size": 10, "tie_word_embeddings": False,
    },
    "small",
)  # fmt: skip


def small(**changes: Any) -> Plan:
    return Plan(**{"model": SMALL, "device": DEVICES["h200"], "responses": 2, "prompt_tokens": 3, "response_tokens": 4, **changes})


def test_importing_it_loads_nothing_heavy() -> None:
    code = "import sys, spalign.training.estimate; print([m for m in ('torch', 'transformers', 'numpy') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"


@pytest.mark.parametrize(("name", "count"), [("llama-8b", 8_030_261_248), ("llama-70b", 70_553_706_496), ("demo", 134_515_008)])
def test_parameters_are_those_of_the_real_model(name: str, count: int) -> None:
    assert shape_of(name).parameters == count


@pytest.mark.parametrize("kind", ["llama", "mistral", "qwen2", "qwen3", "biased"])
def test_parameters_equal_a_transformers_model(kind: str, tmp_path: Path) -> None:
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig

    s = SHAPES["llama-8b"]
    shape = {
        "vocab_size": 1000, "hidden_size": s.hidden, "intermediate_size": s.intermediate, "num_hidden_layers": 3,
        "num_attention_heads": s.heads, "num_key_value_heads": s.kv_heads, "tie_word_embeddings": kind == "qwen3",
    }  # fmt: skip
    config = LlamaConfig(**shape, attention_bias=True, mlp_bias=True) if kind == "biased" else AutoConfig.for_model(kind, **shape)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    config.save_pretrained(tmp_path)
    assert shape_of(str(tmp_path)).parameters == sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("name", ["llama-8b", "llama-70b"])
def test_presets_equal_the_model_on_the_meta_device(name: str) -> None:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    s = SHAPES[name]
    config = LlamaConfig(
        vocab_size=s.vocab, hidden_size=s.hidden, intermediate_size=s.intermediate, num_hidden_layers=s.layers,
        num_attention_heads=s.heads, num_key_value_heads=s.kv_heads, tie_word_embeddings=False,
    )  # fmt: skip
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    assert s.parameters == sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("dora", [False, True])
def test_adapter_parameters_equal_pefts(dora: bool) -> None:
    from peft import LoraConfig, get_peft_model
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=10, hidden_size=8, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1
    )
    model = get_peft_model(LlamaForCausalLM(config), LoraConfig(r=3, target_modules="all-linear", task_type="CAUSAL_LM", use_dora=dora))
    assert SMALL.adapter(3, magnitudes=dora) == sum(p.numel() for p in model.parameters() if p.requires_grad)


def test_small_shape_by_hand() -> None:
    # q 8x8, k and v 8x4, o 8x8, gate, up, down 8x16: 64 + 32 + 32 + 64 + 3 * 128 = 576; norms 16
    assert SMALL.layer_matrices == 576
    # 2 * (576 + 16) + embedding 80 + head 80 + last norm 8
    assert SMALL.parameters == 1352


def test_kept_by_hand() -> None:
    # T = 3 + 2 * 4 = 11. Repeated rows cost 2 * 49 / 2 = 49 <= 1.5 * (4.5 + 2 * 4 * 7) = 90.75: two rows of 7, 14 queries and keys
    rows = attention_rows(small())
    assert (rows.queries, rows.keys, rows.mask) == (14, 14, 0)
    # attention: queries and outputs 4 * 8, log-sum-exp 4 * 2, keys and values 4 * 4: 56 B * 14 = 784
    # a token, d = a = 8, f = 16: 16 * 8 + 8 + 10 * 8 + 2 * 8 + 8 * 16 = 360; * 11 = 3960
    assert layer_kept(small()) == 784 + 3960
    # lora r 3: 4 * 8 + 8 + 4 * 8 + 16 + 128 + 14 * 3 = 258; * 11 = 2838. dora: 6 * 8 more, and 4 B of each matrix's output
    assert layer_kept(small(method="lora", rank=3)) == 784 + 2838
    outs = 8 + 4 + 4 + 8 + 16 + 16 + 8
    assert layer_kept(small(method="dora", rank=3)) == 784 + 2838 + (48 + 4 * outs) * 11
    # on a CPU no norm keeps its normalised form, which only trained weights need: 2 * 4 * 8 B less a token
    cpu = Device("cpu", None, 1e12, None)
    assert layer_kept(small(method="lora", rank=3, device=cpu)) == 784 + 2838
    assert layer_kept(small(device=cpu)) == 784 + 3960 - 64 * 11
    # outside: (8 * 8 + 4 + 2 * 4 * 4) * 11 = 1100; head's input and its gradient 2 * 4 * 8 * 8 = 512, logits' gradients 2 * 10 * 8 = 160;
    # layer inputs 2 * 4 * 8 * 11 = 704
    assert kept(small(checkpointing=True)) == 1100 + 512 + 160 + 704


def test_a_long_prompt_is_not_repeated() -> None:
    # 5 * 1100^2 / 2 = 3.0e6 > 1.5 * (0.5e6 + 5 * 100 * 1100) = 1.6e6
    rows = attention_rows(small(responses=5, prompt_tokens=1000, response_tokens=100))
    assert (rows.queries, rows.keys, rows.masked, rows.mask) == (1500, 6500, 5500, 5 * 100 * 1100)


def test_flops_by_hand() -> None:
    # N_body 1152, T 11: 6 * 1152 * 11 = 76032; seen 3 * 4 / 2 + 2 * 4 * (3 + 2.5) = 50: 4 * 8 * 2 * 50 * 3.5 = 11200
    # head 2 * 80 * 8 * 3 = 3840: 80 logits are few, and kept
    assert flops_of(small()) == 76032 + 11200 + 3840
    # checkpointing: a third again of the body, one attention forward more
    assert flops_of(small(checkpointing=True)) == 76032 * 4 / 3 + 11200 * 4.5 / 3.5 + 3840


def test_an_h200_held_what_is_estimated() -> None:
    """benchmarks/results/2026-11-27-h200.md: 56.0 GB for 5317 tokens of two prompts.

    That is without an optimiser, with PEFT's casts (6 d a token), with norms that cast their inputs (4 d), and with tiles of twice the
    size (0.8 GB more).
    """
    plan = Plan(SHAPES["llama-8b"], DEVICES["h200"], "lora", prompt_tokens=41, response_tokens=512, prompts_per_forward=2)
    m = memory_of(plan)
    casts = (32 * 10 + 2) * 4096 * plan.tokens * 2
    assert (m.activations + casts) * 5317 / (2 * plan.tokens) + m.total - m.activations - m.optimizer + 0.8e9 == pytest.approx(
        56.0e9, rel=0.005
    )


def test_states_of_full_and_sharded_training() -> None:
    # 8B full: 4 + 4 + 8 B a parameter; sharding over 8 divides it by 8
    plan = Plan(SHAPES["llama-8b"], DEVICES["h200"])
    for share, p in ((1, plan), (8, replace(plan, devices=8, sharding="fsdp2")), (1, replace(plan, devices=8))):
        m = memory_of(p)
        assert m.weights + m.gradients + m.optimizer == 16 * 8_030_261_248 / share
    # bf16 base: 2 B; 4 bits: 6,979,321,856 weights in layers at 4.127 / 8 B
    assert memory_of(replace(plan, method="lora")).weights == 2 * 8_030_261_248
    assert memory_of(replace(plan, method="qlora")).weights == pytest.approx(6_979_321_856 * 4.12695 / 8 + 2 * 1_050_939_392, rel=1e-5)


def test_traffic_by_hand() -> None:
    # ddp over 4: 2 * 3 / 4 * 4 B * 1352; fsdp2: 3 / 4 * 2 forward passes * (2 gathers + 1 scatter) * 2 B * 1352
    assert traffic_of(small(devices=4)) == 6 * 1352
    assert traffic_of(small(devices=4, sharding="fsdp2", prompts_per_step=8)) == 0.75 * 2 * 6 * 1352


def test_steps_and_hours() -> None:
    found = estimate(small(prompts=100, devices=4, prompts_per_forward=2, epochs=2))
    assert found.plan.step_prompts == 8
    assert found.steps == 25
    assert found.hours == 25 * max(found.compute_seconds, found.communication_seconds) / 3600
    assert found.compute_seconds == 8 * flops_of(found.plan) / (4 * 989e12 * 0.49)
    # K (K - 1) = 2 sequences of 7 tokens, 100 prompts twice
    assert found.as_dict()["pairwise_tokens"] == 2 * 7 * 200


def test_advice_leads_to_a_plan_that_fits() -> None:
    found = estimate(Plan(SHAPES["llama-70b"], DEVICES["h200"], devices=8, prompts_per_forward=4))
    assert found.fits is False
    assert found.advice[0].startswith("--gradient-checkpointing")
    assert found.advice[-1].endswith("fits") or found.advice[-1].startswith("or more devices")
    assert estimate(Plan(SHAPES["llama-8b"], DEVICES["h200"], method="lora")).advice == ()


def advice_for(memory: float, method: Method, devices: int, sharding: Sharding = "ddp") -> tuple[str, ...]:
    """Of 70B, one prompt a forward pass, checkpointed, on devices of so many GB."""
    device = replace(DEVICES["h200"], memory=memory * 1e9)
    return estimate(Plan(SHAPES["llama-70b"], device, method, devices=devices, sharding=sharding, checkpointing=True)).advice


def test_advice_never_spreads_a_base_in_four_bits() -> None:
    # lora, two devices: 2 B a weight are 141 GB, half of them 71, and half a byte is 36; each with what is not the base
    assert advice_for(80, "lora", 2) == (
        "--sharding fsdp2: 86.3 GB, still too much",
        "--method qlora --sharding ddp: 50.6 GB, fits",
    )
    assert advice_for(80, "lora", 2, "fsdp2") == ("--method qlora --sharding ddp: 50.6 GB, fits",)
    # an eighth of 141 GB is less than half a byte a weight: no advice
    assert advice_for(20, "lora", 8, "fsdp2") == ("or more devices: --devices 32 --sharding fsdp2 --gradient-checkpointing",)
    assert advice_for(80, "lora", 1) == ("--method qlora: 49.7 GB, fits",)
    more = "or more devices: --method lora --devices 8 --sharding fsdp2 --gradient-checkpointing"
    assert advice_for(40, "qlora", 1) == advice_for(40, "qlora", 2) == (more,)


def test_one_device_has_nothing_to_spread() -> None:
    assert small(method="qlora", sharding="fsdp2").sharded is False


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"model": "nowhere"}, "no such preset"),
        ({"device": "tpu"}, "no device 'tpu'"),
        ({"device": "cpu"}, "speed is not known"),
        ({"gflops": -1.0}, "FLOP/s is"),
        ({"memory_gb": 0.0}, "memory is 0.0 GB"),
        ({"method": "prefix"}, "no method 'prefix'"),
        ({"sharding": "tp"}, "no sharding 'tp'"),
        ({"devices": 0}, "devices is 0"),
        ({"responses": 1}, "responses is 1"),
        ({"efficiency": 1.5}, "efficiency is 1.5"),
        ({"epochs": float("nan")}, "epochs is nan"),
        ({"devices": 8, "prompts_per_step": 12}, "not a multiple of 8"),
        ({"devices": 8, "method": "qlora", "sharding": "fsdp2"}, "sharding fsdp2: a base in four bits is not spread"),
        ({"devices": 2, "method": "qlora", "sharding": "zero3"}, "sharding zero3: a base in four bits is not spread"),
    ],
)
def test_mistakes_have_a_fix(options: dict[str, Any], says: str) -> None:
    with pytest.raises(SpalignError, match=says) as e:
        plan_from(**{"model": "demo", "device": "h200", **options})
    assert e.value.hint
    assert e.value.exit_code == 2


@pytest.mark.parametrize("config", ["[]", '{"model_type": "gpt2"}', '{"model_type": "llama", "hidden_size": "x"}', "{", "{}"])
def test_a_config_that_says_too_little_is_refused(config: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(config)
    with pytest.raises(ModelError):
        shape_of(str(tmp_path))


def test_command_prints_a_table() -> None:
    done = CliRunner().invoke(app, ["estimate", "--model", "llama-70b"])
    assert done.exit_code == 0
    assert "does not fit" in done.output
    assert "--method qlora" in done.output


def page_rows() -> list[list[str]]:
    lines = [line for line in PAGE.read_text().splitlines() if "`--model" in line]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def line_of(arguments: str) -> list[str]:
    """A row of the page from its command."""
    done = CliRunner().invoke(app, ["estimate", *shlex.split(arguments), "--json"])
    found = json.loads(done.output)
    plan = found["plan"]
    return [
        plan["model"]["name"].removeprefix("llama-").upper(),
        str(plan["devices"]),
        plan["method"],
        f"{found['memory']['total'] / 1e9:,.1f}",
        "yes" if found["fits"] else "no",
        str(plan["prompts_per_step"]),
        f"{found['compute_seconds']:,.1f}",
        f"{found['communication_seconds']:,.1f}",
        f"{found['hours']:,.2f}" if found["fits"] else "-",
        f"`{arguments}`",
    ]


def test_the_page_says_what_its_commands_say() -> None:
    rows = page_rows()
    assert {(r[0], r[1], r[2]) for r in rows} >= {(m, n, how) for m in ("8B", "70B") for n in ("1", "8", "64") for how in ("full", "lora")}
    for row in rows:
        assert row == line_of(row[-1].strip("`"))
