"""Completions sampled one batch ahead: weights, correction, checkpoints, and that nothing else changes."""

import threading

import pytest
import torch
from lightning.pytorch import LightningModule
from torch.utils.data import DataLoader

from moslim.algorithms.grpo import GRPO
from moslim.algorithms.rloo import RLOO
from moslim.callbacks.monitors import RoleMemory
from moslim.data.prompt_batches import CollatePrompts, Prompt
from moslim.experimental import OneStepOff
from moslim.policy.generation import OffPolicy, Purpose
from moslim.preferences import Preference
from moslim.utils.errors import UsageError
from tests.helpers.forked import in_two, sharded
from tests.helpers.policy_runs import LORA, SAMPLES, Traced, data, make, trainer, weights

pytestmark = pytest.mark.filterwarnings("ignore::lightning.pytorch.utilities.warnings.PossibleUserWarning")


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
    def fit(steps, limit=6, ahead=True, **options):
        module = make(preferences, lm, classifier, Remembering, **options)
        callbacks = [OneStepOff()] if ahead else []
        run = trainer(tmp_path, max_steps=steps, limit_train_batches=limit, callbacks=callbacks)
        run.fit(module, data(preferences))
        return module

    return fit


def resampled(module, step, old):
    """Tokens of the answers to the batch of a step, by the weights before the step ``old``."""
    named = dict(module.policy.named_parameters())
    for name, value in module.before[old].items():
        named[name].data.copy_(value)
    batch, key = module.batches[step], module.trace[step]["key"]
    keys = [(module.seed, Purpose.TRAIN, *key, index) for index in batch.index.tolist()]
    return module.generator(module.policy, batch, keys, SAMPLES).completions.tokens


@pytest.mark.slow
@pytest.mark.parametrize("options", [{}, {"lora": LORA}], ids=["all weights", "adapter"])
def test_answers_come_from_the_weights_before_the_last_update(run, options):
    module = run(6, limit=4, **options)
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
    ahead, plain = run(1), run(1, ahead=False)
    assert ahead.trace[0]["loss"] == plain.trace[0]["loss"]
    for name, value in weights(plain).items():
        assert torch.equal(weights(ahead)[name], value)


def test_several_steps_on_a_rollout_make_the_next_one_older(run):
    module = run(6, num_iterations=2, policy_optimizer=GRPO(kl_coef=0.1))
    assert [step["new"] for step in module.trace] == [True, False] * 3
    assert module.logged[2]["train/off_policy/staleness"] == module.logged[4]["train/off_policy/staleness"] == 2
    assert len(module.threads) == 3  # the epoch is cut after these


def test_stale_answers_know_both_policies_and_are_measured(run):
    module = run(2, off_policy=OffPolicy(importance_clip=1.0), rate=0.05)
    rollout, logged = module.rollout, module.logged[1]
    surplus = (rollout.old_logprobs - rollout.behavior_logprobs)[rollout.mask]
    assert surplus.abs().max() > 0.1
    assert logged["train/off_policy/weight"] == pytest.approx(surplus.exp().clamp(max=1.0).mean().item())
    assert logged["train/off_policy/capped"] == pytest.approx((surplus >= 0).float().mean().item(), abs=0.02)
    assert logged["train/off_policy/kl"] == pytest.approx((surplus.exp() - 1 - surplus).mean().item(), rel=1e-4)
    assert not any("off_policy" in name for name in module.logged[0])


def test_an_error_in_the_background_stops_the_run(run, preferences, lm, classifier, tmp_path):
    module = make(preferences, lm, classifier, Remembering)
    told = module.engine.sample

    def fails_in_the_background(*args):
        if threading.current_thread() is not threading.main_thread():
            raise ConnectionError("no server")
        return told(*args)

    module.engine.sample = fails_in_the_background
    with pytest.raises(ConnectionError, match="no server"):
        trainer(tmp_path, max_steps=3, callbacks=[OneStepOff()]).fit(module, data(preferences))
    assert len(module.trace) == 1


