import json
import os
import signal
from pathlib import Path

import pytest
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.utilities.exceptions import SIGTERMException
from torch.nn.functional import cross_entropy
from torch.optim import AdamW
from transformers import AutoModelForCausalLM, AutoTokenizer

from moslim.data.data_module import PreferenceDataModule
from moslim.data.types import Example, RowKind, Source, Split, TextBatch
from moslim.generation.torch_engine import TorchEngine
from moslim.ops.models import Architecture, PretrainedTokenizer, WorkbenchTokenizer
from moslim.policy.supervised_trainer import SupervisedTrainer
from moslim.preferences import PreferenceSet
from moslim.training.optim import WarmupDecay
from moslim.utils.errors import UsageError

PREFERENCES = PreferenceSet({"warmth": ["low", "high"]})
SIZES = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
TINY = Architecture("llama", WorkbenchTokenizer(), {**SIZES, "max_position_embeddings": 64})


class Generations(Source):
    """Six questions, each with one right answer, of one to four sentences."""

    THINGS = "kettle mirror vase rice boat kite".split()
    ENDS = ["Good luck.", "Good luck. Have fun.", "Stay brave.", "Have fun. Keep smiling. Good luck. Have fun."]

    def rows(self, kind: RowKind, split: Split, preferences: PreferenceSet, seed: int) -> list[Example]:
        return [
            Example(f"How do I clean the {thing}?", f"Rinse the {thing}. {self.ENDS[i % 4]}")
            for i, thing in enumerate(self.THINGS)
        ]


def module(**options: object) -> SupervisedTrainer:
    if "model" not in options:
        options = {"architecture": TINY, **options}
    return SupervisedTrainer(**{"engine": TorchEngine(max_new_tokens=32), **options})


def data(batch_size: int = 6, **options: object) -> PreferenceDataModule:
    return PreferenceDataModule(PREFERENCES, Generations(), batch_size=batch_size, **options)


def trainer(folder: Path, **options: object) -> Trainer:
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}
    plain = {"enable_checkpointing": False, "num_sanity_val_steps": 0, "use_distributed_sampler": False}
    return Trainer(default_root_dir=folder, **{**quiet, **plain, "max_epochs": -1, "limit_val_batches": 0, **options})


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[SupervisedTrainer, Path]:
    """A model that has learnt the six answers by heart, and the folder it was saved in."""
    folder = tmp_path_factory.mktemp("trained")
    learner = module(
        optimizer=lambda parameters: AdamW(parameters, lr=1e-2, weight_decay=0.0),
        lr_scheduler=lambda optimizer: WarmupDecay(optimizer, warmup_steps=5, final=0.1),
        output=str(folder / "deep" / "model"),
    )
    trainer(folder, max_steps=120).fit(learner, data())
    return learner, folder / "deep" / "model"


def greedy(model: SupervisedTrainer) -> list[str]:
    questions = [row.question for row in Generations().rows(RowKind.TEXTS, Split.TRAIN, PREFERENCES, 0)]
    return model.answers(questions, [(i,) for i in range(len(questions))], 0.0)


# --- what is learnt


@pytest.mark.slow
def test_it_learns_the_answers_and_where_they_end(trained: tuple[SupervisedTrainer, Path]) -> None:
    learner, _ = trained
    assert greedy(learner) == [row.answer for row in Generations().rows(RowKind.TEXTS, Split.TRAIN, PREFERENCES, 0)]


def test_the_loss_is_on_the_answer_and_its_end_only(tmp_path: Path) -> None:
    """Computed once more, row by row, from the texts alone."""

    class Seen(SupervisedTrainer):
        def training_step(self, batch: object, batch_idx: int) -> torch.Tensor:
            self.batch = batch
            loss = super().training_step(batch, batch_idx)
            self.found = loss.item()
            self.expected = torch.cat([self.row(row) for row in batch.rows]).mean().item()
            return loss

        def row(self, row: Example) -> torch.Tensor:
            prompt = self.tokenizer(f"<|user|>{row.question}<|assistant|>")["input_ids"]
            answer = self.tokenizer(f"{row.answer}<|end|>")["input_ids"]
            logits = self.model(torch.tensor([prompt + answer])).logits[0]
            return cross_entropy(logits[len(prompt) - 1 : -1], torch.tensor(answer), reduction="none")

    learner = Seen(architecture=TINY)
    trainer(tmp_path, max_steps=1).fit(learner, data(batch_size=5))
    assert learner.found == pytest.approx(learner.expected, rel=1e-5)
    labelled = learner.batch.labels != -100
    for row, labels, ids in zip(learner.batch.rows, learner.batch.labels, learner.batch.input_ids, strict=True):
        known = labels[labels != -100]
        assert learner.tokenizer.decode(known) == f"{row.answer} <|end|>"
        assert torch.equal(ids[labels != -100], known)
    assert labelled.sum() < learner.batch.attention_mask.sum() < labelled.numel()


