"""Models that carry a state from token to token: sampled, scored and trained as a plain pass over each text would."""

from __future__ import annotations

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from transformers import AutoConfig, AutoModelForCausalLM

from moslim.algorithms.functional import HiddenStateReader
from moslim.algorithms.ppo import PPO
from moslim.algorithms.rloo import RLOO
from moslim.generation.decoding import Decoding, continues
from moslim.generation.torch_engine import TorchEngine
from moslim.ops import prefix_tree
from moslim.ops.length_bucketing import CompletionBatch
from moslim.ops.logprobs import ForwardConfig, completion_logprobs, plan
from moslim.ops.prefix_tree import carries_state, masks_left_padding, reads_trees
from moslim.preferences import PreferenceSet
from moslim.reward.modeling import PreferenceClassifier
from moslim.workbench.grammar import LEVELS
from tests.helpers.policy_models import ENDS
from tests.helpers.policy_runs import data, make, trainer, weights

pytestmark = pytest.mark.filterwarnings("ignore::lightning.pytorch.utilities.warnings.PossibleUserWarning")

PLAIN = {"hidden_size": 32, "num_hidden_layers": 2, "initializer_range": 0.3}
ATTENTION = {**PLAIN, "intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2}
SSM = {"mamba_n_heads": 4, "mamba_d_head": 8, "mamba_d_state": 8, "mamba_n_groups": 1, "mamba_chunk_size": 8}
LINEAR = {
    "layer_types": ["linear_attention", "full_attention"],
    "linear_num_value_heads": 4,
    "linear_num_key_heads": 2,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
}
KINDS = {
    "lfm2": {**ATTENTION, "layer_types": ["conv", "full_attention"], "block_auto_adjust_ff_dim": False},
    "falcon_h1": {**ATTENTION, **SSM, "mamba_d_ssm": 32, "head_dim": 8},
    "mamba": {**PLAIN, "state_size": 8},
    "qwen3_5_text": {**ATTENTION, **LINEAR, "head_dim": 8},
    "recurrent_gemma": {**ATTENTION, "lru_width": 32, "block_types": ["recurrent", "attention"], "head_dim": 8},
    "rwkv": {"hidden_size": 32, "attention_hidden_size": 32, "num_hidden_layers": 2, "context_length": 96},
}
UNCACHED = {"recurrent_gemma", "rwkv"}


def build(kind, vocab_size=40, **more):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        options = {**KINDS[kind], "vocab_size": vocab_size, "pad_token_id": 0, "eos_token_id": 2, **more}
        return AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **options)).eval()


@pytest.fixture(scope="module")
def models():
    return {kind: build(kind) for kind in KINDS}


