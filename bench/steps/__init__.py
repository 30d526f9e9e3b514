"""Single training steps, FNGD's beside the base optimizer's: `python -m bench.steps`."""
