"""Training runs and benchmarks: imports anything, imported by nothing but the tests."""
