"""The README of an exported classifier, and the record of its training.

The record holds data sources and results as plain data, in checkpoints and in the exported folder. The README has
metadata for the Hugging Face Hub and code that scores with the classifier without moslim.
"""

from __future__ import annotations

import inspect
import json
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from lightning.pytorch import Trainer
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from moslim.data.data_module import PreferenceDataModule
from moslim.data.prompts import around, end_id
from moslim.data.sources.table_files import is_file_name
from moslim.data.types import Source, Split
from moslim.preferences import Dimension, PreferenceSet
from moslim.reward.classifier_export import Form
from moslim.reward.modeling import Pooling, PreferenceClassifierConfig
from moslim.training.identity import class_key
from moslim.utils.files import Result, markdown_table, number, write_text

Record = dict[str, Any]
_FILE = "training.json"


def save_record(record: Record, folder: Path) -> None:
    """Puts a record into a classifier's folder, for the cards of those that are made of it."""
    write_text(folder / _FILE, json.dumps(record, indent=1, allow_nan=True) + "\n")


def saved_record(folder: Path) -> Record:
    """The record in a classifier's folder; empty where there is none."""
    file = folder / _FILE
    return json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}


def training_record(
    trainer: Trainer,
    preferences: PreferenceSet,
    calibration: Mapping[str, Tensor],
    before: Record,
    added: Sequence[str],
) -> Record:
    """Returns what a model card needs to know of a run.

    Args:
        trainer: The Trainer, in ``fit``.
        preferences: The dimensions.
        calibration: What calibrating the weights came to, by the names it is logged under; it may be of a later time
            than the last validation.
        before: The record of the classifier that the run started from; empty if it has none.
        added: The dimensions whose heads alone were trained; empty = all were.

    Returns:
        ``steps``; ``validation``, the last validation's metrics and the calibration's, without ``val/``; and, if the
        rows come from a :class:`~moslim.PreferenceDataModule`, ``sources``, ``rows`` and ``labels``: how
        often each level of each dimension was given. ``before``, if there is one, and
        ``added``, if not all was trained.
    """
    metrics = {**trainer.callback_metrics, **calibration}.items()
    record: Record = {
        "steps": trainer.global_step,
        "validation": {key.removeprefix("val/"): float(value) for key, value in metrics if key.startswith("val/")},
    }
    record |= {"before": before} if before else {}
    record |= {"added": list(added)} if added else {}
    data = trainer.datamodule  # type: ignore[attr-defined]
    if isinstance(data, PreferenceDataModule):
        rows = data.rows(data.view.row_kind(Split.TRAIN), Split.TRAIN)
        record |= {"sources": _described(data.source), "rows": len(rows), "labels": {}}
        for dimension in preferences.dimensions:
            counts = Counter(row.levels.get(dimension.name) for row in rows)
            record["labels"][dimension.name] = [counts[level] for level in range(len(dimension.levels))]
    return record


def of_all_runs(record: Mapping[str, Any], key: str) -> dict[str, Any]:
    """Labels or validation metrics of all heads: of the run that trained each last.

    Args:
        record: The last run's.
        key: ``labels`` or ``validation``, whose keys are made of names parted by ``/``, one of them the dimension's.

    Returns:
        Where heads were added to others, without the means, which are those of some heads only.
    """
    own: dict[str, Any] = record.get(key, {})
    if "added" not in record:
        return own  # all heads were trained: earlier figures are of other weights
    added = set(record["added"])
    earlier = of_all_runs(record.get("before", {}), key).items()
    kept = {name: value for name, value in earlier if not {"mean", *added} & set(name.split("/"))}
    return kept | {name: value for name, value in own.items() if added & set(name.split("/"))}


def _described(source: Source) -> list[dict[str, Any]]:
    chosen = inspect.signature(type(source)).parameters.values()
    values = {one.name: getattr(source, one.name, None) for one in chosen}
    options = {
        one.name: values[one.name]
        for one in chosen
        if isinstance(values[one.name], (str, int, float)) and values[one.name] != one.default
    }
    parts = source.parts()
    own = [{"class": class_key(type(source)), "options": options}] if options or not parts else []
    return own + [described for one in parts for described in _described(one)]


_BACKBONES: dict[Form, str] = {
    "merged": 'backbone = AutoModel.from_pretrained(f"{folder}/backbone").eval()',
    "adapter": """with open(f"{folder}/adapter/base.json", encoding="utf-8") as file:
    base = AutoModel.from_pretrained(json.load(file)["name"], dtype=torch.float32)
backbone = PeftModel.from_pretrained(base, f"{folder}/adapter").eval()""",
}
_POOLED: dict[Pooling, str] = {
    "last": "hidden[-1]",
    "mean": "hidden.mean(0)",
    "first": "hidden[0]",
    "max": "hidden.amax(0)",
}
_SLICE = "raw, outputs = outputs[:WIDTH], outputs[WIDTH:]"
_OWN = """def own_head(name, features):
    \"\"\"Raw outputs of a head that is a network of its own.\"\"\"
    if f"{name}.weight" in heads:
        return F.linear(features, heads[f"{name}.weight"], heads[f"{name}.bias"])
    hidden = F.gelu(F.linear(features, heads[f"{name}.0.weight"], heads[f"{name}.0.bias"]))
    return F.linear(hidden, heads[f"{name}.3.weight"], heads[f"{name}.3.bias"])


"""
_LINKS = {
    "softmax": ("len(levels)", "raw"),
    "corn": ("len(levels) - 1", "(F.pad(F.logsigmoid(raw).cumsum(0), (1, 0)) + F.pad(F.logsigmoid(-raw), (0, 1)))"),
    "regression": (
        "1",
        "(1 - ((raw + (len(levels) - 1) / 2).clamp(0, len(levels) - 1) - torch.arange(len(levels))).abs())"
        ".clamp(min=1e-7).log()",
    ),
}


