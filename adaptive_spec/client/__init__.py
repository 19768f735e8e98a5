"""HTTP clients: of the sidecar's control interface and of an SGLang server."""
