"""One rollout: what was asked, what was answered, and what it was worth."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from moslim.data.types import Question
from moslim.errors import UsageError
from moslim.noise import derive_seed
from moslim.packing import AnswerBatch
from moslim.processes import process_count, process_rank


@dataclass
class Rollout:
    """``N = G * n`` answers to ``G`` prompts, those of one prompt adjacent.

    Args:
        key: Which training batch it was sampled for: epoch, and batch number not counting repeats.
        input_ids: ``[N, P + T]``, prompts left-padded, answers right-padded.
        attention_mask: ``[N, P + T]``.
        mask: ``[N, T]`` bool, answer tokens up to and including the end-of-sequence token.
        old_logprobs: ``[N, T]`` float32 or finer, as all that follows; under the policy when it began to learn from
            them; 0 where masked.
        reference_logprobs: ``[N, T]``, or None where no KL is asked for.
        targets: ``[N, D]`` int64, requested levels, -1 = not mentioned.
        probs: ``[N, D, K]``, the classifier's level probabilities.
        per_dimension: ``[N, D + F]`` rewards of the dimensions, then of the reward functions, NaN where inactive.
        rewards: ``[N]`` total rewards.
        advantages: ``[N]`` or ``[N, T]``, as the policy optimizer gives them.
        used: ``[N]`` bool, whether an answer takes part in updates.
        ended: ``[N]`` bool, false where the answer was cut at the length limit.
        questions: ``N`` questions as the classifier saw them.
        answers: ``N`` decoded answers.
        values: ``[N, T]`` the critic's, 0 where masked; None without a critic.
        returns: ``[N, T]`` what the critic is to learn; None without a critic.
        sampler_logprobs: ``[N, T]`` float32, under what the tokens were drawn from, where that is not the policy that
            ``old_logprobs`` are of; None = it is.
        engine_logprobs: ``[N, T]`` by the engine with the policy's weights, where ``old_logprobs`` were computed anew;
            None = they are the engine's, or it had other weights.
        version: Optimizer steps that the policy had made when it began to learn from them.
    """

    key: tuple[int, int]
    input_ids: Tensor
    attention_mask: Tensor
    mask: Tensor
    old_logprobs: Tensor
    reference_logprobs: Tensor | None
    targets: Tensor
    probs: Tensor
    per_dimension: Tensor
    rewards: Tensor
    advantages: Tensor
    used: Tensor
    ended: Tensor
    questions: list[Question]
    answers: list[str]
    values: Tensor | None = None
    returns: Tensor | None = None
    sampler_logprobs: Tensor | None = None
    engine_logprobs: Tensor | None = None
    version: int | None = None

    def __len__(self) -> int:
        return len(self.mask)

    @property
    def tokens(self) -> Tensor:
        """``[N, T]`` answer tokens."""
        return self.input_ids[:, -self.mask.shape[1] :]

    @property
    def uninstructed(self) -> Tensor:
        """``[N]`` bool: the prompt asked for nothing."""
        return (self.targets < 0).all(dim=1)

    @property
    def answer_advantages(self) -> Tensor:
        """``[N]``: that of the answer, or the mean of its tokens'."""
        if self.advantages.dim() == 1:
            return self.advantages
        return (self.advantages * self.mask).sum(dim=1) / self.mask.sum(dim=1)

    @property
    def batch(self) -> AnswerBatch:
        """What a model is run over."""
        return AnswerBatch(self.input_ids, self.attention_mask, self.mask)

    def nonfinite(self) -> str | None:
        """Says which numbers of the rollout are NaN or infinite; None if all are finite."""
        mask = self.mask
        kinds = {
            "a log-probability of the policy": self.old_logprobs[mask],
            "a level probability of the classifier": self.probs,
            "a reward": self.rewards,
        }
        if self.reference_logprobs is not None:
            kinds["a log-probability of the reference"] = self.reference_logprobs[mask]
        if self.values is not None:
            kinds["a value of the critic"] = self.values[mask]
        kinds["an advantage"] = self.advantages
        return next((found for name, values in kinds.items() if (found := nonfinite(name, values))), None)

    def rows(self, index: Tensor) -> Rollout:
        """The answers at positions ``index``."""
        picked = index.tolist()
        changes: dict[str, Any] = {
            "questions": [self.questions[i] for i in picked],
            "answers": [self.answers[i] for i in picked],
        }
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if isinstance(value, Tensor):
                changes[field.name] = value[index]
        return dataclasses.replace(self, **changes)

    def minibatch(self, step: int, minibatches: int, samples: int, seed: Sequence[int]) -> Rollout:
        """One of the parts that an inner epoch cuts the prompts into, anew each time.

        Neighbours, as many as there are parts, are dealt to different ones. So the parts of several processes together
        are those of one process with the same batch, where each has a multiple of ``minibatches`` prompts.

        Args:
            step: Number of the training step in this rollout.
            minibatches: Parts per inner epoch; 1 gives the rollout as it is.
            samples: Answers per prompt, which stay together: they are compared, and what they begin with is shared.
            seed: What the cut depends on, beside rollout and inner epoch.

        Raises:
            UsageError: There are fewer prompts than parts.
        """
        if minibatches == 1:
            return self
        prompts = torch.arange(len(self)).reshape(-1, samples)
        if minibatches > len(prompts):
            raise UsageError(
                f"minibatches is {minibatches}, but a rollout has only {len(prompts)} prompts, whose answers stay "
                "together"
            )
        epoch, part = divmod(step, minibatches)
        generator = torch.Generator().manual_seed(derive_seed(*seed, *self.key, epoch))
        groups = -(-len(prompts) // minibatches)
        shape = process_count(), groups, minibatches
        noise = torch.rand(shape, generator=generator, dtype=torch.float64)[process_rank()]
        noise[-1, minibatches - (groups * minibatches - len(prompts)) :] = torch.inf  # the first parts are the larger
        dealt = noise.argsort(dim=1).flatten()[: len(prompts)]
        return self.rows(prompts[dealt == part].flatten().to(self.mask.device))

    @property
    def update_mask(self) -> Tensor:
        """``[N, T]`` bool: the tokens that updates learn from."""
        return self.mask & self.used[:, None]

    @property
    def value_mask(self) -> Tensor:
        """``[N, T]`` bool: the tokens that a critic learns from, those of answers to which a reward applies."""
        return self.update_mask & ~self.per_dimension.isnan().all(dim=1, keepdim=True)

    def state(self) -> dict[str, Any]:
        """Plain data and tensors on CPU, for a checkpoint that loads with ``weights_only``."""
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return {name: value.cpu() if isinstance(value, Tensor) else value for name, value in values.items()}

    @classmethod
    def from_state(cls, state: dict[str, Any], device: torch.device) -> Rollout:
        """Inverse of :meth:`state`."""
        moved: dict[str, Any] = {n: v.to(device) if isinstance(v, Tensor) else v for n, v in state.items()}
        moved["key"] = tuple(state["key"])
        return cls(**moved)


def nonfinite(name: str, values: Tensor) -> str | None:
    """Finds NaN and infinity in a tensor of any shape."""
    bad = int((~values.isfinite()).sum())
    return f"{name} is not finite in {bad} of {values.numel()} places" if bad else None


def end_penalty(ended: Tensor, penalty: float) -> Tensor:
    """The one rule for answers that were cut at the length limit: they are scored as they are, less ``penalty``.

    They are neither masked from the loss, which would teach verbosity, nor dropped from the baseline.

    Args:
        ended: ``[N]`` bool.
        penalty: In units of the score.

    Returns:
        ``[N]``, 0 for answers that ended.
    """
    return (~ended).float() * penalty
