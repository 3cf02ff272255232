"""How a trained language model is saved: with the end tokens and the sampling that it was trained with."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import GenerationConfig

from moslim.policy.engines import RolloutEngine


def generation_config(engine: RolloutEngine, eos_ids: list[int], pad_id: int, bos_id: int | None) -> GenerationConfig:
    """What ``generate`` reads beside a model, so that it samples as the engine did.

    Nothing of what the start brought along is left: penalties, least lengths, forced or suppressed tokens. Texts that
    end an answer (``stop_strings``) cannot be in it, since ``generate`` needs a tokenizer for them.

    Args:
        engine: What sampled the answers.
        eos_ids: All tokens that ended them.
        pad_id: What stood on padding.
        bos_id: What a text without a prompt begins with; None = nothing.
    """
    sampling: dict[str, Any] = {"do_sample": False}
    if engine.temperature > 0:
        sampling = {
            "do_sample": True,
            "temperature": engine.temperature,
            "top_p": engine.top_p,
            "top_k": engine.top_k or 0,  # without it, 50
        }
    ends = eos_ids[0] if len(eos_ids) == 1 else eos_ids
    return GenerationConfig(
        bos_token_id=bos_id, eos_token_id=ends, pad_token_id=pad_id, max_new_tokens=engine.max_new_tokens, **sampling
    )


def save_as_trained(model: Any, folder: Path, engine: RolloutEngine, eos_ids: list[int], pad_id: int) -> None:
    """Saves a causal language model whose generation config, end and padding tokens are those of its training.

    The model in memory stays as it is.

    Args:
        model: In the Hugging Face form, without an adapter.
        folder: Where to.
        engine: What sampled the answers.
        eos_ids: All tokens that ended them.
        pad_id: What stood on padding.
    """
    before = model.generation_config
    bos_id = getattr(before, "bos_token_id", None)
    if bos_id is None:
        bos_id = getattr(model.config, "bos_token_id", None)
    found = generation_config(engine, eos_ids, pad_id, bos_id)
    configs = {id(config): config for config in (model.config, model.config.get_text_config())}
    names = ("eos_token_id", "pad_token_id")
    tokens = [(config, name, getattr(config, name, None)) for config in configs.values() for name in names]
    try:
        model.generation_config = found
        for config, name, _ in tokens:
            setattr(config, name, getattr(found, name))
        model.save_pretrained(folder)
    finally:
        model.generation_config = before
        for config, name, value in tokens:
            setattr(config, name, value)
