"""The user's model, read safely from whatever file it is in, and written back."""
