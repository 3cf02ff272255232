"""Real Trainer runs of a module with one parameter."""

import copy
import os

import lightning.pytorch as pl
import pytest
import torch

from moslim.data.data_module import PreferenceDataModule
from moslim.data.prompts import PairEncoder
from moslim.data.samplers import Reachable
from moslim.data.types import Example, RowKind, Split, to_device
from moslim.data.views import InstructedTextView, PolicyView, RewardView, ServedModule, TextView, spread
from moslim.instructions import SystemMessage
from tests.helpers.chats import Rows

pytestmark = pytest.mark.filterwarnings("ignore::lightning.pytorch.utilities.warnings.PossibleUserWarning")


class Recorder(pl.LightningModule, ServedModule):
    """Keeps a trace of every batch it gets; ``stop`` raises in that training step."""

    batch_repeats = 1

    def __init__(self, view, tokenizer, batch_repeats=1, stop=None):
        super().__init__()
        self.batch_view, self.tokenizer, self.batch_repeats, self.stop = view, tokenizer, batch_repeats, stop
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.trace, self.batches = [], []

    def training_step(self, batch, i):
        if (self.current_epoch, i) == self.stop:
            raise KeyboardInterrupt
        self.trace.append((self.current_epoch, i, batch.input_ids.tolist()))
        self.batches.append(batch)
        return (self.weight - 1) ** 2

    def validation_step(self, batch, i):
        self.batches.append(batch)

    test_step = validation_step

    def predict_step(self, batch, i):
        return batch

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)


class Save(pl.Callback):
    """Saves a checkpoint after every training step, in two hooks, and at the end of every epoch."""

    def __init__(self, folder):
        self.folder = folder

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        trainer.save_checkpoint(self.folder / f"step-{trainer.global_step:02}.ckpt")

    def on_train_epoch_end(self, trainer, module):
        trainer.save_checkpoint(self.folder / f"epoch-{trainer.global_step:02}.ckpt")


def trainer(**options):
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False}
    return pl.Trainer(
        **{"accelerator": "cpu", "logger": False, "use_distributed_sampler": False, "max_epochs": 1, **quiet, **options}
    )


def data(preferences, **options):
    return PreferenceDataModule(preferences, options.pop("source", Rows()), **{"batch_size": 3, **options})


@pytest.mark.parametrize("view", [RewardView(), PolicyView(), TextView(), InstructedTextView()])
def test_fit_test_and_predict_in_every_view(view, tokenizer, preferences):
    module = Recorder(view, tokenizer)
    module_data = data(preferences, eval_batch_size=2)
    trainer(max_epochs=2, num_sanity_val_steps=0).fit(module, module_data)
    assert [(epoch, i) for epoch, i, _ in module.trace] == [(e, i) for e in range(2) for i in range(4)]
    assert len(module.batches) > 8
    trainer().test(module, module_data, verbose=False)
    predictions = trainer().predict(module, module_data)
    assert [len(batch.input_ids) for batch in predictions] == [2, 1]
    assert {type(batch) for batch in module.batches} == {type(predictions[0])}


@pytest.mark.parametrize("view", [RewardView(), TextView(), InstructedTextView()])
def test_pairs_come_in_order_in_evaluation(view, tokenizer, preferences):
    module = Recorder(view, tokenizer)
    trainer().test(module, data(preferences, eval_batch_size=2), verbose=False)
    rows = [row for batch in module.batches for row in batch.rows]
    assert rows == Rows().rows(view.row_kind(Split.TEST), Split.TEST, preferences, 0)


def test_no_validation_rows_means_no_validation(tokenizer, preferences):
    module = Recorder(RewardView(), tokenizer)
    trainer().fit(module, data(preferences, source=Rows(others=0)))
    assert len(module.batches) == len(module.trace) == 4


