"""Checks names, docstrings and files against the conventions of the project: ``python tools/check_words.py``.

Prints a line for each breach and ends with 1 if there is any. ``CONTRIBUTING.md`` describes the conventions.
"""

from __future__ import annotations

import ast
import io
import re
import sys
import tokenize
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]

EVERYWHERE = {
    "samples_per_prompt": "num_generations",
    "inner_epochs": "num_iterations",
    "missing_end_penalty": "missing_eos_penalty",
    "log_surplus": "log_importance_weight",
    "clip_low": "epsilon_low",
    "clip_high": "epsilon_high",
    "GroupScores": "AdvantageInputs",
    "UpdateBatch": "LossInputs",
    "LossParts": "LossOutput",
    "Answerer": "CompletionGenerator",
    "Rivals": "ComparisonsFromRatings",
    "FlagOnly": "DeferredSigterm",
}
"""Words without an ordinary meaning: not even in texts and documentation."""

PROSE = {
    "trunk": "backbone, head, hidden states",
    "trunks": "backbones",
    "taste": "user weights",
    "tastes": "user weights",
}
"""Ordinary words with a better one here: not as (part of) a name, in comments, docstrings and documentation. Other
texts may have them, as the sentences of the embedded world do."""

CLASSES = {
    r".*Answers?(?![a-z]).*": "Completion...",
    "Roles": "PolicyModels",
    "Passes": "ForwardConfig",
    "Several": "ConcatSource",
    "Gauges": "ThroughputMonitor",
}
"""Names of classes, whole."""

NAMES = {
    "playing": "activate(role)",
    "said": "text_mask",
    "spoken": "text_token_ids",
    "laps": "durations",
    "cap": "importance_clip",
    "compared": "comparison mask",
    "gaps": "score margins",
    "better": "chosen",
    "worse": "rejected",
}
"""Names of variables, parameters, attributes and functions, whole: the words are free in prose."""

OPTIONS = {
    "length": "max_completion_length",
    "reduction": "loss_agg_mode",
    "ratio": "importance_sampling_level",
    "clip": "epsilon_low, epsilon_high",
}
"""Parameters of constructors and keys of configs, whole: elsewhere the words mean what they mean in
torch. Dimensions of preferences have names of their own."""

TENSORS = {"old": "old_logprobs", "reference": "ref_logprobs", "sampler": "behavior_logprobs"}
"""Fields and parameters that are tensors: a reference model or a sampler of preferences may be called so."""

QUESTION = re.compile(r"\W*(What|Who|Whom|Whose|Whoever|How|Where|Whether)\b")
LINES, FILES = 450, 120
SHARED = {"__init__", "base"}
"""Basenames that may occur more than once."""
LOOSE = {"__init__", "cli", "preferences", "instructions", "plugin"}
"""Modules directly under the package."""

Breach = tuple[int, str]


def of_source(text: str) -> Iterator[Breach]:
    """The breaches in a Python file: line and message."""
    tree = ast.parse(text)
    for node in ast.walk(tree):
        yield from _of_node(node)
        for line, docstring, boolean in _docstrings(node):
            found = QUESTION.match(docstring)
            if found and not (boolean and found[1] == "Whether"):
                yield line, f"docstring begins with {found[1]}: begin with the subject"
            for offset, prose in enumerate(docstring.splitlines()):
                yield from ((line + offset, message) for message in _words(prose, PROSE))
    for number, line in enumerate(text.splitlines(), 1):
        yield from ((number, message) for message in _words(line, EVERYWHERE))
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type == tokenize.COMMENT:
            yield from ((token.start[0], message) for message in _words(token.string, PROSE))
        elif token.type == tokenize.NAME:
            parts = re.findall(r"[A-Z]?[a-z]+", token.string)
            yield from (
                (token.start[0], f"{token.string}: say {PROSE[part.lower()]}")
                for part in parts
                if part.lower() in PROSE
            )


def of_config(text: str) -> Iterator[Breach]:
    """The breaches in a config or another text with keys."""
    in_dimensions: int | None = None
    for number, line in enumerate(text.splitlines(), 1):
        yield from ((number, message) for message in _words(line, EVERYWHERE | PROSE))
        if key := re.match(r"(\s*)(?:- )?(\w+):", line):
            indent, name = len(key[1]), key[2]
            if in_dimensions is not None and indent <= in_dimensions:
                in_dimensions = None
            if name in OPTIONS and in_dimensions is None:
                yield number, f"option {name}: say {OPTIONS[name]}"
            if name == "dimensions":
                in_dimensions = indent


