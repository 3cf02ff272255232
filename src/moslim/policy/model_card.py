"""The README of an exported policy: what its levels are, and how a prompt asks for them."""

from __future__ import annotations

import json
import shlex

from transformers import PreTrainedTokenizerBase

from moslim.chat_templates import tokenizer_pins
from moslim.data.prompts import PromptRenderer
from moslim.policy.engines import RolloutEngine
from moslim.preferences import Preference
from moslim.reporting import markdown_table

_QUESTION = "How do I make tea?"


def policy_card(renderer: PromptRenderer, tokenizer: PreTrainedTokenizerBase, base: str, engine: RolloutEngine) -> str:
    """Returns the whole page.

    Args:
        renderer: What wrote the prompts of training.
        tokenizer: The policy's tokenizer.
        base: Hub name or folder of the model that training started from.
        engine: What sampled the answers of training.
    """
    dimensions = renderer.preferences.dimensions
    asked = Preference({dimension.name: len(dimension.levels) - 1 for dimension in dimensions[:2]})
    messages = renderer.messages(_QUESTION, asked)
    rows = [[dimension.name, " / ".join(dimension.levels)] for dimension in dimensions]
    wanted = ", ".join(
        f"{name} = {dimensions[i].levels[level]}" for i, (name, level) in enumerate(asked.levels.items())
    )
    prompt, special = "tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)", False
    if tokenizer.chat_template is None:
        prompt, special = '"".join(f"{message[\'content\']}\\n" for message in messages)', True
    words = {name: shlex.quote(dimensions[i].levels[level]) for i, (name, level) in enumerate(asked.levels.items())}
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
    """A sentence on what stands in the chat template, where something does."""
    pins, _ = tokenizer_pins(tokenizer)
    parts = [f"the date {pins.day}"] if pins.day else []
    parts += [f"`{name}` = `{json.dumps(value, ensure_ascii=False)}`" for name, value in pins.arguments.items()]
    if not parts:
        return ""
    return (
        f"The chat template in this folder has {', '.join(parts)} in it, as in training: its prompts are the same on "
        "any day. An argument of `apply_chat_template` of that name overrides it.\n\n"
    )
