"""Several processes that train one model: joining, sharing out its weights, and noticing when one is gone."""
