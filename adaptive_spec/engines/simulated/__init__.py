"""A simulated server: a step-level model in virtual time, from measured latency curves, with a known optimum.

For benchmarks of hours of drift in seconds. It is fed no prompt and runs no model; everything it prints says "simulated".
"""
