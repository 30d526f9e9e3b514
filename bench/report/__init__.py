"""From files of results to a page and to short tables: `python -m bench.report`."""
