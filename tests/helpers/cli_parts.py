"""Small parts for the tests of the command line, as a user would write them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from lightning.pytorch import Callback, LightningDataModule, LightningModule
from lightning.pytorch.cli import OptimizerCallable
from torch import Tensor, nn
from torch.utils.data import DataLoader

from moslim.data.data_module import PreferenceDataModule
from moslim.data.samplers import Uniform
from moslim.preferences import PreferenceSet
from moslim.training.base_module import RunModule


class Squash:
    def __init__(self, gain: float = 1.0) -> None:
        if gain < 0:
            raise RuntimeError(f"gain is {gain}: it must not be negative")
        self.gain = gain


class Counting(Callback):
    """A part with a state: how many batches it saw."""

    def __init__(self) -> None:
        self.seen = 0

    def on_train_batch_end(self, *_: Any) -> None:
        self.seen += 1

    def state_dict(self) -> dict[str, int]:
        return {"seen": self.seen}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.seen = state["seen"]


class Plain(LightningModule):
    """Takes neither preferences nor a seed."""

    def __init__(self, scale: float = 1.0) -> None:
        super().__init__()
        self.scale = scale
        self.layer = nn.Linear(2, 1)
        self.counting = Counting()

    def configure_callbacks(self) -> list[Callback]:
        return [self.counting]

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), 0.1)

    def training_step(self, batch: Tensor, _: int) -> Tensor:
        loss = self.scale * self.layer(batch).square().mean()
        self.log("loss", loss)
        return loss

    def validation_step(self, batch: Tensor, _: int) -> None:
        self.log("val", self.layer(batch).mean())

    def test_step(self, batch: Tensor, _: int) -> None:
        self.log("test", self.layer(batch).mean())

    def predict_step(self, batch: Tensor, _: int) -> Tensor:
        return self.layer(batch)


class Model(Plain):
    def __init__(
        self,
        preferences: PreferenceSet,
        scale: float = 1.0,
        squash: Squash | None = None,
        optimizer: OptimizerCallable = torch.optim.AdamW,
        function: Callable[[Tensor], Tensor] | None = None,
        seed: int = -1,
    ) -> None:
        super().__init__(scale)
        self.save_hyperparameters(ignore=["squash", "optimizer", "function"])
        self.preferences, self.squash, self.optimizer, self.seed = preferences, squash, optimizer, seed

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return self.optimizer(self.parameters())

    def export(self, folder: str) -> None:
        torch.save({"weight": self.layer.weight, "seen": self.counting.seen}, folder)

    def answer(self, question: str, levels: dict[str, int], samples: int) -> list[str]:
        asked = self.trainer.datamodule.preferences.names
        return [f"{question} {levels} of {asked} after {self.counting.seen}"] * samples


class Positional(Plain):
    def __init__(self, squash: Squash = Squash(2.0)) -> None:  # noqa: B008
        super().__init__()


class ByKeyword(Plain):
    def __init__(self, squash: Squash = Squash(gain=2.0)) -> None:  # noqa: B008
        super().__init__()
        self.squash = squash


class Data(PreferenceDataModule):
    """Eight rows of two numbers."""

    def __init__(self, preferences: PreferenceSet, rows: int = 8, seed: int = -1) -> None:
        LightningDataModule.__init__(self)
        self.preferences, self.count, self.seed, self.sampler = preferences, rows, seed, Uniform()
        self._encoders = []

    def setup(self, stage: str) -> None:
        """Nothing is to be checked: the module takes plain tensors."""

    def train_dataloader(self) -> DataLoader:
        return DataLoader(torch.arange(2.0 * self.count).reshape(-1, 2) / self.count, batch_size=2)

    val_dataloader = test_dataloader = predict_dataloader = train_dataloader


def double(x: Tensor) -> Tensor:
    return 2 * x


def double_without_types(x):
    return 2 * x


class NeverBuilt(RunModule):
    """Stands for a large model, which takes minutes to load."""

    def __init__(self, preferences: PreferenceSet) -> None:
        raise AssertionError("the model was built before the command was checked")


class Failing(Data):
    """Has no rows, as one learns when they are asked for."""

    def train_dataloader(self) -> DataLoader:
        raise RuntimeError("no rows")

    val_dataloader = test_dataloader = predict_dataloader = train_dataloader


class PartlyInEval(Model):
    """A part of it is in evaluation mode on purpose, as a frozen backbone is."""

    def __init__(self, preferences: PreferenceSet) -> None:
        super().__init__(preferences)
        self.frozen = nn.Linear(1, 1).eval()

    def configure_callbacks(self) -> list[Callback]:
        return []
