"""Sparse fine-tuning (LT-SFT): from data to a delta."""
