"""Probability ratios compare the policy with itself until it has changed, in any precision."""

import math
from dataclasses import dataclass

import pytest
import torch

from moslim.algorithms.grpo import GRPO
from moslim.algorithms.online_dpo import OnlineDPO
from moslim.algorithms.ppo import PPO
from moslim.algorithms.reinforce_plus_plus import ReinforcePlusPlus
from moslim.algorithms.rloo import RLOO
from moslim.callbacks.guards import GuardError, Guards
from moslim.generation.torch_engine import TorchEngine
from moslim.policy.generation import OffPolicy, rounded_anew
from moslim.utils.errors import UsageError
from tests.helpers.policy_runs import LORA, data, make, trainer

LONG = 32
SEQUENCE = {"importance_sampling_level": "sequence", "kl_coef": 0.0}


def watching(kind, **options):
    """An optimizer that remembers what its losses were computed from."""

    @dataclass(eq=False, kw_only=True)
    class Watching(kind):
        def loss(self, batch):
            self.seen.append(batch)
            return super().loss(batch)

    optimizer = Watching(**options)
    optimizer.seen = []
    return optimizer


@pytest.fixture
def fit(preferences, lm, classifier, tmp_path):
    def run(optimizer, steps, precision="32-true", callbacks=(), **options):
        module = make(preferences, lm, classifier, policy_optimizer=optimizer, **options)
        own = {"max_steps": steps, "precision": precision, "callbacks": list(callbacks)}
        trainer(tmp_path, **own).fit(module, data(preferences))
        return module

    return run


OPTIMIZERS = {
    "rloo, sequence": lambda: watching(RLOO, **SEQUENCE),
    "rloo": lambda: watching(RLOO),
    "grpo": lambda: watching(GRPO),
    "reinforce": lambda: watching(ReinforcePlusPlus),
    "ppo": lambda: watching(PPO),
    "online dpo": lambda: watching(OnlineDPO),
}


@pytest.mark.parametrize(
    ("kind", "precision"), [*((kind, "bf16-mixed") for kind in OPTIMIZERS), ("rloo, sequence", "32-true")]
)
def test_before_the_first_step_the_ratio_is_one(fit, kind, precision):
    optimizer = OPTIMIZERS[kind]()
    fit(optimizer, 1, precision, engine=TorchEngine(LONG))
    (batch,) = optimizer.seen
    assert batch.mask.any() and torch.equal(batch.log_ratio, torch.zeros_like(batch.old_logprobs))
    assert torch.equal(batch.old_logprobs, batch.logprobs.detach())


@pytest.mark.parametrize(
    ("options", "cut"), [({"precision": "bf16-mixed"}, {"top_k": 20}), ({"dtype": "bfloat16", "lora": LORA}, {})]
)
def test_later_minibatches_are_compared_with_the_same_computation(fit, options, cut):
    """Nothing is learnt here, so that all ratios are 1; the engine's rounding is of hundredths."""
    optimizer = watching(GRPO)
    module = fit(optimizer, 4, minibatches=2, num_iterations=2, rate=0.0, engine=TorchEngine(LONG, **cut), **options)
    rounding = (module.rollout.old_logprobs - module.rollout.engine_logprobs)[module.rollout.mask].abs()
    assert rounding.mean() > 1e-4
    for batch in optimizer.seen:
        assert batch.log_ratio.abs().mean() < 0.2 * rounding.mean()
    if cut:  # what was cut off is weighed as the engine measured it
        assert module.rollout.behavior_logprobs is not None
        assert all((batch.log_importance_weight <= 1e-5).all() for batch in optimizer.seen)
    else:
        assert all(batch.behavior_logprobs is None for batch in optimizer.seen)


def test_in_float32_the_engine_s_will_do(fit):
    module = fit(watching(RLOO), 2, minibatches=2)
    assert module.rollout.engine_logprobs is None


def test_once_the_policy_has_changed_it_is_compared_with_what_it_was(fit):
    optimizer = watching(RLOO)
    fit(optimizer, 4, num_iterations=2, rate=1e-3)
    first, second, third, fourth = (batch.log_ratio.abs().max() for batch in optimizer.seen)
    assert first == third == 0 and second > 1e-4 and fourth > 1e-4


