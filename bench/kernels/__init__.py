"""The kernels over layer shapes of real networks, against the best plain torch: `python -m bench.kernels`."""
