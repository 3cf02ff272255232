"""What memory each role of policy optimisation holds, and what it shares with others."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from torch import Tensor
from torch.distributed.tensor import DTensor

from moslim.policy.roles import Role, Roles
from moslim.reward.scorer import Scorer

MIB = 2**20
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
        unique = _by_place([*roles.weights(role), *(scorer.classifier.parameters() if role == "classifier" else ())])
        new = [tensor for place, tensor in unique.items() if place not in seen]
        seen |= unique.keys()
        found.append(
            Weights(
                role,
                parameters=sum(tensor.numel() for tensor in unique.values()),
                trained=sum(tensor.numel() for tensor in new if tensor.requires_grad and role != "classifier"),
                alone=sum(tensor.nbytes for tensor in unique.values()),
                added=sum(tensor.nbytes for tensor in new),
            )
        )
    return found


def describe(weights: Iterable[Weights]) -> str:
    """One line on what is resident."""
    parts = [f"{own.role} {own.added / MIB:.1f} MiB (of {own.alone / MIB:.1f})" for own in weights]
    return f"Weights held by role (of those that it reads): {', '.join(parts)}."


def _by_place(tensors: Iterable[Tensor]) -> dict[int, Tensor]:
    """This process's part of each tensor, by where it lies in memory: tied weights lie in one place."""
    local = (tensor.to_local() if isinstance(tensor, DTensor) else tensor for tensor in tensors)
    return {tensor.data_ptr(): tensor for tensor in local}
