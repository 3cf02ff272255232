import csv
import json
from pathlib import Path

import pytest
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.loggers import CSVLogger
from safetensors.torch import load_file
from torch.optim import SGD, AdamW

from moslim.data.data_module import PreferenceDataModule
from moslim.data.types import Example, PairBatch, RowKind, Source, Split
from moslim.ops.lora import LoraOptions
from moslim.preferences import PreferenceSet
from moslim.reward import testing as evaluated
from moslim.reward.losses import BradleyTerry, Corn, CrossEntropy, LevelLoss, Regression, SoftOrdinal
from moslim.reward.reward_classifier import RewardClassifier
from moslim.reward.scorer import Scorer
from moslim.training.optim import WarmupDecay
from moslim.utils.errors import UsageError
from tests.helpers.forked import in_two, sharded
from tests.helpers.word_task import ComparedSource, WordSource, save_backbone

LORA = LoraOptions(rank=4, alpha=8.0, dropout=0.1, target_modules=["q_proj", "v_proj", "down_proj"])


def make(preferences: PreferenceSet, backbone: str, **options: object) -> RewardClassifier:
    torch.manual_seed(0)
    return RewardClassifier(
        preferences,
        backbone,
        optimizer=lambda parameters: AdamW(parameters, lr=5e-3, weight_decay=0.0),
        lr_scheduler=lambda optimizer: WarmupDecay(optimizer, warmup_steps=2, final=0.1),
        **options,
    )


def data(preferences: PreferenceSet, source: Source | None = None) -> PreferenceDataModule:
    return PreferenceDataModule(preferences, source or WordSource(), batch_size=12, eval_batch_size=16)


def trainer(folder: Path, **options: object) -> Trainer:
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}
    plain = {
        "enable_checkpointing": False,
        "num_sanity_val_steps": 1,
        "use_distributed_sampler": False,
        "log_every_n_steps": 1,
    }
    return Trainer(default_root_dir=folder, **{**quiet, **plain, "max_epochs": -1, **options})


@pytest.mark.slow
@pytest.mark.parametrize("lora", [None, LORA], ids=["full", "lora"])
def test_fit_learns_both_heads_logs_them_and_exports_a_scorer(
    lora: LoraOptions | None, preferences: PreferenceSet, backbone: str, tmp_path: Path
) -> None:
    module = make(preferences, backbone, lora=lora, max_length=48, loss=CrossEntropy())
    run = trainer(tmp_path, max_steps=150, logger=CSVLogger(tmp_path), log_every_n_steps=10)
    run.fit(module, data(preferences))
    found = {key: float(value) for key, value in run.callback_metrics.items()}
    assert found["val/tone/accuracy"] > 0.95 and found["val/amount/accuracy"] > 0.9
    assert found["val/mean/kappa"] > 0.85 and found["val/amount/within_one"] > 0.95
    assert found["val/so/amount/mae"] < 0.2 and "val/very/mean/mae" in found
    assert found["train/tone/loss"] < 0.3 and {"train/loss", "train/amount/loss", "val/loss"} <= found.keys()

    scorer = Scorer(Path(run.log_dir) / "classifier")
    assert scorer.preferences == preferences and scorer.classifier.config.pair_length == 48
    rows = WordSource().rows(RowKind.LABELLED, Split.VALIDATION, preferences, 0)
    probs = scorer.probabilities([row.question for row in rows], [row.answer or "" for row in rows])
    predicted = trainer(tmp_path).predict(module, data(preferences))
    table = [record["probabilities"]["amount"] for batch in predicted for record in batch]
    torch.testing.assert_close(probs[:, 1], torch.tensor(table), atol=1e-5, rtol=0)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("loss", "hidden", "lora"),
    [(SoftOrdinal(), None, None), (Regression(), None, None), (Corn(), 16, LORA)],
    ids=["soft_ordinal", "regression", "corn-mlp-lora"],
)
def test_every_loss_and_kind_of_head_learns(
    loss: LevelLoss,
    hidden: int | None,
    lora: LoraOptions | None,
    preferences: PreferenceSet,
    backbone: str,
    tmp_path: Path,
) -> None:
    module = make(preferences, backbone, loss=loss, head_hidden=hidden, head_dropout=0.1, lora=lora)
    run = trainer(tmp_path, max_steps=100, check_val_every_n_epoch=100)
    run.fit(module, data(preferences))
    found = trainer(tmp_path).validate(module, data(preferences), verbose=False)[0]
    assert found["val/tone/accuracy"] > 0.9 and found["val/amount/accuracy"] > 0.8
    saved = Scorer(tmp_path / "classifier").classifier.config
    assert (saved.link, saved.head_hidden, len(saved.temperatures)) == (loss.link, hidden, 2)


