import pytest

from moslim.data.loader import Draw
from moslim.data.prompt_batches import CollatePrompts, Prompt, Request, SampledPrompts, exchanged, requested
from moslim.data.prompts import PromptRenderer
from moslim.data.samplers import PreferenceSampler, Uniform
from moslim.data.types import Example, RowKind, Split
from moslim.instructions import Tags
from moslim.preferences import Preference
from tests.helpers.chats import Rows

A, B, C, NONE = Preference({"size": 0}), Preference({"size": 1, "heat": 0}), Preference({"heat": 1}), Preference()


def sampled(preferences, sampler=None, seed=0):
    source = Rows()
    rows = source.rows(RowKind.PROMPTS, Split.TRAIN, preferences, seed)
    return SampledPrompts(rows, preferences, sampler or Uniform(), source, seed)


def test_preference_is_a_function_of_seed_epoch_and_row(preferences):
    def drawn(epoch, seed=0):
        dataset = sampled(preferences, seed=seed)
        return [dataset[Draw(epoch, row)].preference for row in range(12)]

    assert drawn(0) == drawn(0)
    assert drawn(0) != drawn(1)
    assert drawn(0) != drawn(0, seed=1)
    assert len(set(drawn(0))) > 3


class HeldOut(PreferenceSampler):
    """Asks for what is held out."""

    def draw(self, preferences, generator, source):
        return Preference({"size": 2, "heat": 1})


def test_no_sampler_may_ask_for_what_is_held_out(preferences):
    with pytest.raises(ValueError, match=r"HeldOut drew {'size': 2, 'heat': 1}, which Rows holds out"):
        sampled(preferences, HeldOut())[Draw(0, 0)]


def test_batch_of_prompts(tokenizer, preferences):
    collate = CollatePrompts(PromptRenderer(tokenizer, Tags(), preferences))
    batch = collate([Prompt("a <|user|>", B, 7), Prompt("b", NONE, 3, "default")])
    assert batch.targets.tolist() == [[1, 0], [-1, -1]]
    assert batch.index.tolist() == [7, 3]
    assert batch.kinds == ["", "default"]
    assert batch.questions == ["a ", "b"]
    assert batch.attention_mask.tolist() == [[1] * 14, [0] * 10 + [1] * 4]
    assert tokenizer.decode(batch.input_ids[1, 10:]) == "<|user|> b <|end|> <|assistant|>"
    assert (batch.input_ids[1, :10] == tokenizer.pad_token_id).all()


def test_exchange():
    assert exchanged([A, NONE, B, C]) == ([A, NONE, B, C], [B, NONE, C, A])
    assert exchanged([NONE, A]) == ([NONE, NONE], [NONE, NONE])
    assert exchanged([NONE]) == ([NONE], [NONE])


def test_scrambled_batch_shows_one_preference_and_rewards_another(tokenizer, preferences):
    prompts = [Prompt("a", A, 0), Prompt("b", NONE, 1), Prompt("c", B, 2), Prompt("d", C, 3)]
    renderer = PromptRenderer(tokenizer, Tags(), preferences)
    plain, scrambled = CollatePrompts(renderer)(prompts), CollatePrompts(renderer, scramble=True)(prompts)
    assert scrambled.input_ids.tolist() == plain.input_ids.tolist()
    assert plain.targets.tolist() == [[0, -1], [-1, -1], [1, 0], [-1, 1]]
    assert scrambled.targets.tolist() == [[1, 0], [-1, -1], [-1, 1], [0, -1]]


def test_requests_are_put_to_questions():
    dataset = requested([(4, Example("x")), (9, Example("y"))], [[Request(A, "sweep"), Request(NONE, "default")], []])
    assert len(dataset) == 2
    assert dataset[Draw(0, 1)] == Prompt("x", NONE, 4, "default")


def test_a_batch_that_comes_again_is_not_made_again(tokenizer, preferences):
    collate = CollatePrompts(PromptRenderer(tokenizer, Tags(), preferences))
    first = collate([Prompt("a", B, 7), Prompt("b", NONE, 3)])
    assert collate([Prompt("a", B, 7), Prompt("b", NONE, 3)]) is first
    other = collate([Prompt("a", A, 7), Prompt("b", NONE, 3)])
    assert other is not first and other.targets.tolist() == [[0, -1], [-1, -1]]
