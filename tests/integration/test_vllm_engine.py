"""The vLLM engine, with the real vLLM, against the transformers engine: the demo model in float32, and a tiny random one."""

from __future__ import annotations

import gc
import importlib.util
import itertools
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from random_model import make_tiny
from spalign.config import EngineConfig
from spalign.constitution import load_constitution
from spalign.engines.base import Completion, GenerateRequest, Sampling
from spalign.engines.transformers import TransformersEngine
from spalign.errors import EngineError
from spalign.pipeline.context import MeteredEngine
from spalign.selfeval import judge_check, load_labelled
from spalign.store import Stage, run_in_parts
from spalign.store.work import Alone
from spalign.types import Message

if importlib.util.find_spec("vllm") is None:
    pytest.skip("needs vLLM: make setup ENGINE=vllm (docs/engines.md)", allow_module_level=True)

from spalign.engines.vllm import VLLMEngine

if TYPE_CHECKING:
    Tokens = dict[tuple[str, int], tuple[int, ...]]

pytestmark = pytest.mark.model

EXACT = EngineConfig(kind="vllm", dtype="float32", device="cpu", batch_size=16, memory=1)
GREEDY = Sampling(0.0, 1.0, 16)
ENDLESS = Sampling(0.01, 1.0, 800)
TEXTS = [
    "Hi",
    "Reply with one word only: yes or no?",
    "Tell me, in a few words that anybody can understand, what a river is, where it begins, where it ends and why people live beside it.",
    "Name two colours.",
]
CHOICES = (" Yes", " No")
HEADER = "User: Is water wet?\nAssistant: It is.\nQuestion: Is this true?\nAnswer: Yes\n\n" * 3
CASES = [
    "User: Hi.\nAssistant: Go away!\nQuestion: Is this kind?\nAnswer:",
    "User: Who wrote that long book about whales and the sea?\nAssistant: Herman Melville did, in 1851.\nQuestion: Is this true?\nAnswer:",
    "x\nAnswer:",
]


@pytest.fixture(scope="module")
def engine(demo_folder: Path) -> Iterator[VLLMEngine]:
    engine = VLLMEngine("demo", EXACT)
    yield engine
    engine.close()


