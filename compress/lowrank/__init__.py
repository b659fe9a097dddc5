"""Low-rank layers: exact decompositions, data-aware truncation, and Maestro's trainable ordered factors."""
