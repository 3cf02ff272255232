from pathlib import Path

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.cli import ReduceLROnPlateau as Plateau
from torch.optim import SGD
from torch.optim.lr_scheduler import LambdaLR, LRScheduler
from torch.utils.data import DataLoader

from moslim.training.base_module import RunModule
from moslim.training.optim import RateGroup, WarmupDecay, configure
from moslim.utils.errors import UsageError


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


class Mixed(Line):
    """A frozen weight beside a trained one."""

    def __init__(self, trained: torch.dtype, frozen: torch.dtype) -> None:
        super().__init__()
        self.weight.data = self.weight.data.to(trained)
        self.base = torch.nn.Parameter(torch.zeros(2, dtype=frozen), requires_grad=False)


@pytest.mark.parametrize(
    ("trained", "frozen", "precision", "message"),
    [
        (
            torch.bfloat16,
            torch.float32,
            "32-true",
            r"1 of 1 .* bfloat16 \(such as weight.*set trainer.precision to bf16-m",
        ),
        (torch.float16, torch.float32, "32-true", r"float16 \(such as weight.*set trainer.precision to 16-mixed"),
        (torch.float32, torch.float32, "bf16-true", r"'bf16-true'.*precision to bf16-mixed$"),
        (torch.float32, torch.float32, "16-true", r"'16-true'.*precision to 16-mixed$"),
        (torch.float32, torch.float16, "32-true", r"float16 \(such as base\) and the loss is not scaled.*bfloat16"),
    ],
)
def test_training_in_few_bits_is_refused(
    trained: torch.dtype, frozen: torch.dtype, precision: str, message: str, tmp_path: Path
) -> None:
    with pytest.raises(UsageError, match=message):
        trainer(tmp_path, max_steps=1, precision=precision).fit(Mixed(trained, frozen))


def test_float32_weights_beside_a_frozen_bfloat16_base_are_trained(tmp_path: Path) -> None:
    for precision in ("32-true", "bf16-mixed"):
        module = Mixed(torch.float32, torch.bfloat16)
        trainer(tmp_path, max_steps=1, precision=precision).fit(module)
        assert module.weight.dtype == torch.float32


def test_a_group_apart_has_a_rate_of_its_own_and_the_schedule_of_all() -> None:
    module = torch.nn.Linear(1, 1)

    def rates(lr: float, apart: float | None) -> list[list[float]]:
        found = configure(
            Line(),
            lambda parameters: SGD([p for p in parameters if p.requires_grad], lr=lr),
            lambda optimizer: LambdaLR(optimizer, lambda step: 1 / (step + 1)),
            module.parameters(),
            apart=RateGroup([module.bias], apart, least=0.01),
        )
        optimizer, schedule = found["optimizer"], found["lr_scheduler"]["scheduler"]
        assert [group["params"] for group in optimizer.param_groups] == [[module.weight], [module.bias]]
        seen = []
        for _ in range(2):
            seen.append([group["lr"] for group in optimizer.param_groups])
            optimizer.step()
            schedule.step()
        return seen

    assert rates(0.001, None) == [[0.001, 0.01], [0.0005, 0.005]]
    assert rates(0.5, None) == [[0.5, 0.5], [0.25, 0.25]]
    assert rates(0.5, 0.02) == [[0.5, 0.02], [0.25, 0.01]]


class Flat(RunModule):
    """Its validation loss is 1 less twice, and then stays."""

    LOSSES = (3.0, 2.0, 1.0, 1.0, 1.0, 1.0, 1.0)

    def __init__(self, monitor: str = "val/loss", **options: object) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.schedule = lambda optimizer: Plateau(optimizer, monitor, factor=0.5, patience=0, **options)
        self.rates: list[float] = []
        self.validations = 0

    def configure_optimizers(self):
        return configure(self, lambda parameters: SGD(parameters, lr=8.0), self.schedule, self.parameters())

    def training_step(self, batch: torch.Tensor, batch_idx: int) -> torch.Tensor:
        self.rates.append(self.optimizers().param_groups[0]["lr"])
        return self.weight * 0.0

    def validation_step(self, batch: torch.Tensor, batch_idx: int) -> None:
        if not self.trainer.sanity_checking:
            self.log("val/loss", self.LOSSES[self.validations])

    def on_validation_epoch_end(self) -> None:
        self.validations += not self.trainer.sanity_checking

    def train_dataloader(self) -> DataLoader:
        return DataLoader(torch.zeros(14))

    def val_dataloader(self) -> DataLoader:
        return DataLoader(torch.zeros(1))


def test_a_plateau_moves_after_each_validation_within_an_epoch_too(tmp_path: Path) -> None:
    module = Flat()
    trainer(tmp_path, max_epochs=1, val_check_interval=2).fit(module)
    assert module.rates == [8.0] * 8 + [4.0] * 2 + [2.0] * 2 + [1.0] * 2


def test_a_plateau_without_validations_moves_at_the_end_of_epochs(tmp_path: Path) -> None:
    class Logging(Flat):
        def training_step(self, batch: torch.Tensor, batch_idx: int) -> torch.Tensor:
            self.log("train/loss", 1.0, on_step=False, on_epoch=True)
            return super().training_step(batch, batch_idx)

    module = Logging("train/loss")
    trainer(tmp_path, max_epochs=3, limit_val_batches=0, limit_train_batches=2).fit(module)
    assert module.rates == [8.0] * 4 + [4.0] * 2


def test_the_state_of_a_plateau_is_in_the_checkpoint_of_its_validation(tmp_path: Path) -> None:
    saver = ModelCheckpoint(tmp_path, filename="{step}", save_top_k=-1, every_n_train_steps=0, every_n_epochs=1)
    options = {"max_epochs": 1, "val_check_interval": 2}
    trainer(tmp_path, enable_checkpointing=True, callbacks=[saver], **options).fit(Flat())
    resumed = Flat()
    resumed.validations = 4
    trainer(tmp_path, **options).fit(resumed, ckpt_path=str(tmp_path / "step=8.ckpt"), weights_only=True)
    assert resumed.rates == [4.0] * 2 + [2.0] * 2 + [1.0] * 2


def test_a_metric_that_is_not_measured_is_an_error_with_those_that_are(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="'val/los', which was not measured; metrics at this point: val/loss"):
        trainer(tmp_path, max_epochs=1).fit(Flat("val/los"))


def test_a_plateau_must_say_what_it_watches(tmp_path: Path) -> None:
    module = Flat()
    module.schedule = lambda optimizer: torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer)
    with pytest.raises(UsageError, match=r"take class_path lightning\.pytorch\.cli\.ReduceLROnPlateau with"):
        trainer(tmp_path, max_epochs=1).fit(module)
