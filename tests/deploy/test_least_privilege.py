"""Units, compose file and manifests allow no more than is needed: a file with any of these lines taken out is found to.

What a container or a unit really confines is checked by `make images` and, for the system calls of the sidecar, below.
"""

from __future__ import annotations

import copy
import json
import re
import shutil
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.support.numbers_engine import NumbersEngine
from tests.support.processes import PATIENCE_S, wait_for

DEPLOY = Path(__file__).parents[2] / "deploy"
UNITS = ("adaptive-spec-sidecar", "sglang-adaptive-spec")
OURS = ("sidecar",)
ENGINES = ("sglang", "vllm")
OTHERS = ("prometheus", "alertmanager", "grafana")

needs_systemd = pytest.mark.skipif(
    shutil.which("systemd-analyze") is None, reason="systemd-analyze (Debian package systemd) is not installed"
)
needs_strace = pytest.mark.skipif(shutil.which("strace") is None, reason="strace (Debian package strace) is not installed")


# -- systemd -------------------------------------------------------------------------------------------------------------


def _unit(name: str) -> str:
    return re.sub(r"^(ExecStart=)\S+", r"\1/bin/true", (DEPLOY / "systemd" / f"{name}.service").read_text(), flags=re.MULTILINE)


def _restrictions(name: str) -> list[str]:
    """The lines of a unit from UMask on."""
    service = _unit(name).partition("UMask=")
    lines = (service[1] + service[2].partition("[Install]")[0]).splitlines()
    return [line for line in lines if line and not line.startswith("#")]


def _exposure(text: str, folder: Path) -> float:
    """What systemd-analyze makes of a unit: 0 (none) to 10, the sum of its weighted findings."""
    path = folder / "x.service"
    path.write_text(text)
    command = ["systemd-analyze", "security", "--offline=true", "--json=short", str(path)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert result.stdout, result.stderr
    return sum(float(finding["exposure"] or 0.0) for finding in json.loads(result.stdout))


PERMISSIONS = ("IPAddressAllow=", "SystemCallFilter=mbind setpriority", "SystemCallErrorNumber=")
"""Lines that allow something or say how a refusal looks; `test_the_sidecar_makes_do` shows what of them is needed."""


@needs_systemd
@pytest.mark.parametrize(("name", "line"), [(name, line) for name in UNITS for line in _restrictions(name)])
def test_each_line_of_a_unit_restricts(name: str, line: str, tmp_path: Path) -> None:
    text = _unit(name)
    without = text.replace(f"\n{line}\n", "\n", 1)
    assert without != text
    if line.startswith(PERMISSIONS):
        assert _exposure(without, tmp_path) <= _exposure(text, tmp_path)
    else:
        assert _exposure(without, tmp_path) > _exposure(text, tmp_path)


def test_the_units_limit_what_is_used() -> None:
    sidecar = _unit("adaptive-spec-sidecar")
    for line in (
        "MemoryMax=512M",
        "TasksMax=64",
        "CPUQuota=100%",
        "RuntimeDirectoryMode=0700",
        "StateDirectoryMode=0700",
        "User=sglang",
    ):
        assert f"\n{line}\n" in sidecar
    server = _unit("sglang-adaptive-spec")
    for line in ("RuntimeDirectoryMode=0700", "StateDirectoryMode=0700", "User=sglang"):
        assert f"\n{line}\n" in server
    # With it the unit has a list of devices, and the GPU is not on it.
    assert "\nProtectClock=" not in server
    assert "\nPrivateDevices=" not in server


@cache
def _group(name: str) -> frozenset[str]:
    """System calls of a group of systemd, with those of the groups in it."""
    found: set[str] = set()
    for line in subprocess.run(
        ["systemd-analyze", "syscall-filter", name], capture_output=True, text=True, check=True
    ).stdout.splitlines()[1:]:
        word = line.strip()
        found |= _group(word) if word.startswith("@") else {word} if word and not word.startswith("#") else set()
    return frozenset(found)


def _allowed_calls(filters: list[str]) -> set[str]:
    """What SystemCallFilter= lines allow, in their order."""
    allowed: set[str] = set()
    for line in filters:
        named = {call for word in line.removeprefix("~").split() for call in (_group(word) if word.startswith("@") else {word})}
        allowed = allowed - named if line.startswith("~") else allowed | named
    return allowed


@pytest.fixture(scope="module")
def traced(tmp_path_factory: pytest.TempPathFactory) -> str:
    """All system calls of a sidecar: it attaches, sweeps, writes a profile with its pictures, answers, stops."""
    home = tmp_path_factory.mktemp("traced")
    runtime, trace = home / "run", home / "trace"
    engine = NumbersEngine(runtime)
    command = [
        "strace",
        "-f",
        "-qq",
        "-o",
        str(trace),
        sys.executable,
        "-B",
        "-m",
        "adaptive_spec.cli",
        "sidecar",
        "--runtime-dir",
        str(runtime),
    ]
    command += ["--profile-dir", str(home / "profiles"), "--port", "0"]
    log = (home / "log").open("wb")
    process = subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True)
    try:
        address: dict[str, Any] = wait_for(lambda: _json(runtime / "sidecar.json"), "the sidecar to serve")

        def drawn() -> bool:
            for _ in range(20):
                engine.step()
            time.sleep(0.01)
            return bool(list(home.glob("profiles/*/plots/*.png")))

        wait_for(drawn, "the sidecar to draw the profile")
        for path in ("/metrics", "/status.json", "/"):
            with urllib.request.urlopen(address["url"] + path, timeout=PATIENCE_S) as answer:
                assert answer.read()
        subprocess.run(["kill", "-TERM", str(address["pid"])], check=True)
        assert process.wait(PATIENCE_S) == 0
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGKILL)
            process.wait()
        engine.close()
        log.close()
    return trace.read_text(errors="replace").replace(str(home), "HOME")


