"""What is done to each layer: decided without a search, read, written, compared."""
