"""The default engine against `generate`, against a fresh forward pass, and against itself in other batches."""

import pytest
import torch
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from moslim.generation.decoding import Decoding
from moslim.generation.torch_engine import TorchEngine, survivors
from moslim.ops.length_bucketing import CompletionBatch
from moslim.ops.logprobs import ForwardConfig, completion_logprobs
from tests.helpers.policy_models import ARCHITECTURES, EOS, PAD, seeds


def together(prompts, found):
    """Prompts and answers as one batch, as the policy sees them."""
    ids, mask = (x.repeat_interleave(len(found.tokens) // len(x), dim=0) for x in prompts)
    attention = torch.cat([mask, found.mask.long()], dim=1)
    return CompletionBatch(torch.cat([ids, found.tokens], dim=1), attention, found.mask)


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_greedy_answers_are_those_of_generate(models, prompts, kind):
    ids, mask = prompts
    limit, samples = 12, 2
    settings = GenerationConfig(do_sample=False, max_new_tokens=limit, eos_token_id=EOS, pad_token_id=PAD)
    expected = models[kind].generate(ids, attention_mask=mask, generation_config=settings)[:, ids.shape[1] :]
    found = TorchEngine(limit, temperature=0).sample(models[kind], ids, mask, seeds(5, samples), EOS, PAD)
    assert torch.equal(found.tokens, expected.repeat_interleave(samples, dim=0))
    assert len(found.mask.sum(dim=1).unique()) > 1  # answers of several lengths


def test_a_large_last_layer_is_packed_for_the_time_of_sampling(prompts):
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=16500, **sizes, tie_word_embeddings=False)).eval()
    head, packed = model.get_output_embeddings(), []
    head.register_forward_hook(lambda module, inputs, output: packed.append("forward" in vars(module)))

    def sampled(**options):
        return TorchEngine(12, decoding=Decoding(**options)).sample(model, *prompts, seeds(5, 3), EOS, PAD)

    fast = sampled()
    assert packed and all(packed) and "forward" not in vars(head)
    packed.clear()
    plain = sampled(pack_head=False)
    assert packed and not any(packed)
    assert torch.equal(fast.tokens, plain.tokens)
    torch.testing.assert_close(fast.logprobs, plain.logprobs, atol=1e-5, rtol=0)
    with torch.no_grad():
        head.weight.mul_(2)  # an update: the next answers come from the weights as they are then
    torch.testing.assert_close(sampled().logprobs, sampled(pack_head=False).logprobs, atol=1e-5, rtol=0)


@pytest.mark.parametrize("share", ["always", "never"])
@pytest.mark.parametrize("temperature", [1.0, 0.6, 0])
@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_logprobs_are_those_of_a_fresh_forward_pass(models, prompts, kind, temperature, share):
    found = TorchEngine(12, temperature).sample(models[kind], *prompts, seeds(5, 3), EOS, PAD)
    fresh = completion_logprobs(
        models[kind], together(prompts, found), temperature, ForwardConfig(share_prefixes=share)
    )
    torch.testing.assert_close(found.logprobs, fresh, atol=2e-5, rtol=0)
    assert (found.logprobs[found.mask] < 0).all() and found.logprobs.dtype == torch.float32
    lengths = found.mask.sum(dim=1)
    assert lengths.min() < 12 and lengths.max() <= 12  # some left the batch before others


def test_an_answer_holds_one_end_token_which_is_its_last(models, prompts):
    found = TorchEngine(12).sample(models["qwen2"], *prompts, seeds(5, 8), EOS, PAD)
    ends = torch.isin(found.tokens, torch.tensor(EOS)) & found.mask
    assert set(ends.sum(dim=1).tolist()) == {0, 1} and torch.equal(ends.any(dim=1), found.ended)
    lengths = found.mask.sum(dim=1)
    assert torch.equal(ends.long().argmax(dim=1)[found.ended], lengths[found.ended] - 1)
    assert (lengths[~found.ended] == 12).all()
    assert torch.equal(found.mask, torch.arange(12) < lengths[:, None])  # a beginning without gaps
    assert (found.tokens[~found.mask] == PAD).all() and (found.logprobs[~found.mask] == 0).all()
    assert len(set(found.tokens[found.ended, lengths[found.ended] - 1].tolist())) > 2  # several ids end an answer


def test_answers_that_never_end(models, prompts):
    found = TorchEngine(6).sample(models["llama"], *prompts, seeds(5, 2), [], PAD)
    assert found.tokens.shape == (10, 6) and found.mask.all() and not found.ended.any()


def test_answers_that_end_at_once(models, prompts):
    everything = list(range(models["llama"].config.vocab_size))
    found = TorchEngine(6).sample(models["llama"], *prompts, seeds(5, 2), everything, PAD)
    assert found.tokens.shape == (10, 1) and found.mask.all() and found.ended.all()


def test_one_token_is_the_whole_limit(models, prompts):
    found = TorchEngine(1).sample(models["gpt2"], *prompts, seeds(5, 2), EOS, PAD)
    assert found.tokens.shape == (10, 1)
    assert torch.equal(found.ended, torch.isin(found.tokens[:, 0], torch.tensor(EOS)))


