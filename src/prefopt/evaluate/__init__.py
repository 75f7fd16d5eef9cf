"""What a trained policy is worth: reward accuracy on held-out pairs, KL from the reference."""
