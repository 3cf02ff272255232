"""Policy optimisation: rollouts, log-probabilities and the module that runs them."""

from typing import TYPE_CHECKING

from moslim.utils.exports import lazy_exports

if TYPE_CHECKING:
    from moslim.policy.critic import CriticOptions as CriticOptions
    from moslim.policy.off_policy import OffPolicy as OffPolicy
    from moslim.policy.passes import Passes as Passes
    from moslim.policy.reward_functions import RewardFunction as RewardFunction

__all__, __getattr__, __dir__ = lazy_exports(
    __name__,
    {
        "CriticOptions": "moslim.policy.critic",
        "OffPolicy": "moslim.policy.off_policy",
        "Passes": "moslim.policy.passes",
        "RewardFunction": "moslim.policy.reward_functions",
    },
)
