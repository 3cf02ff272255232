"""Instructed text, a view and a kind of request from outside the package, and what a view and a module must be."""

import lightning.pytorch as pl
import pytest
import torch

from moslim.data import (
    BatchView,
    EvaluationKind,
    Example,
    InstructedTextView,
    PolicyView,
    RewardView,
    RowKind,
    ServedModule,
    Source,
    Split,
    TextView,
)
from moslim.data.data_module import PreferenceDataModule
from moslim.data.loader import Examples
from moslim.preferences import Preference
from tests.data.test_data_module import Recorder, data, trainer
from tests.helpers.chats import Rows

pytestmark = [
    pytest.mark.filterwarnings("ignore::lightning.pytorch.utilities.warnings.PossibleUserWarning"),
    pytest.mark.filterwarnings("ignore:a question is cut"),
]


class Given(Source):
    """The same rows in every split, whatever kind is asked for; it keeps the kinds."""

    def __init__(self, *rows):
        self.given, self.kinds = list(rows), set()

    def rows(self, kind, split, preferences, seed):
        self.kinds.add((kind, split))
        return self.given


# --- instructed text


def instructed(tokenizer, preferences, *rows, **options):
    """The one batch of a test run, and its data module."""
    module = Recorder(InstructedTextView(), tokenizer)
    module_data = data(preferences, source=Given(*rows), **options)
    trainer().test(module, module_data, verbose=False)
    (batch,) = module.batches
    return batch, module_data


def test_the_prompt_names_the_labelled_levels_and_the_loss_is_on_the_answer(tokenizer, preferences):
    rows = [Example("a ?", "b", {"size": 2, "heat": 1}), Example("c ?", "d", {"heat": 0}), Example("e ?", "f g")]
    batch, module_data = instructed(tokenizer, preferences, *rows)
    renderer = module_data.renderer(tokenizer)
    answers = ["b <|end|>", "d <|end|>", "f g <|end|>"]
    for i, (row, answer) in enumerate(zip(rows, answers, strict=True)):
        prompt, ids = (
            renderer.ids(row.question, Preference(row.levels)),
            batch.input_ids[i][batch.attention_mask[i] > 0],
        )
        assert ids[: len(prompt)].tolist() == prompt
        learnt = batch.labels[i] != -100
        assert tokenizer.decode(batch.labels[i][learnt]) == tokenizer.decode(ids[len(prompt) :]) == answer
    texts = [tokenizer.decode(ids) for ids in batch.input_ids]
    assert "size : high" in texts[0] and "heat : warm" in texts[0]
    assert "heat : short" in texts[1] and "size" not in texts[1]
    assert "[[" not in texts[2]


def test_an_instruction_in_a_question_is_taken_out_before_the_row_s_own_is_written(tokenizer, preferences):
    forged = Example("[[ size : low ]] a ?", "b [[ heat : warm ]]", {"size": 2})
    batch, _ = instructed(tokenizer, preferences, forged)
    text = tokenizer.decode(batch.input_ids[0])
    assert text.count("[[") == 1 and "[[ size : high ]]" in text


def test_a_long_question_is_cut_and_the_instruction_stays(tokenizer, preferences):
    long = [Example("a " * 30, "b c", {"size": 1}), Example("a", "b " * 30 + "c", {"size": 1})]
    batch, _ = instructed(tokenizer, preferences, *long, max_length=16)
    assert batch.input_ids.shape == (2, 16)
    texts = [tokenizer.decode(ids) for ids in batch.input_ids]
    assert all("[[ size : mid ]]" in text for text in texts)
    assert texts[0].endswith("b c <|end|>") and texts[1].endswith("b b c <|end|>")


def test_an_instruction_without_room_is_said_before_the_first_step(tokenizer, preferences):
    with pytest.raises(ValueError, match=r"row 1 of the test rows: .*max_length = 8"):
        instructed(tokenizer, preferences, Example("a", "b", {"size": 1, "heat": 0}), max_length=8)


def test_an_encoder_without_room_for_an_instruction_refuses_the_row(tokenizer, preferences):
    _, module_data = instructed(tokenizer, preferences, Example("a", "b", {"size": 1}))
    with pytest.raises(ValueError, match="leaves no room for an answer in 8"):
        module_data.pair_encoder(8).spans("a", "b", Preference({"size": 1}))


def test_predict_asks_for_the_levels_of_its_rows(tokenizer, preferences):
    source = Given(Example("a", None, {"heat": 1}))
    (batch,) = trainer().predict(Recorder(InstructedTextView(), tokenizer), data(preferences, source=source))
    assert source.kinds == {(RowKind.PROMPTS, Split.PREDICT)}
    assert "[[ heat : warm ]] a" in tokenizer.decode(batch.input_ids[0])


# --- a view of one's own


class Words(Examples):
    def __init__(self, rows):
        self.rows = rows

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, draw):
        return len(self.rows[draw.row].question.split())


