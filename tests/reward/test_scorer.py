import time
import warnings
from pathlib import Path

import pytest
import torch
from transformers import AutoModel, AutoTokenizer, LlamaConfig, MambaConfig

from moslim.data.prompts import PairEncoder
from moslim.preferences import PreferenceSet
from moslim.reward.modeling import PreferenceClassifier, PreferenceClassifierConfig
from moslim.reward.scorer import Scorer, pair_limit
from moslim.utils.errors import UsageError

QUESTIONS = ["how cake", "why boat", "how boat", [{"role": "user", "content": "why cake"}]]
ANSWERS = ["good very very very .", "", "bad .", "so so good ."]


@pytest.fixture
def scorer(preferences: PreferenceSet, backbone: str, tmp_path: Path) -> Scorer:
    torch.manual_seed(0)
    PreferenceClassifier.from_backbone(backbone, preferences).save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(backbone).save_pretrained(tmp_path)
    return Scorer(tmp_path)


def test_scores_are_those_of_each_pair_alone_in_the_order_given(scorer: Scorer, preferences: PreferenceSet) -> None:
    probs = scorer.probabilities(QUESTIONS, ANSWERS, batch_size=3)
    assert scorer.preferences == preferences
    assert probs.shape == (4, 2, 3) and probs.dtype == torch.float32 and not probs.requires_grad
    encoder = PairEncoder(scorer.tokenizer)
    for row, (question, answer) in enumerate(zip(QUESTIONS, ANSWERS, strict=True)):
        alone = scorer.classifier.probabilities(*encoder.batch([question], [answer]))[0]
        torch.testing.assert_close(probs[row], alone)


def test_a_pair_is_scored_by_names(scorer: Scorer) -> None:
    names = ("tone", "amount")
    assert scorer.preferences.names == names
    one, two = scorer.score(list(zip(QUESTIONS[:2], ANSWERS[:2], strict=True)))
    table = scorer.probabilities(QUESTIONS[:2], ANSWERS[:2]).double()
    assert scorer(QUESTIONS[0], ANSWERS[0]).levels == one.levels
    for row, scores in enumerate((one, two)):
        for i, dimension in enumerate(scorer.preferences.dimensions):
            probabilities = scores.probabilities[dimension.name]
            assert tuple(probabilities) == dimension.levels
            assert list(probabilities.values()) == table[row, i, : len(dimension.levels)].tolist()
            assert scores.levels[dimension.name] == max(probabilities, key=probabilities.__getitem__)
            mean = sum(level * p for level, p in enumerate(probabilities.values()))
            assert scores.expected[dimension.name] == pytest.approx(mean)
    assert scorer.score([]) == []


def test_a_folder_is_loaded_in_a_given_type(scorer: Scorer, tmp_path: Path) -> None:
    coarse = Scorer(tmp_path, device="cpu", dtype=torch.bfloat16)
    assert coarse.classifier.dtype == torch.bfloat16
    probs = coarse.probabilities(QUESTIONS, ANSWERS)
    assert probs.dtype == torch.float32
    torch.testing.assert_close(probs, scorer.probabilities(QUESTIONS, ANSWERS), atol=0.05, rtol=0.1)


def test_an_object_needs_its_tokenizer(scorer: Scorer) -> None:
    with pytest.raises(UsageError, match="needs its tokenizer"):
        Scorer(scorer.classifier)


def test_long_pairs_are_cut_as_in_training(scorer: Scorer) -> None:
    scorer.classifier.config.pair_length = 6
    short = Scorer(scorer.classifier, scorer.tokenizer)
    with pytest.warns(UserWarning, match="cut from its start"):
        probs = short.probabilities(["how " * 50 + "cake"], ["good ."])
    ids, mask = PairEncoder(scorer.tokenizer).batch(["how how cake"], ["good ."])
    torch.testing.assert_close(probs, scorer.classifier.probabilities(ids, mask))


