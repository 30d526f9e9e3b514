"""The networks that are trained and timed."""