def plain_use(config: PreferenceClassifierConfig, tokenizer: PreTrainedTokenizerBase, form: Form) -> str:
    """Returns Python code that defines ``score(question, answer)``, with torch, safetensors and transformers alone.

    It gives what :class:`~moslim.Scorer` gives, but for cutting long pairs and taking special tokens out
    of texts.

    Args:
        config: The classifier's configuration.
        tokenizer: Its tokenizer.
        form: The form in which it is exported; the adapter form needs peft as well.
    """
    prompt = 'question + "\\n"'
    if tokenizer.chat_template is not None:
        chat = '[{"role": "user", "content": question}]'
        prompt = f"tokenizer.apply_chat_template(\n        {chat}, tokenize=False, add_generation_prompt=True\n    )"
    before, after = ([], []) if tokenizer.chat_template is not None else around(tokenizer)
    beginning, parting = f"{before} + " if before else "", f" + {after}" if after else ""
    width, logits = _LINKS[config.link]
    linear = config.head_hidden is None
    outputs = '    outputs = F.linear(features, heads["head.weight"], heads["head.bias"])\n' if linear else ""
    hidden = "backbone(input_ids=torch.tensor([ids])).last_hidden_state"
    if config.layer is not None:
        hidden = f"backbone(input_ids=torch.tensor([ids]), output_hidden_states=True).hidden_states[{config.layer}]"
    pooled = [_POOLED[kind] for kind in config.pooling]
    features = pooled[0] if len(pooled) == 1 else f"torch.cat([{', '.join(pooled)}])"
    raw = _SLICE.replace("WIDTH", width) if linear else 'raw = own_head(f"head.{name}", features)'
    if added := [head["dimension"] for head in config.added_heads]:
        own = 'raw = own_head(f"added.{name}", features)'
        raw = f"if name in {added}:\n            {own}\n        else:\n            {raw}"
    own_head = _OWN if "own_head" in raw else ""
    temperature = "" if config.temperatures is None else ' / config["temperatures"][number]'
    peft = "from peft import PeftModel\n" if form == "adapter" else ""
    return f"""import json

import torch
import torch.nn.functional as F
{peft}from safetensors.torch import load_file
from transformers import AutoModel, AutoTokenizer

folder = "."  # where this file lies; from the Hub: huggingface_hub.snapshot_download("owner/name")
with open(f"{{folder}}/config.json", encoding="utf-8") as file:
    config = json.load(file)
heads = load_file(f"{{folder}}/heads.safetensors")
tokenizer = AutoTokenizer.from_pretrained(folder)
{_BACKBONES[form]}


{own_head}@torch.no_grad()
def score(question, answer):
    \"\"\"Probability of every level, by dimension.\"\"\"
    prompt = {prompt}
    ids = {beginning}tokenizer(prompt, add_special_tokens=False)["input_ids"]{parting}
    ids += tokenizer(answer, add_special_tokens=False)["input_ids"] + [{end_id(tokenizer)}]  # the answer's end
    hidden = {hidden}[0].float()
    features = {features}
{outputs}    result = {{}}
    for number, (name, levels) in enumerate(config["dimensions"]):
        {raw}
        logits = {logits}{temperature}
        result[name] = dict(zip(levels, logits.softmax(0).tolist()))
    return result


print(score("How do I make tea?", "Boil some water, pour it over the leaves and wait."))"""


_MEASURES = {
    "accuracy": "accuracy",
    "within_one": "within one level",
    "mae": "MAE",
    "kappa": "quadratic weighted kappa",
}
_TEST_MEASURES = {**_MEASURES, "spearman": "Spearman", "auroc": "AUROC"}
_CALIBRATION = {"ece": "ECE", "brier": "Brier score", "rps": "ranked probability score"}
_CITATION = """@article{moslim2025,
  author  = {Zhang, Yu and Jiang, Wanli and Yang, Zhengyu},
  title   = {MOSLIM: Align with diverse preferences in prompts through reward classification},
  journal = {arXiv preprint arXiv:2505.20336},
  year    = {2025}
}"""


@dataclass
class ModelCard:
    """Contents of a model card.

    Args:
        config: The classifier's configuration.
        tokenizer: Its tokenizer.
        form: The form in which it is exported.
        base: Hub name or folder of the backbone or classifier that training started from.
        record: What is known of the training (:func:`~moslim.reward.classifier_card.training_record`); may be empty.
        tested: The test of these weights (:mod:`~moslim.evaluation.classifier_report`), if there was one.
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