@pytest.fixture(scope="module")
def prompts():
    ids = torch.randint(3, 40, (3, 9), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[1, :5], mask[2, :2] = 0, 0
    return ids.masked_fill(mask == 0, 0), mask


def one_by_one(model, ids, mask, answers):
    """``[N, T]``: a pass over each prompt with its answer, without padding and cache."""
    found = torch.zeros_like(answers.logprobs)
    for row, (tokens, keep) in enumerate(zip(answers.tokens, answers.mask, strict=True)):
        prompt, answer = (x[row // (len(answers.tokens) // len(ids))] for x in (ids, mask))
        prompt, answer = prompt[answer == 1], tokens[keep]
        with torch.no_grad():
            logits = model(input_ids=torch.cat([prompt, answer])[None], use_cache=False).logits[0]
        logprobs = logits[len(prompt) - 1 : -1].log_softmax(-1)
        found[row, : len(answer)] = logprobs.gather(-1, answer[:, None])[:, 0]
    return found


WAYS = {
    "fast": Decoding(),
    "dynamic": Decoding(cache="dynamic", drop_finished=False, merge=False),
    "apart": Decoding(share_prompts=False, completions=4),
}


@pytest.mark.parametrize("kind", KINDS)
def test_sampled_and_recomputed_as_each_text_by_itself(kind, models, prompts):
    model, (ids, mask) = models[kind], prompts
    seeds = torch.arange(12).view(3, 4)
    assert carries_state(model) and continues(model) == (kind not in UNCACHED)
    tokens = []
    for decoding in WAYS.values():
        answers = TorchEngine(10, decoding=decoding).sample(model, ids, mask, seeds, [2, *range(5, 9)], 0)
        assert answers.ended.any() and len(answers.mask.sum(dim=1).unique()) > 1
        plain = one_by_one(model, ids, mask, answers)
        torch.testing.assert_close(answers.logprobs, plain, atol=1e-4, rtol=0)
        tokens.append(answers.tokens)
    assert all(torch.equal(tokens[0], others) for others in tokens)
    whole = [
        torch.cat([x.repeat_interleave(4, dim=0), y], dim=1)
        for x, y in ((ids, answers.tokens), (mask, answers.mask.long()))
    ]
    batch = CompletionBatch(*whole, answers.mask)
    for forward_config in (ForwardConfig(), ForwardConfig(tokens=40, share_prefixes="always", chunked_logprobs=False)):
        with torch.no_grad():
            torch.testing.assert_close(completion_logprobs(model, batch, 1.0, forward_config), plain, atol=1e-4, rtol=0)


@pytest.mark.parametrize("kind", KINDS)
def test_a_critic_s_states_are_those_of_each_text_by_itself(kind, models, prompts):
    model, (ids, mask) = models[kind], prompts
    answers = torch.randint(3, 40, (3, 4), generator=torch.Generator().manual_seed(2))
    kept = torch.arange(4) < torch.tensor([4, 2, 1])[:, None]
    batch = CompletionBatch(torch.cat([ids, answers], 1), torch.cat([mask, kept.long()], 1), kept)
    for one in plan(model, batch, ForwardConfig()):
        with torch.no_grad():
            states = one.states(HiddenStateReader(model))
            for state, row, column in zip(states, one.rows, one.columns, strict=True):
                text = torch.cat([ids[row][mask[row] == 1], answers[row, :column]])
                alone = model.base_model(input_ids=text[None], use_cache=False).last_hidden_state[0, -1]
                torch.testing.assert_close(state, alone, atol=1e-4 * float(alone.abs().max() + 1), rtol=0)


@pytest.mark.parametrize("kind", KINDS)
def test_the_trial_of_trees_catches_what_is_not_declared(kind, models, monkeypatch):
    assert not reads_trees(models[kind].base_model, torch.device("cpu"))
    monkeypatch.setattr(prefix_tree, "carries_state", lambda backbone: False)
    monkeypatch.setattr(
        prefix_tree, "_KINDS", {"full_attention", "sliding_attention", "conv", "linear_attention", "hybrid"}
    )
    assert not prefix_tree._agrees(models[kind].base_model, torch.device("cpu"))


def test_what_minds_padding_is_found_out_and_said_once(models, monkeypatch):
    said = []
    monkeypatch.setattr(prefix_tree, "inform", said.append)
    prefix_tree.say_once.cache_clear()
    found = {kind: masks_left_padding(build(kind)) for kind in KINDS}
    assert found == {kind: kind not in UNCACHED for kind in KINDS}
    continues(build("rwkv")), continues(build("rwkv"))
    assert sum("rwkv" in text for text in said) == 2 and any("is slow" in text for text in said)


@pytest.mark.parametrize("kind", KINDS)
def test_a_classifier_on_such_a_backbone_reads_a_padded_pair_as_alone(kind, models):
    classifier = PreferenceClassifier.from_backbone(build(kind), PreferenceSet(LEVELS)).eval()
    ids = torch.randint(3, 40, (2, 8), generator=torch.Generator().manual_seed(3))
    mask = torch.ones_like(ids)
    mask[1, 5:] = 0
    with torch.no_grad():
        both, alone = classifier(ids, mask).logits, classifier(ids[1:, :5], mask[1:, :5]).logits
    torch.testing.assert_close(both[1:], alone, atol=1e-4, rtol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "optimizer"), [("lfm2", PPO), ("mamba", RLOO), ("rwkv", RLOO)])
def test_a_policy_is_trained_and_resumed(kind, optimizer, preferences, tokenizer, classifier, tmp_path):
    start = build(kind, len(tokenizer), pad_token_id=tokenizer.pad_token_id, eos_token_id=tokenizer.eos_token_id)
    start.generation_config.eos_token_id = [tokenizer.eos_token_id, *ENDS]
    start.save_pretrained(tmp_path / "lm")
    tokenizer.save_pretrained(tmp_path / "lm")

    def fit(steps, **options):
        module = make(preferences, str(tmp_path / "lm"), classifier, policy_optimizer=optimizer(), rate=1e-3)
        run = trainer(tmp_path, max_steps=steps, **options.pop("trainer", {}))
        run.fit(module, data(preferences), **options)
        return module

    saver = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=1, save_top_k=-1)
    whole = fit(2, trainer={"callbacks": [saver], "enable_checkpointing": True})
    part = whole.rollout
    found = completion_logprobs(whole.policy, part.batch, 1.0, ForwardConfig())
    assert (found - part.old_logprobs).abs()[part.mask].mean() > 1e-4  # the last step changed it
    resumed = fit(2, ckpt_path=tmp_path / "step=1.ckpt", weights_only=True)
    assert len(resumed.trace) == 1 and resumed.trace[0]["loss"] == whole.trace[1]["loss"]
    for name, value in weights(whole).items():
        assert torch.equal(weights(resumed)[name], value)
