"""Choice of the next tokens, and options and state of decoding with a key-value cache."""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Literal, get_args
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from transformers import Cache

from moslim.generation.kv_cache import (
    Continuation,
    GrowingCache,
    GrowingLayer,
    Prompts,
    SelectingCache,
    Uncached,
    cache_argument,
    cached,
)
from moslim.ops.loading import transformer_part, unwrapped
from moslim.ops.numerics import widened
from moslim.ops.prefix_tree import agreement, carries_state, made_up_tokens, masks_left_padding, reads_trees, say_once
from moslim.ops.transformers_compat import attention_implementation
from moslim.utils.errors import UsageError

DrawMethod = Literal["inverse_cdf", "multinomial"]


@dataclass
class Chosen:
    """One token for each of ``B`` rows; arbitrary, with a log-probability of NaN, where the logits are not finite.

    Args:
        tokens: ``[B]`` int64.
        logprobs: ``[B]`` float32 or float64, under the tempered distribution.
        behavior_logprobs: ``[B]`` log-probabilities after top-k and top-p; None if neither applies.
    """

    tokens: Tensor
    logprobs: Tensor
    behavior_logprobs: Tensor | None = None


@dataclass(frozen=True)
class TokenChoice:
    """Sampling of one token per row.

    Args:
        temperature: Sampling temperature; 0 takes the most likely token and reports its log-probability at
            temperature 1.
        top_k: Number of most likely tokens to draw from; None = all.
        top_p: Total probability of the most likely tokens to draw from; 1 = all.
        method: ``inverse_cdf`` takes one uniform number per row. ``multinomial`` is :func:`torch.multinomial`: slow on
            a CPU, and the token of a row depends on the other rows.

    Raises:
        UsageError: An argument is out of range.
    """

    temperature: float = 1.0
    top_k: int | None = None
    top_p: float = 1.0
    method: DrawMethod = "inverse_cdf"

    def __post_init__(self) -> None:
        if self.temperature < 0:
            raise UsageError(f"engine.temperature is {self.temperature}: give 0 (greedy) or more")
        if self.top_k is not None and self.top_k < 1:
            raise UsageError(f"engine.top_k is {self.top_k}: give 1 or more, or null for no limit")
        if not 0 < self.top_p <= 1:
            raise UsageError(f"engine.top_p is {self.top_p}: give a number above 0, at most 1")

    @property
    def cuts(self) -> bool:
        """Whether top-k or top-p truncates the distribution."""
        return self.temperature > 0 and (self.top_k is not None or self.top_p < 1)

    def __call__(self, logits: Tensor, noise: Tensor, generator: torch.Generator | None = None) -> Chosen:
        """Chooses one token per row.

        Args:
            logits: ``[B, V]``.
            noise: ``[B]`` uniform in ``[0, 1)``, for ``inverse_cdf``.
            generator: Random number generator for ``multinomial``.
        """
        logits = widened(logits)
        if self.temperature not in (0, 1):
            logits = logits / self.temperature
        logprobs = torch.log_softmax(logits, dim=-1)
        behavior = cut(logprobs, self.top_k, self.top_p) if self.cuts else logprobs
        if self.temperature == 0:
            tokens = behavior.argmax(dim=-1)
        elif self.method == "multinomial":
            is_nan = logprobs[:, :1].isnan()  # a row is NaN as a whole: any token is drawn, the caller sees the NaN
            tokens = torch.multinomial(behavior.exp().masked_fill(is_nan, 1.0), 1, generator=generator)[:, 0]
        else:
            tokens = inverse_cdf(behavior.exp(), noise)
        chosen = Chosen(tokens, logprobs.gather(-1, tokens[:, None])[:, 0])
        if self.cuts:
            chosen.behavior_logprobs = behavior.gather(-1, tokens[:, None])[:, 0]
        return chosen


