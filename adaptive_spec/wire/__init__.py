"""What crosses the process boundary, with its layout documented beside the code: records, policies, the engine's report.

Runs in the engine's process: numpy and the standard library only.
"""
