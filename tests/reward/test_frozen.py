from pathlib import Path

import pytest
import torch
from torch.optim import AdamW

from moslim.data.data_module import PreferenceDataModule
from moslim.data.types import RowKind, Split
from moslim.ops.lora import LoraOptions
from moslim.preferences import PreferenceSet
from moslim.reward.backbone import run_backbone
from moslim.reward.modeling import PreferenceClassifier
from moslim.reward.reward_classifier import RewardClassifier
from moslim.reward.scorer import Scorer
from tests.helpers.word_task import ComparedSource, WordSource, trainer

POOLING = ["mean", "first", "max"]


def make(preferences: PreferenceSet, backbone: str, **options: object) -> RewardClassifier:
    torch.manual_seed(0)
    heads = {"head_hidden": 16, "head_dropout": 0.1, "pooling": POOLING}
    optimizer = lambda parameters: AdamW(parameters, lr=1e-2)  # noqa: E731
    return RewardClassifier(preferences, backbone, freeze_backbone=True, optimizer=optimizer, **{**heads, **options})


def data(preferences: PreferenceSet, batch_size: int = 12) -> PreferenceDataModule:
    source = ComparedSource(labelled=True)
    return PreferenceDataModule(preferences, source, batch_size=batch_size, eval_batch_size=16)