@pytest.mark.slow
@pytest.mark.parametrize("labelled", [False, True], ids=["pairs only", "mixed"])
def test_comparisons_train_with_and_without_labels(
    labelled: bool, preferences: PreferenceSet, backbone: str, tmp_path: Path
) -> None:
    module = make(preferences, backbone, pairs=BradleyTerry(scale=4.0))
    run = trainer(tmp_path, max_steps=60)
    run.fit(module, data(preferences, ComparedSource(labelled)))
    found = {key: float(value) for key, value in run.callback_metrics.items()}
    assert found["val/pairs/tone/accuracy"] == found["val/pairs/accuracy"] > 0.95
    assert "val/pairs/amount/accuracy" not in found  # nothing was said about it
    assert found["train/pairs/accuracy"] > 0.95 and found["train/pairs/loss"] < 0.4
    assert ("train/tone/loss" in found) == ("val/tone/accuracy" in found) == labelled
    if not labelled:
        assert found["val/loss"] < 0.4
        records = trainer(tmp_path).predict(module, data(preferences, ComparedSource()))
        assert sum(map(len, records)) == 36  # rejected answers are no rows to score


def test_without_comparisons_their_term_changes_nothing(
    preferences: PreferenceSet, backbone: str, tmp_path: Path
) -> None:
    states = []
    for pairs in (None, BradleyTerry(weight=7.0, scale=3.0)):
        module = make(preferences, backbone, pairs=pairs)
        run = trainer(tmp_path, max_steps=3)
        run.fit(module, data(preferences))
        assert not [key for key in run.callback_metrics if "pairs" in key]
        states.append(module.state_dict())
    for name, parameter in states[0].items():
        assert torch.equal(parameter, states[1][name]), name


@pytest.mark.slow
def test_fit_calibrates_and_checkpoint_and_export_keep_it(
    preferences: PreferenceSet, backbone: str, tmp_path: Path
) -> None:
    module = make(preferences, backbone, loss=CrossEntropy())
    run = trainer(tmp_path, max_steps=18, enable_checkpointing=True)
    run.fit(module, data(preferences))
    temperatures = module.classifier.config.temperatures
    assert len(temperatures) == 2 and all(0.1 <= t <= 10 and t != 1 for t in temperatures)
    kinds = [f"{name}/{stage}" for name in ("ece", "classwise_ece", "brier", "rps") for stage in ("before", "after")]
    wanted = {f"val/calibration/{dimension}/{kind}" for dimension in preferences.names for kind in kinds}
    assert wanted <= run.callback_metrics.keys()
    assert Scorer(tmp_path / "classifier").classifier.config.temperatures == temperatures

    checkpoint = run.checkpoint_callback.best_model_path
    again = RewardClassifier.load_from_checkpoint(checkpoint, preferences=preferences, loss=CrossEntropy())
    again.export(tmp_path / "exported")
    loaded = Scorer(tmp_path / "exported").classifier
    assert loaded.config.temperatures == temperatures
    ids = torch.tensor([[3, 5, 7, 2]])
    scores = loaded(ids, torch.ones_like(ids)).scores
    expected = (scores / torch.tensor(temperatures)[:, None]).softmax(-1)
    torch.testing.assert_close(loaded.probabilities(ids, torch.ones_like(ids)), expected)


def test_weights_that_no_validation_has_seen_are_calibrated_at_the_end(
    preferences: PreferenceSet, backbone: str, tmp_path: Path
) -> None:
    """8 steps, and a validation after every epoch of 6: as if there had been one after the last."""
    found = []
    for interval in ({}, {"val_check_interval": 8, "check_val_every_n_epoch": None}):
        module = make(preferences, backbone)
        run = trainer(tmp_path, max_steps=8, logger=CSVLogger(tmp_path), **interval)
        run.fit(module, data(preferences))
        with (Path(run.log_dir) / "metrics.csv").open() as file:
            logged = [row["val/calibration/tone/brier/after"] for row in csv.DictReader(file)]
        last = [value for value in logged if value][-1]
        card = (Path(run.log_dir) / "classifier" / "README.md").read_text().split("## Calibration")[1]
        tone = next(line for line in card.splitlines() if line.startswith("| tone |"))
        assert tone.split(" | ")[3].endswith(f" to {float(last):.3f}")  # not what an earlier validation found
        found.append((module.classifier.config.temperatures, last))
    assert found[0] == found[1]