def test_what_could_not_be_sampled_ahead_is_left_out_of_a_checkpoint(run, preferences, lm, classifier, tmp_path):
    module = make(preferences, lm, classifier, Remembering)
    told = module.engine.sample

    def fails_once(*args):
        if threading.current_thread() is not threading.main_thread():
            raise ConnectionError("no server")
        return told(*args)

    module.engine.sample = fails_once
    ahead = OneStepOff()
    trainer(tmp_path, max_steps=1, callbacks=[ahead]).fit(module, data(preferences))
    assert ahead._kept[0, 1].exception() is not None
    assert [key for key, _ in ahead.state_dict()["processes"][0]] == []


def test_the_logged_weight_of_the_sequence_form_is_that_of_answers(run):
    importance_clip = 1.5
    optimizer = RLOO(importance_sampling_level="sequence", kl_coef=0.0)
    module = run(2, rate=0.05, off_policy=OffPolicy(importance_clip=importance_clip), policy_optimizer=optimizer)
    surplus = (module.rollout.old_logprobs - module.rollout.behavior_logprobs) * module.rollout.mask
    expected = surplus.sum(dim=1).exp().clamp(max=importance_clip)
    assert module.logged[1]["train/off_policy/weight"] == pytest.approx(expected.mean().item(), rel=1e-4)
    assert module.logged[1]["train/off_policy/capped"] == pytest.approx(
        (expected == importance_clip).float().mean().item()
    )


def test_answers_that_are_not_finite_are_refused(preferences, lm, classifier, tmp_path):
    module = make(preferences, lm, classifier)
    with torch.no_grad():
        module.policy.get_output_embeddings().weight[3] = torch.nan
    with pytest.raises(UsageError, match="a log-probability of the policy is not finite in"):
        trainer(tmp_path, max_steps=1, callbacks=[OneStepOff()]).fit(module, data(preferences))


def test_passes_of_the_copy_are_not_counted(preferences, lm, classifier, tmp_path):
    begun = []

    class Noted(RoleMemory):
        def _begin(self, role):
            begun.append((threading.current_thread() is threading.main_thread(), role))
            super()._begin(role)

    module = make(preferences, lm, classifier)
    trainer(tmp_path, max_steps=3, callbacks=[OneStepOff(), Noted()]).fit(module, data(preferences))
    assert len(begun) > 3 and all(in_main for in_main, _ in begun)
    assert begun[-1] == (True, None)  # nothing was watched after the first step


def test_a_finished_run_gives_the_module_back(run):
    module = run(2)
    assert module.collector.completion_source is None


def test_it_samples_for_a_policy_only_and_needs_batches_in_advance(preferences, lm, classifier, tmp_path):
    with pytest.raises(UsageError, match="not for a LightningModule"):
        OneStepOff().setup(trainer(tmp_path), LightningModule(), "fit")
    module = make(preferences, lm, classifier)
    collate = CollatePrompts(data(preferences).renderer(module.tokenizer))
    batch = collate([Prompt("Why?", Preference({"warmth": 4}), 0)])
    with pytest.raises(UsageError, match="which a DataLoader does not give"):
        trainer(tmp_path, max_steps=1, callbacks=[OneStepOff()]).fit(module, DataLoader([batch] * 2, batch_size=None))


def refused(folder, preferences, lm, classifier):
    with pytest.raises(UsageError, match="samples with copies of the policy's weights"):
        run = trainer(folder, max_steps=1, strategy=sharded(), devices=2, callbacks=[OneStepOff()])
        run.fit(make(preferences, lm, classifier), data(preferences, batch_size=2))
    (folder / f"refused.{torch.distributed.get_rank()}").touch()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_weights_in_shards_are_refused(preferences, lm, classifier, tmp_path):
    in_two(refused, tmp_path, preferences, lm, classifier)
    assert len(list(tmp_path.glob("refused.*"))) == 2
