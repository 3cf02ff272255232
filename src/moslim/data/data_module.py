"""Data module, which serves the rows of a source to any module."""

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
    """Serves the rows of a source to any module, so that the same ``data:`` block fits every config.

    The module is a :class:`~moslim.data.views.ServedModule`, whose ``batch_view`` defines the form of the batches. The
    data module reads the rows, checks them at the start of a run, orders them so that a run can be resumed, and splits
    batches among processes. It requires ``trainer.use_distributed_sampler: false``.

    | view | train | validation | test | predict |
    |---|---|---|---|---|
    | reward, text, instructed text | pairs | pairs | pairs | pairs |
    | policy | sampled preferences | level sweep on a few questions | sweep, default, combinations | the rows' levels |

    Args:
        preferences: Dimensions in use; must equal those of the module.
        source: Source of the rows.
        instruction: Instruction that writes a preference into a prompt. Default: :class:`~moslim.instructions.Tags`.
        sampler: Sampler of the preferences in training. Default: :class:`~moslim.data.Uniform`.
        batch_size: Rows of a training batch, per process.
        eval_batch_size: Rows of a batch in validation, test and predict, per process.
        max_length: Most tokens of a prompt (policy view) or pair (other views). Longer questions are cut from their
            start. None = most tokens that the model can read, if it has a table of positions; else no limit.
        group_by_length: Whether pairs of similar length share a training batch, for less padding.
        token_budget: Most tokens, padding included, of a training batch of pairs per process, instead of a number of
            rows. Pairs of similar length share a batch, and no row is dropped.
        validation_questions: Number of questions for the level sweep of a policy in validation, taken from the training
            rows if the source has no validation rows.
        test_questions: Number of questions in the test of a policy; None = all.
        combinations: Number of requests of two or more dimensions per test question, from those allowed in training
            (``seen``), and as many from those that the source holds out (``unseen``), if any.
        evaluation_kinds: Further requests in the test of a policy, besides sweep, default and combinations.
        scramble: Whether the reward of each training prompt follows the levels of another prompt in the batch
            (:class:`~moslim.data.prompt_batches.CollatePrompts`). Steerability must vanish in such a control run.
        seed: Seed of the source, of the order of rows and of the preferences drawn.
        workers: Number of processes that prepare training batches; 0 = the main process.
        template_args: Values of variables of the tokenizer's chat template, e.g. ``enable_thinking: false``. They are
            written into the template, also of an exported model.
        template_date: Date that the chat template writes into prompts, as ``YYYY-MM-DD``; also written into the
            template. None = date of the loaded checkpoint or model, else today.
        skip_bad_rows: Largest share of unusable training, validation or test rows, which are left out: an empty user
            turn, a chat that the template refuses, a system message that fills ``max_length``. All rows are checked at
            the start of a run. In predict, every row must be usable.

    Raises:
        UsageError: A batch size is below 1, ``skip_bad_rows`` is no share, ``scramble`` is set with a batch size of 1,
            ``token_budget`` without ``group_by_length``, or the name of an evaluation kind is taken.
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
        """Module that the Trainer runs.

        Raises:
            RuntimeError: No Trainer is attached.
        """
        if self.trainer is None:
            raise RuntimeError(
                "PreferenceDataModule serves a module in a Trainer: call trainer.fit(module, datamodule)"
            )
        return cast(ServedModule, self.trainer.lightning_module)

    @property
    def view(self) -> BatchView:
        """Batch view of the module."""
        return self.module.batch_view

    @property
    def token_limit(self) -> int | None:
        """Most tokens of a text: ``max_length``, else the limit of the module, if it has one."""
        if self.trainer is None:
            return self.max_length
        module = self.module
        return module.longest(module.pair_limit if self.max_length is None else self.max_length)

    def renderer(self, tokenizer: PreTrainedTokenizerBase) -> PromptRenderer:
        """Returns the renderer of training and evaluation prompts. Calls :meth:`pin` on the tokenizer."""
        self.pin(tokenizer)
        return PromptRenderer(tokenizer, self.instruction, self.preferences, self.token_limit)

    def pair_encoder(self, max_length: int | None) -> PairEncoder:
        """Returns an encoder of question-answer pairs.

        Args:
            max_length: Most tokens of a pair; None = no limit.
        """
        instruct = partial(self.instruction.render, preferences=self.preferences)
        return PairEncoder(self.module.tokenizer, max_length, self.instruction_patterns, instruct)

    def counting_encoder(self) -> PairEncoder:
        """Returns an encoder with :attr:`token_limit`, whose cuts are reported at the end of the run."""
        self._encoders.append(self.pair_encoder(self.token_limit))
        return self._encoders[-1]

    def pin(self, tokenizer: PreTrainedTokenizerBase) -> None:
        """Writes ``template_args`` and the date into a tokenizer's chat template, in place.

        Raises:
            UsageError: The template does not read one of them.
        """
        pin_tokenizer(tokenizer, self.template_args, self.template_date, self._today)

    def take_date(self, tokenizer: PreTrainedTokenizerBase, day: str | None) -> None:
        """Writes the date of a checkpoint into a tokenizer's chat template, unless ``template_date`` is given."""
        self.pin(tokenizer)
        if day is not None and self.template_date is None and tokenizer_pins(tokenizer)[0].day is not None:
            self._today = day
            self._usable.clear()  # checked with another date
            pin_tokenizer(tokenizer, {}, day)

    @property
    def day(self) -> str:
        """Date that is written into chat templates."""
        return self.template_date or self._today

    def meaning(self) -> Entries:
        """Returns the options that trained weights depend on: lengths and the form of the instruction."""
        return self.view.meaning(self)

    def resumed_with(self) -> Entries:
        """Returns the options that must not change when a run is resumed, so that its position stays valid."""
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
        """Patterns that read as an instruction and are removed from questions and answers."""
        return instruction_patterns(self.instruction, self.preferences)

    def rows(self, kind: RowKind, split: Split) -> list[Example]:
        """Returns the rows of the source, which are read once."""
        if (kind, split) not in self._rows:
            self._rows[kind, split] = self.source.rows(kind, split, self.preferences, self.seed)
        return self._rows[kind, split]

    def usable_rows(self, split: Split) -> list[tuple[int, Example]]:
        """Returns the usable rows of a split, each with its index in the source. They are checked once.

        Raises:
            UsageError: The share of unusable rows is above ``skip_bad_rows``.
        """
        if split not in self._usable:
            rows = self.view.rows(self, split)
            skipped = 0.0 if split is Split.PREDICT else self.skip_bad_rows
            check = self.view.check(self, split)
            kept = usable_rows([row for _, row in rows], check, f"{split.value} rows", skipped)
            self._usable[split] = [rows[index] for index in kept]
        return self._usable[split]

    def in_order(self, examples: Examples, split: Split) -> OrderedBatches | list[Any]:
        """Returns batches of all examples in order; an empty list if there are no examples."""
        if not len(examples):
            return []
        rank, ranks = self._processes
        return OrderedBatches(examples, self.eval_batch_size, self.view.collate(self, split), rank, ranks)

    def setup(self, stage: str) -> None:
        """Checks the module and writes into its chat template. Reads no rows, since a checkpoint may change the date.

        Raises:
            UsageError: The module cannot be served or has other preferences, its view does not use an option that is
                given, or the chat template does not read an argument or date.
        """
        module = self.module
        defaults = inspect.signature(PreferenceDataModule).parameters
        check_served(module, [name for name, value in self._given.items() if value != defaults[name].default])
        if module.preferences is not None and module.preferences != self.preferences:
            raise UsageError(
                f"the data module has the preferences {self.preferences.to_dict()}, but the module has "
                f"{module.preferences.to_dict()}: give both the same, in the same order"
            )
        self._usable.clear()  # another module may have another view or tokenizer
        self._today = self.trainer.strategy.broadcast(self._today)  # type: ignore[union-attr]
        self.pin(module.tokenizer)

    def train_dataloader(self) -> ResumableLoader:
        """Returns a loader of full batches, shuffled within each stage, whose position goes into checkpoints.

        Raises:
            UsageError: A stage has too few training rows for one batch.
        """
        self._refuse_few_rows()
        rows = self.usable_rows(Split.TRAIN)
        if self.trainer.limit_val_batches:  # type: ignore[union-attr]
            self.usable_rows(Split.VALIDATION)  # reports unusable rows before training
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
        """Returns a loader of the validation rows in order; for a policy, of a level sweep. Empty without rows."""
        self._refuse_few_rows()
        return self._evaluation(Split.VALIDATION)

    def test_dataloader(self) -> OrderedBatches | list[Any]:
        """Returns a loader of the test rows in order; for a policy, of all evaluation kinds. Empty without rows."""
        return self._evaluation(Split.TEST)

    def _evaluation(self, split: Split) -> OrderedBatches | list[Any]:
        return self.in_order(self.view.examples(self, self.usable_rows(split), split), split)

    def predict_dataloader(self) -> Any:
        """Returns batches of the predict rows in order; a policy is asked for the levels of the rows.

        Raises:
            UsageError: There are no rows.
        """
        return self.view.predict_batches(self)

    def state_dict(self) -> dict[str, Any]:
        """Returns the state and class of the sampler; empty if it has no state."""
        state = self.sampler.state_dict()
        return {"class": class_key(type(self.sampler)), "sampler": state} if state else {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restores the sampler, unless it is of another class than the one in the checkpoint."""
        if state_dict.get("class") == class_key(type(self.sampler)):
            self.sampler.load_state_dict(state_dict["sampler"])

    def transfer_batch_to_device(self, batch: Any, device: torch.device, dataloader_idx: int) -> Any:
        """Moves the tensors of a batch. Lightning's default would also copy all rows and questions."""
        if isinstance(batch, Batch):
            return to_device(batch, device)
        return super().transfer_batch_to_device(batch, device, dataloader_idx)

    @property
    def _processes(self) -> tuple[int, int]:
        assert self.trainer is not None
        return self.trainer.global_rank, self.trainer.world_size

    @property
    def _epoch(self) -> int:
        """Epoch that Lightning gives to samplers; ``current_epoch`` lags after resuming at the end of an epoch."""
        assert self.trainer is not None
        return finished_epochs(self.trainer)

    def _position(self) -> tuple[int, int]:
        """Returns the epoch and its finished batches; at the end of an epoch, the start of the next one."""
        assert self.trainer is not None
        done, started = finished_batches(self.trainer), started_epochs(self.trainer)
        return (started - 1, done) if done < self.trainer.num_training_batches else (started, 0)

    def teardown(self, stage: str) -> None:
        """Warns of texts that were cut to fit ``max_length``, except those cut in worker processes."""
        for encoder in self._encoders:
            if encoder.truncation.questions:
                warnings.warn(f"max_length = {encoder.max_length}: {encoder.truncation}", stacklevel=2)
        self._encoders.clear()

    def _refuse_few_rows(self) -> None:
        """Checks the number of training rows before a frozen backbone computes their features.

        Raises:
            UsageError: There are too few rows for a batch.
        """
        if self.module.row_features is not None and self.trainer.state.fn == TrainerFn.FITTING:  # type: ignore[union-attr]
            full_batches([row.stage for _, row in self.usable_rows(Split.TRAIN)], self.batch_size, self._processes[1])
