"""The rollout engine: samples image tokens with its own copies of the weights."""
