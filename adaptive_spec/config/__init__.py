"""The sidecar's configuration: its settings, and reading them from YAML."""
