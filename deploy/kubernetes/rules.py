"""Prints deploy/prometheus/rules/*.yaml as a PrometheusRule of the Prometheus operator; used by `make manifests`."""

from __future__ import annotations

import sys
from pathlib import Path

import yaml

RULES = Path(__file__).parent.parent / "prometheus" / "rules"


class _Dumper(yaml.SafeDumper):
    """Writes texts of several lines, such as expressions, as blocks."""


_Dumper.add_representer(
    str, lambda dumper, text: dumper.represent_scalar("tag:yaml.org,2002:str", text, style="|" if "\n" in text else None)
)


def prometheus_rule() -> str:
    """Return the manifest as YAML, with the groups of all files, sorted by file name."""
    groups = [group for path in sorted(RULES.glob("*.yaml")) for group in yaml.safe_load(path.read_text())["groups"]]
    manifest = {
        "apiVersion": "monitoring.coreos.com/v1",
        "kind": "PrometheusRule",
        "metadata": {"name": "adaptive-spec"},
        "spec": {"groups": groups},
    }
    text = yaml.dump(manifest, Dumper=_Dumper, sort_keys=False, width=130, allow_unicode=True)
    return "# Made by `make manifests` from deploy/prometheus/rules; do not edit.\n" + text


if __name__ == "__main__":
    sys.stdout.write(prometheus_rule())
