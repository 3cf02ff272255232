"""Policy optimisation: rollouts, log-probabilities and the module that runs them."""

from typing import TYPE_CHECKING

from moslim.utils import lazy_exports

if TYPE_CHECKING:
    from moslim.policy.generation import OffPolicy as OffPolicy
    from moslim.policy.hindsight import Hindsight as Hindsight
    from moslim.policy.rehearsal import Rehearsal as Rehearsal
    from moslim.policy.reward_functions import RewardFunction as RewardFunction

__all__, __getattr__, __dir__ = lazy_exports(
    __name__,
    {
        "OffPolicy": "moslim.policy.generation",
        "Hindsight": "moslim.policy.hindsight",
        "Rehearsal": "moslim.policy.rehearsal",
        "RewardFunction": "moslim.policy.reward_functions",
    },
)
