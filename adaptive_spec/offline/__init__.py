"""Work on recorded data: fit models, replay a trace, choose draft lengths to capture. Pure, but for files the caller names."""
