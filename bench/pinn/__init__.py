"""Least-squares problems with known or computed solutions: Gauss-Newton beside what users run today.

Every run has the same seconds of training on the same points, the whole batch in each step, in float64.
Every method tries equally many settings with seed 0, judged by the error at validation points; with the one
chosen it trains with other seeds, and the error at yet other points is reported. Errors are measured off the
clock. `python -m bench.pinn` compares, `python -m bench.pinn.demo` shows two methods side by side,
`python -m bench.pinn.published` GaussNewton beside figures of papers.
"""
