from copy import deepcopy

import pytest
import torch
from lightning.pytorch import LightningModule
from torch import nn

from moslim.training.checkpointing import drop_frozen, fingerprint, keep_plain_hparams, restore_frozen


def half_frozen() -> nn.Module:
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3), nn.Linear(3, 3))
    module[0].requires_grad_(False)
    return module


def test_frozen_parameters_leave_and_return_while_buffers_stay() -> None:
    module = half_frozen()
    checkpoint = {"state_dict": deepcopy(module.state_dict())}
    drop_frozen(module, checkpoint)
    assert {"0.weight", "0.bias"}.isdisjoint(checkpoint["state_dict"])
    assert "1.running_mean" in checkpoint["state_dict"]
    with torch.no_grad():
        module[2].weight.zero_()
    restore_frozen(module, checkpoint)
    module.load_state_dict(checkpoint["state_dict"], strict=True)
    assert module[2].weight.abs().sum() > 0


def test_other_frozen_weights_are_refused() -> None:
    module = half_frozen()
    checkpoint = {"state_dict": module.state_dict()}
    drop_frozen(module, checkpoint)
    with torch.no_grad():
        module[0].weight[1, 1] += 1.0
    with pytest.raises(ValueError, match="other frozen weights"):
        restore_frozen(module, checkpoint)


def test_tied_frozen_parameters_are_dropped_under_both_names() -> None:
    module = nn.ModuleDict({"a": nn.Linear(2, 2), "b": nn.Linear(2, 2)}).requires_grad_(False)
    module["b"].weight = module["a"].weight
    checkpoint = {"state_dict": module.state_dict()}
    drop_frozen(module, checkpoint)
    assert checkpoint["state_dict"] == {}


def test_nothing_happens_where_nothing_is_frozen() -> None:
    module = nn.Linear(2, 2)
    checkpoint = {"state_dict": module.state_dict()}
    drop_frozen(module, checkpoint)
    assert list(checkpoint) == ["state_dict"] and len(checkpoint["state_dict"]) == 2


def test_fingerprint_outlasts_a_change_of_precision_but_not_of_shape() -> None:
    weights = torch.randn(50, 30, generator=torch.Generator().manual_seed(0))
    assert fingerprint({"w": weights}) == fingerprint({"w": weights.bfloat16()})
    assert fingerprint({"w": weights}) != fingerprint({"w": weights.reshape(30, 50)})
    assert fingerprint({"w": weights}) != fingerprint({"v": weights})


def test_only_plain_hyperparameters_are_kept() -> None:
    class Module(LightningModule):
        def __init__(self, size: int, options: dict[str, list[float]], layer: nn.Module) -> None:
            super().__init__()
            self.save_hyperparameters()
            keep_plain_hparams(self)

    assert dict(Module(3, {"a": [1.0]}, nn.Linear(1, 1)).hparams) == {"size": 3, "options": {"a": [1.0]}}