def test_policy_batches_are_repeated(tokenizer, preferences):
    module = Recorder(PolicyView(), tokenizer, batch_repeats=3)
    trainer(limit_val_batches=0).fit(module, data(preferences))
    ids = [ids for _, _, ids in module.trace]
    assert len(ids) == 12
    assert all(ids[i] == ids[i // 3 * 3] for i in range(12))
    assert ids[0] != ids[3]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("view", "options"),
    [
        (PolicyView(), {}),
        (PolicyView(), {"workers": 1}),
        (RewardView(), {}),
        (RewardView(), {"workers": 1, "group_by_length": False}),
        (TextView(), {}),
    ],
)
def test_a_resumed_run_sees_the_batches_that_the_whole_run_saw(tmp_path, view, options, tokenizer, preferences):
    def run(ckpt_path=None, callbacks=None):
        module = Recorder(view, tokenizer, batch_repeats=2)
        trainer(max_epochs=3, limit_train_batches=3, callbacks=callbacks, limit_val_batches=0).fit(
            module, data(preferences, **options), ckpt_path=ckpt_path
        )
        return module

    whole = run(callbacks=[Save(tmp_path)])
    assert len(whole.trace) == 9
    names = sorted(path.name for path in tmp_path.iterdir())
    assert len(names) == 12
    for name in names if not options else names[::4]:
        resumed = run(ckpt_path=tmp_path / name)
        assert resumed.trace == whole.trace[int(name[-7:-5]) :], name
        assert torch.equal(resumed.weight, whole.weight)


def test_workers_tokenise_nothing(tokenizer, preferences, monkeypatch, tmp_path):
    def noted(self, question, answer, preference, spans=PairEncoder.spans):
        with open(tmp_path / str(os.getpid()), "a") as file:
            file.write("x")
        return spans(self, question, answer, preference)

    monkeypatch.setattr(PairEncoder, "spans", noted)
    module, pairs = Recorder(RewardView(), tokenizer), data(preferences, workers=2, group_by_length=False)
    trainer(max_epochs=3, limit_val_batches=0).fit(module, pairs)
    (own,) = tmp_path.iterdir()  # of this process alone
    assert own.name == str(os.getpid()) and len(own.read_text()) == len(pairs.rows(RowKind.LABELLED, Split.TRAIN))


@pytest.mark.parametrize("limits", [{"max_steps": 7, "max_epochs": -1}, {"max_steps": 7, "max_epochs": 4}])
@pytest.mark.parametrize("validation", [0, 1])
def test_a_run_limited_in_steps_goes_on_from_the_end_of_an_epoch(limits, validation, tmp_path, tokenizer, preferences):
    def run(**options):
        module = Recorder(TextView(), tokenizer)
        settings = {"limit_train_batches": 4, "limit_val_batches": validation, "num_sanity_val_steps": 0, **limits}
        trainer(callbacks=options.pop("callbacks", None), **settings).fit(module, data(preferences), **options)
        return module

    whole = run(callbacks=[Save(tmp_path)])
    for name in ("step-03.ckpt", "step-04.ckpt", "epoch-04.ckpt"):
        resumed = run(ckpt_path=tmp_path / name)
        assert resumed.trace == whole.trace[int(name[-7:-5]) :], name


def test_a_run_interrupted_in_an_epoch_goes_on_there(tmp_path, tokenizer, preferences):
    whole = Recorder(PolicyView(), tokenizer, batch_repeats=2)
    trainer(max_epochs=2).fit(whole, data(preferences))
    first = Recorder(PolicyView(), tokenizer, batch_repeats=2, stop=(1, 3))
    interrupted = trainer(max_epochs=2)
    with pytest.raises((KeyboardInterrupt, SystemExit)):
        interrupted.fit(first, data(preferences))
    interrupted.save_checkpoint(tmp_path / "stopped.ckpt")
    second = Recorder(PolicyView(), tokenizer, batch_repeats=2)
    trainer(max_epochs=2).fit(second, data(preferences), ckpt_path=tmp_path / "stopped.ckpt")
    assert first.trace + second.trace == whole.trace


def test_validation_sweeps_a_few_questions(tokenizer, preferences):
    module = Recorder(PolicyView(), tokenizer)
    trainer().validate(module, data(preferences, validation_questions=2), verbose=False)
    (batch,) = module.batches
    assert batch.index.tolist() == [0] * 5 + [1] * 5
    assert batch.targets[:5].tolist() == [[0, -1], [1, -1], [2, -1], [-1, 0], [-1, 1]]
    assert set(batch.kinds) == {"sweep"}


def test_validation_falls_back_to_training_questions(tokenizer, preferences):
    module = Recorder(PolicyView(), tokenizer)
    source = Rows(others=0)
    trainer().validate(module, data(preferences, source=source, validation_questions=3), verbose=False)
    assert module.batches[0].index.unique().tolist() == [0, 4, 8]


def test_test_asks_for_sweeps_the_default_and_combinations(tokenizer, preferences):
    module = Recorder(PolicyView(), tokenizer)
    source = Rows()
    trainer().test(
        module, data(preferences, source=source, test_questions=2, instruction=SystemMessage()), verbose=False
    )
    (batch,) = module.batches
    assert batch.index.tolist() == [0] * 9 + [1] * 9
    assert batch.kinds[:9] == ["sweep"] * 5 + ["default"] + ["seen"] * 2 + ["unseen"]
    for kind, target in zip(batch.kinds, batch.targets, strict=True):
        preference = preferences.decode(target)
        assert len(preference.levels) == {"sweep": 1, "default": 0, "seen": 2, "unseen": 2}[kind]
        assert source.held_out(preference) == (kind == "unseen")
        assert source.reachable(preference)
    assert "[[ Preferences ]] size : low" in tokenizer.decode(batch.input_ids[0])


def test_prediction_asks_for_the_levels_of_the_rows(tokenizer, preferences):
    (batch,) = trainer().predict(Recorder(PolicyView(), tokenizer), data(preferences))
    assert batch.targets.tolist() == [[-1, 1], [1, -1], [-1, 1]]
    assert batch.kinds == ["", "", ""]


def test_scramble_changes_targets_in_training_only(tokenizer, preferences):
    def run(scramble):
        module = Recorder(PolicyView(), tokenizer)
        module_data = data(preferences, scramble=scramble, batch_size=6, sampler=Reachable([0, 1]))
        trainer(num_sanity_val_steps=0).fit(module, module_data)
        return module.batches

    plain, scrambled = run(False), run(True)
    assert all(torch.equal(p.input_ids, s.input_ids) for p, s in zip(plain, scrambled, strict=True))
    for p, s in zip(plain[:2], scrambled[:2], strict=True):
        assert s.targets.tolist() == [*p.targets[1:].tolist(), p.targets[0].tolist()]
    assert torch.equal(plain[2].targets, scrambled[2].targets)
    assert plain[2].kinds[0] == "sweep"


def test_scramble_needs_more_than_one_prompt(preferences):
    with pytest.raises(ValueError, match="batch_size of two or more"):
        data(preferences, scramble=True, batch_size=1)


def test_a_module_outside_a_trainer_is_an_error(preferences):
    with pytest.raises(RuntimeError, match=r"trainer.fit\(module, datamodule\)"):
        data(preferences).train_dataloader()


def test_renderer_is_the_one_of_training(tokenizer, preferences):
    module_data = data(preferences, sampler=Reachable([0, 1]))
    module = Recorder(PolicyView(), tokenizer)
    trainer(limit_val_batches=0).fit(module, module_data)
    batch = module.batches[0]
    for i, question in enumerate(batch.questions):
        ids = module_data.renderer(tokenizer).ids(question, preferences.decode(batch.targets[i]))
        assert batch.input_ids[i, batch.attention_mask[i].bool()].tolist() == ids


def test_spread_takes_rows_at_equal_distances():
    rows = [Example(str(i)) for i in range(10)]
    assert [i for i, _ in spread(rows, 4)] == [0, 2, 5, 7]
    assert spread(rows, 99) == list(enumerate(rows))
    assert spread([], 3) == []


def test_to_device_moves_tensors_and_shares_the_rest(tokenizer, preferences):
    (batch,) = trainer().predict(Recorder(PolicyView(), tokenizer), data(preferences))
    before = copy.copy(batch)
    moved = to_device(batch, torch.device("meta"))
    assert {t.device.type for t in (moved.input_ids, moved.attention_mask, moved.targets, moved.index)} == {"meta"}
    assert moved.questions is batch.questions
    assert batch == before


def test_a_token_budget_makes_batches_of_like_cost_and_a_run_is_resumed_in_them(tokenizer, preferences, tmp_path):
    options = {"token_budget": 24, "batch_size": 99}
    module = Recorder(RewardView(), tokenizer)
    fit = trainer(max_epochs=2, limit_val_batches=0, callbacks=[Save(tmp_path)])
    fit.fit(module, data(preferences, **options))
    assert all(batch.input_ids.numel() <= 24 for batch in module.batches)
    rows = [row.question for batch in module.batches for row in batch.rows]
    assert len(rows) == 24 and len({len(batch.rows) for batch in module.batches}) > 1
    assert sum((batch.attention_mask == 0).sum() for batch in module.batches) < 24

    again = Recorder(RewardView(), tokenizer)
    fit = trainer(max_epochs=2, limit_val_batches=0)
    fit.fit(again, data(preferences, **options), ckpt_path=tmp_path / "step-02.ckpt")
    assert again.trace == module.trace[2:]


def test_a_token_budget_needs_groups_of_like_length(preferences):
    with pytest.raises(ValueError, match="token_budget = 512, group_by_length = False"):
        data(preferences, token_budget=512, group_by_length=False)
