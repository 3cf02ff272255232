import time

import lightning.pytorch as pl
import pytest
import torch

from moslim.data.data_module import PreferenceDataModule
from moslim.data.prompts import PairEncoder
from moslim.data.types import Example, Source
from moslim.data.views import RewardView, ServedModule
from tests.helpers.chats import WITH_SYSTEM, build_tokenizer


@pytest.mark.filterwarnings("ignore:a question is cut")
def test_cut_questions_and_answers_are_counted(tokenizer):
    encoder = PairEncoder(tokenizer, max_length=8)
    for question, answer in [("a", "b"), ("a b c d", "e"), ("a b c d e f", "g"), ("a", "b c d e f g h a b c")]:
        assert len(encoder.encode(question, answer)) <= 8
    assert (encoder.truncation.pairs, encoder.truncation.questions, encoder.truncation.answers) == (4, 3, 1)
    assert str(encoder.truncation) == "of 4 pairs, 3 questions and 1 answers were cut from their start"


@pytest.mark.filterwarnings("ignore:a question is cut")
@pytest.mark.parametrize("long", ["question", "answer"])
def test_a_hundred_thousand_characters_take_linear_time(long):
    tokenizer = build_tokenizer(WITH_SYSTEM)
    text = "a b c d e f g h " * 6250 + "boil water"
    start = time.perf_counter()
    question, answer = (text, "warm") if long == "question" else ("how", text)
    ids = PairEncoder(tokenizer, max_length=256).encode(question, answer)
    assert time.perf_counter() - start < 3.0
    assert len(ids) == 256
    words = tokenizer.convert_ids_to_tokens(ids)
    ending = "water <|end|> <|assistant|> warm <|end|>" if long == "question" else "g h boil water <|end|>"
    assert " ".join(words).endswith(ending)


class LongRows(Source):
    def rows(self, kind, split, preferences, seed):
        return [Example("a b c d e f"[: 2 * i + 1], "g h", {"size": 1}) for i in range(4)]


class Reader(pl.LightningModule, ServedModule):
    batch_view = RewardView()

    def __init__(self, tokenizer):
        super().__init__()
        self.tokenizer = tokenizer

    def test_step(self, batch, i):
        self.log("loss", torch.zeros(()))


@pytest.mark.filterwarnings(
    "ignore:a question is cut", "ignore::lightning.pytorch.utilities.warnings.PossibleUserWarning"
)
@pytest.mark.parametrize(("own", "longest"), [(None, 6), (8, 8)])
def test_pairs_are_cut_to_what_the_module_was_made_for_unless_told_otherwise(tokenizer, preferences, own, longest):
    class Short(Reader):
        pair_limit = 6

        def test_step(self, batch, i):
            self.width = batch.input_ids.shape[1]

    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "logger": False, "accelerator": "cpu"}
    module = Short(tokenizer)
    with pytest.warns(UserWarning, match=f"max_length = {longest}"):
        pl.Trainer(**quiet).test(module, PreferenceDataModule(preferences, LongRows(), max_length=own), verbose=False)
    assert module.width == longest


@pytest.mark.filterwarnings(
    "ignore:a question is cut", "ignore::lightning.pytorch.utilities.warnings.PossibleUserWarning"
)
def test_what_was_cut_is_said_once_at_the_end(tokenizer, preferences):
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "logger": False, "accelerator": "cpu"}
    data = PreferenceDataModule(preferences, LongRows(), max_length=8)
    with pytest.warns(UserWarning, match="max_length = 8: of 4 pairs, 2 questions and 0 answers were cut") as warned:
        pl.Trainer(**quiet).test(Reader(tokenizer), data, verbose=False)
    assert sum("pairs" in str(warning.message) for warning in warned) == 1
