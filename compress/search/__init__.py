"""Budgets into a plan: costs, sensitivities, the integer program around them."""