def test_calibration_can_be_left_out(preferences: PreferenceSet, backbone: str, tmp_path: Path) -> None:
    module = make(preferences, backbone, calibrate=False)
    run = trainer(tmp_path, max_steps=6)
    run.fit(module, data(preferences))
    assert module.classifier.config.temperatures is None
    assert not [key for key in run.callback_metrics if "calibration" in key]


@pytest.mark.parametrize(
    ("loss", "hidden"), [(CrossEntropy(), None), (Corn(), 8), (Regression(), None)], ids=["linear", "corn", "mse"]
)
def test_bfloat16_trains_float32_weights_with_recomputed_activations(
    loss: LevelLoss, hidden: int | None, preferences: PreferenceSet, backbone: str, tmp_path: Path
) -> None:
    module = make(preferences, backbone, loss=loss, head_hidden=hidden, gradient_checkpointing=True)
    before = {name: p.detach().float().clone() for name, p in module.named_parameters()}
    run = trainer(tmp_path, max_steps=6, precision="bf16-mixed")
    run.fit(module, data(preferences, ComparedSource(labelled=True)))
    assert run.callback_metrics["train/loss"].isfinite() and run.callback_metrics["val/loss"].isfinite()
    assert all(p.isfinite().all() for p in module.parameters())
    assert not any(torch.equal(p.float(), before[name]) for name, p in module.named_parameters() if p.ndim == 2)
    assert module(torch.tensor([[3, 4]]), torch.ones(1, 2, dtype=torch.long)).dtype == torch.float32


@pytest.mark.slow
@pytest.mark.parametrize("lora", [None, LORA], ids=["full", "lora"])
def test_weights_in_bfloat16_are_tested_but_not_trained(
    lora: LoraOptions | None, preferences: PreferenceSet, backbone: str, tmp_path: Path
) -> None:
    rows = data(preferences, ComparedSource(labelled=True))
    with pytest.raises(
        UsageError, match=r"held in bfloat16 \(such as classifier\..*set trainer.precision to bf16-mixed"
    ):
        trainer(tmp_path, max_steps=1, precision="bf16-true").fit(make(preferences, backbone, lora=lora), rows)
    losses = [
        trainer(tmp_path, precision=precision).validate(make(preferences, backbone, lora=lora), rows, verbose=False)[0]
        for precision in ("bf16-true", "32-true")
    ]
    assert losses[0]["val/loss"] == pytest.approx(losses[1]["val/loss"], rel=0.02)


@pytest.mark.parametrize("precision", ["bf16-true", "16-true", "32-true"])
def test_shares_of_votes_and_margins_are_not_rounded(
    precision: str, preferences: PreferenceSet, backbone: str, tmp_path: Path
) -> None:
    class Seen(RewardClassifier):
        def validation_step(self, batch: PairBatch, batch_idx: int) -> None:
            self.shares |= set(batch.targets.flatten().tolist())
            self.margins |= set(batch.margins.tolist())

    module = Seen(preferences, backbone)
    module.shares, module.margins = set(), set()
    rows = data(preferences, ComparedSource(labelled=True))
    trainer(tmp_path, precision=precision).validate(module, rows, verbose=False)
    exact = [torch.tensor(value).item() for value in (0, 1 / 3, 2 / 3, 1)]
    assert sorted(module.shares) == exact
    assert sorted(module.margins) == [torch.tensor(0.1 * i).item() for i in range(3)]


@pytest.mark.parametrize("option", ["classifier", "extend"])
def test_a_classifier_saved_in_bfloat16_goes_on_in_float32(
    option: str, preferences: PreferenceSet, backbone: str, tmp_path: Path
) -> None:
    first = make(preferences, backbone, loss=CrossEntropy(), calibrate=False)
    first.classifier.to(torch.bfloat16)
    first.export(tmp_path / "saved")
    named = preferences if option == "classifier" else PreferenceSet({"length": ["short", "long"]})
    module = RewardClassifier(named, calibrate=False, **{option: str(tmp_path / "saved")})
    assert {p.dtype for p in module.parameters()} == {torch.float32}


