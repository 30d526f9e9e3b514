"""The operator library that every module of this folder adds its schemas and implementations to."""

import torch

LIBRARY = torch.library.Library("fngd", "FRAGMENT")
"""Plain torch is registered under `CompositeExplicitAutograd`; native code registers `CPU` or `CUDA`, which win."""
