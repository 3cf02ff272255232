"""What memory each role of policy optimisation holds, and what it shares with others."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from torch import Tensor

from moslim.policy.roles import Role, Roles
from moslim.reward.scorer import Scorer

ROLES: tuple[Role, ...] = ("policy", "reference", "classifier", "critic")


@dataclass
class Weights:
    """The weights of a role.

    Args:
        role: The role.
        parameters: How many it reads, whoever holds them.
        trained: How many of its own are trained: those that no role before it in the list has.
        alone: Bytes that it would hold as a model by itself.
        added: Bytes that no role before it in the list holds: those of all roles sum up to what is resident.
    """

    role: Role
    parameters: int
    trained: int
    alone: int
    added: int


def resident_weights(roles: Roles, scorer: Scorer) -> list[Weights]:
    """Weights by role, of this process; a weight that several roles read is counted once, for the first of them.

    Args:
        roles: Policy, reference and critic.
        scorer: The classifier.
    """
    seen: set[int] = set()
    found = []
    for role in ROLES:
        if role == "critic" and roles.critic is None:
            continue
        own = roles.weights(role)
        if role == "classifier":
            own += list(scorer.classifier.parameters())
        unique = _by_place(own)
        new = {place: tensor for place, tensor in unique.items() if place not in seen}
        seen |= new.keys()
        found.append(
            Weights(
                role,
                parameters=sum(tensor.numel() for tensor in unique.values()),
                trained=sum(tensor.numel() for tensor in new.values() if tensor.requires_grad and role != "classifier"),
                alone=_bytes(unique.values()),
                added=_bytes(new.values()),
            )
        )
    return found


def _by_place(tensors: Iterable[Tensor]) -> dict[int, Tensor]:
    """Tensors by where they lie in memory: tied weights lie in one place."""
    return {
        tensor.untyped_storage().data_ptr() + tensor.storage_offset() * tensor.element_size(): tensor
        for tensor in tensors
    }


def _bytes(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)