@pytest.mark.parametrize("kind", ["grouped", "gpt2"])
def test_an_answer_depends_on_its_prompt_and_seed_alone(models, prompts, kind):
    ids, mask = prompts
    own = seeds(5, 4)
    whole = TorchEngine(12).sample(models[kind], ids, mask, own, EOS, PAD)
    engine = TorchEngine(12)
    for part in (torch.tensor([4, 2, 0, 1, 3]), torch.tensor([3]), torch.tensor([4, 0]), torch.tensor([2])):
        kept = mask[part].any(dim=0)  # another batch has another amount of padding
        found = engine.sample(models[kind], ids[part][:, kept], mask[part][:, kept], own[part], EOS, PAD)
        rows = (part[:, None] * 4 + torch.arange(4)).flatten()
        width = found.tokens.shape[1]
        assert torch.equal(found.tokens, whole.tokens[rows, :width])
        assert torch.equal(found.mask, whole.mask[rows, :width]) and not whole.mask[rows, width:].any()
        assert torch.equal(found.ended, whole.ended[rows])
        torch.testing.assert_close(found.logprobs, whole.logprobs[rows, :width], atol=1e-5, rtol=0)
    assert len({tuple(row) for row in whole.tokens.tolist()}) > 15  # the seeds of a prompt do differ


def test_the_model_is_left_without_gradients(models, prompts):
    found = TorchEngine(3).sample(models["llama"], *prompts, seeds(5, 1), EOS, PAD)
    assert not found.logprobs.requires_grad and all(p.grad is None for p in models["llama"].parameters())


@pytest.mark.parametrize("options", [{}, {"top_p": 0.9}])
def test_what_was_sampled_can_take_part_in_a_loss(models, prompts, options):
    found = TorchEngine(3, **options).sample(models["llama"], *prompts, seeds(5, 1), EOS, PAD)
    values = [value for value in vars(found).values() if value is not None]
    assert len(values) == 4 + ("top_p" in options) and not any(value.is_inference() for value in values)
    weight = torch.ones_like(found.logprobs, requires_grad=True)
    (weight * found.logprobs).sum().backward()
    assert torch.equal(weight.grad, found.logprobs)


def test_code_that_comes_with_a_model_is_not_run_in_inference_mode(models):
    class Theirs(type(models["llama"])):
        pass

    theirs = Theirs(models["llama"].config)
    with Decoding().without_gradients(theirs):
        assert torch.is_inference_mode_enabled()
    Theirs.__module__ = "transformers_modules.theirs"
    with Decoding().without_gradients(theirs):
        assert not torch.is_inference_mode_enabled() and not torch.is_grad_enabled()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_new_tokens": 0}, "at least 1"),
        ({"temperature": -1}, r"0 \(greedy\)"),
        ({"top_k": 0}, "top_k is 0"),
        ({"top_p": 0}, "top_p is 0"),
        ({"top_p": 1.5}, "top_p is 1.5"),
    ],
)
def test_wrong_options(options, message):
    with pytest.raises(ValueError, match=message):
        TorchEngine(**options)


@pytest.mark.parametrize(
    ("finished", "places"),
    [("0000", [0, 1, 2, 3]), ("1000", [3, 1, 2]), ("0001", [0, 1, 2]), ("1101", [2]), ("1010", [3, 1]), ("11", [])],
)
def test_few_rows_move_when_others_leave(finished, places):
    assert survivors(torch.tensor([mark == "1" for mark in finished])).tolist() == places


def test_a_text_that_ends_answers(models, prompts, tokenizer):
    plain = TorchEngine(12).sample(models["llama"], *prompts, seeds(5, 8), EOS, PAD)
    texts = [tokenizer.decode(row[keep]) for row, keep in zip(plain.tokens, plain.mask, strict=True)]
    word = next(word for word in " ".join(texts).split() if sum(word in text for text in texts) > 2 and len(word) > 3)
    engine = TorchEngine(12, stop_strings=[word, "never written"])
    engine.bind(tokenizer)
    found = engine.sample(models["llama"], *prompts, seeds(5, 8), EOS, PAD)
    stopped = 0
    for row, text in enumerate(texts):
        own = tokenizer.decode(found.tokens[row, found.mask[row]])
        length = int(found.mask[row].sum())
        assert torch.equal(found.tokens[row, :length], plain.tokens[row, :length])  # until then it is the same answer
        assert engine.before_stop(own) == text.partition(word)[0]
        if word in text:
            assert own.endswith(word) and found.ended[row]
            stopped += 1
        else:
            assert own == text and found.ended[row] == plain.ended[row]
    assert 2 < stopped < len(texts)


def test_a_stop_string_of_many_bytes_is_found():
    """Where a token is a byte, a letter takes up to four of them."""
    bytewise = pre_tokenizers.ByteLevel(add_prefix_space=False)
    number = {letter: i for i, letter in enumerate(sorted(bytewise.alphabet()))}
    made = Tokenizer(BPE(number, []))
    made.pre_tokenizer, made.decoder = bytewise, decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=made)
    engine = TorchEngine(12, stop_strings=["🤖"])
    engine.bind(tokenizer)
    rows = tokenizer(["go 🤖", "go 🦊", "🤖 went"])["input_ids"]
    assert [len(row) for row in rows] == [7, 7, 9]
    assert engine._stopped(torch.tensor(rows[:2])).tolist() == [True, False]
    assert engine._stopped(torch.tensor(rows[2:])).tolist() == [False]  # it would have stopped long before


def test_stop_strings_need_a_tokenizer_and_something_to_look_for(models, prompts):
    with pytest.raises(RuntimeError, match="bind"):
        TorchEngine(3, stop_strings=["x"]).sample(models["llama"], *prompts, seeds(5, 1), EOS, PAD)
    with pytest.raises(ValueError, match="empty text"):
        TorchEngine(3, stop_strings=["x", ""])
