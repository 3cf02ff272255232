"""Evaluation, prediction and export of a policy: level sweeps, judged completions and the steerability report."""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import torch
from lightning.pytorch import Trainer
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from moslim.algorithms.functional import CriticOptions
from moslim.data.chat_templates import asks_for_date, pin_tokenizer, tokenizer_pins
from moslim.data.prompt_batches import Prompt
from moslim.data.types import PromptBatch, Question
from moslim.data.views import ServedModule
from moslim.evaluation.judges import Judge, JudgeInfo
from moslim.evaluation.steerability import Records, measures, steerability
from moslim.evaluation.steerability_report import log_report, scalars, summary_table, write_report
from moslim.generation.base import RolloutEngine
from moslim.ops.adapters import adapter_base
from moslim.ops.loading import save_as_trained
from moslim.ops.logprobs import ForwardConfig
from moslim.ops.lora import LoraOptions, adapter_scales, merged
from moslim.ops.models import Positions, eos_ids, fit_tokenizer, fuse_kernels, load_causal_lm, load_tokenizer
from moslim.policy.generation import CompletionGenerator, Generations, Purpose
from moslim.policy.policy_export import policy_card, write_description
from moslim.policy.policy_models import PolicyModels
from moslim.policy.reward_functions import LevelScorer
from moslim.policy.shared_backbone import Share, load_scorer
from moslim.preferences import PreferenceSet
from moslim.reward.classifier_export import is_classifier
from moslim.training.base_module import RunModule
from moslim.training.checkpointing import fingerprint, keep_plain_hparams, plain_options
from moslim.training.distributed import gathered
from moslim.training.identity import Entries, architecture
from moslim.utils.files import Result, copy_report
from moslim.utils.folders import refuse_sources, whole_folder

TRAINING_CLASSIFIER = JudgeInfo("training classifier", proxy=True)
"""The judge if none is configured: the classifier that gave the rewards."""


class EvaluationCollector:
    """The records of one evaluation, by the model that made the completions (``policy``, ``base``)."""

    def __init__(self) -> None:
        self._records: dict[str, list[Records]] = {}

    def clear(self) -> None:
        """Discards the records of an interrupted evaluation."""
        self._records.clear()

    def add(self, who: str, batch: PromptBatch, generations: Generations, probs: Tensor, judge: Judge | None) -> None:
        """Judges the completions of a batch and records the result.

        Args:
            who: Model that made the completions.
            batch: ``B`` prompts.
            generations: ``N = B * n`` completions.
            probs: ``[N, D, K]`` level probabilities of the training classifier.
            judge: Measures achieved levels; None = the classifier's most probable levels.
        """
        samples = len(generations.texts) // len(batch.questions)
        achieved = (
            probs.argmax(dim=-1).float() if judge is None else judge.levels(generations.questions, generations.texts)
        )
        self._records.setdefault(who, []).append(
            Records(
                question=batch.index.repeat_interleave(samples).cpu(),
                sample=torch.arange(samples).repeat(len(batch.questions)),
                kinds=[kind for kind in batch.kinds for _ in range(samples)],
                targets=batch.targets.repeat_interleave(samples, dim=0).cpu(),
                achieved=achieved.cpu(),
                probs=probs.cpu(),
            )
        )

    def gathered(self, who: str) -> Records:
        """The records of all processes in canonical order; a collective call."""
        parts = [part for of_process in gathered(self._records.pop(who, [])) for part in of_process]
        return Records.concat(parts).canonical()


def publish(trainer: Trainer, result: Result, folders: Sequence[Path]) -> None:
    """Writes the report into folders, sends it to the loggers and prints its table; on rank 0 only.

    Args:
        trainer: Trainer of the test; the metrics of training are found beside its checkpoint.
        result: Steerability result.
        folders: Folders to write; the pictures of the first one go to the loggers.
    """
    checkpoint = trainer.ckpt_path
    metrics = Path(checkpoint).parent.parent / "metrics.csv" if checkpoint else None
    history = metrics if metrics is not None and metrics.exists() else None
    first, *copies = folders
    paths = write_report(result, first, history)
    log_report(trainer.loggers, paths, result, trainer.global_step)
    for folder in copies:
        paths = copy_report(paths, folder)
    print(summary_table(result))
    print("\n".join(f"{name}: {path}" for name, path in paths.items()))


Dtype = Literal["float64", "float32", "bfloat16", "float16"]

_OF_CLASSIFIER = ("dimensions", "pooling", "layer", "link", "temperatures", "pair_length")


