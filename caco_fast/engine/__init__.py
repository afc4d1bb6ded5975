"""The training loop and what surrounds it: launch, precision, checkpoints, logs."""