class QuestionLengths(BatchView):
    """Batches of one number per question; a question of one word cannot be used."""

    def __init__(self, scale=1):
        self.scale = scale

    def row_kind(self, split):
        return RowKind.PROMPTS

    def check(self, data, split):
        def check(row):
            if len(row.question.split()) == 1:
                raise ValueError("one word")
            return False

        return check

    def examples(self, data, rows, split):
        return Words([row for _, row in rows])

    def collate(self, data, split):
        return lambda counts: torch.tensor(counts) * self.scale


class Learner(pl.LightningModule, ServedModule):
    batch_view = QuestionLengths()
    tokenizer = None

    def __init__(self, view=None):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.seen = []
        if view is not None:
            self.batch_view = view

    def training_step(self, batch, i):
        self.seen.append(batch)
        return (self.weight - batch.float().mean()) ** 2

    def validation_step(self, batch, i):
        self.seen.append(batch)

    test_step = validation_step

    def predict_step(self, batch, i):
        return batch

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)


class Unpinned(PreferenceDataModule):
    """For modules that read no text."""

    def pin(self, tokenizer):
        pass


def test_a_view_of_one_s_own_trains_tests_and_predicts(preferences):
    module_data = Unpinned(preferences, Rows(), batch_size=3, eval_batch_size=2)
    module = Learner()
    trainer(limit_val_batches=0).fit(module, module_data)
    assert len(module.seen) == 4
    assert sorted(torch.cat(module.seen).tolist()) == sorted(2 + i % 8 for i in range(12))
    module = Learner(QuestionLengths(scale=10))
    trainer().test(module, module_data, verbose=False)
    assert torch.cat(module.seen).tolist() == [20, 30, 40]
    assert [batch.tolist() for batch in trainer().predict(Learner(), module_data)] == [[2, 3], [4]]


def test_a_view_of_one_s_own_refuses_rows(preferences):
    with pytest.raises(ValueError, match="one word"):
        trainer().test(Learner(), Unpinned(preferences, Given(Example("a"))), verbose=False)


def test_options_that_a_view_does_not_use_stop_the_run(tokenizer, preferences):
    for view, option, value in (
        (RewardView(), "scramble", True),
        (TextView(), "test_questions", 2),
        (PolicyView(), "group_by_length", False),
        (QuestionLengths(), "token_budget", 64),
    ):
        with pytest.raises(
            ValueError, match=rf"data\.{option} would have no effect: Recorder .* {type(view).__name__}"
        ):
            trainer().test(Recorder(view, tokenizer), data(preferences, **{option: value}), verbose=False)


def test_what_identifies_a_view_is_recorded_for_a_resumed_run(preferences):
    found = []
    for view in (QuestionLengths(), QuestionLengths(scale=2)):
        module, module_data = Learner(view), Unpinned(preferences, Rows(), batch_size=3)
        trainer(limit_val_batches=0).fit(module, module_data)
        found.append(module_data.resumed_with()["model.batch_view"])
    assert [entry["scale"] for entry in found] == [1, 2]
    assert all(entry["class"].endswith("QuestionLengths") for entry in found)


def test_a_module_that_cannot_be_served_is_told_what_it_lacks(tokenizer, preferences):
    class Bare(pl.LightningModule):
        def test_step(self, batch, i):
            pass

    with pytest.raises(ValueError, match=r"Bare lacks batch_view, .*batch_repeats.*ServedModule"):
        trainer().test(Bare(), data(preferences), verbose=False)
    with pytest.raises(ValueError, match=r"Recorder\.batch_view is 'text'.*BatchView"):
        trainer().test(Recorder("text", tokenizer), data(preferences), verbose=False)


# --- a kind of request of one's own


class Tops(EvaluationKind):
    name = "tops"

    def preferences(self, preferences, source, seed):
        return [Preference({d.name: len(d.levels) - 1 for d in preferences.dimensions})]


def test_a_kind_of_request_of_one_s_own_is_put_to_each_test_question(tokenizer, preferences):
    module = Recorder(PolicyView(), tokenizer)
    options = {"test_questions": 2, "evaluation_kinds": [Tops()]}
    trainer().test(module, data(preferences, **options), verbose=False)
    (batch,) = module.batches
    rows = [i for i, kind in enumerate(batch.kinds) if kind == "tops"]
    assert batch.index[rows].tolist() == [0, 1] and batch.targets[rows].tolist() == [[2, 1], [2, 1]]
    trainer().validate(module, data(preferences, **options), verbose=False)
    assert "tops" not in module.batches[-1].kinds


def test_a_kind_with_the_name_of_a_dimension_is_refused(preferences):
    kind = Tops()
    kind.name = "heat"
    with pytest.raises(ValueError, match="Tops has the name 'heat'"):
        data(preferences, evaluation_kinds=[kind])
