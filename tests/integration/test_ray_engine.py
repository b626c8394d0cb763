"""The Ray engine on a real Ray cluster of this machine: two workers give what one engine gives here, also when one is killed."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path

import psutil
import pytest

from spalign.config import EngineConfig, config_from
from spalign.engines.base import Completion, GenerateRequest, Sampling
from spalign.engines.make import load_engine
from spalign.engines.ray import RayEngine
from spalign.engines.ray_pool import Pool
from spalign.engines.transformers import TransformersEngine
from spalign.errors import ConfigError, EngineError, ModelError
from spalign.pipeline.context import MeteredEngine
from spalign.pipeline.prepare import checks_of
from spalign.store import Stage, run_in_parts
from spalign.text import printable
from spalign.types import Message

pytest.importorskip("ray", reason="needs Ray: pip install 'spalign[ray]'")
pytestmark = pytest.mark.model

HERE = EngineConfig(dtype="bfloat16", device="cpu", batch_size=4)
POOL = EngineConfig(kind="ray", dtype="bfloat16", device="cpu", batch_size=4, workers=2, worker_cpus=1)
WAYS = Sampling(1.0, 0.95, 24)
CASES = ["User: Hi.\nAssistant: Go away!\nQuestion: Is this kind?\nAnswer:", "x\nAnswer:", "Is water wet?\nAnswer:"]


def requests(start: int, count: int, limit: int = 24) -> list[GenerateRequest]:
    return [
        GenerateRequest(
            str(n), (Message("user", f"Say {n} in {n % 5} words" + " please" * (n % 7)),), (n, n + 1), Sampling(1.0, 0.95, limit)
        )
        for n in range(start, start + count)
    ]


def by_place(completions: list[Completion]) -> dict[tuple[str, int], Completion]:
    found = {(c.request_id, c.index): c for c in completions}
    assert len(found) == len(completions)  # nothing twice
    return found


def processes(title: str) -> list[int]:
    """Of the cluster that this process started."""
    found = []
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.Error):  # it ends just now
            if title in " ".join(process.cmdline()):
                found.append(process.pid)
    return found


def workers() -> list[int]:
    return processes("ray::MapWorker")


@pytest.fixture(scope="module")
def pool(tiny_model: Path) -> Iterator[RayEngine]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("spalign.engines.ray_pool.LOST", 8.0)
        patch.setattr("spalign.engines.ray_pool.TRIES", 2)
        engine = load_engine(str(tiny_model), POOL)
    assert isinstance(engine, RayEngine)
    yield engine
    engine.close()


@pytest.fixture(scope="module")
def plain(tiny_model: Path) -> TransformersEngine:
    return TransformersEngine.load(str(tiny_model), HERE)


def test_every_verb_gives_what_the_engine_gives_here_to_the_bit(pool: RayEngine, plain: TransformersEngine):
    asked = requests(0, 9)
    assert by_place(list(pool.generate(asked))) == by_place(list(plain.generate(asked)))
    assert pool.choice_logprobs(CASES, (" Yes", " No")) == plain.choice_logprobs(CASES, (" Yes", " No"))
    context, answer = plain.encode_chat(asked[0].messages), plain.encode_response("Here it is.")
    pairs = [(context, answer), (context[:5], answer[:1]), ([], answer), (context, [])]
    assert pool.loglikelihood(pairs) == plain.loglikelihood(pairs)
    assert pool.representations(pairs, (0.0, 0.5, 1.0)) == plain.representations(pairs, (0.0, 0.5, 1.0))
    assert (pool.encode_chat(asked[0].messages), pool.encode_response("x")) == (context, plain.encode_response("x"))
    assert (pool.window, pool.capabilities) == (plain.window, plain.capabilities)
    pool.check_choices((" Yes",))
    with pytest.raises(EngineError, match="tokens for this tokenizer, not one"):
        pool.check_choices(("absolutely not so",))
    places = [[(r.id, i) for r, i in batch] for batch in pool.batches(asked)]
    assert places == [[(r.id, i) for r, i in batch] for batch in plain.batches(asked)]


def sampled(engine: MeteredEngine, stage: Stage, count: int) -> dict[str, object]:
    def work(shard):
        made = by_place(list(engine.generate(shard)))
        scores = engine.choice_logprobs([c.text + "\nAnswer:" for c in made.values()], (" Yes", " No"))
        return [
            {"id": c.request_id, "i": c.index, "ids": c.token_ids, "scores": made_scores}
            for c, made_scores in zip(made.values(), scores, strict=True)
        ]

    return run_in_parts(stage, requests(0, count), 3, work, crew=engine)


def rows(stage: Stage) -> list[dict[str, object]]:
    return sorted(stage.rows(), key=lambda r: (r["id"], r["i"]))


def test_parts_are_those_of_the_local_run_though_a_worker_is_killed_in_the_middle(
    pool: RayEngine, plain: TransformersEngine, tmp_path: Path
):
    alone, together = Stage(tmp_path / "alone", {}), Stage(tmp_path / "together", {})
    told = sampled(MeteredEngine(plain, "m", alone), alone, 60)
    before = workers()
    assert len(before) == 2
    killed = []

    def kill() -> None:  # when the first parts are there, and journals of others
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline and not (together.folder.exists() and len(together.parts()) >= 2):
            time.sleep(0.005)
        while time.monotonic() < deadline and not killed:
            for pid in before:
                if psutil.Process(pid).cpu_percent(0.02) > 10:  # it has a call in hand
                    os.kill(pid, signal.SIGKILL)
                    killed.append(pid)
                    break

    thread = threading.Thread(target=kill)
    thread.start()
    found = sampled(MeteredEngine(pool, "m", together), together, 60)
    thread.join()
    assert killed
    assert rows(together) == rows(alone)
    assert (found["tokens"], found["items"], len(together.parts())) == (told["tokens"], 60, 20)
    for _ in range(100):  # it comes back
        if len(workers()) == 2:
            break
        time.sleep(0.2)
    assert len(set(workers()) - set(killed)) == 2


def test_a_batch_that_lost_its_worker_runs_again_as_it_was(pool: RayEngine, plain: TransformersEngine):
    asked, got, arrived = requests(100, 20, limit=200), [], []
    for completion in pool.generate(asked):
        got.append(completion)
        arrived.append(time.monotonic())
        if len(got) == 7:
            for pid in workers():  # the one that has the call among them
                os.kill(pid, signal.SIGKILL)
    assert by_place(got) == by_place(list(plain.generate(asked)))
    assert max(b - a for a, b in pairwise(arrived)) > 1, "the rest came from a worker that had to start"


def test_calls_go_on_though_the_process_that_brings_them_in_is_lost(pool: RayEngine, plain: TransformersEngine):
    asked = requests(200, 2)
    assert len(by_place(list(pool.generate(asked)))) == 4
    for pid in processes("ray::MapBatches(come_in)"):
        os.kill(pid, signal.SIGKILL)
    for _ in range(2):
        assert by_place(list(pool.generate(asked))) == by_place(list(plain.generate(asked)))


def test_another_does_what_a_lost_worker_got_that_had_nothing_to_do(pool: RayEngine, plain: TransformersEngine):
    """Stopped, it is not heard of, as one whose node is gone; Ray gives it a call all the same."""
    asked = [requests(n, 2) for n in (0, 2, 4, 6)]
    stopped = workers()[0]
    os.kill(stopped, signal.SIGSTOP)
    try:
        with ThreadPoolExecutor(2) as threads:
            got = list(threads.map(lambda ask: by_place(list(pool.generate(ask))), asked))
    finally:
        os.kill(stopped, signal.SIGCONT)
    assert got == [by_place(list(plain.generate(ask))) for ask in asked]


def test_another_does_what_a_lost_worker_had_that_does_not_come_back(pool: RayEngine, plain: TransformersEngine):
    asked, got, stopped = requests(300, 20, limit=200), [], 0
    try:
        for completion in pool.generate(asked):
            got.append(completion)
            if len(got) == 7:
                stopped = max(workers(), key=lambda pid: psutil.Process(pid).cpu_percent(0.2))
                os.kill(stopped, signal.SIGSTOP)
        assert by_place(got) == by_place(list(plain.generate(asked)))
    finally:
        if stopped:
            os.kill(stopped, signal.SIGCONT)


def test_completions_come_one_by_one(pool: RayEngine):
    began = time.monotonic()
    arrived = [time.monotonic() - began for _ in pool.generate(requests(0, 30, limit=300))]
    assert arrived[0] < 0.5 * arrived[-1]


def test_a_call_that_loses_every_worker_ends_with_an_error(pool: RayEngine):
    """Short of memory, for example: the run ends with that, it does not wait for ever."""
    with pytest.raises(EngineError, match=r"[23] workers were lost on the same call\n  fix: short of memory"):
        for _ in pool.generate(requests(0, 40, limit=400)):  # at what each try has that was not there before
            for pid in workers():
                os.kill(pid, signal.SIGKILL)
    assert len(by_place(list(pool.generate(requests(0, 2))))) == 4  # the pool goes on


def test_workers_that_are_lost_before_they_can_begin_end_with_an_error(pool: RayEngine, monkeypatch: pytest.MonkeyPatch):
    """Short of memory while they start: nobody waits for ever for them."""
    monkeypatch.setattr("spalign.engines.ray_pool.PATIENCE", 5.0)
    over = threading.Event()

    def kill() -> None:
        while not over.wait(0.05):
            for pid in workers():
                with contextlib.suppress(ProcessLookupError):  # it ends just now
                    os.kill(pid, signal.SIGKILL)

    thread = threading.Thread(target=kill)
    thread.start()
    try:
        with pytest.raises(EngineError, match=r"none of 2 workers could be had for 5 s|workers were lost on the same call"):
            list(pool.generate(requests(0, 40, limit=400)))
    finally:
        over.set()
        thread.join()
    monkeypatch.undo()
    assert len(by_place(list(pool.generate(requests(0, 2))))) == 4  # the pool goes on


def test_what_a_worker_refuses_is_said_as_it_is_here(pool: RayEngine, plain: TransformersEngine):
    long = [GenerateRequest("long one", (Message("user", "word " * 3000),), (1,), WAYS)]
    for engine in (plain, pool):
        with pytest.raises(EngineError, match=r"prompt 'long one' has .* exceeds the model's window of 2048\n  fix: shorten"):
            list(engine.generate(long))
    with pytest.raises(EngineError, match="a worker failed: TypeError"):
        pool.representations([([1], [2])], None)  # type: ignore[arg-type]


def test_what_does_not_fit_or_is_not_there_is_told_at_once(pool: RayEngine, tiny_model: Path):
    with pytest.raises(
        EngineError,
        match=r"99 workers of 1 CPUs each do not fit into the \d+ CPUs that .* beside the policy's workers\n  fix: lower engine.workers",
    ):
        load_engine(str(tiny_model), POOL.model_copy(update={"workers": 99}))
    with pytest.raises(ModelError, match="no-such-model"):
        load_engine("no-such-model", POOL)


def test_a_cluster_that_runs_here_is_another_s(pool: RayEngine):
    """Its room is its owner's: who names no cluster starts one of their own."""
    ray = pytest.importorskip("ray")
    program = """
import ray
from spalign.config import EngineConfig
from spalign.engines.ray import _connect
assert _connect(EngineConfig(kind="ray"))
print(ray.get_runtime_context().gcs_address)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split()[0] != ray.get_runtime_context().gcs_address


def test_workers_that_find_no_room_are_an_error(pool: RayEngine, tiny_model: Path, monkeypatch: pytest.MonkeyPatch):
    """They get time for it, because a cluster may grow, and then the run ends with the reason."""
    monkeypatch.setattr("spalign.engines.ray_pool.PATIENCE", 2.0)
    more_than_there_is = 1.0 + pytest.importorskip("ray").cluster_resources()["CPU"]
    crowd = Pool(str(tiny_model), POOL.in_worker(), 2, {"num_cpus": more_than_there_is})
    with pytest.raises(EngineError, match="none of 2 workers could be had for 2 s: the cluster has no room, or others use it"):
        next(crowd.ask("about", times=2))
    began = time.monotonic()
    crowd.close()
    assert time.monotonic() - began < 30
    assert len(by_place(list(pool.generate(requests(0, 2))))) == 4  # others' workers are as they were


def test_a_closed_pool_says_so_and_its_processes_are_gone(tiny_model: Path, pool: RayEngine):
    pool.close()
    with pytest.raises(EngineError, match="the Ray engine was closed"):
        pool.choice_logprobs(CASES, (" Yes",))
    for _ in range(100):
        if not workers():
            break
        time.sleep(0.1)
    assert not workers()


def test_an_address_without_a_cluster_is_an_error(tiny_model: Path):
    addresses = ["127.0.0.1:1", "no such place", "\x1b[2J:70000"]
    program = f"""
