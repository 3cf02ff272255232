"""Exported policies: model card, description of the prompts (``moslim_policy.json``), loading and generation."""

from __future__ import annotations

import json
import shlex
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast, overload

import torch
from transformers import PreTrainedTokenizerBase

from moslim.data.chat_templates import tokenizer_pins
from moslim.data.prompts import PromptRenderer, pad, pad_id
from moslim.data.types import Message, PromptBatch, Question
from moslim.generation.base import RolloutEngine
from moslim.generation.torch_engine import TorchEngine
from moslim.instructions import PreferenceInstruction, SystemMessage, Tags, Template
from moslim.ops.models import chosen_device, eos_ids, load_causal_lm, load_tokenizer
from moslim.policy.generation import CompletionGenerator, Purpose
from moslim.preferences import Preference, PreferenceSet
from moslim.utils.errors import MissingFileError, UsageError, quoted
from moslim.utils.files import markdown_table

_QUESTION = "How do I make tea?"


def policy_card(renderer: PromptRenderer, tokenizer: PreTrainedTokenizerBase, base: str, engine: RolloutEngine) -> str:
    """Returns the README of an exported policy: its levels, and prompts that request them.

    Args:
        renderer: Renderer of the training prompts.
        tokenizer: Tokenizer of the policy.
        base: Hub name or folder of the model that training started from.
        engine: Sampling engine of the training.
    """
    dimensions = renderer.preferences.dimensions
    example = Preference({dimension.name: len(dimension.levels) - 1 for dimension in dimensions[:2]})
    messages = renderer.messages(_QUESTION, example)
    rows = [[dimension.name, " / ".join(dimension.levels)] for dimension in dimensions]
    wanted = ", ".join(
        f"{name} = {dimensions[i].levels[level]}" for i, (name, level) in enumerate(example.levels.items())
    )
    prompt, special = "tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)", False
    if tokenizer.chat_template is None:
        prompt, special = '"".join(f"{message[\'content\']}\\n" for message in messages)', True
    words = {name: shlex.quote(dimensions[i].levels[level]) for i, (name, level) in enumerate(example.levels.items())}
    options = "".join(f" --levels.{name} {word}" for name, word in words.items())
    stops = f"stop_strings={list(engine.stop_strings)}, tokenizer=tokenizer" if engine.stop_strings else ""
    call = ", ".join(part for part in ('input_ids=inputs["input_ids"]', stops) if part)
    return f"""# Policy: {", ".join(dimension.name for dimension in dimensions)}

Answers at the levels that its prompt asks for. Made with [MOSLIM](https://arxiv.org/abs/2505.20336) from `{base}`.

## Levels

{markdown_table(["dimension", "levels, lowest first"], rows)}

## How to ask

    python main.py generate --policy FOLDER --question "{_QUESTION}"{options}

This folder holds data only, and needs no config. A config is code, since it names classes that are imported and called:
do not run one that came with a model without having read it.

Without moslim, the levels stand in the prompt, as they did in training; what is not named is left to the policy. For
{wanted}:

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

folder = "."  # where this file lies
model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
messages = {json.dumps(messages, ensure_ascii=False)}
prompt = {prompt}
inputs = tokenizer(prompt, add_special_tokens={special}, return_tensors="pt")
answer = model.generate({call})  # samples as in training, see generation_config.json
print(tokenizer.decode(answer[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))
```

{_pinned(tokenizer)}## Limits

How well it follows is measured by `python main.py test`, in `steerability.json` and `report.md` of that run. It was
rewarded by a classifier, which can be wrong: judge it by something else.
"""


def _pinned(tokenizer: PreTrainedTokenizerBase) -> str:
    """A sentence on the date and arguments fixed in the chat template; empty without any."""
    pins, _ = tokenizer_pins(tokenizer)
    parts = [f"the date {pins.day}"] if pins.day else []
    parts += [f"`{name}` = `{json.dumps(value, ensure_ascii=False)}`" for name, value in pins.arguments.items()]
    if not parts:
        return ""
    return (
        f"The chat template in this folder has {', '.join(parts)} in it, as in training: its prompts are the same on "
        "any day. An argument of `apply_chat_template` of that name overrides it.\n\n"
    )


Levels = Mapping[str, int | str]
"""Requested level by dimension name, by its name or its number (0 = lowest)."""
FILE = "moslim_policy.json"
_FORMAT = 1
_SAMPLING = ("max_new_tokens", "temperature", "stop_strings", "stop_ids")


