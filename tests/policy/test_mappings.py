"""Every mapping in a run and on the command line."""

import pytest
import torch
from jsonargparse import ArgumentParser

from moslim import mapping as mappings
from moslim.mapping import (
    Constrained,
    ExpectedDistance,
    LinearScalarization,
    LogProbability,
    MappingFunction,
    TargetProbability,
    Tchebycheff,
    UserWeights,
    Weighted,
)
from tests.helpers.policy_runs import data, make, trainer

pytestmark = pytest.mark.filterwarnings("ignore::lightning.pytorch.utilities.warnings.PossibleUserWarning")

COMMANDS = {
    TargetProbability: "",
    ExpectedDistance: "--mapping.normalize true",
    LogProbability: "--mapping.floor -3",
    LinearScalarization: "--mapping.weights direction",
    Tchebycheff: "--mapping.weights.warmth 2 --mapping.smoothing 0.2",
    UserWeights: "--mapping.weights.warmth 2",
    Constrained: "--mapping.objective moslim.mapping.UserWeights --mapping.objective.weights.verbosity 1 "
    "--mapping.hold warmth --mapping.at_least 3",
    Weighted: "--mapping.objective moslim.mapping.ExpectedDistance --mapping.weights.warmth 2 "
    "--mapping.weights.verbosity [1,1,2,2,3]",
}


def test_all_are_here():
    found = {getattr(mappings, name) for name in mappings.__all__}
    assert {c for c in found if issubclass(c, MappingFunction)} == {MappingFunction, *COMMANDS}


@pytest.mark.parametrize("kind", COMMANDS)
def test_a_run_from_the_command_line(kind, preferences, lm, classifier, tmp_path):
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--mapping", type=MappingFunction)
    given = parser.parse_args(["--mapping", f"moslim.mapping.{kind.__name__}", *COMMANDS[kind].split()])
    mapping = parser.instantiate(given).mapping
    assert type(mapping) is kind
    module = make(preferences, lm, classifier, mapping=mapping)
    trainer(tmp_path, max_steps=2).fit(module, data(preferences))
    rollout = module.rollout
    assert rollout.rewards.isfinite().all() and rollout.rewards.std() > 0
    counts = ~rollout.per_dimension.isnan()
    if kind not in (UserWeights, Constrained):  # which reward answers to prompts that ask for nothing, too
        assert torch.equal(counts, rollout.targets >= 0) and not rollout.rewards[rollout.uninstructed].any()
    else:
        assert counts.any(dim=1).all()
    assert "train/reward" in module.trainer.callback_metrics


@pytest.mark.slow
def test_a_constraint_s_multiplier_and_its_objective_s_statistics_survive_a_checkpoint(
    preferences, lm, classifier, tmp_path
):
    def world():
        objective = TargetProbability(scope="running", min_count=4)
        mapping = Constrained(objective, hold="warmth", at_least=4, share=1.0, rate=0.5)
        return make(preferences, lm, classifier, mapping=mapping)

    whole, first, resumed = world(), world(), world()
    trainer(tmp_path, max_steps=4).fit(whole, data(preferences))
    run = trainer(tmp_path, max_steps=2)
    run.fit(first, data(preferences))
    run.save_checkpoint(tmp_path / "run.ckpt")
    trainer(tmp_path, max_steps=4).fit(resumed, data(preferences), ckpt_path=tmp_path / "run.ckpt", weights_only=True)
    assert 0 < first.mapping.multiplier < whole.mapping.multiplier == resumed.mapping.multiplier
    assert whole.mapping.objective.state_dict() == resumed.mapping.objective.state_dict()
    assert {key.split("/")[0] for key in whole.mapping.objective.state_dict()["running"]} == {"verbosity"}
    for mine, theirs in zip(resumed.trace, whole.trace[2:], strict=True):
        assert mine["loss"] == theirs["loss"] and torch.equal(mine["advantages"], theirs["advantages"])
    logged = whole.trainer.callback_metrics["train/multiplier/warmth"].item()
    assert logged == pytest.approx(whole.mapping.multiplier)
