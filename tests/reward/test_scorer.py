from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer

from moslim.data.prompts import PairEncoder
from moslim.preferences import PreferenceSet
from moslim.reward.classifier import PreferenceClassifier
from moslim.reward.scorer import Scorer

QUESTIONS = ["how cake", "why boat", "how boat", [{"role": "user", "content": "why cake"}]]
ANSWERS = ["good very very very .", "", "bad .", "so so good ."]


@pytest.fixture
def scorer(preferences: PreferenceSet, backbone: str, tmp_path: Path) -> Scorer:
    torch.manual_seed(0)
    PreferenceClassifier.from_backbone(backbone, preferences).save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(backbone).save_pretrained(tmp_path)
    return Scorer.from_pretrained(tmp_path)


def test_scores_are_those_of_each_pair_alone_in_the_order_given(scorer: Scorer, preferences: PreferenceSet) -> None:
    probs = scorer.probabilities(QUESTIONS, ANSWERS, batch_size=3)
    assert scorer.preferences == preferences
    assert probs.shape == (4, 2, 3) and probs.dtype == torch.float32 and not probs.requires_grad
    encoder = PairEncoder(scorer.tokenizer)
    for row, (question, answer) in enumerate(zip(QUESTIONS, ANSWERS, strict=True)):
        alone = scorer.classifier.probabilities(*encoder.batch([question], [answer]))[0]
        torch.testing.assert_close(probs[row], alone)


def test_long_pairs_are_cut_as_in_training(scorer: Scorer) -> None:
    scorer.classifier.config.pair_length = 6
    short = Scorer(scorer.classifier, scorer.tokenizer)
    with pytest.warns(UserWarning, match="cut from its start"):
        probs = short.probabilities(["how " * 50 + "cake"], ["good ."])
    ids, mask = PairEncoder(scorer.tokenizer).batch(["how how cake"], ["good ."])
    torch.testing.assert_close(probs, scorer.classifier.probabilities(ids, mask))


def test_no_rows_give_no_scores(scorer: Scorer) -> None:
    assert scorer.probabilities([], []).shape == (0, 2, 3)


def test_answers_must_match_questions(scorer: Scorer) -> None:
    with pytest.raises(ValueError, match="shorter"):
        scorer.probabilities(["how cake"], [])
