"""Models of texts and images, whose configuration holds their language model's, as policy and as backbone."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText, PreTrainedTokenizerBase

from moslim.algorithms.ppo import PPO
from moslim.ops.length_bucketing import CompletionBatch
from moslim.ops.loading import language_part
from moslim.ops.logprobs import ForwardConfig, completion_logprobs
from moslim.ops.lora import LoraOptions, merged
from moslim.ops.models import load_causal_lm
from moslim.policy.supervised_trainer import SupervisedTrainer
from moslim.preferences import PreferenceSet
from moslim.reward.reward_classifier import RewardClassifier
from moslim.reward.scorer import Scorer
from moslim.utils.errors import UsageError
from moslim.workbench.grammar import LEVELS
from tests.helpers.policy_models import ENDS
from tests.helpers.policy_runs import PLAIN, data, make, trainer

TEXT = {
    "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 1, "head_dim": 8, "initializer_range": 0.3,
}  # fmt: skip
IMAGES = {
    "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
    "image_size": 28, "patch_size": 14,
}  # fmt: skip
NESTED: dict[str, dict[str, Any]] = {
    "gemma3": {
        "text_config": {**TEXT, "sliding_window": 8, "final_logit_softcapping": 30.0},
        "vision_config": IMAGES,
        "mm_tokens_per_image": 4,
    },
    "llava": {
        "text_config": {**TEXT, "model_type": "llama"},
        "vision_config": {**IMAGES, "model_type": "clip_vision_model"},
    },
    "llama4": {  # a family that has a model of texts only, too, and none without a head
        "text_config": {**TEXT, "intermediate_size_mlp": 24, "num_local_experts": 2, "interleave_moe_layer_step": 1},
        "vision_config": {
            **IMAGES, "vision_output_dim": 16, "projector_input_dim": 16, "projector_output_dim": 16,
        },
    },
}  # fmt: skip


@pytest.fixture(params=list(NESTED))
def start(request: pytest.FixtureRequest, tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> str:
    """Folder of such a model."""
    options = NESTED[request.param]
    options["text_config"]["vocab_size"] = len(tokenizer)
    torch.manual_seed(0)
    config = AutoConfig.for_model(request.param, **options)
    model = (AutoModelForCausalLM if request.param == "gemma3" else AutoModelForImageTextToText).from_config(config)
    model.generation_config.eos_token_id = [tokenizer.eos_token_id, *ENDS]
    for part in (model, tokenizer):
        part.save_pretrained(tmp_path / "start")
    return str(tmp_path / "start")


@pytest.mark.slow
@pytest.mark.parametrize("lora", [None, LoraOptions(rank=2)])
def test_policy_with_a_critic_and_classifier_on_such_a_model(
    start: str, lora: LoraOptions | None, preferences: PreferenceSet, tmp_path: Path
) -> None:
    reward = RewardClassifier(PreferenceSet(LEVELS), backbone=start, layer=1, lora=lora)
    trained = [name for name, p in reward.named_parameters() if p.requires_grad]
    assert trained and not any("vision" in name or "projector" in name for name in trained)
    reward.train()
    ids = torch.tensor([[3, 4, 5, 6]])
    reward.classifier(ids, torch.ones_like(ids)).logits.sum().backward()
    reward.export(tmp_path / "classifier")
    scorer = Scorer(tmp_path / "classifier")
    pairs = ["How do I find it?"] * 3, ["Hey pal.", "Hey there.", "Yes."]
    torch.testing.assert_close(*(scorer.probabilities(*pairs, share_prefixes=how) for how in ("never", "always")))

    module = make(preferences, start, str(tmp_path / "classifier"), policy_optimizer=PPO(), lora=lora)
    assert not any("vision" in name for name, p in module.policy.named_parameters() if p.requires_grad)
    trainer(tmp_path, max_steps=2).fit(module, data(preferences))
    rollout = module.rollout
    assert rollout is not None and module.critic is not None
    rows = CompletionBatch(rollout.input_ids, rollout.attention_mask, rollout.mask)
    with torch.no_grad():
        found = [
            completion_logprobs(module.policy, rows, 1.0, forward_config) for forward_config in (ForwardConfig(), PLAIN)
        ]
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-4)

    module.export(str(tmp_path / "export"))
    with torch.no_grad():
        again, own = (
            model(input_ids=ids).logits for model in (load_causal_lm(tmp_path / "export"), merged(module.policy))
        )
    torch.testing.assert_close(again, own)


def test_policy_and_classifier_share_such_a_model(start: str, preferences: PreferenceSet, tmp_path: Path) -> None:
    lora = LoraOptions(rank=2)
    RewardClassifier(PreferenceSet(LEVELS), backbone=start, lora=lora).export_adapter(tmp_path / "adapter")
    module = make(preferences, start, str(tmp_path / "adapter"), lora=lora, share_backbone="always")
    trainer(tmp_path, max_steps=1).fit(module, data(preferences))
    assert module.models.shares_classifier


def test_a_model_that_needs_an_image_is_no_policy_but_its_language_model_a_backbone(
    tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    text = {"model_type": "opt", "ffn_dim": 24, "hidden_size": 16, "word_embed_proj_dim": 16, "num_hidden_layers": 2}
    text |= {"num_attention_heads": 2, "vocab_size": len(tokenizer)}
    config = AutoConfig.for_model("blip-2", text_config=text, vision_config=IMAGES, qformer_config=IMAGES)
    for part in (AutoModelForImageTextToText.from_config(config), tokenizer):
        part.save_pretrained(tmp_path)
    with pytest.raises(UsageError, match=r"\(Blip2ForConditionalGeneration\) reads no text without pixel_values"):
        load_causal_lm(tmp_path)
    classifier = RewardClassifier(PreferenceSet(LEVELS), backbone=str(tmp_path)).classifier
    assert classifier.config.backbone.model_type == "opt"
    ids = torch.tensor([[3, 4, 5]])
    assert classifier.probabilities(ids, torch.ones_like(ids)).shape[:2] == (1, len(LEVELS))


def test_language_modelling_on_such_a_model_leaves_images_alone(start: str) -> None:
    model = SupervisedTrainer(model=start).model
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trained and not any("vision" in name or "projector" in name for name in trained)
    assert language_part(model).config is model.config.get_text_config()
