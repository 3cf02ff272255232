import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.optim import AdamW

from moslim.data.data_module import PreferenceDataModule
from moslim.data.types import Example, RowKind, Source, Split
from moslim.preferences import PreferenceSet
from moslim.reward.losses import CrossEntropy
from moslim.reward.reward_classifier import RewardClassifier
from moslim.reward.scorer import Scorer
from tests.helpers.word_task import WordSource, trainer

FILLER = {"filler": [str(level) for level in range(20)]}  # more levels than the others have, and than fill a register


class FillerSource(Source):
    """The rows of :class:`WordSource`, labelled with their filler word, too."""

    def rows(self, kind: RowKind, split: Split, preferences: PreferenceSet, seed: int) -> list[Example]:
        rows = WordSource().rows(kind, split, preferences, seed)
        return [Example(row.question, row.answer, {**row.levels, "filler": 13 * (row.subset == "so")}) for row in rows]


@pytest.fixture(scope="module")
def saved(backbone: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A calibrated classifier of tone and amount, whose backbone was trained."""
    folder = tmp_path_factory.mktemp("saved")
    torch.manual_seed(0)
    preferences = PreferenceSet({"tone": ["bad", "good"], "amount": ["none", "some", "much"]})
    module = RewardClassifier(preferences, backbone, output=str(folder), pooling=["mean", "max"], max_length=40)
    trainer(folder, max_steps=6).fit(module, PreferenceDataModule(preferences, WordSource(), batch_size=12))
    return folder


def extend(
    folder: Path, start: Path, dimensions: dict[str, list[str]], steps: int = 12, **options: object
) -> RewardClassifier:
    torch.manual_seed(0)
    preferences = PreferenceSet(dimensions)
    optimizer = lambda parameters: AdamW(parameters, lr=2e-2)  # noqa: E731
    module = RewardClassifier(
        preferences, extend=str(start), output=str(folder / "extended"), optimizer=optimizer, **options
    )
    run = trainer(folder, max_steps=steps)
    run.fit(module, PreferenceDataModule(preferences, FillerSource(), batch_size=12, eval_batch_size=9, max_length=40))
    module.metrics = {key: float(value) for key, value in run.callback_metrics.items()}
    return module


def texts() -> tuple[list[str], list[str]]:
    rows = WordSource().rows(RowKind.LABELLED, Split.VALIDATION, PreferenceSet({"tone": ["bad", "good"]}), 0)
    return [str(row.question) for row in rows], [row.answer or "" for row in rows]


@pytest.mark.slow
@pytest.mark.parametrize("hidden", [None, 8])
def test_a_new_head_learns_and_the_others_stay_the_same_to_the_last_bit(
    hidden: int | None, saved: Path, tmp_path: Path
) -> None:
    module = extend(tmp_path, saved, FILLER, steps=60, head_hidden=hidden)
    assert module.metrics["val/filler/accuracy"] > 0.8  # a sixth of the rows show no filler
    assert "val/tone/accuracy" not in module.metrics
    old, new = Scorer(saved), Scorer(tmp_path / "extended")
    assert list(new.preferences.names) == ["tone", "amount", "filler"]
    assert new.classifier.config.pair_length == 40
    temperatures = new.classifier.config.temperatures
    assert temperatures[:2] == old.classifier.config.temperatures and temperatures[2] != 1
    before, after = old.probabilities(*texts()), new.probabilities(*texts())
    assert torch.equal(after[:, :2, :3], before) and (after[:, :2, 3:] == 0).all()
    old_state, state = old.classifier.state_dict(), new.classifier.state_dict()
    assert all(torch.equal(state[name], tensor) for name, tensor in old_state.items())
    inner = "0." if hidden else ""
    assert f"added.filler.{inner}weight" in state.keys() - old_state.keys()


def test_naming_old_dimensions_evaluates_them_and_changes_nothing_else(saved: Path, tmp_path: Path) -> None:
    tone = {"tone": ["bad", "good"]}
    alone = extend(tmp_path / "alone", saved, FILLER)
    both = extend(tmp_path / "both", saved, {**FILLER, **tone})
    assert "val/tone/accuracy" in both.metrics
    for name, tensor in alone.classifier.state_dict().items():
        assert torch.equal(both.classifier.state_dict()[name], tensor), name
    assert both.classifier.config.temperatures == alone.classifier.config.temperatures


def test_a_classifier_can_be_extended_again(saved: Path, tmp_path: Path) -> None:
    extend(tmp_path / "one", saved, FILLER, pooling=["mean", "max"], max_length=40)  # as they are: allowed
    extend(tmp_path / "two", tmp_path / "one" / "extended", {"third": FILLER["filler"]}, calibrate=False)
    one, two = (Scorer(tmp_path / name / "extended") for name in ("one", "two"))
    assert list(two.preferences.names) == ["tone", "amount", "filler", "third"]
    assert torch.equal(two.probabilities(*texts())[:, :3], one.probabilities(*texts()))
    assert two.classifier.config.temperatures == [*one.classifier.config.temperatures, 1.0]


def test_the_code_for_use_without_moslim_knows_added_heads_and_several_poolings(saved: Path, tmp_path: Path) -> None:
    extend(tmp_path, saved, FILLER, head_hidden=4)
    card = (tmp_path / "extended" / "README.md").read_text()
    code = card.split("## Use without moslim")[1].split("```python\n")[1].split("```")[0]
    known: dict[str, Any] = {}
    exec(code.replace('folder = "."', f"folder = {str(tmp_path / 'extended')!r}"), known)
    found = known["score"]("how cake", "bad .")
    probs = Scorer(tmp_path / "extended").probabilities(["how cake"], ["bad ."])[0]
    assert list(found) == ["tone", "amount", "filler"]
    for head, levels in enumerate(found.values()):
        assert list(levels.values()) == pytest.approx(probs[head, : len(levels)].tolist(), abs=1e-5)


@pytest.mark.parametrize(
    ("dimensions", "options", "message"),
    [
        ({"tone": ["bad", "good"]}, {}, "name a dimension to add, or give the folder as model.classifier"),
        ({**FILLER, "tone": ["bad", "fair", "good"]}, {}, "has the levels .*'fair'.* but"),
        (FILLER, {"freeze_backbone": False}, "leave model.freeze_backbone out"),
        (FILLER, {"loss": CrossEntropy()}, "CrossEntropy needs heads with the link 'softmax'"),
        (FILLER, {"pooling": "last"}, "model.pooling is last, but the old heads were trained with .'mean', 'max'."),
        (FILLER, {"backbone": "some/model"}, "given at once"),
    ],
)
def test_what_does_not_fit_is_refused(
    dimensions: dict[str, list[str]], options: dict[str, object], message: str, saved: Path
) -> None:
    with pytest.raises(ValueError, match=message):
        RewardClassifier(PreferenceSet(dimensions), extend=str(saved), **options)


def test_the_card_of_an_extended_classifier_knows_what_its_old_heads_learned(saved: Path, tmp_path: Path) -> None:
    extend(tmp_path, saved, FILLER)
    old, new = ((folder / "README.md").read_text() for folder in (saved, tmp_path / "extended"))
    assert re.search(r"^\d+ question-answer pairs, 12 .*Before that, \d+ question-answer pairs, 6 ", new, re.M | re.S)
    tone = [next(line for line in card.splitlines() if line.startswith("| tone |")) for card in (old, new)]
    with_tone = {**FILLER, "tone": ["bad", "good"]}
    extend(tmp_path / "both", saved, with_tone)  # evaluated, not trained
    both = (tmp_path / "both" / "extended" / "README.md").read_text()
    assert tone[0] in both.splitlines()
    assert tone[0] == tone[1] and not tone[0].endswith("| - |")
