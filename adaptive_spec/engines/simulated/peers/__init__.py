"""What people would otherwise use: small, honest versions of other ways to choose K, each saying what it stands for."""
