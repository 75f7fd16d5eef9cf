"""The watch: rules that look at a run's figures while it goes and say what is going on and what to change."""
