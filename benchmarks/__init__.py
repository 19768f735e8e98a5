"""Benchmarks: `make bench` runs them all and prints figures beside what must be reached."""
