"""Composable sparse fine-tuning (LT-SFT, arXiv 2110.07560): a task is a small difference to a base, kept in a file."""
