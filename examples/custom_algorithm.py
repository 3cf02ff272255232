"""Policy optimizer of one's own: from the scores of completions to their advantages.

From Python, after ``make quickstart``, with Lightning's Trainer:

    python examples/custom_algorithm.py

In a config, or on the command line, by the path of the class:

    PYTHONPATH=examples python main.py fit --config configs/quickstart/policy.yaml \\
        --model.policy_optimizer custom_algorithm.MedianBaseline --model.policy_optimizer.limit 1
"""

from dataclasses import dataclass

import torch
from lightning.pytorch import Trainer
from torch import Tensor

from moslim import PolicyTrainer, PreferenceDataModule, PreferenceSet
from moslim.algorithms import AdvantageInputs, PolicyGradient
from moslim.data import Workbench
from moslim.generation import TorchEngine
from moslim.mapping import ExpectedDistance

DIMENSIONS = {"formality": ["slangy", "casual", "neutral", "formal", "ceremonial"]}


@dataclass(eq=False, kw_only=True)
class MedianBaseline(PolicyGradient):
    """Score less the median score of the completions of the same prompt, clamped.

    The fields are options, beside those inherited: ``kl_coef``, the clip range of the ratio and so on.

    Args:
        limit: Largest absolute advantage.
    """

    limit: float = 2.0

    def advantages(self, rewards: AdvantageInputs) -> Tensor:
        """``[prompts, completions]``; completions that no reward applies to are compared among themselves."""
        score = self.scores_less_kl(rewards)
        peers = score[:, None, :].expand_as(rewards.peers).masked_fill(~rewards.peers, torch.nan)
        return (score - peers.nanmedian(dim=-1).values).clamp(-self.limit, self.limit)


def main(folder: str = "outputs/quickstart", max_steps: int = 200) -> Trainer:
    """Trains the quickstart's starter for some steps with this optimizer, and returns the Trainer."""
    preferences = PreferenceSet(DIMENSIONS)
    models = f"{folder}/starter/model", f"{folder}/reward/classifier"
    optimizer = MedianBaseline(kl_coef=0.02, limit=1.0)
    policy = PolicyTrainer(preferences, *models, ExpectedDistance(), optimizer, engine=TorchEngine(40))
    trainer = Trainer(max_steps=max_steps, use_distributed_sampler=False, limit_val_batches=0)
    trainer.fit(policy, PreferenceDataModule(preferences, Workbench(), batch_size=16))
    return trainer


if __name__ == "__main__":
    main()
