"""One file per method: paper, settings, pure loss. `table` lists them."""
