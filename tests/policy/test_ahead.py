"""Answers sampled one batch ahead: with which weights, how they are corrected, and that nothing else changes."""

import threading

import pytest
import torch

from moslim.policy.ahead import TrainingAnswers
from moslim.policy.answering import Purpose
from moslim.policy.engines import TorchEngine
from moslim.policy.off_policy import OffPolicy
from moslim.policy.optimizers import GRPO
from tests.helpers.policy_runs import LORA, SAMPLES, Traced, data, make, trainer, weights

pytestmark = pytest.mark.filterwarnings("ignore::lightning.pytorch.utilities.warnings.PossibleUserWarning")

AHEAD = OffPolicy(overlap=True)


class Remembering(Traced):
    """Keeps the weights before every step, the metrics after it, and where answers were sampled."""

    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        self.before, self.logged, self.batches, self.threads = [], [], [], []
        sample = self.engine.sample

        def told(*args):
            self.threads.append(threading.current_thread())
            return sample(*args)

        self.engine.sample = told

    def training_step(self, batch, batch_idx):
        self.before.append(weights(self))
        self.batches.append(batch)
        return super().training_step(batch, batch_idx)

    def on_train_batch_end(self, *_):
        self.logged.append({name: float(value) for name, value in self.trainer.callback_metrics.items()})


@pytest.fixture
def run(preferences, lm, classifier, tmp_path):
    def fit(steps, limit=6, **options):
        module = make(preferences, lm, classifier, Remembering, **options)
        trainer(tmp_path, max_steps=steps, limit_train_batches=limit).fit(module, data(preferences))
        return module

    return fit


def resampled(module, step, old):
    """Tokens of the answers to the batch of a step, by the weights before the step ``old``."""
    named = dict(module.policy.named_parameters())
    for name, value in module.before[old].items():
        named[name].data.copy_(value)
    batch, key = module.batches[step], module.trace[step]["key"]
    keys = [(module.seed, Purpose.TRAIN, *key, index) for index in batch.index.tolist()]
    return module.answerer(module.policy, batch, keys, SAMPLES).completions.tokens


@pytest.mark.parametrize("options", [{}, {"lora": LORA}], ids=["all weights", "adapter"])
def test_answers_come_from_the_weights_before_the_last_update(run, options):
    module = run(6, limit=4, off_policy=AHEAD, **options)
    staleness = [logged.get("train/off_policy/staleness", 0) for logged in module.logged]
    ages = [0, 1, 1, 1, 0, 1]  # a new epoch begins with the fifth step
    assert staleness[1:4] == ages[1:4] and staleness[5] == 1
    assert [step["key"] for step in module.trace] == [(0, 0), (0, 1), (0, 2), (0, 3), (1, 0), (1, 1)]
    main = threading.main_thread()
    assert sum(thread is main for thread in module.threads) == 2  # the first batch of each epoch
    assert len(module.threads) == 7  # all six, and the one after the last; none behind the end of an epoch
    for step, age in enumerate(ages):
        assert torch.equal(module.trace[step]["tokens"], resampled(module, step, step - age)), step
    assert not torch.equal(module.trace[3]["tokens"], resampled(module, 3, 3))  # an update did change answers


def test_the_first_step_is_that_of_a_run_without(run):
    ahead, plain = run(1, off_policy=AHEAD), run(1)
    assert ahead.trace[0]["loss"] == plain.trace[0]["loss"]
    for name, value in weights(plain).items():
        assert torch.equal(weights(ahead)[name], value)


def test_several_steps_on_a_rollout_make_the_next_one_older(run):
    module = run(6, off_policy=AHEAD, inner_epochs=2, policy_optimizer=GRPO(kl_coef=0.1))
    assert [step["new"] for step in module.trace] == [True, False] * 3
    assert module.logged[2]["train/off_policy/staleness"] == module.logged[4]["train/off_policy/staleness"] == 2
    assert len(module.threads) == 3  # the epoch is cut after these


def test_stale_answers_know_both_policies_and_are_measured(run):
    module = run(2, off_policy=OffPolicy(overlap=True, cap=1.0), rate=0.05)
    rollout, logged = module.rollout, module.logged[1]
    surplus = (rollout.old_logprobs - rollout.sampler_logprobs)[rollout.mask]
    assert surplus.abs().max() > 0.1
    assert logged["train/off_policy/weight"] == pytest.approx(surplus.exp().clamp(max=1.0).mean().item())
    assert logged["train/off_policy/capped"] == pytest.approx((surplus >= 0).float().mean().item(), abs=0.02)
    assert logged["train/off_policy/kl"] == pytest.approx((surplus.exp() - 1 - surplus).mean().item(), rel=1e-4)
    assert not any("off_policy" in name for name in module.logged[0])


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
    kept = (rollout.old_logprobs - rollout.sampler_logprobs).exp()[rollout.mask]
    assert 0.8 - 1e-5 < kept.min() < 0.99 and kept.max() < 1 + 1e-5
    assert module.logged[0]["train/off_policy/weight"] == pytest.approx(kept.mean().item())
    assert module.logged[0]["train/off_policy/staleness"] == 0


def test_an_error_in_the_background_stops_the_run(run, preferences, lm, classifier, tmp_path):
    module = make(preferences, lm, classifier, Remembering, off_policy=AHEAD)
    told = module.engine.sample

    def fails_in_the_background(*args):
        if threading.current_thread() is not threading.main_thread():
            raise ConnectionError("no server")
        return told(*args)

    module.engine.sample = fails_in_the_background
    with pytest.raises(ConnectionError, match="no server"):
        trainer(tmp_path, max_steps=3).fit(module, data(preferences))
    assert len(module.trace) == 1


@pytest.mark.parametrize(("options", "message"), [({"cap": 0.5}, "cap is 0.5"), ({"old_logprobs": "no"}, "is 'no'")])
def test_wrong_options(options, message):
    with pytest.raises(ValueError, match=message):
        OffPolicy(**options)


def test_what_could_not_be_sampled_ahead_is_left_out_of_a_checkpoint(run):
    batch = run(1, off_policy=AHEAD).batches[0]

    def refusing(*_, **__):
        raise ConnectionError("no server")

    ahead = TrainingAnswers(refusing, SAMPLES, seed=0, overlap=True)
    ahead._kept[0, 1] = ahead._pool.submit(ahead._sampled, None, batch, (0, 1), 0)
    assert ahead.state() == []
    with pytest.raises(ConnectionError, match="no server"):
        ahead.take(None, batch, (0, 1), version=1)
