"""Whether a run fits into memory, and what is said when it does not."""
