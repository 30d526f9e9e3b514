"""Public operators: each one checks its input, plans, and runs."""
