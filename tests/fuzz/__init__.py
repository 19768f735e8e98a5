"""Fuzzing of everything that is read from outside the process: `make fuzz`. See docs/security.md."""