def test_scores_do_not_depend_on_order_or_on_what_else_is_scored(scorer: Scorer) -> None:
    questions = [QUESTIONS[i % 4] for i in range(23)]
    answers = [f"{'good ' * (i * 7 % 11)}." for i in range(23)]
    probs = scorer.probabilities(questions, answers, batch_size=4)
    order = torch.randperm(23, generator=torch.Generator().manual_seed(0)).tolist()
    shuffled = scorer.probabilities([questions[i] for i in order], [answers[i] for i in order], batch_size=5)
    torch.testing.assert_close(shuffled, probs[order])
    torch.testing.assert_close(scorer.probabilities(questions[7:9], answers[7:9]), probs[7:9])


def test_an_answer_of_100000_characters_keeps_its_end_and_costs_little(scorer: Scorer) -> None:
    """The question goes first, then the start of the answer; the limit is what the backbone can read, 64 tokens."""
    long = "so " * 33_333 + "bad ."
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        began = time.perf_counter()
        probs = scorer.probabilities(["how cake", "why boat", "how cake"], [long, long, "good ."])
        assert time.perf_counter() - began < 10
    ids = scorer.tokenizer("so " * 61 + "bad .", add_special_tokens=False)["input_ids"] + [
        scorer.tokenizer.eos_token_id
    ]
    ids = torch.tensor([ids[-64:]])
    torch.testing.assert_close(probs[0], scorer.classifier.probabilities(ids, torch.ones_like(ids))[0])
    torch.testing.assert_close(probs[1], probs[0])  # nothing is left of the questions
    torch.testing.assert_close(probs[2], scorer.probabilities(["how cake"], ["good ."])[0])


def test_an_answer_full_of_special_tokens_is_read_in_linear_time(scorer: Scorer) -> None:
    began = time.perf_counter()
    probs = scorer.probabilities(["how cake"], ["</s>" * 25_000 + "good ."])
    assert time.perf_counter() - began < 20
    torch.testing.assert_close(probs, scorer.probabilities(["how cake"], ["good ."]))


def test_empty_answers_and_chats_are_scored(scorer: Scorer) -> None:
    chat = [
        {"role": "user", "content": "how cake"},
        {"role": "assistant", "content": "good ."},
        {"role": "user", "content": "why"},
    ]
    probs = scorer.probabilities([chat, "how cake", [{"role": "user", "content": "how cake"}]], ["", "", ""])
    torch.testing.assert_close(probs.sum(-1), torch.ones(3, 2))
    torch.testing.assert_close(probs[1], probs[2])
    assert not torch.allclose(probs[0], probs[1])
    with pytest.raises(ValueError, match="must end with a user turn"):
        scorer.probabilities([chat[:2]], ["good ."])


@pytest.mark.parametrize(
    ("trained_on", "positions", "tokenizer_says", "limit"),
    [(20, 64, 32, 20), (None, 64, 10**30, 64), (None, 64, 32, 32), (None, None, 10**30, None), (None, None, 512, 512)],
)
def test_longest_pair_is_what_it_was_trained_on_or_what_can_be_read(
    trained_on: int | None, positions: int | None, tokenizer_says: int, limit: int | None, scorer: Scorer
) -> None:
    family = MambaConfig() if positions is None else LlamaConfig(max_position_embeddings=positions)
    scorer.tokenizer.model_max_length = tokenizer_says
    config = PreferenceClassifierConfig(family, pair_length=trained_on)
    with torch.device("meta"):
        backbone = AutoModel.from_config(family)
    assert pair_limit(config, scorer.tokenizer, backbone) == limit


def test_no_rows_give_no_scores(scorer: Scorer) -> None:
    assert scorer.probabilities([], []).shape == (0, 2, 3)


def test_answers_must_match_questions(scorer: Scorer) -> None:
    with pytest.raises(ValueError, match="shorter"):
        scorer.probabilities(["how cake"], [])
