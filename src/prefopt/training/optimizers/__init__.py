"""AdamW in three ways of holding its numbers: what is made, what a checkpoint keeps of it, and what it takes."""
