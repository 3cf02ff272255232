"""Embedded world as a source: every row is generated from the seed."""

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
from moslim.workbench.answers import ECHO_SHARE, Corruption, bare_steps, corrupt, lone_step, rate, starter_corpus
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
"""Pairs of levels that are never requested together in training."""

TEST_FORMS = 2
"""Number of question forms per held-out topic."""
_WHOLE_ANSWERS = 2
"""Stage of the labelled rows with whole answers, after lone steps (0) and bare steps (1)."""
_STYLE = ("formality", "warmth")
"""Dimensions on which all bare steps have the same level, and so no label."""
_WORLD = PreferenceSet(LEVELS)
_STREAMS = {RowKind.LABELLED: b"reward", RowKind.PROMPTS: b"policy", RowKind.TEXTS: b"text"}
"""Part of the seed by kind of rows, so that the kinds are drawn independently."""
_VALIDATION_EVERY = 5
"""Every fifth row of a file of samples is used for validation."""


class Workbench(Source):
    """Questions, answers and exact levels from the embedded world.

    Topics of the held-out fold occur in the starter's text, which must teach their facts, and in the test. The
    classifier trains on written answers, samples of the starter and corrupted answers, all labelled by the gold scorer.
    A curriculum precedes these: single steps, right or wrong (stage 0), then one to four bare steps (stage 1). Without
    it, a classifier counts sentences and ignores their content. Steps have no labels of style, which is the same for
    all of them.

    Args:
        fold: Third of the topics that is held out; tune on one fold, report on another.
        corpus_rows: Rows of plain text.
        echo_share: Share of these that ask to repeat some words; with 1, the text is about no topic at all.
        reward_rows: Written answers among the labelled rows; there are three times as many corrupted answers.
            ``predict`` asks the starter, or a policy, as many questions to sample answers.
        bare_rows: Rows in each of the first two stages of the labelled rows.
        policy_rows: Prompts per epoch.
        samples: One or several JSON Lines files with ``question`` and ``answer``, sampled from the starter or from a
            policy, whose rows also have ``requested``; None = no samples.
        raters: Number of simulated raters that label the training rows of the classifier; 0 = exact levels. Levels in
            validation and test are always exact.
        rater_noise: Standard deviation of a rater's error, in levels.
    """

    def __init__(
        self,
        fold: int = 0,
        corpus_rows: int = 8000,
        echo_share: float = ECHO_SHARE,
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
        if not 0 <= echo_share <= 1:
            raise UsageError(f"source.echo_share is {echo_share}: give a number from 0 to 1")
        self.fold = fold
        self.corpus_rows = corpus_rows
        self.echo_share = echo_share
        self.reward_rows = reward_rows
        self.bare_rows = bare_rows
        self.policy_rows = policy_rows
        self.samples = [samples] if isinstance(samples, str) else samples or []
        self.raters = raters
        self.rater_noise = rater_noise

    def topics(self, held_out: bool) -> list[Topic]:
        """Returns the held-out topics of this fold, or all others."""
        return [topic for topic in TOPICS if (topic.held_out_in == self.fold) == held_out]

    def rows(self, kind: RowKind, split: Split, preferences: PreferenceSet, seed: int) -> list[Example]:
        preferences.columns_in(PreferenceSet(LEVELS), "embedded world")
        rng = random.Random(derive_seed(seed, *_STREAMS[kind], *split.encode()))
        if kind is RowKind.TEXTS:
            return self._text(split, rng)
        if kind is RowKind.PROMPTS:
            return self._requests(preferences, rng) if split is Split.PREDICT else self._prompts(split, rng)
        rows = self._labelled_rows(split, rng)
        if not self.raters or split is not Split.TRAIN:
            return rows
        rater_rng = random.Random(derive_seed(seed, *b"raters"))
        return [rate(row, self.raters, self.rater_noise, rater_rng) for row in rows]

    def reachable(self, preference: Preference) -> bool:
        return reachable(preference.levels)

    def held_out(self, preference: Preference) -> bool:
        levels = set(preference.levels.items())
        return any(levels.issuperset(pair) for pair in HELD_OUT_PAIRS)

    def _text(self, split: Split, rng: random.Random) -> list[Example]:
        if split is Split.PREDICT:  # questions from which the starter's answers are sampled
            return [self._question(rng) for _ in range(self.reward_rows)]
        if split is Split.TRAIN:  # all topics, since a policy only knows facts of the starter
            return starter_corpus(TOPICS, self.corpus_rows, rng, self.echo_share)
        return starter_corpus(self.topics(held_out=split is Split.TEST), 256, rng, self.echo_share)

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
        """Prompts for a policy's answers, on which a classifier can train."""
        sampler = Reachable()
        return [
            replace(self._question(rng), levels=sampler.draw(preferences, rng, self).levels)
            for _ in range(self.reward_rows)
        ]

    def _labelled_rows(self, split: Split, rng: random.Random) -> list[Example]:
        topics = self.topics(held_out=False)
        sampled = self._sampled(held_back=False)
        if split is not Split.TRAIN:
            training_pairs = {(row.question, row.answer) for row in sampled}
            new_samples = [
                row for row in self._sampled(held_back=True) if (row.question, row.answer) not in training_pairs
            ]
            allowed = set(topics)
            adversarial = [
                row for row in adversarial_rows() if allowed.issuperset(topics_in(f"{row.question} {row.answer}"))
            ]
            return [*_labelled(new_samples, "samples"), *adversarial]
        bare = [
            self._drawn(draw, topics, rng, stage)
            for stage, draw in enumerate((lone_step, bare_steps))
            for _ in range(self.bare_rows)
        ]
        steps = [replace(row, levels=_without_style(row.levels)) for row in _labelled(bare, None)]
        written = [self._written(rng.choice(topics), rng) for _ in range(self.reward_rows)]
        corrupted = [self._drawn(corrupt, topics, rng, stage=_WHOLE_ANSWERS) for _ in range(3 * self.reward_rows)]
        return [*steps, *_labelled([*written, *sampled, *corrupted], None)]

    def _written(self, topic: Topic, rng: random.Random) -> Example:
        question = ask(topic, rng.randrange(len(QUESTIONS)))
        return Example(question, write_answer(topic, draw_levels({}, rng), rng), stage=_WHOLE_ANSWERS)

    def _drawn(self, draw: Corruption, topics: list[Topic], rng: random.Random, stage: int) -> Example:
        topic = rng.choice(topics)
        return Example(ask(topic, rng.randrange(len(QUESTIONS))), draw(topic, topics, rng), stage=stage)

    def _sampled(self, held_back: bool) -> list[Example]:
        rows = []
        for path in map(Path, self.samples):
            if not path.exists():
                raise UsageError(f"data.source.samples: no file {path}; `main.py predict` writes it")
            rows += [row for i, row in enumerate(_read(path)) if (i % _VALIDATION_EVERY == 0) == held_back]
        return rows


def adversarial_rows() -> list[Example]:
    """Returns the committed adversarial answers, which exploit weak classifiers, labelled by the gold scorer."""
    path = Path(__file__).parents[2] / "workbench" / "adversarial.jsonl"
    return _labelled(_read(path), "adversarial")


def _without_style(levels: Mapping[str, int]) -> dict[str, int]:
    """Levels without those of style, which are constant over bare steps and would bias the heads."""
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
    requested = requested_levels(record, "requested", _WORLD) if "requested" in fields else {}
    return Example(fields["question"], fields["answer"], stage=_WHOLE_ANSWERS, requested=requested)


def _labelled(rows: list[Example], subset: str | None) -> list[Example]:
    return [replace(row, levels=gold_levels(row.question, row.answer or ""), subset=subset) for row in rows]
