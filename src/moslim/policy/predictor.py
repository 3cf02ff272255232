"""A language model as two parts: the trunk, whose hidden states predict the next tokens, and the last layer."""

from __future__ import annotations

from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from moslim.loading import transformer_part, unwrapped
from moslim.ops.transformers_compat import has_forward_hooks
from moslim.policy.statistics import Head, Statistics, of_hidden, of_logits
from moslim.precision import at_least_float32

_PLAIN: WeakKeyDictionary[nn.Module, bool] = WeakKeyDictionary()


class Predictor:
    """Computes what predicts next tokens: hidden states where all that follows is known (:class:`Head`), else logits.

    Args:
        model: Causal language model in the Hugging Face form, with or without an adapter.
        chunked: Whether the last layer may be kept apart, so that few logits are in memory at a time.
    """

    def __init__(self, model: Any, chunked: bool) -> None:
        self.model = model
        self.head = last_layer(model) if chunked else None

    @property
    def dtype(self) -> torch.dtype:
        """Of what is computed from its outputs."""
        return at_least_float32(self.model.dtype)

    def states(self, keep: int | Tensor, **inputs: Any) -> Tensor:
        """``[B, keep, H or V]`` hidden states or logits at the last positions, or at those given.

        Args:
            keep: Number of positions, or which ``[keep]``.
            inputs: Ids, mask, positions and cache, as the model's forward takes them.
        """
        if self.head is None:
            return self.model(**inputs, logits_to_keep=keep).logits
        return kept(transformer_part(self.model)(**inputs).last_hidden_state, keep)

    def statistics(
        self,
        states: Tensor,
        tokens: Tensor,
        temperature: float,
        entropy: bool = False,
        reference: tuple[Predictor, Tensor] | None = None,
    ) -> Statistics:
        """What the states say of tokens.

        Args:
            states: ``[M, H or V]``.
            tokens: ``[M]``.
            temperature: The sampler's; 0 (greedy) is taken as 1.
            entropy: Whether to compute it.
            reference: Who else predicts the same tokens, and with which states ``[M, H or V]``.
        """
        temperature = temperature or 1.0
        other, wanted = reference or (self, None)
        if self.head is None or other.head is None:
            wanted = None if wanted is None else other._logits(wanted)
            return of_logits(self._logits(states), tokens, temperature, entropy, wanted)
        return of_hidden(
            states, self.head, tokens, temperature, entropy, None if wanted is None else (wanted, other.head)
        )

    def _logits(self, states: Tensor) -> Tensor:
        return states if self.head is None else self.head(states)


def kept(states: Tensor, keep: int | Tensor) -> Tensor:
    """Some of the states ``[B, T, H]``: the last ones, or those at given positions."""
    return states[:, -keep:] if isinstance(keep, int) else states.index_select(1, keep)


def last_layer(model: Any) -> Head | None:
    """The linear layer that turns hidden states into logits, and what follows it; None where more happens.

    Some models cap or scale their logits, as their configuration says. Others scale what the layer is given, or have an
    adapter, hooks or a sharded weight on it. So the layer's kind is looked at, and the model is tried once with made-up
    logits.
    """
    inner = unwrapped(model)
    layer = inner.get_output_embeddings()
    if type(layer) is not nn.Linear or has_forward_hooks(layer):
        return None
    if type(layer.weight) is not nn.Parameter or layer.weight.shape != (layer.out_features, layer.in_features):
        return None
    text = inner.config.get_text_config()
    head = Head(layer, _scale(text), getattr(text, "final_logit_softcapping", None))
    if inner not in _PLAIN:
        _PLAIN[inner] = transformer_part(inner) is not inner and _nothing_else_happens(inner, head)
    return head if _PLAIN[inner] else None


def _scale(config: Any) -> float:
    """What logits are multiplied by: Cohere's ``logit_scale``, Granite's ``logits_scaling`` the other way round."""
    found = (getattr(config, name, None) for name in ("logit_scale", "logits_scaling"))
    times, over = (value if isinstance(value, int | float) and value else 1.0 for value in found)
    return times / over


@torch.no_grad()
def _nothing_else_happens(model: Any, head: Head) -> bool:
    made_up = torch.linspace(-90, 90, 2 * head.layer.out_features).to(head.layer.weight).reshape(1, 2, -1)
    given: list[Tensor] = []

    def replace(_: nn.Module, inputs: tuple[Tensor, ...], __: Tensor) -> Tensor:
        given.append(inputs[0])
        return made_up.clone()

    ids = torch.tensor([[0, 1]], device=head.layer.weight.device)
    handle = head.layer.register_forward_hook(replace)
    try:
        logits = model(input_ids=ids, use_cache=False).logits
    finally:
        handle.remove()
    hidden = transformer_part(model)(input_ids=ids, use_cache=False).last_hidden_state
    expected = head.finish(made_up)
    return torch.allclose(logits, expected, rtol=1e-2) and torch.allclose(hidden, given[0], rtol=1e-3, atol=1e-5)
