"""Load a model, adapt it, wrap it as a policy, and hold its reference."""
