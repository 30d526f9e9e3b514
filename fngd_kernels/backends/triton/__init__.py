"""Triton kernels: float32, bfloat16 and float16 in, sums and Gram matrices in float32.

Launchers take checked tensors of any strides on one CUDA device, or on the CPU when Triton interprets. They
never wait for the device, so a CUDA graph can capture them. Only this package imports Triton.
"""
