import random

import pytest
import torch
from transformers import LlamaConfig, LlamaModel

from moslim.evaluation.judges import ClassifierJudge, GoldJudge, JudgeInfo
from moslim.preferences import PreferenceSet
from moslim.reward.modeling import PreferenceClassifier
from moslim.workbench.grammar import LEVELS, TOPICS, ask, build_tokenizer, write_answer

WORLD = PreferenceSet(LEVELS)
QUESTION = ask(TOPICS[0], 0)


def test_gold_judge_reads_the_levels_that_an_answer_was_written_with():
    wanted = {"verbosity": 3, "formality": 1, "warmth": 2, "helpfulness": 3}
    answer = write_answer(TOPICS[0], wanted, random.Random(0))
    judge = GoldJudge()
    judge.setup(WORLD)
    levels = judge.levels([QUESTION, [{"role": "user", "content": QUESTION}], QUESTION], [answer, answer, ""])
    assert levels.dtype == torch.float32
    assert levels.tolist() == [[3, 1, 2, 3], [3, 1, 2, 3], [0, 0, 0, 0]]


def test_gold_judge_keeps_the_order_of_the_preferences():
    answer = write_answer(TOPICS[0], {"verbosity": 3, "formality": 1, "warmth": 2, "helpfulness": 3}, random.Random(0))
    judge = GoldJudge()
    judge.setup(PreferenceSet({name: LEVELS[name] for name in ("warmth", "verbosity")}))
    assert judge.levels([QUESTION], [answer]).tolist() == [[2, 3]]
    assert judge.levels([], []).shape == (0, 2)


def test_gold_judge_is_no_proxy():
    assert GoldJudge().info == JudgeInfo("gold", proxy=False)


def test_gold_judge_refuses_what_it_cannot_measure():
    with pytest.raises(ValueError, match=r"'humour' is unknown to the gold judge.*verbosity"):
        GoldJudge().setup(PreferenceSet({"humour": ["dry", "silly"]}))
    with pytest.raises(ValueError, match=r"'warmth' has the levels .* in `preferences`, but .* in the gold judge"):
        GoldJudge().setup(PreferenceSet({"warmth": ["icy", "glowing"]}))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    torch.manual_seed(0)
    tokenizer = build_tokenizer()
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    backbone = LlamaModel(LlamaConfig(vocab_size=len(tokenizer), num_key_value_heads=2, **sizes))
    preferences = PreferenceSet({"polite": ["no", "yes"], **LEVELS})
    path = tmp_path_factory.mktemp("judge")
    classifier = PreferenceClassifier.from_backbone(backbone, preferences)
    certain = [0 + 1, 2 + 4, 7 + 2, 12 + 3, 17 + 0]  # heads start at 0, 2, 7, 12, 17: polite 1, verbosity 4, ...
    classifier.head.bias.data[certain] = 100.0
    classifier.save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


def test_classifier_judge_takes_the_most_probable_level_by_name(folder):
    judge = ClassifierJudge(str(folder), batch_size=2)
    judge.setup(PreferenceSet({"warmth": LEVELS["warmth"], "polite": ["no", "yes"]}))
    levels = judge.levels([QUESTION, [{"role": "user", "content": QUESTION}], ""], ["Rinse it.", "", "Good luck."])
    assert levels.dtype == torch.float32
    assert levels.tolist() == [[3, 1]] * 3
    assert judge.info == JudgeInfo("classifier", proxy=True)


def test_classifier_judge_refuses_an_unknown_dimension(folder):
    with pytest.raises(ValueError, match="'humour' is unknown to the judge in"):
        ClassifierJudge(str(folder)).setup(PreferenceSet({"humour": ["dry", "silly"]}))


def test_classifier_judge_needs_setup():
    with pytest.raises(RuntimeError, match="before setup"):
        ClassifierJudge("nowhere").levels(["q"], ["a"])
