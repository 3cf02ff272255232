"""The engine against ``generate`` on one batch of prompts; part of throughput.py."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from race import in_turns
from transformers import AutoModelForCausalLM, AutoTokenizer
from worlds import World, data_of

from moslim.data.loader import Draw
from moslim.data.prompt_batches import SampledPrompts
from moslim.data.prompts import pad
from moslim.data.types import RowKind, Split
from moslim.experimental import StaticTorchEngine
from moslim.generation import Decoding, TorchEngine
from moslim.ops.models import eos_ids
from moslim.ops.numerics import derive_seed

WAYS = {
    "ours": Decoding(),
    "prompts computed for every answer": Decoding(share_prompts=False),
    "finished answers stay": Decoding(drop_finished=False),
    "cache of transformers": Decoding(cache="dynamic"),
    "last layer as torch has it": Decoding(pack_head=False),
    "torch.multinomial": Decoding(draw="multinomial"),
}
"""Everything fast, and one thing at a time changed."""


def rollouts(world: World, folder: Path, repeats: int) -> dict[str, Any]:
    """Seconds of a rollout by ``generate`` and by each way of decoding."""
    model = AutoModelForCausalLM.from_pretrained(folder / "policy")
    tokenizer = AutoTokenizer.from_pretrained(folder / "policy")
    data = data_of(world)
    rows = data.rows(RowKind.PROMPTS, Split.TRAIN)
    prompts = SampledPrompts(rows, data.preferences, data.sampler, data.source, data.seed)
    renderer = data.renderer(tokenizer)
    chosen = [prompts[Draw(0, row)] for row in range(world.prompts)]
    ids, mask = pad([renderer.ids(p.question, p.preference) for p in chosen], tokenizer.pad_token_id, left=True)
    ends = eos_ids(model, tokenizer)
    halves = Decoding(completions=world.prompts * world.samples // 2)

    def by(engine: TorchEngine) -> Callable[[int], object]:
        def sample(number: int) -> None:
            seeds = [[derive_seed(number, row, i) for i in range(world.samples)] for row in range(world.prompts)]
            engine.sample(model, ids, mask, torch.tensor(seeds), ends, tokenizer.pad_token_id)

        return sample

    def generate(number: int) -> None:
        torch.manual_seed(number)
        with torch.no_grad():
            model.generate(
                ids,
                attention_mask=mask,
                do_sample=True,
                top_k=0,
                max_new_tokens=world.new_tokens,
                num_return_sequences=world.samples,
            )

    ways = {name: TorchEngine(world.new_tokens, decoding=way) for name, way in WAYS.items()}
    ways["static cache"] = StaticTorchEngine(world.new_tokens)
    ways["static cache, compiled"] = StaticTorchEngine(world.new_tokens, compiled=True)
    ways["half of the prompts at a time"] = TorchEngine(world.new_tokens, decoding=halves)
    found = in_turns(repeats, generate=generate, **{name: by(engine) for name, engine in ways.items()})
    return {
        "rollout_s": round(found["ours"], 4),
        "generate_s": round(found["generate"], 4),
        "rollout_speedup_vs_generate": round(found["generate"] / found["ours"], 2),
        "rollout_s_by_way": {name: round(found[name], 4) for name in ways},
    }
