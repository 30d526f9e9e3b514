"""The reliability campaign and training with faults: `python -m bench.reliability`."""
