"""What bench/gpu.sh runs besides the benchmarks."""
