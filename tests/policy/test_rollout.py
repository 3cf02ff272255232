import dataclasses

import pytest
import torch

from moslim.policy.rollout import Rollout, end_penalty

CHAT = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Why?"}]


@pytest.fixture
def rollout() -> Rollout:
    """Two prompts, two answers each; the second prompt asks for nothing."""
    mask = torch.arange(3) < torch.tensor([3, 1, 2, 3])[:, None]
    generator = torch.Generator().manual_seed(0)
    logprobs = -torch.rand(4, 3, generator=generator) * mask
    return Rollout(
        key=(1, 7),
        input_ids=torch.arange(20).reshape(4, 5),
        attention_mask=torch.cat([torch.ones(4, 2, dtype=torch.long), mask.long()], dim=1),
        mask=mask,
        old_logprobs=logprobs,
        ref_logprobs=logprobs - 0.1,
        targets=torch.tensor([[4, -1], [4, -1], [-1, -1], [-1, -1]]),
        probs=torch.rand(4, 2, 5, generator=generator),
        per_dimension=torch.tensor([[0.5, torch.nan], [0.1, torch.nan], [torch.nan] * 2, [torch.nan] * 2]),
        rewards=torch.tensor([0.5, 0.1, 0.0, 0.0]),
        advantages=torch.tensor([0.4, -0.4, 0.0, 0.0]),
        used=torch.tensor([True, True, False, False]),
        ended=torch.tensor([True, True, True, False]),
        questions=["How?", "How?", CHAT, CHAT],
        completion_texts=["a", "b", "c", "d"],
    )


def assert_equal(one: Rollout, other: Rollout) -> None:
    for field in dataclasses.fields(Rollout):
        left, right = getattr(one, field.name), getattr(other, field.name)
        if isinstance(left, torch.Tensor):
            assert left.dtype == right.dtype, field.name
            assert torch.equal(left.nan_to_num(-9), right.nan_to_num(-9)), field.name
        else:
            assert left == right and type(left) is type(right), field.name


def test_an_answer_that_was_cut_loses_the_penalty_and_nothing_else():
    assert end_penalty(torch.tensor([True, False, True, False]), 1.5).tolist() == [0, 1.5, 0, 1.5]
    assert end_penalty(torch.tensor([False]), 0.0).tolist() == [0]


def test_derived_columns(rollout):
    assert len(rollout) == 4
    assert rollout.tokens.tolist() == [[2, 3, 4], [7, 8, 9], [12, 13, 14], [17, 18, 19]]
    assert rollout.uninstructed.tolist() == [False, False, True, True]


def test_rows_picks_in_the_order_given(rollout):
    picked = rollout.rows(torch.tensor([3, 0]))
    assert picked.key == (1, 7) and picked.questions == [CHAT, "How?"] and picked.completion_texts == ["d", "a"]
    assert picked.input_ids[:, 0].tolist() == [15, 0] and picked.ended.tolist() == [False, True]
    for field in dataclasses.fields(Rollout):
        value = getattr(rollout, field.name)
        if isinstance(value, torch.Tensor):
            assert torch.equal(getattr(picked, field.name).nan_to_num(-9), value[[3, 0]].nan_to_num(-9)), field.name


def test_rows_without_a_reference(rollout):
    alone = dataclasses.replace(rollout, ref_logprobs=None)
    assert alone.rows(torch.tensor([1])).ref_logprobs is None


@pytest.mark.parametrize("reference", [True, False])
def test_state_survives_a_checkpoint_that_holds_plain_data_only(rollout, reference, tmp_path):
    kept = rollout if reference else dataclasses.replace(rollout, ref_logprobs=None)
    torch.save(kept.state(), tmp_path / "state.pt")
    loaded = torch.load(tmp_path / "state.pt", weights_only=True)
    assert_equal(Rollout.from_state(loaded, torch.device("cpu")), kept)


def test_the_key_is_a_tuple_whatever_a_file_made_of_it(rollout):
    state = rollout.state() | {"key": [1, 7]}
    assert Rollout.from_state(state, torch.device("cpu")).key == (1, 7)
