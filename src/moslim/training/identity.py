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
"""Plain data by option, e.g. ``model.pooling``; entries that several options determine have names of their own."""

_KEY = "identity"
_SHOWN = 160
_FEW = 3
_CONFIGURATIONS = ("model.backbone", "model.model")
_IRRELEVANT = ("drop", "token_id", "cache", "dtype", "architectures", "version", "name_or_path", "tie_", "output_")
"""Substrings of the names of configuration entries that do not change hidden states in evaluation mode."""


def keep_identity(checkpoint: dict[str, Any], meaning: Entries, run: Entries) -> None:
    """Records options in a checkpoint.

    Args:
        checkpoint: The checkpoint, changed in place.
        meaning: Options that give the weights their meaning; compared whenever the weights are loaded.
        run: Options that a resumed run must keep; compared when a run is resumed.
    """
    checkpoint[_KEY] = {"meaning": plain(meaning), "run": plain(run)}


def saved_entries(checkpoint: Mapping[str, Any]) -> Entries:
    """Returns all entries that :func:`keep_identity` recorded; empty if the checkpoint has no record."""
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
    """Compares the recorded options of a checkpoint with the current ones.

    Entries that only one side has are not compared. The same holds inside a model's configuration, whose entries depend
    on the version of transformers.

    Args:
        checkpoint: The checkpoint.
        meaning: Current options, as in :func:`keep_identity`.
        run: Likewise; empty if no run is resumed.
        accepted: Entries that may differ (``model.accept_changes``).
        never: Entries that may not differ, even if they are in ``accepted``.
        path: Path of the checkpoint, for the message.
        source: Noun for the message, such as "the checkpoint" or the name of a folder with a record.

    Returns:
        Names of the entries that differ and are accepted.

    Raises:
        UsageError: Other entries differ, or ``accepted`` contains an unknown name.
    """
    if _KEY not in checkpoint:
        warn(
            f"{source} does not record the options that give its weights their meaning (an earlier version wrote "
            "it), so nothing was compared: make sure that preferences, pooling and instruction are the same"
        )
        return set()
    saved, current = saved_entries(checkpoint), plain({**meaning, **run})
    unknown = sorted(set(accepted) - saved.keys() - current.keys())
    if unknown:
        raise UsageError(
            f"model.accept_changes names {', '.join(unknown)}, which is not compared; there are: "
            f"{', '.join(sorted(saved))}"
        )
    different = {
        name for name in saved.keys() & current.keys() if _differ(saved[name], current[name], name in _CONFIGURATIONS)
    }
    refused = [name for name in saved if name in different and (name not in accepted or name in never)]
    if not refused:
        if different:
            names = ", ".join(sorted(different))
            inform(f"model.accept_changes: {source} was made with another {names}.")
        return different
    lines = [f"  {name}: {_comparison(saved[name], current[name], name in _CONFIGURATIONS)}" for name in refused]
    acceptable = [name for name in refused if name not in never]
    accept = (
        f"; or, to continue with the present options on purpose, --model.accept_changes '[{', '.join(acceptable)}]'"
        if acceptable
        else ""
    )
    raise UsageError(
        f"{source} was made with other options than this run has, so that its weights or its rows would mean "
        "something else:\n" + "\n".join(lines) + f"\ngive those of {source}{_config_hint(path)}{accept}"
    )


def _differ(saved: Any, current: Any, shared_only: bool) -> bool:
    """Whether two values differ; if ``shared_only``, mappings are compared only in the keys that both have."""
    if shared_only and isinstance(saved, dict) and isinstance(current, dict):
        return any(_differ(saved[key], current[key], shared_only) for key in saved.keys() & current.keys())
    return bool(saved != current)


def _config_hint(path: str | Path | None) -> str:
    """Part of the message that names the config of a checkpoint's run."""
    if path is None:
        return ""
    candidates = [parent / "config.yaml" for parent in list(Path(path).parents)[:2]]
    config = next((file for file in candidates if file.is_file()), None)
    return f", most simply by the run's own config: --config {config or '<folder of the run>/config.yaml'}"


