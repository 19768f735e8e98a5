"""What runs adaptive-spec: configuration of Prometheus and Alertmanager, and `make stack` that starts all of it here."""
