"""Decoding: completions in progress, and the choice of their next tokens.

From logits to tokens: how the next token is chosen.

The model's side of sampling: answers in progress, which are given tokens and say what may follow.
"""

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
from moslim.training.lightning_compat import attention_implementation
from moslim.utils.errors import UsageError

DrawMethod = Literal["inverse_cdf", "multinomial"]


@dataclass
class Chosen:
    """One token for each of ``B`` rows; any, with a log-probability of NaN, where the logits are not finite.

    Args:
        tokens: ``[B]`` int64.
        logprobs: ``[B]`` float32 or finer, under the tempered distribution.
        behavior_logprobs: ``[B]`` the same, under what is left of it by top-k and top-p; None where nothing was cut.
    """

    tokens: Tensor
    logprobs: Tensor
    behavior_logprobs: Tensor | None = None


@dataclass(frozen=True)
class TokenChoice:
    """How tokens are drawn.

    Args:
        temperature: 0 takes the most likely token, whose log-probability is then that at temperature 1.
        top_k: Draw among this many of the most likely tokens; None = among all.
        top_p: Draw among the most likely tokens that together have this probability; 1 = among all.
        method: ``inverse_cdf`` takes one uniform number per row. ``multinomial`` is torch's own: slow on a CPU, and
            what is drawn for a row depends on the rows beside it.
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
        """Whether some tokens are never drawn."""
        return self.temperature > 0 and (self.top_k is not None or self.top_p < 1)

    def __call__(self, logits: Tensor, noise: Tensor, generator: torch.Generator | None = None) -> Chosen:
        """Chooses one token per row.

        Args:
            logits: ``[B, V]``.
            noise: ``[B]`` uniform in ``[0, 1)``.
            generator: What ``multinomial`` draws from.
        """
        logits = widened(logits)
        if self.temperature not in (0, 1):
            logits = logits / self.temperature
        logprobs = torch.log_softmax(logits, dim=-1)
        left = cut(logprobs, self.top_k, self.top_p) if self.cuts else logprobs
        if self.temperature == 0:
            tokens = left.argmax(dim=-1)
        elif self.method == "multinomial":
            broken = logprobs[:, :1].isnan()  # all of a row, or none of it: any token is drawn, the caller sees the NaN
            tokens = torch.multinomial(left.exp().masked_fill(broken, 1.0), 1, generator=generator)[:, 0]
        else:
            tokens = inverse_cdf(left.exp(), noise)
        found = Chosen(tokens, logprobs.gather(-1, tokens[:, None])[:, 0])
        if self.cuts:
            found.behavior_logprobs = left.gather(-1, tokens[:, None])[:, 0]
        return found


def inverse_cdf(probabilities: Tensor, noise: Tensor) -> Tensor:
    """Draws one token per row ``[B]`` where the cumulative distribution reaches a random height.

    Args:
        probabilities: ``[B, V]``, up to a factor per row.
        noise: ``[B]`` uniform in ``[0, 1)``.
    """
    cumulative = probabilities.cumsum(dim=-1)
    threshold = (1 - noise)[:, None] * cumulative[:, -1:]  # in (0, total]: impossible tokens are never drawn
    return torch.searchsorted(cumulative, threshold)[:, 0].clamp(max=probabilities.shape[-1] - 1)


def cut(logprobs: Tensor, top_k: int | None, top_p: float) -> Tensor:
    """Leaves the most likely tokens, first by number, then by probability, as ``generate`` does.

    Args:
        logprobs: ``[B, V]``.
        top_k: How many; tokens as likely as the last of them stay, too. None = all.
        top_p: The fewest that together have this probability.

    Returns:
        ``[B, V]`` log-probabilities that add up to one again, ``-inf`` on what was cut.
    """
    if top_k is not None and top_k < logprobs.shape[-1]:
        least = logprobs.topk(top_k, dim=-1).values[:, -1:]
        logprobs = logprobs.masked_fill(logprobs < least, -torch.inf).log_softmax(dim=-1)
    if top_p < 1:
        ordered, order = logprobs.sort(dim=-1, descending=True, stable=True)
        before = ordered.exp().cumsum(dim=-1) - ordered.exp()  # probability of all that are likelier
        dropped = torch.zeros_like(before, dtype=torch.bool).scatter(-1, order, before >= top_p)
        logprobs = logprobs.masked_fill(dropped, -torch.inf).log_softmax(dim=-1)
    return logprobs


CacheKind = Literal["growing", "dynamic"]


@dataclass(frozen=True)
class Decoding:
    """How :class:`TorchEngine` computes answers. All ways give the same answers, but for ``draw: multinomial``.

    Args:
        share_prompts: Compute each prompt once, and repeat its keys and values for its answers.
        drop_finished: Let an answer leave the batch as soon as it ends.
        merge: Compute answers to one prompt once for as long as they are the same. Not where each
            answer has its prompt computed for itself.
        cache: ``growing`` keeps keys and values where there is room for more; ``dynamic`` is transformers' own, which
            copies them all for every token.
        pack_head: On a CPU, copy a large last layer into the order in which few rows read it fastest.
        draw: ``inverse_cdf`` takes one random number per token, a function of its answer's seed and of nothing else;
            ``multinomial`` is torch's own: its draws repeat only if the whole batch does. None = the first, but on CUDA
            the second: cumulative sums, which the first needs, are not reproducible there.
        answers: Most answers that are sampled at once, those of one prompt together; more are sampled in turns, prompts
            of like length first. None = all.
        inference_mode: Sample in torch's inference mode, where operations cost less. Models whose code came with them
            (``trust_remote_code``) are left out: what they keep from a first pass would be of no use in training.
    """

    share_prompts: bool = True
    drop_finished: bool = True
    merge: bool = True
    cache: CacheKind = "growing"
    pack_head: bool = True
    draw: DrawMethod | None = None
    answers: int | None = None
    inference_mode: bool = True

    def __post_init__(self) -> None:
        if self.cache not in get_args(CacheKind):
            raise UsageError(f"engine.decoding.cache is '{self.cache}': give one of {', '.join(get_args(CacheKind))}")
        if self.draw not in (None, *get_args(DrawMethod)):
            raise UsageError(f"engine.decoding.draw is '{self.draw}': give one of {', '.join(get_args(DrawMethod))}")
        if self.answers is not None and self.answers < 1:
            raise UsageError(f"engine.decoding.answers is {self.answers}: give 1 or more, or null for all at once")

    def without_gradients(self, model: Any) -> AbstractContextManager[None]:
        """What to compute answers in."""
        remote = type(unwrapped(model)).__module__.startswith("transformers_modules")
        return torch.inference_mode() if self.inference_mode and not remote else torch.no_grad()


def begin(
    model: Any, input_ids: Tensor, attention_mask: Tensor, samples: int, room: int, decoding: Decoding
) -> Continuation:
    """Computes prompts.

    Args:
        model: Causal language model in the Hugging Face form, in eval mode.
        input_ids: ``[B, P]`` prompts, left-padded.
        attention_mask: ``[B, P]``.
        samples: Answers to each prompt; those of one prompt are adjacent.
        room: Most tokens of an answer.
        decoding: How.
    """
    prompts = Prompts(model, input_ids, attention_mask, samples)
    return _Flexible(prompts, room, decoding) if continues(model) else Uncached(prompts)


_CONTINUES: WeakKeyDictionary[nn.Module, bool] = WeakKeyDictionary()


def continues(model: Any) -> bool:
    """Whether a model can go on from a cache whose rows are chosen, padded on the left.

    One that carries a state is tried once. One whose forward takes no cache, such as XLNet's, never can.
    """
    inner = unwrapped(model)
    if inner not in _CONTINUES:
        takes_one = cache_argument(inner) is not None
        _CONTINUES[inner] = takes_one and (not carries_state(inner) or (masks_left_padding(inner) and _goes_on(model)))
        if not _CONTINUES[inner]:
            say_once(
                f"{inner.config.model_type}: answers cannot go on from a cache whose rows are padded and chosen: every "
                "token is sampled by a pass over the whole text, which is slow."
            )
    return _CONTINUES[inner]


@torch.no_grad()
def _goes_on(model: Any) -> bool:
    """Tries two answers to each of two prompts, of which the last and the first go on, in this order."""
    ids = made_up_tokens(unwrapped(model), 2, 9)
    prompts, mask = ids[:, :6], torch.ones_like(ids[:, :6])
    mask[1, :3] = 0
    first, second, rows = ids[:, 6:8].flatten(), ids[:, 8], torch.tensor([3, 0], device=ids.device)
    texts = (torch.cat([prompts[1, 3:], first[3:], second[:1]]), torch.cat([prompts[0], first[:1], second[1:]]))
    with torch.autocast(model.device.type, enabled=False):
        whole = torch.stack([model(input_ids=text[None], use_cache=False).logits[0, -1] for text in texts])
        try:
            answers = _Flexible(Prompts(model, prompts, mask, 2), 2, Decoding())
            answers.feed(first)
            answers.keep(rows)
            answers.feed(second)
        except torch.OutOfMemoryError:
            raise
        except (ArithmeticError, AssertionError, AttributeError, LookupError, RuntimeError, TypeError, ValueError):
            return False
    return bool((answers.logits - whole).abs().max() <= agreement(unwrapped(model)) * whole.abs().max())


class _Flexible(Continuation):
    """With a cache whose rows come and go: answers to one prompt share a row for as long as they are the same."""

    def __init__(self, prompts: Prompts, room: int, decoding: Decoding) -> None:
        self._model, self._drop, self._merge = prompts.model, decoding.drop_finished, decoding.merge
        config = prompts.model.config
        total = len(prompts.input_ids) * prompts.samples
        growing = decoding.cache == "growing"
        self._cache = GrowingCache(config, total, room) if growing else SelectingCache(config=config)
        self.logits = prompts.computed(self._cache, decoding.share_prompts)
        rows = torch.arange(len(self.logits), device=self.logits.device)
        attention, position = prompts.attention_mask, prompts.positions[:, -1:]
        if decoding.share_prompts:
            self._row = prompts.repeated(rows)  # of each answer
            self.logits = self.logits[self._row]
        else:
            self._row = rows
            attention, position = prompts.repeated(attention), prompts.repeated(position)
        attends = any(hasattr(layer, "keys") for layer in self._cache.layers)  # a state has left padding behind it
        padded = attends and not bool(attention.all())
        self._padding = _Padding(attention, room, _as_they_are(self._model, self._cache)) if padded else None
        self._position = position
        self._places: Tensor | None = None  # of the answers that are still wanted, where others stay in the batch
        self._apart = False  # whether each answer has a row of its own, as it then has to the end

    def feed(self, tokens: Tensor) -> None:
        """See the base class."""
        if self._places is not None:
            tokens = tokens.new_zeros(len(self._row)).index_copy(0, self._places, tokens)
        if self._apart:
            source, self._row = self._row, torch.arange(len(tokens), device=tokens.device)
        else:
            source, tokens, self._row = branches(self._row, tokens, self._merge)
            self._apart = len(source) == len(self._row)
        if len(source) != len(self._position) or bool((source[1:] <= source[:-1]).any()):
            self._cache.batch_select_indices(source)
            self._position = self._position[source]
            if self._padding is not None:
                self._padding.choose(source)
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
    """Which columns before each row's tokens are padding.

    Args:
        attention: ``[R, P]``.
        room: Most tokens that follow.
        as_they_are: Whether the model's attention is to get the mask; else the model makes its own of it, every time.
    """

    def __init__(self, attention: Tensor, room: int, as_they_are: bool) -> None:
        self._width = attention.shape[1]
        self._mask = torch.cat([attention, attention.new_ones(len(attention), room)], dim=1)
        if as_they_are:
            self._mask = self._mask.bool()[:, None, None]

    def choose(self, rows: Tensor) -> None:
        """Goes on with these rows."""
        self._mask = self._mask[rows]

    def next_mask(self) -> Tensor:
        """The mask of one more column."""
        self._width += 1
        return self._mask[..., : self._width]


def _as_they_are(model: Any, cache: Cache) -> bool:
    """Whether masks of four axes come to the model's attention as they are, and none of its layers needs another."""
    everything = all(type(layer) is GrowingLayer for layer in cache.layers)
    by_torch = attention_implementation(model.config.get_text_config()) == "sdpa"
    return everything and by_torch and reads_trees(transformer_part(model), model.device)


def branches(rows: Tensor, tokens: Tensor, merge: bool) -> tuple[Tensor, Tensor, Tensor]:
    """What ``A`` answers in ``R`` rows need when each takes another token.

    Args:
        rows: ``[A]`` the row that each answer shares with others.
        tokens: ``[A]`` its next token.
        merge: Whether answers with the same token stay in one row; else each gets its own.

    Returns:
        For each of ``S`` new rows the old one that it goes on from and its token, ``[S]``, and the new row of each
        answer ``[A]``. A row keeps its place if it can, so that little is copied.
    """
    if merge:
        most = tokens.max() + 1
        pairs, which = (rows * most + tokens).unique(return_inverse=True)
        parents, tokens = pairs // most, pairs % most
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