def test_frozen_weights_stay_out_of_checkpoints_which_load_strictly(
    preferences: PreferenceSet, backbone: str, tmp_path: Path
) -> None:
    run = trainer(tmp_path, max_steps=3, enable_checkpointing=True, limit_val_batches=0)
    module = make(preferences, backbone, lora=LORA)
    run.fit(module, data(preferences))
    run.save_checkpoint(tmp_path / "a.ckpt")
    saved = torch.load(tmp_path / "a.ckpt", weights_only=True)
    keys = set(saved["state_dict"])
    assert keys == {name for name, p in module.named_parameters() if p.requires_grad}
    assert {key.split(".")[-2] for key in keys if "lora_" not in key} == {"head"}

    again = RewardClassifier.load_from_checkpoint(tmp_path / "a.ckpt", preferences=preferences, lora=LORA)
    for name, parameter in module.state_dict().items():
        assert torch.equal(again.state_dict()[name], parameter), name

    del saved["state_dict"][sorted(keys)[0]]
    torch.save(saved, tmp_path / "b.ckpt")
    with pytest.raises(RuntimeError, match="Missing key"):
        trainer(tmp_path).validate(make(preferences, backbone, lora=LORA), data(preferences), tmp_path / "b.ckpt")


def test_checkpoint_on_another_backbone_is_refused(preferences: PreferenceSet, backbone: str, tmp_path: Path) -> None:
    run = trainer(tmp_path, max_steps=1, limit_val_batches=0)
    run.fit(make(preferences, backbone, lora=LORA), data(preferences))
    run.save_checkpoint(tmp_path / "a.ckpt")
    other = tmp_path / "other"
    save_backbone(other, seed=1)
    with pytest.raises(ValueError, match="other frozen weights"):
        trainer(tmp_path).validate(make(preferences, str(other), lora=LORA), data(preferences), tmp_path / "a.ckpt")


@pytest.mark.parametrize("lora", [None, LORA], ids=["full", "lora"])
def test_resumed_run_equals_the_uninterrupted_one(
    lora: LoraOptions | None, preferences: PreferenceSet, backbone: str, tmp_path: Path
) -> None:
    whole = make(preferences, backbone, lora=lora)
    full_run = trainer(tmp_path, max_steps=8, limit_val_batches=0)  # 6 steps an epoch: across its end

    class Stop(RuntimeError):
        pass

    class Interrupted(RewardClassifier):
        def on_train_batch_end(self, outputs: object, batch: object, batch_idx: int) -> None:
            self.trainer.save_checkpoint(tmp_path / f"{self.global_step}.ckpt")
            if self.global_step == 4:
                raise Stop

    full_run.fit(whole, data(preferences))
    torch.manual_seed(0)
    cut = Interrupted(preferences, backbone, lora=lora, optimizer=whole.optimizer, lr_scheduler=whole.lr_scheduler)
    with pytest.raises(Stop):
        trainer(tmp_path, max_steps=8, limit_val_batches=0).fit(cut, data(preferences))
    resumed = make(preferences, backbone, lora=lora)
    torch.manual_seed(99)
    trainer(tmp_path, max_steps=8, limit_val_batches=0).fit(resumed, data(preferences), ckpt_path=tmp_path / "3.ckpt")
    for name, parameter in whole.state_dict().items():
        assert torch.equal(resumed.state_dict()[name], parameter), name


def test_predictions_are_written_in_order(preferences: PreferenceSet, backbone: str, tmp_path: Path) -> None:
    file = tmp_path / "deep" / "scores.jsonl"
    module = make(preferences, backbone, predictions=str(file))
    trainer(tmp_path).predict(module, data(preferences), return_predictions=False)
    records = [json.loads(line) for line in file.read_text().splitlines()]
    rows = WordSource().rows(RowKind.LABELLED, Split.PREDICT, preferences, 0)
    assert [(r["question"], r["answer"]) for r in records] == [(row.question, row.answer) for row in rows]
    for record in records:
        probabilities = record["probabilities"]["amount"]
        assert len(record["probabilities"]["tone"]) == 2 and len(probabilities) == 3
        assert record["levels"]["amount"] == probabilities.index(max(probabilities))
        assert record["expected"]["amount"] == pytest.approx(probabilities[1] + 2 * probabilities[2], abs=1e-5)
    assert not file.with_name("scores.jsonl.part").exists()


