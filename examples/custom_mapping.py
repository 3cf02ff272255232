"""Mapping function of one's own: from level probabilities and requested levels to rewards.

From Python, after ``make quickstart``, with Lightning's Trainer:

    python examples/custom_mapping.py

In a config, or on the command line, by the path of the class:

    PYTHONPATH=examples python main.py fit --config configs/quickstart/policy.yaml \\
        --model.mapping custom_mapping.WithinOne --model.mapping.near 0.3
"""

import torch
from lightning.pytorch import Trainer
from torch import Tensor

from moslim import PolicyTrainer, PreferenceDataModule, PreferenceSet
from moslim.algorithms import RLOO
from moslim.data import Workbench
from moslim.generation import TorchEngine
from moslim.mapping import MappingFunction

DIMENSIONS = {"formality": ["slangy", "casual", "neutral", "formal", "ceremonial"]}


class WithinOne(MappingFunction):
    """Probability of the requested level, plus a part of that of its neighbours.

    Args:
        near: Share of the reward that a neighbouring level earns.
    """

    def __init__(self, near: float = 0.5) -> None:
        self.near = near

    def per_dimension(self, probs: Tensor, targets: Tensor, groups: Tensor) -> Tensor:
        """``[B, D]`` from probabilities ``[B, D, K]`` and targets ``[B, D]``; NaN where nothing is requested."""
        distance = (torch.arange(probs.shape[-1], device=probs.device) - targets[..., None]).abs()
        reward = (probs * (distance == 0)).sum(-1) + self.near * (probs * (distance == 1)).sum(-1)
        return reward.masked_fill(targets < 0, torch.nan)


def main(folder: str = "outputs/quickstart", max_steps: int = 200) -> Trainer:
    """Trains the quickstart's starter for some steps with this mapping, and returns the Trainer."""
    preferences = PreferenceSet(DIMENSIONS)
    models = f"{folder}/starter/model", f"{folder}/reward/classifier"
    policy = PolicyTrainer(preferences, *models, WithinOne(near=0.3), RLOO(), engine=TorchEngine(40))
    trainer = Trainer(max_steps=max_steps, use_distributed_sampler=False, limit_val_batches=0)
    trainer.fit(policy, PreferenceDataModule(preferences, Workbench(), batch_size=16))
    return trainer


if __name__ == "__main__":
    main()
