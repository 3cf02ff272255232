"""Options that give weights their meaning or that a resumed run must keep: recorded in checkpoints and compared.

Loading a checkpoint compares the recorded options with the current ones. A difference is an error that lists each
option with both values, unless ``model.accept_changes`` names the option.
"""

from __future__ import annotations

import dataclasses
import hashlib
import inspect
import json
from collections.abc import Callable, Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

from transformers import PreTrainedConfig, PreTrainedTokenizerBase

from moslim.training.distributed import inform, warn
from moslim.utils.errors import UsageError

Entries = dict[str, Any]
"""Plain data by option, e.g. ``model.pooling``; an entry that no option sets alone has a name of its own."""

_KEY = "identity"
_SHOWN = 160
_FEW = 3
_CONFIGURATIONS = ("model.backbone", "model.model")
_IRRELEVANT = ("drop", "token_id", "cache", "dtype", "architectures", "version", "name_or_path", "tie_", "output_")
"""Parts of names of configuration entries that do not change hidden states in evaluation mode."""


def keep_identity(checkpoint: dict[str, Any], meaning: Entries, run: Entries) -> None:
    """Records both groups in a checkpoint.

    Args:
        checkpoint: The checkpoint.
        meaning: What gives weights their meaning; compared whenever they are loaded.
        run: What a run must be resumed with; compared when it goes on.
    """
    checkpoint[_KEY] = {"meaning": plain(meaning), "run": plain(run)}


def saved_entries(checkpoint: Mapping[str, Any]) -> Entries:
    """Entries that :func:`keep_identity` recorded, both groups together; empty where a checkpoint has no record."""
    saved = checkpoint.get(_KEY, {})
    return {**saved.get("meaning", {}), **saved.get("run", {})}


def check_identity(
    checkpoint: Mapping[str, Any],
    meaning: Entries,
    run: Entries,
    accepted: Collection[str] = (),
    never: Collection[str] = (),
    path: str | Path | None = None,
    source: str = "the checkpoint",
) -> set[str]:
    """Compares what a checkpoint recorded with what there is now.

    Entries that only one of the two sides has are not compared; nor are, of a model's configuration, those that only
    one version of transformers writes.

    Args:
        checkpoint: The checkpoint.
        meaning: As in :func:`keep_identity`, of the present run.
        run: The same; empty where no run goes on.
        accepted: Entries that may differ (``model.accept_changes``).
        never: Entries that may not, whatever is accepted.
        path: Where the checkpoint lies, for the message.
        source: What it is, for the message; a folder of weights has a record, too.

    Returns:
        The entries that differ and are accepted.

    Raises:
        UsageError: Others differ; or ``accepted`` names what is not recorded.
    """
    if _KEY not in checkpoint:
        warn(
            f"{source} does not record the options that give its weights their meaning (an earlier version wrote "
            "it), so nothing was compared: make sure that preferences, pooling, instruction and the like are the same"
        )
        return set()
    saved, now = checkpoint[_KEY], plain({**meaning, **run})
    known = {**saved["meaning"], **saved["run"]}
    unknown = sorted(set(accepted) - known.keys() - now.keys())
    if unknown:
        raise UsageError(
            f"model.accept_changes names {', '.join(unknown)}, which is not compared; there are: "
            f"{', '.join(sorted(known))}"
        )
    different = {name for name in known.keys() & now.keys() if _differ(known[name], now[name], name in _CONFIGURATIONS)}
    refused = [name for name in known if name in different and (name not in accepted or name in never)]
    if not refused:
        if different:
            names = ", ".join(sorted(different))
            inform(f"model.accept_changes: {source} was made with another {names}.")
        return different
    lines = [f"  {name}: {_both(known[name], now[name], name in _CONFIGURATIONS)}" for name in refused]
    asked = [name for name in refused if name not in never]
    on_purpose = (
        f"; or, to go on with what there is now on purpose, --model.accept_changes '[{', '.join(asked)}]'"
        if asked
        else ""
    )
    raise UsageError(
        f"{source} was made with other options than this run has, so that its weights or its rows would mean "
        "something else:\n" + "\n".join(lines) + f"\ngive those of {source}{_config(path)}{on_purpose}"
    )