def _json(path: Path) -> Any:
    try:
        return json.loads(path.read_bytes())
    except (OSError, ValueError):
        return None


@needs_strace
@needs_systemd
def test_the_sidecar_makes_do_with_its_system_calls(traced: str) -> None:
    used = set(re.findall(r"^\d+ +(\w+)\(", traced, re.MULTILINE))
    filters = re.findall(r"^SystemCallFilter=(.+)$", _unit("adaptive-spec-sidecar"), re.MULTILINE)
    assert len(used) > 40
    assert used - _allowed_calls(filters) == set()
    assert used - _allowed_calls(filters[:-1]) == {"mbind", "setpriority"}, "each call that is allowed again is needed"


@needs_strace
def test_the_sidecar_makes_do_with_its_addresses_and_memory(traced: str) -> None:
    allowed = re.findall(r"^RestrictAddressFamilies=(.+)$", _unit("adaptive-spec-sidecar"), re.MULTILINE)[0].split()
    assert set(re.findall(r"socket(?:pair)?\((AF_\w+)", traced)) == {"AF_INET", "AF_UNIX"} <= set(allowed)
    assert not re.findall(r"connect\(\d+, \{sa_family=AF_INET6?, .*", traced), "nothing to connect to without Grafana and store"
    assert not re.findall(r"(?:mmap|mprotect)\(.*PROT_WRITE\|PROT_EXEC", traced), "MemoryDenyWriteExecute="
    assert not re.findall(r"mprotect\(.*PROT_EXEC", traced), "MemoryDenyWriteExecute="


@needs_strace
def test_the_sidecar_writes_to_its_folders_only(traced: str) -> None:
    """ProtectSystem=strict and a read-only root: runtime_dir, profile_dir, a font cache below /tmp, and /dev/null."""
    written = set(re.findall(r'openat\([^"]*"([^"]+)", [^)]*O_(?:WRONLY|RDWR|CREAT)[^)]*\) = \d', traced))
    written |= set(re.findall(r'(?:mkdir|rename|link|unlink)\("([^"]+)"[^)]*\) = 0', traced))
    assert any(path.startswith("HOME/run/") for path in written)
    assert any(path.startswith("HOME/profiles/") for path in written)
    others = {path for path in written if not path.startswith(("HOME/run", "HOME/profiles", "/tmp", "/dev/null", "/dev/shm/"))}
    assert {path for path in others if "matplotlib" not in path} == set()


# -- compose -------------------------------------------------------------------------------------------------------------


@pytest.fixture
def compose() -> dict[str, Any]:
    document: dict[str, Any] = yaml.safe_load((DEPLOY / "compose" / "compose.yaml").read_text())
    return document


