"""Each guard trips on a tiny run that was made to misbehave, keeps its step, and is silent on a good run."""

import math
import warnings
from dataclasses import replace

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.demos.boring_classes import BoringModel

from moslim.algorithms.grpo import GRPO
from moslim.algorithms.rloo import RLOO
from moslim.callbacks import guards as faults
from moslim.callbacks.guards import GuardError, Guards
from moslim.callbacks.monitors import StepCheckpoint
from moslim.generation.torch_engine import TorchEngine
from moslim.mapping import ExpectedDistance
from moslim.ops.numerics import nonfinite
from moslim.training.optim import nonfinite_weights
from moslim.utils.errors import UsageError
from tests.helpers.policy_runs import BATCH, SAMPLES, data, make, trainer, weights

pytestmark = [
    pytest.mark.filterwarnings("ignore::lightning.pytorch.utilities.warnings.PossibleUserWarning"),
    pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`"),
]

NAMES = ("nonfinite", "kl", "log_ratio", "identical", "truncated")


class Broken(ExpectedDistance):
    """A mapping with a division by zero, from the third rollout on."""

    def __init__(self, value=math.nan, row=1):
        super().__init__()
        self.value, self.row, self.seen = value, row, 0

    def observe(self, probs, targets):
        self.seen += 1

    def state_dict(self):
        return {"seen": self.seen}

    def load_state_dict(self, state):
        self.seen = state["seen"]

    def __call__(self, probs, targets, groups):
        mapped = super().__call__(probs, targets, groups)
        total = mapped.total.clone()
        total[self.row] = self.value if self.seen > 2 else total[self.row]
        return replace(mapped, total=total)


class OtherTemperature(TorchEngine):
    """Samples at another temperature than it says."""

    def sample(self, *args):
        said, self.temperature = self.temperature, 0.5
        found = super().sample(*args)
        self.temperature = said
        return found


class Endless(TorchEngine):
    """Knows no token that ends an answer."""

    def sample(self, model, input_ids, attention_mask, seeds, eos_ids, pad_id):
        return super().sample(model, input_ids, attention_mask, seeds, [], pad_id)


class SaveEachStep(ModelCheckpoint):
    """Saves every step, and remembers the weights before the last one."""

    def __init__(self, folder):
        super().__init__(folder, filename="{step}", every_n_train_steps=1, save_top_k=-1, save_last=True)

    def on_train_batch_start(self, trainer, pl_module, *args):
        self.before = weights(pl_module)


MISBEHAVIOUR = {  # guard: what makes it trip, before which step, and what it says
    "nonfinite": (lambda: {"mapping": Broken()}, 2, "a reward is not finite in 1 of 12 places"),
    "kl": (lambda: {"rate": 0.1}, 1, r"the KL divergence to the reference is \d.* nats per completion, not within 1"),
    "log_ratio": (lambda: {"engine": OtherTemperature(8)}, 0, r"mean \|log ratio\| over tokens is [\d.]+, above 0.05"),
    "identical": (
        lambda: {"engine": TorchEngine(8, temperature=0)},
        0,
        "the 3 completions of every prompt are the same.*",
    ),
    "truncated": (lambda: {"engine": Endless(8)}, 0, "all 12 completions were cut at the length limit"),
}


def only(guard, action, **options):
    return Guards(**{name: action if name == guard else "off" for name in NAMES}, kl_limit=1.0, **options)


@pytest.fixture
def policy(preferences, lm, classifier):
    def build(**options):
        return make(preferences, lm, classifier, **options)

    return build


@pytest.mark.parametrize("guard", NAMES)
def test_a_guard_stops_the_run_and_its_step_is_replayed(guard, policy, preferences, tmp_path, capsys):
    options, step, said = MISBEHAVIOUR[guard]
    module, saver = policy(**options()), SaveEachStep(tmp_path)
    run = trainer(tmp_path, max_steps=5, callbacks=[only(guard, "stop"), saver], enable_checkpointing=True)
    with pytest.raises(GuardError, match=rf"guard `{guard}`: .*{said} \(step {step}\)"):
        run.fit(module, data(preferences))
    assert run.global_step == step
    for name, value in weights(module).items():
        assert torch.equal(value, saver.before[name])  # no step was taken ...
    good = [f"step={n}.ckpt" for n in range(1, step + 1)] + (["last.ckpt"] if step else [])
    assert sorted(path.name for path in tmp_path.glob("*.ckpt")) == sorted(good)  # ... and nothing written over
    path = tmp_path / "guards" / f"{guard}-step{step}.ckpt"
    assert [*(tmp_path / "guards").iterdir()] == [path]

    kept = torch.load(path, weights_only=True)["guard"]
    assert kept["guard"] == guard and kept["loss"] == pytest.approx(module.trace[-1]["loss"], nan_ok=True)
    capsys.readouterr()
    again = trainer(tmp_path / "again", max_steps=5, callbacks=[only(guard, "stop")])
    found = again.replay(policy(**options()), data(preferences), ckpt_path=path)
    assert found.loss == pytest.approx(kept["loss"], rel=0, abs=0, nan_ok=True)
    assert torch.equal(found.logprobs, kept["logprobs"])
    assert [row["answer"] for row in found.rows] == module.rollout.completion_texts and len(
        found.rows
    ) == BATCH * SAMPLES
    assert [row["advantage"] for row in found.rows] == pytest.approx(
        [None if math.isnan(a) else a for a in module.rollout.advantages.tolist()], abs=1e-6
    )
    out = capsys.readouterr().out
    assert f"guard `{guard}`" in out and f"noted when it tripped: {kept['loss']:.6g}" in out
    assert not (tmp_path / "again").exists()


@pytest.mark.parametrize("guard", NAMES)
def test_a_guard_that_warns_does_so_once_and_counts(guard, policy, preferences, tmp_path):
    options, step, said = MISBEHAVIOUR[guard]
    steps = step + 3
    run = trainer(tmp_path, max_steps=steps, callbacks=[only(guard, "warn")])
    with pytest.warns(UserWarning, match=said) as caught:
        run.fit(policy(**options()), data(preferences))
    assert run.global_step == steps  # it went on
    assert sum(f"guard `{guard}`" in str(one.message) for one in caught) == 1
    assert len(list((tmp_path / "guards").iterdir())) == 1
    assert run.callback_metrics[f"guards/{guard}"] >= 2


@pytest.mark.parametrize("guard", NAMES)
def test_a_guard_that_is_off_sees_nothing(guard, policy, preferences, tmp_path):
    options, step, _ = MISBEHAVIOUR[guard]
    run = trainer(tmp_path, max_steps=step + 1, callbacks=[Guards(**dict.fromkeys(NAMES, "off"))])
    run.fit(policy(**options()), data(preferences))
    assert run.global_step == step + 1 and not (tmp_path / "guards").exists()


KINDS = {
    "inner epochs": lambda: {"num_iterations": 2, "minibatches": 2, "rate": 1e-3},
    "grpo": lambda: {"policy_optimizer": GRPO(kl_coef=0.05), "rate": 1e-3},
    "no reference": lambda: {"policy_optimizer": RLOO(kl_coef=0.0), "rate": 1e-3},
}


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_a_good_run_is_left_alone(kind, policy, preferences, tmp_path):
    """Also where later steps on a rollout are off policy, as they should be."""
    strict = Guards(**dict.fromkeys(NAMES, "stop"), kl_limit=5.0, ratio_tolerance=1e-4)
    plain, guarded = policy(**KINDS[kind]()), policy(**KINDS[kind]())
    trainer(tmp_path, max_steps=6).fit(plain, data(preferences))
    trainer(tmp_path, max_steps=6, callbacks=[strict]).fit(guarded, data(preferences))
    assert strict.trips == {} and not (tmp_path / "guards").exists()
    assert [step["loss"] for step in guarded.trace] == [step["loss"] for step in plain.trace]


def test_a_run_resumed_within_a_rollout_is_not_called_off_policy(policy, preferences, tmp_path):
    options = {"num_iterations": 3, "rate": 0.1}
    saver = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=2)
    trainer(tmp_path, max_steps=2, callbacks=[saver], enable_checkpointing=True).fit(
        policy(**options), data(preferences)
    )
    module = policy(**options)
    guards = only("log_ratio", "stop")
    run = trainer(tmp_path, max_steps=4, callbacks=[guards])
    run.fit(module, data(preferences), ckpt_path=tmp_path / "step=2.ckpt", weights_only=True)
    assert not module.trace[0]["new"] and run.global_step == 4 and guards.trips == {}


def test_a_rate_far_too_high_is_stopped(policy, preferences, tmp_path):
    # a reference with random weights bounds the divergence of 8 tokens far below the default limit
    run = trainer(tmp_path, max_steps=9, callbacks=[Guards(truncated="off", kl_limit=2.0)])
    with pytest.raises(GuardError, match=r"guard `(kl|nonfinite)`"):
        run.fit(policy(rate=1e6), data(preferences))
    assert 0 < run.global_step < 9


def test_a_classifier_that_gives_no_numbers_is_noticed(policy, preferences, tmp_path):
    module = policy()
    next(iter(module.scorer.classifier.head.parameters())).data.fill_(math.nan)
    run = trainer(tmp_path, max_steps=2, callbacks=[Guards(truncated="off")])
    with pytest.raises(GuardError, match="guard `nonfinite`: a level probability of the classifier is not finite"):
        run.fit(module, data(preferences))
    assert run.global_step == 0


def test_what_a_guard_stops_is_not_saved_as_the_last_checkpoint(policy, preferences, tmp_path):
    save = StepCheckpoint(tmp_path, every_n_train_steps=100, save_last=True, save_on_exception=True)
    options, *_ = MISBEHAVIOUR["nonfinite"]
    run = trainer(tmp_path, max_steps=5, callbacks=[only("nonfinite", "stop"), save], enable_checkpointing=True)
    with pytest.raises(GuardError):
        run.fit(policy(**options()), data(preferences))
    assert not [*tmp_path.glob("*.ckpt")]


def test_broken_weights_are_not_saved(policy, preferences, tmp_path):
    module, saver = policy(), SaveEachStep(tmp_path)

    class Break(Guards):
        def on_before_zero_grad(self, trainer, pl_module, optimizer):
            if trainer.global_step == 1:
                next(p for p in pl_module.policy.parameters() if p.requires_grad).data[0] = math.inf

    run = trainer(tmp_path, max_steps=3, callbacks=[Break(), saver], enable_checkpointing=True)
    with pytest.raises(GuardError, match=r"no checkpoint was written: weight policy.* is not finite"):
        run.fit(module, data(preferences))
    assert sorted(path.name for path in tmp_path.glob("*.ckpt")) == ["last.ckpt", "step=1.ckpt"]
    assert torch.load(tmp_path / "last.ckpt", weights_only=True)["global_step"] == 1


@pytest.mark.parametrize("options", [{"fast_dev_run": 1}, {"keep": False}])
def test_nothing_is_kept_where_nothing_shall_be_written(options, policy, preferences, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    guards = only("truncated", "stop", keep=options.pop("keep", True))
    with pytest.raises(GuardError, match="The step was not saved"):
        trainer(tmp_path, callbacks=[guards], **options).fit(policy(engine=Endless(8)), data(preferences))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_a_resumed_run_goes_on_counting(policy, preferences, tmp_path):
    def run(steps, **resume):
        guards, saver = only("truncated", "warn"), SaveEachStep(tmp_path)
        loop = trainer(tmp_path, max_steps=steps, callbacks=[guards, saver], enable_checkpointing=True)
        loop.fit(policy(engine=Endless(8)), data(preferences), **resume)
        return guards.trips["truncated"]

    with pytest.warns(UserWarning, match="guard `truncated`"):
        assert run(2) == 2
    kept = torch.load(tmp_path / "step=2.ckpt", weights_only=True)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "guard `truncated`")
        assert run(3, ckpt_path=tmp_path / "step=2.ckpt") == 3
    assert [path.name for path in (tmp_path / "guards").iterdir()] == ["truncated-step0.ckpt"]
    kept["callbacks"] = {key: state for key, state in kept["callbacks"].items() if "Guards" not in key}
    torch.save(kept, tmp_path / "earlier.ckpt")  # as guards without a state have written it
    with pytest.warns(UserWarning, match="guard `truncated`"):
        assert run(3, ckpt_path=tmp_path / "earlier.ckpt") == 1


@pytest.mark.slow
@pytest.mark.parametrize("process", [0, 1])
def test_processes_stop_together(process, policy, preferences, tmp_path):
    """Only one process meets the bad reward; what is replayed is its step."""
    module = policy(mapping=Broken(row=process * BATCH * SAMPLES + 1))
    run = trainer(tmp_path, max_steps=5, callbacks=[only("nonfinite", "stop")], strategy="ddp_fork", devices=2)
    with pytest.raises(Exception, match=r"guard `nonfinite`: .*\(step 2\)"):
        run.fit(module, data(preferences))
    checkpoint = torch.load(tmp_path / "guards" / "nonfinite-step2.ckpt", weights_only=True)
    saved = checkpoint["policy_run"]["rollouts"]
    assert len(saved) == 2 and checkpoint["guard"]["process"] == process
    found = trainer(tmp_path, max_steps=5).replay(
        policy(mapping=Broken()), data(preferences), ckpt_path=tmp_path / "guards" / "nonfinite-step2.ckpt"
    )
    rewards = [row["reward"] for row in found.rows]
    assert len(rewards) == BATCH * SAMPLES and rewards[1] is None and rewards.count(None) == 1
    assert (
        [row["answer"] for row in found.rows]
        == saved[process]["completion_texts"]
        != saved[1 - process]["completion_texts"]
    )
    torch.testing.assert_close(found.logprobs, checkpoint["guard"]["logprobs"], atol=1e-6, rtol=0)


def test_any_checkpoint_replays_as_its_next_step(policy, preferences, tmp_path, capsys):
    module, saver = policy(), SaveEachStep(tmp_path)
    run = trainer(tmp_path, max_steps=3, callbacks=[saver], enable_checkpointing=True)
    run.fit(module, data(preferences))
    found = trainer(tmp_path, max_steps=3).replay(policy(), data(preferences), ckpt_path=tmp_path / "step=2.ckpt")
    assert found.record is None and found.loss == pytest.approx(module.trace[2]["loss"], rel=0, abs=0)
    assert "noted" not in capsys.readouterr().out
    with pytest.raises(ValueError, match=r"no step after it, as trainer.max_steps or max_epochs is reached"):
        trainer(tmp_path, max_steps=3).replay(policy(), data(preferences), ckpt_path=tmp_path / "step=3.ckpt")


def test_replay_says_what_it_needs(policy, preferences, tmp_path):
    with pytest.raises(ValueError, match="replay needs a file that a guard kept"):
        trainer(tmp_path).replay(policy(), data(preferences))
    with pytest.raises(ValueError, match="replay runs in one process"):
        trainer(tmp_path, devices=2).replay(policy(), data(preferences), ckpt_path="some.ckpt")
    with pytest.raises(UsageError, match="a step of a PolicyTrainer, not of a BoringModel"):
        trainer(tmp_path).replay(BoringModel(), ckpt_path="some.ckpt")


def test_wrong_options_and_modules(tmp_path):
    with pytest.raises(ValueError, match=r"guards.kl is 'halt': give 'stop', 'warn' or 'off'"):
        Guards(kl="halt")
    with pytest.raises(ValueError, match=r"kl_limit is 0.0.*values above 0"):
        Guards(kl_limit=0.0)
    with pytest.raises(UsageError, match="Guards check a PolicyTrainer, not a BoringModel"):
        trainer(tmp_path, max_steps=1, callbacks=[Guards()]).fit(BoringModel())


def test_faults_by_hand():
    assert nonfinite("x", torch.tensor([1.0, math.inf, math.nan])) == "x is not finite in 2 of 3 places"
    assert nonfinite("x", torch.zeros(2, 2)) is None
    old, mask = torch.tensor([[-1.0, -2.0], [-3.0, 0.0]]), torch.tensor([[True, True], [True, False]])
    assert faults.kl_fault(old, old - 2, mask, 3.0) is None  # 2 nats a token: 4 and 2
    assert faults.kl_fault(old, old - 2, mask, 2.9).startswith("the KL divergence to the reference is 3 nats")
    assert faults.kl_fault(old, None, mask, 1e-9) is None
    assert faults.kl_fault(old, old * math.nan, mask, 1e9) is not None
    now = old + torch.tensor([[0.03, -0.03], [0.0, 99.0]])
    assert faults.log_ratio_fault("engine", now, old, mask, 0.021) is None
    assert faults.log_ratio_fault("engine", now, old, mask & False, 1e-9) is None
    assert "over tokens is 0.02, above 0.019" in faults.log_ratio_fault("engine", now, old, mask, 0.019)
    now = old + torch.tensor([[0.03, 0.03], [0.01, 99.0]])  # answers: 0.06 and 0.01
    assert faults.log_ratio_fault("engine", now, old, mask, 0.036, completions=True) is None
    assert "engine disagree" in faults.log_ratio_fault("engine", now, old, mask, 0.034, completions=True)
    assert faults.identical_fault(["a", "a", "b", "b"], 2) and not faults.identical_fault(["a", "a", "b", "c"], 2)
    assert not faults.identical_fault(["a", "a"], 1)
    assert faults.truncated_fault(torch.tensor([False, False])) and not faults.truncated_fault(
        torch.tensor([False, True])
    )
    assert nonfinite_weights([("w", torch.tensor([math.nan]))]) == "weight w is not finite"
