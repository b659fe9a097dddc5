"""A plan carried out: calibrated, exported, proven, reported."""