def inverse_cdf(probabilities: Tensor, noise: Tensor) -> Tensor:
    """Draws one token per row by inversion of the cumulative distribution.

    Args:
        probabilities: ``[B, V]``, up to a factor per row.
        noise: ``[B]`` uniform in ``[0, 1)``.

    Returns:
        ``[B]`` int64 token ids.
    """
    cumulative = probabilities.cumsum(dim=-1)
    threshold = (1 - noise)[:, None] * cumulative[:, -1:]  # in (0, total]: impossible tokens are never drawn
    return torch.searchsorted(cumulative, threshold)[:, 0].clamp(max=probabilities.shape[-1] - 1)


def cut(logprobs: Tensor, top_k: int | None, top_p: float) -> Tensor:
    """Keeps the most likely tokens, first by top-k, then by top-p, as transformers' ``generate`` does.

    Args:
        logprobs: ``[B, V]``.
        top_k: Number of tokens to keep; tokens as likely as the last of them are kept too. None = all.
        top_p: Probability that the kept tokens must reach; as few as possible are kept.

    Returns:
        ``[B, V]`` renormalised log-probabilities, ``-inf`` for dropped tokens.
    """
    if top_k is not None and top_k < logprobs.shape[-1]:
        least = logprobs.topk(top_k, dim=-1).values[:, -1:]
        logprobs = logprobs.masked_fill(logprobs < least, -torch.inf).log_softmax(dim=-1)
    if top_p < 1:
        ordered, order = logprobs.sort(dim=-1, descending=True, stable=True)
        before = ordered.exp().cumsum(dim=-1) - ordered.exp()  # probability of all likelier tokens
        dropped = torch.zeros_like(before, dtype=torch.bool).scatter(-1, order, before >= top_p)
        logprobs = logprobs.masked_fill(dropped, -torch.inf).log_softmax(dim=-1)
    return logprobs


CacheKind = Literal["growing", "dynamic"]


@dataclass(frozen=True)
class Decoding:
    """Options of decoding by :class:`TorchEngine`. Completions do not depend on them, except on ``draw: multinomial``.

    Args:
        share_prompts: Compute each prompt once and repeat its keys and values for its completions.
        drop_finished: Remove a completion from the batch as soon as it ends.
        merge: Compute equal completions of one prompt once, until they differ. Needs ``share_prompts``.
        cache: ``growing`` preallocates room for more tokens; ``dynamic`` is transformers' own cache, which copies all
            keys and values for every token.
        pack_head: On a CPU, pack a large output layer into a layout that is fast for few rows.
        draw: ``inverse_cdf`` takes one random number per token, which depends on the completion's seed alone.
            ``multinomial`` is :func:`torch.multinomial`: its draws repeat only if the whole batch does. None =
            ``inverse_cdf``, but ``multinomial`` on CUDA, where cumulative sums are not reproducible.
        completions: Maximal number of completions that are sampled at once, those of one prompt together. More are
            sampled in turns, sorted by the length of the prompt. None = no limit.
        inference_mode: Sample in torch's inference mode, where operations cost less. Models with their own code
            (``trust_remote_code``) are sampled under :func:`torch.no_grad`: they may keep tensors for training.

    Raises:
        UsageError: An option is out of range.
    """

    share_prompts: bool = True
    drop_finished: bool = True
    merge: bool = True
    cache: CacheKind = "growing"
    pack_head: bool = True
    draw: DrawMethod | None = None
    completions: int | None = None
    inference_mode: bool = True

    def __post_init__(self) -> None:
        if self.cache not in get_args(CacheKind):
            raise UsageError(f"engine.decoding.cache is '{self.cache}': give one of {', '.join(get_args(CacheKind))}")
        if self.draw not in (None, *get_args(DrawMethod)):
            raise UsageError(f"engine.decoding.draw is '{self.draw}': give one of {', '.join(get_args(DrawMethod))}")
        if self.completions is not None and self.completions < 1:
            raise UsageError(
                f"engine.decoding.completions is {self.completions}: give 1 or more, or null for all at once"
            )

    def without_gradients(self, model: Any) -> AbstractContextManager[None]:
        """Returns the context that disables gradients: inference mode, or ``no_grad`` for a model with its own code."""
        remote = type(unwrapped(model)).__module__.startswith("transformers_modules")
        return torch.inference_mode() if self.inference_mode and not remote else torch.no_grad()