def write_description(renderer: PromptRenderer, engine: RolloutEngine, max_length: int | None, folder: Path) -> None:
    """Writes the description of prompts and sampling beside the weights; nothing for a user-defined instruction class.

    Args:
        renderer: Renderer of the training prompts.
        engine: Sampling engine of the training.
        max_length: Maximum prompt tokens; None = no limit.
        folder: Folder of the exported policy.
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


class ExportedPolicy:
    """A policy that generates completions at requested levels, loaded by :func:`load_policy`.

    Args:
        model: Causal language model in the Hugging Face form; it is put into evaluation mode.
        renderer: Renders questions and levels as prompts.
        sampling: Sampling options of the training: ``max_new_tokens``, ``temperature``, ``stop_strings`` and
            ``stop_ids``.

    Attributes:
        preferences: The dimensions and their levels.
        tokenizer: The policy's tokenizer.
    """

    def __init__(self, model: Any, renderer: PromptRenderer, sampling: Mapping[str, Any]) -> None:
        self.model = model.eval()
        self.tokenizer = renderer.tokenizer
        self.preferences = renderer.preferences
        self._renderer = renderer
        self._sampling = dict(sampling)

    @overload
    def generate(
        self,
        question: str | list[Message],
        levels: Levels | None = None,
        *,
        num_generations: None = None,
        temperature: float | None = None,
        max_new_tokens: int | None = None,
        seed: int = 0,
        batch_size: int = 16,
    ) -> str: ...

    @overload
    def generate(
        self,
        question: str | list[Message],
        levels: Levels | None = None,
        *,
        num_generations: int,
        temperature: float | None = None,
        max_new_tokens: int | None = None,
        seed: int = 0,
        batch_size: int = 16,
    ) -> list[str]: ...

    @overload
    def generate(
        self,
        question: list[str] | list[list[Message]],
        levels: Levels | Sequence[Levels] | None = None,
        *,
        num_generations: None = None,
        temperature: float | None = None,
        max_new_tokens: int | None = None,
        seed: int = 0,
        batch_size: int = 16,
    ) -> list[str]: ...

    @overload
    def generate(
        self,
        question: list[str] | list[list[Message]],
        levels: Levels | Sequence[Levels] | None = None,
        *,
        num_generations: int,
        temperature: float | None = None,
        max_new_tokens: int | None = None,
        seed: int = 0,
        batch_size: int = 16,
    ) -> list[list[str]]: ...

    @torch.no_grad()
    def generate(
        self,
        question: str | list[Message] | list[str] | list[list[Message]],
        levels: Levels | Sequence[Levels] | None = None,
        *,
        num_generations: int | None = None,
        temperature: float | None = None,
        max_new_tokens: int | None = None,
        seed: int = 0,
        batch_size: int = 16,
    ) -> str | list[str] | list[list[str]]:
        """Generates completions of one question, or several, at the requested levels.

        On a CPU a completion depends on its question, levels, number and seed only, not on the other questions.

        Args:
            question: A text, a chat (a list of messages ``{"role": ..., "content": ...}`` that does not end with an
                assistant's), or a list of texts or chats.
            levels: Requested level by dimension name, each by its name or its number (0 = lowest), for all questions;
                or one such dict per question. None or an empty dict requests nothing.
            num_generations: Completions per question; None = one, returned without a list around it.
            temperature: Sampling temperature, 0 for the most likely tokens; None = that of training.
            max_new_tokens: Length limit of a completion; None = that of training.
            seed: Seed of the completions.
            batch_size: Questions per sampling batch.

        Returns:
            A text for one question, a list of texts for several; with ``num_generations``, a list in the place of each
            text.

        Raises:
            UsageError: A dimension or level is unknown, a question is empty or no chat that can be answered, or a
                number is out of range.
        """
        several = not isinstance(question, str) and not (question and isinstance(question[0], Mapping))
        questions = cast("list[Question]", list(question) if several else [question])
        requested = [levels or {}] * len(questions) if levels is None or isinstance(levels, Mapping) else list(levels)
        if len(requested) != len(questions):
            raise UsageError(
                f"there are {len(requested)} `levels` for {len(questions)} questions: give one dict for all, or a list "
                "with one dict per question"
            )
        if batch_size < 1:
            raise UsageError(f"batch_size is {batch_size}: give 1 or more")
        preferences = [self.preferences.requested(request) for request in requested]
        sampling = self._sampling | {
            name: value
            for name, value in (("temperature", temperature), ("max_new_tokens", max_new_tokens))
            if value is not None
        }
        generator = CompletionGenerator(TorchEngine(**sampling), self.tokenizer, eos_ids(self.model, self.tokenizer))
        count = 1 if num_generations is None else num_generations
        texts: list[str] = []
        for start in range(0, len(questions), batch_size):
            part = slice(start, start + batch_size)
            batch = self._batch(questions[part], preferences[part])
            keys = [(seed, Purpose.PREDICT)] * len(batch.questions)
            texts += generator(self.model, batch, keys, count).texts
        groups = [texts[i : i + count] for i in range(0, len(texts), count)]
        if num_generations is not None:
            return groups if several else groups[0]
        return [group[0] for group in groups] if several else groups[0][0]

    def _batch(self, questions: Sequence[Question], preferences: Sequence[Preference]) -> PromptBatch:
        """Prompts of questions, left-padded."""
        prompts = list(zip(questions, preferences, strict=True))
        taken_out = [self._renderer.check(question, preference) for question, preference in prompts]
        if any(taken_out):
            warnings.warn(
                f"{quoted(questions[taken_out.index(True)])}: what reads as a control token, a turn or an instruction "
                "is taken out of the question",
                stacklevel=3,
            )
        rows = [self._renderer.ids(question, preference) for question, preference in prompts]
        ids, mask = (x.to(self.model.device) for x in pad(rows, pad_id(self.tokenizer), left=True))
        targets = torch.stack([self.preferences.encode(preference) for preference in preferences]).to(ids.device)
        index = torch.arange(len(rows), device=ids.device)
        return PromptBatch(ids, mask, targets, index, [self._renderer.question(q) for q in questions], [""] * len(rows))


def load_policy(
    folder: str | Path, device: str | torch.device | None = None, dtype: torch.dtype = torch.float32
) -> ExportedPolicy:
    """Loads a policy that ``python main.py export`` wrote. The folder holds data only, and no code of it runs.

    Args:
        folder: Folder of an exported policy.
        device: Device that it runs on; None = a GPU if there is one, else the CPU.
        dtype: Type of the weights.

    Raises:
        MissingFileError: The folder is no exported policy.
        UsageError: Its description cannot be used.
    """
    file = Path(folder) / FILE
    content = _read(file)
    try:
        preferences = PreferenceSet({name: list(names) for name, names in content["dimensions"]})
        instruction, described = _instruction(content["instruction"]), content["sampling"]
        sampling = {
            "max_new_tokens": int(described["max_new_tokens"]),
            "temperature": float(described["temperature"]),
            "stop_strings": [str(text) for text in described["stop_strings"]],
            "stop_ids": [int(token) for token in described["stop_ids"]],
        }
        max_length = None if content["max_length"] is None else int(content["max_length"])
    except (KeyError, TypeError, ValueError) as error:
        if isinstance(error, UsageError):
            raise
        raise UsageError(f"{file}: it is damaged ({type(error).__name__}: {error})") from error
    model: Any = load_causal_lm(folder, dtype=dtype)
    renderer = PromptRenderer(load_tokenizer(folder), instruction, preferences, max_length)
    return ExportedPolicy(model.to(chosen_device(device)), renderer, sampling)


def generate(
    policy: str,
    question: str,
    levels: dict[str, int | str] | None = None,
    samples: int = 1,
    temperature: float | None = None,
    max_new_tokens: int | None = None,
    seed: int = 0,
) -> list[str]:
    """Prints completions of one question by an exported policy. The folder holds data only; no code of it runs.

    Args:
        policy: Folder of a policy that was exported.
        question: The question.
        levels: Requested level by dimension name, by its name or its number (0 = lowest); None requests nothing.
        samples: Number of completions.
        temperature: Sampling temperature; None = that of training.
        max_new_tokens: Length limit of a completion; None = that of training.
        seed: Seed of the completions.

    Raises:
        MissingFileError: The folder is no exported policy.
        UsageError: Its description cannot be used, a level is unknown, or there is no question.
    """
    if not question.strip():
        raise UsageError("generate needs a question: --question 'How do I make tea?'")
    texts = load_policy(policy).generate(
        question,
        levels,
        num_generations=samples,
        temperature=temperature,
        max_new_tokens=max_new_tokens,
        seed=seed,
    )
    print("\n\n".join(texts))
    return texts


def _read(file: Path) -> Mapping[str, Any]:
    if not file.exists():
        raise MissingFileError(
            f"'{file.parent}': there is no {FILE}, which `export` of a policy writes; for a checkpoint, run "
            "generate --config FILE --ckpt_path last"
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
    instruction_name = data["kind"]
    if instruction_name == "tags":
        return Tags(bool(data["names"]))
    if instruction_name == "system_message":
        return SystemMessage()
    if instruction_name == "template":
        return Template(str(data["text"]), [str(text) for text in data["reserved"]])
    raise UsageError(f"{FILE}: there is no instruction {instruction_name!r}; known are tags, system_message, template")