def _differ(saved: Any, now: Any, shared: bool) -> bool:
    """Whether two values differ; mappings, if ``shared``, only in entries that both have."""
    if shared and isinstance(saved, dict) and isinstance(now, dict):
        return any(_differ(saved[key], now[key], shared) for key in saved.keys() & now.keys())
    return bool(saved != now)


def _config(path: str | Path | None) -> str:
    """The way to give the options of a checkpoint's run, for the message."""
    if path is None:
        return ""
    places = [parent / "config.yaml" for parent in list(Path(path).parents)[:2]]
    found = next((place for place in places if place.is_file()), None)
    return f", most simply by the run's own config: --config {found or '<folder of the run>/config.yaml'}"


def _both(saved: Any, now: Any, shared: bool) -> str:
    """Both values; of mappings the entries that differ as in :func:`_differ`."""
    if isinstance(saved, dict) and isinstance(now, dict):
        among = [name for name in {**saved, **now} if not shared or (name in saved and name in now)]
        names = [name for name in among if _differ(saved.get(name), now.get(name), shared)]
        shown = ", ".join(f"{name} {_both(saved.get(name), now.get(name), shared)}" for name in names[:_FEW])
        return shown + (f", and {len(names) - _FEW} more" if len(names) > _FEW else "")
    one, other = _text(saved), _text(now)
    if max(len(one), len(other)) > _SHOWN:
        start = next((i for i, pair in enumerate(zip(one, other, strict=False)) if pair[0] != pair[1]), 0)
        cut = max(0, min(start, len(one), len(other)) - _SHOWN // 4)
        one, other = (f"{'...' if cut else ''}{text[cut : cut + _SHOWN]}" for text in (one, other))
    return f"saved {one}, now {other}"


def _text(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)


def class_key(part: type | Callable[..., Any]) -> str:
    """Name under which checkpoints, records and exported folders know a class or function.

    Of this package it is the bare name, which is unique in it, so that a class can move to another module. Of all other
    code it is the full path.
    """
    of_package = part.__module__.partition(".")[0] == __name__.partition(".")[0]
    return part.__qualname__ if of_package else f"{part.__module__}.{part.__qualname__}"


def plain(value: Any) -> Any:
    """Data that a checkpoint can hold and another process can compare.

    A class or function becomes its :func:`class_key`, an object what :func:`described` says of it.
    """
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, Mapping):
        return {str(key): plain(one) for key, one in value.items()}
    if isinstance(value, (set, frozenset)):
        return sorted(map(plain, value), key=_text)
    if isinstance(value, (list, tuple)):
        return [plain(one) for one in value]
    if hasattr(value, "__qualname__"):
        return class_key(value)
    text = repr(value)
    return described(value) if " at 0x" in text else text


def described(part: Any) -> Entries:
    """The key of an object's class, and the arguments that it was made with and has kept."""
    options = {}
    for name in inspect.signature(type(part)).parameters:
        for attribute in (name, f"_{name}"):
            if hasattr(part, attribute):
                options[name] = plain(getattr(part, attribute))
                break
    return {"class": class_key(type(part)), **options}


def rows_digest(rows: Iterable[Any]) -> str:
    """Hash of rows, dataclasses of plain data, in their order; of the fields by which they are compared."""
    digest = hashlib.sha256()
    for row in rows:
        values = [_ordered(getattr(row, field.name)) for field in dataclasses.fields(row) if field.compare]
        digest.update(repr(values).encode("utf-8", "surrogatepass"))
    return digest.hexdigest()[:16]


def _ordered(value: Any) -> Any:
    if isinstance(value, Mapping):
        return sorted((str(key), _ordered(one)) for key, one in value.items())
    if isinstance(value, (set, frozenset)):
        return sorted(map(repr, value))
    return value


def vocabulary_digest(tokenizer: PreTrainedTokenizerBase) -> str:
    """Hash of what turns text into ids: the tokenizer's whole pipeline, without its chat template."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        content: Any = sorted(tokenizer.get_vocab().items())
    else:
        content = json.loads(backend.to_str())
        content["truncation"] = content["padding"] = None  # which the last call has set
    return hashlib.sha256(_text(content).encode("utf-8", "surrogatepass")).hexdigest()[:16]


def architecture(config: PreTrainedConfig) -> Entries:
    """Entries of a model's configuration that matter to hidden states in evaluation mode."""
    entries = plain(config.to_dict()).items()
    return {name: value for name, value in entries if not any(part in name for part in _IRRELEVANT)}
