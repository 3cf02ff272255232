"""The result of a classifier's test: JSON document, Markdown page and logged figures.

Keys of the JSON document, ``reward.json``:

| key | holds |
|---|---|
| ``schema`` | version of this document; a key that is added does not change it |
| ``weights`` | added by the test stage: a fingerprint of the weights that were tested |
| ``dimensions`` | by dimension: ``levels``, ``n_rows``, measures, ``recall``, ``confusion``, ``interval`` (95%) |
| ``mean`` | each measure's mean over the dimensions where it is defined |
| ``baseline`` | by dimension: always the most frequent label of these rows: ``level``, ``accuracy``, ``within_one`` |
| ``subsets`` | by subset: ``n_rows``, ``dimensions``, ``mean`` |
| ``length`` | :func:`~moslim.evaluation.classifier_measures.length_dependence` |
| ``correlation`` | :func:`~moslim.evaluation.classifier_measures.head_correlation`; null with one dimension |
| ``pairs`` | :func:`~moslim.evaluation.classifier_measures.pairwise`; null without compared answers |
| ``requests`` | :func:`~moslim.evaluation.classifier_measures.proxy_and_gold`; null where no row was asked for |
| ``best_of`` | :class:`~moslim.evaluation.BestOf`; null without its file |
| ``calibration`` | by dimension: :func:`~moslim.evaluation.classifier_measures.calibration_of` |
| ``n_rows``, ``n_questions`` | labelled answers; questions that they, or compared answers, belong to |

The measures are ``accuracy``, ``balanced_accuracy``, ``within_one``, ``mae``, ``kappa`` (quadratic weights),
``macro_f1``, ``spearman`` (of the expected level) and ``auroc`` (two levels). What is not defined is null.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import torch
from lightning.pytorch import Trainer

from moslim.evaluation import classifier_records as metrics
from moslim.evaluation import plotting as plots
from moslim.evaluation.classifier_measures import (
    MEASURES,
    Labelled,
    calibration_of,
    head_correlation,
    length_dependence,
    level_intervals,
    level_measures,
    majority,
    pairwise,
    proxy_and_gold,
    recall,
)
from moslim.evaluation.classifier_records import ScoredPairs, ScoredRows
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


def evaluate(
    rows: ScoredRows,
    pairs: ScoredPairs,
    preferences: PreferenceSet,
    pair_weights: Mapping[str, float] | None = None,
    best_of: Result | None = None,
) -> Result:
    """Measures a classifier.

    Args:
        rows: Its probabilities beside labels.
        pairs: Its expected levels of compared answers.
        preferences: The dimensions, in the order of the rows.
        pair_weights: See :func:`~moslim.evaluation.classifier_measures.pairwise`.
        best_of: What :class:`~moslim.evaluation.BestOf` found.

    Returns:
        Plain data that :mod:`json` writes as it is; see the module. It does not depend on the order of rows and pairs.
    """
    names = preferences.names
    heads = {d.name: Labelled.of(rows, i, len(d.levels)) for i, d in enumerate(preferences.dimensions)}
    matrices = {name: head.confusions().sum(0) for name, head in heads.items()}
    measured = _measured(rows, preferences)
    named = sorted({subset for subset in rows.subsets if subset})
    found = {
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
        "baseline": {name: majority(head) for name, head in heads.items()},
        "subsets": {name: _measured(rows.of_subset(name), preferences) for name in named},
        "length": length_dependence(rows, names),
        "correlation": head_correlation(rows, names) if len(names) > 1 else None,
        "pairs": pairwise(pairs, preferences, pair_weights) if len(pairs) else None,
        "requests": proxy_and_gold(rows, names),
        "best_of": best_of,
        "calibration": calibration_of(rows, preferences),
        "n_rows": len(rows),
        "n_questions": len(torch.cat([rows.question, pairs.question]).unique()),
    }
    return plain(found)


def _measured(rows: ScoredRows, preferences: PreferenceSet) -> Result:
    dimensions: dict[str, Result] = {}
    for i, dimension in enumerate(preferences.dimensions):
        head = Labelled.of(rows, i, len(dimension.levels))
        dimensions[dimension.name] = {"n_rows": len(head.levels), **level_measures(head)}
    mean = {m: torch.stack([found[m] for found in dimensions.values()]).nanmean() for m in MEASURES}
    return {"n_rows": len(rows), "dimensions": dimensions, "mean": mean}


TITLES = {
    "accuracy": "accuracy",
    "balanced_accuracy": "balanced",
    "within_one": "within one",
    "mae": "MAE",
    "kappa": "QW kappa",
    "spearman": "Spearman",
    "macro_f1": "macro F1",
    "auroc": "AUROC",
}
"""Measures in the order in which people should read them."""
_CALIBRATION = {"ece": "ECE", "classwise_ece": "classwise ECE", "brier": "Brier", "rps": "RPS"}


_CONSOLE = ("accuracy", "within_one", "mae", "kappa", "spearman", "auroc")
"""Measures that fit a console of 80 columns."""


def summary_table(result: Result) -> str:
    """The main figures as plain text for the console: a table of the heads, and a line for each further measurement."""
    parts = {**result["dimensions"], "mean": result["mean"]}
    rows = [[name, str(part.get("n_rows", "")), *(number(part[m]) for m in _CONSOLE)] for name, part in parts.items()]
    title = f"Reward classifier, {result['n_rows']} labelled answers, {result['n_questions']} questions"
    lines = [console_table(title, ["dimension", "rows", *(TITLES[m] for m in _CONSOLE)], {"": rows})]
    if pairs := result["pairs"]:
        accuracy = number(pairs["weighted"]["accuracy"])
        lines.append(f"compared answers, weighted sum of the heads: accuracy {accuracy}\n")
    if asked := result["requests"]:
        mean = asked["mean"]
        lines.append(f"answers to requests: proxy {number(mean['proxy'])}, gold {number(mean['gold'])}\n")
    if found := result["best_of"]:
        lines.append(
            f"best of {found['n_answers']}: accuracy {number(found['accuracy'])}, by chance {number(found['chance'])}\n"
        )
    return "".join(lines)


def markdown(result: Result, pictures: Sequence[str] = ()) -> str:
    """The report; ``pictures`` are file names beside it."""
    blocks = [
        "# Reward classifier",
        f"{result['n_rows']} labelled answers, {result['n_questions']} questions.",
        "## Heads",
        markdown_table(["dimension", "rows", *TITLES.values()], _heads(result)),
        "In brackets: 95% interval over questions. Majority: always the most frequent label of these very rows.",
        markdown_table(
            ["dimension", "accuracy", "majority", "within one", "majority", "QW kappa", "AUROC"], _intervals(result)
        ),
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


def _heads(part: Result) -> list[list[str]]:
    rows = [[name, str(d["n_rows"]), *(number(d[m]) for m in TITLES)] for name, d in part["dimensions"].items()]
    return [*rows, ["**mean**", "", *(number(part["mean"][m]) for m in TITLES)]]


def _intervals(result: Result) -> list[list[str]]:
    rows = []
    for name, measured in result["dimensions"].items():
        base = result["baseline"][name]
        shown = {m: _with_interval(measured[m], measured["interval"].get(m)) for m in TITLES}
        shares = [cell for m in ("accuracy", "within_one") for cell in (shown[m], number(base[m]))]
        rows.append([name, *shares, shown["kappa"], shown["auroc"]])
    return rows


def _levels(result: Result) -> list[list[str]]:
    rows = []
    for name, measured in result["dimensions"].items():
        matrix = measured["confusion"]
        for k, level in enumerate(measured["levels"]):
            predicted = sum(row[k] for row in matrix)
            rows.append([name, f"{k} {level}", str(sum(matrix[k])), str(predicted), number(measured["recall"][k])])
    return rows


def _subsets(result: Result) -> list[str]:
    if not result["subsets"]:
        return []
    rows = [[subset, *row] for subset, part in result["subsets"].items() for row in _heads(part)]
    return ["## By subset", markdown_table(["subset", "dimension", "rows", *TITLES.values()], rows)]


def _length(result: Result) -> list[str]:
    length, names = result["length"], list(result["dimensions"])
    buckets = [
        [f"{b['from']} to {b['to']}", str(b["n_rows"]), *(number(b["accuracy"][name]) for name in names)]
        for b in length["buckets"]
    ]
    follows = [[name, number(s["expected"]), number(s["label"])] for name, s in length["spearman"].items()]
    return [
        "## Length of the answer",
        "Accuracy by quartile of length.",
        markdown_table([length["unit"], "rows", *names], buckets),
        "Spearman's correlation with length. A head that follows length more closely than its labels do rewards length "
        "for its own sake.",
        markdown_table(["dimension", "head", "label"], follows),
    ]


def _correlation(result: Result) -> list[str]:
    found = result["correlation"]
    if found is None:
        return []
    rows = [
        [name, *(f"{number(a, 2)} ({number(b, 2)})" for a, b in zip(*lines, strict=True))]
        for name, *lines in zip(found["names"], found["expected"], found["label"], strict=True)
    ]
    return [
        "## Between dimensions",
        "Spearman's correlation of the heads' expected levels, in brackets that of the labels. Mean excess of the "
        f"heads: {number(found['excess'])}.",
        markdown_table(["", *found["names"]], rows),
    ]


def _pairs(result: Result) -> list[str]:
    pairs = result["pairs"]
    if pairs is None:
        return []
    shown = {**pairs["dimensions"], "**weighted sum**": pairs["weighted"]}
    rows = [[name, str(p["n_pairs"]), _with_interval(p["accuracy"], p["interval"])] for name, p in shown.items()]
    weights = ", ".join(f"{name} {weight:g}" for name, weight in pairs["weighted"]["weights"].items())
    return [
        "## Compared answers",
        "How often the answer that people preferred has the higher expected level, a tie counting half. Weights of "
        f"the sum: {weights}.",
        markdown_table(["by", "pairs", "accuracy"], rows),
        *_pairs_by_subset(pairs["subsets"]),
    ]


def _pairs_by_subset(subsets: Result) -> list[str]:
    rows = [
        [subset, name, str(p["n_pairs"]), _with_interval(p["accuracy"], p["interval"])]
        for subset, part in subsets.items()
        for name, p in {**part["dimensions"], "**weighted sum**": part["weighted"]}.items()
    ]
    return [markdown_table(["subset", "by", "pairs", "accuracy"], rows)] if rows else []


def _requests(result: Result) -> list[str]:
    found = result["requests"]
    if found is None:
        return []
    shown = {**found["dimensions"], "**mean**": found["mean"]}
    rows = [
        [name, str(r["n_rows"]), number(r["proxy"]), number(r["gold"]), _with_interval(r["gap"], r["interval"])]
        for name, r in shown.items()
    ]
    return [
        "## Answers to requests",
        "Proxy: the classifier's probability of the level that the policy was asked for. Gold: how often the label is "
        "that level. A gap (proxy minus gold) above 0 is reward that the policy has not earned.",
        markdown_table(["dimension", "answers", "proxy", "gold", "gap"], rows),
    ]


def _best_of(result: Result) -> list[str]:
    found = result["best_of"]
    if found is None:
        return []
    again = found["paraphrases"]
    rows = [["as asked", _with_interval(found["accuracy"], found["interval"])], ["by chance", number(found["chance"])]]
    if again is not None:
        rows += [
            ["paraphrased", number(again["accuracy"])],
            ["as asked and in every paraphrase", number(again["every"])],
        ]
    return [
        f"## Best of {found['n_answers']}",
        f"{found['n_prompts']} prompts with one answer that fits the preference; share of them where "
        f"`{found['mapping']}` gives that answer the highest reward.",
        markdown_table(["prompts", "accuracy"], rows),
    ]


def _calibration(result: Result) -> list[str]:
    rows = []
    for name, found in result["calibration"].items():
        raw = (found or {}).get("uncalibrated")
        cells = [
            number(found[key] if found else None) + (f" ({number(raw[key])})" if raw else "") for key in _CALIBRATION
        ]
        rows.append([name, *cells])
    return [
        "## Calibration",
        "Lower is better; in brackets: without the temperatures that were fitted on validation rows.",
        markdown_table(["dimension", *_CALIBRATION.values()], rows),
    ]


def _with_interval(value: float | None, interval: Sequence[float | None] | None) -> str:
    if interval is None or interval[0] is None or value is None:
        return number(value)
    return f"{number(value)} [{number(interval[0])}, {number(interval[1])}]"


_PLACES = ("reward.json", "version_*/reward.json")


def publish(trainer: Trainer, result: Result, folders: Sequence[Path]) -> None:
    """Writes the report into folders, sends its pictures to the loggers and prints its table; for rank 0.

    Args:
        trainer: Whose loggers to use.
        result: What :func:`~moslim.evaluation.classifier_report.evaluate` returned.
        folders: Where to write; the first one's pictures go to the loggers.
    """
    first, *copies = folders
    paths = write_report(result, first)
    log_pictures(trainer.loggers, paths, "test", trainer.global_step)
    for folder in copies:
        paths = copy_report(paths, folder)
    print(summary_table(result))
    print("\n".join(f"{name}: {path}" for name, path in paths.items()))


def write_report(result: Result, folder: str | Path) -> dict[str, Path]:
    """Writes ``reward.json``, ``report.md`` and the pictures; each file is replaced whole or not at all.

    Returns:
        Path by name: ``json``, ``report``, ``confusion``, and ``correlation`` and ``reliability`` where there are such.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    figures = {
        "confusion": plots.confusion_matrices(result),
        "correlation": plots.head_correlation(result),
        "reliability": plots.reliability(result["calibration"]),
    }
    pictures = write_figures(folder, figures)
    page = markdown(result, [path.name for path in pictures.values()])
    return write_texts(folder, "reward", result, page) | pictures


