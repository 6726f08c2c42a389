"""The trainer: loop, update, checkpoints, run folder."""