def begin(
    model: Any, input_ids: Tensor, attention_mask: Tensor, num_generations: int, room: int, decoding: Decoding
) -> Continuation:
    """Computes the prompts and starts their completions.

    Args:
        model: Causal language model in the Hugging Face form, in eval mode.
        input_ids: ``[B, P]`` prompts, left-padded.
        attention_mask: ``[B, P]``.
        num_generations: Completions per prompt; those of one prompt are adjacent.
        room: Maximal number of tokens of a completion.
        decoding: Options.
    """
    prompts = Prompts(model, input_ids, attention_mask, num_generations)
    return _Flexible(prompts, room, decoding) if continues(model) else Uncached(prompts)


_CONTINUES: WeakKeyDictionary[nn.Module, bool] = WeakKeyDictionary()
"""Results of :func:`continues` by model."""


def continues(model: Any) -> bool:
    """Whether a model can continue from a left-padded cache of selected rows.

    A model whose forward takes no cache, such as XLNet's, cannot. A model with a recurrent state is tested once.
    """
    inner = unwrapped(model)
    if inner not in _CONTINUES:
        takes_cache = cache_argument(inner) is not None
        _CONTINUES[inner] = takes_cache and (
            not carries_state(inner) or (masks_left_padding(inner) and _continues_correctly(model))
        )
        if not _CONTINUES[inner]:
            say_once(
                f"{inner.config.model_type}: this model cannot continue from a cache of padded and selected rows: each "
                "token takes a pass over the whole text, which is slow."
            )
    return _CONTINUES[inner]


@torch.no_grad()
def _continues_correctly(model: Any) -> bool:
    """Tests a model on two completions of each of two prompts, of which the last and the first are continued."""
    ids = made_up_tokens(unwrapped(model), 2, 9)
    prompts, mask = ids[:, :6], torch.ones_like(ids[:, :6])
    mask[1, :3] = 0
    first, second, rows = ids[:, 6:8].flatten(), ids[:, 8], torch.tensor([3, 0], device=ids.device)
    texts = (torch.cat([prompts[1, 3:], first[3:], second[:1]]), torch.cat([prompts[0], first[:1], second[1:]]))
    with torch.autocast(model.device.type, enabled=False):
        whole = torch.stack([model(input_ids=text[None], use_cache=False).logits[0, -1] for text in texts])
        try:
            continuation = _Flexible(Prompts(model, prompts, mask, 2), 2, Decoding())
            continuation.feed(first)
            continuation.keep(rows)
            continuation.feed(second)
        except torch.OutOfMemoryError:
            raise
        except (ArithmeticError, AssertionError, AttributeError, LookupError, RuntimeError, TypeError, ValueError):
            return False
    return bool((continuation.logits - whole).abs().max() <= agreement(unwrapped(model)) * whole.abs().max())


