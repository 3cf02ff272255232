"""A classifier's checkpoint or folder is never used as something that it was not trained as."""

from pathlib import Path

import pytest
import torch
from lightning.pytorch import Callback, Trainer
from transformers import AutoTokenizer

from moslim.data.data_module import PreferenceDataModule
from moslim.data.types import Example, RowKind, Source, Split
from moslim.ops.lora import LoraOptions
from moslim.preferences import PreferenceSet
from moslim.reward.losses import CrossEntropy, SoftOrdinal
from moslim.reward.modeling import PreferenceClassifierConfig
from moslim.reward.reward_classifier import RewardClassifier
from moslim.reward.scorer import Scorer
from moslim.training.trainer import MoslimTrainer
from moslim.utils.errors import UsageError
from tests.helpers.word_task import WordSource

LORA = {"rank": 2, "target_modules": ["q_proj"]}
TRAINED = {"pooling": "max", "layer": 1, "head_hidden": 8, "loss": CrossEntropy(), "lora": LoraOptions(**LORA)}


def data(preferences: PreferenceSet, source: Source | None = None, **options: object) -> PreferenceDataModule:
    sizes = {"batch_size": 12, "eval_batch_size": 36, "max_length": 24}
    return PreferenceDataModule(preferences, source or WordSource(), **{**sizes, **options})


def trainer(folder: Path, **options: object) -> MoslimTrainer:
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}
    plain = {"enable_checkpointing": False, "use_distributed_sampler": False, "num_sanity_val_steps": 0}
    return MoslimTrainer(
        default_root_dir=folder, **{**quiet, **plain, "max_steps": 2, "limit_val_batches": 0, **options}
    )


def fit(module: RewardClassifier, served: PreferenceDataModule, folder: Path, **options: object) -> Path:
    run = trainer(folder, **options)
    run.fit(module, served)
    run.save_checkpoint(folder / "a.ckpt")
    return folder / "a.ckpt"


