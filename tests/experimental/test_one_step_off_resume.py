"""A run that samples one step ahead, cut and resumed, equals the uninterrupted one, bit by bit."""

import signal

import pytest

from moslim.experimental import OneStepOff
from moslim.mapping import TargetProbability
from tests.helpers.policy_runs import LORA, data, make, trainer
from tests.policy.test_resume import SaveEachStep, SaveWhenStopped, assert_same_from

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore::lightning.pytorch.utilities.warnings.PossibleUserWarning"),
    pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`"),
]


@pytest.fixture
def world(preferences, lm, classifier):
    def build(**options):
        mapping = TargetProbability(scope="running", min_count=6)
        return make(preferences, lm, classifier, mapping=mapping, default_kl_coef=0.1, **options)

    return build


def fit(module, folder, preferences, ckpt_path=None, callbacks=(), workers=0, **options):
    run = trainer(folder, callbacks=[OneStepOff(), *callbacks], **options)
    run.fit(module, data(preferences, workers=workers), ckpt_path=ckpt_path, weights_only=True)
    return module


@pytest.mark.parametrize("options", [{"num_iterations": 2}, {"lora": LORA}], ids=["inner epochs", "lora"])
def test_a_run_resumed_from_any_of_its_steps(options, world, preferences, tmp_path):
    limits = {"max_steps": 7, "limit_train_batches": 5}  # the sixth step is in a second epoch
    whole = fit(world(**options), tmp_path, preferences, callbacks=[SaveEachStep(tmp_path)], **limits)
    assert len(whole.trace) == 7 and whole.trace[-1]["key"][0] == 1
    for step in (1, 3, 6):
        resumed = fit(world(**options), tmp_path, preferences, tmp_path / f"{step}.ckpt", **limits)
        assert resumed.trace[0]["new"] == whole.trace[step]["new"]
        assert_same_from(step, resumed, whole)


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_workers_prepare_the_same_batches(world, preferences, tmp_path):
    limits = {"max_steps": 5, "limit_train_batches": 4}
    runs = [fit(world(), tmp_path, preferences, workers=workers, **limits) for workers in (0, 1)]
    assert_same_from(0, *runs)


@pytest.mark.parametrize("stop", [KeyboardInterrupt(), RuntimeError("out of memory")], ids=["ctrl-c", "error"])
@pytest.mark.parametrize("at", [3, 4], ids=["middle of a rollout", "start of a rollout"])
def test_a_run_stopped_in_a_step(at, stop, world, preferences, tmp_path):
    whole = fit(world(num_iterations=2), tmp_path, preferences, max_steps=6)
    first = world(num_iterations=2)
    first.stop_at, first.stop = (0, at), stop
    ctrl_c = signal.getsignal(signal.SIGINT)
    try:
        with pytest.raises((SystemExit, RuntimeError)):
            fit(first, tmp_path, preferences, callbacks=[SaveWhenStopped(tmp_path / "stopped.ckpt")], max_steps=6)
    finally:
        signal.signal(signal.SIGINT, ctrl_c)  # Lightning leaves it ignored
    assert len(first.trace) == at
    resumed = fit(world(num_iterations=2), tmp_path, preferences, tmp_path / "stopped.ckpt", max_steps=6)
    assert resumed.trace[0]["new"] == (at % 2 == 0)
    assert_same_from(at, resumed, whole)


def test_a_step_is_replayed_with_the_completions_that_were_ready(world, preferences, tmp_path):
    whole = fit(world(), tmp_path, preferences, callbacks=[SaveEachStep(tmp_path)], max_steps=3)
    run = trainer(tmp_path, max_steps=3, callbacks=[OneStepOff()])
    replayed = run.replay(world(), data(preferences), ckpt_path=tmp_path / "2.ckpt")
    assert replayed.loss == whole.trace[2]["loss"]


def test_validation_in_between_changes_nothing(world, preferences, tmp_path):
    plain = fit(world(), tmp_path, preferences, max_steps=4)
    validated = fit(world(), tmp_path, preferences, max_steps=4, limit_val_batches=1, val_check_interval=1)
    assert_same_from(0, validated, plain)
