"""Least-squares workloads with known solutions: Gauss-Newton beside what users of such networks run today."""
