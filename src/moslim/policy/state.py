"""What a policy's checkpoint holds beside weights: rollouts, and what the run must be resumed with."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from moslim.checkpoint_files import GUARD_RECORD
from moslim.checkpoints import fingerprint
from moslim.errors import UsageError
from moslim.plugin import own_parts
from moslim.policy.rollout import Rollout
from moslim.processes import gathered, process_count
from moslim.training.lightning_compat import attached_trainer

if TYPE_CHECKING:
    from moslim.policy.module import PolicyTrainer

_KEY = "policy_run"
_BATCH_SIZE = "data.batch_size"


def save_run(module: PolicyTrainer, checkpoint: dict[str, Any]) -> None:
    """Adds every process's rollout, classes of plug-ins, fingerprints of frozen models."""
    rollouts = gathered(module.rollout.state() if module.rollout else None)
    checkpoint[_KEY] = {
        "plugins": _plugins(module),
        "shares_classifier": module.roles.shares_classifier,
        "frozen": _fingerprints(module),
        "rollouts": rollouts,
    }
    module.keep_identity(checkpoint)


def load_run(module: PolicyTrainer, checkpoint: dict[str, Any]) -> None:
    """Checks what :func:`save_run` recorded and takes up this process's rollout.

    One process takes up, of a step that a guard has kept in several, that of the process in which it tripped.

    Raises:
        UsageError: The checkpoint belongs to another mapping, policy optimizer, start or classifier, or its weights or
            rows mean something else than this run believes.
    """
    saved = checkpoint.get(_KEY)
    if saved is None:
        raise UsageError("this checkpoint was not written by a PolicyTrainer: name one of a policy's run")
    if saved["plugins"] != _plugins(module) and not module.reset_state:
        raise UsageError(
            f"the checkpoint was trained with {', '.join(saved['plugins'])}; this run has "
            f"{', '.join(_plugins(module))}; set model.reset_state to true to start their state anew"
        )
    shared = saved.get("shares_classifier", False)
    if shared != module.roles.shares_classifier:
        raise UsageError(
            f"the checkpoint was trained with a classifier that {'shared' if shared else 'did not share'} the policy's "
            f"base: give the same classifier and set model.share_backbone to {str(shared).lower()}"
        )
    changed = module.check_identity(checkpoint) - {_BATCH_SIZE}
    for role, found in _fingerprints(module).items():
        if saved["frozen"][role] != found:
            raise UsageError(f"the {role} has other weights than the one that this checkpoint was trained with")
    if module.reset_state:
        _renew_critic(module, checkpoint)
    rollouts, rank = saved["rollouts"], module.global_rank
    replayed = GUARD_RECORD in checkpoint and process_count() == 1
    if replayed:
        rank = checkpoint[GUARD_RECORD].get("process", 0)
    if (replayed or len(rollouts) == process_count()) and rollouts[rank] is not None and not changed:
        # the module itself may be moved there only after this
        trainer = attached_trainer(module)
        device = module.device if trainer is None else trainer.strategy.root_device
        module.rollout = Rollout.from_state(rollouts[rank], device)


def _renew_critic(module: PolicyTrainer, checkpoint: dict[str, Any]) -> None:
    """Where one of two policy optimizers has a critic: leaves the saved one out, or keeps the new one as it is."""
    if "state_dict" not in checkpoint:
        raise UsageError(
            "model.reset_state does not work with weights in shards, which are loaded before it is looked at: resume "
            "with another strategy, or `export` the policy and start a new run from that folder (model.model)"
        )
    own = {name: value for name, value in module.state_dict().items() if _of_critic(name)}
    saved = checkpoint["state_dict"]
    if own.keys() != {name for name in saved if _of_critic(name)} and module.trainer.state.fn == "fit":
        raise UsageError(
            "the checkpoint's policy optimizer has another critic than this run's, so that the state of the gradient "
            "optimizer does not fit: `export` the policy and start a new run from that folder (model.model)"
        )
    kept = {name: value for name, value in saved.items() if not _of_critic(name) or name in own}
    checkpoint["state_dict"] = {**own, **kept}


def _of_critic(name: str) -> bool:
    return name.startswith("critic.") or ".critic." in name


def _plugins(module: PolicyTrainer) -> list[str]:
    return [part.state_key for part in own_parts([module.mapping, module.policy_optimizer])]


def _fingerprints(module: PolicyTrainer) -> dict[str, str]:
    shared = {str(number): tensor for number, tensor in enumerate(module.roles.adapter("classifier"))}
    classifier = {**module.scorer.classifier.state_dict(), **shared}
    return {"reference": fingerprint(module.roles.frozen()), "classifier": fingerprint(classifier)}
