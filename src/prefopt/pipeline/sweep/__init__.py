"""A sweep: one method over several values of its settings, compared on the same held-out examples."""
