"""Constitutions: those that ship, any number of objectives, and every mistake with its line."""

from pathlib import Path

import pytest

from spalign.constitution import Constitution, load_constitution, shipped
from spalign.errors import ConstitutionError
from spalign.yamlfile import load_yaml

EXEMPLARS = """\
    exemplars:
      - {prompt: p, response: r, answer: yes}
      - {prompt: p, response: r, answer: no}
"""


def objective(name: str, extra: str = "") -> str:
    return f"""\
  - name: {name}
    principle: Be {name}.
    question: Is it {name}?
    good_answer: yes
    good_system: You are {name}.
    bad_system: You are not {name}.
{extra}"""


def written(folder: Path, text: str | bytes) -> str:
    path = folder / "c.yaml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return str(path)


def constitution(*objectives: str, head: str = "name: mine\n") -> str:
    return f"{head}refine_instruction: Do better.\nobjectives:\n" + "".join(objectives)


def refused(folder: Path, text: str | bytes) -> list[str]:
    """The lines of the error's message, without the path of the file."""
    path = written(folder, text)
    with pytest.raises(ConstitutionError) as caught:
        load_constitution(path)
    assert caught.value.hint, "every error says what to do"
    return caught.value.message.replace(path, "FILE").splitlines()


# Those that ship, and how many objectives there may be


@pytest.mark.parametrize(
    ("name", "objectives"), [("harmless_helpful", ("harmlessness", "helpfulness")), ("honest_helpful", ("honesty", "helpfulness"))]
)
def test_shipped_constitutions_load(name, objectives):
    assert name in shipped()
    loaded = load_constitution(name)
    assert loaded.name == name
    assert loaded.objective_names == objectives
    assert all({e.answer for e in o.exemplars} == {"yes", "no"} for o in loaded.objectives)
    assert all({e.answer for e in o.exemplars} >= {o.good_answer} for o in loaded.objectives)
    assert loaded.system_variants[0].text == "", "the bare prompt is among the variants"


def test_every_shipped_constitution_is_tested():
    assert shipped() == ("harmless_helpful", "honest_helpful")


@pytest.mark.parametrize("names", [["kind"], ["kind", "true"], ["kind", "true", "brief"]])
def test_any_number_of_objectives(tmp_path, names):
    names = [f"be_{n}" for n in names]
    loaded = load_constitution(written(tmp_path, constitution(*[objective(n, EXEMPLARS) for n in names])))
    assert loaded.objective_names == tuple(names)
    assert loaded.good_system == "\n".join(f"You are {n}." for n in names)
    assert loaded.principles.splitlines() == [f"{i}. {n.capitalize()}: Be {n}." for i, n in enumerate(names, 1)]
    assert [v.name for v in loaded.system_variants] == ["plain"]


def test_no_objective_is_refused(tmp_path):
    (line,) = refused(tmp_path, "name: mine\nrefine_instruction: Do better.\nobjectives: []\n")
    assert line.startswith("FILE:3: objectives: ")
    assert "at least 1" in line


@pytest.mark.parametrize(("yes", "no"), [("yes", "no"), ("Yes", "NO"), ('"yes"', "'no'"), ("true", "off")])
def test_bare_yes_and_no_are_answers(tmp_path, yes, no):
    extra = f"    exemplars:\n      - {{prompt: p, response: r, answer: {yes}}}\n      - {{prompt: p, response: r, answer: {no}}}\n"
    (loaded,) = load_constitution(written(tmp_path, constitution(objective("kind", extra)))).objectives
    assert [e.answer for e in loaded.exemplars] == ["yes", "no"]


def test_fingerprint_follows_the_content_not_the_layout(tmp_path):
    text = constitution(objective("kind"))
    same = load_constitution(written(tmp_path, text)).sha256()
    assert load_constitution(written(tmp_path, "# a comment\n" + text.replace("Be kind.", '"Be kind. "'))).sha256() == same
    assert load_constitution(written(tmp_path, text.replace("Be kind.", "Be good."))).sha256() != same


def test_thresholds_and_resolution_are_taken(tmp_path):
    (loaded,) = load_constitution(written(tmp_path, constitution(objective("kind", "    threshold: 7\n    resolution: 0.5\n")))).objectives
    assert (loaded.threshold, loaded.resolution) == (7.0, 0.5)


def test_a_threshold_may_be_left_to_the_judges_check(tmp_path):
    (loaded,) = load_constitution(written(tmp_path, constitution(objective("kind", "    threshold: auto\n")))).objectives
    assert loaded.threshold == "auto"


@pytest.mark.parametrize("name", ["harmless_helpful", "honest_helpful"])
def test_shipped_constitutions_leave_the_first_threshold_to_the_check_and_set_no_other(name):
    assert [o.threshold for o in load_constitution(name).objectives] == ["auto", None]


# Mistakes


