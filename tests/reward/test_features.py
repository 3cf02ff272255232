from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from moslim.reward.backbone import FeatureCache, backbone_key

ROWS = [[1, 2, 3], [4]]
FEATURES = torch.tensor([[0.5, -1.0], [2.0, 0.25]])


class Counted:
    """A computation that knows how often it was asked for."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self) -> torch.Tensor:
        self.calls += 1
        return FEATURES.clone()


@pytest.fixture
def compute() -> Counted:
    return Counted()


def test_features_are_computed_once(tmp_path: Path, compute: Counted) -> None:
    cache = FeatureCache(tmp_path / "deep", "key")
    for _ in range(3):
        assert torch.equal(cache(ROWS, compute), FEATURES)
    assert compute.calls == 1
    assert [file.suffix for file in (tmp_path / "deep").iterdir()] == [".safetensors"]


@pytest.mark.parametrize("rows", [[[1, 2], [3, 4]], [[1, 2, 3, 4], []], [[4], [1, 2, 3]]])
def test_other_texts_and_other_backbones_have_files_of_their_own(
    rows: list[list[int]], tmp_path: Path, compute: Counted
) -> None:
    FeatureCache(tmp_path, "key")(ROWS, compute)
    FeatureCache(tmp_path, "key")(rows, compute)
    FeatureCache(tmp_path, "other")(ROWS, compute)
    assert compute.calls == len(list(tmp_path.iterdir())) == 3


def flipped(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)


def renamed(file: Path) -> None:
    """As if the file of another cache had been put there."""
    save_file(load_file(file), file, metadata={"key": "another"})


@pytest.mark.parametrize(
    "harm",
    [flipped, renamed, lambda file: file.write_bytes(b""), lambda file: file.write_bytes(file.read_bytes()[:-3])],
    ids=["flipped", "renamed", "empty", "cut"],
)
def test_a_wrong_or_damaged_file_is_computed_again(harm, tmp_path: Path, compute: Counted) -> None:
    cache = FeatureCache(tmp_path, "key")
    cache(ROWS, compute)
    (file,) = tmp_path.iterdir()
    harm(file)
    with pytest.warns(UserWarning, match="computed again"):
        assert torch.equal(cache(ROWS, compute), FEATURES)
    assert torch.equal(cache(ROWS, compute), FEATURES)
    assert compute.calls == 2


def test_a_computation_that_fails_leaves_nothing(tmp_path: Path) -> None:
    def fail() -> torch.Tensor:
        raise RuntimeError

    with pytest.raises(RuntimeError):
        FeatureCache(tmp_path, "key")(ROWS, fail)
    assert not list(tmp_path.iterdir())


def test_the_key_of_a_backbone_sees_every_bit_and_every_setting() -> None:
    backbone = torch.nn.Linear(100, 100)
    key = backbone_key(backbone, "mean", 1)
    assert backbone_key(backbone, "mean", 1) == key != backbone_key(backbone, "mean", 2)
    with torch.no_grad():
        backbone.weight[57, 31] = torch.nextafter(backbone.weight[57, 31], torch.tensor(9.0))
    assert backbone_key(backbone, "mean", 1) != key
    assert backbone_key(backbone.bfloat16(), "mean", 1) != key