def test_rows_without_any_label_are_harmless(preferences: PreferenceSet, backbone: str, tmp_path: Path) -> None:
    class Unlabelled(Source):
        def rows(self, kind: RowKind, split: Split, preferences: PreferenceSet, seed: int) -> list[Example]:
            return [Example("how cake", "good .")] * 12

    module = make(preferences, backbone)
    before = {name: p.detach().clone() for name, p in module.named_parameters()}
    run = trainer(tmp_path, max_steps=1)
    run.fit(module, data(preferences, Unlabelled()))
    assert run.callback_metrics["train/loss"] == 0
    for name, parameter in module.named_parameters():
        assert torch.equal(parameter, before[name])


def test_a_dry_run_exports_nothing(preferences: PreferenceSet, backbone: str, tmp_path: Path) -> None:
    folder = tmp_path / "exported"
    trainer(tmp_path, fast_dev_run=True).fit(make(preferences, backbone, output=str(folder)), data(preferences))
    assert not folder.exists()


def test_training_has_dropout_though_a_backbone_is_loaded_without(preferences: PreferenceSet, backbone: str) -> None:
    module = make(preferences, backbone, gradient_checkpointing=True)
    assert all(part.training for part in module.modules())
    ids = torch.tensor([[3, 5, 7, 2]])
    assert not torch.equal(module(ids, torch.ones_like(ids)), module(ids, torch.ones_like(ids)))


def test_scoring_has_no_dropout(preferences: PreferenceSet, backbone: str, tmp_path: Path) -> None:
    module = make(preferences, backbone)
    runs = [trainer(tmp_path).predict(module.train(), data(preferences)) for _ in range(2)]
    assert runs[0] == runs[1]


def few_steps(folder: Path, preferences: PreferenceSet, backbone: str, batch_size: int, **options: object) -> None:
    """Three steps of plain gradient descent, with comparisons; the classifier is saved in the folder."""
    module = RewardClassifier(preferences, backbone, optimizer=lambda p: SGD(p, lr=0.5), output=str(folder))
    with torch.no_grad():
        module.classifier.head.weight.fill_(0.1)
    source = ComparedSource(labelled=True)
    stage = PreferenceDataModule(preferences, source, batch_size=batch_size, eval_batch_size=5)
    trainer(folder, max_steps=3, val_check_interval=3, **options).fit(module, stage)


def sharded_few_steps(*arguments: object) -> None:
    few_steps(*arguments, strategy=sharded(), devices=2)  # type: ignore[arg-type]


@pytest.mark.slow
def test_two_processes_train_as_one_does(preferences: PreferenceSet, tmp_path: Path) -> None:
    """Heads and comparisons are averaged over the whole batch, however it is spread over processes."""
    plain = tmp_path / "without_dropout"
    save_backbone(plain, seed=0, dropout=0.0)
    few_steps(tmp_path / "one", preferences, str(plain), 12)
    few_steps(tmp_path / "ddp", preferences, str(plain), 6, devices=2, strategy="ddp_fork")
    in_two(sharded_few_steps, tmp_path / "fsdp", preferences, str(plain), 6)

    def saved(name: str) -> tuple[dict[str, torch.Tensor], list[float]]:
        folder = tmp_path / name
        config = json.loads((folder / "config.json").read_text())
        weights = load_file(folder / "heads.safetensors") | load_file(folder / "backbone" / "model.safetensors")
        assert config["architectures"] == ["PreferenceClassifier"]
        return weights, config["temperatures"]

    one = saved("one")
    for two in (saved("ddp"), saved("fsdp")):
        torch.testing.assert_close(two[0], one[0], atol=1e-6, rtol=1e-5)
        assert two[1] == pytest.approx(one[1], rel=1e-3)


def sharded_adapter(folder: Path, resumed: Path | None, preferences: PreferenceSet, backbone: str) -> None:
    evaluated.pass_tokens = lambda device: 8  # in several passes, of which processes would make unequally many
    module = make(preferences, backbone, lora=LORA, output=str(folder / "classifier"))
    few = {"limit_val_batches": 1, "limit_test_batches": 1, "num_sanity_val_steps": 0}
    run = trainer(folder, max_steps=2 if resumed is None else 4, strategy=sharded(), devices=2, **few)
    run.fit(module, data(preferences), ckpt_path=resumed)
    run.save_checkpoint(folder / "end.ckpt")
    if resumed:
        run.test(module, data(preferences), verbose=False)


