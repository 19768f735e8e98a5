"""Checks of deploy/ that need no cluster, no container engine and no running systemd."""

from __future__ import annotations

import os
import re
import runpy
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml

from adaptive_spec.config.load import load_settings
from adaptive_spec.config.yaml_file import read_yaml

ROOT = Path(__file__).parents[2]
DEPLOY = ROOT / "deploy"
KUBERNETES = DEPLOY / "kubernetes"
KUBERNETES_VERSION = "1.31"
OPERATOR = "monitoring.coreos.com/v1"
DASHBOARDS = sorted((ROOT / "dashboards").glob("*.json"))
SECURITY_WORST = (1.5, 3.0)
"""Exposure of each of UNITS by systemd-analyze, 0 (none) to 10."""


def _tool(name: str) -> str | None:
    """A program beside our Python or on the path."""
    beside = Path(sys.executable).parent / name
    return str(beside) if beside.exists() else shutil.which(name)


def _run(*command: str | Path, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        list(map(str, command)), capture_output=True, text=True, check=False, env={**os.environ, **environment}, timeout=120
    )


def _needs(name: str, where: str) -> pytest.MarkDecorator:
    return pytest.mark.skipif(_tool(name) is None, reason=f"{name} ({where}) is not installed")


# -- all files -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", sorted(DEPLOY.rglob("*.y*ml")), ids=lambda p: str(p.relative_to(DEPLOY)))
def test_yaml_has_no_duplicate_key(path: Path, tmp_path: Path) -> None:
    documents = path.read_text().split("\n---\n")
    assert len(documents) == (2 if path.name == "services.yaml" else 1)
    for document in documents:
        (tmp_path / path.name).write_text(document)
        read_yaml(tmp_path / path.name)


@pytest.mark.parametrize("path", ["compose/adaptive-spec.yaml", "kubernetes/base/config.yaml", "kubernetes/fleet/config.yaml",
                                  "systemd/config.yaml"])  # fmt: skip
def test_configurations_are_the_sidecars(path: str) -> None:
    settings = load_settings(DEPLOY / path)
    assert settings.runtime_dir == Path("/run/adaptive-spec/run")
    assert settings.profile_dir == Path("/var/lib/adaptive-spec/profiles")
    assert (settings.host == "127.0.0.1") == path.startswith("systemd")
    assert settings.port == 9477
    assert (settings.profile_store is not None) == ("fleet" in path)


def test_no_secret_is_committed() -> None:
    paths = [path for path in DEPLOY.rglob("*") if path.is_file() and path.suffix not in (".py", ".pyc")]
    assert DEPLOY / "compose" / ".env.example" in paths
    for path in paths:
        assert not re.search(r"(?i)(?<![a-z])(password|token|secret)\s*[:=]\s*['\"]?\w", path.read_text()), path


# -- Docker and compose --------------------------------------------------------------------------------------------------


@_needs("hadolint", "the extra dev brings it on Linux x86-64")
@pytest.mark.parametrize("name", ["server", "sidecar", "vllm"])
def test_dockerfiles_pass_hadolint(name: str) -> None:
    result = _run(_tool("hadolint") or "", "--no-color", DEPLOY / "docker" / f"{name}.Dockerfile")
    assert (result.returncode, result.stdout) == (0, "")


