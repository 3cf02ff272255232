"""Every policy optimizer learns, with the whole of the real loop, to write words that pay."""

import pytest
import torch
from lightning.pytorch import Callback

from moslim.algorithms.functional import AdaptiveKL
from moslim.algorithms.grpo import GRPO
from moslim.algorithms.online_dpo import OnlineDPO
from moslim.algorithms.ppo import PPO
from moslim.algorithms.reinforce_plus_plus import ReinforcePlusPlus
from moslim.algorithms.rloo import RLOO
from moslim.mapping import MappingFunction
from tests.helpers.policy_runs import LORA, Traced, data, make, trainer

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore::lightning.pytorch.utilities.warnings.PossibleUserWarning"),
]


class Bandit(Traced):
    """The highest level of every dimension is as likely as the share of an answer's tokens that pay: one in four."""

    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        self.collector.scorer = self.paid

    def paid(self, answers):
        found = answers.completions
        share = ((found.tokens % 4 == 0) & found.mask).sum(dim=1) / found.mask.sum(dim=1)
        probs = torch.zeros(len(share), len(self.preferences), 5)
        probs[..., 0], probs[..., -1] = 1 - share[:, None], share[:, None]
        return probs


class Highest(MappingFunction):
    """Pays the probability of the highest level, whatever was asked for."""

    def per_dimension(self, probs, targets, groups):
        return probs[..., -1].masked_fill(targets < 0, torch.nan)


class Paid(Callback):
    """Remembers what every rollout earned."""

    def __init__(self):
        self.rewards = []

    def on_train_batch_end(self, trainer, module, *_):
        rollout = module.rollout
        self.rewards.append(rollout.rewards[~rollout.uninstructed].mean().item())


KINDS = {
    "rloo": {"policy_optimizer": RLOO()},
    "rloo, k2 in the loss": {"policy_optimizer": RLOO(importance_sampling_level="token", kl_in="loss", kl="k2")},
    "reinforce++": {"policy_optimizer": ReinforcePlusPlus()},
    "reinforce++-baseline": {"policy_optimizer": ReinforcePlusPlus(baseline=True)},
    "grpo": {"policy_optimizer": GRPO(min_spread=0.02, epsilon_high=0.28, dual_clip=3.0)},
    "ppo": {"policy_optimizer": PPO(kl_controller=AdaptiveKL(target=8.0)), "num_iterations": 2, "minibatches": 2},
    "ppo, adapter": {"policy_optimizer": PPO(critic_lora=LORA), "lora": LORA, "rate": 0.05},
    "online dpo": {"policy_optimizer": OnlineDPO(min_margin=0.01)},
}


@pytest.mark.parametrize("kind", KINDS)
def test_each_optimizer_learns(kind, preferences, lm, classifier, tmp_path):
    options = {"num_generations": 8, "missing_eos_penalty": 0.0, "rate": 1e-2, **KINDS[kind]}
    module = make(preferences, lm, classifier, Bandit, mapping=Highest(), **options)
    watch = Paid()
    trainer(tmp_path, max_steps=15 * module.batch_repeats, callbacks=[watch]).fit(module, data(preferences))
    first, last = sum(watch.rewards[:3]) / 3, sum(watch.rewards[-3:]) / 3
    assert first < 0.35 and last > first + 0.2