class _Flexible(Continuation):
    """Continuation with a cache of selected rows: equal completions of one prompt share a row until they differ.

    Args:
        prompts: The prompts.
        room: Maximal number of tokens of a completion.
        decoding: Options.
    """

    def __init__(self, prompts: Prompts, room: int, decoding: Decoding) -> None:
        self._model, self._drop, self._merge = prompts.model, decoding.drop_finished, decoding.merge
        config = prompts.model.config
        total = len(prompts.input_ids) * prompts.num_generations
        growing = decoding.cache == "growing"
        self._cache = GrowingCache(config, total, room) if growing else SelectingCache(config=config)
        self.logits = prompts.computed(self._cache, decoding.share_prompts)
        rows = torch.arange(len(self.logits), device=self.logits.device)
        attention, position = prompts.attention_mask, prompts.positions[:, -1:]
        if decoding.share_prompts:
            self._row = prompts.repeated(rows)  # of each completion
            self.logits = self.logits[self._row]
        else:
            self._row = rows
            attention, position = prompts.repeated(attention), prompts.repeated(position)
        attends = any(hasattr(layer, "keys") for layer in self._cache.layers)  # a recurrent state has no padding
        padded = attends and not bool(attention.all())
        self._padding = _Padding(attention, room, _takes_full_masks(self._model, self._cache)) if padded else None
        self._position = position
        self._places: Tensor | None = None  # of unfinished completions, if finished ones stay in the batch
        self._separate = False  # whether each completion has its own row, as it then has to the end

    def feed(self, tokens: Tensor) -> None:
        """See the base class."""
        if self._places is not None:
            tokens = tokens.new_zeros(len(self._row)).index_copy(0, self._places, tokens)
        if self._separate:
            source, self._row = self._row, torch.arange(len(tokens), device=tokens.device)
        else:
            source, tokens, self._row = branches(self._row, tokens, self._merge)
            self._separate = len(source) == len(self._row)
        if len(source) != len(self._position) or bool((source[1:] <= source[:-1]).any()):
            self._cache.batch_select_indices(source)
            self._position = self._position[source]
            if self._padding is not None:
                self._padding.select(source)
        self._position = self._position + 1
        logits = self._model(
            input_ids=tokens[:, None],
            attention_mask=None if self._padding is None else self._padding.next_mask(),
            position_ids=self._position,
            **cached(self._model, self._cache),
            logits_to_keep=1,
        ).logits[:, -1]
        self.logits = logits[self._row if self._places is None else self._row[self._places]]

    def keep(self, rows: Tensor) -> None:
        """See the base class."""
        if self._drop:
            self._row = self._row[rows]
        else:
            self._places = rows if self._places is None else self._places[rows]


class _Padding:
    """Attention mask of left-padded rows that grow by one token at a time.

    Args:
        attention: ``[R, P]`` mask of the prompts.
        room: Maximal number of tokens that follow.
        full: Whether to return the boolean mask ``[R, 1, 1, t]`` that attention takes, which saves the model from
            making it for each token.
    """

    def __init__(self, attention: Tensor, room: int, full: bool) -> None:
        self._width = attention.shape[1]
        self._mask = torch.cat([attention, attention.new_ones(len(attention), room)], dim=1)
        if full:
            self._mask = self._mask.bool()[:, None, None]

    def select(self, rows: Tensor) -> None:
        """Selects the rows to continue with."""
        self._mask = self._mask[rows]

    def next_mask(self) -> Tensor:
        """Returns the mask for one more token."""
        self._width += 1
        return self._mask[..., : self._width]


def _takes_full_masks(model: Any, cache: Cache) -> bool:
    """Whether masks of four axes reach the model's attention unchanged, and all its layers take the same mask."""
    full_attention = all(type(layer) is GrowingLayer for layer in cache.layers)
    sdpa = attention_implementation(model.config.get_text_config()) == "sdpa"
    return full_attention and sdpa and reads_trees(transformer_part(model), model.device)


def branches(rows: Tensor, tokens: Tensor, merge: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Assigns ``A`` completions in ``R`` cache rows to ``S`` new rows when each gets its next token.

    Args:
        rows: ``[A]`` row of each completion; completions may share one.
        tokens: ``[A]`` next token of each completion.
        merge: Whether completions of one row with the same token stay in one row; else each gets its own.

    Returns:
        The old row ``[S]`` and the token ``[S]`` of each new row, and the new row ``[A]`` of each completion. A row
        keeps its place where possible, so that little is copied.
    """
    if merge:
        most = tokens.max() + 1
        codes, which = (rows * most + tokens).unique(return_inverse=True)  # a code holds a row and a token
        parents, tokens = codes // most, codes % most
    else:
        parents, order = rows.sort(stable=True)
        which, tokens = order.argsort(), tokens[order]
    count = torch.arange(len(parents), device=rows.device)
    stays = parents < len(parents)
    stays[1:] &= parents[1:] != parents[:-1]
    free = torch.ones_like(stays)
    free[parents[stays]] = False
    place = torch.where(stays, parents, count)
    place[~stays] = count[free]
    source, taken = torch.empty_like(parents), torch.empty_like(tokens)
    source[place], taken[place] = parents, tokens
    return source, taken, place[which]
