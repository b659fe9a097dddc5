"""Samples: read from files, folders, texts and functions, or made."""
