"""Questions with a preference as batches of prompts, and requests in evaluation.

Kinds of requests that a policy is evaluated with.

Questions with a preference as batches of prompts.
"""

from __future__ import annotations

import random
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from moslim.data.loader import Draw, Examples
from moslim.data.prompts import PromptRenderer, pad, pad_id
from moslim.data.samplers import TRIES, PreferenceSampler, draw_levels
from moslim.data.types import Example, PromptBatch, Question, Source
from moslim.ops.numerics import derive_seed
from moslim.preferences import RESERVED_NAMES, Preference, PreferenceSet
from moslim.utils.errors import UsageError


@dataclass(frozen=True)
class Request:
    """One prompt of an evaluation, to be put to a question.

    Args:
        preference: The levels asked for.
        kind: Name of the :class:`EvaluationKind` that it is of.
    """

    preference: Preference
    kind: str


class EvaluationKind(ABC):
    """Requests that are put to each test question. Subclass it, and list the subclass under ``data.evaluation_kinds``.

    The report says of every kind how many answers meet all levels that were asked for, and their mean error.
    """

    name: str
    """Name in metrics and in the report, e.g. ``opposites``; no dimension can have it."""

    @abstractmethod
    def preferences(self, preferences: PreferenceSet, source: Source, seed: int) -> Sequence[Preference]:
        """Returns what is asked of one question.

        Args:
            preferences: The dimensions in use.
            source: Says what is reachable and what is held out.
            seed: Seed of what is drawn; another one for each question.
        """


class Sweep(EvaluationKind):
    """Every level of every dimension, one dimension at a time, lowest first."""

    name = "sweep"

    def preferences(self, preferences: PreferenceSet, source: Source, seed: int) -> list[Preference]:
        """See the base class."""
        return [
            Preference({dimension.name: level})
            for dimension in preferences.dimensions
            for level in range(len(dimension.levels))
        ]


class NoInstruction(EvaluationKind):
    """The question alone."""

    name = "default"

    def preferences(self, preferences: PreferenceSet, source: Source, seed: int) -> list[Preference]:
        """See the base class."""
        return [Preference()]


class Combinations(EvaluationKind):
    """Different combinations of two or more dimensions that some answer can have.

    Args:
        count: How many; fewer are asked for if no more are found in a bounded number of draws.
        unseen: Whether to draw among the combinations that are held out from training, or among the others.
    """

    def __init__(self, count: int, unseen: bool) -> None:
        self.count, self.unseen = count, unseen
        self.name = "unseen" if unseen else "seen"

    def preferences(self, preferences: PreferenceSet, source: Source, seed: int) -> list[Preference]:
        """See the base class."""
        if len(preferences) < 2:
            return []
        generator = random.Random(derive_seed(seed, int(self.unseen)))
        drawn: dict[Preference, None] = {}
        for _ in range(TRIES):
            if len(drawn) == self.count:
                break
            preference = draw_levels(preferences, generator.randint(2, len(preferences)), generator)
            if source.held_out(preference) == self.unseen and source.reachable(preference):
                drawn[preference] = None
        return list(drawn)


def requests(kinds: Iterable[EvaluationKind], preferences: PreferenceSet, source: Source, seed: int) -> list[Request]:
    """Returns the requests of all kinds to one question, in the order of the kinds."""
    return [Request(wanted, kind.name) for kind in kinds for wanted in kind.preferences(preferences, source, seed)]


def check_names(kinds: Sequence[EvaluationKind], preferences: PreferenceSet) -> None:
    """Refuses kinds that metrics and the report could not tell from something else.

    Args:
        kinds: Kinds besides the shipped ones.
        preferences: The dimensions in use.

    Raises:
        UsageError: A kind has no name, or that of another, of a dimension or of a part of the report.
    """
    taken = {*RESERVED_NAMES, *preferences.names}
    for kind in kinds:
        name = getattr(kind, "name", None)
        if not isinstance(name, str) or not name or name in taken or set(name) & {"/", "."}:
            raise UsageError(
                f"data.evaluation_kinds: {type(kind).__name__} has the name {name!r}: give it a `name`, a text without "
                "'/' and '.', that no other kind, no dimension and no part of the report has"
            )
        taken.add(name)


@dataclass
class Prompt:
    """A question and what is asked of its answer.

    Args:
        question: The question, as the source gave it.
        preference: The levels asked for.
        index: Row of the source.
        kind: See :class:`~moslim.data.prompt_batches.Request`; empty in training.
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
