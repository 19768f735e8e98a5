"""The terms of the problem: policy, step record, survival, staircase, and the search of a step's plans.

No I/O, no clock; imports numpy and the standard library only, because the engine's process uses it too.
"""