def _comparison(saved: Any, current: Any, shared_only: bool) -> str:
    """Text with both values; of mappings, the entries that differ (see :func:`_differ`)."""
    if isinstance(saved, dict) and isinstance(current, dict):
        names = [name for name in {**saved, **current} if not shared_only or (name in saved and name in current)]
        differing = [name for name in names if _differ(saved.get(name), current.get(name), shared_only)]
        parts = [f"{name} {_comparison(saved.get(name), current.get(name), shared_only)}" for name in differing[:_FEW]]
        return ", ".join(parts) + (f", and {len(differing) - _FEW} more" if len(differing) > _FEW else "")
    saved_text, current_text = _json(saved), _json(current)
    if max(len(saved_text), len(current_text)) > _SHOWN:
        pairs = enumerate(zip(saved_text, current_text, strict=False))
        first_difference = next((i for i, (a, b) in pairs if a != b), 0)
        start = max(0, min(first_difference, len(saved_text), len(current_text)) - _SHOWN // 4)
        ellipsis = "..." if start else ""
        saved_text, current_text = (f"{ellipsis}{text[start : start + _SHOWN]}" for text in (saved_text, current_text))
    return f"saved {saved_text}, now {current_text}"


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)


def class_key(part: type | Callable[..., Any]) -> str:
    """Returns the name of a class or function in checkpoints, records and exported folders.

    It is the bare name within this package, where names are unique, so that a class can move to another module. For all
    other code it is the full path.
    """
    in_package = part.__module__.partition(".")[0] == __name__.partition(".")[0]
    return part.__qualname__ if in_package else f"{part.__module__}.{part.__qualname__}"


def plain(value: Any) -> Any:
    """Converts a value to plain data, for checkpoints and comparisons with other processes.

    A class or function is converted by :func:`class_key`, an object to its ``repr``, or by :func:`described` if that
    contains an address.
    """
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (set, frozenset)):
        return sorted(map(plain, value), key=_json)
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    if hasattr(value, "__qualname__"):
        return class_key(value)
    text = repr(value)
    return described(value) if " at 0x" in text else text


def described(part: Any) -> Entries:
    """Returns the :func:`class_key` of an object, and the constructor arguments that it stores as attributes."""
    options = {}
    for name in inspect.signature(type(part)).parameters:
        for attribute in (name, f"_{name}"):
            if hasattr(part, attribute):
                options[name] = plain(getattr(part, attribute))
                break
    return {"class": class_key(type(part)), **options}


def rows_digest(rows: Iterable[Any]) -> str:
    """Returns a hash of rows in order: of the fields of each dataclass that take part in comparisons."""
    digest = hashlib.sha256()
    for row in rows:
        values = [_ordered(getattr(row, field.name)) for field in dataclasses.fields(row) if field.compare]
        digest.update(repr(values).encode("utf-8", "surrogatepass"))
    return digest.hexdigest()[:16]


def _ordered(value: Any) -> Any:
    if isinstance(value, Mapping):
        return sorted((str(key), _ordered(item)) for key, item in value.items())
    if isinstance(value, (set, frozenset)):
        return sorted(map(repr, value))
    return value


def vocabulary_digest(tokenizer: PreTrainedTokenizerBase) -> str:
    """Returns a hash of a tokenizer's pipeline from text to ids, without its chat template."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        content: Any = sorted(tokenizer.get_vocab().items())
    else:
        content = json.loads(backend.to_str())
        content["truncation"] = content["padding"] = None  # set by the last call
    return hashlib.sha256(_json(content).encode("utf-8", "surrogatepass")).hexdigest()[:16]


def architecture(config: PreTrainedConfig) -> Entries:
    """Returns the entries of a model's configuration that change hidden states in evaluation mode."""
    entries = plain(config.to_dict()).items()
    return {name: value for name, value in entries if not any(substring in name for substring in _IRRELEVANT)}
