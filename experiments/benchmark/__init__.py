"""Speed, measured and raced: `python -m experiments.benchmark --help`."""
