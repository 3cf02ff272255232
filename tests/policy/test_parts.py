"""Mapping function and policy optimizer as callbacks of a run: hooks, statistics, checkpoints."""

import pytest
import torch
from lightning.pytorch import Callback

from moslim.algorithms.functional import AdaptiveKL
from moslim.algorithms.grpo import GRPO
from moslim.algorithms.ppo import PPO
from moslim.algorithms.rloo import RLOO
from moslim.evaluation.judges import GoldJudge
from moslim.mapping import ExpectedDistance, MappingFunction, TargetProbability
from tests.helpers.policy_runs import data, make, trainer

pytestmark = [
    pytest.mark.filterwarnings("ignore::lightning.pytorch.utilities.warnings.PossibleUserWarning"),
    pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`"),
]


class Annealed(TargetProbability):
    """A researcher's mapping: its reward halves after every epoch."""

    def __init__(self) -> None:
        super().__init__(scope="batch")
        self.weight = 1.0
        self.stages: list[str] = []

    def per_dimension(self, probs, targets, groups):
        return self.weight * super().per_dimension(probs, targets, groups)

    def on_train_epoch_end(self, trainer, pl_module):
        self.weight /= 2

    def on_train_start(self, trainer, pl_module):
        self.stages.append(f"fit {self.weight}")

    def on_validation_start(self, trainer, pl_module):
        self.stages.append(f"validate {self.weight}")

    def on_test_start(self, trainer, pl_module):
        self.stages.append(f"test {self.weight}")

    def state_dict(self):
        return {"weight": self.weight}

    def load_state_dict(self, state_dict):
        self.weight = state_dict["weight"]


class Counting(RLOO):
    """A policy optimizer with a controller: it knows how many rollouts it scored."""

    rollouts = 0

    def advantages(self, rewards):
        self.rollouts += 1
        return super().advantages(rewards)

    def state_dict(self):
        return {"rollouts": self.rollouts}

    def load_state_dict(self, state_dict):
        self.rollouts = state_dict["rollouts"]


class Mixture(MappingFunction):
    """The mean of several mappings."""

    def __init__(self, parts: list[MappingFunction]) -> None:
        self.parts = parts

    @property
    def children(self):
        return self.parts

    def bind(self, preferences):
        super().bind(preferences)
        for part in self.parts:
            part.bind(preferences)

    def observe(self, probs, targets):
        for part in self.parts:
            part.observe(probs, targets)

    def per_dimension(self, probs, targets, groups):
        return torch.stack([part.per_dimension(probs, targets, groups) for part in self.parts]).mean(dim=0)


def running(**options):
    return TargetProbability(scope="running", min_count=1, **options)


def mixture():
    return Mixture([running(decay=0.01), Mixture([running(decay=0.999)])])


def seen(mapping):
    """Number of active dimensions of all answers that a mapping has observed."""
    return sum(values[0] for values in mapping.state_dict()["running"].values())


@pytest.fixture
def world(preferences, lm, classifier):
    """Builds a policy with the parts given."""
    return lambda **options: make(preferences, lm, classifier, **options)


def saved(folder, module, preferences, steps=2, **options):
    """Trains and saves; returns the checkpoint's path and what it holds."""
    run = trainer(folder, max_steps=steps, **options)
    run.fit(module, data(preferences))
    run.save_checkpoint(folder / "run.ckpt")
    return folder / "run.ckpt", torch.load(folder / "run.ckpt", weights_only=True)


def test_parts_are_callbacks_of_the_run_before_the_checkpoints(world, preferences, tmp_path):
    module = world(mapping=Annealed(), policy_optimizer=Counting())
    run = trainer(tmp_path, max_steps=1, enable_checkpointing=True)
    run.fit(module, data(preferences))
    assert run.callbacks.index(module.mapping) < run.callbacks.index(run.checkpoint_callback)
    _, checkpoint = saved(tmp_path, world(mapping=Annealed(), policy_optimizer=Counting()), preferences)
    assert checkpoint["callbacks"] == {
        "mapping:tests.policy.test_parts.Annealed": {"weight": 0.5},  # a run's last step ends its epoch
        "policy_optimizer:tests.policy.test_parts.Counting": {"rollouts": 2},
    }


@pytest.mark.slow
def test_statistics_change_in_training_rollouts_alone(world, preferences, tmp_path):
    mapping = running()
    module = world(mapping=mapping, num_iterations=2)
    counts = []

    class Watch(Callback):
        def on_sanity_check_end(self, trainer, pl_module):
            counts.append(("sanity", seen(mapping)))

        def on_validation_end(self, trainer, pl_module):
            counts.append(("validation", seen(mapping)))

        def on_train_batch_end(self, trainer, pl_module, *_):
            counts.append(("train", seen(mapping)))

    options = {"limit_val_batches": 1, "num_sanity_val_steps": 1, "val_check_interval": 1}
    trainer(tmp_path, max_steps=4, callbacks=[Watch()], **options).fit(module, data(preferences))
    first = module.trace[0]["active"]
    second = first + module.trace[2]["active"]  # each rollout is used for two steps and counted once
    assert 0 < first < second
    assert counts == [("validation", 0), ("sanity", 0)] + [
        (kind, count) for count in (first, first, second, second) for kind in ("train", "validation")
    ]
    state = mapping.state_dict()
    trainer(tmp_path, limit_val_batches=1).validate(module, data(preferences), verbose=False)
    trainer(tmp_path).test(module, data(preferences), verbose=False)
    trainer(tmp_path, limit_predict_batches=1).predict(module, data(preferences))
    assert mapping.state_dict() == state


@pytest.mark.slow
def test_hooks_of_a_users_mapping_run_and_its_state_comes_back_in_every_stage(world, preferences, tmp_path):
    module = world(mapping=Annealed())
    path, checkpoint = saved(tmp_path, module, preferences, steps=-1, max_epochs=1, limit_train_batches=2)
    assert module.mapping.weight == 0.5 and module.mapping.stages == ["fit 1.0"]
    assert checkpoint["callbacks"][module.mapping.state_key] == {"weight": 0.5}

    resumed = {"ckpt_path": path, "weights_only": True}
    module = world(mapping=Annealed())
    options = {"limit_train_batches": 2, "limit_val_batches": 1}
    trainer(tmp_path, max_epochs=3, num_sanity_val_steps=0, **options).fit(module, data(preferences), **resumed)
    assert module.mapping.weight == 0.125
    assert module.mapping.stages == ["fit 0.5", "validate 0.5", "validate 0.25"]

    module = world(mapping=Annealed())
    trainer(tmp_path, limit_val_batches=1).validate(module, data(preferences), verbose=False, **resumed)
    trainer(tmp_path, limit_test_batches=1).test(module, data(preferences), verbose=False, **resumed)
    assert module.mapping.stages == ["validate 0.5", "test 0.5"]


def test_the_weight_of_a_restored_mapping_reaches_the_rewards(world, preferences, tmp_path):
    rewards = {}
    for weight in (1.0, 0.5):
        module = world(mapping=Annealed())
        module.mapping.weight = weight
        trainer(tmp_path, max_steps=1).fit(module, data(preferences))
        rewards[weight] = module.rollout.rewards
    assert rewards[1.0].abs().max() > 0
    torch.testing.assert_close(rewards[0.5], rewards[1.0] / 2)


@pytest.mark.slow
def test_generate_and_export_restore_the_parts(world, preferences, tmp_path):
    trained = world(mapping=running(), policy_optimizer=Counting())
    path, _ = saved(tmp_path, trained, preferences)
    question = "How do I clean a kettle?"
    expected = trained.answer(question, {"warmth": 0}, samples=3)
    for command in ("generate", "export"):
        module = world(mapping=running(), policy_optimizer=Counting())
        assert seen(module.mapping) == 0
        if command == "generate":
            found = trainer(tmp_path).generate(
                module, data(preferences), question=question, levels={"warmth": 0}, samples=3, ckpt_path=str(path)
            )
            assert found == expected
        else:
            trainer(tmp_path).export(module, data(preferences), out=str(tmp_path / "model"), ckpt_path=str(path))
            assert (tmp_path / "model" / "model.safetensors").exists()
        assert module.mapping.state_dict() == trained.mapping.state_dict() and seen(module.mapping) > 0
        assert module.policy_optimizer.rollouts == 2
        assert all(torch.equal(p, q) for p, q in zip(module.parameters(), trained.parameters(), strict=True))


class Failing(GoldJudge):
    """Fails, or is interrupted, after the rollout has been scored: at its second call."""

    calls = 0

    def levels(self, questions, answers):
        self.calls += 1
        if self.calls == 2:
            raise RuntimeError("the judge is tired")
        return super().levels(questions, answers)


def test_a_rollout_that_fails_leaves_no_trace_in_statistics(world, preferences, tmp_path):
    """Else it would be counted twice when the run goes on."""
    module = world(mapping=mixture(), policy_optimizer=RLOO(kl_controller=AdaptiveKL(target=0.01)), judge=Failing())
    states = []

    class Keep(Callback):
        def on_train_batch_end(self, trainer, pl_module, *_):
            states.append([part.state_dict() for part in pl_module.configure_callbacks()])

    with pytest.raises(RuntimeError, match="tired"):
        trainer(tmp_path, max_steps=3, callbacks=[Keep()]).fit(module, data(preferences))
    assert [part.state_dict() for part in module.configure_callbacks()] == states[0] and len(states) == 1
    factor = module.policy_optimizer.kl_controller.factor
    assert {"factor": factor} in states[0] and factor != 1.0


@pytest.mark.slow
def test_a_critic_that_came_or_went(world, preferences, tmp_path):
    """With ``reset_state``, a test goes on without it or with a fresh one; a fit has no momentum for it."""
    path, checkpoint = saved(tmp_path, world(policy_optimizer=PPO()), preferences)
    assert checkpoint["state_dict"]["critic.linear.weight"].abs().max() > 0
    for one, steps in ((RLOO, "fit"), (RLOO, "test"), (PPO, "test")):
        module = world(policy_optimizer=one(), reset_state=True)
        run = trainer(tmp_path, max_steps=3, limit_test_batches=1)
        if steps == "fit":
            with pytest.raises(ValueError, match=r"another critic.*export"):
                run.fit(module, data(preferences), ckpt_path=path, weights_only=True)
            continue
        run.test(module, data(preferences), ckpt_path=path, weights_only=True, verbose=False)
        own = module.state_dict()
        assert all(torch.equal(value, own[name]) for name, value in checkpoint["state_dict"].items() if name in own)
    without, _ = saved(tmp_path, world(policy_optimizer=RLOO()), preferences)
    module = world(policy_optimizer=PPO(), reset_state=True)
    trainer(tmp_path, limit_test_batches=1).test(module, data(preferences), ckpt_path=without, verbose=False)
    assert (module.critic.linear.weight == 0).all()


OTHERS = {"mapping": ExpectedDistance, "policy_optimizer": GRPO}
KEYS = {
    "mapping": ("mapping:TargetProbability", "mapping:ExpectedDistance"),
    "policy_optimizer": (f"policy_optimizer:{__name__}.Counting", "policy_optimizer:GRPO"),
}


@pytest.mark.slow
@pytest.mark.parametrize("role", OTHERS)
def test_a_checkpoint_of_another_class_is_refused_unless_its_state_is_given_up(role, world, preferences, tmp_path):
    parts = {"mapping": running(), "policy_optimizer": Counting()}
    path, _ = saved(tmp_path, world(**parts), preferences)
    seen_then = seen(parts["mapping"])
    fresh = {"mapping": running(), "policy_optimizer": Counting(), role: OTHERS[role]()}
    for stage in ("fit", "validate", "test"):
        with pytest.raises(ValueError) as error:
            run = trainer(tmp_path, max_steps=3)
            getattr(run, stage)(world(**fresh), datamodule=data(preferences), ckpt_path=path, weights_only=True)
        assert all(part in str(error.value) for part in (*KEYS[role], "model.reset_state"))
    module = world(**fresh, reset_state=True)
    trainer(tmp_path, max_steps=3).fit(module, data(preferences), ckpt_path=path, weights_only=True)
    assert len(module.trace) == 1
    if role == "mapping":  # the part that stayed kept its state
        assert module.policy_optimizer.rollouts == 2 + 1
    else:
        assert seen(module.mapping) > seen_then > 0


def test_parts_inside_of_parts_keep_their_own_state(world, preferences, tmp_path):
    module = world(mapping=mixture())
    path, checkpoint = saved(tmp_path, module, preferences, steps=4)
    name = "TargetProbability"
    found = checkpoint["callbacks"]
    assert found.keys() == {f"mapping.0:{name}", f"mapping.1.0:{name}"}  # the mixtures themselves have none
    assert found[f"mapping.0:{name}"] != found[f"mapping.1.0:{name}"]

    again = world(mapping=mixture())
    options = {"ckpt_path": path, "weights_only": True, "verbose": False}
    trainer(tmp_path, limit_val_batches=1).validate(again, data(preferences), **options)
    first, second = again.mapping.parts[0], again.mapping.parts[1].parts[0]
    assert first.state_dict() == module.mapping.parts[0].state_dict() == found[f"mapping.0:{name}"]
    assert second.state_dict() == module.mapping.parts[1].parts[0].state_dict() != first.state_dict()

    other = world(mapping=Mixture([running(), running()]))
    with pytest.raises(ValueError, match="reset_state"):
        trainer(tmp_path).test(other, data(preferences), ckpt_path=path, weights_only=True)


@pytest.mark.parametrize(
    ("mapping", "twin"),
    [(running, running), (mixture, running), (Annealed, running)],
    ids=["same", "inside", "parent class"],
)
def test_a_twin_among_the_trainers_callbacks_is_refused(mapping, twin, world, preferences, tmp_path):
    run = trainer(tmp_path, max_steps=1, callbacks=[twin()])
    with pytest.raises(ValueError, match=r"trainer\.callbacks lists a TargetProbability.*the model's mapping"):
        run.fit(world(mapping=mapping()), data(preferences))


def test_one_trainer_runs_several_stages(world, preferences, tmp_path):
    module = world(mapping=mixture())
    run = trainer(tmp_path, max_steps=1, limit_val_batches=1)
    run.fit(module, data(preferences))
    run.validate(module, data(preferences), verbose=False)
    assert len([part for part in run.callbacks if isinstance(part, MappingFunction)]) == 4


def test_another_start_or_classifier_is_refused(world, preferences, tokenizer, lm, classifier, tmp_path):
    from tests.helpers.policy_models import build_model, save_classifier

    path, _ = saved(tmp_path, world(), preferences)
    build_model("grouped", tokenizer, seed=5).save_pretrained(tmp_path / "lm")
    tokenizer.save_pretrained(tmp_path / "lm")
    (tmp_path / "classifier").mkdir()
    other = save_classifier(tmp_path / "classifier", tokenizer, seed=8)
    for start, judge, who in ((str(tmp_path / "lm"), classifier, "reference"), (lm, other, "classifier")):
        with pytest.raises(ValueError, match=f"the {who} has other weights"):
            trainer(tmp_path).test(make(preferences, start, judge), data(preferences), ckpt_path=path)


def test_a_checkpoint_of_another_kind_of_module_is_refused(world, preferences, tmp_path):
    path, checkpoint = saved(tmp_path, world(), preferences)
    del checkpoint["policy_run"]
    torch.save(checkpoint, path)
    with pytest.raises(ValueError, match="not written by a PolicyTrainer"):
        trainer(tmp_path).test(world(), data(preferences), ckpt_path=path, weights_only=True)
