"""An exported policy as data: how a prompt asks it for levels, so that it answers without a config."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from moslim.data.prompts import PromptRenderer
from moslim.data.types import PromptBatch
from moslim.errors import MissingFileError, UsageError
from moslim.instructions import PreferenceInstruction, SystemMessage, Tags, Template
from moslim.models import eos_ids, load_causal_lm, load_tokenizer
from moslim.policy.answering import Answerer, Purpose
from moslim.policy.engines import RolloutEngine, TorchEngine
from moslim.preferences import PreferenceSet

FILE = "moslim_policy.json"
_FORMAT = 1
_SAMPLING = ("max_new_tokens", "temperature", "stop_strings", "stop_ids")


def write_description(renderer: PromptRenderer, engine: RolloutEngine, max_length: int | None, folder: Path) -> None:
    """Writes how to ask a policy beside its weights; nothing where the instruction is a class of the user's own.

    Args:
        renderer: What wrote the prompts of training.
        engine: What sampled the answers of training.
        max_length: Most tokens of a prompt.
        folder: The exported policy.
    """
    instruction = _instruction_data(renderer.instruction)
    if instruction is None:
        return
    content = {
        "format": _FORMAT,
        "dimensions": [[d.name, list(d.levels)] for d in renderer.preferences.dimensions],
        "instruction": instruction,
        "max_length": max_length,
        "sampling": {name: getattr(engine, name) for name in _SAMPLING},
    }
    (folder / FILE).write_text(json.dumps(content, indent=1, ensure_ascii=False), encoding="utf-8")


def ask(
    policy: str,
    question: str,
    levels: dict[str, int | str] | None = None,
    samples: int = 1,
    temperature: float | None = None,
    max_new_tokens: int | None = None,
    seed: int = 0,
) -> list[str]:
    """Prints an exported policy's answers to one question. The folder holds data only, and no code of it runs.

    Args:
        policy: Folder of a policy that was exported.
        question: The question.
        levels: Wanted level by dimension name, by its name or its number (0 = lowest); none for an ordinary answer.
        samples: Number of answers.
        temperature: Sampling temperature; None = that of training.
        max_new_tokens: Length limit of an answer; None = that of training.
        seed: Seed of the answers.

    Raises:
        MissingFileError: The folder is no exported policy.
        UsageError: Its description cannot be used, a level is unknown, or there is no question.
    """
    if not question.strip():
        raise UsageError("generate needs a question: --question 'How do I make tea?'")
    content = _read(Path(policy) / FILE)
    try:
        preferences = PreferenceSet({name: list(names) for name, names in content["dimensions"]})
        instruction, sampling = _instruction(content["instruction"]), content["sampling"]
        engine = TorchEngine(
            max_new_tokens=int(sampling["max_new_tokens"] if max_new_tokens is None else max_new_tokens),
            temperature=float(sampling["temperature"] if temperature is None else temperature),
            stop_strings=[str(text) for text in sampling["stop_strings"]],
            stop_ids=[int(token) for token in sampling["stop_ids"]],
        )
        max_length = None if content["max_length"] is None else int(content["max_length"])
    except (KeyError, TypeError, ValueError) as error:
        if isinstance(error, UsageError):
            raise
        raise UsageError(f"{Path(policy) / FILE}: it is damaged ({type(error).__name__}: {error})") from error
    preference = preferences.requested(levels or {})
    model: Any = load_causal_lm(policy)
    tokenizer = load_tokenizer(policy)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model.to(device).eval()
    renderer = PromptRenderer(tokenizer, instruction, preferences, max_length)
    ids = torch.tensor([renderer.ids(question, preference)], device=device)
    targets = preferences.encode(preference)[None].to(device)
    index = torch.zeros(1, dtype=torch.long, device=device)
    batch = PromptBatch(ids, torch.ones_like(ids), targets, index, [renderer.question(question)], [""])
    with torch.no_grad():
        answers = Answerer(engine, tokenizer, eos_ids(model, tokenizer))(
            model, batch, [(seed, Purpose.PREDICT)], samples
        )
    print("\n\n".join(answers.texts))
    return answers.texts


def _read(file: Path) -> Mapping[str, Any]:
    if not file.exists():
        raise MissingFileError(
            f"--policy {file.parent}: there is no {FILE}, which `export` of a policy writes; a checkpoint is asked "
            "with --config FILE --ckpt_path last"
        )
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UsageError(f"{file}: it is damaged ({error})") from error
    if not isinstance(content, dict) or content.get("format") != _FORMAT:
        raise UsageError(f"{file}: this version of moslim reads format {_FORMAT} only")
    return content


def _instruction_data(instruction: PreferenceInstruction) -> dict[str, Any] | None:
    if type(instruction) is Tags:
        return {"kind": "tags", "names": instruction.names}
    if type(instruction) is SystemMessage:
        return {"kind": "system_message"}
    if type(instruction) is Template:
        return {"kind": "template", "text": instruction.wording, "reserved": list(instruction.reserved)}
    return None


def _instruction(data: Mapping[str, Any]) -> PreferenceInstruction:
    """The shipped instruction that a description names; a class is never imported for it."""
    kind = data["kind"]
    if kind == "tags":
        return Tags(bool(data["names"]))
    if kind == "system_message":
        return SystemMessage()
    if kind == "template":
        return Template(str(data["text"]), [str(text) for text in data["reserved"]])
    raise UsageError(f"{FILE}: there is no instruction {kind!r}; known are tags, system_message, template")