def test_accumulated_minibatches_are_all_before_the_step(preferences, lm, classifier, tmp_path):
    optimizer = watching(RLOO)
    module = make(preferences, lm, classifier, policy_optimizer=optimizer, minibatches=2, num_iterations=2, rate=1e-3)
    trainer(tmp_path, max_steps=2, accumulate_grad_batches=2).fit(module, data(preferences))
    assert [bool(batch.log_ratio.abs().max() > 0) for batch in optimizer.seen] == [False, False, True, True]


def test_the_token_form_is_the_default():
    assert RLOO().importance_sampling_level == "token" and not RLOO().weighs_completions
    assert RLOO(**SEQUENCE).weighs_completions


@pytest.mark.parametrize("cut", [{"top_p": 0.95}, {"top_k": 5}, {"top_k": 5, "top_p": 0.9}])
def test_whole_answers_are_not_weighed_by_what_was_cut(preferences, lm, classifier, cut):
    def build(optimizer, **more):
        return make(preferences, lm, classifier, policy_optimizer=optimizer, engine=TorchEngine(8, **cut), **more)

    with pytest.raises(UsageError, match=r"RLOO weighs whole completions.*importance_sampling_level to token"):
        build(RLOO(**SEQUENCE))
    build(RLOO())
    build(RLOO(**SEQUENCE), off_policy=OffPolicy(importance_clip=None))  # nothing is weighed
    make(preferences, lm, classifier, policy_optimizer=RLOO(**SEQUENCE), engine=TorchEngine(8, temperature=0.7))


def test_the_weight_that_is_logged_is_the_one_that_is_used(fit):
    module = fit(RLOO(kl_coef=0.0), 1, engine=TorchEngine(8, top_p=0.8))
    rollout = module.rollout
    kept = (rollout.old_logprobs - rollout.behavior_logprobs).exp()[rollout.mask]
    logged = module.trainer.callback_metrics
    assert logged["train/off_policy/weight"].item() == pytest.approx(kept.mean().item(), abs=1e-5)
    for off_policy in (OffPolicy(importance_clip=None), None):
        optimizer = OnlineDPO() if off_policy is None else RLOO()  # which weighs nothing
        module = fit(optimizer, 1, engine=TorchEngine(8, top_p=0.8), off_policy=off_policy)
        assert "train/off_policy/weight" not in module.trainer.callback_metrics


class Warmer(TorchEngine):
    """Samples at a temperature that is a little lower than it says: by less than the tolerance per token."""

    def sample(self, *args):
        said, self.temperature = self.temperature, 0.985
        found = super().sample(*args)
        self.temperature = said
        return found


@pytest.mark.slow
def test_the_guard_looks_at_the_ratio_that_is_clipped(fit):
    def guards():
        return Guards(nonfinite="off", kl="off", log_ratio="stop", identical="off", truncated="off", keep=False)

    fit(RLOO(kl_coef=0.0), 1, callbacks=[guards()], engine=Warmer(LONG), minibatches=2)  # of a token: within 0.05
    with pytest.raises(GuardError, match=r"old log-probabilities disagree .* over completions is 0\.\d+, above 0\.05"):
        fit(RLOO(**SEQUENCE), 1, callbacks=[guards()], engine=Warmer(LONG), minibatches=2)
    for minibatches in (1, 2):  # the same in rounding: nothing is clipped by it
        module = fit(RLOO(**SEQUENCE), 1, "bf16-mixed", [guards()], engine=TorchEngine(LONG), minibatches=minibatches)
        assert module.trainer.callback_metrics["train/clip_fraction"] == 0


def test_other_numbers_of_the_same_weights_by_hand():
    now, old, sampler = torch.tensor([[-1.1]]), torch.tensor([[-1.0]]), torch.tensor([[-0.8]])
    assert rounded_anew(now, old, None, True) == (now, None)
    assert rounded_anew(now, old, None, False) == (now, old)  # another program's rounding is corrected
    found = rounded_anew(now, old, sampler, True)
    assert found[0] is now and found[1].item() == pytest.approx(-1.1 + 0.2)
    assert math.exp((found[0] - found[1]).item()) == pytest.approx(math.exp(-0.2))
