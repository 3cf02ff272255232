"""Log-probability, entropy and divergence of next-token distributions, with few logits in memory at a time.

The logits of all completion tokens (tokens times vocabulary) are the largest tensor of an update. Here the last layer
is applied to a few tokens at a time, each row of logits is reduced at once, and the backward pass recomputes the rows
(as in Cut Cross-Entropy, arXiv 2411.09009; here on any device, with entropy and divergence).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.functional import linear

from moslim.ops.loading import transformer_part, unwrapped
from moslim.ops.numerics import at_least_float32, widened
from moslim.ops.transformers_compat import has_forward_hooks

HELD_LOGITS = 1 << 22
"""Numbers in the largest tensor over the vocabulary: 16 MiB in float32."""


@dataclass(frozen=True)
class Head:
    """Map from hidden states to logits: ``z = scale * layer(h)``, and with ``softcap`` c: ``c * tanh(z / c)``.

    Args:
        layer: The model's last layer.
        scale: Of Cohere's and Granite's models.
        softcap: Of Gemma's models; None = none.
    """

    layer: nn.Linear
    scale: float = 1.0
    softcap: float | None = None

    def __call__(self, hidden: Tensor) -> Tensor:
        """``[.., H]`` to ``[.., V]``."""
        return self.finish(self.layer(hidden))

    def finish(self, logits: Tensor) -> Tensor:
        """Applies scale and cap to the output of the layer."""
        if self.scale != 1:
            logits = logits * self.scale
        return logits if self.softcap is None else (logits / self.softcap).tanh() * self.softcap

    def pull_back(self, gradient: Tensor, tempered: Tensor, temperature: float) -> None:
        """Turns a gradient by tempered logits into that by the layer's output, in place."""
        if self.softcap is not None:
            gradient *= 1 - (tempered * (temperature / self.softcap)).square()
        if self.scale != temperature:
            gradient *= self.scale / temperature


@dataclass
class Statistics:
    """Statistics of ``M`` tokens. All float32, or float64 where the model is.

    Args:
        logprobs: ``[M]`` log-probability of the token, ``log p(y)``.
        entropy: ``[M]`` of the distribution it was drawn from, ``-sum_v p(v) log p(v)``, nats; None if not asked for.
        kl: ``[M]`` exact divergence from a reference, ``sum_v p(v) (log p(v) - log q(v))``, nats; None without one.
    """

    logprobs: Tensor
    entropy: Tensor | None = None
    kl: Tensor | None = None


def of_logits(
    logits: Tensor, tokens: Tensor, temperature: float, entropy: bool = False, ref_logits: Tensor | None = None
) -> Statistics:
    """The plain form, with every logit in memory.

    Args:
        logits: ``[M, V]``.
        tokens: ``[M]``.
        temperature: Above 0; divides the logits, the reference's too.
        entropy: Whether to compute it.
        ref_logits: ``[M, V]`` logits of the reference.
    """
    logp = (widened(logits) / temperature).log_softmax(dim=-1)
    result = Statistics(logp.gather(-1, tokens[:, None])[:, 0])
    if entropy:
        result.entropy = -(logp.exp() * logp).sum(dim=-1)
    if ref_logits is not None:
        logq = (widened(ref_logits) / temperature).log_softmax(dim=-1)
        result.kl = (logp.exp() * (logp - logq)).sum(dim=-1)
    return result


