"""FNGD: natural-gradient training at first-order cost, as a drop-in PyTorch optimizer.

What a training step does, and where:

1. `FNGD.__init__` (optimizer.py) finds the modules that rules serve (capture/discovery.py, rules/) and routes
   their calls (routed_class.py, capture/routing.py) to its `Preconditioner` (preconditioner.py). Calls that
   it does not serve (`Preconditioner.serves`) stay plain and are counted.
2. `set_samples`, or a tracked loader (samples.py), asks the schedule (coefficients/schedule.py) whether this
   batch is solved for, or whether the table (coefficients/table.py) knows the coefficients s_n of its
   samples.
3. Known: the module's rule runs a node of fngd_kernels/ops/nodes.py, whose backward gives sum_n s_n C_n at
   once.
4. Solved for: the collector (capture/collector.py) receives input and grad_output of every layer in backward.
   When a layer's are complete, its rule forms the Gram matrix, K_ij = <C_i, C_j>; on a GPU that waits for
   the end of backward, where equal layers take one launch. There one batched solve (coefficients/solver.py)
   gives s, and the rules combine sum_n s_n C_n into `.grad`.
5. `FNGD.step` has the table keep s, and applies a torch.optim rule to `.grad` (update.py); `coverage()` and
   `stats()` tell what happened (coefficients/report.py).

`GaussNewton` (gauss_newton/) and `layer_grams` (capture/grams.py) use the same capture and rules.
"""

from .capture import layer_grams
from .gauss_newton import GaussNewton, PerSample
from .graphs import GraphedStep
from .optimizer import FNGD
from .samples import track

__all__ = ["FNGD", "GaussNewton", "GraphedStep", "PerSample", "layer_grams", "track"]
__version__ = "0.1.0"
