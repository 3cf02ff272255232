"""Completions that were not drawn from the policy itself: how the loss corrects for that."""

import pytest
import torch

from moslim.generation.torch_engine import TorchEngine
from moslim.policy.generation import OffPolicy
from tests.helpers.policy_runs import Traced, data, make, trainer, weights

pytestmark = pytest.mark.filterwarnings("ignore::lightning.pytorch.utilities.warnings.PossibleUserWarning")


class Logged(Traced):
    """Keeps the metrics after every step."""

    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        self.logged = []

    def on_train_batch_end(self, *_):
        self.logged.append({name: float(value) for name, value in self.trainer.callback_metrics.items()})


@pytest.fixture
def run(preferences, lm, classifier, tmp_path):
    def fit(steps, **options):
        module = make(preferences, lm, classifier, Logged, **options)
        trainer(tmp_path, max_steps=steps, limit_train_batches=6).fit(module, data(preferences))
        return module

    return fit


def test_weights_are_one_where_engine_and_trainer_agree(run):
    """No dropout, the same temperature, one update per rollout: recomputing changes nothing but rounding."""
    engine = {"engine": TorchEngine(8, temperature=0.7)}
    again = run(2, off_policy=OffPolicy(old_logprobs="recompute"), **engine)
    assert again.logged[0]["train/off_policy/weight"] == pytest.approx(1, abs=1e-5)
    assert again.logged[0]["train/off_policy/kl"] == pytest.approx(0, abs=1e-6)
    plain = run(2, engine=TorchEngine(8, temperature=0.7))
    assert again.trace[0]["loss"] == pytest.approx(plain.trace[0]["loss"], abs=1e-5)
    for name, value in weights(plain).items():
        torch.testing.assert_close(weights(again)[name], value, atol=1e-3, rtol=0)


def test_answers_cut_by_top_p_are_corrected_without_another_pass(run):
    module = run(1, engine=TorchEngine(8, top_p=0.8))
    rollout = module.rollout
    kept = (rollout.old_logprobs - rollout.behavior_logprobs).exp()[rollout.mask]
    assert 0.8 - 1e-5 < kept.min() < 0.99 and kept.max() < 1 + 1e-5
    assert module.logged[0]["train/off_policy/weight"] == pytest.approx(kept.mean().item())
    assert module.logged[0]["train/off_policy/staleness"] == 0


@pytest.mark.parametrize(
    ("options", "message"), [({"importance_clip": 0.5}, "importance_clip is 0.5"), ({"old_logprobs": "no"}, "is 'no'")]
)
def test_wrong_options(options, message):
    with pytest.raises(ValueError, match=message):
        OffPolicy(**options)
