"""Pooled hidden states on disk, so that a frozen backbone runs over the same texts only once."""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from moslim.errors import UsageError
from moslim.utils.files import whole_file

Ids = Sequence[int]


class FeatureCache:
    """One safetensors file per set of texts, whose name is a hash of all that the features depend on.

    Args:
        folder: Where the files are.
        key: Hash of what turns token ids into features, see :func:`backbone_key`. Tokenizer and length limit count
            through the ids that they lead to.
    """

    def __init__(self, folder: Path, key: str) -> None:
        self.folder = folder
        self._key = key

    def __call__(self, rows: Sequence[Ids], compute: Callable[[], Tensor]) -> Tensor:
        """Returns the features ``[N, H]`` of ``N`` texts, in the type of ``compute``; from disk where they are whole.

        Args:
            rows: Token ids of each text.
            compute: What makes the features, if need be. They are then saved, whole or not at all.
        """
        key = self._row_key(rows)
        file = self.folder / f"{key}.safetensors"
        if file.exists():
            try:
                return _read(file, key, len(rows))
            except (ValueError, KeyError, OSError, SafetensorError) as error:
                rank_zero_warn(f"cached features '{file}' are unusable ({error}): they are made anew")
        rank_zero_info(f"the backbone runs over {len(rows)} texts, whose features go to {file}")
        features = compute()
        _write(file, key, features)
        return features

    def _row_key(self, rows: Sequence[Ids]) -> str:
        digest = hashlib.sha256(self._key.encode())
        for row in rows:
            digest.update(array("q", [len(row), *row]))
        return digest.hexdigest()


def backbone_key(backbone: nn.Module, *settings: Any) -> str:
    """Hash of a backbone, every bit of it, and of settings as plain data."""
    digest = hashlib.sha256(repr(settings).encode())
    for name, tensor in sorted(backbone.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(_bytes(tensor))
    return digest.hexdigest()


def _read(file: Path, key: str, count: int) -> Tensor:
    with safe_open(file, "pt") as opened:
        noted, features = opened.metadata() or {}, opened.get_tensor("features")
    if noted.get("key") != key or features.ndim != 2 or len(features) != count:
        raise UsageError("they are of other texts or of another backbone")
    if noted.get("checksum") != _checksum(features):
        raise UsageError("they are damaged")
    return features


def _write(file: Path, key: str, features: Tensor) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    with whole_file(file) as part:
        save_file({"features": features}, part, metadata={"key": key, "checksum": _checksum(features)})


def _checksum(features: Tensor) -> str:
    return hashlib.sha256(_bytes(features)).hexdigest()


def _bytes(tensor: Tensor) -> Any:
    return tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy()
