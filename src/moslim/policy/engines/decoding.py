"""The model's side of sampling: answers in progress, which are given tokens and say what may follow."""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Literal, get_args
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from transformers import Cache

from moslim.errors import UsageError
from moslim.loading import transformer_part, unwrapped
from moslim.ops.transformers_compat import attention_implementation
from moslim.policy.engines.cache import GrowingCache, GrowingLayer, SelectingCache
from moslim.policy.engines.choice import DrawMethod
from moslim.policy.engines.continuation import Continuation, Prompts, Uncached, cache_argument, cached
from moslim.recurrence import agreement, carries_state, made_up_tokens, masks_left_padding, say_once
from moslim.tree_attention import reads_trees

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
