"""The PPO algorithm as pure functions of tensors."""
