"""Grids, formats, targets and methods for weights alone."""
