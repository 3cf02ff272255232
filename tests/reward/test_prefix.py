"""Generations behind a question that is computed once, against whole pairs."""

import pytest
import torch
from transformers import (
    AutoTokenizer,
    BertConfig,
    BertModel,
    LlamaConfig,
    LlamaModel,
    MambaConfig,
    MambaModel,
    MistralConfig,
    MistralModel,
)

from moslim.preferences import PreferenceSet
from moslim.reward.modeling import PreferenceClassifier
from moslim.reward.scorer import Scorer, can_share

SMALL = {"vocab_size": 12, "hidden_size": 32, "num_hidden_layers": 2, "pad_token_id": 0, "initializer_range": 0.15}
HEADS = {"num_attention_heads": 4, "intermediate_size": 48}
BACKBONES = {
    "llama": lambda: LlamaModel(LlamaConfig(**SMALL, **HEADS)),
    "sliding": lambda: MistralModel(MistralConfig(**SMALL, **HEADS, num_key_value_heads=2, sliding_window=5)),
    "bert": lambda: BertModel(BertConfig(**SMALL, **HEADS)),
    "mamba": lambda: MambaModel(MambaConfig(**SMALL, state_size=4)),
}
QUESTIONS = ["how cake very so", "why boat", "how boat very very"]
ANSWERS = [".", "good very very very .", "bad .", "so so good ."]
ASKED, GIVEN = zip(*[(q, f"{a} {'so ' * i}.") for i, q in enumerate(QUESTIONS) for a in ANSWERS], strict=True)


def scorer(family: str, preferences: PreferenceSet, backbone: str, **options) -> Scorer:
    torch.manual_seed(0)
    classifier = PreferenceClassifier.from_backbone(BACKBONES[family](), preferences, **options)
    classifier.head.weight.data.normal_(0, 0.3)
    return Scorer(classifier, AutoTokenizer.from_pretrained(backbone))


def tokens_read(scorer: Scorer, **options) -> int:
    """Tokens, padding included, that the backbone is given."""
    read = []
    handle = scorer.classifier.backbone.register_forward_pre_hook(
        lambda _, __, inputs: read.append(inputs["input_ids"].numel()), with_kwargs=True
    )
    scorer.probabilities(ASKED, GIVEN, **options)
    handle.remove()
    return sum(read)


@pytest.mark.parametrize("options", [{}, {"layer": 1}, {"pooling": ["mean", "first"]}, {"pooling": "max"}])
@pytest.mark.parametrize("family", ["llama", "sliding"])
def test_probabilities_are_those_of_whole_pairs(family, options, preferences, backbone):
    shared = scorer(family, preferences, backbone, **options)
    apart = shared.probabilities(ASKED, GIVEN, share_prefixes="never")
    order = torch.randperm(len(ASKED), generator=torch.Generator().manual_seed(0)).tolist()
    for share in ("always", "auto"):
        found = shared.probabilities([ASKED[i] for i in order], [GIVEN[i] for i in order], share_prefixes=share)
        torch.testing.assert_close(found, apart[order], atol=1e-5, rtol=0)
    assert apart.std(dim=0).max() > 0.05  # they differ between pairs


def test_each_question_is_read_once_where_that_pays(preferences, backbone):
    own = scorer("llama", preferences, backbone)
    assert can_share(own.classifier)  # which is tried once, with tokens of its own
    assert (
        tokens_read(own) == tokens_read(own, share_prefixes="always") < 0.8 * tokens_read(own, share_prefixes="never")
    )
    one_each = own.probabilities(QUESTIONS, GIVEN[:3], share_prefixes="auto")
    torch.testing.assert_close(
        one_each, own.probabilities(QUESTIONS, GIVEN[:3], share_prefixes="never"), atol=0, rtol=0
    )


@pytest.mark.parametrize("family", ["bert", "mamba"])
def test_backbones_that_cannot_compute_whole_pairs(family, preferences, backbone):
    own = scorer(family, preferences, backbone)
    assert not can_share(own.classifier)
    assert torch.equal(
        own.probabilities(ASKED, GIVEN, share_prefixes="always"),
        own.probabilities(ASKED, GIVEN, share_prefixes="never"),
    )


@pytest.mark.parametrize("share", ["always", "never"])
def test_passes_hold_few_tokens(share, preferences, backbone):
    own = scorer("llama", preferences, backbone)
    read = []
    handle = own.classifier.backbone.register_forward_pre_hook(
        lambda _, __, inputs: read.append(inputs["input_ids"].numel()), with_kwargs=True
    )
    found = own.probabilities(ASKED, GIVEN, share_prefixes=share, tokens=30)
    assert max(read) <= 30 and len(read) > 3
    handle.remove()
    torch.testing.assert_close(found, own.probabilities(ASKED, GIVEN, batch_size=12), atol=1e-5, rtol=0)
