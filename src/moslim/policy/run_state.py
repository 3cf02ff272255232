"""State of a policy's run in a checkpoint, beside the weights: rollouts, plug-ins and frozen models."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from moslim.plugin import Plugin
from moslim.policy.policy_models import PolicyModels
from moslim.policy.rollout import Rollout
from moslim.reward.modeling import PreferenceClassifier
from moslim.training.checkpoint_files import GUARD_RECORD
from moslim.training.checkpointing import fingerprint
from moslim.training.distributed import gathered, process_count, process_rank
from moslim.utils.errors import UsageError

_KEY = "policy_run"


def save_run(
    checkpoint: dict[str, Any],
    plugins: Sequence[Plugin],
    models: PolicyModels,
    classifier: PreferenceClassifier,
    rollout: Rollout | None,
) -> None:
    """Adds the rollouts of all processes, the classes of plug-ins and fingerprints of frozen models to a checkpoint."""
    checkpoint[_KEY] = {
        "plugins": [part.state_key for part in plugins],
        "shares_classifier": models.shares_classifier,
        "frozen": _fingerprints(models, classifier),
        "rollouts": gathered(rollout.state() if rollout else None),
    }


def saved_run(checkpoint: Mapping[str, Any]) -> dict[str, Any]:
    """The record that :func:`save_run` added.

    Raises:
        UsageError: The checkpoint has no such record.
    """
    if _KEY not in checkpoint:
        raise UsageError("this checkpoint was not written by a PolicyTrainer: name one of a policy's run")
    run: dict[str, Any] = checkpoint[_KEY]
    return run


def check_parts(run: Mapping[str, Any], plugins: Sequence[Plugin], models: PolicyModels, reset_state: bool) -> None:
    """Compares plug-ins and sharing of the backbone with those of a saved run.

    Args:
        run: Record from :func:`saved_run`.
        plugins: Mapping function and policy optimizer, with their children.
        models: Policy, reference and critic.
        reset_state: Whether other plug-ins are accepted.

    Raises:
        UsageError: They differ.
    """
    names = [part.state_key for part in plugins]
    if run["plugins"] != names and not reset_state:
        raise UsageError(
            f"the checkpoint was trained with {', '.join(run['plugins'])}; this run has {', '.join(names)}; "
            "set model.reset_state to true to start their state anew"
        )
    shared = run.get("shares_classifier", False)
    if shared != models.shares_classifier:
        raise UsageError(
            f"the checkpoint was trained with a classifier that {'shared' if shared else 'did not share'} the policy's "
            f"base: give the same classifier and set model.share_backbone to {str(shared).lower()}"
        )


def check_frozen(run: Mapping[str, Any], models: PolicyModels, classifier: PreferenceClassifier) -> None:
    """Compares the weights of reference and classifier with those of a saved run.

    Raises:
        UsageError: They differ.
    """
    for role, value in _fingerprints(models, classifier).items():
        if run["frozen"][role] != value:
            raise UsageError(f"the {role} has other weights than the one that this checkpoint was trained with")


def rank_in(checkpoint: Mapping[str, Any]) -> int | None:
    """Rank in the saved run whose rollout this process resumes; None if the numbers of processes differ.

    A single process can resume a step that a guard saved in several: from the rank in which the guard tripped.
    """
    if GUARD_RECORD in checkpoint and process_count() == 1:
        return int(checkpoint[GUARD_RECORD].get("process", 0))
    return process_rank() if len(checkpoint[_KEY]["rollouts"]) == process_count() else None


def renew_critic(checkpoint: dict[str, Any], state_dict: Mapping[str, Tensor], fitting: bool) -> None:
    """Fits the critic's weights in a checkpoint to this run: drops those of a saved critic, or adds those of a new one.

    Args:
        checkpoint: Checkpoint, changed in place.
        state_dict: State dict of the module.
        fitting: Whether the checkpoint is loaded for ``fit``, which also needs the state of the gradient optimizer.

    Raises:
        UsageError: The weights or the state of the gradient optimizer cannot be adapted.
    """
    if "state_dict" not in checkpoint:
        raise UsageError(
            "model.reset_state does not work with weights in shards, which are loaded before it is looked at: resume "
            "with another strategy, or `export` the policy and start a new run from that folder (model.model)"
        )
    critic = {name: value for name, value in state_dict.items() if _of_critic(name)}
    saved = checkpoint["state_dict"]
    if critic.keys() != {name for name in saved if _of_critic(name)} and fitting:
        raise UsageError(
            "the checkpoint's policy optimizer has another critic than this run's, so that the state of the gradient "
            "optimizer does not fit: `export` the policy and start a new run from that folder (model.model)"
        )
    kept = {name: value for name, value in saved.items() if not _of_critic(name) or name in critic}
    checkpoint["state_dict"] = {**critic, **kept}


def _of_critic(name: str) -> bool:
    return name.startswith("critic.") or ".critic." in name


def _fingerprints(models: PolicyModels, classifier: PreferenceClassifier) -> dict[str, str]:
    shared = {str(number): tensor for number, tensor in enumerate(models.adapter("classifier"))}
    weights = {**classifier.state_dict(), **shared}
    return {"reference": fingerprint(models.frozen()), "classifier": fingerprint(weights)}
