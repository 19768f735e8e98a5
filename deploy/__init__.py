"""Deployment files: Prometheus, Docker, Kubernetes, systemd; and `make stack`, which runs the monitoring on this machine."""
