"""Other policies to compare with: small implementations of existing ways to choose K, each named in its module."""
