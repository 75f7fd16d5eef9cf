"""What a run left, read back: one page about it, and the model's card. Reads files only; a run may be going on or have failed."""
