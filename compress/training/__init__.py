"""Training from the command line: one loop, and what each technique adds to it."""
