"""Results of a classifier's test: JSON document, Markdown page, console table and logged metrics.

Keys of the JSON document, ``reward.json``:

| key | holds |
|---|---|
| ``schema`` | version of this document, which additional keys do not change |
| ``weights`` | fingerprint of the weights, added by the test stage |
| ``dimensions`` | by dimension: ``levels``, ``n_rows``, measures, ``recall``, ``confusion``, ``interval`` (95%) |
| ``mean`` | mean of each measure over the dimensions for which it is defined |
| ``baseline`` | by dimension: :func:`~moslim.evaluation.classifier_measures.majority_baseline` |
| ``subsets`` | by subset: ``n_rows``, ``dimensions``, ``mean`` |
| ``length`` | :func:`~moslim.evaluation.classifier_measures.length_dependence` |
| ``correlation`` | :func:`~moslim.evaluation.classifier_measures.head_correlation`; null with one dimension |
| ``pairs`` | :func:`~moslim.evaluation.classifier_measures.pairwise_accuracy`; null without comparisons |
| ``requests`` | :func:`~moslim.evaluation.classifier_measures.proxy_and_gold`; null without requests |
| ``best_of`` | :class:`~moslim.evaluation.BestOf`; null if it is not configured |
| ``calibration`` | by dimension: :func:`~moslim.evaluation.classifier_measures.head_calibration` |
| ``n_rows``, ``n_questions`` | number of labelled answers; number of questions of these and of the comparisons |

The measures are ``accuracy``, ``balanced_accuracy``, ``within_one``, ``mae``, ``kappa`` (quadratic weights),
``macro_f1``, ``spearman`` (of the expected level) and ``auroc`` (two levels). Undefined values are null.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import torch
from lightning.pytorch import Trainer

from moslim.evaluation import classifier_records, plotting
from moslim.evaluation.classifier_measures import (
    MEASURES,
    LabelledRows,
    head_calibration,
    head_correlation,
    length_dependence,
    level_intervals,
    level_measures,
    majority_baseline,
    pairwise_accuracy,
    proxy_and_gold,
    recall,
)
from moslim.evaluation.classifier_records import ScoredComparisons, ScoredRows
from moslim.preferences import PreferenceSet
from moslim.utils.files import (
    Result,
    console_table,
    copy_report,
    log_pictures,
    markdown_pictures,
    markdown_table,
    number,
    plain,
    write_figures,
    write_texts,
)

SCHEMA = 1
"""Version of the JSON document."""


def evaluate(
    rows: ScoredRows,
    comparisons: ScoredComparisons,
    preferences: PreferenceSet,
    pair_weights: Mapping[str, float] | None = None,
    best_of: Result | None = None,
) -> Result:
    """Computes the result of a classifier's test.

    Args:
        rows: Level probabilities and labels.
        comparisons: Score margins of chosen and rejected answers.
        preferences: The dimensions, in the order of the rows.
        pair_weights: See :func:`~moslim.evaluation.classifier_measures.pairwise_accuracy`.
        best_of: Result of :class:`~moslim.evaluation.BestOf`.

    Returns:
        The JSON document as plain data. It does not depend on the order of rows and comparisons.
    """
    names = preferences.names
    heads = {d.name: LabelledRows.of(rows, i, len(d.levels)) for i, d in enumerate(preferences.dimensions)}
    matrices = {name: head.confusions().sum(0) for name, head in heads.items()}
    measured = _measures(rows, preferences)
    subsets = sorted({subset for subset in rows.subsets if subset})
    result = {
        "schema": SCHEMA,
        "dimensions": {
            name: {
                "levels": list(preferences[name].levels),
                **measured["dimensions"][name],
                "recall": recall(matrices[name]),
                "confusion": matrices[name].long(),
                "interval": level_intervals(head),
            }
            for name, head in heads.items()
        },
        "mean": measured["mean"],
        "baseline": {name: majority_baseline(head) for name, head in heads.items()},
        "subsets": {name: _measures(rows.of_subset(name), preferences) for name in subsets},
        "length": length_dependence(rows, names),
        "correlation": head_correlation(rows, names) if len(names) > 1 else None,
        "pairs": pairwise_accuracy(comparisons, preferences, pair_weights) if len(comparisons) else None,
        "requests": proxy_and_gold(rows, names),
        "best_of": best_of,
        "calibration": head_calibration(rows, preferences),
        "n_rows": len(rows),
        "n_questions": len(torch.cat([rows.question, comparisons.question]).unique()),
    }
    return plain(result)


def _measures(rows: ScoredRows, preferences: PreferenceSet) -> Result:
    dimensions: dict[str, Result] = {}
    for i, dimension in enumerate(preferences.dimensions):
        head = LabelledRows.of(rows, i, len(dimension.levels))
        dimensions[dimension.name] = {"n_rows": len(head.levels), **level_measures(head)}
    mean = {key: torch.stack([values[key] for values in dimensions.values()]).nanmean() for key in MEASURES}
    return {"n_rows": len(rows), "dimensions": dimensions, "mean": mean}


TITLES = {
    "accuracy": "accuracy",
    "balanced_accuracy": "balanced accuracy",
    "within_one": "within one level",
    "mae": "MAE",
    "kappa": "quadratic weighted kappa",
    "spearman": "Spearman",
    "macro_f1": "macro F1",
    "auroc": "AUROC",
}
"""Column titles of the measures, in the order of the page."""
_INTERVAL_TITLES = (
    *("accuracy", "majority accuracy", "within one level", "majority within one level"),
    *("quadratic weighted kappa", "AUROC"),
)
_CALIBRATION = {
    "ece": "ECE",
    "classwise_ece": "classwise ECE",
    "brier": "Brier score",
    "rps": "ranked probability score",
}
_CONSOLE = {
    "accuracy": "accuracy",
    "within_one": "within one",
    "mae": "MAE",
    "kappa": "kappa",
    "spearman": "Spearman",
    "auroc": "AUROC",
}
"""Measures and titles that fit a console of 80 columns."""


def summary_table(result: Result) -> str:
    """Formats the main results for the console: a table of the heads, and a line for each further evaluation."""
    measured = {**result["dimensions"], "mean": result["mean"]}
    rows = [
        [name, str(values.get("n_rows", "")), *(number(values[key]) for key in _CONSOLE)]
        for name, values in measured.items()
    ]
    title = f"Reward classifier, {result['n_rows']} labelled answers, {result['n_questions']} questions"
    lines = [console_table(title, ["dimension", "rows", *_CONSOLE.values()], {"": rows})]
    if pairs := result["pairs"]:
        accuracy = number(pairs["weighted"]["accuracy"])
        lines.append(f"comparisons: accuracy {accuracy} of the weighted sum of expected levels\n")
    if requests := result["requests"]:
        proxy, gold = number(requests["mean"]["proxy"]), number(requests["mean"]["gold"])
        lines.append(f"answers to requests: proxy {proxy}, gold {gold}\n")
    if best_of := result["best_of"]:
        accuracy, chance = number(best_of["accuracy"]), number(best_of["chance"])
        lines.append(f"best of {best_of['n_answers']}: accuracy {accuracy}, chance {chance}\n")
    return "".join(lines)


def markdown(result: Result, pictures: Sequence[str] = ()) -> str:
    """Formats the report as a Markdown page; ``pictures`` are names of files in its folder."""
    blocks = [
        "# Reward classifier",
        f"{result['n_rows']} labelled answers, {result['n_questions']} questions.",
        "## Heads",
        markdown_table(["dimension", "rows", *TITLES.values()], _heads(result)),
        "In brackets: 95% bootstrap interval over questions. Majority: constant prediction of the most frequent label.",
        markdown_table(["dimension", *_INTERVAL_TITLES], _intervals(result)),
        *markdown_pictures(pictures),
        "## Recall by level",
        markdown_table(["dimension", "level", "labelled", "predicted", "recall"], _levels(result)),
        *_subsets(result),
        *_length(result),
        *_correlation(result),
        *_pairs(result),
        *_requests(result),
        *_best_of(result),
        *_calibration(result),
    ]
    return "\n\n".join(blocks) + "\n"


def _heads(measured: Result) -> list[list[str]]:
    rows = [
        [name, str(values["n_rows"]), *(number(values[key]) for key in TITLES)]
        for name, values in measured["dimensions"].items()
    ]
    return [*rows, ["**mean**", "", *(number(measured["mean"][key]) for key in TITLES)]]


def _intervals(result: Result) -> list[list[str]]:
    rows = []
    for name, values in result["dimensions"].items():
        baseline = result["baseline"][name]
        cells = {key: _with_interval(values[key], values["interval"].get(key)) for key in TITLES}
        with_baseline = [cell for key in ("accuracy", "within_one") for cell in (cells[key], number(baseline[key]))]
        rows.append([name, *with_baseline, cells["kappa"], cells["auroc"]])
    return rows


def _levels(result: Result) -> list[list[str]]:
    rows = []
    for name, values in result["dimensions"].items():
        matrix = values["confusion"]
        for k, level in enumerate(values["levels"]):
            predicted = sum(row[k] for row in matrix)
            rows.append([name, f"{k} {level}", str(sum(matrix[k])), str(predicted), number(values["recall"][k])])
    return rows


def _subsets(result: Result) -> list[str]:
    if not result["subsets"]:
        return []
    rows = [[subset, *row] for subset, measured in result["subsets"].items() for row in _heads(measured)]
    return ["## By subset", markdown_table(["subset", "dimension", "rows", *TITLES.values()], rows)]


def _length(result: Result) -> list[str]:
    length, names = result["length"], list(result["dimensions"])
    accuracy_rows = [
        [
            f"{bucket['from']} to {bucket['to']}",
            str(bucket["n_rows"]),
            *(number(bucket["accuracy"][name]) for name in names),
        ]
        for bucket in length["buckets"]
    ]
    correlation_rows = [
        [name, number(values["expected"]), number(values["label"])] for name, values in length["spearman"].items()
    ]
    return [
        "## Length of the answer",
        "Accuracy by quartile of length.",
        markdown_table([length["unit"], "rows", *names], accuracy_rows),
        "Spearman's correlation with length. A head that correlates more with length than its labels do rewards length "
        "itself.",
        markdown_table(["dimension", "expected level", "label"], correlation_rows),
    ]


def _correlation(result: Result) -> list[str]:
    correlation = result["correlation"]
    if correlation is None:
        return []
    names = correlation["names"]
    rows = [
        [name, *(f"{number(head, 2)} ({number(label, 2)})" for head, label in zip(heads, labels, strict=True))]
        for name, heads, labels in zip(names, correlation["expected"], correlation["label"], strict=True)
    ]
    return [
        "## Correlation between dimensions",
        "Spearman's correlation of the heads' expected levels, in brackets that of the labels. Mean excess of the "
        f"heads' absolute correlation over that of the labels: {number(correlation['excess'])}.",
        markdown_table(["dimension", *names], rows),
    ]


def _pairs(result: Result) -> list[str]:
    pairs = result["pairs"]
    if pairs is None:
        return []
    weights = ", ".join(f"{name} {weight:g}" for name, weight in pairs["weighted"]["weights"].items())
    by_subset = [[subset, *row] for subset, measured in pairs["subsets"].items() for row in _pair_rows(measured)]
    return [
        "## Comparisons of chosen and rejected answers",
        "Accuracy: share of comparisons whose chosen answer has the higher expected level; a tie counts half. Weights "
        f"of the weighted sum of expected levels: {weights}.",
        markdown_table(["dimension", "comparisons", "accuracy"], _pair_rows(pairs)),
        *([markdown_table(["subset", "dimension", "comparisons", "accuracy"], by_subset)] if by_subset else []),
    ]


def _pair_rows(pairs: Result) -> list[list[str]]:
    scores = {**pairs["dimensions"], "**weighted sum**": pairs["weighted"]}
    return [
        [name, str(values["n_pairs"]), _with_interval(values["accuracy"], values["interval"])]
        for name, values in scores.items()
    ]


def _requests(result: Result) -> list[str]:
    requests = result["requests"]
    if requests is None:
        return []
    rows = [
        [
            *(name, str(values["n_rows"]), number(values["proxy"]), number(values["gold"])),
            _with_interval(values["gap"], values["interval"]),
        ]
        for name, values in {**requests["dimensions"], "**mean**": requests["mean"]}.items()
    ]
    return [
        "## Answers to requests",
        "Proxy: mean probability of the requested level by the classifier. Gold: share of labels that equal the "
        "requested level. Where the gap (proxy minus gold) is above 0, the classifier overrates the policy's answers.",
        markdown_table(["dimension", "answers", "proxy", "gold", "gap"], rows),
    ]


def _best_of(result: Result) -> list[str]:
    best_of = result["best_of"]
    if best_of is None:
        return []
    rows = [
        ["original questions", _with_interval(best_of["accuracy"], best_of["interval"])],
        ["chance", number(best_of["chance"])],
    ]
    if paraphrases := best_of["paraphrases"]:
        rows += [
            ["paraphrases", number(paraphrases["accuracy"])],
            ["original question and all its paraphrases", number(paraphrases["every"])],
        ]
    return [
        f"## Best of {best_of['n_answers']}",
        f"{best_of['n_prompts']} prompts with one answer each that meets the preference. Accuracy: share of them for "
        f"which `{best_of['mapping']}` gives this answer the highest reward.",
        markdown_table(["prompts", "accuracy"], rows),
    ]


def _calibration(result: Result) -> list[str]:
    rows = []
    for name, errors in result["calibration"].items():
        raw = errors and errors["uncalibrated"]
        cells = [
            number(errors[key] if errors else None) + (f" ({number(raw[key])})" if raw else "") for key in _CALIBRATION
        ]
        rows.append([name, *cells])
    return [
        "## Calibration",
        "Lower is better. ECE: expected calibration error of the most probable level; classwise: mean over all levels. "
        "In brackets: before temperature scaling, which was fitted on validation data.",
        markdown_table(["dimension", *_CALIBRATION.values()], rows),
    ]


def _with_interval(value: float | None, interval: Sequence[float | None] | None) -> str:
    if interval is None or interval[0] is None or value is None:
        return number(value)
    return f"{number(value)} [{number(interval[0])}, {number(interval[1])}]"


_RESULT_FILES = ("reward.json", "version_*/reward.json")


def publish(trainer: Trainer, result: Result, folders: Sequence[Path]) -> None:
    """Writes the report into folders, logs its pictures and prints its table; on rank 0 only.

    Args:
        trainer: Trainer of the test.
        result: Result of :func:`evaluate`.
        folders: Folders to write; the pictures of the first one are logged.
    """
    first, *copies = folders
    paths = write_report(result, first)
    log_pictures(trainer.loggers, paths, "test", trainer.global_step)
    for folder in copies:
        paths = copy_report(paths, folder)
    print(summary_table(result))
    print("\n".join(f"{name}: {path}" for name, path in paths.items()))


def write_report(result: Result, folder: str | Path) -> dict[str, Path]:
    """Writes ``reward.json``, ``report.md`` and the pictures, each file atomically; creates the folder.

    Returns:
        Paths by ``json``, ``report``, ``confusion`` and, unless undefined, ``correlation`` and ``reliability``.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    figures = {
        "confusion": plotting.confusion_matrices(result),
        "correlation": plotting.head_correlation(result),
        "reliability": plotting.reliability(result["calibration"]),
    }
    pictures = write_figures(folder, figures)
    page = markdown(result, [path.name for path in pictures.values()])
    return write_texts(folder, "reward", result, page) | pictures