def find_result(folders: Iterable[str | Path], weights: str) -> Result | None:
    """Returns the newest test of these weights, or None.

    Args:
        folders: Roots of runs, or folders of reports.
        weights: Fingerprint of the weights.
    """
    files = {file for folder in folders for place in _PLACES for file in Path(folder).glob(place)}
    for file in sorted(files, key=lambda file: file.stat().st_mtime_ns, reverse=True):
        result: Result = json.loads(file.read_text(encoding="utf-8"))
        if result.get("weights") == weights:
            return result
    return None


def scalars(result: Result) -> dict[str, float]:
    """The figures that dashboards should chart; what is not defined is left out.

    ``{dimension}/{measure}`` and ``mean/{measure}``; ``{subset}/...`` for the measures that validation has, too;
    ``calibration/{dimension}/{ece, classwise_ece, brier, rps}``; ``pairs/{dimension}/accuracy`` and
    ``pairs/weighted/accuracy``; ``requests/{dimension}/{proxy, gold, gap}`` and ``requests/mean/...``;
    ``best_of/accuracy``, ``best_of/paraphrased`` and ``best_of/every_paraphrase``.
    """
    values = _of(result, MEASURES)
    for name, part in result["subsets"].items():
        values |= {f"{name}/{key}": value for key, value in _of(part, metrics.MEASURES).items()}
    for name, figures in result["calibration"].items():
        kinds = ("ece", "classwise_ece", "brier", "rps")
        values |= {f"calibration/{name}/{kind}": figures[kind] for kind in kinds} if figures else {}
    if pairs := result["pairs"]:
        parts = {**pairs["dimensions"], "weighted": pairs["weighted"]}
        values |= {f"pairs/{name}/accuracy": part["accuracy"] for name, part in parts.items()}
    if asked := result["requests"]:
        parts = {**asked["dimensions"], "mean": asked["mean"]}
        shown = ("proxy", "gold", "gap")
        values |= {f"requests/{name}/{kind}": part[kind] for name, part in parts.items() for kind in shown}
    if found := result["best_of"]:
        values["best_of/accuracy"] = found["accuracy"]
        if again := found["paraphrases"]:
            values |= {"best_of/paraphrased": again["accuracy"], "best_of/every_paraphrase": again["every"]}
    return {key: value for key, value in values.items() if value is not None}


def _of(part: Result, measures: Sequence[str]) -> dict[str, float | None]:
    named = {**part["dimensions"], "mean": part["mean"]}
    return {f"{name}/{measure}": found[measure] for name, found in named.items() for measure in measures}
