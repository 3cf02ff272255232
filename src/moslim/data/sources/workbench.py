"""The embedded world as a source: nothing is stored or downloaded, every row follows from the seed."""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from moslim.data.samplers import Reachable
from moslim.data.sources.labels import requested_levels
from moslim.data.sources.records import Record, scan_file
from moslim.data.types import Example, RowKind, Source, Split
from moslim.ops.numerics import derive_seed
from moslim.preferences import Preference, PreferenceSet
from moslim.utils.errors import UsageError, quoted
from moslim.workbench.answers import Corruption, bare_steps, corrupt, lone_step, rate, starter_corpus
from moslim.workbench.grammar import (
    FOLDS,
    LEVELS,
    QUESTIONS,
    TOPICS,
    Topic,
    ask,
    draw_levels,
    gold_levels,
    reachable,
    topics_in,
    write_answer,
)

HELD_OUT_PAIRS: tuple[tuple[tuple[str, int], tuple[str, int]], ...] = (
    (("verbosity", 0), ("warmth", 4)),
    (("verbosity", 4), ("formality", 0)),
    (("formality", 4), ("warmth", 0)),
    (("helpfulness", 3), ("warmth", 1)),
)
"""Pairs of levels that training never asks for together."""

TEST_FORMS = 2
"""How many of the question forms are asked about each held-out topic."""
_WHOLE_ANSWERS = 2
"""Stage of the labelled rows in which whole answers come, after lone steps and bare steps."""
_STYLE = ("formality", "warmth")
"""Dimensions on which all bare steps have the same level."""
_WORLD = PreferenceSet(LEVELS)
_STREAMS = {RowKind.LABELLED: b"reward", RowKind.PROMPTS: b"policy", RowKind.TEXTS: b"text"}
"""Part of the seed, so that rows of each kind are drawn apart."""
_SAMPLES_HELD_BACK = 5
"""Every how many of a file's samples one is kept for validation."""


