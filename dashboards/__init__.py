"""Grafana dashboards, made by code: `make dashboards` writes the JSON files of this folder."""