def test_all_mistakes_at_once_each_with_its_line(tmp_path):
    text = (
        "name: mine\n"
        "objectives:\n"
        "  - name: Kind Ness\n"  # line 3: not a name
        "    principal: Be kind.\n"  # line 4: unknown key; its place, line 3, lacks 'principle'
        "    question: '  '\n"  # line 5: empty
        "    good_answer: maybe\n"  # line 6
        "    good_system: a\n"
        "    bad_system: b\n"
        "    threshold: 11\n"  # line 9
        "    resolution: .nan\n"  # line 10
    )
    lines = refused(tmp_path, text)
    assert lines[0] == "8 mistakes:"
    found = dict(line.removeprefix("FILE:").split(": ", 1) for line in lines[1:] if "missing" not in line)
    assert sorted(map(int, found)) == [3, 4, 5, 6, 9, 10]
    assert "objectives.0.name" in found["3"]
    assert found["4"] == "unknown key 'objectives.0.principal'; did you mean 'principle'?"
    assert "'yes' or 'no'" in found["6"]
    assert "FILE:3: 'objectives.0.principle' is missing" in lines
    assert "FILE:1: 'refine_instruction' is missing" in lines


@pytest.mark.parametrize("value", ["11", "0", "Auto", "[7]"])
def test_a_wrong_threshold_is_named_as_it_stands_in_the_file(tmp_path, value):
    lines = refused(tmp_path, constitution(objective("kind", f"    threshold: {value}\n")))
    assert {line.split(": ")[1] for line in lines if line.startswith("FILE:")} == {"objectives.0.threshold"}


def test_an_unknown_key_that_resembles_none_lists_those_there_are(tmp_path):
    (line,) = refused(tmp_path, constitution(objective("kind"), head="name: mine\nxyzzy: 1\n"))
    assert line == "FILE:2: unknown key 'xyzzy'; known here: name, objectives, system_variants, refine_instruction"


@pytest.mark.parametrize(("answer", "line"), [("yes", 10), ("no", 10)])
def test_one_sided_exemplars_are_refused(tmp_path, answer, line):
    extra = "    exemplars:\n" + f"      - {{prompt: p, response: r, answer: {answer}}}\n" * 2
    lines = refused(tmp_path, constitution(objective("kind"), objective("true_", extra)))
    assert lines == [f"FILE:{line}: objectives.1: the exemplars show one answer only; give at least one 'yes' and one 'no'"]


def test_names_that_stand_twice_are_refused(tmp_path):
    (line,) = refused(tmp_path, constitution(objective("kind"), objective("kind")))
    assert "objective names must differ; these stand twice: kind" in line
    (line,) = refused(tmp_path, constitution(objective("kind")) + "system_variants:\n  - name: a\n  - name: a\n")
    assert "system variant names must differ; these stand twice: a" in line


def test_a_key_that_stands_twice_is_refused(tmp_path):
    assert refused(tmp_path, constitution(objective("kind"), head="name: mine\nname: yours\n")) == ["FILE:2: 'name' stands twice"]
    assert refused(tmp_path, constitution(objective("kind", "    question: Really?\n"))) == ["FILE:10: 'question' stands twice"]


@pytest.mark.parametrize(
    ("text", "start"),
    [
        ("name: mine\nobjectives: a: b\n", "FILE:2: not valid YAML"),
        ("name: mine\n\tquestion: x\n", "FILE:2: not valid YAML"),
        ('name: mine\nprinciple: "never closed\n', "FILE:3: not valid YAML"),
        ("name: mine\n[a, b]: c\n", "FILE:2: not valid YAML"),
        ("name: !!python/name:os.system\n", "FILE:1: not valid YAML"),
        ("name: mine\x00\n", "FILE: not valid YAML"),
        ("name: 2024-13-45\n", "FILE: not valid YAML: month must be in 1..12"),
        ("name: &a [*a]\n", "FILE: nested too deeply"),
        ("name: " + "[" * 5000, "FILE: nested too deeply"),
        ("", "FILE: expected 'key: value' lines, found nothing"),
        ("- a\n", "FILE: expected 'key: value' lines, found a list"),
    ],
)
def test_broken_yaml(tmp_path, text, start):
    assert refused(tmp_path, text)[0].startswith(start)


@pytest.mark.parametrize(("mark", "line"), [(b"", 2), (b"\xef\xbb\xbf", 2)])
def test_invalid_utf8_says_the_line(tmp_path, mark, line):
    assert refused(tmp_path, mark + b"name: mine\nx\xff\n\n\n\n")[0].startswith(f"FILE:{line}: not valid UTF-8")


def test_a_constitution_that_is_not_there(tmp_path):
    with pytest.raises(ConstitutionError, match=r"no constitution 'harmless'[\s\S]*harmless_helpful, honest_helpful"):
        load_constitution("harmless")
    with pytest.raises(ConstitutionError, match="no such file"):
        load_constitution(str(tmp_path / "none.yaml"))
    with pytest.raises(ConstitutionError, match="cannot be read"):
        load_constitution(str(tmp_path))


def test_lines_of_nested_keys(tmp_path):
    path = Path(written(tmp_path, "a:\n  - b: 1\n    c: &x\n      d: 2\n  - *x\n"))
    data, lines = load_yaml(path, ConstitutionError)
    assert data == {"a": [{"b": 1, "c": {"d": 2}}, {"d": 2}]}
    assert {at: line for at, line in lines.items() if at} == {
        ("a",): 1,
        ("a", 0): 2,
        ("a", 0, "b"): 2,
        ("a", 0, "c"): 3,
        ("a", 0, "c", "d"): 4,
        ("a", 1): lines["a", 1],
        ("a", 1, "d"): 4,
    }


def test_a_constitution_cannot_be_changed():
    with pytest.raises(ValueError, match="frozen"):
        load_constitution("harmless_helpful").name = "other"  # type: ignore[misc]
    assert isinstance(load_constitution("harmless_helpful"), Constitution)
