"""The algorithms on torch's matrix products: for the CPU, and for what Triton kernels do not support."""