@pytest.mark.parametrize("name", ["server", "sidecar", "vllm"])
def test_dockerfiles_copy_only_files_of_the_build_context(name: str) -> None:
    let = {line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    lines = (DEPLOY / "docker" / f"{name}.Dockerfile").read_text().splitlines()
    copied = [source for line in lines if line.startswith("COPY") and "--from" not in line for source in line.split()[1:-1]]
    assert "adaptive_spec" in copied
    for source in copied:
        assert source.removeprefix("./") in let, source
        assert list(ROOT.glob(source)), source


def test_the_sidecars_image_is_not_root() -> None:
    text = (DEPLOY / "docker" / "sidecar.Dockerfile").read_text()
    assert re.search(r"^USER 1000:1000$", text, re.MULTILINE)
    assert '"doctor", "--alive"' in text


COMPOSE_ENV = {"MODEL_PATH": "m", "DRAFT_MODEL_PATH": "d", "GRAFANA_ADMIN_PASSWORD": "p"}


@_needs("docker-compose", "the extra dev brings it on Linux x86-64")
def test_compose_file_is_valid() -> None:
    command = (_tool("docker-compose") or "", "--file", DEPLOY / "compose" / "compose.yaml")
    result = _run(*command, "config", **COMPOSE_ENV)
    assert result.returncode == 0, result.stderr
    assert result.stderr == ""
    services = yaml.safe_load(result.stdout)["services"]
    assert services.keys() == {"sglang", "sidecar", "prometheus", "alertmanager", "grafana"}
    for name, service in services.items():
        for port in service.get("ports", []):
            assert port["host_ip"] == "127.0.0.1", f"{name} is published beyond loopback"
        for volume in service.get("volumes", []):
            if volume["type"] == "bind" and Path(volume["source"]).parent.name != "dashboards":
                assert Path(volume["source"]).exists(), volume["source"]
    for name in ("sglang", "sidecar"):
        assert services[name]["user"] == "1000:1000"
        assert services[name]["cap_drop"] == ["ALL"]
        mounts = {volume["target"]: volume["source"] for volume in services[name]["volumes"]}
        assert mounts["/run/adaptive-spec"] == "runtime"
        assert Path(mounts["/etc/adaptive-spec/config.yaml"]).name == "adaptive-spec.yaml"
    missing = _run(*command, "config", **{**COMPOSE_ENV, "MODEL_PATH": ""})  # its exit status is 0 even so
    assert missing.stdout == ""
    assert "MODEL_PATH is missing a value: set it in .env" in missing.stderr


def test_env_example_has_the_variables_of_compose() -> None:
    wanted = set(re.findall(r"\$\{(\w+)", (DEPLOY / "compose" / "compose.yaml").read_text()))
    assert set(re.findall(r"^(\w+)=", (DEPLOY / "compose" / ".env.example").read_text(), re.MULTILINE)) == wanted


def test_grafana_finds_what_is_mounted() -> None:
    grafana = yaml.safe_load((DEPLOY / "compose" / "compose.yaml").read_text())["services"]["grafana"]
    targets = {volume.split(":")[1] for volume in grafana["volumes"]}
    dashboards = [volume.split(":")[0] for volume in grafana["volumes"] if "/dashboards/" in volume]
    provisioning = DEPLOY / "compose" / "grafana" / "provisioning"
    provider = yaml.safe_load((provisioning / "dashboards" / "adaptive-spec.yaml").read_text())["providers"][0]
    folder = Path(provider["options"]["path"])
    assert {folder / Path(path).name for path in dashboards} == {
        Path(target) for target in targets if Path(target).parent == folder
    }
    assert [Path(path).name for path in dashboards] == _listed_dashboards()
    source = yaml.safe_load((provisioning / "datasources" / "prometheus.yaml").read_text())["datasources"][0]
    assert source["url"] == "http://prometheus:9090"


@_needs("promtool", "Debian package prometheus; CI has it")
def test_prometheus_of_compose(tmp_path: Path) -> None:
    shutil.copy(DEPLOY / "compose" / "prometheus.yml", tmp_path)
    shutil.copytree(DEPLOY / "prometheus" / "rules", tmp_path / "rules")
    result = _run("promtool", "check", "config", tmp_path / "prometheus.yml")
    assert result.returncode == 0, result.stdout + result.stderr
    job = yaml.safe_load((tmp_path / "prometheus.yml").read_text())["scrape_configs"][0]
    assert "adaptive-spec" in job["job_name"]
    hosts = [target.partition(":")[0] for entry in job["static_configs"] for target in entry["targets"]]
    assert set(hosts) <= set(load_settings(DEPLOY / "compose" / "adaptive-spec.yaml").allowed_hosts)


# -- Kubernetes ----------------------------------------------------------------------------------------------------------


def _manifests(*folders: str) -> Iterator[tuple[str, dict[str, Any]]]:
    for folder in folders:
        for path in sorted((KUBERNETES / folder).glob("*.yaml")):
            for document in yaml.safe_load_all(path.read_text()):
                if path.name not in ("kustomization.yaml", "config.yaml", "store.yaml"):
                    yield f"{folder}/{path.name}", document


def _validate(document: dict[str, Any]) -> None:
    kubernetes_validate.validate(document, KUBERNETES_VERSION, strict=True)


def _one(kind: str, name: str, *folders: str) -> dict[str, Any]:
    return next(d for _, d in _manifests(*folders) if d["kind"] == kind and d["metadata"]["name"] == name)


def test_manifests_fit_their_schema() -> None:
    kinds = []
    for path, document in _manifests("base", "fleet", "monitoring"):
        if document["apiVersion"] != OPERATOR:  # no package has its schema
            try:
                _validate(document)
            except kubernetes_validate.ValidationError as error:
                raise AssertionError(f"{path}: {error.message} at {list(error.path)}") from error
        kinds.append(document["kind"])
    wanted = ["Deployment", "NetworkPolicy", "PersistentVolumeClaim", "PrometheusRule", "Service", "Service", "ServiceMonitor"]
    assert sorted(kinds) == wanted


def test_the_schema_finds_a_wrong_key() -> None:
    deployment = _one("Deployment", "sglang", "base")
    deployment["spec"]["template"]["spec"]["containers"][0]["resource"] = {}
    with pytest.raises(kubernetes_validate.ValidationError):
        _validate(deployment)


def test_pod_shares_memory_and_is_confined() -> None:
    pod = _one("Deployment", "sglang", "base")["spec"]["template"]["spec"]
    server, sidecar = pod["containers"]
    assert (server["name"], sidecar["name"]) == ("server", "sidecar")
    volumes = {volume["name"]: volume for volume in pod["volumes"]}
    settings = load_settings(KUBERNETES / "base" / "config.yaml")
    for container in (server, sidecar):
        mounts = {mount["name"]: mount["mountPath"] for mount in container["volumeMounts"]}
        assert mounts.keys() <= volumes.keys()
        assert settings.runtime_dir.parent == Path(mounts["runtime"]), "below the mount, which other users can write to"
        assert container["securityContext"]["allowPrivilegeEscalation"] is False
        assert container["securityContext"]["capabilities"] == {"drop": ["ALL"]}
        assert container["resources"]["requests"].keys() == {"cpu", "memory"}
        assert "memory" in container["resources"]["limits"]
    assert volumes["runtime"]["emptyDir"]["medium"] == "Memory"
    assert pod["securityContext"]["runAsNonRoot"] is True
    assert {"startupProbe", "readinessProbe", "livenessProbe"} <= server.keys()
    assert "livenessProbe" in sidecar
    assert "readinessProbe" not in sidecar, "a sidecar that ended must not make the pod unready"


def test_selectors_and_ports_match() -> None:
    name = {"app.kubernetes.io/name": "adaptive-spec"}  # which kustomize adds
    pod = _one("Deployment", "sglang", "base")["spec"]["template"]
    ports = {port["name"]: port["containerPort"] for c in pod["spec"]["containers"] for port in c["ports"]}
    assert ports == {"http": 30000, "metrics": load_settings(KUBERNETES / "base" / "config.yaml").port}
    for service_name in ("sglang", "adaptive-spec-sidecar"):
        service = _one("Service", service_name, "base")
        assert service["spec"]["selector"].items() <= pod["metadata"]["labels"].items()
        assert {port["targetPort"] for port in service["spec"]["ports"]} <= ports.keys()
    policy = _one("NetworkPolicy", "adaptive-spec", "base")["spec"]
    assert policy["podSelector"]["matchLabels"].items() <= pod["metadata"]["labels"].items()
    assert {port["port"] for rule in policy["ingress"] for port in rule["ports"]} == ports.keys()
    monitor = _one("ServiceMonitor", "adaptive-spec", "monitoring")["spec"]
    sidecar = _one("Service", "adaptive-spec-sidecar", "base")
    labels = sidecar["metadata"]["labels"] | name
    assert monitor["selector"]["matchLabels"].items() <= labels.items()
    assert {e["port"] for e in monitor["endpoints"]} <= {port["name"] for port in sidecar["spec"]["ports"]}
    assert "adaptive-spec" in labels[monitor["jobLabel"]], "the job name that the alerts match"


def test_prometheus_rule_is_current() -> None:
    made = runpy.run_path(str(KUBERNETES / "rules.py"))["prometheus_rule"]()
    assert (KUBERNETES / "monitoring" / "prometheus-rule.yaml").read_text() == made, "run `make manifests`"


@_needs("promtool", "Debian package prometheus; CI has it")
def test_prometheus_rule_holds_the_rules(tmp_path: Path) -> None:
    spec = _one("PrometheusRule", "adaptive-spec", "monitoring")["spec"]
    (tmp_path / "rules.yaml").write_text(yaml.safe_dump(spec))
    result = _run("promtool", "check", "rules", tmp_path / "rules.yaml")
    assert result.returncode == 0, result.stdout + result.stderr
    files = [yaml.safe_load(path.read_text()) for path in sorted((DEPLOY / "prometheus" / "rules").glob("*.yaml"))]
    assert spec["groups"] == [group for file in files for group in file["groups"]]


def _listed_dashboards() -> list[str]:
    files: list[str] = yaml.safe_load((ROOT / "dashboards" / "kustomization.yaml").read_text())["configMapGenerator"][0]["files"]
    return files


def test_dashboards_config_map_has_them_all() -> None:
    assert DASHBOARDS
    assert _listed_dashboards() == [path.name for path in DASHBOARDS]
    assert sum(path.stat().st_size for path in DASHBOARDS) < 1 << 20, "limit of a ConfigMap"


@_needs("kubectl", "or CI of your own")
@pytest.mark.parametrize("folder", ["base", "fleet", "monitoring"])
def test_kustomize_builds(folder: str) -> None:
    result = _run(_tool("kubectl") or "", "kustomize", KUBERNETES / folder)
    assert (result.returncode, result.stderr) == (0, "")
    documents = {
        (d["kind"], re.sub(r"-[bcdfghkmt2456789]{10}$", "", d["metadata"]["name"])): d for d in yaml.safe_load_all(result.stdout)
    }
    for document in documents.values():
        if document["apiVersion"] != OPERATOR:
            _validate(document)
    if folder == "monitoring":
        assert documents["ConfigMap", "adaptive-spec-dashboards"]["metadata"]["labels"]["grafana_dashboard"] == "1"
        return
    deployment = documents["Deployment", "sglang"]
    spec = deployment["spec"]["template"]["spec"]
    used = {volume["configMap"]["name"] for volume in spec["volumes"] if "configMap" in volume}
    assert used == {document["metadata"]["name"] for (_, name), document in documents.items() if name == "adaptive-spec"
                    and document["kind"] == "ConfigMap"}  # fmt: skip
    config = documents["ConfigMap", "adaptive-spec"]["data"]["config.yaml"]
    assert ("profile_store" in config) == (folder == "fleet")
    sidecar = next(container for container in spec["containers"] if container["name"] == "sidecar")
    mounts = {mount["mountPath"] for mount in sidecar["volumeMounts"]}
    assert ("/profile-store" in mounts) == (folder == "fleet")
    assert len(mounts) == 4 + (folder == "fleet"), "the patch adds a mount and removes none"
    assert deployment["spec"]["replicas"] == (2 if folder == "fleet" else 1)


# -- systemd -------------------------------------------------------------------------------------------------------------

UNITS = ("adaptive-spec-sidecar.service", "sglang-adaptive-spec.service")


@pytest.fixture
def units(tmp_path: Path) -> Path:
    """The units with programs that exist on this machine, because `systemd-analyze verify` checks for them."""
    for name in UNITS:
        text = (DEPLOY / "systemd" / name).read_text()
        (tmp_path / name).write_text(re.sub(r"^(ExecStart=)\S+", r"\1/bin/true", text, flags=re.MULTILINE))
    return tmp_path


@_needs("systemd-analyze", "Debian package systemd")
@pytest.mark.parametrize("name", UNITS)
def test_units_verify(units: Path, name: str) -> None:
    result = _run("systemd-analyze", "verify", "--man=no", units / name)
    ours = [line for line in result.stderr.splitlines() if name in line]
    assert (result.returncode, ours) == (0, []), result.stderr


@_needs("systemd-analyze", "Debian package systemd")
@pytest.mark.parametrize(("name", "worst"), list(zip(UNITS, SECURITY_WORST, strict=True)))
def test_units_are_confined(units: Path, name: str, worst: float) -> None:
    result = _run("systemd-analyze", "security", "--offline=true", f"--threshold={int(10 * worst)}", units / name)
    assert result.returncode == 0, result.stdout[-400:] + result.stderr


def test_units_use_the_folders_of_the_configuration() -> None:
    settings = load_settings(DEPLOY / "systemd" / "config.yaml")
    for name in UNITS:
        text = (DEPLOY / "systemd" / name).read_text()
        assert f"RuntimeDirectory={settings.runtime_dir.parent.name}\n" in text
        assert f"StateDirectory={settings.profile_dir.parent.name}\n" in text
        assert "--config /etc/adaptive-spec/config.yaml" in text
        assert "User=sglang" in text
