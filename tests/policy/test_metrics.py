import math

import pytest
import torch

from moslim.policy.rollout import Rollout
from moslim.policy.update import level_offsets, progress_metrics, rollout_metrics
from moslim.preferences import PreferenceSet

PREFERENCES = PreferenceSet({"tone": ["bad", "good"], "amount": ["none", "some", "much"]})
NAN = math.nan


def rollout(targets, reference=True):
    targets = torch.tensor(targets)
    probs = torch.tensor([[[0.2, 0.8, 0.0], [0.5, 0.3, 0.2]], [[0.6, 0.4, 0.0], [0.1, 0.1, 0.8]]])
    mask = torch.tensor([[True, True], [True, False]])
    logprobs = torch.tensor([[-1.0, -2.0], [-0.5, 0.0]])
    return Rollout(
        key=(0, 0),
        input_ids=torch.zeros(2, 3, dtype=torch.long),
        attention_mask=torch.ones(2, 3, dtype=torch.long),
        mask=mask,
        old_logprobs=logprobs,
        ref_logprobs=torch.tensor([[-1.5, -1.0], [-1.0, 0.0]]) if reference else None,
        targets=targets,
        probs=probs,
        per_dimension=torch.tensor([[1.0, -1.0], [0.0, 2.0]]).masked_fill(targets < 0, NAN),
        rewards=torch.tensor([3.0, 5.0]),
        advantages=torch.zeros(2),
        used=torch.ones(2, dtype=torch.bool),
        ended=torch.tensor([True, False]),
        questions=["q", "r"],
        completion_texts=["a", "b"],
    )


def metrics(*args, judged=None, **options):
    answers = rollout(*args, **options)
    found = progress_metrics(answers) | rollout_metrics(answers, PREFERENCES, judged)
    return {name: value.item() for name, value in found.items()}


def test_every_figure_by_hand():
    found = metrics([[1, 0], [1, -1]], judged=torch.tensor([[1.0, 2.0], [0.0, 1.0]]))
    k3 = [math.exp(-0.5) - 0.5, math.e - 2, math.exp(-0.5) - 0.5]
    assert found == pytest.approx(
        {
            "train/reward": 4.0,
            "train/length": 1.5,
            "train/truncated": 0.5,
            "train/used": 1.0,
            "train/entropy": (1.0 + 2.0 + 0.5) / 3,
            "train/reward/tone": 0.5,
            "train/reward/amount": -1.0,
            "train/kl": (0.5 - 1.0 + 0.5) / 2,
            "train/kl_k3": sum(k3) / 3,
            "train/proxy": (0.8 + 0.5 + 0.4) / 3,
            "train/proxy/tone": 0.6,
            "train/proxy/amount": 0.5,
            "train/gold": 1 / 3,
            "train/gold/tone": 0.5,
            "train/gold/amount": 0.0,
        }
    )


def test_what_nothing_asked_for_is_left_out():
    always = {"train/length", "train/truncated", "train/used", "train/entropy"}
    found = metrics([[1, -1], [-1, -1]], reference=False, judged=torch.tensor([[NAN, 0.0], [1.0, 0.0]]))
    assert found.keys() == always | {f"train/{kind}{name}" for kind in ("reward", "proxy") for name in ("", "/tone")}
    assert (found["train/reward"], found["train/proxy/tone"]) == pytest.approx((3.0, 0.8))
    assert metrics([[-1, -1], [-1, -1]], reference=False).keys() == always


def test_offsets_by_requested_level():
    asked = rollout([[1, 0], [1, -1]])
    expected = {"offset/tone/1": (-0.2 - 0.6) / 2, "offset/amount/0": 0.3 + 0.4}
    assert level_offsets(asked, PREFERENCES, None) == pytest.approx(expected)
    judged = level_offsets(asked, PREFERENCES, torch.tensor([[1.0, NAN], [0.0, 1.0]]))
    assert judged == pytest.approx({"offset/tone/1": -0.5})
    assert level_offsets(rollout([[-1, -1], [-1, -1]]), PREFERENCES, None) == {}
