from dataclasses import replace

import pytest
import torch

from moslim.evaluation.steerability import Records


def same(a: Records, b: Records) -> bool:
    fields = ("question", "sample", "targets", "probs")
    return (
        a.kinds == b.kinds
        and all(torch.equal(getattr(a, f), getattr(b, f)) for f in fields)
        and torch.equal(a.achieved.nan_to_num(-1), b.achieved.nan_to_num(-1))
    )


def test_concat_undoes_a_split(trained):
    parts = [trained.select(torch.arange(5)), trained.select(torch.arange(5, len(trained)))]
    assert same(Records.concat(parts), trained)


def test_concat_of_nothing_says_so():
    with pytest.raises(ValueError, match="the test data loader has no batch"):
        Records.concat([])


def test_select_takes_a_mask_or_positions(trained):
    mask = torch.zeros(len(trained), dtype=torch.bool)
    mask[[2, 10]] = True
    assert same(trained.select(mask), trained.select(torch.tensor([2, 10])))
    assert trained.select(mask).kinds == ["sweep", "default"]


def test_of_kind(trained):
    assert trained.of_kind("seen").targets.tolist() == [[2, 1], [0, 1]]
    assert len(trained.of_kind("unseen")) == 0


def test_canonical_order_is_question_kind_targets_sample(make):
    rows = [
        (1, 0, "sweep", [0, -1], [0.0, 0.0]),
        (0, 0, "default", [-1, -1], [0.0, 0.0]),
        (0, 1, "sweep", [1, -1], [0.0, 0.0]),
        (0, 0, "sweep", [1, -1], [0.0, 0.0]),
        (0, 0, "sweep", [-1, 1], [0.0, 0.0]),
    ]
    ordered = make(rows).canonical()
    assert ordered.targets.tolist() == [[-1, 1], [1, -1], [1, -1], [-1, -1], [0, -1]]
    assert ordered.sample.tolist() == [0, 0, 1, 0, 0]


def test_canonical_does_not_depend_on_order_and_counts_a_repeat_once(trained):
    shuffled = trained.select(torch.randperm(len(trained), generator=torch.Generator().manual_seed(0)))
    padded = Records.concat([shuffled, shuffled.select(torch.tensor([0, 3]))])
    assert same(padded.canonical(), trained.canonical())
    assert len(padded.canonical()) == len(trained)


def test_canonical_keeps_different_samples_of_one_prompt(make):
    rows = [(0, s, "seen", [1, 1], [1.0, 1.0]) for s in (1, 0)]
    assert make(rows).canonical().sample.tolist() == [0, 1]


def test_canonical_of_none_is_none(make):
    assert len(make([]).canonical()) == 0


def test_fields_that_disagree_are_named(trained):
    with pytest.raises(ValueError, match=r"records.achieved has shape \(14, 1\)"):
        replace(trained, achieved=trained.achieved[:, :1])
    with pytest.raises(ValueError, match=r"records.kinds has shape \(13,\)"):
        replace(trained, kinds=trained.kinds[1:])


def test_a_kind_needs_a_name(trained):
    with pytest.raises(ValueError, match=r"records\.kinds has an empty name"):
        replace(trained, kinds=["", *trained.kinds[1:]])