class Workbench(Source):
    """Questions, answers and exact levels from the embedded world.

    Topics of one fold are in the starter's text, whose facts must be known, and otherwise in the test alone. The
    classifier learns from written answers, the starter's own samples and corrupted answers, all labelled by the gold
    scorer. These come last: first single steps, right or wrong, then up to four of them, because a classifier that
    meets whole answers at once counts sentences and does not look at what is in them. Bare steps have no labels of
    style, which is the same for all of them.

    Args:
        fold: Which third of the topics is held out; tune on one fold, report on another.
        corpus_rows: Rows of plain text.
        reward_rows: Written answers among the labelled rows; there are three times as many corrupted answers.
            ``predict`` puts as many questions to the starter, and to a policy, for their samples.
        bare_rows: Rows of each of the first two stages of the labelled rows.
        policy_rows: Prompts of an epoch.
        samples: JSON Lines with ``question`` and ``answer``, or several such files: the starter's own answers, or a
            policy's, which also say what was ``requested``. None leaves that part out.
        raters: How many raters label the classifier's training rows, instead of the gold scorer; 0 = exact levels.
            Levels in validation and test are always exact, so that what was learnt is measured against the truth.
        rater_noise: Standard deviation of a rater's error, in levels.
    """

    def __init__(
        self,
        fold: int = 0,
        corpus_rows: int = 8000,
        reward_rows: int = 4300,
        bare_rows: int = 8960,
        policy_rows: int = 16384,
        samples: str | list[str] | None = None,
        raters: int = 0,
        rater_noise: float = 0.7,
    ) -> None:
        if not 0 <= fold < FOLDS:
            raise UsageError(f"source.fold is {fold}: give 0 to {FOLDS - 1}")
        if raters < 0 or rater_noise < 0:
            raise UsageError(f"source.raters is {raters} and source.rater_noise {rater_noise}: neither can be negative")
        self.fold = fold
        self.corpus_rows = corpus_rows
        self.reward_rows = reward_rows
        self.bare_rows = bare_rows
        self.policy_rows = policy_rows
        self.samples = [samples] if isinstance(samples, str) else samples or []
        self.raters = raters
        self.rater_noise = rater_noise

    def topics(self, held_out: bool) -> list[Topic]:
        """The topics of this fold's test, or all others."""
        return [topic for topic in TOPICS if (topic.held_out_in == self.fold) == held_out]

    def rows(self, kind: RowKind, split: Split, preferences: PreferenceSet, seed: int) -> list[Example]:
        preferences.columns_in(PreferenceSet(LEVELS), "embedded world")
        rng = random.Random(derive_seed(seed, *_STREAMS[kind], *split.encode()))
        if kind is RowKind.TEXTS:
            return self._text(split, rng)
        if kind is RowKind.PROMPTS:
            return self._requests(preferences, rng) if split is Split.PREDICT else self._prompts(split, rng)
        pairs = self._pairs(split, rng)
        if not self.raters or split is not Split.TRAIN:
            return pairs
        errors = random.Random(derive_seed(seed, *b"raters"))
        return [rate(row, self.raters, self.rater_noise, errors) for row in pairs]

    def reachable(self, preference: Preference) -> bool:
        return reachable(preference.levels)

    def held_out(self, preference: Preference) -> bool:
        asked = set(preference.levels.items())
        return any(asked.issuperset(pair) for pair in HELD_OUT_PAIRS)

    def _text(self, split: Split, rng: random.Random) -> list[Example]:
        if split is Split.PREDICT:  # what a policy is asked to answer, to see how it writes
            return [self._question(rng) for _ in range(self.reward_rows)]
        if split is Split.TRAIN:  # all topics: a policy can only tell what the starter has read
            return starter_corpus(TOPICS, self.corpus_rows, rng)
        return starter_corpus(self.topics(held_out=split is Split.TEST), 256, rng)

    def _question(self, rng: random.Random) -> Example:
        return Example(ask(rng.choice(self.topics(held_out=False)), rng.randrange(len(QUESTIONS))))

    def _prompts(self, split: Split, rng: random.Random) -> list[Example]:
        if split is Split.TRAIN:
            return [self._question(rng) for _ in range(self.policy_rows)]
        topics = self.topics(held_out=split is Split.TEST)
        rows = [Example(ask(topic, form)) for form in range(TEST_FORMS) for topic in topics]
        if split is not Split.TEST:
            rng.shuffle(rows)
        return rows

    def _requests(self, preferences: PreferenceSet, rng: random.Random) -> list[Example]:
        """What a policy is asked to answer, so that a classifier can learn from its answers."""
        asked = Reachable()
        return [
            replace(self._question(rng), levels=asked.draw(preferences, rng, self).levels)
            for _ in range(self.reward_rows)
        ]

    def _pairs(self, split: Split, rng: random.Random) -> list[Example]:
        topics = self.topics(held_out=False)
        sampled = self._sampled(held_back=False)
        if split is not Split.TRAIN:
            trained = {(row.question, row.answer) for row in sampled}
            fresh = [row for row in self._sampled(held_back=True) if (row.question, row.answer) not in trained]
            known = set(topics)
            tricks = [row for row in adversarial_rows() if known.issuperset(topics_in(f"{row.question} {row.answer}"))]
            return [*_labelled(fresh, "samples"), *tricks]
        bare = [
            self._drawn(kind, topics, rng, stage)
            for stage, kind in enumerate((lone_step, bare_steps))
            for _ in range(self.bare_rows)
        ]
        steps = [replace(row, levels=_told_by_steps(row.levels)) for row in _labelled(bare, None)]
        written = [self._written(rng.choice(topics), rng) for _ in range(self.reward_rows)]
        corrupted = [self._drawn(corrupt, topics, rng, stage=_WHOLE_ANSWERS) for _ in range(3 * self.reward_rows)]
        return [*steps, *_labelled([*written, *sampled, *corrupted], None)]

    def _written(self, topic: Topic, rng: random.Random) -> Example:
        question = ask(topic, rng.randrange(len(QUESTIONS)))
        return Example(question, write_answer(topic, draw_levels({}, rng), rng), stage=_WHOLE_ANSWERS)

    def _drawn(self, kind: Corruption, topics: list[Topic], rng: random.Random, stage: int) -> Example:
        topic = rng.choice(topics)
        return Example(ask(topic, rng.randrange(len(QUESTIONS))), kind(topic, topics, rng), stage=stage)

    def _sampled(self, held_back: bool) -> list[Example]:
        rows = []
        for path in map(Path, self.samples):
            if not path.exists():
                raise UsageError(f"data.source.samples: no file {path}; `main.py predict` writes it")
            rows += [row for i, row in enumerate(_read(path)) if (i % _SAMPLES_HELD_BACK == 0) == held_back]
        return rows


def adversarial_rows() -> list[Example]:
    """The committed answers that a policy could try to fool a classifier with, labelled by the gold scorer."""
    path = Path(__file__).parents[2] / "workbench" / "adversarial.jsonl"
    return _labelled(_read(path), "adversarial")


def _told_by_steps(levels: Mapping[str, int]) -> dict[str, int]:
    """Levels without those of style: a head that learns what bare steps have in common must unlearn it."""
    return {name: level for name, level in levels.items() if name not in _STYLE}


def _read(path: Path) -> list[Example]:
    return [_sample(record) for record in scan_file(str(path))]


def _sample(record: Record) -> Example:
    fields = record.fields
    if missing := {"question", "answer"} - fields.keys():
        raise UsageError(f"{record.place}: no field '{min(missing)}'; `main.py predict` writes question and answer")
    for name in ("question", "answer"):
        if not isinstance(fields[name], str):
            raise UsageError(f"{record.place}, field '{name}': {quoted(fields[name])} is not a text")
    asked = requested_levels(record, "requested", _WORLD) if "requested" in fields else {}
    return Example(fields["question"], fields["answer"], stage=_WHOLE_ANSWERS, requested=asked)


def _labelled(rows: list[Example], subset: str | None) -> list[Example]:
    return [replace(row, levels=gold_levels(row.question, row.answer or ""), subset=subset) for row in rows]
