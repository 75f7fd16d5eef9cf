"""The loop around a method: data order, optimizer steps, evaluation, checkpoints, metrics."""