def find_result(folders: Iterable[str | Path], weights: str) -> Result | None:
    """Returns the newest saved result for these weights, or None.

    Args:
        folders: Root folders of runs, or folders of reports.
        weights: Fingerprint of the weights.
    """
    files = {file for folder in folders for pattern in _RESULT_FILES for file in Path(folder).glob(pattern)}
    for file in sorted(files, key=lambda file: file.stat().st_mtime_ns, reverse=True):
        result: Result = json.loads(file.read_text(encoding="utf-8"))
        if result.get("weights") == weights:
            return result
    return None


def scalars(result: Result) -> dict[str, float]:
    """Returns the metrics to log, without undefined values.

    ``{dimension}/{measure}`` and ``mean/{measure}``; ``{subset}/...`` for the measures of validation;
    ``calibration/{dimension}/{ece, classwise_ece, brier, rps}``; ``pairs/{dimension}/accuracy`` and
    ``pairs/weighted/accuracy``; ``requests/{dimension}/{proxy, gold, gap}`` and ``requests/mean/...``;
    ``best_of/accuracy``, ``best_of/paraphrased`` and ``best_of/every_paraphrase``.
    """
    metrics = _level_metrics(result, MEASURES)
    for name, measured in result["subsets"].items():
        subset_metrics = _level_metrics(measured, classifier_records.MEASURES)
        metrics |= {f"{name}/{key}": value for key, value in subset_metrics.items()}
    for name, errors in result["calibration"].items():
        metrics |= {f"calibration/{name}/{key}": errors[key] for key in _CALIBRATION} if errors else {}
    if pairs := result["pairs"]:
        scores = {**pairs["dimensions"], "weighted": pairs["weighted"]}
        metrics |= {f"pairs/{name}/accuracy": values["accuracy"] for name, values in scores.items()}
    if requests := result["requests"]:
        for name, values in {**requests["dimensions"], "mean": requests["mean"]}.items():
            metrics |= {f"requests/{name}/{key}": values[key] for key in ("proxy", "gold", "gap")}
    if best_of := result["best_of"]:
        metrics["best_of/accuracy"] = best_of["accuracy"]
        if paraphrases := best_of["paraphrases"]:
            metrics["best_of/paraphrased"] = paraphrases["accuracy"]
            metrics["best_of/every_paraphrase"] = paraphrases["every"]
    return {key: value for key, value in metrics.items() if value is not None}


def _level_metrics(measured: Result, measures: Sequence[str]) -> dict[str, float | None]:
    by_name = {**measured["dimensions"], "mean": measured["mean"]}
    return {f"{name}/{measure}": values[measure] for name, values in by_name.items() for measure in measures}
