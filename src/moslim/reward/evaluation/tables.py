"""A classifier's test as a Markdown page."""

from __future__ import annotations

from collections.abc import Sequence

from moslim.reporting import Result, console_table, markdown_pictures, markdown_table, number

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