def of_hidden(
    hidden: Tensor,
    head: Head,
    tokens: Tensor,
    temperature: float,
    entropy: bool = False,
    ref_state: tuple[Tensor, Head] | None = None,
    held: int = HELD_LOGITS,
) -> Statistics:
    """Statistics from hidden states, with a few rows of logits at a time.

    Args:
        hidden: ``[M, H]``.
        head: The model's last layer, and what follows it.
        tokens: ``[M]``.
        temperature: Above 0.
        entropy: Whether to compute it.
        ref_state: The reference's hidden states ``[M, H]`` and last layer; no gradient flows into them.
        held: Most logits in memory at a time; at least one row is.
    """
    rows = max(1, held // head.layer.out_features)
    own = _operands(hidden, head.layer)
    other = (None, None, None) if ref_state is None else _operands(ref_state[0], ref_state[1].layer)
    heads = (head, None if ref_state is None else ref_state[1])
    logprobs, entropies, kl = _OfHidden.apply(rows, temperature, entropy, heads, tokens, *own, *other)  # type: ignore[no-untyped-call]
    return Statistics(logprobs, entropies if entropy else None, None if ref_state is None else kl)


def _operands(hidden: Tensor, layer: nn.Linear) -> tuple[Tensor, Tensor, Tensor | None]:
    """Input, weight and bias in the type in which they are multiplied."""
    device = hidden.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else layer.weight.dtype
    return hidden.to(dtype), layer.weight.to(dtype), None if layer.bias is None else layer.bias.to(dtype)


def _logits(hidden: Tensor, weight: Tensor, bias: Tensor | None, head: Head, temperature: float) -> Tensor:
    logits = widened(head.finish(linear(hidden, weight, bias)))
    return logits if temperature == 1 else logits.div_(temperature)


def _parts(length: int, rows: int) -> Iterator[slice]:
    return (slice(start, start + rows) for start in range(0, length, rows))


class _OfHidden(torch.autograd.Function):
    """With ``z`` the tempered logits: d log p(y) / dz = 1_y - p;  dH / dz = -p (log p + H);
    dKL / dz = p (log p - log q - KL). From there to the layer's output by temperature and :class:`Head`.
    """

    @staticmethod
    def forward(
        ctx: Any,
        rows: int,
        temperature: float,
        entropy: bool,
        heads: tuple[Head, Head | None],
        tokens: Tensor,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        *reference: Tensor | None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        logprobs = hidden.new_zeros(len(hidden), dtype=at_least_float32(hidden.dtype))
        entropies, kl = torch.zeros_like(logprobs), torch.zeros_like(logprobs)
        for part in _parts(len(hidden), rows):
            logp = _logits(hidden[part], weight, bias, heads[0], temperature).log_softmax(dim=-1)
            logprobs[part] = logp.gather(-1, tokens[part, None])[:, 0]
            if entropy:
                entropies[part] = -(logp.exp() * logp).sum(dim=-1)
            if heads[1] is not None:
                logq = _reference(reference, part, heads[1], temperature)
                kl[part] = (logp.exp() * (logp - logq)).sum(dim=-1)
        ctx.rows, ctx.temperature, ctx.heads = rows, temperature, heads
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(tokens, hidden, weight, bias, entropies, kl, *reference)
        return logprobs, entropies, kl

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, to_logprobs: Tensor | None, to_entropy: Tensor | None, to_kl: Tensor | None) -> Any:
        tokens, hidden, weight, bias, entropies, kl, *reference = ctx.saved_tensors
        to_hidden = torch.empty_like(hidden) if ctx.needs_input_grad[5] else None
        wide = at_least_float32(hidden.dtype)  # in which the many parts are added up, whatever the weights are
        to_weight = torch.zeros_like(weight, dtype=wide) if ctx.needs_input_grad[6] else None
        to_bias = torch.zeros_like(bias, dtype=wide) if ctx.needs_input_grad[7] else None
        for part in _parts(len(hidden), ctx.rows):
            logits = _logits(hidden[part], weight, bias, ctx.heads[0], ctx.temperature)
            if to_entropy is None and to_kl is None:
                slope, to_logits = hidden.new_zeros(len(logits), 1, dtype=wide), logits.softmax(dim=-1)
            else:
                logp = logits.log_softmax(dim=-1)
                slope, to_logits = torch.zeros_like(logp), logp.exp()
                if to_entropy is not None:
                    slope -= to_entropy[part, None] * (logp + entropies[part, None])
                if to_kl is not None:
                    logq = _reference(reference, part, ctx.heads[1], ctx.temperature)
                    slope += to_kl[part, None] * (logp - logq - kl[part, None])
            if to_logprobs is not None:
                slope -= to_logprobs[part, None]
            to_logits *= slope
            if to_logprobs is not None:
                to_logits.scatter_add_(1, tokens[part, None], to_logprobs[part, None])
            ctx.heads[0].pull_back(to_logits, logits, ctx.temperature)
            if to_bias is not None:
                to_bias += to_logits.sum(dim=0)
            factor = to_logits.to(weight.dtype)
            if to_hidden is not None:
                torch.mm(factor, weight, out=to_hidden[part])
            if to_weight is not None:
                _add_product(to_weight, factor.T, hidden[part])
        grads = (to_hidden, to_weight, to_bias)
        own = (None if g is None else g.to(x.dtype) for g, x in zip(grads, (hidden, weight, bias), strict=True))
        return None, None, None, None, None, *own, *(None for _ in reference)


def _reference(operands: Any, part: slice, head: Head, temperature: float) -> Tensor:
    hidden, weight, bias = operands
    return _logits(hidden[part], weight, bias, head, temperature).log_softmax(dim=-1)


def _add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    if left.dtype == total.dtype:
        total.addmm_(left, right)
    else:
        total += left @ right


_PLAIN: WeakKeyDictionary[nn.Module, bool] = WeakKeyDictionary()


class Predictor:
    """Computes hidden states where the last layer is a plain :class:`Head`, else logits.

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
        ref_state: tuple[Predictor, Tensor] | None = None,
    ) -> Statistics:
        """Computes statistics of tokens from the states that predict them.

        Args:
            states: ``[M, H or V]``.
            tokens: ``[M]``.
            temperature: The sampler's; 0 (greedy) is taken as 1.
            entropy: Whether to compute it.
            ref_state: Predictor and states ``[M, H or V]`` of the reference model.
        """
        temperature = temperature or 1.0
        other, wanted = ref_state or (self, None)
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
    """Factor of the logits: Cohere's ``logit_scale``, Granite's ``logits_scaling`` the other way round."""
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
