"""Positions and tokens that a model lacks are said, or kept to, before a run starts."""

from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

from moslim.algorithms.rloo import RLOO
from moslim.data.data_module import PreferenceDataModule
from moslim.data.types import Example, RowKind, Source, Split
from moslim.generation.torch_engine import TorchEngine
from moslim.mapping import ExpectedDistance
from moslim.ops.models import Positions, fit_tokenizer, load_tokenizer
from moslim.policy.policy_trainer import PolicyTrainer
from moslim.policy.supervised_trainer import SupervisedTrainer
from moslim.preferences import PreferenceSet
from moslim.reward.modeling import PreferenceClassifier
from moslim.reward.reward_classifier import RewardClassifier
from moslim.reward.scorer import Scorer
from tests.helpers.policy_runs import trainer

SMALL = {"vocab_size": 30, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
GPT2 = {"vocab_size": 30, "n_embd": 16, "n_layer": 1, "n_head": 2}
MANY = SMALL | {"max_position_embeddings": 24}
GEMMA3 = {
    "text_config": {**MANY, "head_dim": 8, "num_key_value_heads": 1, "sliding_window": 8},
    "vision_config": {
        "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
        "image_size": 28, "patch_size": 14,
    },
    "mm_tokens_per_image": 4,
}  # fmt: skip
FAMILIES: dict[str, tuple[dict[str, Any], int | None, int | None]] = {
    "gpt2": (GPT2 | {"n_positions": 24}, 24, 24),
    "gpt_neo": (
        SMALL | {"max_position_embeddings": 24, "num_layers": 1, "num_heads": 2, "attention_types": [[["global"], 1]]},
        24,
        24,
    ),
    "gptj": (GPT2 | {"n_positions": 24, "rotary_dim": 4}, 24, 24),
    "opt": (SMALL | {"ffn_dim": 24, "word_embed_proj_dim": 16, "max_position_embeddings": 24}, 24, 24),
    "bert": (MANY, 24, 24),
    "roberta": (MANY, 22, 24),
    "distilbert": (
        {"vocab_size": 30, "dim": 16, "hidden_dim": 24, "n_layers": 1, "n_heads": 2, "max_position_embeddings": 24},
        24,
        24,
    ),
    "mpnet": (MANY, 22, 24),
    "llama": (MANY, None, 24),
    "bloom": ({"vocab_size": 30, "hidden_size": 16, "n_layer": 1, "n_head": 2}, None, None),
    "mamba": ({"vocab_size": 30, "hidden_size": 16, "num_hidden_layers": 1, "state_size": 4}, None, None),
    "gemma3": (GEMMA3, None, 24),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_positions_are_those_that_the_model_can_read(family: str) -> None:
    options, most, trained = FAMILIES[family]
    torch.manual_seed(0)
    model = AutoModel.from_config(AutoConfig.for_model(family, **options)).eval()
    assert Positions.of(model) == Positions(most, trained)
    ids = torch.full((1, (most or 40) + 1), 5)
    with torch.no_grad():
        model(input_ids=ids[:, :-1])
        if most is None:
            model(input_ids=ids)
        else:
            with pytest.raises((IndexError, RuntimeError)):
                model(input_ids=ids)


WORDS = ["how", "cake", "boat", "good", "bad", "very", "."]


def words(*added: str, pad: str | None = "<pad>") -> PreTrainedTokenizerFast:
    """A tokenizer of ten words; further words have ids from 10 on."""
    vocabulary = {word: i for i, word in enumerate(["<pad>", "<unk>", "</s>", *WORDS, *added])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token=pad, unk_token="<unk>", eos_token="</s>")


class Words(Source):
    """Rows of a question of ``length`` words."""

    def __init__(self, length: int) -> None:
        self.length = length

    def rows(self, kind: RowKind, split: Split, preferences: PreferenceSet, seed: int) -> list[Example]:
        return [Example("cake " * (self.length - i % 3) + "how", "good .", {"tone": i % 2}) for i in range(4)]


TONE = PreferenceSet({"tone": ["bad", "good"]})


def start(folder: Path, family: str, tokenizer: PreTrainedTokenizerBase | None = None, **options: Any) -> str:
    torch.manual_seed(0)
    config = AutoConfig.for_model(family, **FAMILIES[family][0] | {"vocab_size": 10} | options)
    kind = AutoModelForCausalLM if family in ("gpt2", "llama", "opt") else AutoModel
    kind.from_config(config).save_pretrained(folder)
    (tokenizer or words()).save_pretrained(folder)
    return str(folder)


def data(length: int = 40, **options: Any) -> PreferenceDataModule:
    return PreferenceDataModule(TONE, Words(length), **{"batch_size": 2, "eval_batch_size": 2, **options})


def policy(folder: Path, lm: str, completion: int = 8) -> PolicyTrainer:
    backbone = start(folder / "backbone", "gpt2")
    classifier = PreferenceClassifier.from_backbone(backbone, TONE)
    classifier.save_pretrained(folder / "classifier")
    words().save_pretrained(folder / "classifier")
    engine = TorchEngine(completion)
    parts: dict[str, Any] = {"mapping": ExpectedDistance(), "policy_optimizer": RLOO(), "engine": engine}
    return PolicyTrainer(TONE, lm, str(folder / "classifier"), **parts, num_generations=2)


def test_a_policy_with_a_table_of_positions_keeps_to_it(tmp_path: Path) -> None:
    module = policy(tmp_path, start(tmp_path / "lm", "gpt2"))
    with pytest.warns(UserWarning, match="max_length = 16"):
        trainer(tmp_path, max_steps=1).fit(module, data())
    assert module.rollout is not None and module.rollout.input_ids.shape[1] > 16
    answers = trainer(tmp_path).generate(module, data(), "cake " * 50, ckpt_path="none")
    assert len(answers) == 1


@pytest.mark.parametrize(
    ("completion", "length", "message"),
    [
        (8, 20, r"data\.max_length = 20 and engine\.max_new_tokens = 8 make 28 .* 24 positions of .*lm'.* 16 or less"),
        (24, None, r"engine\.max_new_tokens = 24 leaves no room for a prompt.*24 positions: set it to less than 24"),
        (30, 4, r"engine\.max_new_tokens = 30 leaves no room"),
    ],
)
def test_prompt_and_answer_beyond_the_positions_stop_a_run_at_once(
    completion: int, length: int | None, message: str, tmp_path: Path
) -> None:
    module = policy(tmp_path, start(tmp_path / "lm", "gpt2"), completion)
    for run in (
        lambda: trainer(tmp_path, max_steps=1).fit(module, data(max_length=length)),
        lambda: trainer(tmp_path).test(module, data(max_length=length)),
        lambda: trainer(tmp_path).generate(module, data(max_length=length), "cake", ckpt_path="none"),
    ):
        with pytest.raises(ValueError, match=message):
            run()
    assert module.rollout is None


def test_rotary_positions_are_no_limit_but_a_warning(tmp_path: Path) -> None:
    module = policy(tmp_path, start(tmp_path / "lm", "llama"))
    with pytest.warns(UserWarning, match=r"make 28 tokens, which is more than the 24 tokens that .*lm' was made for"):
        trainer(tmp_path, max_steps=1).fit(module, data(max_length=20))
    assert module.rollout is not None


@pytest.mark.slow
@pytest.mark.parametrize(("family", "most"), [("bert", 24), ("roberta", 22), ("gpt2", 24)])
def test_a_classifier_keeps_to_its_backbones_positions(family: str, most: int, tmp_path: Path) -> None:
    backbone = start(tmp_path / "backbone", family)
    module = RewardClassifier(TONE, backbone=backbone, calibrate=False)
    for length in (most + 1, 256):
        message = rf"data\.max_length = {length} is more than the {most} positions of .*{most} or less"
        with pytest.raises(ValueError, match=message):
            trainer(tmp_path, max_steps=1).fit(module, data(max_length=length))
    with pytest.raises(ValueError, match=f"max_length = {most + 1} is more than the {most} positions"):
        RewardClassifier(TONE, backbone=backbone, max_length=most + 1)
    for length in (None, most):
        with pytest.warns(UserWarning, match=f"max_length = {most}"):
            trainer(tmp_path, max_steps=1).fit(module, data(max_length=length))
    trainer(tmp_path).test(module, data())
    module.export(tmp_path / "classifier")
    for limit in (None, 1000):
        scorer = Scorer(tmp_path / "classifier")
        scorer.classifier.config.pair_length = limit
        again = Scorer(scorer.classifier, scorer.tokenizer)
        again.reserve(())
        assert again.probabilities(["cake " * 60], ["good ."]).shape == (1, 1, 2)


def test_language_modelling_keeps_to_the_positions(tmp_path: Path) -> None:
    lm = start(tmp_path / "lm", "gpt2")
    module = SupervisedTrainer(model=lm, engine=TorchEngine(8))
    with pytest.raises(ValueError, match=r"data\.max_length = 25 is more than the 24 positions"):
        trainer(tmp_path, max_steps=1).fit(module, data(max_length=25))
    for length in (None, 24):
        trainer(tmp_path, max_steps=1).fit(module, data(max_length=length))
    trainer(tmp_path).predict(module, data(), return_predictions=False)
    assert len(module.answers(["cake " * 60], [(0,)], 1.0)) == 1
    module.engine.max_new_tokens = 24
    with pytest.raises(ValueError, match=r"max_new_tokens = 24 leaves no room"):
        module.answers(["cake"], [(0,)], 1.0)


def padded() -> PreTrainedTokenizerFast:
    """Its padding token was added without resizing the model."""
    tokenizer = words(pad=None)
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    assert tokenizer.pad_token_id == 10
    return tokenizer


def test_a_padding_token_without_embedding_does_no_harm(tmp_path: Path) -> None:
    lm, fine = (start(tmp_path / name, "llama", tokenizer) for name, tokenizer in (("lm", padded()), ("fine", words())))
    message = r"padding token '\[PAD\]' \(10\) of .*lm' is beyond the model's 10 embeddings"
    with pytest.warns(UserWarning, match=message):
        module = policy(tmp_path, lm)
    trainer(tmp_path, max_steps=1).fit(module, data(4))
    module.export(str(tmp_path / "export"))
    assert policy(tmp_path, str(tmp_path / "export")).tokenizer.pad_token is None
    supervised = SupervisedTrainer(model=lm)
    trainer(tmp_path, max_steps=1).fit(supervised, data(4))
    scores = []
    for backbone in (lm, fine):
        torch.manual_seed(0)
        reward = RewardClassifier(TONE, backbone=backbone, calibrate=False)
        trainer(tmp_path, max_steps=1).fit(reward, data(4))
        reward.export(tmp_path / "classifier")
        scorer = Scorer(tmp_path / "classifier")
        scores.append(scorer.probabilities(["how cake", "how"], ["good .", "bad"], batch_size=2))
    torch.testing.assert_close(*scores)


def test_other_tokens_without_embedding_are_refused_with_the_remedy(tmp_path: Path) -> None:
    llama = AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", **SMALL | {"vocab_size": 10}))
    plain, framed = words("tea"), words()
    framed.add_special_tokens({"additional_special_tokens": ["<|user|>", "<|spare|>"]})
    fit_tokenizer(framed, llama, "start")  # nothing writes them
    framed.chat_template = "{% for m in messages %}<|user|>{{ m['content'] }}{% endfor %}"
    ending = words()
    ending.add_special_tokens({"eos_token": "<|end|>"})
    for tokenizer, name in ((plain, "'tea' (10)"), (framed, "'<|user|>' (10)"), (ending, "'<|end|>' (10)")):
        with pytest.raises(ValueError) as error:
            fit_tokenizer(tokenizer, llama, "start")
        assert f"'start' has tokens whose ids are beyond the model's 10 embeddings: {name}." in str(error.value)
        assert "resize_token_embeddings(len(tokenizer))" in str(error.value)
    lm = start(tmp_path / "lm", "llama", plain)
    assert len(load_tokenizer(lm)) == 11
    runs = [
        lambda: policy(tmp_path, lm),
        lambda: trainer(tmp_path, max_steps=1).fit(SupervisedTrainer(model=lm), data()),
        lambda: trainer(tmp_path, max_steps=1).fit(RewardClassifier(TONE, backbone=lm), data()),
        lambda: Scorer(PreferenceClassifier.from_backbone(lm, TONE), plain),
    ]
    for run in runs:
        with pytest.raises(ValueError, match="'tea' \\(10\\)"):
            run()


def test_an_unknown_token_counts_where_it_is_written() -> None:
    llama = AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", **SMALL | {"vocab_size": 10}))
    kept = words()
    kept.add_special_tokens({"unk_token": "<unknown>"})
    fit_tokenizer(kept, llama, "start")  # unknown words are still "<unk>", which has a row
    vocabulary = {word: i for i, word in enumerate(["<pad>", "</s>", *WORDS, "tea", "<unk>"])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    last = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", unk_token="<unk>", eos_token="</s>")
    with pytest.raises(ValueError, match=r"10 embeddings: '<unk>' \(10\)"):
        fit_tokenizer(last, llama, "start")


@pytest.mark.parametrize("question", ["</s>", "<pad> <unk>"])
def test_a_question_without_tokens_is_not_answered(question: str, tmp_path: Path) -> None:
    module = policy(tmp_path, start(tmp_path / "lm", "llama"))
    with pytest.raises(ValueError, match="the question is empty"):
        trainer(tmp_path).generate(module, data(), question, ckpt_path="none")