def service_faults(name: str, service: dict[str, Any]) -> list[str]:
    """What a service may do beyond what it needs."""
    found = []
    if service.get("security_opt") != ["no-new-privileges:true"]:
        found.append("security_opt: no-new-privileges alone, and the seccomp profile of the container engine")
    if service.get("cap_drop") != ["ALL"] or "cap_add" in service:
        found.append("cap_drop: ALL")
    if re.match(r"[1-9]\d*:\d+$", str(service.get("user", ""))) is None:
        found.append("user: not root")
    # Processes of one user in one PID namespace read and change each other's files, memory and environment by /proc.
    found += [key for key in ("privileged", "devices", "ipc", "pid", "userns_mode", "cgroup") if key in service]
    if name not in ENGINES:
        if service.get("read_only") is not True:
            found.append("read_only")
        found += [key for key in ("mem_limit", "pids_limit") if key not in service]
    found += [
        f"tmpfs: {entry} has no size" for entry in service.get("tmpfs", []) if ":size=" not in entry and ",size=" not in entry
    ]
    wanted = "serving" if name in ENGINES else "monitoring"
    if "network_mode" in service or service.get("networks") != [wanted]:
        found.append(f"networks: {wanted} alone")
    found += [f"ports: {port} beyond loopback" for port in service.get("ports", []) if not port.startswith("127.0.0.1:")]
    for volume in service.get("volumes", []):
        source, _, options = volume.partition(":")
        if source.startswith((".", "/")) and not (options.endswith(":ro") and source.startswith(".")):
            found.append(f"volumes: {volume}: files of the host only from here, and read-only")
    return found


def test_services_of_compose_have_no_more_than_they_need(compose: dict[str, Any]) -> None:
    assert compose["services"].keys() == {*OURS, *ENGINES, *OTHERS}
    for name, service in compose["services"].items():
        assert service_faults(name, service) == [], name
    assert set(compose["networks"]) == {"serving", "monitoring"}


CONFINING = ("security_opt", "cap_drop", "user", "read_only", "mem_limit", "pids_limit", "networks")
WIDER: tuple[tuple[str, Any], ...] = (
    ("privileged", True), ("cap_add", ["SYS_ADMIN"]), ("pid", "host"), ("pid", "service:sglang"), ("network_mode", "host"),
    ("ports", ["9477:9477"]), ("volumes", ["/var/run/docker.sock:/s:ro"]), ("user", "0:0"), ("tmpfs", ["/x"]),
    ("security_opt", ["no-new-privileges:true", "seccomp=unconfined"]),
)  # fmt: skip


def test_each_line_of_a_service_counts(compose: dict[str, Any]) -> None:
    tried = 0
    for name, service in compose["services"].items():
        for key in CONFINING:
            if key in service:
                without = {k: v for k, v in service.items() if k != key}
                assert service_faults(name, without), f"{name}: {key}"
                tried += 1
        for key, value in WIDER:
            assert service_faults(name, {**service, key: value}), f"{name}: {key}"
    assert tried > 30


def test_volumes_in_memory_are_private_and_bounded(compose: dict[str, Any]) -> None:
    options = compose["volumes"]["runtime"]["driver_opts"]["o"].split(",")
    assert {"mode=0700", "uid=1000", "gid=1000", "size=256m", "nosuid", "nodev", "noexec"} == set(options)


# -- Kubernetes ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def pod() -> dict[str, Any]:
    deployment = yaml.safe_load((DEPLOY / "kubernetes" / "base" / "deployment.yaml").read_text())
    spec: dict[str, Any] = deployment["spec"]["template"]["spec"]
    return spec


IDS = ("runAsUser", "runAsGroup", "fsGroup")


def pod_faults(pod: dict[str, Any]) -> list[str]:
    """What a pod may do beyond the Pod Security Standard "restricted", and some more."""
    found: list[str] = [
        key
        for key in (
            "hostNetwork",
            "hostPID",
            "hostIPC",
            "shareProcessNamespace",
            "initContainers",
            "ephemeralContainers",
            "serviceAccountName",
        )
        if key in pod
    ]
    found += [
        f"{key}: must be false" for key in ("automountServiceAccountToken", "enableServiceLinks") if pod.get(key) is not False
    ]
    security = pod.get("securityContext", {})
    if security.get("runAsNonRoot") is not True or {security.get(key) for key in IDS} != {1000}:
        found.append("securityContext: not root")
    if security.get("seccompProfile") != {"type": "RuntimeDefault"}:
        found.append("seccompProfile: RuntimeDefault")
    for volume in pod["volumes"]:
        kinds = volume.keys() - {"name"}
        if not kinds <= {"configMap", "emptyDir", "persistentVolumeClaim", "secret", "projected"}:
            found.append(f"volume {volume['name']}: {kinds}")
        if volume.get("emptyDir", {}).get("medium") == "Memory" and "sizeLimit" not in volume["emptyDir"]:
            found.append(f"volume {volume['name']}: has no size")
    for container in pod["containers"]:
        name, own = container["name"], container.get("securityContext", {})
        if own.get("allowPrivilegeEscalation") is not False or own.get("capabilities") != {"drop": ["ALL"]}:
            found.append(f"{name}: privileges")
        if own.keys() & {"privileged", "procMount", "runAsUser", "seccompProfile"}:
            found.append(f"{name}: securityContext")
        if "memory" not in container["resources"].get("limits", {}):
            found.append(f"{name}: memory")
        if any("hostPort" in port for port in container["ports"]):
            found.append(f"{name}: hostPort")
        mounts = {mount["name"]: mount for mount in container["volumeMounts"]}
        if mounts["config"].get("readOnly") is not True or mounts.get("models", {"readOnly": True}).get("readOnly") is not True:
            found.append(f"{name}: readOnly")
        if name == "sidecar":
            if own.get("readOnlyRootFilesystem") is not True:
                found.append("sidecar: root")
            if mounts.keys() != {"config", "runtime", "profiles", "sidecar-tmp"}:
                found.append("sidecar: volumes")
            if "cpu" not in container["resources"].get("limits", {}):
                found.append("sidecar: cpu")
    return found


