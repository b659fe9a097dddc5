"""Whether a file computes what it should: against its graph, against the float model, layer by layer."""