def test_validation_and_test_report_the_loss(trained: tuple[SupervisedTrainer, Path], tmp_path: Path) -> None:
    learner, _ = trained
    (validated,) = trainer(tmp_path, limit_val_batches=1.0).validate(learner, data(), verbose=False)
    (tested,) = trainer(tmp_path).test(learner, data(eval_batch_size=4), verbose=False)
    assert 0 < validated["val/loss"] < 0.1
    assert tested["test/loss"] == pytest.approx(validated["val/loss"], rel=0.3)


# --- where the model comes from


@pytest.mark.parametrize("options", [{}, {"model": "somewhere", "architecture": TINY}])
def test_a_model_comes_from_one_place(options: dict) -> None:
    with pytest.raises(ValueError, match=r"give either model .* or architecture"):
        SupervisedTrainer(**options)


def test_random_weights_follow_from_the_seed_alone() -> None:
    def weights(seed: int) -> torch.Tensor:
        torch.manual_seed(torch.initial_seed() + 1)
        return module(seed=seed).model.lm_head.weight

    assert torch.equal(weights(0), weights(0)) and not torch.equal(weights(0), weights(1))


def test_building_leaves_the_global_random_state_alone() -> None:
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    module()
    assert torch.equal(torch.rand(3), expected)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("model_type", "options"),
    [
        ("llama", SIZES),
        ("qwen2", {**SIZES, "num_key_value_heads": 1, "tie_word_embeddings": True}),
        ("gpt2", {"n_embd": 32, "n_layer": 1, "n_head": 2, "n_positions": 64}),
    ],
)
def test_any_architecture_fits_its_tokenizer(model_type: str, options: dict, tmp_path: Path) -> None:
    learner = module(architecture=Architecture(model_type, WorkbenchTokenizer(), options))
    assert learner.model.config.model_type == model_type
    assert learner.model.config.vocab_size == len(learner.tokenizer)
    assert learner.model.config.eos_token_id == learner.tokenizer.eos_token_id
    trainer(tmp_path, max_steps=2).fit(learner, data())
    assert (tmp_path / "model" / "model.safetensors").exists()
    assert len(greedy(learner)) == 6


def test_the_tokenizer_of_a_folder(trained: tuple[SupervisedTrainer, Path]) -> None:
    learner, folder = trained
    other = module(architecture=Architecture("llama", PretrainedTokenizer(str(folder)), SIZES))
    assert other.tokenizer.get_vocab() == learner.tokenizer.get_vocab()
    assert other.tokenizer.chat_template == learner.tokenizer.chat_template


def test_a_model_from_a_folder_goes_on_where_it_was(trained: tuple[SupervisedTrainer, Path], tmp_path: Path) -> None:
    learner, folder = trained
    again = module(model=str(folder), optimizer=lambda parameters: AdamW(parameters, lr=1e-4))
    assert again.model.training
    assert greedy(again) == greedy(learner) and again.model.training
    run = trainer(tmp_path, max_steps=2)
    run.fit(again, data())
    assert float(run.callback_metrics["train/loss"]) < 0.1


# --- what is saved


