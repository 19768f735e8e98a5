"""Chooses the draft length K of speculative decoding from measurements of the running server."""

__version__ = "0.1.0"
