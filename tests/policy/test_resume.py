"""A run that was cut and resumed equals the uninterrupted one, bit by bit."""

import signal

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.utils.data import DataLoader

from moslim.algorithms.functional import AdaptiveKL
from moslim.algorithms.grpo import GRPO
from moslim.algorithms.online_dpo import OnlineDPO
from moslim.algorithms.ppo import PPO
from moslim.algorithms.reinforce_plus_plus import ReinforcePlusPlus
from moslim.algorithms.rloo import RLOO
from moslim.data.prompt_batches import CollatePrompts, Prompt
from moslim.data.sources.workbench import Workbench
from moslim.mapping import TargetProbability
from moslim.policy.hindsight import Hindsight
from moslim.policy.rehearsal import Rehearsal
from moslim.preferences import Preference
from tests.helpers.policy_runs import LORA, SAMPLES, data, make, trainer, weights

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore::lightning.pytorch.utilities.warnings.PossibleUserWarning"),
    pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`"),
]


class SaveWhenStopped(Callback):
    """Saves where an exception stops the run, as on Ctrl-C."""

    def __init__(self, path):
        self.path = path

    def on_exception(self, trainer, pl_module, exception):
        trainer.save_checkpoint(self.path)


class SaveEachStep(Callback):
    def __init__(self, folder):
        self.folder = folder

    def on_train_batch_end(self, trainer, *_):
        trainer.save_checkpoint(self.folder / f"{trainer.global_step}.ckpt")


@pytest.fixture
def world(preferences, lm, classifier):
    """Builds the same policy again and again; its mapping has statistics, its optimizer momentum."""

    def build(**options):
        defaults = {"mapping": TargetProbability(scope="running", min_count=6), "default_kl_coef": 0.1}
        return make(preferences, lm, classifier, **{**defaults, **options})

    return build


def assert_same_from(step, resumed, whole):
    assert len(resumed.trace) == len(whole.trace) - step
    for mine, theirs in zip(resumed.trace, whole.trace[step:], strict=True):
        assert mine["key"] == theirs["key"] and mine["loss"] == theirs["loss"]
        assert torch.equal(mine["tokens"], theirs["tokens"])
        assert torch.equal(mine["advantages"], theirs["advantages"])
    for name, value in weights(whole).items():
        assert torch.equal(weights(resumed)[name], value), name
    assert resumed.mapping.state_dict() == whole.mapping.state_dict()


KINDS = {
    "one step each": {},
    "hindsight and rehearsal": {
        "num_iterations": 2,
        "hindsight": Hindsight(decay_steps=6, min_probability=0.0),
        "rehearsal": Rehearsal(Workbench(corpus_rows=20), batch_size=3),
    },
    "inner epochs": {"num_iterations": 2},
    "minibatches": {"num_iterations": 2, "minibatches": 2, "policy_optimizer": GRPO(kl_coef=0.1)},
    "lora": {
        "lora": LORA,
        "num_iterations": 3,
        "policy_optimizer": RLOO(kl_coef=0.1, importance_sampling_level="token"),
    },
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_resumed_from_any_of_its_steps(kind, world, preferences, tmp_path):
    steps, options = 7, {"max_steps": 7, "limit_train_batches": 5}  # the sixth step is in a second epoch
    if kind == "lora":
        options["gradient_clip_val"] = 0.5
    whole = world(**KINDS[kind])
    trainer(tmp_path, **options, callbacks=[SaveEachStep(tmp_path)]).fit(whole, data(preferences))
    assert len(whole.trace) == steps and whole.trace[-1]["key"][0] == 1
    for step in (3, 5) if kind == "one step each" else (1, 3, 6):
        resumed = world(**KINDS[kind])
        path = tmp_path / f"{step}.ckpt"
        trainer(tmp_path, **options).fit(resumed, data(preferences), ckpt_path=path, weights_only=True)
        assert resumed.trace[0]["new"] == whole.trace[step]["new"]  # a rollout in use is taken up, not made again
        assert_same_from(step, resumed, whole)


def adaptive():
    return {"kl_coef": 0.1, "kl_controller": AdaptiveKL(target=0.05)}


OPTIMIZERS = {
    "rloo": lambda: {"policy_optimizer": RLOO(entropy_coef=0.01, **adaptive())},
    "reinforce++": lambda: {"policy_optimizer": ReinforcePlusPlus(**adaptive())},
    "grpo": lambda: {"policy_optimizer": GRPO(min_spread=0.5, **adaptive())},
    "ppo": lambda: {"policy_optimizer": PPO(**adaptive())},
    "ppo with an adapter": lambda: {"policy_optimizer": PPO(critic_lora=LORA, **adaptive()), "lora": LORA},
    "online dpo": lambda: {"policy_optimizer": OnlineDPO()},
}


def same(one, other):
    """Equality of what checkpoints are made of, bit by bit."""
    if isinstance(one, torch.Tensor):
        return torch.equal(one.nan_to_num(-9), other.nan_to_num(-9))
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(value, other[key]) for key, value in one.items())
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(map(same, one, other))
    return one == other


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_every_optimizer_resumed_in_the_middle_of_a_rollout(kind, world, preferences, tmp_path):
    """Weights, momentum, KL coefficient, critic, values and returns: all that the last checkpoint holds."""
    options = {"num_iterations": 2, "minibatches": 2}
    final = []
    for name, start in (("whole", None), ("resumed", tmp_path / "whole" / "6.ckpt")):
        module = world(**options, **OPTIMIZERS[kind]())
        saving = trainer(tmp_path, max_steps=9, callbacks=[SaveEachStep(tmp_path / name)])
        saving.fit(module, data(preferences), ckpt_path=start, weights_only=True)
        assert len(module.trace) == (9 if start is None else 3)
        final.append(torch.load(tmp_path / name / "9.ckpt", weights_only=True))
    whole, resumed = final
    for part in ("state_dict", "optimizer_states", "callbacks", "policy_run"):
        assert same(whole[part], resumed[part]), part
    (rollout,) = whole["policy_run"]["rollouts"]
    assert rollout["key"] == (0, 2)
    has_critic = any("critic" in key for key in whole["state_dict"])
    assert has_critic == (rollout["values"] is not None) == kind.startswith("ppo")
    if kind != "online dpo":
        assert whole["callbacks"]["kl_controller.0:AdaptiveKL"]["factor"] != 1


LAST = {"save_last": True, "every_n_train_steps": 99}


@pytest.mark.parametrize(("cut", "options", "workers"), [(3, {}, 0), (3, LAST, 0), (3, None, 1), (7, {}, 0)])
def test_a_longer_run_goes_on_where_a_shorter_one_ended(cut, options, workers, world, preferences, tmp_path):
    """In the middle of an epoch, which Lightning counts as done: saved at its end, at the run's end, or after it."""
    limits = {"limit_train_batches": 6}
    whole = world(num_iterations=2)
    trainer(tmp_path, max_steps=cut + 4, **limits).fit(whole, data(preferences))
    first = world(num_iterations=2)
    callbacks = [] if options is None else [ModelCheckpoint(tmp_path, **options)]
    run = trainer(tmp_path, max_steps=cut, **limits, callbacks=callbacks, enable_checkpointing=bool(callbacks))
    run.fit(first, data(preferences))
    if not callbacks:
        run.save_checkpoint(tmp_path / "after.ckpt")
    (path,) = tmp_path.glob("*.ckpt")
    resumed = world(num_iterations=2)
    rest = data(preferences, workers=workers)  # a worker draws ahead, before Lightning tells it the epoch
    trainer(tmp_path, max_steps=cut + 4, **limits).fit(resumed, rest, ckpt_path=path, weights_only=True)
    assert [step["new"] for step in resumed.trace] == [False, True, False, True]
    assert_same_from(cut, resumed, whole)


@pytest.mark.parametrize("stop", [KeyboardInterrupt(), RuntimeError("out of memory")], ids=["ctrl-c", "error"])
@pytest.mark.parametrize("at", [3, 4], ids=["middle of a rollout", "start of a rollout"])
def test_a_run_stopped_in_a_step(at, stop, world, preferences, tmp_path):
    options = {"num_iterations": 2}
    whole = world(**options)
    trainer(tmp_path, max_steps=6).fit(whole, data(preferences))
    first = world(**options)
    first.stop_at, first.stop = (0, at), stop
    ctrl_c = signal.getsignal(signal.SIGINT)
    try:
        with pytest.raises((SystemExit, RuntimeError)):
            save = SaveWhenStopped(tmp_path / "stopped.ckpt")
            trainer(tmp_path, max_steps=6, callbacks=[save]).fit(first, data(preferences))
    finally:
        signal.signal(signal.SIGINT, ctrl_c)  # Lightning leaves it ignored
    assert len(first.trace) == at
    resumed = world(**options)
    trainer(tmp_path, max_steps=6).fit(
        resumed, data(preferences), ckpt_path=tmp_path / "stopped.ckpt", weights_only=True
    )
    assert resumed.trace[0]["new"] == (at % 2 == 0)
    assert_same_from(at, resumed, whole)


def test_validation_in_between_changes_nothing(world, preferences, tmp_path):
    plain, validated = world(num_iterations=2), world(num_iterations=2)
    trainer(tmp_path, max_steps=4).fit(plain, data(preferences))
    options = {"limit_val_batches": 1, "val_check_interval": 1}
    trainer(tmp_path, max_steps=4, **options).fit(validated, data(preferences))
    assert_same_from(0, validated, plain)


def test_the_rollout_in_use_comes_back(world, preferences, tmp_path):
    first = world(num_iterations=2)
    run = trainer(tmp_path, max_steps=1)
    run.fit(first, data(preferences))
    run.save_checkpoint(tmp_path / "half.ckpt")
    (kept,) = torch.load(tmp_path / "half.ckpt", weights_only=True)["policy_run"]["rollouts"]
    resumed = world(num_iterations=2)
    resumed.stop_at, resumed.stop = (0, 1), RuntimeError("stop before the first step")
    with pytest.raises(RuntimeError, match="stop before"):
        trainer(tmp_path, max_steps=2).fit(
            resumed, data(preferences), ckpt_path=tmp_path / "half.ckpt", weights_only=True
        )
    found = resumed.rollout.state()
    assert found.keys() == kept.keys() == first.rollout.state().keys()
    for name, value in first.rollout.state().items():
        same = torch.equal if isinstance(value, torch.Tensor) and not value.isnan().any() else None
        if same:
            assert same(found[name], value) and same(kept[name], value), name
        elif isinstance(value, torch.Tensor):
            assert torch.equal(found[name].nan_to_num(-9), value.nan_to_num(-9)), name
        else:
            assert found[name] == value == kept[name], name


def test_checkpoints_hold_trained_weights_and_plain_data(world, preferences, tmp_path):
    module = world(lora=LORA)
    run = trainer(tmp_path, max_steps=1)
    run.fit(module, data(preferences))
    run.save_checkpoint(tmp_path / "lora.ckpt")
    checkpoint = torch.load(tmp_path / "lora.ckpt", weights_only=True)
    assert checkpoint["state_dict"].keys() == {f"policy.{name}" for name in weights(module)}
    assert all("lora_" in name for name in checkpoint["state_dict"])
    assert checkpoint["hyper_parameters"]["num_generations"] == 3
    assert "mapping" not in checkpoint["hyper_parameters"]  # an object: it would stop weights-only loading


def test_an_answer_does_not_depend_on_its_place_among_the_prompts(world, preferences, tmp_path):
    """The same prompts in another order or company, as other batches or processes would have them."""
    collate = CollatePrompts(data(preferences).renderer(world().tokenizer))
    asked = [Preference({"warmth": 4}), Preference(), Preference({"warmth": 0, "verbosity": 1}), Preference()]
    questions = ["How do I clean a kettle?", "Why?", "Tell me how to bake bread.", "How do I clean a kettle?"]
    prompts = [Prompt(question, asked[i], 10 + i) for i, question in enumerate(questions)]
    found = {}
    for order in ([0, 1, 2, 3], [3, 1, 0, 2], [2], [1, 3]):
        module = world()
        batch = collate([prompts[i] for i in order])
        trainer(tmp_path, max_steps=1).fit(module, DataLoader([batch], batch_size=None))
        for i, row in enumerate(order):
            answers = module.rollout.completion_texts[SAMPLES * i : SAMPLES * (i + 1)]
            assert found.setdefault(row, answers) == answers
    assert len({tuple(answers) for answers in found.values()}) == 4
