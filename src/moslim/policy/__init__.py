"""Policy optimisation: rollouts, log-probabilities, policy optimizers and the module that runs them."""
