"""Gauss-Newton steps for least squares; what a step does, and where.

The closure's residuals (residuals.py) are evaluated while layers are routed (layers.py, recorder.py) and
differentiated block by block (linearize.py): rows of layers are found for each residual (rows.py), parameters
that no rule serves go through autograd (autograd_rows.py), and once the whole is compared with autograd
(checks.py). That gives the Jacobian (jacobian.py) in factors (factors.py). Its damped normal equations are
solved in one of three equal forms (systems.py; direct.py, iterative.py), summed over ranks (ranks.py). Trial
steps go from there and back (walk.py, acceleration.py), damping and momentum are kept by optimizer.py.
"""

from .optimizer import GaussNewton
from .residuals import PerSample

__all__ = ["GaussNewton", "PerSample"]
