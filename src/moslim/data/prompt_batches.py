"""Batches of prompts, and the requests that a policy is evaluated with (:class:`EvaluationKind`)."""

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
    """Request for a question in an evaluation.

    Args:
        preference: Requested levels.
        kind: Name of its :class:`EvaluationKind`.
    """

    preference: Preference
    kind: str


class EvaluationKind(ABC):
    """Requests for each test question. Subclass it, and list the subclass under ``data.evaluation_kinds``.

    The report gives for every kind the share of completions with all requested levels, and their mean error.
    """

    name: str
    """Name in metrics and in the report, e.g. ``opposites``; no dimension can have it."""

    @abstractmethod
    def preferences(self, preferences: PreferenceSet, source: Source, seed: int) -> Sequence[Preference]:
        """Returns the preferences to request for one question.

        Args:
            preferences: Dimensions in use.
            source: Source of the rows, which knows reachable and held-out preferences.
            seed: Seed of random choices, different for each question.
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
    """The question without an instruction."""

    name = "default"

    def preferences(self, preferences: PreferenceSet, source: Source, seed: int) -> list[Preference]:
        """See the base class."""
        return [Preference()]


class Combinations(EvaluationKind):
    """Different combinations of two or more dimensions that some answer can have.

    Args:
        count: Number of combinations; there are fewer if :data:`~moslim.data.samplers.TRIES` draws find no more.
        unseen: Whether to draw from the combinations that are held out from training, or from the others.
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
    """Returns the requests of all kinds for one question, in the order of the kinds."""
    return [
        Request(preference, kind.name) for kind in kinds for preference in kind.preferences(preferences, source, seed)
    ]


def check_names(kinds: Sequence[EvaluationKind], preferences: PreferenceSet) -> None:
    """Checks that the names of evaluation kinds are unique in metrics and reports.

    Args:
        kinds: Kinds besides the shipped ones.
        preferences: Dimensions in use.

    Raises:
        UsageError: A kind has no name, or the name of another kind, of a dimension or of a part of the report.
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
    """Question with the levels requested for its completion.

    Args:
        question: Question, as the source gave it.
        preference: Requested levels.
        index: Row of the source.
        kind: See :class:`Request`; empty in training.
        columns: In training, ``columns`` of the example.
    """

    question: Question
    preference: Preference
    index: int
    kind: str = ""
    columns: Mapping[str, Any] = field(default_factory=dict)


class SampledPrompts(Examples):
    """Training prompts. The preference of a row depends on seed, epoch and row.

    Args:
        rows: Rows with questions.
        preferences: Dimensions in use.
        sampler: Sampler of preferences.
        source: Source of the rows, which knows reachable and held-out preferences.
        seed: Seed of the draws.
    """

    def __init__(
        self, rows: list[Example], preferences: PreferenceSet, sampler: PreferenceSampler, source: Source, seed: int
    ) -> None:
        self._rows, self._preferences, self._sampler = rows, preferences, sampler
        self._source, self._seed = source, seed

    def __len__(self) -> int:
        return len(self._rows)

    def start_epoch(self, epoch: int) -> None:
        """Starts an epoch of the sampler."""
        self._sampler.start_epoch(epoch, self._preferences)

    def __getitem__(self, draw: Draw) -> Prompt:
        """Returns the prompt of a row in an epoch.

        Raises:
            UsageError: The sampler draws a combination that the source holds out.
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
        """Returns the prompt of a row."""
        return self._prompts[draw.row]


def requested(rows: list[tuple[int, Example]], requests: list[list[Request]]) -> FixedPrompts:
    """Returns the prompts of requests for questions.

    Args:
        rows: Rows, each with its index in the source.
        requests: Requests for each row.
    """
    return FixedPrompts(
        [
            Prompt(row.question, request.preference, index, request.kind)
            for (index, row), row_requests in zip(rows, requests, strict=True)
            for request in row_requests
        ]
    )


@dataclass
class CollatePrompts:
    """Collates prompts to a :class:`PromptBatch`.

    Args:
        renderer: Renderer of prompts.
        scramble: Whether the targets of each prompt are those of the next prompt with an instruction. In such a control
            run the instruction carries no information about the reward, so measured steerability must vanish.
    """

    renderer: PromptRenderer
    scramble: bool = False
    _last: tuple[list[Prompt], PromptBatch] | None = field(default=None, init=False, repr=False, compare=False)

    def __call__(self, prompts: list[Prompt]) -> PromptBatch:
        """Left-pads the prompts. Caches the last batch, which repeats for every step on a rollout."""
        if self._last is None or self._last[0] != prompts:
            self._last = (prompts, self._collated(prompts))
        return self._last[1]

    def _collated(self, prompts: list[Prompt]) -> PromptBatch:
        shown = [prompt.preference for prompt in prompts]
        rewarded = shown
        if self.scramble:
            shown, rewarded = exchanged(shown)
        sequences = [self.renderer.ids(p.question, preference) for p, preference in zip(prompts, shown, strict=True)]
        ids, mask = pad(sequences, pad_id(self.renderer.tokenizer), left=True)
        return PromptBatch(
            input_ids=ids,
            attention_mask=mask,
            targets=torch.stack([self.renderer.preferences.encode(preference) for preference in rewarded]),
            index=torch.tensor([prompt.index for prompt in prompts]),
            questions=[self.renderer.question(prompt.question) for prompt in prompts],
            kinds=[prompt.kind for prompt in prompts],
            columns=[p.columns for p in prompts] if any(p.columns for p in prompts) else [],
        )


def exchanged(preferences: list[Preference]) -> tuple[list[Preference], list[Preference]]:
    """Returns the preferences to show and the preferences to reward.

    Each prompt with a preference is rewarded for the preference of the next such prompt, which is drawn independently.
    If only one prompt has a preference, the preference is dropped.
    """
    active = [i for i, preference in enumerate(preferences) if preference]
    shown, rewarded = list(preferences), list(preferences)
    if len(active) == 1:
        shown[active[0]] = rewarded[active[0]] = Preference()
    for i, following in zip(active, active[1:] + active[:1], strict=True):
        rewarded[i] = shown[following]
    return shown, rewarded
