"""GaussNewton inside frameworks for equations; a module each, which imports its framework.

The frameworks weigh, add up and differentiate a scalar loss. `squares.py` has them see the squares of the
residuals as numbers, keeps the residuals, and reads the weight of each square from their own backward.
"""
