"""Trees -> packed batch -> attention -> log-probabilities of the scored tokens."""
