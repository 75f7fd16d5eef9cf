"""What a run leaves on disk, and how it is gone on with: folder, checkpoints, notes, manifest."""