@pytest.fixture(scope="module")
def trained(backbone: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of a run with options of its own."""
    names = PreferenceSet({"tone": ["bad", "good"], "amount": ["none", "some", "much"]})
    return fit(RewardClassifier(names, backbone, **TRAINED), data(names), tmp_path_factory.mktemp("run"))


OTHERS = {
    "pooling": ({"pooling": "last"}, r"model\.pooling: saved \[\"max\"\], now \[\"last\"\]"),
    "layer": ({"layer": None}, r"model\.layer: saved 1, now null"),
    "link": ({"loss": SoftOrdinal(), "head_hidden": 8}, None),
    "alpha": ({"lora": LoraOptions(**LORA, alpha=1.0)}, r"model\.lora: .*alpha.*32\.0.*1\.0"),
    "head_hidden": ({"head_hidden": None}, r"model\.head_hidden: saved 8, now null"),
}


@pytest.mark.parametrize("command", ["test", "validate", "predict", "fit", "export"])
def test_no_command_takes_it_with_another_pooling(
    command: str, preferences: PreferenceSet, backbone: str, trained: Path, tmp_path: Path
) -> None:
    module = RewardClassifier(preferences, backbone, **{**TRAINED, "pooling": "last"})
    options = {"out": str(tmp_path / "out")} if command == "export" else {}
    with pytest.raises(UsageError, match=r"model\.pooling: saved \[\"max\"\], now \[\"last\"\]"):
        getattr(trainer(tmp_path), command)(module, datamodule=data(preferences), ckpt_path=str(trained), **options)
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
@pytest.mark.parametrize("kind", OTHERS)
def test_what_the_heads_are_and_read_is_compared(
    kind: str, preferences: PreferenceSet, backbone: str, trained: Path, tmp_path: Path
) -> None:
    options, message = OTHERS[kind]
    module, run = RewardClassifier(preferences, backbone, **{**TRAINED, **options}), trainer(tmp_path)
    if message is None:  # another loss for the same link
        run.test(module, data(preferences), str(trained), verbose=False)
        return
    with pytest.raises(UsageError, match=message):
        run.test(module, data(preferences), str(trained), verbose=False)


@pytest.mark.parametrize(
    "dimensions",
    [
        {"amount": ["none", "some", "much"], "tone": ["bad", "good"]},
        {"tone": ["good", "bad"], "amount": ["none", "some", "much"]},
        {"tone": ["bad", "good"], "amount": ["none", "a bit", "much"]},
    ],
    ids=["order of dimensions", "order of levels", "names of levels"],
)
def test_heads_are_not_exchanged(
    dimensions: dict[str, list[str]], backbone: str, trained: Path, tmp_path: Path
) -> None:
    other = PreferenceSet(dimensions)
    for options in ({}, {"accept_changes": ["preferences"]}):  # which no word can make right
        module = RewardClassifier(other, backbone, **TRAINED, **options)
        with pytest.raises(UsageError, match=r"preferences: saved .*tone.*, now "):
            trainer(tmp_path).test(module, data(other), str(trained), verbose=False)


def test_another_backbone_of_the_same_shape_is_noticed(
    preferences: PreferenceSet, backbone: str, tmp_path: Path
) -> None:
    """All weights are in the checkpoint, but heads of attention and words of the tokenizer are not."""
    path = fit(RewardClassifier(preferences, backbone), data(preferences), tmp_path)
    module = RewardClassifier(preferences, backbone)
    module.classifier.config.backbone.num_attention_heads = 4
    module.tokenizer.add_tokens(["boats"])
    with pytest.raises(UsageError) as raised:
        trainer(tmp_path).test(module, data(preferences), str(path), verbose=False)
    assert "model.backbone: num_attention_heads saved 2, now 4" in str(raised.value)
    assert "tokenizer: saved" in str(raised.value)


def test_module_and_data_have_the_same_dimensions(preferences: PreferenceSet, backbone: str, tmp_path: Path) -> None:
    turned = PreferenceSet(dict(reversed(preferences.to_dict().items())))
    with pytest.raises(UsageError, match=r"data module has the preferences .* but the module has"):
        trainer(tmp_path).fit(RewardClassifier(preferences, backbone), data(turned))


# --- the length of pairs


def test_the_length_of_training_is_saved_and_compared(
    preferences: PreferenceSet, backbone: str, trained: Path, tmp_path: Path
) -> None:
    assert Scorer(trained.parent / "classifier").classifier.config.pair_length == 24
    module = RewardClassifier(preferences, backbone, **TRAINED)
    with pytest.raises(UsageError, match=r"data\.max_length: saved 24, now 64"):
        trainer(tmp_path).test(module, data(preferences, max_length=None), str(trained), verbose=False)
    trainer(tmp_path).export(module, data(preferences), str(tmp_path / "out"), ckpt_path=str(trained))
    assert Scorer(tmp_path / "out").classifier.config.pair_length == 24
    alone = RewardClassifier.load_from_checkpoint(trained, preferences=preferences, **TRAINED)
    assert alone.classifier.get_base_model().config.pair_length == 24
    with pytest.raises(UsageError, match=r"model\.max_length is 20, data\.max_length 24"):
        trainer(tmp_path).fit(RewardClassifier(preferences, backbone, max_length=20), data(preferences))


def test_another_length_on_purpose_is_the_one_that_is_saved(
    preferences: PreferenceSet, backbone: str, trained: Path, tmp_path: Path
) -> None:
    module = RewardClassifier(preferences, backbone, **TRAINED, accept_changes=["data.max_length"])
    trainer(tmp_path).export(module, data(preferences, max_length=12), str(tmp_path / "out"), ckpt_path=str(trained))
    assert Scorer(tmp_path / "out").classifier.config.pair_length == 12


@pytest.mark.slow
def test_a_saved_classifier_is_used_with_its_own_length_or_on_purpose(
    preferences: PreferenceSet, trained: Path, tmp_path: Path
) -> None:
    folder = str(trained.parent / "classifier")
    options: dict = {"verbose": False}
    trainer(tmp_path).test(
        RewardClassifier(preferences, classifier=folder), data(preferences, max_length=None), **options
    )
    for served, own in ((data(preferences, max_length=20), None), (data(preferences, max_length=None), 20)):
        with pytest.raises(UsageError, match=rf"'{folder}' was made .*\n  data\.max_length: saved 24, now 20"):
            trainer(tmp_path).test(RewardClassifier(preferences, classifier=folder, max_length=own), served, **options)
    accepted = ["data.max_length", "data.batch_size"]  # the second of a run that went on
    accepting = RewardClassifier(preferences, classifier=folder, accept_changes=accepted)
    trainer(tmp_path).test(accepting, data(preferences, max_length=20), **options)
    fit(RewardClassifier(preferences, classifier=folder), data(preferences, max_length=20), tmp_path).rename(
        tmp_path / "b.ckpt"
    )
    assert Scorer(tmp_path / "classifier").classifier.config.pair_length == 20
    assert torch.load(tmp_path / "b.ckpt", weights_only=True)["pair_length"] == 20
    further = RewardClassifier(preferences, classifier=folder)  # a checkpoint has the length that it was trained with
    trainer(tmp_path).test(further, data(preferences, max_length=20), str(tmp_path / "b.ckpt"), **options)
    extending = PreferenceSet({"size": ["small", "big"]})
    with pytest.raises(UsageError, match=r"data\.max_length is 20, but the old heads were trained with 24"):
        trainer(tmp_path).fit(RewardClassifier(extending, extend=folder), data(extending, max_length=20))


# --- temperatures


@pytest.fixture
def calibrated(trained: Path, tmp_path: Path) -> str:
    scorer = Scorer(trained.parent / "classifier")
    scorer.classifier.config.temperatures = [3.0, 0.5]
    scorer.classifier.save_pretrained(tmp_path / "calibrated")
    scorer.tokenizer.save_pretrained(tmp_path / "calibrated")
    return str(tmp_path / "calibrated")


def test_new_weights_do_not_keep_old_temperatures(preferences: PreferenceSet, calibrated: str, tmp_path: Path) -> None:
    module = RewardClassifier(preferences, classifier=calibrated, calibrate=False)
    with pytest.warns(UserWarning, match=r"temperatures of tone, amount were fitted to the weights before") as warned:
        path = fit(module, data(preferences), tmp_path)
    assert len([w for w in warned if "were fitted to the weights before" in str(w.message)]) == 1
    assert torch.load(path, weights_only=True)["temperatures"] is None
    assert Scorer(tmp_path / "classifier").classifier.config.temperatures is None
    assert Scorer(calibrated).classifier.config.temperatures == [3.0, 0.5]


def test_heads_that_are_not_trained_keep_theirs(calibrated: str, tmp_path: Path) -> None:
    more = PreferenceSet({"size": ["small", "big"]})

    class Sized(Source):
        def rows(self, kind: RowKind, split: Split, preferences: PreferenceSet, seed: int) -> list[Example]:
            return [Example("how cake", "good .", {"size": i % 2}) for i in range(24)]

    module = RewardClassifier(more, extend=calibrated, calibrate=False)
    fit(module, data(more, Sized()), tmp_path)
    assert Scorer(tmp_path / "classifier").classifier.config.temperatures == [3.0, 0.5, 1.0]


def test_a_checkpoint_before_the_first_validation_is_not_calibrated_for_older_weights(
    preferences: PreferenceSet, calibrated: str, tmp_path: Path
) -> None:
    class SaveFirst(Callback):
        def on_train_batch_end(self, trainer: Trainer, *_: object) -> None:
            trainer.save_checkpoint(tmp_path / "first.ckpt")

    fit(RewardClassifier(preferences, classifier=calibrated), data(preferences), tmp_path, callbacks=[SaveFirst()])
    assert torch.load(tmp_path / "first.ckpt", weights_only=True)["temperatures"] is None


@pytest.mark.parametrize(
    "value", [[0, 1.0], [1.0, -2.0], [float("nan"), 1.0], [1.0, float("inf")], [True, 1], ["1", 1], 1.0]
)
def test_temperatures_are_what_one_can_divide_by(value: object) -> None:
    with pytest.raises(UsageError, match="temperatures is"):
        PreferenceClassifierConfig(dimensions=[["a", ["0", "1"]], ["b", ["0", "1"]]], temperatures=value)


# --- going on


class Shuffled(WordSource):
    def rows(self, kind: RowKind, split: Split, preferences: PreferenceSet, seed: int) -> list[Example]:
        return super().rows(kind, split, preferences, seed)[::-1]


@pytest.mark.parametrize(
    ("served", "options", "message"),
    [
        ({"source": Shuffled()}, {}, r"data\.source: saved \"72 rows, \w+\", now \"72 rows, "),
        ({"batch_size": 6}, {}, r"data\.batch_size: of all processes saved 12, now 6"),
        ({"seed": 5}, {}, r"data\.seed: saved 0, now 5"),
        ({"group_by_length": False}, {}, r"data\.group_by_length: saved true, now false"),
        ({"token_budget": 99}, {}, r"data\.token_budget: "),
        ({}, {"accumulate_grad_batches": 2}, r"trainer\.accumulate_grad_batches: saved 1, now 2"),
    ],
    ids=["rows", "batch size", "seed", "grouping", "budget", "accumulation"],
)
def test_a_run_goes_on_with_its_own_rows_and_steps(
    served: dict, options: dict, message: str, preferences: PreferenceSet, backbone: str, trained: Path, tmp_path: Path
) -> None:
    named = message.partition(":")[0].replace("\\", "")
    module = RewardClassifier(preferences, backbone, **TRAINED)
    run = trainer(tmp_path, max_steps=3, **options)
    with pytest.raises(UsageError, match=message):
        run.fit(module, data(preferences, **served), ckpt_path=str(trained))
    accepted = [named] if named != "data.token_budget" else [named, "data.batch_size"]
    module = RewardClassifier(preferences, backbone, **TRAINED, accept_changes=accepted)
    run = trainer(tmp_path, max_steps=3, **options)
    run.fit(module, data(preferences, **served), ckpt_path=str(trained))
    assert run.global_step == 3


@pytest.mark.parametrize(("frozen", "other"), [(False, True), (True, False)])
def test_what_is_trained_stays_so(
    frozen: bool, other: bool, preferences: PreferenceSet, backbone: str, tmp_path: Path
) -> None:
    path = fit(RewardClassifier(preferences, backbone, freeze_backbone=frozen), data(preferences), tmp_path)
    for accepted in ([], ["model.freeze_backbone"]):  # the state of the optimizer would not fit
        module = RewardClassifier(preferences, backbone, freeze_backbone=other, accept_changes=accepted)
        with pytest.raises(UsageError, match=f"model.freeze_backbone: saved {frozen}, now {other}".lower()) as raised:
            trainer(tmp_path, max_steps=3).fit(module, data(preferences), ckpt_path=str(path))
        assert "accept_changes" not in str(raised.value)


@pytest.mark.slow
def test_a_test_may_have_other_rows_and_batches(
    preferences: PreferenceSet, backbone: str, trained: Path, tmp_path: Path
) -> None:
    served = data(preferences, Shuffled(), batch_size=6, seed=5)
    trainer(tmp_path).test(RewardClassifier(preferences, backbone, **TRAINED), served, str(trained), verbose=False)


# --- the chat template

DATED = """{{ strftime_now('%Y-%m-%d') }} {% for m in messages %}{{ m.content }} {% endfor %}
{%- if so is defined %}so {% endif %}"""


@pytest.fixture
def dated(backbone: str, tmp_path: Path) -> str:
    module = RewardClassifier(PreferenceSet({"tone": ["bad", "good"]}), backbone)
    module.tokenizer.chat_template = DATED
    module.classifier.backbone.save_pretrained(tmp_path / "dated")
    module.tokenizer.save_pretrained(tmp_path / "dated")
    return str(tmp_path / "dated")


@pytest.mark.slow
def test_date_and_arguments_go_into_the_folder_and_are_compared(
    dated: str, preferences: PreferenceSet, tmp_path: Path
) -> None:
    path = fit(RewardClassifier(preferences, dated), data(preferences, template_date="2024-02-09"), tmp_path)
    folder = tmp_path / "classifier"
    chat = [{"role": "user", "content": "how"}]
    assert AutoTokenizer.from_pretrained(folder).apply_chat_template(chat, tokenize=False) == "2024-02-09 how "

    later = RewardClassifier(preferences, dated)  # another day's run of the same config
    trainer(tmp_path).test(later, data(preferences), str(path), verbose=False)
    assert later.tokenizer.apply_chat_template(chat, tokenize=False) == "2024-02-09 how "
    for options, message in (
        ({"template_date": "2024-02-10"}, r"data\.template_date: saved \"2024-02-09\", now \"2024-02-10\""),
        ({"template_args": {"so": True}}, r"data\.template_args: so saved null, now true"),
    ):
        with pytest.raises(UsageError, match=message):
            module = RewardClassifier(preferences, dated)
            trainer(tmp_path).test(module, data(preferences, **options), str(path), verbose=False)
        with pytest.raises(UsageError, match=message):
            module = RewardClassifier(preferences, classifier=str(folder))
            trainer(tmp_path).test(module, data(preferences, **options), verbose=False)
    alone = RewardClassifier.load_from_checkpoint(path, preferences=preferences, backbone=dated)
    assert alone.tokenizer.apply_chat_template(chat, tokenize=False) == "2024-02-09 how "
    with pytest.raises(UsageError, match=r"data\.template_date is '09\.02\.': give a date as YYYY-MM-DD"):
        data(preferences, template_date="09.02.")


@pytest.mark.slow
@pytest.mark.parametrize("frozen", [False, True])
def test_a_resumed_run_checks_its_rows_with_the_date_of_its_checkpoint(
    frozen: bool, dated: str, preferences: PreferenceSet, tmp_path: Path
) -> None:
    other_year = "{% if strftime_now('%Y') != '2024' %}{{ raise_exception('another year') }}{% endif %}"
    tokenizer = AutoTokenizer.from_pretrained(dated)
    tokenizer.chat_template = other_year + DATED
    tokenizer.save_pretrained(dated)
    path = fit(
        RewardClassifier(preferences, dated, freeze_backbone=frozen),
        data(preferences, template_date="2024-02-09"),
        tmp_path,
    )
    run = trainer(tmp_path, max_steps=3)
    run.fit(RewardClassifier(preferences, dated, freeze_backbone=frozen), data(preferences), ckpt_path=str(path))
    assert run.global_step == 3
    with pytest.raises(UsageError, match="another year"):
        trainer(tmp_path).fit(RewardClassifier(preferences, dated, freeze_backbone=frozen), data(preferences))
