"""Integer programs over numbers alone, and what solves them."""
