import pytest

from moslim.data.batches import CollateRewards, CollateTexts, Pairs
from moslim.data.loader import Draw
from moslim.data.prompts import PairEncoder
from moslim.data.types import Example

ROWS = [
    Example("a b", "c", {"size": 2, "smell": 9}),
    Example([{"role": "user", "content": "a"}], "", {"heat": 0}),
    Example("a", "b <|user|> c d", {}),
]


def test_missing_labels_are_masked_and_unused_dimensions_left_out(tokenizer, preferences):
    pairs = Pairs(ROWS, PairEncoder(tokenizer))
    batch = CollateRewards(preferences, tokenizer.pad_token_id)([pairs[Draw(0, i)] for i in range(3)])
    assert batch.levels.tolist() == [[2, -1], [-1, 0], [-1, -1]]
    assert batch.attention_mask.sum(1).tolist() == [7, 5, 8]
    encoder = PairEncoder(tokenizer)
    ids, mask = encoder.batch([row.question for row in ROWS], [row.answer for row in ROWS])
    assert batch.input_ids.tolist() == ids.tolist()
    assert batch.attention_mask.tolist() == mask.tolist()
    assert batch.rows == ROWS
    assert batch.targets[:, 0].tolist() == [[0, 0, 1], [0, 0, 0], [0, 0, 0]]
    assert batch.targets[:, 1].tolist() == [[0, 0, 0], [1, 0, 0], [0, 0, 0]]
    assert (batch.chosen.shape, batch.rejected.shape, batch.comparison_mask.shape) == ((0,), (0,), (0, 2))


def test_votes_become_shares_of_the_raters(tokenizer, preferences):
    votes = {"size": (2, 0, 2, 2), "heat": (), "smell": (7,)}
    pairs = Pairs([Example("a", "b", {"size": 2, "heat": 1}, votes=votes)], PairEncoder(tokenizer))
    batch = CollateRewards(preferences, 0)([pairs[Draw(0, 0)]])
    assert batch.targets.tolist() == [[[0.25, 0, 0.75], [0, 1, 0]]]
    assert batch.levels.tolist() == [[2, 1]]


def test_rejected_answers_are_rows_behind_the_others(tokenizer, preferences):
    rows = [
        Example("a b", "c", {"size": 1}, "part", rejected="d e f", votes={"size": (1,)}, margin=0.5),
        Example("a", "b", {"heat": 1}),
        Example("g", "h", rejected="", comparison_dimensions=("heat", "smell")),
    ]
    pairs = Pairs(rows, PairEncoder(tokenizer))
    batch = CollateRewards(preferences, tokenizer.pad_token_id)([pairs[Draw(0, i)] for i in range(3)])
    answers = ["c", "b", "h", "d e f", ""]
    assert [row.answer for row in batch.rows] == answers
    assert [row.subset for row in batch.rows] == ["part", None, None, "part", None]
    ids, _ = PairEncoder(tokenizer).batch(["a b", "a", "g", "a b", "g"], answers)
    assert batch.input_ids.tolist() == ids.tolist()
    assert batch.levels.tolist() == [[1, -1], [-1, 1], [-1, -1], [-1, -1], [-1, -1]]
    assert batch.targets[3:].sum() == 0
    assert (batch.chosen.tolist(), batch.rejected.tolist()) == ([0, 2], [3, 4])
    assert batch.comparison_mask.tolist() == [[True, True], [False, True]]
    assert batch.margins.tolist() == [0.5, 0.0]
    assert pairs.lengths() == [9, 6, 6]


def test_a_vote_outside_the_levels_is_an_error(tokenizer, preferences):
    pairs = Pairs([Example("a", "b", {"size": 2}, votes={"size": (2, 3)})], PairEncoder(tokenizer))
    with pytest.raises(ValueError, match=r"level 3 of dimension 'size' is outside 0\.\.2"):
        CollateRewards(preferences, 0)([pairs[Draw(0, 0)]])


def test_a_label_outside_the_levels_is_an_error(tokenizer, preferences):
    pairs = Pairs([Example("a", "b", {"size": 3})], PairEncoder(tokenizer))
    with pytest.raises(ValueError, match=r"level 3 of dimension 'size' is outside 0\.\.2"):
        CollateRewards(preferences, 0)([pairs[Draw(0, 0)]])


def test_text_labels_are_the_answer_and_its_end(tokenizer):
    pairs = Pairs(ROWS[:2], PairEncoder(tokenizer))
    batch = CollateTexts(tokenizer.pad_token_id)([pairs[Draw(0, i)] for i in range(2)])
    c, end = tokenizer.convert_tokens_to_ids(["c", "<|end|>"])
    assert batch.labels.tolist() == [[-100] * 5 + [c, end], [-100] * 4 + [end, -100, -100]]
    assert batch.input_ids[0, -2:].tolist() == [c, end]


def test_rows_need_answers(tokenizer):
    with pytest.raises(ValueError, match="row 1 of the source has no answer"):
        Pairs([ROWS[0], Example("why")], PairEncoder(tokenizer))


def test_lengths_are_tokens_of_question_and_answer(tokenizer):
    assert Pairs(ROWS, PairEncoder(tokenizer)).lengths() == [7, 5, 8]
