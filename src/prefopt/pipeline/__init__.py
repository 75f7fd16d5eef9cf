"""What strings stages together: a model from nothing, the quickstart."""
