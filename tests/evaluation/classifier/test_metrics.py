from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torchmetrics.functional.classification import multiclass_cohen_kappa

from moslim.evaluation.classifier_records import LevelMetrics, SubsetMetrics
from moslim.preferences import PreferenceSet

PREFERENCES = PreferenceSet({"two": ["no", "yes"], "four": ["a", "b", "c", "d"]})
PREDICTED = torch.tensor([[1, 0], [1, 2], [0, 3], [0, 1]])
LEVELS = torch.tensor([[1, 0], [0, 3], [-1, 0], [0, 1]])


def test_measures_by_hand() -> None:
    metrics = LevelMetrics(PREFERENCES)
    metrics.update(PREDICTED[:3], LEVELS[:3])
    metrics.update(PREDICTED[3:], LEVELS[3:])
    found = {key: value.item() for key, value in metrics.compute().items()}
    # head "two": right, off by one, unlabelled, right; head "four": right, off by one, off by three, right
    assert found["two/accuracy"] == pytest.approx(2 / 3)
    assert found["two/within_one"] == 1
    assert found["two/mae"] == pytest.approx(1 / 3)
    assert found["four/accuracy"] == 0.5
    assert found["four/within_one"] == 0.75
    assert found["four/mae"] == 1
    assert found["mean/accuracy"] == pytest.approx((2 / 3 + 0.5) / 2)
    # "two": labels 2 x 0, 1 x 1; predictions 1 x 0, 2 x 1; disagreement 1, by chance (2*2 + 1*1)/3
    assert found["two/kappa"] == pytest.approx(1 - 1 / (5 / 3))


def test_kappa_agrees_with_torchmetrics() -> None:
    generator = torch.Generator().manual_seed(0)
    predicted = torch.randint(4, (50, 2), generator=generator).clamp(max=torch.tensor([1, 3]))
    levels = torch.randint(4, (50, 2), generator=generator).clamp(max=torch.tensor([1, 3]))
    metrics = LevelMetrics(PREFERENCES)
    metrics.update(predicted, levels)
    for head, (name, size) in enumerate(zip(PREFERENCES.names, PREFERENCES.sizes, strict=True)):
        expected = multiclass_cohen_kappa(predicted[:, head], levels[:, head], size, weights="quadratic")
        torch.testing.assert_close(metrics.compute()[f"{name}/kappa"], expected)


def test_head_that_never_appears_has_no_value_and_does_not_spoil_the_mean() -> None:
    metrics = LevelMetrics(PREFERENCES)
    metrics.update(PREDICTED, torch.tensor([[-1, 0], [-1, 3], [-1, 0], [-1, 1]]))
    found = metrics.compute()
    assert not [key for key in found if key.startswith("two/")]
    assert found["mean/accuracy"] == 0.5
    assert LevelMetrics(PREFERENCES).compute() == {}


def test_kappa_is_left_out_where_one_level_is_all_there_is() -> None:
    metrics = LevelMetrics(PREFERENCES)
    metrics.update(torch.zeros(3, 2, dtype=torch.long), torch.zeros(3, 2, dtype=torch.long))
    assert "four/kappa" not in metrics.compute()
    assert metrics.compute()["four/accuracy"] == 1


def test_subsets_are_reported_beside_the_whole() -> None:
    metrics = SubsetMetrics(PREFERENCES)
    metrics.update(PREDICTED, LEVELS, ["fair", "foul", "foul", None])
    found = metrics.compute(torch.device("cpu"))
    assert found["four/accuracy"] == 0.5
    assert found["fair/four/accuracy"] == 1
    assert found["foul/four/accuracy"] == 0
    assert "fair/mean/mae" in found
    metrics.reset()
    assert metrics.compute(torch.device("cpu")) == {}


def test_processes_that_saw_different_subsets_report_the_same(tmp_path: Path) -> None:
    mp.start_processes(_one_process, (str(tmp_path),), nprocs=2, start_method="fork")
    results = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2)]
    alone = SubsetMetrics(PREFERENCES)
    alone.update(PREDICTED, LEVELS, ["fair", "fair", "foul", "foul"])
    expected = alone.compute(torch.device("cpu"))
    for result in results:
        assert result.keys() == expected.keys()
        torch.testing.assert_close(result, expected)


def _one_process(rank: int, folder: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    metrics = SubsetMetrics(PREFERENCES)
    part = slice(2 * rank, 2 * rank + 2)
    metrics.update(PREDICTED[part], LEVELS[part], [["fair", "fair"], ["foul", "foul"]][rank])
    torch.save(metrics.compute(torch.device("cpu")), f"{folder}/{rank}.pt")
    dist.destroy_process_group()
