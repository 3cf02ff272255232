"""The data module of every trainer module."""

from __future__ import annotations

import copy
import dataclasses
import warnings
from collections.abc import Callable, Iterable, Iterator
from datetime import date
from typing import Any

import torch
from lightning.pytorch import LightningDataModule
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from moslim.chat_templates import as_day, pin_tokenizer, tokenizer_pins
from moslim.data.asking import CollatePrompts, FixedPrompts, Prompt, SampledPrompts, requested
from moslim.data.checks import usable_rows
from moslim.data.loader import OrderedBatches, RepeatBatchSampler, ResumableLoader, full_batches
from moslim.data.neutralise import ForbiddenText
from moslim.data.pairs import CollateRewards, CollateTexts, Pairs, known_levels
from moslim.data.prompts import PairEncoder, PromptRenderer, instruction_patterns, pad_id
from moslim.data.requests import Request, combination_requests, sweep_requests
from moslim.data.sources.base import Source
from moslim.data.streaming import StreamedPairs
from moslim.data.types import Example, PairBatch, PromptBatch, Split, TextBatch, View
from moslim.errors import UsageError
from moslim.identity import Entries, class_key, described, rows_digest
from moslim.instructions import PreferenceInstruction, Tags, sample_prompts
from moslim.noise import derive_seed
from moslim.preferences import Preference, PreferenceSet
from moslim.sampling import PreferenceSampler, Uniform
from moslim.training.lightning_compat import close_finished_epoch, finished_batches, finished_epochs, started_epochs
from moslim.utils.sequences import evenly_spaced

Batch = PairBatch | PromptBatch | TextBatch


