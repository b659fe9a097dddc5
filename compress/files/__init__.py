"""What is written, whole or not at all; where, under which names, and its hashes."""
