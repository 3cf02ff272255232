"""The data module of every trainer module."""

from __future__ import annotations

import inspect
import warnings
from datetime import date
from functools import partial
from typing import Any, cast

import torch
from lightning.pytorch import LightningDataModule
from lightning.pytorch.trainer.states import TrainerFn
from transformers import PreTrainedTokenizerBase

from moslim.data.chat_templates import as_day, pin_tokenizer, tokenizer_pins
from moslim.data.loader import Examples, OrderedBatches, RepeatBatchSampler, ResumableLoader, full_batches, usable_rows
from moslim.data.prompt_batches import EvaluationKind, check_names
from moslim.data.prompts import PairEncoder, PromptRenderer, instruction_patterns
from moslim.data.samplers import PreferenceSampler, Uniform
from moslim.data.sanitizing import ForbiddenText
from moslim.data.types import Batch, Example, RowKind, Source, Split, to_device
from moslim.data.views import VIEW_OPTIONS, BatchView, ServedModule, check_served
from moslim.instructions import PreferenceInstruction, Tags
from moslim.preferences import PreferenceSet
from moslim.training.identity import Entries, class_key, described, rows_digest
from moslim.training.lightning_compat import close_finished_epoch, finished_batches, finished_epochs, started_epochs
from moslim.utils.errors import UsageError