def _without(document: Any, at: tuple[str | int, ...] = ()) -> Iterator[tuple[tuple[str | int, ...], Any]]:
    """(place, document without what is there) for every key and entry, at every depth."""
    part = document
    for step in at:
        part = part[step]
    for step in list(part) if isinstance(part, dict) else range(len(part)) if isinstance(part, list) else ():
        changed = copy.deepcopy(document)
        inner = changed
        for outer in at:
            inner = inner[outer]
        del inner[step]
        yield (*at, step), changed
        yield from _without(document, (*at, step))


CONFINING_KEYS = {
    "automountServiceAccountToken", "enableServiceLinks", "runAsNonRoot", "runAsUser", "runAsGroup", "fsGroup", "seccompProfile",
    "allowPrivilegeEscalation", "readOnlyRootFilesystem", "capabilities", "drop", "sizeLimit", "limits",
}  # fmt: skip


def test_the_pod_has_no_more_than_it_needs(pod: dict[str, Any]) -> None:
    assert pod_faults(pod) == []


def test_each_line_of_the_pod_counts(pod: dict[str, Any]) -> None:
    tried = set()
    for place, changed in _without(pod):
        if place[-1] in CONFINING_KEYS:
            index = place[1] if place[0] == "volumes" else None
            if isinstance(index, int) and pod["volumes"][index].get("emptyDir", {}).get("medium") != "Memory":
                continue  # a size on disk is for the node, not for security
            assert pod_faults(changed), place
            tried.add(place[-1])
    assert tried == CONFINING_KEYS
    for key, value in (
        ("hostPID", True),
        ("shareProcessNamespace", True),
        ("hostNetwork", True),
        ("serviceAccountName", "admin"),
        ("automountServiceAccountToken", True),
    ):
        assert pod_faults({**pod, key: value})


def network_faults(policy: dict[str, Any]) -> list[str]:
    """Whom the pod talks to beyond: this namespace on http, monitoring on metrics, and the name service."""
    found = []
    if sorted(policy.get("policyTypes", [])) != ["Egress", "Ingress"]:
        found.append("policyTypes")
    if policy.get("podSelector") != {"matchLabels": {"app.kubernetes.io/component": "server"}}:
        found.append("podSelector")
    rules = [(rule.get("from"), [port.get("port") for port in rule.get("ports", [])]) for rule in policy.get("ingress", [])]
    monitoring = {"namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": "monitoring"}}}
    if rules != [([{"podSelector": {}}], ["http"]), ([monitoring], ["metrics"])]:
        found.append("ingress")
    egress = policy.get("egress", [])
    names = {
        "namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": "kube-system"}},
        "podSelector": {"matchLabels": {"k8s-app": "kube-dns"}},
    }
    if [rule.get("to") for rule in egress] != [[names]] or {
        port.get("port") for rule in egress for port in rule.get("ports", [])
    } != {53}:
        found.append("egress")
    return found


def test_the_network_policy_lets_nobody_else_in_or_out() -> None:
    policy = yaml.safe_load((DEPLOY / "kubernetes" / "base" / "networkpolicy.yaml").read_text())["spec"]
    assert network_faults(policy) == []
    for place, changed in _without(policy):
        if place[-1] != "protocol" and place[:3] != ("egress", 0, "ports"):  # without a port of two it allows less
            assert network_faults(changed), place


def test_the_sidecars_volumes_are_bounded(pod: dict[str, Any]) -> None:
    sizes = {volume["name"]: volume["emptyDir"].get("sizeLimit") for volume in pod["volumes"] if "emptyDir" in volume}
    assert {name: sizes[name] for name in ("runtime", "sidecar-tmp", "profiles")} == {
        "runtime": "256Mi",
        "sidecar-tmp": "64Mi",
        "profiles": "256Mi",
    }
