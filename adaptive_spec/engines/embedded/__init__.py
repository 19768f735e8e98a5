"""The embedded engine: a small speculative decoder in PyTorch, with trained models and prompts that ship with the package."""
