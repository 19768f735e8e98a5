"""`python -m adaptive_spec.cli` is `adaptive-spec`."""

from adaptive_spec.cli.main import main

main()
