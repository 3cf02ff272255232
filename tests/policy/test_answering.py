import pytest
import torch

from moslim.data.types import PromptBatch
from moslim.generation.torch_engine import TorchEngine
from moslim.ops.numerics import derive_seed
from moslim.policy.generation import CompletionGenerator, completion_seeds
from tests.helpers.policy_models import ENDS

EOS = [2, *ENDS]


class Watching(TorchEngine):
    """Notes the mode of the model that it samples from."""

    def sample(self, model, *args):
        self.training = model.training
        return super().sample(model, *args)


def prompt_batch(prompts, rows):
    ids, mask = prompts[0][rows], prompts[1][rows]
    kept = mask.any(dim=0)
    questions = [f"question {row}" for row in rows]
    targets = torch.full((len(rows), 2), -1)
    return PromptBatch(ids[:, kept], mask[:, kept], targets, torch.tensor(rows), questions, [""] * len(rows))


@pytest.fixture
def generator(tokenizer):
    return CompletionGenerator(Watching(10), tokenizer, EOS)


def answer(generator, model, prompts, rows, samples=3):
    return generator(model, prompt_batch(prompts, rows), [(9, row) for row in rows], samples)


def test_answers_of_a_prompt_are_adjacent_and_follow_it(generator, models, prompts, tokenizer):
    found = answer(generator, models["llama"], prompts, [0, 1, 2])
    width = prompts[0].shape[1]
    assert found.questions == ["question 0"] * 3 + ["question 1"] * 3 + ["question 2"] * 3
    for row in range(9):
        assert torch.equal(found.input_ids[row, :width], prompts[0][row // 3])
        assert torch.equal(found.attention_mask[row, :width], prompts[1][row // 3])
        spoken = found.completions.tokens[row][found.completions.mask[row]]
        assert found.texts[row] == tokenizer.decode(spoken, skip_special_tokens=True)
    assert torch.equal(found.input_ids[:, width:], found.completions.tokens)
    assert torch.equal(found.attention_mask[:, width:].bool(), found.completions.mask)
    assert found.attention_mask.dtype == prompts[1].dtype


def test_the_end_token_is_not_part_of_the_text(tokenizer, models, prompts):
    found = answer(
        CompletionGenerator(TorchEngine(10), tokenizer, list(range(len(tokenizer)))), models["llama"], prompts, [0]
    )
    forced = found.completions.tokens[:, 0].tolist()
    assert found.texts == [tokenizer.decode([token], skip_special_tokens=True) for token in forced]
    everything = CompletionGenerator(
        TorchEngine(10, temperature=1e6), tokenizer, [2]
    )  # all words, the special ones too
    texts = answer(everything, models["llama"], prompts, [0, 1, 2, 3, 4], samples=60).texts
    assert not any("<|" in text for text in texts)


def test_an_answer_does_not_depend_on_its_place_in_the_batch(generator, models, prompts):
    whole = answer(generator, models["grouped"], prompts, [0, 1, 2, 3, 4])
    by_question = dict(zip(whole.questions[::3], [whole.texts[i : i + 3] for i in range(0, 15, 3)], strict=True))
    for rows in ([4, 3, 2, 1, 0], [2], [3, 0]):
        found = answer(generator, models["grouped"], prompts, rows)
        for i, row in enumerate(rows):
            assert found.texts[3 * i : 3 * i + 3] == by_question[f"question {row}"]


def test_more_samples_leave_the_first_ones(generator, models, prompts):
    few, many = (answer(generator, models["grouped"], prompts, [1], samples=n).texts for n in (2, 5))
    assert many[:2] == few and len(set(many)) > 1


def test_seeds_are_made_of_key_and_sample():
    found = completion_seeds([(1, 2, 3), (4, 5)], 2, torch.device("cpu"))
    assert found.dtype == torch.int64
    assert found.tolist() == [[derive_seed(*key, i) for i in (0, 1)] for key in ((1, 2, 3), (4, 5))]


@pytest.mark.parametrize("training", [True, False])
def test_the_engine_gets_a_model_in_eval_mode(generator, models, prompts, training):
    model = models["llama"].train(training)
    try:
        answer(generator, model, prompts, [0])
        assert not generator.engine.training and model.training == training
    finally:
        model.eval()
