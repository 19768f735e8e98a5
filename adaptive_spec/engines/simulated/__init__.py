"""A simulated server: a step-level model in virtual time, from measured latency curves, with a known optimum.

For benchmarks of hours of drift in seconds. It needs neither prompts nor a model. All its output is marked "simulated".
"""
