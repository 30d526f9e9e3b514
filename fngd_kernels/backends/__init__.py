"""The algorithms, tensors in and tensors out: on torch's matrix products, and as Triton kernels."""
