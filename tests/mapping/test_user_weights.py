import json
import math
from pathlib import Path

import pytest
import torch
from torch import Tensor

from moslim.mapping import UserWeights
from moslim.mapping.weighted import foretold, logistic_weights, main, read_choices
from moslim.preferences import expected_level
from moslim.reward.scorer import Scorer
from moslim.workbench.grammar import build_tokenizer
from tests.helpers.policy_models import save_classifier


def choices(weights: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """Feature differences of pairs, each the way round that a person with these weights chose."""
    x = torch.rand(count, len(weights), generator=generator, dtype=torch.float64) * 2 - 1
    kept = torch.rand(count, generator=generator, dtype=torch.float64) < (x @ weights).sigmoid()
    return torch.where(kept[:, None], x, -x)


def test_by_hand() -> None:
    # four choices for the better answer: 4 sigmoid(-w) = l2 w, which l2 = 1 / log 3 solves with w = log 3
    weights, errors = logistic_weights(torch.ones(4, 1), l2=1 / math.log(3))
    assert weights.item() == pytest.approx(math.log(3))
    assert errors.item() == pytest.approx((4 * 0.25 * 0.75 + 1 / math.log(3)) ** -0.5)


def test_what_is_never_compared_keeps_its_prior() -> None:
    x = choices(torch.tensor([3.0, 0.0], dtype=torch.float64), 30, torch.Generator().manual_seed(0))
    x[:, 1] = 0
    weights, errors = logistic_weights(x, l2=0.25)
    assert weights[1] == 0 and errors[1].item() == pytest.approx(2.0)
    assert errors[0] < 1.5


def test_choices_that_all_agree_have_finite_weights() -> None:
    weights, _ = logistic_weights(torch.full((1000, 1), 1.0), l2=1e-6)
    assert 1000 * math.exp(-weights.item()) == pytest.approx(1e-6 * weights.item(), rel=1e-3)
    with pytest.raises(ValueError, match="l2 is 0"):
        logistic_weights(torch.ones(3, 1), l2=0.0)


def test_known_weights_are_recovered_with_honest_standard_errors() -> None:
    truth = torch.tensor([3.0, -1.5, 0.0], dtype=torch.float64)
    generator = torch.Generator().manual_seed(1)
    weights, errors = logistic_weights(choices(truth, 5000, generator), l2=0.01)
    assert ((weights - truth).abs() < 0.25).all() and (errors < 0.1).all()
    few = [logistic_weights(choices(truth, 60, generator), l2=0.01) for _ in range(200)]
    covered = torch.stack([(found - truth).abs() < 1.96 * error for found, error in few]).double().mean(dim=0)
    assert ((covered > 0.9) & (covered < 0.99)).all()


def test_choices_without_any_rule_are_foretold_half_of_the_time() -> None:
    generator = torch.Generator().manual_seed(2)
    noise = torch.randn(400, 30, generator=generator, dtype=torch.float64)
    weights, _ = logistic_weights(noise, l2=0.1)
    assert (noise @ weights > 0).double().mean() > 0.6  # which says nothing: they were fitted to these
    assert foretold(noise, l2=0.1) == pytest.approx(0.5, abs=0.08)
    assert foretold(noise.float(), l2=0.1) == foretold(noise.float().double(), l2=0.1)
    assert foretold(torch.ones(4, 1).double(), l2=0.1) == 1 and foretold(torch.ones(1, 1).double(), l2=0.1) == 0


@pytest.fixture(scope="module")
def classifier(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_classifier(tmp_path_factory.mktemp("classifier"), build_tokenizer(), seed=7)


def test_from_a_file_of_choices_to_a_mapping(
    classifier: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    scorer = Scorer(classifier)
    words = "basil fern pepper rose tomato tulip chair clock fence radio".split()
    texts = [f"Check the {a} and the {b}." for a in words for b in words]
    probs = scorer.probabilities(["How?"] * len(texts), texts)
    features = expected_level(probs).double() / (torch.tensor(scorer.preferences.sizes) - 1)
    truth = torch.tensor([8.0, -8.0, 4.0, 0.0], dtype=torch.float64)
    liked = (features @ truth).tolist()
    pairs = [(i, (i * 37 + 11) % 100) for i in range(100) if i != (i * 37 + 11) % 100]
    better = [(i, j) if liked[i] > liked[j] else (j, i) for i, j in pairs]
    lines = [{"question": "How?", "chosen": texts[i], "rejected": texts[j]} for i, j in better]
    (tmp_path / "mine.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))

    out = tmp_path / "user_weights.json"
    main(["--choices", str(tmp_path / "mine.jsonl"), "--classifier", classifier, "--output", str(out), "--l2", "0.01"])
    assert f"{len(lines)} choices" in capsys.readouterr().out
    mapping = UserWeights(path=str(out))
    assert mapping.user_weights is not None and mapping.user_weights.agreement > 0.95
    assert mapping.utility.keys() == set(scorer.preferences.names)
    mapping.bind(scorer.preferences)
    nothing = torch.full((len(texts), 4), -1)
    found = mapping(probs, nothing, torch.zeros(len(texts))).total
    agreed = [found[i] > found[j] for i in range(100) for j in range(100) if liked[i] > liked[j]]
    assert sum(agreed) / len(agreed) > 0.9  # also on pairs that were never compared


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ({"question": "How?", "chosen": "a"}, r"line 1, field 'rejected': None is not a text"),
        ({"question": "How?", "chosen": 3, "rejected": "b"}, r"line 1, field 'chosen': 3 is not a text"),
        ({"chosen": "a", "rejected": "b"}, r"line 1, field 'question'"),
    ],
)
def test_a_bad_line_is_named(line: dict[str, object], message: str, tmp_path: Path) -> None:
    (tmp_path / "bad.jsonl").write_text(json.dumps(line))
    with pytest.raises(ValueError, match=message):
        read_choices(str(tmp_path / "bad.jsonl"))


def test_a_file_that_is_not_there_or_empty(tmp_path: Path) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["--choices", str(tmp_path / "no.jsonl"), "--classifier", "c", "--output", "o"])
    assert stop.value.code == 2
    (tmp_path / "empty.jsonl").write_text("")
    with pytest.raises(ValueError, match="the file is empty"):
        read_choices(str(tmp_path / "empty.jsonl"))
