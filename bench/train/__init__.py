"""Training studies: several optimizers tuned alike, then compared over seeds: `python -m bench.train`."""
