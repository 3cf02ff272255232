"""A run whose numbers are not finite stops before its weights change, and its step is kept."""

import math

import pytest
import torch

from moslim.algorithms.functional import AdaptiveKL
from moslim.algorithms.grpo import GRPO
from moslim.algorithms.online_dpo import OnlineDPO
from moslim.algorithms.ppo import PPO
from moslim.algorithms.reinforce_plus_plus import ReinforcePlusPlus
from moslim.algorithms.rloo import RLOO
from moslim.callbacks.guards import GuardError, Guards
from moslim.generation.decoding import Decoding, TokenChoice
from moslim.generation.torch_engine import TorchEngine
from moslim.utils.errors import UsageError
from tests.helpers.policy_runs import data, make, trainer, weights

pytestmark = pytest.mark.filterwarnings("ignore::lightning.pytorch.utilities.warnings.PossibleUserWarning")

LENGTH = 8
ENGINES = {
    "inverse": {},
    "multinomial": {"decoding": Decoding(draw="multinomial")},
    "multinomial, cut": {"top_p": 0.9, "top_k": 30, "decoding": Decoding(draw="multinomial")},
    "greedy": {"temperature": 0.0},
}


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("cut", [{}, {"top_p": 0.5}, {"top_k": 2}])
@pytest.mark.parametrize("method", ["inverse_cdf", "multinomial"])
def test_a_row_without_numbers_says_so_and_leaves_the_others(method, cut, value):
    logits = torch.tensor([[0.0, -math.inf, 9.0], [0.0, value, 1.0], [9.0, 0.0, -math.inf]])
    choice = TokenChoice(method=method, **cut)
    found = choice(logits, torch.tensor([0.3, 0.5, 0.7]), torch.Generator().manual_seed(0))
    assert found.logprobs.isfinite().tolist() == [True, False, True]
    assert found.tokens[[0, 2]].tolist() == [2, 0] and 0 <= found.tokens[1] < 3


def broken(module, what, rows):
    """Puts NaN where it reaches all answers, or some."""
    if what == "policy":
        inner = module.policy
    elif what == "reference":
        inner = module.models._copy
    with torch.no_grad():
        if what == "critic":
            module.critic.linear.bias.fill_(math.nan)
        elif what == "classifier":
            module.scorer.classifier.head.weight.fill_(math.nan)
        elif rows == "some":
            inner.get_input_embeddings().weight[-60:] = math.nan  # words that stand in some texts only
        else:
            inner.get_output_embeddings().weight[3] = math.nan
    return module


SAID = {
    "policy": "a log-probability of the policy is not finite in",
    "reference": "a log-probability of the reference is not finite in",
    "classifier": "a level probability of the classifier is not finite in",
    "critic": "a value of the critic is not finite in",
}
CASES = [
    *(("policy", "all", engine, RLOO) for engine in ENGINES),
    *(("policy", "all", "multinomial", kind) for kind in (GRPO, PPO, ReinforcePlusPlus, OnlineDPO)),
    ("policy", "some", "multinomial", RLOO),
    ("reference", "all", "inverse", RLOO),
    ("classifier", "all", "inverse", ReinforcePlusPlus),
    ("critic", "all", "inverse", PPO),
]


@pytest.mark.parametrize(("what", "rows", "engine", "kind"), CASES)
def test_the_guard_keeps_the_step(what, rows, engine, kind, preferences, lm, classifier, tmp_path):
    options = {"engine": TorchEngine(LENGTH, **ENGINES[engine]), "policy_optimizer": kind()}
    module = broken(make(preferences, lm, classifier, **options), what, rows)
    before = weights(module)
    run = trainer(tmp_path, max_steps=1, callbacks=[Guards(identical="off", truncated="off")])
    with pytest.raises(GuardError, match=f"guard `nonfinite`: {SAID[what]}"):
        run.fit(module, data(preferences))
    assert run.global_step == 0 and (tmp_path / "guards" / "nonfinite-step0.ckpt").exists()
    assert all(torch.equal(value.nan_to_num(), before[name].nan_to_num()) for name, value in weights(module).items())


@pytest.mark.parametrize("what", SAID)
def test_without_guards_it_is_an_error_and_nothing_is_learnt_from_it(what, preferences, lm, classifier, tmp_path):
    optimizer = PPO(kl_controller=AdaptiveKL())
    module = broken(make(preferences, lm, classifier, policy_optimizer=optimizer), what, "all")
    run = trainer(tmp_path, max_steps=1)
    with pytest.raises(UsageError, match=rf"step 0: {SAID[what]} .*Guards"):
        run.fit(module, data(preferences))
    assert run.global_step == 0 and optimizer.kl_controller.factor == 1


@pytest.mark.parametrize("engine", ["inverse", "multinomial"])
def test_damaged_weights_do_not_answer(engine, preferences, lm, classifier, tmp_path):
    module = broken(make(preferences, lm, classifier, engine=TorchEngine(LENGTH, **ENGINES[engine])), "policy", "all")
    run, source = trainer(tmp_path), data(preferences)
    for act in (
        lambda: run.generate(module, source, "How do I make tea?", ckpt_path="none"),
        lambda: run.test(module, source),
    ):
        with pytest.raises(UsageError, match=r"of sampled completions: the model's weights are damaged"):
            act()
