from pathlib import Path

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.optim import SGD
from torch.optim.lr_scheduler import LRScheduler
from torch.utils.data import DataLoader

from moslim.optim import WarmupDecay, configure


class Line(LightningModule):
    """One weight, whose rates are recorded."""

    def __init__(self, warmup_steps: int = 3, final: float = 0.5, power: float = 1.0) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.frozen = torch.nn.Parameter(torch.zeros(()), requires_grad=False)
        self.warmup_steps, self.final, self.power = warmup_steps, final, power
        self.rates: list[float] = []

    def configure_optimizers(self):
        def schedule(optimizer: torch.optim.Optimizer) -> LRScheduler:
            return WarmupDecay(optimizer, self.warmup_steps, self.final, self.power)

        return configure(self, lambda parameters: SGD(parameters, lr=8.0), schedule, self.parameters())

    def training_step(self, batch: torch.Tensor, batch_idx: int) -> torch.Tensor:
        self.rates.append(self.optimizers().param_groups[0]["lr"])
        return self.weight * 0.0

    def train_dataloader(self) -> DataLoader:
        return DataLoader(torch.zeros(4))


def trainer(folder: Path, **options: object) -> Trainer:
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}
    return Trainer(default_root_dir=folder, **{"enable_checkpointing": False, **quiet, **options})


# warm-up over 3 steps, the full rate at step 3, half of it at step 11
RATES = [2.0, 4.0, 6.0, 8.0, 7.5, 7.0, 6.5, 6.0, 5.5, 5.0, 4.5]


def test_rates_of_a_run(tmp_path: Path) -> None:
    module = Line()
    trainer(tmp_path, max_steps=11, max_epochs=-1).fit(module)
    assert module.rates == pytest.approx(RATES)


def test_length_of_the_run_follows_from_epochs(tmp_path: Path) -> None:
    module = Line(warmup_steps=0, final=0.0)
    trainer(tmp_path, max_epochs=2).fit(module)
    assert module.rates == pytest.approx([8, 7, 6, 5, 4, 3, 2, 1])


def test_power_below_one_keeps_the_rate_high(tmp_path: Path) -> None:
    module = Line(warmup_steps=0, final=0.25, power=0.5)
    trainer(tmp_path, max_steps=4, max_epochs=-1).fit(module)
    assert module.rates == pytest.approx([8.0, 2 + 6 * 0.75**0.5, 2 + 6 * 0.5**0.5, 5.0])


def test_power_of_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="power is 0"):
        WarmupDecay(SGD([torch.nn.Parameter(torch.zeros(()))], lr=1.0), power=0.0)


def test_resumed_run_may_be_longer(tmp_path: Path) -> None:
    keep = ModelCheckpoint(tmp_path, save_last=True)
    trainer(tmp_path, max_steps=5, max_epochs=-1, enable_checkpointing=True, callbacks=[keep]).fit(Line())
    module = Line()
    trainer(tmp_path, max_steps=11, max_epochs=-1).fit(module, ckpt_path=tmp_path / "last.ckpt")
    # the rate of the first resumed step was fixed when the shorter run made its last step
    assert module.rates[1:] == pytest.approx(RATES[6:])


def test_training_data_is_not_loaded_before_the_loops_are_restored(tmp_path: Path) -> None:
    class Watch(Line):
        asked_in_time = False

        def on_load_checkpoint(self, checkpoint: dict[str, object]) -> None:
            assert self.trainer.fit_loop._combined_loader is None

        def configure_optimizers(self):
            result = super().configure_optimizers()
            self.asked_in_time = self.trainer.fit_loop._combined_loader is None
            return result

    module = Watch()
    trainer(tmp_path, max_steps=2, max_epochs=-1).fit(module)
    assert module.asked_in_time


def test_endless_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"trainer\.max_steps"):
        trainer(tmp_path, max_steps=-1, max_epochs=-1).fit(Line(warmup_steps=0))


def test_schedule_without_a_run_says_what_it_lacks() -> None:
    schedule = WarmupDecay(SGD([torch.nn.Parameter(torch.zeros(()))], lr=1.0))
    with pytest.raises(RuntimeError, match="length of the run"):
        schedule.step()


def test_defaults_are_adamw_on_trained_parameters_without_a_schedule() -> None:
    module = Line()
    result = configure(module, None, None, module.parameters(), default_lr=0.25)
    optimizer = result["optimizer"]
    assert type(optimizer) is torch.optim.AdamW and "lr_scheduler" not in result
    assert optimizer.param_groups[0]["params"] == [module.weight]
    assert optimizer.param_groups[0]["lr"] == 0.25 and optimizer.param_groups[0]["weight_decay"] == 0