class PreferenceDataModule(LightningDataModule):
    """Serves the rows of one source to whatever module is trained, so one ``data:`` block fits every config.

    The module is a :class:`~moslim.data.views.ServedModule`. Its ``batch_view`` decides which rows are read and what
    batches are made of them; the data module reads the rows, checks them when a run begins, puts them in an order that
    a resumed run goes on with, and shares batches out to processes. The Trainer must leave the sampler alone
    (``use_distributed_sampler: false``).

    | view | train | validation | test | predict |
    |---|---|---|---|---|
    | reward, text, instructed text | pairs | pairs | pairs | pairs |
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
        evaluation_kinds: Further requests of a policy's test, besides the sweep, the default and combinations.
        scramble: Control run: in training, a policy's reward follows the levels that another prompt of the batch
            shows (:class:`~moslim.data.prompt_batches.CollatePrompts`). Steerability must vanish.
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
            there is nothing to exchange, ``token_budget`` without ``group_by_length``, or a name of an evaluation kind
            that stands for something else.
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
        evaluation_kinds: list[EvaluationKind] | None = None,
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
        check_names(evaluation_kinds or [], preferences)
        given = locals()
        self._given = {name: given[name] for name in VIEW_OPTIONS}
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
        self.evaluation_kinds = evaluation_kinds or []
        self.scramble = scramble
        self.seed = seed
        self.workers = workers
        self.template_args = template_args or {}
        self.template_date = None if template_date is None else as_day(template_date, "data.template_date")
        self._today = date.today().isoformat()
        self.skip_bad_rows = skip_bad_rows
        self._usable: dict[Split, list[tuple[int, Example]]] = {}
        self._digests: dict[RowKind, str] = {}
        self._rows: dict[tuple[RowKind, Split], list[Example]] = {}
        self._encoders: list[PairEncoder] = []

    @property
    def module(self) -> ServedModule:
        """The module that is served.

        Raises:
            RuntimeError: There is no Trainer.
        """
        if self.trainer is None:
            raise RuntimeError(
                "PreferenceDataModule serves a module in a Trainer: call trainer.fit(module, datamodule)"
            )
        return cast(ServedModule, self.trainer.lightning_module)

    @property
    def view(self) -> BatchView:
        """The module's batch view."""
        return self.module.batch_view

    @property
    def token_limit(self) -> int | None:
        """Most tokens of a text: ``max_length``, else what the module was made for or can read, where it knows."""
        if self.trainer is None:
            return self.max_length
        module = self.module
        return module.longest(module.pair_limit if self.max_length is None else self.max_length)

    def renderer(self, tokenizer: PreTrainedTokenizerBase) -> PromptRenderer:
        """Returns what writes the prompts of training and evaluation, for use elsewhere."""
        self.pin(tokenizer)
        return PromptRenderer(tokenizer, self.instruction, self.preferences, self.token_limit)

    def pair_encoder(self, max_length: int | None) -> PairEncoder:
        """Returns what makes ids of questions, with or without an instruction, and answers.

        Args:
            max_length: Most tokens of question and answer.
        """
        instruct = partial(self.instruction.render, preferences=self.preferences)
        return PairEncoder(self.module.tokenizer, max_length, self.instruction_patterns, instruct)

    def counting_encoder(self) -> PairEncoder:
        """Returns the same with :attr:`token_limit`; what it had to cut is said at the end of the run."""
        self._encoders.append(self.pair_encoder(self.token_limit))
        return self._encoders[-1]

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
        return self.view.meaning(self)

    def resumed_with(self) -> Entries:
        """Options that a run must be resumed with, so that its position among the rows means the same rows."""
        ranks, budget = self._processes[1], self.token_budget
        entries: Entries = {
            "data.seed": self.seed,
            "data.batch_size": None if budget else {"of all processes": self.batch_size * ranks},
            "data.token_budget": {"of all processes": budget * ranks} if budget else None,
            "data.scramble": self.scramble,
            "model.batch_view": described(self.view),
        }
        if "group_by_length" in self.view.options:
            entries["data.group_by_length"] = self.group_by_length
        assert self.trainer is not None
        kind = self.view.row_kind(Split.TRAIN)
        if (kind, Split.TRAIN) in self._rows or self.trainer.state.fn == TrainerFn.FITTING:
            if kind not in self._digests:
                rows = self.rows(kind, Split.TRAIN)
                self._digests[kind] = f"{len(rows)} rows, {rows_digest(rows)}"
            entries["data.source"] = self._digests[kind]
        return entries

    @property
    def instruction_patterns(self) -> tuple[ForbiddenText, ...]:
        """Patterns that read as an instruction in a question or an answer."""
        return instruction_patterns(self.instruction, self.preferences)

    def rows(self, kind: RowKind, split: Split) -> list[Example]:
        """Returns the source's rows; they are read once."""
        if (kind, split) not in self._rows:
            self._rows[kind, split] = self.source.rows(kind, split, self.preferences, self.seed)
        return self._rows[kind, split]

    def usable_rows(self, split: Split) -> list[tuple[int, Example]]:
        """Returns the rows of a split that are used, each with its index in the source; they are checked once.

        Raises:
            UsageError: More than ``skip_bad_rows`` of them cannot be used.
        """
        if split not in self._usable:
            rows = self.view.rows(self, split)
            skipped = 0.0 if split is Split.PREDICT else self.skip_bad_rows
            check = self.view.check(self, split)
            kept = usable_rows([row for _, row in rows], check, f"{split.value} rows", skipped)
            self._usable[split] = [rows[number] for number in kept]
        return self._usable[split]

    def in_order(self, examples: Examples, split: Split) -> OrderedBatches | list[Any]:
        """Returns batches of all examples in order; none if there are no examples."""
        if not len(examples):
            return []
        rank, ranks = self._processes
        return OrderedBatches(examples, self.eval_batch_size, self.view.collate(self, split), rank, ranks)

    def setup(self, stage: str) -> None:
        """Fixes the chat template. The date of a checkpoint is taken later, so that no row is read here.

        Raises:
            UsageError: The module cannot be served or has other preferences, its view does not use an option that is
                given, or the chat template does not read what it is given.
        """
        module = self.module
        defaults = inspect.signature(PreferenceDataModule).parameters
        check_served(module, [name for name, value in self._given.items() if value != defaults[name].default])
        if module.preferences is not None and module.preferences != self.preferences:
            raise UsageError(
                f"the data module has the preferences {self.preferences.to_dict()}, but the module has "
                f"{module.preferences.to_dict()}: give both the same, in the same order"
            )
        self._usable.clear()  # another module may come with another view or tokenizer
        self._today = self.trainer.strategy.broadcast(self._today)  # type: ignore[union-attr]
        self.pin(module.tokenizer)

    def train_dataloader(self) -> ResumableLoader:
        """Full batches, stage after stage, shuffled within each; the position goes into checkpoints.

        Raises:
            UsageError: A stage has too few training rows for one batch.
        """
        self._refuse_few_rows()
        rows = self.usable_rows(Split.TRAIN)
        if self.trainer.limit_val_batches:  # type: ignore[union-attr]
            self.usable_rows(Split.VALIDATION)  # a bad row is said now, not when training has gone on for hours
        close_finished_epoch(self.trainer)  # type: ignore[arg-type]
        examples = self.view.examples(self, rows, Split.TRAIN)
        if self.workers:
            examples.prepare()
        budget = examples.budget(self.token_budget) if self.token_budget else None
        groups = self.group_by_length and "group_by_length" in self.view.options and budget is None
        rank, ranks = self._processes
        sampler = RepeatBatchSampler(
            len(rows),
            self.batch_size,
            self.seed,
            self.module.batch_repeats,
            rank,
            ranks,
            lengths=examples.lengths() if groups else None,
            stages=[row.stage for _, row in rows],
            same_epochs=bool(self.trainer.overfit_batches),  # type: ignore[union-attr]  # set dynamically
            budget=budget,
        )
        sampler.set_epoch(self._epoch)  # workers draw ahead, before Lightning sets it
        collate = self.view.collate(self, Split.TRAIN)
        return ResumableLoader(examples, sampler, collate, self._position, self.workers, examples.start_epoch)

    def val_dataloader(self) -> OrderedBatches | list[Any]:
        """Validation rows in order; for a policy, a level sweep. No loader if there are no rows."""
        self._refuse_few_rows()
        return self._evaluation(Split.VALIDATION)

    def test_dataloader(self) -> OrderedBatches | list[Any]:
        """Test rows in order; for a policy, sweeps, the default and combinations. No loader if there are no rows."""
        return self._evaluation(Split.TEST)

    def _evaluation(self, split: Split) -> OrderedBatches | list[Any]:
        return self.in_order(self.view.examples(self, self.usable_rows(split), split), split)

    def predict_dataloader(self) -> Any:
        """Rows of the source's predict split in order; a policy is asked for the levels that a row has.

        Raises:
            UsageError: There are no rows.
        """
        return self.view.predict_batches(self)

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

    def _refuse_few_rows(self) -> None:
        """Says what would only come out after a frozen backbone has run over the rows.

        Raises:
            UsageError: There are too few rows for a batch.
        """
        if self.module.row_features is not None and self.trainer.state.fn == TrainerFn.FITTING:  # type: ignore[union-attr]
            full_batches([row.stage for _, row in self.usable_rows(Split.TRAIN)], self.batch_size, self._processes[1])