def of_page(text: str) -> Iterator[Breach]:
    """The breaches in a page of documentation. Names are looked for in inline code only."""
    for number, line in enumerate(text.splitlines(), 1):
        yield from ((number, message) for message in _words(line, EVERYWHERE | PROSE))
        for code in re.findall(r"`([^`]+)`", line):
            for name in {part for part in re.findall(r"\w+", code) if code in (part, f"{part}:", f"--{part}")}:
                if name in NAMES:
                    yield number, f"{name}: say {NAMES[name]}"
                yield from ((number, message) for message in _class(name))


def of_files(files: list[Path], package: Path) -> Iterator[tuple[Path, int, str]]:
    """The breaches in the layout of a package."""
    if len(files) > FILES:
        yield package, 1, f"{len(files)} files: at most {FILES}"
    times = Counter(file.stem for file in files)
    for file in files:
        lines = len(file.read_text(encoding="utf-8").splitlines())
        if lines > LINES:
            yield file, lines, f"{lines} lines: at most {LINES}"
        if times[file.stem] > 1 and file.stem not in SHARED:
            yield file, 1, f"{times[file.stem]} files are called {file.name}"
        if file.parent == package and file.stem not in LOOSE:
            yield file, 1, "a module directly under the package: put it into a folder"


def check(root: Path) -> list[str]:
    """All breaches below the root of a checkout, as ``file:line: message``."""
    package = root / "src/moslim"
    sources = sorted(package.rglob("*.py"))
    found = list(of_files(sources, package))
    pages = [page for page in sorted((root / "docs").rglob("*.md")) if "design" not in page.relative_to(root).parts]
    readers = ((of_source, sources), (of_config, sorted((root / "configs").rglob("*.yaml"))), (of_page, pages))
    for read, files in readers:
        for file in files:
            found += [(file, line, message) for line, message in read(file.read_text(encoding="utf-8"))]
    return sorted({f"{file.relative_to(root)}:{line}: {message}" for file, line, message in found})


def _docstrings(node: ast.AST) -> Iterator[tuple[int, str, bool]]:
    """The strings that document a node or one of its fields: line, text, whether that is of type ``bool``."""
    body = getattr(node, "body", None)
    if not isinstance(body, list):
        return
    for before, part in zip([node, *body], body, strict=False):
        if isinstance(part, ast.Expr) and isinstance(part.value, ast.Constant) and isinstance(part.value.value, str):
            kind = getattr(before, "returns", None) if before is node else getattr(before, "annotation", None)
            yield part.lineno, part.value.value, isinstance(kind, ast.Name) and kind.id == "bool"


def _of_node(node: ast.AST) -> Iterator[Breach]:
    if isinstance(node, ast.ClassDef):
        yield from ((node.lineno, message) for message in _class(node.name))
        for part in node.body:
            if isinstance(part, ast.AnnAssign) and isinstance(part.target, ast.Name):
                yield from _tensor(part.target.id, part.annotation, part.lineno)
    if isinstance(node, ast.FunctionDef):
        arguments = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
        for argument in arguments:
            yield from _tensor(argument.arg, argument.annotation, argument.lineno)
            if node.name == "__init__" and argument.arg in OPTIONS:
                yield argument.lineno, f"option {argument.arg}: say {OPTIONS[argument.arg]}"
    if (name := _name(node)) in NAMES:
        yield getattr(node, "lineno", 1), f"{name}: say {NAMES[name]}"


def _name(node: ast.AST) -> str:
    for kind, field in ((ast.Name, "id"), (ast.arg, "arg"), (ast.Attribute, "attr"), (ast.FunctionDef, "name")):
        if isinstance(node, kind):
            return str(getattr(node, field))
    return ""


def _tensor(name: str, annotation: ast.expr | None, line: int) -> Iterator[Breach]:
    if name in TENSORS and annotation is not None and re.search(r"\bTensor\b", ast.unparse(annotation)):
        yield line, f"{name}: say {TENSORS[name]}"


def _class(name: str) -> Iterator[str]:
    for pattern, instead in CLASSES.items():
        if name[:1].isupper() and re.fullmatch(pattern, name):
            yield f"{name}: say {instead}"


def _words(text: str, words: dict[str, str]) -> Iterator[str]:
    for word in re.findall(r"\w+", text):
        instead = words.get(word) or (words.get(word.lower()) if word.istitle() else None)
        if instead:
            yield f"{word}: say {instead}"


if __name__ == "__main__":
    breaches = check(ROOT)
    print(*breaches, sep="\n")
    sys.exit(bool(breaches))
