"""Test, prediction and export of a classifier."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import torch
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from moslim.data.batches import unrounded
from moslim.data.chat_templates import tokenizer_pins
from moslim.data.types import Example, PairBatch
from moslim.data.views import ServedModule
from moslim.evaluation.best_of import BestOf, Candidates
from moslim.evaluation.classifier_measures import complete_weights
from moslim.evaluation.classifier_records import LossMean, ScoreCollector, SubsetMetrics
from moslim.evaluation.classifier_report import evaluate, find_result, publish, scalars
from moslim.ops.adapters import adapter_base
from moslim.ops.length_bucketing import like_length, pass_tokens
from moslim.ops.loading import unwrapped
from moslim.ops.lora import adapter_scales, is_adapted, merged
from moslim.ops.models import Positions, fit_tokenizer, load_tokenizer
from moslim.preferences import PreferenceSet
from moslim.reward.classifier_card import ModelCard, save_record
from moslim.reward.classifier_export import Form, is_classifier, save_adapter, save_merged
from moslim.reward.heads import LINKS
from moslim.reward.losses import BradleyTerry, LevelLoss, LossCounts, PairMetrics, num_comparisons
from moslim.reward.modeling import PreferenceClassifierOutput
from moslim.reward.scorer import Scorer, carried, pair_limit, prediction_rows
from moslim.training.base_module import RunModule
from moslim.training.checkpointing import fingerprint
from moslim.training.distributed import is_sharded
from moslim.training.identity import Entries, architecture, check_identity, keep_identity
from moslim.training.lightning_compat import attached_trainer
from moslim.utils.errors import UsageError
from moslim.utils.folders import refuse_sources, whole_folder


class HeadOutput(NamedTuple):
    """Output of the heads for the run's dimensions.

    Args:
        logits: ``[B, D, K]``, divided by the temperatures in evaluation mode; ``-inf`` on absent levels.
        scores: ``[B, D, S]``, the heads' raw outputs.
    """

    logits: Tensor
    scores: Tensor


class ClassifierEvaluation(RunModule, ServedModule):
    """Module that tests, applies and exports a classifier.

    :class:`RewardClassifier` sets the attributes and adds training.

    Args:
        preferences: The dimensions to evaluate.
        pair_weights: Weight of each dimension in the sum of expected levels by which the test compares completions;
            None = 1 each.
    """

    preferences: PreferenceSet
    start: str
    """Folder or Hub name that the run started from."""
    starts_trained: bool
    """Whether the run starts from a saved classifier, which can be exported without training."""
    adapter_base: str | None
    """Base model if the run starts from an adapter; None = the one that the adapter names."""
    classifier: Any
    loss: LevelLoss
    pairs: BradleyTerry
    best_of: BestOf | None
    report: str | None
    reports_test = True
    output: str | None
    trust_remote_code: bool
    _columns: list[int]
    """Indices of the dimensions of ``preferences`` in the classifier."""

    def __init__(self, preferences: PreferenceSet, pair_weights: dict[str, float] | None) -> None:
        super().__init__()
        self.preferences = preferences
        self.pair_weights = complete_weights(preferences, pair_weights)
        self._losses = LossMean(len(preferences) + 1)
        self._metrics = SubsetMetrics(preferences)
        self._pair_metrics = PairMetrics(preferences)
        self._as_saved: Entries = {}
        self._tested = ScoreCollector(preferences)
        self._choices: list[Candidates] = []
        self._record: dict[str, Any] = {}  # training record of the model card

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """Tokenizer of the model that the run started from."""
        tokenizer = load_tokenizer(self.start, self.trust_remote_code, self.adapter_base)
        return fit_tokenizer(tokenizer, unwrapped(self.classifier).backbone, self.start)

    @property
    def sources(self) -> dict[str, str | None]:
        """Models that the run is built on, by option; no export may replace them."""
        return {"the start": self.start, "model.base": self.adapter_base or adapter_base(self.start)}

    @property
    def pair_limit(self) -> int | None:
        """Maximum number of tokens of a pair if the data module sets no limit; None = no limit."""
        model = unwrapped(self.classifier)
        return pair_limit(model.config, self.tokenizer, model.backbone)

    def longest(self, wanted: int | None) -> int | None:
        """Returns the maximum number of tokens of a pair.

        Args:
            wanted: The data module's limit; None = none.

        Raises:
            UsageError: The backbone cannot read that many tokens.
        """
        return Positions.of(unwrapped(self.classifier).backbone).longest(wanted, self.start)

    @property
    def output_folder(self) -> Path:
        """Folder for the trained classifier. All processes must read this property."""
        return Path(self.output) if self.output else self.run_folder / "classifier"

    # Other preferences would reorder heads of equal width; a change of freeze_backbone changes the trained parameters.
    never_accepted = ("preferences", "model.freeze_backbone")

    def meaning(self) -> Entries:
        """Returns the options that determine the meaning of the classifier's weights."""
        config = unwrapped(self.classifier).config
        return {
            "preferences": config.dimensions,
            "model.pooling": config.pooling,
            "model.layer": config.layer,
            "model.loss (link)": config.link,
            "model.head_hidden": config.head_hidden,
            "model.extend": [[head["dimension"], head["hidden"]] for head in config.added_heads],
            "model.lora": adapter_scales(self.classifier),
            "model.backbone": architecture(config.backbone),
            **super().meaning(),
        }

    def on_validation_start(self) -> None:
        """Checks that the data module encodes texts as in the training of a saved classifier.

        ``setup`` is too early: it precedes the loading of a checkpoint, which has its own record of options.

        Raises:
            UsageError: The length limit or the chat template differs.
        """
        fits = self.trainer.state.fn == TrainerFn.FITTING
        if fits or not self.starts_trained or self.trainer.ckpt_path or self.data is None:
            return
        checkpoint: dict[str, Any] = {}
        keep_identity(checkpoint, self._as_saved, {})
        now = self.meaning()
        present = {name: now[name] for name in self._as_saved}
        accepted = [name for name in self.accept_changes if name in present]  # others are about checkpoints
        check_identity(checkpoint, present, {}, accepted, source=f"the classifier in '{self.start}'")

    on_test_start = on_validation_start

    def on_predict_start(self) -> None:
        """Checks the encoding of texts, then opens the file of predictions."""
        self.on_validation_start()
        super().on_predict_start()

    def _as_it_is(self) -> Entries:
        """Options of the encoding that must not differ from those of a saved classifier; with a date if it has one."""
        pins = tokenizer_pins(self.tokenizer)[0]
        day = {} if pins.day is None else {"data.template_date": pins.day}
        return {"data.max_length": self.pair_limit, "data.template_args": pins.arguments, **day}

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Returns the logits ``[B, D, K]`` of all heads for pairs ``[B, T]``; ``-inf`` on absent levels."""
        return self.classifier(input_ids=input_ids, attention_mask=attention_mask).logits

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        """Restores the precision of labels, which ``bf16-true`` and ``16-true`` round."""
        return unrounded(batch, self.preferences) if isinstance(batch, PairBatch) else batch

    def test_step(self, batch: PairBatch, batch_idx: int) -> None:
        """See Lightning."""
        output = self._output(batch)
        self._add_loss(output.scores, batch)
        self._tested.add(batch, output.logits.softmax(-1), self._logits(output.scores).softmax(-1))

    def on_test_epoch_start(self) -> None:
        """Resets the collected results and reads the file of ``best_of``, so that its errors come before scoring.

        Raises:
            MissingFileError: The file does not exist.
            UsageError: A line of the file is invalid.
        """
        if not (self.starts_trained or self.was_trained or self.trainer.ckpt_path):
            rank_zero_warn("the tested heads were never trained: give --ckpt_path last, or the path of a checkpoint")
        self._tested.clear()
        self._losses.reset()
        self._choices = self.best_of.choices(self.preferences) if self.best_of else []

    def on_test_epoch_end(self) -> None:
        """Logs ``test/...`` and writes the report into the run's folder and into ``report``."""
        self._log_loss("test")
        rows, pairs = self._tested.gathered()
        score = self._scorer().probabilities
        best_of = self.best_of(self._choices, score, self.preferences) if self.best_of else None
        result = {"weights": self._weights(), **evaluate(rows, pairs, self.preferences, self.pair_weights, best_of)}
        self.log_dict({f"test/{key}": value for key, value in scalars(result).items()})
        folders = [self.run_folder, *([Path(self.report)] if self.report else [])]
        if self.trainer.is_global_zero:
            publish(self.trainer, result, folders)

    def predict_step(self, batch: PairBatch, batch_idx: int) -> list[dict[str, Any]]:
        """Returns the records of a batch, which go into the file ``predictions``."""
        classifier = unwrapped(self.classifier)
        probs = classifier.level_probabilities(self._unpadded(batch).logits)
        return prediction_rows(batch.rows, probs, classifier.preferences)

    @classmethod
    def starts_untrained(cls, options: Mapping[str, Any]) -> bool:
        """Whether a run with these options starts with untrained heads."""
        return options.get("classifier") is None

    def predictions_depend_on(self, rows: Callable[[], Iterable[Example]]) -> dict[str, Any]:
        """Returns the data that the scores of a row depend on, besides the row itself."""
        config = unwrapped(self.classifier).config.to_dict()
        return {
            "weights": self._weights(),
            "configuration": {key: config[key] for key in ("dimensions", "pooling", "layer", "link", "temperatures")},
            "max_length": getattr(self.trainer.datamodule, "max_length", None) or self.pair_limit,  # type: ignore[attr-defined]
            "chat_template": hashlib.sha256(repr(self.tokenizer.chat_template).encode()).hexdigest(),
            "precision": str(self.trainer.precision),
        }

    def carried(self, row: Example) -> dict[str, Any]:
        """Returns the fields of a row that its record copies."""
        return carried(row)

    def export(self, folder: str | Path) -> None:
        """Saves the classifier in the merged form of :mod:`moslim.reward.classifier_export`.

        Args:
            folder: Target folder; an earlier classifier in it is replaced.

        Raises:
            UsageError: The folder holds a model that the run is built on, or no classifier.
        """
        refuse_sources(folder, self.sources)
        with whole_folder(Path(folder), is_classifier) as part:
            save_merged(merged(self.classifier), part)
            self._complete(part, "merged")

    def export_adapter(self, folder: str | Path) -> None:
        """Saves adapter and heads in the adapter form of :mod:`moslim.reward.classifier_export`.

        Args:
            folder: Target folder; an earlier classifier in it is replaced.

        Raises:
            UsageError: There is no adapter, it changes more than the backbone, or the folder holds a model that the run
                is built on, or no classifier.
        """
        if not is_adapted(self.classifier):
            raise UsageError("there is no adapter to export, since model.lora is null: use --form merged")
        refuse_sources(folder, self.sources)
        with whole_folder(Path(folder), is_classifier) as part:
            save_adapter(self.classifier, self.start, part)
            self._complete(part, "adapter")

    def _complete(self, folder: Path, form: Form) -> None:
        """Adds tokenizer, model card and training record to an exported classifier."""
        self.tokenizer.save_pretrained(folder)
        config = unwrapped(self.classifier).config
        trainer = attached_trainer(self)  # None outside a run
        root = None if trainer is None else trainer.default_root_dir
        tested = find_result([folder for folder in (root, self.report) if folder], self._weights())
        card = ModelCard(config, self.tokenizer, form, self.start, self._record, tested)
        (folder / "README.md").write_text(card.text(), encoding="utf-8")
        save_record(self._record, folder)

    def _weights(self) -> str:
        return fingerprint(self.classifier.state_dict())

    def _output(self, batch: PairBatch) -> HeadOutput:
        """Returns the output of the heads for the run's dimensions."""
        if batch.features is not None:
            output = self.classifier.classify(batch.features)
        elif self.training:
            output = self.classifier(input_ids=batch.input_ids, attention_mask=batch.attention_mask)
        else:
            output = self._unpadded(batch)
        widest = max(map(LINKS[self.loss.link].width, self.preferences.sizes))
        levels = max(self.preferences.sizes)
        return HeadOutput(output.logits[:, self._columns, :levels], output.scores[:, self._columns, :widest])

    def _unpadded(self, batch: PairBatch) -> PreferenceClassifierOutput:
        """Returns the output for a batch outside training; pairs of similar length share a forward pass."""
        ids, mask = batch.input_ids, batch.attention_mask
        if is_sharded(self.classifier):  # all processes must run the same number of forward passes
            return self.classifier(input_ids=ids, attention_mask=mask)
        lengths = mask.sum(1).tolist()
        parts = list(like_length(lengths, pass_tokens(ids.device)))
        outputs = [
            self.classifier(input_ids=ids[part, : lengths[part[-1]]], attention_mask=mask[part, : lengths[part[-1]]])
            for part in parts
        ]
        positions = torch.tensor([row for part in parts for row in part], device=ids.device).argsort()
        logits, scores = (torch.cat([output[key] for output in outputs])[positions] for key in ("logits", "scores"))
        return PreferenceClassifierOutput(logits=logits, scores=scores)

    def _scores(self, batch: PairBatch) -> Tensor:
        """Returns the heads' raw outputs ``[B, D, S]``."""
        return self._output(batch).scores

    def _logits(self, scores: Tensor) -> Tensor:
        """Returns the logits ``[B, D, K]`` at temperature 1."""
        return LINKS[self.loss.link].logits(scores, self.preferences.sizes)

    def _add_loss(self, scores: Tensor, batch: PairBatch) -> Tensor:
        """Adds a batch to the loss of the epoch and returns its score margins ``[P, D]``."""
        counts = self._loss_counts(batch, scores.dtype)
        unit_count = scores.new_ones(())  # gives sums instead of means
        _, head_losses = self.loss(scores, batch.targets, self.preferences.sizes, unit_count.expand(len(counts.labels)))
        score_margins = self._score_margins(scores, batch)
        comparison_loss = self.pairs(score_margins, batch.comparison_mask, batch.margins, unit_count)
        sums = torch.cat([head_losses, comparison_loss[None]])
        self._losses.update(sums, torch.cat([counts.labels, counts.comparisons[None].to(counts.labels.dtype)]))
        return score_margins

    def _evaluate(self, batch: PairBatch) -> Tensor:
        """Adds a batch to the metrics and returns the heads' scores."""
        scores = self._scores(batch)
        score_margins = self._add_loss(scores, batch)
        self._metrics.update(self._logits(scores).argmax(-1), batch.levels, [row.subset for row in batch.rows])
        self._pair_metrics.update(score_margins, batch.comparison_mask)
        return scores

    def _report(self, stage: str) -> None:
        """Logs the metrics of the epoch."""
        metrics = self._metrics.compute(self.device) | self._pair_metrics.compute()
        self.log_dict({f"{stage}/{key}": value for key, value in metrics.items()})

    def _log_loss(self, stage: str) -> None:
        """Logs the loss over all rows of the epoch and all processes."""
        *head_losses, comparison_loss = self._losses.compute()
        weights = self.loss.weights or [1.0] * len(head_losses)
        labels = torch.stack([weight * head for weight, head in zip(weights, head_losses, strict=True)]).sum()
        self.log(f"{stage}/loss", labels + self.pairs.weight * comparison_loss)
        self._losses.reset()

    def _loss_counts(self, batch: PairBatch, dtype: torch.dtype) -> LossCounts:
        """Returns the denominators of a batch's losses."""
        labels = self.loss.counts(batch.targets.to(dtype), self.preferences.sizes).sum(0)
        return LossCounts(labels, num_comparisons(batch.comparison_mask), batch.comparison_mask.sum())

    def _score_margins(self, scores: Tensor, batch: PairBatch) -> Tensor:
        """Returns the expected level of the chosen completions minus that of the rejected ones, ``[P, D]``."""
        expected = LINKS[self.loss.link].expected(scores, self.preferences.sizes)
        return expected[batch.chosen] - expected[batch.rejected]

    def _scorer(self) -> Scorer:
        """Returns a scorer with the current classifier and the data module's instruction patterns."""
        scorer = Scorer(self.classifier, self.tokenizer)
        scorer.reserve(self.instruction_patterns)
        return scorer
