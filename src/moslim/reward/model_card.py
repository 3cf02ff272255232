"""The README of an exported classifier, with metadata as the Hugging Face Hub reads it."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from transformers import PreTrainedTokenizerBase

from moslim.data.sources.files import is_file_name
from moslim.preferences import Dimension
from moslim.reporting import Result, markdown_table, number
from moslim.reward.classifier import PreferenceClassifierConfig
from moslim.reward.plain_use import plain_use
from moslim.reward.sharing import Form
from moslim.reward.training_record import of_all_runs

_MEASURES = {"accuracy": "accuracy", "within_one": "within one level", "mae": "MAE", "kappa": "weighted kappa"}
_TEST_MEASURES = {**_MEASURES, "spearman": "Spearman", "auroc": "AUROC"}
_CALIBRATION = {"ece": "ECE", "brier": "Brier", "rps": "RPS"}
_CITATION = """@article{moslim2025,
  author  = {Zhang, Yu and Jiang, Wanli and Yang, Zhengyu},
  title   = {MOSLIM: Align with diverse preferences in prompts through reward classification},
  journal = {arXiv preprint arXiv:2505.20336},
  year    = {2025}
}"""


@dataclass
class ModelCard:
    """What a card is made from.

    Args:
        config: The classifier's configuration.
        tokenizer: Its tokenizer.
        form: The form in which it is exported.
        base: Hub name or folder of the backbone or classifier that training started from.
        record: What is known of the training (:func:`~moslim.reward.training_record.training_record`); may be empty.
        tested: The test of these weights (:mod:`~moslim.reward.evaluation.result`), if there was one.
    """

    config: PreferenceClassifierConfig
    tokenizer: PreTrainedTokenizerBase
    form: Form
    base: str
    record: Mapping[str, Any]
    tested: Result | None = None

    def text(self) -> str:
        """Returns the whole README."""
        dimensions = [Dimension(name, tuple(levels)) for name, levels in self.config.dimensions]
        parts = [
            f"---\n{yaml.safe_dump(self._metadata(), sort_keys=False, allow_unicode=True)}---",
            f"# Reward classifier: {', '.join(dimension.name for dimension in dimensions)}",
            "Sorts a question-answer pair into an intensity level on each dimension, and says how probable each level "
            f"is. Made with [MOSLIM](https://arxiv.org/abs/2505.20336) from `{self.base}`.",
            "## Dimensions",
            self._dimensions(dimensions),
            "## Training data",
            self._data(),
            "## Results",
            self._results(dimensions),
            "## Calibration",
            self._calibration(dimensions),
            "## Use with moslim",
            self._use(),
            "## Use without moslim",
            self._plain_use(),
            "## Limits",
            self._limits(),
            "## Citation",
            f"```bibtex\n{_CITATION}\n```",
        ]
        return "\n\n".join(parts) + "\n"

    def _metadata(self) -> dict[str, Any]:
        metadata: dict[str, Any] = {
            "library_name": "moslim",
            "pipeline_tag": "text-classification",
            "tags": ["moslim", "reward-model", "preference"],
        }
        if _is_hub_name(self.base):
            relation = "adapter" if self.form == "adapter" else "finetune"
            metadata |= {"base_model": self.base, "base_model_relation": relation}
        paths = [str(source["options"].get("path", "")) for source in _sources(self.record)]
        datasets = sorted({path for path in paths if _is_hub_name(path)})
        return metadata | ({"datasets": datasets} if datasets else {})

    def _dimensions(self, dimensions: list[Dimension]) -> str:
        labels = of_all_runs(self.record, "labels")
        rows = []
        for dimension in dimensions:
            counts = labels.get(dimension.name)
            given = "-" if counts is None else " / ".join(map(str, counts))
            rows.append([dimension.name, " / ".join(dimension.levels), given])
        return markdown_table(["dimension", "levels, lowest first", "training labels of each"], rows)

    def _data(self) -> str:
        parts: list[str] = []
        record = self.record
        while record:
            lines = [f"{'Before that, ' if parts else ''}{_amount(record)}"]
            for source in record.get("sources", []):
                options = ", ".join(f"{name} = `{value}`" for name, value in source["options"].items())
                lines.append(f"- `{source['class']}`" + (f" with {options}" if options else ""))
            parts.append("\n".join(lines))
            record = record.get("before", {})
        return "\n\n".join(parts) or "Not recorded."

    def _results(self, dimensions: list[Dimension]) -> str:
        parts = []
        if self.tested is not None:
            parts += [f"On {self.tested['n_rows']} test rows:", _test_table(self.tested)]
        found = of_all_runs(self.record, "validation")
        rows = [
            [name, *(number(found.get(f"{name}/{measure}")) for measure in _MEASURES)]
            for name in (*(dimension.name for dimension in dimensions), "mean")
        ]
        if any(cell != "-" for row in rows for cell in row[1:]):
            parts += ["On validation rows:", markdown_table(["dimension", *_MEASURES.values()], rows)]
        return "\n\n".join(parts) or "Not measured: nothing is known of how well this classifier does."

    def _calibration(self, dimensions: list[Dimension]) -> str:
        if self.config.temperatures is None:
            return "Not calibrated: a probability of 0.8 need not mean that the level is right in 80 of 100 cases."
        found = of_all_runs(self.record, "validation")
        rows = []
        for dimension, temperature in zip(dimensions, self.config.temperatures, strict=True):
            places = [f"calibration/{dimension.name}/{measure}" for measure in _CALIBRATION]
            pairs = [(number(found.get(f"{p}/before")), number(found.get(f"{p}/after"))) for p in places]
            shown = ("-" if pair == ("-", "-") else " to ".join(pair) for pair in pairs)
            rows.append([dimension.name, f"{temperature:.2f}", *shown])
        return (
            "One temperature per dimension, fitted on validation rows and applied whenever the classifier scores. "
            "Errors before and after, on questions that were not used for fitting (- where rows were too few):\n\n"
            + markdown_table(["dimension", "temperature", *_CALIBRATION.values()], rows)
        )

    def _use(self) -> str:
        scorer = (
            "from moslim import Scorer\n\n"
            'scorer = Scorer(".")  # this folder, or its name on the Hub\n'
            'print(scorer("How do I make tea?", "Boil some water and pour it over the leaves."))'
        )
        model = (
            "import moslim\nfrom transformers import AutoModelForSequenceClassification\n\n"
            'model = AutoModelForSequenceClassification.from_pretrained(".")'
        )
        parts = [f"```python\n{scorer}\n```"]
        if self.form == "merged":
            parts += ["As a model of transformers:", f"```python\n{model}\n```"]
        else:
            parts.append(f"This folder holds an adapter: loading it loads its base model, `{self.base}`, as well.")
        command = "python main.py predict --model.classifier FOLDER --data.source.predict rows.jsonl"
        note = (
            "This folder holds data only, and needs no config. A config is code, since it names classes that are "
            "imported and called: do not run one that came with a model without having read it."
        )
        return "\n\n".join([*parts, "Score a file of questions and answers:", f"```shell\n{command}\n```", note])

    def _plain_use(self) -> str:
        needed = "torch, safetensors, transformers" + (" and peft" if self.form == "adapter" else "")
        code = plain_use(self.config, self.tokenizer, self.form)
        return (
            f"With {needed}. The probabilities are the same. What is left out: long pairs are not cut, and special "
            "tokens in a text, which could mislead the classifier, are not taken out of it."
            f"\n\n```python\n{code}\n```"
        )

    def _limits(self) -> str:
        lines = [
            "It knows questions and answers like those above, in their languages; elsewhere it says little.",
            "Whoever trains a policy with it should expect answers that please it without being better: judge the "
            "result by something else.",
            "Levels say how strong a trait is, not whether an answer is true, safe or lawful.",
        ]
        if self.config.pair_length is not None:
            lines.append(
                f"It reads {self.config.pair_length} tokens: of longer pairs the question loses its start, then "
                "the answer."
            )
        return "\n".join(f"- {line}" for line in lines)


def _sources(record: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The sources of all runs."""
    return [*record.get("sources", []), *(_sources(record["before"]) if "before" in record else [])]


def _amount(record: Mapping[str, Any]) -> str:
    steps = f"{record['steps']} optimizer steps"
    if "rows" not in record:
        return f"{steps} on unknown rows."
    return f"{record['rows']} question-answer pairs, {steps}, from:"


def _test_table(tested: Result) -> str:
    rows = [
        [name, *(number(found.get(measure)) for measure in _TEST_MEASURES)]
        for name, found in (*tested["dimensions"].items(), ("mean", tested["mean"]))
    ]
    return markdown_table(["dimension", *_TEST_MEASURES.values()], rows)


def _is_hub_name(name: str) -> bool:
    return bool(re.fullmatch(r"[\w.-]+/[\w.-]+", name)) and not Path(name).exists() and not is_file_name(name)
