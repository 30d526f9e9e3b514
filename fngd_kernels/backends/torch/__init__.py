"""The algorithms on library matrix products: the production path on the CPU, the fallback elsewhere."""
