"""Training: the synthetic world that the data comes from, rollouts, losses and trainers."""
