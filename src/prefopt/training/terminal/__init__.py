"""What a run says and shows while it goes."""
