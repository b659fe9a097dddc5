"""The traced model, and what is done to its graph."""
