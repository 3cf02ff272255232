"""Questions with a preference as batches of prompts."""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from moslim.data.loader import Draw, Examples
from moslim.data.prompts import PromptRenderer, pad, pad_id
from moslim.data.requests import Request
from moslim.data.sources.base import Source
from moslim.data.types import Example, PromptBatch, Question
from moslim.errors import UsageError
from moslim.noise import derive_seed
from moslim.preferences import Preference, PreferenceSet
from moslim.sampling import PreferenceSampler


@dataclass
class Prompt:
    """A question and what is asked of its answer.

    Args:
        question: The question, as the source gave it.
        preference: The levels asked for.
        index: Row of the source.
        kind: See :class:`~moslim.data.requests.Request`; empty in training.
        columns: The row's own, in training.
    """

    question: Question
    preference: Preference
    index: int
    kind: str = ""
    columns: Mapping[str, Any] = field(default_factory=dict)


class SampledPrompts(Examples):
    """Training prompts: each row gets a preference that is a function of seed, epoch and row.

    Args:
        rows: The questions.
        preferences: The dimensions in use.
        sampler: Draws the preferences.
        source: Says what is reachable and what is held out.
        seed: Seed of the draws.
    """

    def __init__(
        self, rows: list[Example], preferences: PreferenceSet, sampler: PreferenceSampler, source: Source, seed: int
    ) -> None:
        self._rows, self._preferences, self._sampler, self._source, self._seed = (
            rows,
            preferences,
            sampler,
            source,
            seed,
        )

    def __len__(self) -> int:
        return len(self._rows)

    def start_epoch(self, epoch: int) -> None:
        """Tells the sampler."""
        self._sampler.start_epoch(epoch, self._preferences)

    def __getitem__(self, draw: Draw) -> Prompt:
        """Returns the prompt of a row in an epoch.

        Raises:
            UsageError: The sampler asks for a combination that the source holds out.
        """
        generator = random.Random(derive_seed(self._seed, draw.epoch, draw.row))
        preference = self._sampler.draw(self._preferences, generator, self._source)
        if preference and self._source.held_out(preference):
            raise UsageError(
                f"{type(self._sampler).__name__} drew {dict(preference.levels)}, which {type(self._source).__name__} "
                "holds out from training: draw again while source.held_out(preference)"
            )
        row = self._rows[draw.row]
        return Prompt(row.question, preference, draw.row, columns=row.columns)


class FixedPrompts(Examples):
    """Prompts that are the same in every epoch."""

    def __init__(self, prompts: list[Prompt]) -> None:
        self._prompts = prompts

    def __len__(self) -> int:
        return len(self._prompts)

    def __getitem__(self, draw: Draw) -> Prompt:
        """Returns one prompt."""
        return self._prompts[draw.row]


def requested(rows: list[tuple[int, Example]], requests: list[list[Request]]) -> FixedPrompts:
    """Puts requests to questions: ``requests[i]`` to the row ``rows[i]``, given with its index in the source."""
    return FixedPrompts(
        [
            Prompt(row.question, request.preference, index, request.kind)
            for (index, row), wanted in zip(rows, requests, strict=True)
            for request in wanted
        ]
    )


@dataclass
class CollatePrompts:
    """Makes a :class:`PromptBatch`.

    Args:
        renderer: Writes question and preference as ids.
        scramble: Control run: each prompt shows its own preference, but the targets that reward it
            are those of the next prompt with an instruction. So the levels shown tell nothing, and a measure of
            steerability that still finds control measures something else. Active dimensions go with the targets.
    """

    renderer: PromptRenderer
    scramble: bool = False
    _last: tuple[list[Prompt], PromptBatch] | None = field(default=None, init=False, repr=False, compare=False)

    def __call__(self, prompts: list[Prompt]) -> PromptBatch:
        """Left-pads the prompts. Those of the last call, which comes again for every step on a rollout, are kept."""
        if self._last is None or self._last[0] != prompts:
            self._last = (prompts, self._collated(prompts))
        return self._last[1]

    def _collated(self, prompts: list[Prompt]) -> PromptBatch:
        shown = [prompt.preference for prompt in prompts]
        wanted = shown
        if self.scramble:
            shown, wanted = exchanged(shown)
        rows = [self.renderer.ids(p.question, preference) for p, preference in zip(prompts, shown, strict=True)]
        ids, mask = pad(rows, pad_id(self.renderer.tokenizer), left=True)
        return PromptBatch(
            input_ids=ids,
            attention_mask=mask,
            targets=torch.stack([self.renderer.preferences.encode(preference) for preference in wanted]),
            index=torch.tensor([prompt.index for prompt in prompts]),
            questions=[self.renderer.question(prompt.question) for prompt in prompts],
            kinds=[prompt.kind for prompt in prompts],
            columns=[p.columns for p in prompts] if any(p.columns for p in prompts) else [],
        )


def exchanged(preferences: list[Preference]) -> tuple[list[Preference], list[Preference]]:
    """Returns the preferences to show and those to reward: each row with one is rewarded for the next such row's.

    Preferences are drawn independently of each other, so a neighbour's tells nothing about one's own. A row that
    is the only one with a preference has nothing to exchange and loses it.
    """
    rows = [i for i, preference in enumerate(preferences) if preference]
    shown, wanted = list(preferences), list(preferences)
    if len(rows) == 1:
        shown[rows[0]] = wanted[rows[0]] = Preference()
    for here, there in zip(rows, rows[1:] + rows[:1], strict=True):
        wanted[here] = shown[there]
    return shown, wanted