class PolicyEvaluation(RunModule, ServedModule):
    """Base class of :class:`~moslim.PolicyTrainer`: models, validation, test, prediction and export.

    Args:
        critic: Options of the critic; None = no critic.
        others: See :class:`~moslim.PolicyTrainer`, whose hyper-parameters are saved here.
    """

    reports_test = True
    preferences: PreferenceSet

    def __init__(
        self,
        *,
        preferences: PreferenceSet,
        model: str,
        classifier: str,
        engine: RolloutEngine,
        judge: Judge | None,
        eval_num_generations: int,
        lora: LoraOptions | None,
        base: str | None,
        dtype: Dtype,
        trust_remote_code: bool,
        forward_config: ForwardConfig,
        gradient_checkpointing: bool,
        liger: bool,
        share_backbone: Share,
        report: str | None,
        predictions: str | None,
        accept_changes: list[str] | None,
        seed: int,
        critic: CriticOptions | None,
    ) -> None:
        super().__init__()
        self.save_hyperparameters(ignore=["critic"])
        keep_plain_hparams(self)
        self.preferences = preferences
        self.model_path = model
        self.base = base
        self.classifier_path = classifier
        self.trust_remote_code = trust_remote_code
        self.judge = judge
        self.eval_num_generations = eval_num_generations
        self.report = report
        self.predictions = predictions
        self.accept_changes = accept_changes or []
        self.seed = seed
        start = load_causal_lm(model, trust_remote_code, getattr(torch, dtype), base)
        if liger:
            fuse_kernels(start)
        self.models = PolicyModels(start, lora, gradient_checkpointing, critic)
        self.policy, self.critic = self.models.policy, self.models.critic
        self.generator = CompletionGenerator(engine, self.tokenizer, eos_ids(self.policy, self.tokenizer))
        self.scorer = load_scorer(classifier, share_backbone, self.models, self.tokenizer)
        columns = preferences.columns_in(self.scorer.preferences, f"classifier in {classifier}")
        self.score = LevelScorer(self.scorer, columns, forward_config)
        if judge is not None:
            judge.setup(preferences)
        self._sweep = EvaluationCollector()

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The policy's tokenizer."""
        tokenizer = load_tokenizer(self.model_path, self.trust_remote_code, self.base)
        return fit_tokenizer(tokenizer, self.policy, self.model_path)

    def longest(self, wanted: int | None) -> int | None:
        """Maximum prompt tokens, given the data module's limit, such that the longest completion fits."""
        completion = self.generator.engine.max_new_tokens
        return Positions.of(self.policy).longest(wanted, self.model_path, completion)

    def meaning(self) -> Entries:
        """Options that give the policy's weights their meaning."""
        engine, classifier = self.generator.engine, self.scorer.classifier.config
        pins, template = tokenizer_pins(self.scorer.tokenizer)
        return {
            "preferences": [[dimension.name, dimension.levels] for dimension in self.preferences.dimensions],
            "model.model": architecture(self.models.policy.config),
            "model.lora": adapter_scales(self.models.policy),
            "model.engine.max_new_tokens": engine.max_new_tokens,
            "model.engine.temperature": engine.temperature,
            "model.engine.top_k": getattr(engine, "top_k", None),
            "model.engine.top_p": getattr(engine, "top_p", 1.0),
            "model.engine.stop_strings": engine.stop_strings,
            "model.engine.stop_ids": sorted({*eos_ids(self.models.policy, self.tokenizer), *engine.stop_ids}),
            "model.classifier": {
                **{name: getattr(classifier, name) for name in _OF_CLASSIFIER},
                "chat_template": template,
                "template_args": pins.arguments,
                "template_date": pins.day,
            },
            **super().meaning(),
        }

    def date_classifier(self, day: str | None = None) -> None:
        """Sets the date of the classifier's chat template, if it needs one and was saved without.

        Args:
            day: Date of the checkpoint's run; None = that of the data module.
        """
        day = getattr(self.data, "template_date", None) or day or getattr(self.data, "day", None)
        if day is not None and self._undated:
            pin_tokenizer(self.scorer.tokenizer, {}, day)

    def take_dates(self, saved: Entries) -> None:
        """See the base class; the classifier's template as well."""
        super().take_dates(saved)
        self.date_classifier(saved.get("model.classifier", {}).get("template_date"))

    @cached_property
    def _undated(self) -> bool:
        tokenizer = self.scorer.tokenizer
        template = None if tokenizer.chat_template is None else tokenizer.get_chat_template()
        return template is not None and asks_for_date(template)

    @property
    def exact_judge(self) -> Judge | None:
        """The judge of training rollouts: the configured one unless it is a learned model."""
        return None if self.judge is None or self.judge.proxy else self.judge

    def settings(self) -> dict[str, Any]:
        """Options for the report by which results are compared."""
        return {}

    @torch.no_grad()
    def _evaluate(self, who: str, model: Any, batch: PromptBatch, judge: Judge | None) -> None:
        rows = zip(batch.index.tolist(), batch.targets.tolist(), strict=True)
        keys = [(self.seed, Purpose.EVALUATE, index, *(target + 1 for target in targets)) for index, targets in rows]
        generations = self.generator(model, batch, keys, self.eval_num_generations)
        self._sweep.add(who, batch, generations, self.score(generations), judge)

    def teardown(self, stage: str) -> None:
        """Warns of texts that were removed from completions before scoring."""
        if self.scorer.taken_out.texts:
            warnings.warn(f"scored by the classifier: {self.scorer.taken_out}", stacklevel=2)

    def on_validation_epoch_start(self) -> None:
        """Discards the records of an interrupted evaluation."""
        self._sweep.clear()
        self.models.gather()

    on_test_epoch_start = on_validation_epoch_start

    def validation_step(self, batch: PromptBatch, batch_idx: int) -> None:
        """Generates a small level sweep, judged by the training classifier, for the choice of checkpoints."""
        self._evaluate("policy", self.policy, batch, None)

    def on_validation_epoch_end(self) -> None:
        """Logs the measures of steerability under ``val/``."""
        self.models.release()
        result = measures(self._sweep.gathered("policy"), self.preferences)
        values = {f"val/{name}": value for name, value in result["mean"].items()}
        for dimension, measured in result["dimensions"].items():
            values |= {f"val/{dimension}/{name}": value for name, value in measured.items()}
        self.log_dict({name: value for name, value in values.items() if value is not None})

    def test_step(self, batch: PromptBatch, batch_idx: int) -> None:
        """Generates the full level sweep with the policy and with the reference, and judges the completions."""
        self._evaluate("policy", self.policy, batch, self.judge)
        with self.models.reference() as reference:
            self._evaluate("base", reference, batch, self.judge)

    def on_test_epoch_end(self) -> None:
        """Writes the steerability report into the run's folder, and a copy into the folder ``report``."""
        self.models.release()
        policy, base = self._sweep.gathered("policy"), self._sweep.gathered("base")
        judge = self.judge.info if self.judge else TRAINING_CLASSIFIER
        result = steerability(policy, base, self.preferences, judge, self.settings())
        self.log_dict({k: v for k, v in scalars(result).items() if "/mean/" in k}, logger=False)
        folders = [self.run_folder, *([Path(self.report)] if self.report else [])]
        if self.trainer.is_global_zero:
            publish(self.trainer, result, folders)

    def predictions_depend_on(self, rows: Callable[[], Iterable[Prompt]]) -> dict[str, Any]:
        """Weights, rendered prompts and sampling options."""
        datamodule = self.trainer.datamodule  # type: ignore[attr-defined]
        renderer = datamodule.renderer(self.tokenizer)
        digest = hashlib.sha256()
        for prompt in rows():
            digest.update(repr(renderer.ids(prompt.question, prompt.preference)).encode())
        return {
            "weights": fingerprint(self.policy.state_dict()),
            "prompts": digest.hexdigest(),
            "preferences": self.preferences.to_dict(),
            "engine": plain_options(self.generator.engine),
            "seed": self.seed,
            "batch_size": datamodule.eval_batch_size,
            "precision": f"{self.trainer.precision}, {self.policy.dtype}",
        }

    def predict_step(self, batch: PromptBatch, batch_idx: int) -> list[dict[str, Any]]:
        """Generates a completion for each prompt; the records are written to the file ``predictions``."""
        keys = [(self.seed, Purpose.PREDICT, index) for index in batch.index.tolist()]
        generations = self.generator(self.policy, batch, keys, 1)
        return [
            {"question": question, "requested": dict(self.preferences.decode(target.cpu()).levels), "answer": text}
            for question, target, text in zip(generations.questions, batch.targets, generations.texts, strict=True)
        ]

    def answer(self, question: Question, levels: Mapping[str, int | str], samples: int = 1) -> list[str]:
        """Generates completions of one question at requested levels, with the data module's instruction.

        Args:
            question: Text or chat.
            levels: Requested level by dimension name, each by its name or its number (0 = lowest); may be empty.
            samples: Number of completions.

        Raises:
            UsageError: The question cannot be rendered as a prompt, e.g. since it is empty.
        """
        renderer = self.trainer.datamodule.renderer(self.tokenizer)  # type: ignore[attr-defined]
        preference = self.preferences.requested(levels)
        renderer.check(question, preference)
        targets = self.preferences.encode(preference)[None].to(self.device)
        ids = torch.tensor([renderer.ids(question, preference)], device=self.device)
        index = torch.zeros(1, dtype=torch.long, device=self.device)
        batch = PromptBatch(ids, torch.ones_like(ids), targets, index, [renderer.question(question)], [""])
        return self.generator(self.policy, batch, [(self.seed, Purpose.PREDICT)], samples).texts

    def export(self, folder: str) -> None:
        """Saves the policy (adapter merged), its tokenizer and a model card in Hugging Face format.

        Its generation config is the one that it was trained with, see :mod:`moslim.ops.loading`.

        Raises:
            UsageError: The folder holds a model that the run is built on, or a classifier.
        """
        sources = {
            "model.model": self.model_path,
            "model.base": adapter_base(self.model_path, self.base),
            "model.classifier": self.classifier_path,
        }
        refuse_sources(folder, sources)
        with whole_folder(Path(folder), lambda place: not is_classifier(place)) as part:
            ends, pad = self.generator.eos_ids, self.generator.pad_id
            save_as_trained(merged(self.policy), part, self.generator.engine, ends, pad)
            self.tokenizer.save_pretrained(part)
            data = self.data
            if data is not None:  # the data module has the instruction
                renderer = data.renderer(self.tokenizer)
                card = policy_card(renderer, self.tokenizer, self.model_path, self.generator.engine)
                (part / "README.md").write_text(card, encoding="utf-8")
                write_description(renderer, self.generator.engine, renderer.max_length, part)