import sys
from spalign.config import EngineConfig
from spalign.engines.make import load_engine
from spalign.errors import EngineError
for address in {[*addresses, "ray://127.0.0.1:1"]!r}:
    try:
        load_engine({str(tiny_model)!r}, EngineConfig(kind="ray", device="cpu", address=address))
    except EngineError as e:
        print(e)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False, timeout=120)
    for address in addresses:
        assert f"no Ray cluster at '{printable(address)}'" in done.stdout, done.stderr
    assert "'ray://127.0.0.1:1' is for Ray's client" in done.stdout


def test_a_folder_in_which_no_cluster_can_be_started_is_an_error(tmp_path: Path):
    program = f"""
import os
from spalign.config import EngineConfig
from spalign.engines.ray import _connect
from spalign.errors import EngineError
for folder in ("/proc/nowhere", {__file__!r}, {str(tmp_path / ("long" * 30))!r}):
    os.environ["RAY_TMPDIR"] = folder
    try:
        _connect(EngineConfig(kind="ray"))
    except EngineError as e:
        print(e)
"""
    own = {k: v for k, v in os.environ.items() if k != "RAY_ADDRESS"}
    done = subprocess.run([sys.executable, "-c", program], env=own, capture_output=True, text=True, check=False, timeout=120)
    assert done.stdout.count("no Ray cluster can be started here") == 3, done.stderr
    assert done.stdout.count("fix: set RAY_TMPDIR to a short path that can be written") == 3


@pytest.mark.parametrize("setting", ["workers", "worker", "worker_cpus", "worker_gpus", "address"])
def test_settings_of_the_pool_are_refused_elsewhere(setting: str):
    value = {"worker": "vllm", "address": "auto"}.get(setting, 1)
    with pytest.raises(ConfigError, match=f"{setting}: for kind ray, and the kind is transformers"):
        config_from({"name": "x", "model": "demo", "engine": {setting: value}})


def test_a_judge_beside_the_policy_needs_numbers_of_workers():
    of_its_own = {"name": "x", "model": "demo", "engine": {"kind": "ray"}, "self_evaluation": {"judge": "org/larger"}}
    with pytest.raises(ConfigError, match="a judge of its own needs workers beside the policy's"):
        for check in checks_of(config_from(of_its_own)):
            check()
    for check in checks_of(config_from({**of_its_own, "engine": {"kind": "ray", "workers": 2}})):
        check()


def test_results_of_a_pool_and_of_one_engine_are_interchangeable():
    assert POOL.matters() == HERE.matters()
    assert POOL.model_copy(update={"worker": "vllm", "hidden_states": True}).matters() == HERE.model_copy(update={"kind": "vllm"}).matters()
