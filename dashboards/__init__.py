"""Grafana dashboards, built by code: `make dashboards` writes the JSON files of this folder."""