def test_the_saved_folder_loads_with_transformers_alone(trained: tuple[SupervisedTrainer, Path]) -> None:
    learner, folder = trained
    model = AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    for name, weight in learner.model.state_dict().items():
        assert torch.equal(model.state_dict()[name], weight), name
    question = [{"role": "user", "content": "How do I clean the vase?"}]
    prompt = tokenizer.apply_chat_template(question, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    answer = model.generate(**prompt, max_new_tokens=40, do_sample=False)[0, prompt["input_ids"].shape[1] :]
    assert answer[-1] == tokenizer.eos_token_id  # it stopped by itself
    assert tokenizer.decode(answer, skip_special_tokens=True) == "Rinse the vase. Stay brave."


def test_the_model_is_saved_in_the_run_s_folder_unless_told_otherwise(tmp_path: Path) -> None:
    run = trainer(tmp_path, max_steps=1, logger=CSVLogger(tmp_path, name=""))
    run.fit(module(), data())
    assert (tmp_path / "version_0" / "model" / "config.json").exists()


def test_a_dry_run_and_a_run_without_steps_save_nothing(tmp_path: Path) -> None:
    for options in ({"fast_dev_run": True}, {"max_steps": 0}):
        trainer(tmp_path, **options).fit(module(output=str(tmp_path / "model")), data())
    assert not (tmp_path / "model").exists()


def test_two_processes_save_one_model(tmp_path: Path) -> None:
    """The folder of the run is asked for by both, as the answer is broadcast."""
    run = trainer(tmp_path, max_steps=1, devices=2, strategy="ddp_fork", logger=CSVLogger(tmp_path, name=""))
    run.fit(module(), data(batch_size=3))
    assert (tmp_path / "version_0" / "model" / "model.safetensors").exists()


def test_gradient_checkpointing_changes_nothing(tmp_path: Path) -> None:
    losses = []
    for checkpointing in (False, True):
        run = trainer(tmp_path, max_steps=3)
        learner = module(gradient_checkpointing=checkpointing)
        run.fit(learner, data())
        losses.append(float(run.callback_metrics["train/loss"]))
        assert any(getattr(part, "gradient_checkpointing", False) for part in learner.model.modules()) == checkpointing
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


# --- checkpoints


def test_a_resumed_run_equals_the_uninterrupted_one(tmp_path: Path) -> None:
    dropout = Architecture("llama", WorkbenchTokenizer(), {**SIZES, "attention_dropout": 0.2})

    def run(steps: int, folder: str, **options: object) -> SupervisedTrainer:
        learner = module(
            architecture=dropout,
            optimizer=lambda parameters: AdamW(parameters, lr=5e-3),
            lr_scheduler=lambda optimizer: WarmupDecay(optimizer, warmup_steps=10),
        )
        saver = ModelCheckpoint(tmp_path / folder, filename="{step}", every_n_train_steps=3)
        fitting = trainer(tmp_path, max_steps=steps, callbacks=[saver], enable_checkpointing=True)
        fitting.fit(learner, data(batch_size=3), **options)  # two steps an epoch: over its end
        return learner

    whole = run(6, "whole")
    run(3, "first half")
    torch.manual_seed(99)
    resumed = run(6, "second half", ckpt_path=tmp_path / "first half" / "step=3.ckpt")
    for name, weight in whole.model.state_dict().items():
        assert torch.equal(resumed.model.state_dict()[name], weight), name


def test_checkpoints_hold_plain_data_and_load_without_code(tmp_path: Path) -> None:
    learner = module(temperatures=[1.0, 1.3], seed=4)
    run = trainer(tmp_path, max_steps=1)
    run.fit(learner, data())
    run.save_checkpoint(tmp_path / "a.ckpt")
    kept = torch.load(tmp_path / "a.ckpt", weights_only=True)["hyper_parameters"]
    assert kept["temperatures"] == [1.0, 1.3] and kept["seed"] == 4
    assert "architecture" not in kept and "engine" not in kept
    again = SupervisedTrainer.load_from_checkpoint(tmp_path / "a.ckpt", architecture=TINY, weights_only=True)
    assert torch.equal(again.model.lm_head.weight, learner.model.lm_head.weight)


# --- predict


def predict(learner: SupervisedTrainer, folder: Path, **options: object) -> list[dict]:
    file = folder / "deep" / "samples.jsonl"
    learner.predictions = str(file)
    trainer(folder).predict(learner, data(**options), return_predictions=False)
    return [json.loads(line) for line in file.read_text().splitlines()]


def test_answers_are_written_in_the_order_of_the_questions(
    trained: tuple[SupervisedTrainer, Path], tmp_path: Path
) -> None:
    learner = module(model=str(trained[1]), temperatures=[0.0])
    records = predict(learner, tmp_path, eval_batch_size=4)
    rows = Generations().rows(RowKind.TEXTS, Split.PREDICT, PREFERENCES, 0)
    assert records == [{"question": row.question, "answer": row.answer} for row in rows]
    assert not (tmp_path / "deep" / "samples.jsonl.part").exists()


def test_answers_follow_from_seed_and_row_whatever_the_batch_size(tmp_path: Path) -> None:
    first = predict(module(seed=1), tmp_path, eval_batch_size=6)
    assert predict(module(seed=1), tmp_path, eval_batch_size=6) == first
    assert predict(module(seed=1), tmp_path, eval_batch_size=4) == first
    changed = module()  # other samples from the same weights
    changed.seed = 1
    changed.model.load_state_dict(module(seed=1).model.state_dict())
    assert predict(changed, tmp_path) == first
    assert predict(changed, tmp_path) == first  # rows are counted anew each time
    changed.seed = 2
    assert predict(changed, tmp_path) != first


def test_questions_take_the_temperatures_in_turn(trained: tuple[SupervisedTrainer, Path], tmp_path: Path) -> None:
    learner = module(model=str(trained[1]), temperatures=[0.0, 50.0])
    records = predict(learner, tmp_path, eval_batch_size=3)
    rows = Generations().rows(RowKind.TEXTS, Split.PREDICT, PREFERENCES, 0)
    right = [record["answer"] == row.answer for record, row in zip(records, rows, strict=True)]
    assert right == [True, False] * 3
    assert learner.engine.temperature == 1.0


def test_predictions_are_returned_and_written_to_the_run_s_folder(tmp_path: Path) -> None:
    run = trainer(tmp_path, logger=CSVLogger(tmp_path, name=""))
    batches = run.predict(module(), data(eval_batch_size=4))
    written = (tmp_path / "version_0" / "predictions.jsonl").read_text().splitlines()
    assert [len(batch) for batch in batches] == [4, 2]
    assert [record for batch in batches for record in batch] == list(map(json.loads, written))


def test_several_processes_may_not_write_one_file(tmp_path: Path) -> None:
    from torch.multiprocessing.spawn import ProcessRaisedException

    with pytest.raises(ProcessRaisedException, match="run it in one process"):
        trainer(tmp_path, devices=2, strategy="ddp_fork").predict(module(), data())


def test_weights_in_bfloat16_are_not_trained(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"held in bfloat16 \(such as model\..*set trainer.precision to bf16-mixed$"):
        trainer(tmp_path, max_steps=1, precision="bf16-true").fit(module(), data())


class Stopping(SupervisedTrainer):
    """Is told to stop while it answers its first batch."""

    def predict_step(self, batch: TextBatch, batch_idx: int) -> list[dict]:
        if batch_idx == 0:
            os.kill(os.getpid(), signal.SIGTERM)
        return super().predict_step(batch, batch_idx)


@pytest.mark.slow
def test_an_interrupted_prediction_goes_on_where_it_stopped(tmp_path: Path) -> None:
    options = {"architecture": TINY, "engine": TorchEngine(max_new_tokens=32), "temperatures": [1.0, 0.5]}
    file, whole = tmp_path / "samples.jsonl", tmp_path / "whole.jsonl"
    batches = data(eval_batch_size=2)
    trainer(tmp_path).predict(module(**options, predictions=str(whole)), batches, return_predictions=False)
    with pytest.raises(SIGTERMException):
        trainer(tmp_path).predict(Stopping(**options, predictions=str(file)), batches, return_predictions=False)
    part = tmp_path / "samples.jsonl.part"
    assert part.read_text().splitlines() == whole.read_text().splitlines()[:2] and not file.exists()
    part.write_text(part.read_text().replace('"answer"', '"kept": 1, "answer"'))
    trainer(tmp_path).predict(module(**options, predictions=str(file)), batches, return_predictions=False)
    records = [json.loads(line) for line in file.read_text().splitlines()]
    assert [record.pop("kept", 0) for record in records] == [1, 1, 0, 0, 0, 0]
    assert records == [json.loads(line) for line in whole.read_text().splitlines()]


def test_a_prediction_of_something_else_begins_anew(tmp_path: Path) -> None:
    file = tmp_path / "samples.jsonl"
    batches = data(eval_batch_size=2)
    with pytest.raises(SIGTERMException):
        trainer(tmp_path).predict(Stopping(architecture=TINY, predictions=str(file)), batches, return_predictions=False)
    other = module(seed=1, predictions=str(file))
    with pytest.warns(UserWarning, match="written with another weights and .*seed: starting anew"):
        trainer(tmp_path).predict(other, batches, return_predictions=False)
    assert len(file.read_text().splitlines()) == 6


@pytest.mark.slow
def test_by_default_an_interrupted_prediction_goes_on_in_the_folder_of_the_next_run(tmp_path: Path) -> None:
    def run(kind: type[SupervisedTrainer]) -> None:
        logger = CSVLogger(tmp_path, name="")
        trainer(tmp_path, logger=logger).predict(kind(architecture=TINY), data(eval_batch_size=2))

    with pytest.raises(SIGTERMException):
        run(Stopping)
    run(SupervisedTrainer)
    assert not (tmp_path / "version_0/predictions.jsonl.part").exists()
    assert len((tmp_path / "version_1/predictions.jsonl").read_text().splitlines()) == 6


def test_weights_that_are_not_finite_at_the_end_are_not_saved(tmp_path: Path) -> None:
    trained = module(output=str(tmp_path / "model"), optimizer=lambda parameters: torch.optim.SGD(parameters, lr=1e38))
    run = trainer(tmp_path, max_steps=3)
    with pytest.raises(UsageError, match=r"ended at step 3 with weights that are not finite.*weight model\."):
        run.fit(trained, data())
    assert not (tmp_path / "model").exists()
