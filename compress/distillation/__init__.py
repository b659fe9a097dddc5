"""Dataset distillation (MTT, arXiv 2203.11932; AST, arXiv 2310.10541): few images that train like many."""
