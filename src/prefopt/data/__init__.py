"""Files and datasets, through checked rows, to trees: `dataset.load` is the face of the room."""
