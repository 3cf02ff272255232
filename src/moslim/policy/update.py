"""The forward pass of an update: what the loss needs to know of the current policy, and what keeps its default."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor

from moslim.accumulation import step_batches
from moslim.errors import UsageError
from moslim.policy.logprobs import plan
from moslim.policy.off_policy import rounded_anew
from moslim.policy.optimizers import UpdateBatch
from moslim.policy.passes import Passes
from moslim.policy.predictor import Predictor
from moslim.policy.roles import Roles
from moslim.policy.rollout import Rollout
from moslim.processes import mean_over_processes


def rollout_batches(trainer: Trainer, batch_idx: int, repeats: int) -> tuple[list[int], float]:
    """The batches of the current rollout whose gradients make one optimizer step with that of ``batch_idx``.

    Args:
        trainer: The run's Trainer.
        batch_idx: Number of a batch in the epoch.
        repeats: Batches of a rollout.

    Returns:
        Their numbers in the epoch, and what their losses are multiplied by: a step over several rollouts is the mean of
        theirs, and Lightning divides by ``accumulate_grad_batches``.
    """
    window = step_batches(trainer, batch_idx)
    own = [number for number in window if number // repeats == batch_idx // repeats]
    return own, trainer.accumulate_grad_batches / len({number // repeats for number in window})


def check_accumulation_of_rollouts(trainer: Trainer, repeats: int) -> None:
    """Checks that optimizer steps end where rollouts do.

    Raises:
        UsageError: They do not.
    """
    accumulate = trainer.accumulate_grad_batches
    if repeats % accumulate and accumulate % repeats:
        raise UsageError(
            f"accumulate_grad_batches = {accumulate} must divide inner_epochs * minibatches = {repeats}, or be a "
            "multiple of it: an optimizer step would end in the middle of a rollout"
        )


def warn_of_part_rollouts(trainer: Trainer, repeats: int) -> None:
    """Says where an epoch ends within a rollout, which is then used in part, by steps of full scale."""
    batches = trainer.num_training_batches
    if batches % repeats and not trainer.fast_dev_run:  # type: ignore[attr-defined]  # set dynamically
        rank_zero_warn(
            f"an epoch has {batches} batches (trainer.limit_train_batches or overfit_batches), no multiple of "
            f"inner_epochs * minibatches = {repeats}: only {batches % repeats} of the {repeats} batches of its last "
            "rollout are learnt from"
        )


def forward(
    roles: Roles,
    rows: Rollout,
    together: Sequence[Rollout],
    length: int,
    samples: int,
    temperature: float,
    passes: Passes,
    entropy: bool = False,
    default_kl: bool = False,
    cap: float | None = None,
    parts: float = 1,
    untrained: bool = False,
    in_process: bool = True,
) -> tuple[UpdateBatch, Tensor | None]:
    """Runs policy and critic over a rollout. Answers that nothing needs are skipped.

    Args:
        roles: Policy, critic and reference.
        rows: ``N`` answers.
        together: All minibatches of the rollout whose gradients make one step, ``rows`` among them: what is averaged is
            averaged over them all. (A step that learns from several rollouts takes the mean of theirs.)
        length: The engine's length limit.
        samples: Answers per prompt.
        temperature: The sampler's.
        passes: How the answers are computed.
        entropy: Whether to compute the entropy of the (tempered) distributions.
        default_kl: Whether to compute the divergence on prompts without instruction.
        cap: Largest importance weight of answers that another policy sampled; None = all are 1.
        parts: How many losses Lightning takes the mean of for each rollout of the step.
        untrained: Whether no optimizer step lies between the rollout and this pass: the old log-probabilities are then
            those of this pass.
        in_process: Whether the engine computed with the policy itself.

    Returns:
        What the loss needs, and, if asked for, a scalar with gradient: the mean over the answer tokens of prompts
        without instruction of the exact KL(policy || reference), each process's part of it such that the mean over
        processes is that over all tokens; None if no process has such prompts.
    """
    uninstructed = rows.uninstructed if default_kl else torch.zeros_like(rows.uninstructed)
    needed = rows.used | uninstructed
    if not needed.any():
        needed[0] = True  # its mask is empty, but every process must have a gradient, be it zero
    predictor = Predictor(roles.policy, passes.chunked_logprobs)
    logprobs = torch.zeros(rows.mask.shape, dtype=predictor.dtype, device=rows.mask.device)
    entropies = torch.zeros_like(logprobs) if entropy else None
    # the states that predict tokens are what a critic on the policy's trunk reads, too
    values = torch.zeros_like(logprobs) if roles.critic_shares_trunk and predictor.head is not None else None
    divergence = logprobs.new_zeros(())
    for group, compared in ((needed & ~uninstructed, False), (uninstructed, True)):
        chosen = plan(roles.policy, rows.batch, passes, group.nonzero()[:, 0])
        references: list[tuple[Predictor, Tensor]] = []
        if compared:
            with torch.no_grad(), roles.reference() as reference:
                other = Predictor(reference, passes.chunked_logprobs)
                references = [(other, one.states(other)) for one in chosen]
        for number, one in enumerate(chosen):
            states = one.states(predictor)
            wanted = references[number] if compared else None
            found = predictor.statistics(states, one.tokens, temperature, entropy, wanted)
            one.put(logprobs, found.logprobs)
            if entropies is not None and found.entropy is not None:
                one.put(entropies, found.entropy)
            if values is not None and roles.critic is not None:
                one.put(values, roles.critic(states))
            if found.kl is not None:
                divergence = divergence + one.spread(found.kl).sum()
    if roles.critic is not None and values is None:
        values = roles.values(rows.batch, passes, needed.nonzero()[:, 0])
    old, sampler = rows.old_logprobs, rows.sampler_logprobs
    if untrained:
        old, sampler = rounded_anew(logprobs.detach(), old, sampler, in_process)
    update = UpdateBatch(
        logprobs=logprobs,
        old=old,
        advantages=rows.advantages,
        mask=rows.update_mask,
        length=length,
        samples=samples,
        reference=rows.reference_logprobs,
        entropy=entropies,
        values=values,
        old_values=rows.values,
        returns=rows.returns,
        value_mask=rows.value_mask,
        sampler=sampler,
        cap=cap,
        step_mask=torch.cat([part.update_mask for part in together]),
        step_value_mask=torch.cat([part.value_mask for part in together]),
        parts=parts,
    )
    if not default_kl:
        return update, None
    asked_nothing = torch.cat([part.mask[part.uninstructed] for part in together])
    tokens = mean_over_processes(asked_nothing.sum()) / parts
    return update, divergence / tokens if tokens > 0 else None