@pytest.mark.slow
def test_an_adapter_in_shards_goes_on_from_a_checkpoint_and_is_saved_merged(
    preferences: PreferenceSet, backbone: str, tmp_path: Path
) -> None:
    in_two(sharded_adapter, tmp_path / "first", None, preferences, backbone)
    in_two(sharded_adapter, tmp_path / "then", tmp_path / "first" / "end.ckpt", preferences, backbone)
    kept = torch.load(tmp_path / "then" / "end.ckpt", weights_only=True)
    assert kept["global_step"] == 4
    module = make(preferences, backbone, lora=LORA)
    module.on_load_checkpoint(kept)
    module.load_state_dict(kept["state_dict"])
    module.export(tmp_path / "exported")
    exported, saved = (Scorer(tmp_path / name) for name in ("exported", "then/classifier"))
    questions, answers = ["a b", "c"], ["d e", "f"]
    torch.testing.assert_close(saved.probabilities(questions, answers), exported.probabilities(questions, answers))
    report = json.loads((tmp_path / "then" / "reward.json").read_text())
    assert report["dimensions"].keys() >= {"tone", "amount"}


def sharded_heads(folder: Path, preferences: PreferenceSet, backbone: str) -> None:
    with pytest.raises(ValueError, match="only heads are trained"):
        module = make(preferences, backbone, freeze_backbone=True)
        trainer(folder, max_steps=1, strategy=sharded(), devices=2).fit(module, data(preferences))


def test_a_frozen_backbone_is_not_sharded(preferences: PreferenceSet, backbone: str, tmp_path: Path) -> None:
    in_two(sharded_heads, tmp_path, preferences, backbone)


def test_evaluation_passes_pairs_of_like_length_and_keeps_their_order(
    preferences: PreferenceSet, backbone: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = make(preferences, backbone).eval()
    lengths = torch.tensor([3, 9, 1, 9, 4])
    mask = (torch.arange(9) < lengths[:, None]).long()
    ids = torch.randint(3, 12, mask.shape, generator=torch.Generator().manual_seed(0)) * mask
    none = torch.zeros(0)
    batch = PairBatch(ids, mask, none, none, [], chosen=none, rejected=none, comparison_mask=none, margins=none)
    whole = module.classifier(ids, mask)
    shapes = []
    monkeypatch.setattr("moslim.reward.testing.pass_tokens", lambda device: 12)
    hook = module.classifier.register_forward_pre_hook(
        lambda _, args, kwargs: shapes.append(tuple(kwargs["input_ids"].shape)), with_kwargs=True
    )
    logits, scores = module._output(batch)
    hook.remove()
    assert shapes == [(3, 4), (1, 9), (1, 9)]
    torch.testing.assert_close(logits, whole.logits)
    torch.testing.assert_close(scores, whole.scores)


def test_resuming_a_finished_run_leaves_its_record_alone(
    preferences: PreferenceSet, backbone: str, tmp_path: Path
) -> None:
    folder = tmp_path / "classifier"
    run = trainer(tmp_path, max_steps=6)
    run.fit(make(preferences, backbone, output=str(folder)), data(preferences))
    run.save_checkpoint(tmp_path / "end.ckpt")
    card = (folder / "README.md").read_text()
    assert "On validation rows" in card
    again = make(preferences, backbone, output=str(folder))
    trainer(tmp_path, max_steps=6).fit(again, data(preferences), ckpt_path=tmp_path / "end.ckpt", weights_only=True)
    assert (folder / "README.md").read_text() == card


@pytest.mark.slow
def test_untrained_heads_are_not_tested_silently(
    preferences: PreferenceSet, backbone: str, tmp_path: Path, recwarn: pytest.WarningsRecorder
) -> None:
    def untrained() -> bool:
        found = any("never trained" in str(warning.message) for warning in recwarn)
        recwarn.clear()
        return found

    module = make(preferences, backbone)
    trainer(tmp_path).test(module, data(preferences), verbose=False)
    assert untrained()
    run = trainer(tmp_path, max_steps=2)
    run.fit(module, data(preferences))
    run.test(module, data(preferences), verbose=False)
    assert not untrained()


def test_what_a_run_starts_from_is_never_its_output(preferences: PreferenceSet, backbone: str, tmp_path: Path) -> None:
    for output in (backbone, str(Path(backbone).parent)):
        with pytest.raises(ValueError, match=f"holds the start = '{backbone}'"):
            trainer(tmp_path, max_steps=1).fit(make(preferences, backbone, output=output), data(preferences))
