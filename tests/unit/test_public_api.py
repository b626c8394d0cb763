"""The public names, and what importing them costs."""

import subprocess
import sys

import spalign


def test_every_public_name_is_there() -> None:
    for name in spalign.__all__:
        assert getattr(spalign, name) is not None


def test_public_names_are_pinned() -> None:
    pinned = """Case Constitution JudgeFile Judgement Message
    Objective OpenAIEngine PreferencePair Prompt PromptGroup Response RunConfig SPAConfig SPATrainer ScriptedEngine
    SpalignError TransformersEngine __version__ choose denoise draft judge_check load_config load_constitution load_judge load_labelled
    load_prompts make_pairs pair_weights run sample score_groups score_responses select_pairs spa_loss"""
    assert sorted(spalign.__all__) == sorted(pinned.split())


def test_importing_spalign_loads_nothing_heavy() -> None:
    code = "import sys, spalign, spalign.pipeline; print([m for m in ('torch', 'transformers', 'datasets', 'openai') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"
