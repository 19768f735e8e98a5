"""adaptive-spec keeps the speculative draft length K right from what the server itself does."""

__version__ = "0.1.0"
