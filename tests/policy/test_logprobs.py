import math

import pytest
import torch

from moslim.policy.logprobs import answer_logprobs, chunks_by_length, completion_logits, full_kl, token_logprobs


def test_token_logprobs_by_hand():
    logits = torch.tensor([[[0.0, 0.0], [math.log(3.0), 0.0]], [[0.0, math.log(4.0)], [9.0, -9.0]]])
    mask = torch.tensor([[True, True], [True, False]])
    found = token_logprobs(logits, torch.tensor([[0, 1], [1, 0]]), mask)
    torch.testing.assert_close(found, torch.tensor([[0.5, 0.25], [0.8, 1.0]]).log())
    assert found[1, 1] == 0


@pytest.mark.parametrize("chunk", [1, 3, 7, 100])
def test_chunks_change_neither_values_nor_gradients(chunk):
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(4, 5, 11, generator=generator)
    tokens = torch.randint(11, (4, 5), generator=generator)
    mask = torch.arange(5) < torch.tensor([5, 1, 3, 4])[:, None]
    weights = torch.randn(4, 5, generator=generator)
    plain, chunked = logits.clone().requires_grad_(), logits.clone().requires_grad_()
    expected = plain.log_softmax(dim=-1).gather(-1, tokens[..., None])[..., 0] * mask
    found = token_logprobs(chunked, tokens, mask, chunk)
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=0)
    (expected * weights).sum().backward()
    (found * weights).sum().backward()
    torch.testing.assert_close(chunked.grad, plain.grad, atol=1e-6, rtol=0)
    assert (chunked.grad[~mask] == 0).all()
    with torch.no_grad():
        torch.testing.assert_close(token_logprobs(logits, tokens, mask, chunk), expected, atol=1e-6, rtol=0)


def test_token_logprobs_of_half_precision_are_float32():
    logits = torch.randn(1, 3, 50, generator=torch.Generator().manual_seed(0)).bfloat16()
    found = token_logprobs(logits, torch.tensor([[4, 5, 6]]), torch.ones(1, 3, dtype=torch.bool))
    expected = logits.float().log_softmax(dim=-1)[0, torch.arange(3), torch.tensor([4, 5, 6])]
    torch.testing.assert_close(found[0], expected)


def test_nothing_to_do():
    found = token_logprobs(torch.randn(2, 3, 4), torch.zeros(2, 3, dtype=torch.long), torch.zeros(2, 3).bool())
    assert found.tolist() == [[0, 0, 0], [0, 0, 0]]


@pytest.fixture
def answers(tokenizer):
    """Prompts of 2 to 6 tokens, answers of 1 to 5: ids, attention mask, answer mask."""
    generator = torch.Generator().manual_seed(2)
    prompts, lengths = torch.tensor([6, 2, 4, 3, 6, 5, 2]), torch.tensor([2, 5, 1, 4, 3, 2, 5])
    prompt_mask = torch.arange(6) >= 6 - prompts[:, None]
    mask = torch.arange(5) < lengths[:, None]
    attention = torch.cat([prompt_mask, mask], dim=1).long()
    ids = torch.randint(6, len(tokenizer), attention.shape, generator=generator) * attention
    return ids, attention, mask


@pytest.mark.parametrize("kind", ["grouped", "gpt2"])
def test_answer_logprobs_row_by_row(models, answers, kind):
    ids, attention, mask = answers
    model = models[kind]
    for temperature in (1.0, 0.7, 0):
        found = answer_logprobs(model, ids, attention, mask, temperature, rows=3)
        assert (found[~mask] == 0).all()
        for row in range(len(ids)):
            own = ids[row, attention[row].bool()]
            length = int(mask[row].sum())
            logits = model(own[None]).logits[0, -length - 1 : -1] / (temperature or 1.0)
            expected = logits.log_softmax(dim=-1)[torch.arange(length), own[-length:]]
            torch.testing.assert_close(found[row, :length], expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("rows", [1, 2, 3, 7, 100])
def test_neither_chunk_size_nor_order_nor_padding_matters(models, answers, rows):
    ids, attention, mask = answers
    expected = answer_logprobs(models["qwen2"], ids, attention, mask, 1.0, rows=7)
    order = torch.randperm(7, generator=torch.Generator().manual_seed(rows))
    noise = torch.where(attention.bool(), ids, torch.full_like(ids, 17))  # padding holds something else
    found = answer_logprobs(models["qwen2"], noise[order], attention[order], mask[order], 1.0, rows)
    torch.testing.assert_close(found, expected[order], atol=1e-5, rtol=0)


def test_gradients_do_not_depend_on_chunks(models, answers):
    ids, attention, mask = answers
    model = models["llama"]
    weights = torch.randn(mask.shape, generator=torch.Generator().manual_seed(0))
    gradients = []
    for rows in (2, 7):
        loss = (answer_logprobs(model, ids, attention, mask, 1.0, rows) * weights).sum()
        gradients.append(torch.autograd.grad(loss, list(model.parameters())))
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-4)


def test_chunks_hold_like_lengths_and_no_common_padding(answers):
    ids, attention, mask = answers
    chunks = list(chunks_by_length(ids, attention, mask, rows=3))
    assert [chunk.index.tolist() for chunk in chunks] == [[2, 0, 5], [4, 3, 1], [6]]
    assert [tuple(chunk.mask.shape) for chunk in chunks] == [(3, 2), (3, 5), (1, 5)]
    assert [chunk.input_ids.shape[1] for chunk in chunks] == [6 + 2, 6 + 5, 2 + 5]
    for chunk in chunks:
        assert chunk.attention_mask.any(dim=0).all() and chunk.mask.any(dim=0).all()
        width = chunk.mask.shape[1]
        assert torch.equal(chunk.tokens, ids[chunk.index, 6 : 6 + width])
        assert torch.equal(chunk.mask, mask[chunk.index, :width])
        assert int(chunk.attention_mask.sum()) == int(attention[chunk.index].sum())  # no token is lost


def test_chunks_among_some_rows(answers):
    chosen = torch.tensor([6, 4, 2])
    found = [chunk.index.tolist() for chunk in chunks_by_length(*answers, rows=2, among=chosen)]
    assert found == [[2, 4], [6]]
    assert list(chunks_by_length(*answers, rows=2, among=torch.tensor([], dtype=torch.long))) == []


def test_completion_logits_predict_the_answer_tokens(models, answers):
    ids, attention, _ = answers
    row = ids[4:5, :9]  # six tokens of prompt, three of answer, no padding
    found = completion_logits(models["llama"], row, attention[4:5, :9], 3, temperature=0.5)
    torch.testing.assert_close(found, 2 * models["llama"](row).logits[:, 5:8], atol=1e-4, rtol=1e-4)


def test_full_kl_by_hand():
    p, q = torch.tensor([[0.5, 0.5], [0.9, 0.1]]), torch.tensor([[0.75, 0.25], [0.9, 0.1]])
    expected = [0.5 * math.log(0.5 / 0.75) + 0.5 * math.log(0.5 / 0.25), 0.0]
    shift = torch.tensor([[3.0], [-2.0]])  # logits count up to a constant
    torch.testing.assert_close(full_kl(p.log() + shift, q.log()), torch.tensor(expected))
    other = 0.75 * math.log(0.75 / 0.5) + 0.25 * math.log(0.25 / 0.5)
    assert full_kl(q.log(), p.log())[0].item() == pytest.approx(other)  # it is not symmetric
