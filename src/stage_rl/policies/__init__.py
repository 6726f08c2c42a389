"""Model families: what the trainer and the engine see of them."""