class PreferenceDataModule(LightningDataModule):
    """Serves the rows of one source to whatever module is trained, so one ``data:`` block fits every config.

    The module says what it wants in its attribute ``batch_view``, and gives its ``tokenizer`` and, for a policy,
    ``batch_repeats``: how often each training batch is to be yielded in a row. A classifier with a frozen backbone
    gives ``row_features``, a function from the ids of all rows to what stands for them in batches. The Trainer must
    leave the sampler alone (``use_distributed_sampler: false``): batches are shared out to processes here.

    | view | train | validation | test | predict |
    |---|---|---|---|---|
    | reward, text | pairs | pairs | pairs | pairs |
    | policy | sampled preferences | level sweep on a few questions | sweep, default, combinations | the rows' levels |

    Args:
        preferences: The dimensions in use; the same as the module's.
        source: Where the rows come from.
        instruction: How a preference is written into a prompt. Default: :class:`~moslim.instructions.Tags`.
        sampler: Which preferences are asked for in training. Default: :class:`~moslim.data.Uniform`.
        batch_size: Rows of a training batch, per process.
        eval_batch_size: Rows of a batch in validation, test and predict, per process.
        max_length: Most tokens of a prompt (policy view) or pair (other views). The question loses its start. None =
            what the module's model can read, where it has a table of positions; else no limit.
        group_by_length: Whether pairs of like length share a training batch, for less padding.
        token_budget: Most tokens, padding included, of a training batch of pairs per process, instead of a number of
            rows. Pairs of like length share a batch, and all rows are used.
        validation_questions: Questions of the policy's level sweep in validation; taken from the training rows if
            the source has no validation rows.
        test_questions: Questions of the policy's test; None for all.
        combinations: Requests of two or more dimensions at once per test question: as many among what training
            could ask for (``seen``) and as many among what the source holds out (``unseen``), if it does.
        scramble: Control run: in training, a policy's reward follows the levels that another prompt of the batch
            shows (:class:`~moslim.data.asking.CollatePrompts`). Steerability must vanish.
        seed: Seed of the source, of the order of rows and of the preferences drawn.
        workers: Processes that prepare training batches; 0 prepares them in the main process.
        template_args: Values of variables that the tokenizer's chat template reads, such as ``enable_thinking: false``.
            They are written into the template, also of an exported model.
        template_date: Date that the chat template writes into prompts, as ``YYYY-MM-DD``, if it does; it is written
            into the template, too. None = that of the checkpoint or model that is loaded, else today.
        skip_bad_rows: Largest share of the training, validation or test rows that may be left out because no prompt or
            pair can be made of them: an empty user turn, a chat that the template refuses, a system message that fills
            ``max_length``. Every row is checked when the run begins. In predict none is left out.

    Raises:
        UsageError: A batch size below 1, ``skip_bad_rows`` that is no share, ``scramble`` with a batch of one, where
            there is nothing to exchange, or ``token_budget`` without ``group_by_length``.
    """

    def __init__(
        self,
        preferences: PreferenceSet,
        source: Source,
        instruction: PreferenceInstruction | None = None,
        sampler: PreferenceSampler | None = None,
        batch_size: int = 16,
        eval_batch_size: int = 64,
        max_length: int | None = None,
        group_by_length: bool = True,
        token_budget: int | None = None,
        validation_questions: int = 8,
        test_questions: int | None = None,
        combinations: int = 2,
        scramble: bool = False,
        seed: int = 0,
        workers: int = 0,
        template_args: dict[str, Any] | None = None,
        template_date: str | date | None = None,
        skip_bad_rows: float = 0.0,
    ) -> None:
        super().__init__()
        if min(batch_size, eval_batch_size) < 1:
            raise UsageError(f"batch_size is {batch_size}, eval_batch_size {eval_batch_size}: give 1 or more")
        if scramble and batch_size < 2:
            raise UsageError("scramble exchanges levels within a batch, so it needs a batch_size of two or more")
        if token_budget is not None and (token_budget < 1 or not group_by_length):
            raise UsageError(
                f"token_budget = {token_budget}, group_by_length = {group_by_length}: a budget is a positive number of "
                "tokens, and its batches hold rows of like length; leave token_budget out, or group_by_length on"
            )
        if not 0 <= skip_bad_rows < 1:
            raise UsageError(f"data.skip_bad_rows is {skip_bad_rows}: give a share, 0 or more and less than 1")
        self.preferences = preferences
        self.source = source
        self.instruction = instruction or Tags()
        self.sampler = sampler or Uniform()
        self.batch_size = batch_size
        self.eval_batch_size = eval_batch_size
        self.max_length = max_length
        self.group_by_length = group_by_length
        self.token_budget = token_budget
        self.validation_questions = validation_questions
        self.test_questions = test_questions
        self.combinations = combinations
        self.scramble = scramble
        self.seed = seed
        self.workers = workers
        self.template_args = template_args or {}
        self.template_date = None if template_date is None else as_day(template_date, "data.template_date")
        self._today = date.today().isoformat()
        self.skip_bad_rows = skip_bad_rows
        self._usable: dict[tuple[View, Split], list[tuple[int, Example]]] = {}
        self._digests: dict[View, str] = {}
        self._rows: dict[tuple[View, Split], list[Example]] = {}
        self._encoders: list[PairEncoder] = []

    def renderer(self, tokenizer: PreTrainedTokenizerBase) -> PromptRenderer:
        """Returns what writes the prompts of training and evaluation, for use elsewhere."""
        self.pin(tokenizer)
        return PromptRenderer(tokenizer, self.instruction, self.preferences, self._longest(self.max_length))

    def pin(self, tokenizer: PreTrainedTokenizerBase) -> None:
        """Writes ``template_args`` and the date into a tokenizer's chat template, in place.

        Raises:
            UsageError: The template does not read them.
        """
        pin_tokenizer(tokenizer, self.template_args, self.template_date, self._today)

    def take_date(self, tokenizer: PreTrainedTokenizerBase, day: str | None) -> None:
        """Gives a tokenizer's chat template the date of a checkpoint's run, unless ``template_date`` says another."""
        self.pin(tokenizer)
        if day is not None and self.template_date is None and tokenizer_pins(tokenizer)[0].day is not None:
            self._today = day
            self._usable.clear()  # rows that were checked with another date
            pin_tokenizer(tokenizer, {}, day)

    @property
    def day(self) -> str:
        """The date that chat templates are given."""
        return self.template_date or self._today

    def meaning(self) -> Entries:
        """Options that give weights their meaning: lengths, and the form of preferences in prompts."""
        if self._view is not View.POLICY:
            return {"data.max_length": self._pair_length}
        return {
            "data.max_length": self.max_length,
            "data.instruction": described(self.instruction),
            **sample_prompts(self.instruction, self.preferences),
        }

    def resumed_with(self) -> Entries:
        """Options that a run must be resumed with, so that its position among the rows means the same rows."""
        ranks, budget = self._processes[1], self.token_budget
        entries: Entries = {
            "data.seed": self.seed,
            "data.batch_size": None if budget else {"of all processes": self.batch_size * ranks},
            "data.token_budget": {"of all processes": budget * ranks} if budget else None,
            "data.scramble": self.scramble,
        }
        if self._view is not View.POLICY:
            entries["data.group_by_length"] = self.group_by_length
        assert self.trainer is not None
        if (self._view, Split.TRAIN) in self._rows or self.trainer.state.fn == TrainerFn.FITTING:
            if self._view not in self._digests:
                rows = self.rows(self._view, Split.TRAIN)
                self._digests[self._view] = f"{len(rows)} rows, {rows_digest(rows)}"
            entries["data.source"] = self._digests[self._view]
        return entries

    @property
    def instruction_patterns(self) -> tuple[ForbiddenText, ...]:
        """Patterns that read as an instruction in a question or an answer."""
        return instruction_patterns(self.instruction, self.preferences)

    def rows(self, view: View, split: Split) -> list[Example]:
        """Returns the source's rows; they are read once."""
        if (view, split) not in self._rows:
            self._rows[view, split] = self.source.rows(view, split, self.preferences, self.seed)
        return self._rows[view, split]

    def setup(self, stage: str) -> None:
        """Fixes the chat template. The date of a checkpoint is taken later, so that no row is read here.

        Raises:
            UsageError: The module has other preferences, or the chat template does not read what it is given.
        """
        theirs = getattr(self._module, "preferences", self.preferences)
        if theirs != self.preferences:
            raise UsageError(
                f"the data module has the preferences {self.preferences.to_dict()}, but the module has "
                f"{theirs.to_dict()}: give both the same, in the same order"
            )
        if hasattr(self._module, "tokenizer"):
            self._today = self.trainer.strategy.broadcast(self._today)  # type: ignore[union-attr]
            self.pin(self._module.tokenizer)

    def train_dataloader(self) -> ResumableLoader:
        """Full batches, stage after stage, shuffled within each; the position goes into checkpoints.

        Raises:
            UsageError: A stage has too few training rows for one batch.
        """
        self._refuse_few_rows()
        rows = [row for _, row in self._usable_rows(Split.TRAIN)]
        if self.trainer.limit_val_batches:  # type: ignore[union-attr]
            self._usable_rows(Split.VALIDATION)  # a bad row is said now, not when training has gone on for hours
        close_finished_epoch(self.trainer)  # type: ignore[arg-type]
        dataset: SampledPrompts | Pairs
        lengths = start_epoch = budget = None
        if self._view is View.POLICY:
            dataset = SampledPrompts(rows, self.preferences, self.sampler, self.source, self.seed)
            start_epoch = dataset.start_epoch
        else:
            dataset = self._read_pairs(rows)
            if self.workers:
                dataset.encode()
            if not dataset.computed:  # features are all of one length
                budget = dataset.budget(self.token_budget) if self.token_budget else None
                lengths = dataset.lengths() if self.group_by_length and budget is None else None
        repeats: int = getattr(self._module, "batch_repeats", 1)
        rank, ranks = self._processes
        stages = [row.stage for row in rows]
        overfit = bool(self.trainer.overfit_batches)  # type: ignore[union-attr]  # set dynamically
        sampler = RepeatBatchSampler(
            len(rows), self.batch_size, self.seed, repeats, rank, ranks, lengths, stages, overfit, budget
        )
        sampler.set_epoch(self._epoch)  # workers draw ahead, before Lightning sets it
        collate = self._collate(self.scramble)
        return ResumableLoader(dataset, sampler, collate, self._position, self.workers, start_epoch)

    def val_dataloader(self) -> OrderedBatches | list[Any]:
        """Validation rows in order; for a policy, a level sweep. No loader if there are no rows."""
        self._refuse_few_rows()
        rows = self._usable_rows(Split.VALIDATION)
        if self._view is not View.POLICY:
            return self._in_order(self._read_pairs([row for _, row in rows]))
        return self._in_order(requested(rows, [sweep_requests(self.preferences)] * len(rows)))

    def test_dataloader(self) -> OrderedBatches | list[Any]:
        """Test rows in order; for a policy, sweeps, the default and combinations. No loader if there are no rows."""
        rows = self._usable_rows(Split.TEST)
        if self._view is not View.POLICY:
            return self._in_order(self._read_pairs([row for _, row in rows]))
        return self._in_order(requested(rows, [self._test_requests(index) for index, _ in rows]))

    def predict_dataloader(self) -> OrderedBatches | StreamedPairs | list[Any]:
        """Rows of the source's predict split in order; a policy is asked for the levels that a row has.

        Raises:
            UsageError: There are no rows.
        """
        if self._view is View.REWARD:
            return self._streamed()
        if not self.rows(self._view, Split.PREDICT):
            raise UsageError("the source has no rows to answer; a Table takes them from data.source.predict")
        rows = [row for _, row in self._usable_rows(Split.PREDICT)]
        if self._view is View.TEXT:  # questions to be answered: what stands there already is not read
            rows = [dataclasses.replace(row, answer="") for row in rows]
        if self._view is not View.POLICY:
            return self._in_order(self._pairs(rows[self._rows_done(lambda: rows, len(rows)) :]))
        asked = [self._requested(row) for row in rows]
        if not any(asked):
            names = ", ".join(self.preferences.names)
            warnings.warn(f"no row of predict asks for a level: columns named {names} would hold them", stacklevel=2)
        prompts = [Prompt(row.question, asked[i], i) for i, row in enumerate(rows)]
        return self._in_order(FixedPrompts(prompts[self._rows_done(lambda: prompts, len(prompts)) :]))

    def _requested(self, row: Example) -> Preference:
        """The preference that a row of predict asks for."""
        return known_levels(row.requested or row.levels, self.preferences)

    def state_dict(self) -> dict[str, Any]:
        """State of the sampler, with its class; empty where it has none."""
        state = self.sampler.state_dict()
        return {"class": class_key(type(self.sampler)), "sampler": state} if state else {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Inverse of :meth:`state_dict`; another sampler than the checkpoint's starts anew."""
        if state_dict.get("class") == class_key(type(self.sampler)):
            self.sampler.load_state_dict(state_dict["sampler"])

    def transfer_batch_to_device(self, batch: Any, device: torch.device, dataloader_idx: int) -> Any:
        """Moves the tensors of a batch; Lightning's own would copy every row and question, too."""
        if isinstance(batch, Batch):
            return to_device(batch, device)
        return super().transfer_batch_to_device(batch, device, dataloader_idx)

    @property
    def _module(self) -> Any:
        if self.trainer is None:
            raise RuntimeError(
                "PreferenceDataModule serves a module in a Trainer: call trainer.fit(module, datamodule)"
            )
        return self.trainer.lightning_module

    @property
    def _view(self) -> View:
        return View(self._module.batch_view)

    @property
    def _processes(self) -> tuple[int, int]:
        assert self.trainer is not None
        return self.trainer.global_rank, self.trainer.world_size

    @property
    def _epoch(self) -> int:
        """The epoch that Lightning gives to samplers; ``current_epoch`` is behind when an epoch's end is restored."""
        assert self.trainer is not None
        return finished_epochs(self.trainer)

    def _position(self) -> tuple[int, int]:
        """Epoch and finished batches; at its end, the start of the next epoch."""
        assert self.trainer is not None
        done, ready = finished_batches(self.trainer), started_epochs(self.trainer)
        return (ready - 1, done) if done < self.trainer.num_training_batches else (ready, 0)

    def teardown(self, stage: str) -> None:
        """Says what was cut to fit ``max_length``; what worker processes cut is not known here."""
        for encoder in self._encoders:
            if encoder.truncation.questions:
                warnings.warn(f"max_length = {encoder.max_length}: {encoder.truncation}", stacklevel=2)
        self._encoders.clear()
        self._usable.clear()  # another module may come with another tokenizer

    def _usable_rows(self, split: Split) -> list[tuple[int, Example]]:
        """The rows of a split that are used, each with its index in the source; they are checked once.

        Raises:
            UsageError: More than ``skip_bad_rows`` of them cannot be used.
        """
        key = self._view, split
        if key not in self._usable:
            rows = self.rows(self._view, split)
            if self._view is View.POLICY and split is Split.VALIDATION:
                chosen = spread(rows or self.rows(self._view, Split.TRAIN), self.validation_questions)
            elif self._view is View.POLICY and split is Split.TEST and self.test_questions is not None:
                chosen = spread(rows, self.test_questions)
            else:
                chosen = list(enumerate(rows))
            skipped = 0.0 if split is Split.PREDICT else self.skip_bad_rows
            kept = usable_rows([row for _, row in chosen], self._check(split), f"{split.value} rows", skipped)
            self._usable[key] = [chosen[number] for number in kept]
        return self._usable[key]

    def _refuse_few_rows(self) -> None:
        """Says what would only come out after a frozen backbone has run over the rows.

        Raises:
            UsageError: There are too few rows for a batch.
        """
        if self._row_features is not None and self.trainer.state.fn == TrainerFn.FITTING:  # type: ignore[union-attr]
            full_batches([row.stage for _, row in self._usable_rows(Split.TRAIN)], self.batch_size, self._processes[1])

    def _check(self, split: Split) -> Callable[[Example], bool]:
        """Refuses rows that no prompt or pair can be made of."""
        if self._view is View.POLICY:
            renderer = self.renderer(self._module.tokenizer)
            own = split is Split.PREDICT
            return lambda row: renderer.check(row.question, self._requested(row) if own else None)
        encoder = PairEncoder(self._module.tokenizer, self._pair_length, self.instruction_patterns)
        return lambda row: encoder.check(row.question, *(a for a in (row.answer, row.rejected) if a is not None))

    def _pairs(self, rows: list[Example]) -> Pairs:
        return Pairs(rows, self._encoder(self._pair_length))

    def _read_pairs(self, rows: list[Example]) -> Pairs:
        """Pairs for learning and measuring, with features where the module makes them once, not in every batch."""
        pairs = self._pairs(rows)
        if self._row_features is not None and rows:
            pairs.compute(self._row_features)
        return pairs

    @property
    def _row_features(self) -> Callable[[list[list[int]]], Tensor] | None:
        features: Callable[[list[list[int]]], Tensor] | None = getattr(self._module, "row_features", None)
        return features

    @property
    def _pair_length(self) -> int | None:
        """Most tokens of a pair: ours, else what the module was made for, if it knows."""
        limit: int | None = getattr(self._module, "pair_limit", None)
        return self._longest(limit if self.max_length is None else self.max_length)

    def _longest(self, wanted: int | None) -> int | None:
        """Most tokens of a prompt or pair that the module can read, where it knows and ``wanted`` is not less."""
        module = None if self.trainer is None else self.trainer.lightning_module
        longest: Callable[[int | None], int | None] = getattr(module, "longest", lambda wanted: wanted)
        return longest(wanted)

    def _encoder(self, max_length: int | None) -> PairEncoder:
        self._encoders.append(PairEncoder(self._module.tokenizer, max_length, self.instruction_patterns))
        return self._encoders[-1]

    def _streamed(self) -> StreamedPairs:
        """The rows to score. The module may know which were scored already."""

        def rows() -> Iterator[Example]:
            return self.source.stream(View.REWARD, Split.PREDICT, self.preferences, self.seed)

        collate = CollateRewards(self.preferences, pad_id(self._module.tokenizer))
        return StreamedPairs(
            rows, self._encoder(self._pair_length), collate, self.eval_batch_size, self._rows_done(rows)
        )

    def _rows_done(self, rows: Callable[[], Iterable[Any]], count: int | None = None) -> int:
        """Rows that the module has predicted already. Of ``count`` rows the last is left, so that there is a batch."""
        done: Callable[..., int] | None = getattr(self._module, "rows_done", None)
        if done is None:
            return 0
        return done(rows) if count is None else done(rows, self.eval_batch_size, count - 1)

    def _collate(self, scramble: bool = False) -> CollatePrompts | CollateRewards | CollateTexts:
        tokenizer = self._module.tokenizer
        if self._view is View.POLICY:
            return CollatePrompts(self.renderer(tokenizer), scramble)
        if self._view is View.REWARD:
            return CollateRewards(self.preferences, pad_id(tokenizer))
        return CollateTexts(pad_id(tokenizer))

    def _in_order(self, dataset: FixedPrompts | Pairs) -> OrderedBatches | list[Any]:
        if not len(dataset):
            return []
        rank, ranks = self._processes
        return OrderedBatches(dataset, self.eval_batch_size, self._collate(), rank, ranks)

    def _test_requests(self, index: int) -> list[Request]:
        requests = [*sweep_requests(self.preferences), Request(Preference(), "default")]
        for unseen in (False, True):
            seed = derive_seed(self.seed, index)
            requests += combination_requests(self.preferences, self.source, self.combinations, seed, unseen)
        return requests


def spread(rows: list[Example], count: int) -> list[tuple[int, Example]]:
    """Returns ``count`` rows at equal distances, or all if there are fewer, each with its index."""
    return [(index, rows[index]) for index in evenly_spaced(len(rows), count)]


def to_device(batch: Batch, device: torch.device) -> Batch:
    """Returns the batch with its tensors on a device; the rest is shared."""
    moved = copy.copy(batch)
    for field in dataclasses.fields(batch):
        value = getattr(batch, field.name)
        if isinstance(value, Tensor):
            setattr(moved, field.name, value.to(device))
    return moved
