"""Rewards: what scores an image, by rule or by model."""