@pytest.fixture(scope="module")
def tiny_model(demo_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Random weights, a window of 2048 tokens, and answers that go on to their limit."""
    return make_tiny(demo_folder, tmp_path_factory.mktemp("endless-model"), head_dim=32, ends=1e-12)


@pytest.fixture(scope="module")
def tiny(tiny_model: Path) -> Iterator[VLLMEngine]:
    engine = VLLMEngine(str(tiny_model), EXACT)
    yield engine
    engine.close()


@pytest.fixture(scope="module")
def showing(tiny_model: Path) -> Iterator[VLLMEngine]:
    """As tiny, with hidden states."""
    engine = VLLMEngine(str(tiny_model), EXACT.model_copy(update={"hidden_states": True}))
    yield engine
    engine.close()


@pytest.fixture(scope="module")
def plain(demo_folder: Path) -> TransformersEngine:
    return TransformersEngine.load("demo", EngineConfig(dtype="float32", device="cpu"))


def user(text: str) -> tuple[Message, ...]:
    return (Message("user", text),)


def requests_for(texts: list[str], seeds: tuple[int, ...] = (0,), sampling: Sampling = GREEDY) -> list[GenerateRequest]:
    return [GenerateRequest(str(i), user(t), seeds, sampling) for i, t in enumerate(texts)]


def by_key(completions: Iterator[Completion]) -> Tokens:
    out: Tokens = {}
    for c in completions:
        assert (c.request_id, c.index) not in out
        out[c.request_id, c.index] = c.token_ids
    return out


def pid_of(engine: VLLMEngine) -> int:
    return engine._process._process.pid


def alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    return state != "Z"


def gone_within(seconds: float, pid: int) -> bool:
    end = time.monotonic() + seconds
    while alive(pid) and time.monotonic() < end:
        time.sleep(0.05)
    return not alive(pid)


# generation


def test_greedy_is_what_the_transformers_engine_gives(engine: VLLMEngine, plain: TransformersEngine) -> None:
    want = {(c.request_id, c.index): c for c in plain.generate(requests_for(TEXTS))}
    got = {(c.request_id, c.index): c for c in engine.generate(requests_for(TEXTS))}
    assert len({len(c.token_ids) for c in want.values()}) > 1  # some end by themselves
    assert got == want


def test_samples_are_those_of_the_transformers_engine(engine: VLLMEngine, plain: TransformersEngine) -> None:
    requests = requests_for(TEXTS, seeds=tuple(range(6)), sampling=Sampling(1.0, 0.95, 12))
    want, got = by_key(plain.generate(requests)), by_key(engine.generate(requests))
    assert len(set(want.values())) >= 20
    assert got.keys() == want.keys()
    # the same numbers are drawn from the same distributions; the last bit of a logit (1e-6) moves one draw in thousands
    assert sum(got[k] == want[k] for k in want) >= 23


def test_samples_do_not_depend_on_order_or_company(engine: VLLMEngine) -> None:
    sampling = Sampling(1.0, 0.95, 8)
    requests = requests_for(TEXTS[:3], seeds=(11, 12), sampling=sampling)
    together = by_key(engine.generate(requests))
    assert len(set(together.values())) >= 5  # the seeds do something
    assert by_key(engine.generate(requests[::-1])) == together
    alone = by_key(engine.generate([GenerateRequest("x", user(TEXTS[2]), (12,), sampling)]))
    assert alone["x", 0] == together["2", 1]
    few = requests_for(TEXTS[:2], seeds=(11, 12), sampling=sampling)
    crowd = [GenerateRequest(f"crowd {i}", user(f"Say {i}."), (i,), Sampling(1.0, 0.9, 3)) for i in range(30)]  # more than run at once
    crowded = by_key(engine.generate([*crowd, *few]))
    assert {k: v for k, v in crowded.items() if k in together} == by_key(engine.generate(few))


def test_seeds_work_where_prompts_run_in_chunks(tiny: VLLMEngine) -> None:
    # 16 prompts of some 1,500 tokens run at once, and a step takes 4,096: most prompts are cut somewhere. With vLLM's own seeds this ends
    # in "CPU Generator does not use offset".
    requests = [GenerateRequest(str(i), user(f"{i:02d} word" * 550), (i,), Sampling(1.0, 0.95, 6)) for i in range(16)]
    assert all(1300 < len(tiny.encode_chat(r.messages)) < 2000 for r in requests)
    together = by_key(tiny.generate(requests))
    alone = by_key(tiny.generate(requests[7:8])) | by_key(tiny.generate(requests[15:]))
    assert {k: together[k] for k in alone} == alone
    assert len(set(together.values())) >= 15


def test_one_call_may_mix_temperatures(engine: VLLMEngine) -> None:
    greedy = requests_for(TEXTS[:2])
    warm = [GenerateRequest(f"warm {r.id}", r.messages, (3, 4), Sampling(1.0, 0.9, 16)) for r in greedy]
    hot = [GenerateRequest(f"hot {r.id}", r.messages, (3, 4), Sampling(1.3, 0.8, 16)) for r in greedy]
    apart = by_key(engine.generate(greedy)) | by_key(engine.generate(warm)) | by_key(engine.generate(hot))
    assert by_key(engine.generate([*greedy, *warm, *hot])) == apart


def test_completions_stream_and_may_be_left(tiny: VLLMEngine) -> None:
    long = [GenerateRequest(f"long {i}", user("b"), (i,), Sampling(0.01, 1.0, 1500)) for i in range(3)]
    short = GenerateRequest("short", user("a"), (0,), Sampling(1.0, 1.0, 1))
    completions = tiny.generate([*long, short])
    assert next(completions).request_id == "short"
    assert isinstance(completions, Iterator)
    completions.close()  # type: ignore[attr-defined]
    # what was left does not run on, and its results do not come later
    assert by_key(tiny.generate([short])).keys() == {("short", 0)}


def test_finished_and_unfinished(engine: VLLMEngine) -> None:
    eos = engine.tokenizer.eos_token_id
    (ends,) = engine.generate(requests_for([TEXTS[1]], sampling=Sampling(0.0, 1.0, 40)))
    assert ends.finished
    assert ends.token_ids[-1] == eos
    assert eos not in ends.token_ids[:-1]
    assert ends.text == engine.tokenizer.decode(ends.token_ids[:-1]).strip()
    n = len(ends.token_ids)
    (cut,) = engine.generate(requests_for([TEXTS[1]], sampling=Sampling(0.0, 1.0, n - 1)))
    assert (cut.finished, cut.token_ids, cut.text) == (False, ends.token_ids[:-1], ends.text)
    (just,) = engine.generate(requests_for([TEXTS[1]], sampling=Sampling(0.0, 1.0, n)))
    assert just == ends


def test_a_prompt_longer_than_the_window_is_refused_before_any_work(tiny: VLLMEngine) -> None:
    assert tiny.window == 2048
    room = tiny.window - len(tiny.encode_chat(user("a")))
    (fits,) = tiny.generate([GenerateRequest("fits", user("a"), (0,), Sampling(1.0, 1.0, room))])
    assert 1 <= len(fits.token_ids) <= room
    with pytest.raises(EngineError, match=f"prompt 'p7' has {2048 - room} tokens; with max_new_tokens {room + 1} .* of 2048"):
        next(tiny.generate([*requests_for(["a"]), GenerateRequest("p7", user("a"), (0,), Sampling(1.0, 1.0, room + 1))]))


def test_nothing_asked_nothing_run(tiny: VLLMEngine) -> None:
    before = tiny.prompt_tokens
    assert list(tiny.generate([])) == []
    assert tiny.choice_logprobs([], [" Yes"]) == []
    assert tiny.loglikelihood([]) == []
    assert tiny.prompt_tokens == before


# log-probabilities


@pytest.mark.parametrize("texts", [[HEADER + c for c in CASES], CASES, [CASES[0], CASES[1], CASES[0]]], ids=["common", "none", "twice"])
def test_choice_logprobs_are_those_of_the_transformers_engine(engine: VLLMEngine, plain: TransformersEngine, texts: list[str]) -> None:
    want = plain.choice_logprobs(texts, CHOICES)
    for _ in range(2):  # the second time from what is remembered
        got = engine.choice_logprobs(texts, CHOICES)
        for a, b in zip(got, want, strict=True):
            assert a == pytest.approx(b, abs=1e-4)


def test_choices_of_a_conversation_and_unlikely_ones(engine: VLLMEngine, plain: TransformersEngine) -> None:
    asks = [user(t) for t in TEXTS]
    choices = ("Yes", "No", *map(str, range(10)), "a", "b", "c", "d", "e", "f", "g", "h", "q", "z", "x", "w")  # more than 20, most unlikely
    want, got = plain.choice_logprobs(asks, choices), engine.choice_logprobs(asks, choices)
    assert min(want[0] or ()) < -15
    for a, b in zip(got, want, strict=True):
        assert a == pytest.approx(b, abs=1e-3)


def test_what_prompts_begin_with_runs_once(engine: VLLMEngine) -> None:
    texts = [f"{HEADER}User: {i}\nAnswer:" for i in range(8)]
    shared = len(engine.tokenizer(HEADER)["input_ids"]) // 32 * 32
    assert shared >= 32
    engine.choice_logprobs(texts[:1], CHOICES)
    before = engine.cached_tokens
    engine.choice_logprobs(texts[1:], CHOICES)
    assert engine.cached_tokens - before >= 7 * shared


def test_a_text_that_fills_the_window_has_no_logprobs(tiny: VLLMEngine) -> None:
    words = [" word" * n for n in (2048, 2047, 3)]
    assert [len(tiny.tokenizer(w)["input_ids"]) for w in words] == [2048, 2047, 3]  # 2048 leave no place for the choice
    none, just, short = tiny.choice_logprobs(words, CHOICES)
    assert none is None
    assert just is not None
    assert short is not None
    (alone,) = tiny.choice_logprobs(words[2:], CHOICES)
    assert short == pytest.approx(alone, abs=1e-4)


def test_a_choice_of_several_tokens_is_refused(tiny: VLLMEngine) -> None:
    with pytest.raises(EngineError, match="the choice ' Absolutely not' is 2 tokens"):
        tiny.choice_logprobs(["x"], [" Yes", " Absolutely not"])


ANSWERS = [
    "Yes.",
    "A river is water that flows from the hills to the sea; people fish in it and travel on it.",
    "I do not know.",
]


def test_loglikelihood_is_that_of_the_transformers_engine(engine: VLLMEngine, plain: TransformersEngine) -> None:
    contexts = [engine.encode_chat(user(t)) for t in TEXTS[1:]]
    requests = [(c, engine.encode_response(a)) for c in contexts for a in ANSWERS]
    requests += [(c, y[:1]) for c, y in requests[:2]]  # answers of one token
    want = plain.loglikelihood(requests)
    for _ in range(2):  # the second time everything is remembered, so that vLLM has no log-probabilities unless it runs again
        got = engine.loglikelihood(requests)
        for a, b in zip(got, want, strict=True):
            assert a == pytest.approx(b, abs=1e-3)
    # answers that begin with each other: what is remembered reaches into them
    long = engine.encode_response(ANSWERS[1] * 6)
    nested = [(contexts[0], long[:n]) for n in (40, 80, 120)]
    for a, b in zip(engine.loglikelihood(nested), plain.loglikelihood(nested), strict=True):
        assert a == pytest.approx(b, abs=1e-3)


def test_what_does_not_fit_or_is_empty_has_no_reading(tiny: VLLMEngine) -> None:
    fits, long, nothing, bare = tiny.loglikelihood([([5] * 1024, [6] * 1024), ([5] * 1024, [6] * 1025), ([5], []), ([], [5])])
    assert fits is not None
    assert len(fits) == 1024
    assert [long, nothing, bare] == [None, None, None]


# what it cannot do


def test_no_hidden_states_so_no_probe(tiny: VLLMEngine) -> None:
    assert "representations" not in tiny.capabilities
    with pytest.raises(EngineError, match="hidden states"):
        tiny.representations([([5], [6])], (0.5,))
    objective = load_constitution("harmless_helpful").objectives[0]
    labelled = load_labelled(None, [objective.name])[:6]
    found = judge_check(tiny, [objective], labelled, ("probe", "yes_no"))
    assert "representations" in found.skipped["probe"]
    assert "yes_no" in found.reports[objective.name]
    with pytest.raises(EngineError, match="no scorer can be asked"):
        judge_check(tiny, [objective], labelled, ("probe",))


def test_hidden_states_come_from_transformers_where_they_are_asked_for(showing: VLLMEngine, tiny_model: Path) -> None:
    plain = TransformersEngine.load(str(tiny_model), EngineConfig(dtype="float32", device="cpu"))
    assert "representations" in showing.capabilities
    pairs = [(showing.encode_chat(user(t)), showing.encode_response(a)) for t in TEXTS for a in ANSWERS]
    with ThreadPoolExecutor(2) as threads:
        found = list(threads.map(lambda p: showing.representations(p, (0.0, 0.5, 1.0)), (pairs, pairs)))
    assert found == [plain.representations(pairs, (0.0, 0.5, 1.0))] * 2
    assert showing._beside is not None


# calls of several threads


def test_calls_of_two_threads_run_side_by_side_and_give_what_each_gives_alone(tiny: VLLMEngine) -> None:
    asks = [requests_for([f"{word} {n}" for n in range(6)], seeds=(1, 2), sampling=Sampling(1.0, 0.9, 40)) for word in ("Say", "Write")]
    alone = [by_key(tiny.generate(ask)) for ask in asks]
    long = requests_for(["Go on", "And on"], sampling=ENDLESS)
    ended = []
    with ThreadPoolExecutor(5) as threads:
        under_way = threads.submit(lambda: [ended.append(c.request_id) or c for c in tiny.generate(long)])
        found = list(threads.map(lambda ask: by_key(tiny.generate(ask)), asks * 2))
        scores = threads.submit(tiny.choice_logprobs, CASES, CHOICES).result()
        assert len(ended) < 2  # the long one has not: they did not wait for it
    assert len(under_way.result()) == 2
    assert scores == [pytest.approx(s, abs=1e-4) for s in tiny.choice_logprobs(CASES, CHOICES) if s]
    # what runs beside a sequence moves last bits, and now and then one of them turns a draw
    assert sum(a[key] != b[key] for a, b in zip(found, alone * 2, strict=True) for key in b) <= 2


def test_a_call_that_is_left_ends_and_the_others_go_on(tiny: VLLMEngine) -> None:
    long = [GenerateRequest("short", user("a"), (1,), Sampling(0.01, 1.0, 2)), *requests_for(["b"] * 15, sampling=ENDLESS)]
    left = tiny.generate(long)
    assert next(left).request_id == "short"
    began = time.monotonic()
    left.close()  # type: ignore[attr-defined]
    assert len(list(tiny.generate(requests_for(["e"] * 16, sampling=Sampling(1.0, 1.0, 3))))) == 16  # all sixteen places are free
    brief = time.monotonic() - began
    list(tiny.generate(long))
    assert brief < 0.5 * (time.monotonic() - began - brief)
    assert not tiny._process._line._arriving  # nothing is kept of any


def test_calls_that_are_forgotten_in_the_middle_end_in_whatever_thread_finds_them(tiny: VLLMEngine) -> None:
    def forget() -> None:
        short = GenerateRequest("short", user("a"), (1,), Sampling(0.01, 1.0, 2))
        call = tiny.generate([short, *requests_for(["a", "b"], sampling=ENDLESS)])
        loop = [call]
        loop.append(loop)  # type: ignore[arg-type]  # only the collector finds it
        next(call)

    with ThreadPoolExecutor(2) as threads:
        for _ in range(4):
            forget()
            busy = threads.submit(lambda: list(tiny.generate(requests_for(["c"] * 8, sampling=Sampling(1.0, 1.0, 40)))))
            gc.collect()
            assert len(busy.result(60)) == 8
    assert not tiny._process._line._arriving


def test_parts_side_by_side_are_those_of_one_after_the_other(tiny: VLLMEngine, tmp_path: Path) -> None:
    def rows(width: int) -> list[dict[str, object]]:
        stage = Stage(tmp_path / str(width), {})
        engine = MeteredEngine(tiny, "tiny", stage)

        def work(shard: Sequence[GenerateRequest]) -> list[dict[str, object]]:
            return [{"id": c.request_id, "i": c.index, "ids": c.token_ids} for c in engine.generate(shard)]

        asked = requests_for([f"Say {n}" for n in range(12)], seeds=(1, 2), sampling=Sampling(1.0, 0.9, 40))
        made = run_in_parts(stage, asked, 2, work, crew=engine if width == 2 else Alone())
        assert made["tokens"] == (sum(len(r["ids"]) for r in stage.rows()) if width == 2 else 0)
        return sorted(stage.rows(), key=lambda r: (r["id"], r["i"]))

    turned = sum(a != b for a, b in zip(rows(2), rows(1), strict=True))
    assert turned <= 1  # a draw, now and then, by last bits


@pytest.mark.parametrize("how", ["killed", "closed"])
def test_every_thread_learns_why_it_ended(tiny: VLLMEngine, showing: VLLMEngine, how: str) -> None:
    engine = tiny if how == "killed" else showing  # nobody needs them after this
    with ThreadPoolExecutor(3) as threads:
        calls = [threads.submit(list, engine.generate(requests_for(["a"], sampling=Sampling(0.01, 1.0, 2000)))) for _ in range(3)]
        deadline = time.monotonic() + 60
        while len(engine._process._line._arriving) < 3 and time.monotonic() < deadline:
            time.sleep(0.01)
        if how == "killed":
            os.kill(pid_of(engine), signal.SIGKILL)
        else:
            engine.close()
        why = "its process was killed, perhaps for want of memory" if how == "killed" else "the vLLM engine was closed"
        for call in calls:
            with pytest.raises(EngineError, match=why) as e:
                call.result(60)
    assert gone_within(5, pid_of(engine))
    assert how == "killed" or engine._beside is None
    assert "\x1b" not in e.value.message
    if how == "killed":
        assert "log: " in e.value.message
        assert "engine.memory" in e.value.hint
        with pytest.raises(EngineError, match="its process was killed"):  # the reason, not only that it is closed
            list(engine.generate(requests_for(["a"])))


def test_what_vllm_refuses_is_told(tiny_model: Path, tmp_path: Path) -> None:
    for file in tiny_model.iterdir():
        if file.suffix != ".safetensors":
            (tmp_path / file.name).symlink_to(file)
    (tmp_path / "model.safetensors").write_bytes(b"not weights")
    with pytest.raises(EngineError, match=r"vLLM did not start: .*[Hh]eader") as e:
        VLLMEngine(str(tmp_path), EXACT)
    assert "Traceback" not in e.value.message.splitlines()[0]


def test_it_ends_with_a_parent_that_is_killed_and_leaves_nothing(tiny_model: Path, tmp_path: Path) -> None:
    code = (
        "import sys, time\nfrom spalign.config import EngineConfig\nfrom spalign.engines.vllm import VLLMEngine\n"
        "engine = VLLMEngine(sys.argv[1], EngineConfig(kind='vllm', dtype='float32', memory=1))\n"
        "print(engine._process._process.pid, flush=True)\ntime.sleep(600)\n"
    )
    own = {**os.environ, "TMPDIR": str(tmp_path)}
    with subprocess.Popen([sys.executable, "-c", code, str(tiny_model)], env=own, stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        pid = int(parent.stdout.readline())
        assert alive(pid)
        assert list(tmp_path.glob("spalign-vllm-*"))
        parent.send_signal(signal.SIGKILL)
    assert gone_within(10, pid)
    assert list(tmp_path.glob("spalign-vllm-*")) == []


# adapters


def test_an_adapter_that_was_trained_here_gives_the_merged_model_s_numbers(tiny_model: Path, tmp_path: Path) -> None:
    """SPATrainer's adapter, put on its base by vLLM, against its merged model in transformers; and that the base alone says otherwise."""
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from spalign.engines.make import MERGED, adapter_of, load_engine
    from spalign.engines.models import fingerprint
    from spalign.training.merge import merge
    from spalign.training.trainer import SPAConfig, SPATrainer

    rows = [
        {
            "prompt": [{"role": "user", "content": t}],
            "chosen": [{"role": "assistant", "content": a}],
            "rejected": [{"role": "assistant", "content": b}],
        }
        for t, (a, b) in zip(TEXTS, itertools.pairwise([*ANSWERS, "No.", "Perhaps."]), strict=True)
    ]
    args = SPAConfig(
        output_dir=str(tmp_path / "out"),
        loss="simpo",
        learning_rate=1e-2,
        num_train_epochs=5,
        use_cpu=True,
        save_strategy="no",
        report_to="none",
        dataloader_pin_memory=False,
        disable_tqdm=True,
    )
    model, tokenizer = AutoModelForCausalLM.from_pretrained(tiny_model), AutoTokenizer.from_pretrained(tiny_model)
    trainer = SPATrainer(model, args, rows, tokenizer, peft_config=LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"))
    trainer.train()
    trainer.model.save_pretrained(tmp_path / "adapter")
    merge(tmp_path / "adapter", tmp_path / "model", model=str(tiny_model), dtype="float32", trust_remote_code=False)
    (tmp_path / "adapter" / MERGED).write_text(json.dumps({"sha256": fingerprint(str(tmp_path / "model"))}))  # as a run does
    assert adapter_of(str(tmp_path / "model")) == (str(tiny_model), tmp_path / "adapter")

    base = TransformersEngine.load(str(tiny_model), EngineConfig(dtype="float32", device="cpu"))
    merged = TransformersEngine.load(str(tmp_path / "model"), EngineConfig(dtype="float32", device="cpu"))
    engine = load_engine(str(tmp_path / "model"), EXACT)
    assert isinstance(engine, VLLMEngine)
    requests = [(engine.encode_chat(user(t)), engine.encode_response(a)) for t in TEXTS for a in ANSWERS]
    got, want, without = (e.loglikelihood(requests) for e in (engine, merged, base))
    for a, b, c in zip(got, want, without, strict=True):
        assert a == pytest.approx(b, abs=1e-3)
        assert max(abs(x - y) for x, y in zip(b or (), c or (), strict=True)) > 0.1  # it has learned something
    greedy = requests_for(TEXTS)
    assert by_key(engine.generate(greedy)) == by_key(merged.generate(greedy))

    # memory goes back when an engine is forgotten, as when it is closed
    pid, folder = pid_of(engine), Path(engine._process._folder.name)
    assert alive(pid)
    assert folder.exists()
    asked = engine.generate(greedy)
    next(asked)
    asked.close()  # type: ignore[attr-defined]
    del asked, engine
    assert gone_within(5, pid)
    assert not folder.exists()
