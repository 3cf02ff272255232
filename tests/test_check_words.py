"""The checker of names, docstrings and files: good and bad examples of each of its rules."""

import importlib.util
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SPEC = importlib.util.spec_from_file_location("check_words", ROOT / "tools/check_words.py")
assert SPEC is not None and SPEC.loader is not None
checker = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(checker)


@pytest.mark.parametrize(
    ("text", "breaches"),
    [
        ('def f() -> int:\n    """How many rows there are."""\n', [(2, "docstring begins with How")]),
        ('def f() -> int:\n    """Whether there are rows."""\n', [(2, "docstring begins with Whether")]),
        ('def f() -> bool:\n    """Whether there are rows, and what kind."""\n', []),
        ('class A:\n    n: int\n    """What is counted."""\n', [(3, "docstring begins with What")]),
        ('class A:\n    n: bool\n    """Whether it counts."""\n', []),
        ('text = """What is tea?"""\n', []),
        ("def f(samples_per_prompt): ...\n", [(1, "samples_per_prompt: say num_generations")]),
        ('key = "clip_low"\n', [(1, "clip_low: say epsilon_low")]),
        ("def run_trunk(): ...\n", [(1, "run_trunk: say backbone")]),
        ("x = 1  # the trunk is frozen\n", [(1, "trunk: say backbone")]),
        ('word = "trunk"\n', []),
        ("class UserTaste: ...\n", [(1, "UserTaste: say user weights")]),
        ("class AnswerBatch: ...\n", [(1, "AnswerBatch: say Completion")]),
        ("class Answering: ...\nanswer = 1\n", []),
        ("class Roles: ...\nroles = 1\n", [(1, "Roles: say PolicyModels")]),
        ("said = batch.cap\n", [(1, "cap: say importance_clip"), (1, "said: say text_mask")]),
        ("capacity = 1  # better than what was said\n", []),
        (
            "class A:\n    def __init__(self, reduction: str, length: int): ...\n",
            [(2, "option l"), (2, "option r")],
        ),
        ("def f(length: int, reduction: str): ...\n", []),
        ("class A:\n    old: Tensor\n    sampler: Tensor | None = None\n", [(2, "old: say"), (3, "sampler: say")]),
        ("def f(reference: nn.Module, sampler: Sampler): ...\n", []),
    ],
)
def test_sources(text: str, breaches: list[tuple[int, str]]) -> None:
    found = sorted(set(checker.of_source(text)))
    assert len(found) == len(breaches)
    for (line, message), (expected, beginning) in zip(found, breaches, strict=True):
        assert line == expected and message.startswith(beginning)


def test_configs() -> None:
    text = "preferences:\n  dimensions:\n    length: [short, long]\nmodel:\n  length: 3  # trunk\n  clip_low: 0.2\n"
    assert sorted(checker.of_config(text)) == [
        (5, "option length: say max_completion_length"),
        (5, "trunk: say backbone, head, hidden states"),
        (6, "clip_low: say epsilon_low"),
    ]


def test_pages() -> None:
    text = "It is better than said.\nThe field `said` of `Passes`, and `x.said()`.\n`inner_epochs` and a taste.\n"
    assert sorted(checker.of_page(text)) == [
        (2, "Passes: say ForwardConfig"),
        (2, "said: say text_mask"),
        (3, "inner_epochs: say num_iterations"),
        (3, "taste: say user weights"),
    ]


def test_files(tmp_path: Path) -> None:
    package = tmp_path / "src/moslim"
    names = ("__init__.py", "cli.py", "loose.py", "a/__init__.py", "a/base.py", "b/base.py", "a/same.py", "b/same.py")
    for name in (*names, "a/long.py"):
        (package / name).parent.mkdir(parents=True, exist_ok=True)
        (package / name).write_text("x = 1\n" * (451 if "long" in name else 450))
    assert checker.check(tmp_path) == [
        "src/moslim/a/long.py:451: 451 lines: at most 450",
        "src/moslim/a/same.py:1: 2 files are called same.py",
        "src/moslim/b/same.py:1: 2 files are called same.py",
        "src/moslim/loose.py:1: a module directly under the package: put it into a folder",
    ]
    for number in range(115):
        (package / f"a/m{number}.py").write_text("")
    assert "src/moslim:1: 124 files: at most 120" in checker.check(tmp_path)
