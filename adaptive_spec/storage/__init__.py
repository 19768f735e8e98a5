"""Files: archives, profiles and the store they are shared in, traces."""