def refuse(self: PreferenceClassifier, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
    raise AssertionError("the backbone must not run")


@pytest.mark.slow
def test_heads_learn_from_cached_features_and_the_backbone_stays(
    preferences: PreferenceSet, backbone: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = make(preferences, backbone)
    before = {name: p.clone() for name, p in module.classifier.backbone.named_parameters()}
    run = trainer(tmp_path, max_steps=100)
    run.fit(module, data(preferences))
    assert run.callback_metrics["val/tone/accuracy"] > 0.9 and run.callback_metrics["val/amount/accuracy"] > 0.7
    assert "train/padding" not in run.callback_metrics  # there are no tokens
    assert all(torch.equal(p, before[name]) for name, p in module.classifier.backbone.named_parameters())
    assert len(list((tmp_path / "features").iterdir())) == 1  # training and validation have the same texts here

    again = make(preferences, backbone)
    with monkeypatch.context() as patched:
        patched.setattr(PreferenceClassifier, "features", refuse)
        trainer(tmp_path, max_steps=100).fit(again, data(preferences))
    for name, parameter in module.state_dict().items():
        assert torch.equal(again.state_dict()[name], parameter), name


@pytest.mark.slow
def test_features_that_are_not_kept_give_the_same_heads(
    preferences: PreferenceSet, backbone: str, tmp_path: Path
) -> None:
    heads = []
    for kept in (True, False):
        module = make(preferences, backbone, cache_features=kept)
        rows = PreferenceDataModule(
            preferences, ComparedSource(labelled=True), batch_size=12, eval_batch_size=16, group_by_length=False
        )
        run = trainer(tmp_path / str(kept), max_steps=20)
        run.fit(module, rows)
        assert (tmp_path / str(kept) / "features").exists() == kept
        assert module.classifier.training and not module.classifier.backbone.training
        heads.append({name: value for name, value in module.state_dict().items() if "backbone" not in name})
    for name, value in heads[0].items():
        torch.testing.assert_close(heads[1][name], value, atol=1e-5, rtol=1e-4)


@pytest.mark.slow
def test_the_saved_classifier_pools_as_the_heads_have_learnt_it(
    preferences: PreferenceSet, backbone: str, tmp_path: Path
) -> None:
    module = make(preferences, backbone, layer=1, output=str(tmp_path / "classifier"), cache=str(tmp_path / "kept"))
    run = trainer(tmp_path)
    run.fit(module, data(preferences))
    assert (tmp_path / "kept").is_dir() and not (tmp_path / "features").exists()
    scorer = Scorer(tmp_path / "classifier")
    assert (scorer.classifier.config.pooling, scorer.classifier.config.layer) == (POOLING, 1)
    rows = WordSource().rows(RowKind.LABELLED, Split.VALIDATION, preferences, 0)
    probs = scorer.probabilities([row.question for row in rows], [row.answer or "" for row in rows])

    ids = [scorer._encoder.encode(row.question, row.answer or "") for row in rows]
    features = run_backbone(module.classifier.eval(), ids, 0)
    heads = module.classifier.classify(features).logits.softmax(-1)
    torch.testing.assert_close(probs, heads)


def test_the_backbone_runs_in_groups_of_like_length_without_dropout(preferences: PreferenceSet, backbone: str) -> None:
    classifier = make(preferences, backbone).classifier.train()
    rows = [[3, 4, 5], [6], [7, 8], [3] * 9]
    alone = torch.cat([run_backbone(classifier, [row], 0) for row in rows])
    torch.testing.assert_close(run_backbone(classifier, rows, 0), alone)
    assert alone.shape == (4, 3 * 32)


def test_too_few_rows_for_a_batch_are_said_before_the_backbone_runs(
    preferences: PreferenceSet, backbone: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(PreferenceClassifier, "features", refuse)
    with pytest.raises(
        ValueError, match=r"too few for one batch of 999 on each of 1 processes: lower data\.batch_size"
    ):
        trainer(tmp_path).fit(make(preferences, backbone), data(preferences, batch_size=999))


@pytest.mark.slow
def test_a_resumed_run_equals_the_uninterrupted_one(preferences: PreferenceSet, backbone: str, tmp_path: Path) -> None:
    whole = make(preferences, backbone)
    trainer(tmp_path, max_steps=8).fit(whole, data(preferences))
    cut = make(preferences, backbone)
    run = trainer(tmp_path, max_steps=5)
    run.fit(cut, data(preferences))
    run.save_checkpoint(tmp_path / "5.ckpt")
    assert not [key for key in torch.load(tmp_path / "5.ckpt")["state_dict"] if "backbone" in key]
    resumed = make(preferences, backbone)
    trainer(tmp_path, max_steps=8).fit(resumed, data(preferences), ckpt_path=tmp_path / "5.ckpt", weights_only=True)
    for name, parameter in whole.state_dict().items():
        assert torch.equal(resumed.state_dict()[name], parameter), name
    assert resumed.classifier.config.temperatures == whole.classifier.config.temperatures


@pytest.mark.slow
def test_two_processes_share_the_cache_and_train_as_one_does(
    preferences: PreferenceSet, backbone: str, tmp_path: Path
) -> None:
    def train(batch_size: int, **options: object) -> torch.Tensor:
        folder = tmp_path / str(batch_size)
        module = make(preferences, backbone, head_dropout=0.0, output=str(folder / "classifier"))
        trainer(folder, max_steps=3, **options).fit(module, data(preferences, batch_size))
        assert len(list((folder / "features").iterdir())) == 1
        ids = torch.tensor([[3, 5, 7, 2]])
        return Scorer(folder / "classifier").classifier(ids, torch.ones_like(ids)).scores

    torch.testing.assert_close(train(6, devices=2, strategy="ddp_fork"), train(12))


def test_a_dry_run_caches_nothing(preferences: PreferenceSet, backbone: str, tmp_path: Path) -> None:
    trainer(tmp_path, fast_dev_run=True).fit(make(preferences, backbone), data(preferences))
    assert not list(tmp_path.iterdir())


def test_a_frozen_backbone_has_no_adapter(preferences: PreferenceSet, backbone: str) -> None:
    with pytest.raises(ValueError, match=r"set model\.lora to null"):
        make(preferences, backbone, lora=LoraOptions(target_modules=["q_proj"]))
    with pytest.raises(ValueError, match="has layers 1 to 2"):
        make(preferences, backbone, layer=3)


@pytest.mark.parametrize("precision", ["bf16-true", "64-true"])
def test_features_are_float32_or_finer_in_any_precision(
    precision: str, preferences: PreferenceSet, backbone: str, tmp_path: Path
) -> None:
    """Within such a run, tensors without a type are bfloat16 or float64."""
    module = make(preferences, backbone)
    trainer(tmp_path, max_steps=1, limit_val_batches=0).fit(module, data(preferences))
    saved = RewardClassifier(preferences, classifier=str(module.output_folder), freeze_backbone=True)
    (found,) = trainer(tmp_path, precision=precision).validate(saved, data(preferences), verbose=False)
    plain = RewardClassifier(
        preferences, classifier=str(module.output_folder), freeze_backbone=True, cache_features=False
    )
    (expected,) = trainer(tmp_path, precision=precision).validate(plain, data(preferences), verbose=False)
    assert found == pytest.approx(expected, rel=0.02 if precision == "bf16-true" else 1e-6)
    features = run_backbone(saved.classifier, [[3, 4, 5], [6]], 0)
    assert features.dtype == (torch.float32 if precision == "bf16-true" else torch.float64)
