"""Every fast way of decoding against the slow one: the same answers, token by token."""

from copy import deepcopy

import pytest
import torch
from transformers import DynamicCache, OpenAIGPTConfig, OpenAIGPTLMHeadModel

from moslim.generation import decoding
from moslim.generation.decoding import Decoding, branches
from moslim.generation.kv_cache import GrowingCache
from moslim.generation.torch_engine import TorchEngine
from moslim.ops.lora import add_lora
from tests.helpers.policy_models import ARCHITECTURES, EOS, PAD, seeds
from tests.helpers.policy_runs import LORA

PLAIN = Decoding(share_prompts=False, drop_finished=False, merge=False, cache="dynamic", inference_mode=False)
WAYS = {
    "fast": Decoding(),
    "prompts computed for every answer": Decoding(share_prompts=False),
    "finished answers stay": Decoding(drop_finished=False),
    "equal answers apart": Decoding(merge=False),
    "transformers' cache": Decoding(cache="dynamic"),
    "finished answers stay apart": Decoding(merge=False, drop_finished=False),
    "in turns": Decoding(completions=7),
    "without inference mode": Decoding(inference_mode=False),
    "one prompt at a time": Decoding(completions=1),
}


def sampled(model, prompts, decoding, temperature=1.0, samples=3, **options):
    engine = TorchEngine(12, temperature, decoding=decoding, **options)
    return engine.sample(model, *prompts, seeds(5, samples), EOS, PAD)


def assert_same(found, plain):
    assert torch.equal(found.tokens, plain.tokens) and torch.equal(found.mask, plain.mask)
    assert torch.equal(found.ended, plain.ended)
    torch.testing.assert_close(found.logprobs, plain.logprobs, atol=1e-5, rtol=0)


@pytest.mark.slow
@pytest.mark.parametrize("temperature", [0, 0.8])
@pytest.mark.parametrize("kind", ARCHITECTURES)
@pytest.mark.parametrize("way", WAYS)
def test_every_way_gives_the_same_answers(models, prompts, way, kind, temperature):
    plain = sampled(models[kind], prompts, PLAIN, temperature)
    assert len(plain.mask.sum(dim=1).unique()) > 1  # some end before others
    assert_same(sampled(models[kind], prompts, WAYS[way], temperature), plain)


def test_a_model_whose_forward_takes_no_cache_reads_the_whole_text_for_every_token(models, prompts):
    torch.manual_seed(0)
    config = OpenAIGPTConfig(
        vocab_size=models["llama"].config.vocab_size, n_embd=16, n_layer=1, n_head=2, initializer_range=0.3
    )
    model = OpenAIGPTLMHeadModel(config).eval()
    ids, mask = prompts
    found = sampled(model, prompts, Decoding(), samples=2)
    assert len(found.mask.sum(dim=1).unique()) > 1
    for row, (tokens, keep, logprobs) in enumerate(zip(found.tokens, found.mask, found.logprobs, strict=True)):
        prompt, answer = ids[row // 2][mask[row // 2] == 1], tokens[keep]
        with torch.no_grad():
            logits = model(torch.cat([prompt, answer])[None]).logits[0, len(prompt) - 1 : -1]
        plain = logits.log_softmax(-1).gather(-1, answer[:, None])[:, 0]
        torch.testing.assert_close(logprobs[keep], plain, atol=1e-5, rtol=0)


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_masks_come_takes_full_masks_where_all_layers_attend_to_everything(models, kind):
    config = models[kind].config
    assert decoding._takes_full_masks(models[kind], GrowingCache(config, 2, 2)) == (kind != "sliding")
    assert not decoding._takes_full_masks(models[kind], DynamicCache(config=config))


@pytest.mark.parametrize("half", [False, True])
@pytest.mark.parametrize("adapted", [False, True])
def test_masks_that_are_made_once_say_the_same(models, prompts, half, adapted, monkeypatch):
    model = deepcopy(models["qwen2"])
    if adapted:
        model = add_lora(model, LORA).eval()
    with torch.autocast("cpu", torch.bfloat16, enabled=half):
        found = sampled(model, prompts, Decoding())
        monkeypatch.setattr(decoding, "_takes_full_masks", lambda *_: False)
        assert_same(found, sampled(model, prompts, Decoding()))


def test_multinomial_repeats_with_the_same_batch_and_has_no_log_probabilities_of_its_own(models, prompts):
    way = Decoding(draw="multinomial")
    found, again = (sampled(models["llama"], prompts, way) for _ in range(2))
    assert_same(found, again)
    assert not torch.equal(found.tokens, sampled(models["llama"], prompts, Decoding()).tokens)


def test_answers_cut_by_top_p_know_both_log_probabilities(models, prompts):
    found = sampled(models["qwen2"], prompts, Decoding(), top_p=0.7, samples=6)
    kept = (found.logprobs - found.behavior_logprobs).exp()[found.mask]  # probability of all that could be drawn
    assert kept.min() > 0.7 - 1e-5 and kept.max() <= 1 + 1e-5 and kept.min() < 0.95
    assert (found.behavior_logprobs[~found.mask] == 0).all()
    assert sampled(models["qwen2"], prompts, Decoding()).behavior_logprobs is None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"cache": "big"}, "cache is 'big'"),
        ({"completions": 0}, "completions is 0"),
    ],
)
def test_wrong_options(options, message):
    with pytest.raises(ValueError, match=message):
        Decoding(**options)
    with pytest.raises(ValueError, match="draw is 'dice'"):
        TorchEngine(decoding=Decoding(draw="dice"))


@pytest.mark.parametrize(("device", "method"), [("cpu", "inverse_cdf"), ("cuda", "multinomial")])
def test_how_tokens_are_drawn_depends_on_the_device_unless_it_is_said(device, method):
    assert TorchEngine(4)._choice(torch.device(device)).method == method
    for said in ("inverse_cdf", "multinomial"):
        assert TorchEngine(4, decoding=Decoding(draw=said))._choice(torch.device(device)).method == said


def test_answers_are_computed_once_for_as_long_takes_full_masks_the_same(models, prompts):
    """Greedy answers to one prompt never differ: one row each."""
    rows = []
    handle = models["llama"].model.embed_tokens.register_forward_hook(lambda _, inputs, __: rows.append(len(inputs[0])))
    for merge, expected in ((True, 5), (False, 15)):
        rows.clear()
        sampled(models["llama"], prompts, Decoding(merge=merge), temperature=0)
        assert rows[:2] == [5, expected] and max(rows) == expected
    handle.remove()


@pytest.mark.parametrize("merge", [True, False])
def test_rows_keep_their_place_if_they_can(merge):
    """Generations 0 and 1 are still the same, 2 and 3 were, 4 is alone, and that in row 1 has ended."""
    rows, tokens = torch.tensor([0, 0, 3, 3, 2]), torch.tensor([7, 7, 5, 9, 8])
    source, taken, now = branches(rows, tokens, merge)
    assert torch.equal(source[now], rows) and torch.equal(taken[now], tokens)
    expected = [0, 3, 2, 3] if merge else [0, 0, 2, 3, 3]
    assert source.tolist() == expected and len(now.unique()) == len(expected)
