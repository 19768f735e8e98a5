"""The policies of `adaptive-spec bench`, by name."""

from __future__ import annotations

from collections.abc import Callable

from adaptive_spec.engines.simulated.ablation import PREFIX, AdaptiveWithout, Part
from adaptive_spec.engines.simulated.adaptive import Adaptive, Profile
from adaptive_spec.engines.simulated.decider import Decider, Static
from adaptive_spec.engines.simulated.oracle import Oracle
from adaptive_spec.engines.simulated.peers.goodput_bandit import GoodputBandit
from adaptive_spec.engines.simulated.peers.offline_files import OfflineFiles
from adaptive_spec.engines.simulated.peers.reference import Reference
from adaptive_spec.engines.simulated.peers.sglang_ema import SglangEma
from adaptive_spec.engines.simulated.peers.startup_profile import CaptureTable, StartupProfile
from adaptive_spec.engines.simulated.scenario import Scenario
from adaptive_spec.engines.simulated.server import SimulatedServer
from adaptive_spec.errors import BadInput

PEERS: dict[str, Callable[[Scenario, int], Decider]] = {
    "ema": lambda scenario, seed: SglangEma(scenario, wide=False),
    "ema-wide": lambda scenario, seed: SglangEma(scenario, wide=True),
    "startup-profile": StartupProfile,
    "capture-table": CaptureTable,
    "reference": Reference,
    "offline-files": OfflineFiles,
    "goodput-bandit": GoodputBandit,
}
ABLATIONS = tuple(f"{PREFIX}{part}" for part in Part)
GROUPS = {"peers": tuple(PEERS), "ablations": ABLATIONS}
WARM_S = 60.0


def policy_names(asked: str, scenario: Scenario) -> list[str]:
    """The names in `asked`, with groups ("static", "peers", "ablations") expanded. Raises BadInput for an unknown name."""
    statics = tuple(f"static-{k}" for k in range(scenario.max_k + 1))
    groups = {**GROUPS, "static": statics}
    single = ("adaptive", "oracle", *statics, *PEERS, *ABLATIONS)
    found: list[str] = []
    for name in (part.strip() for part in asked.split(",")):
        if name in groups:
            found += groups[name]
        elif name in single:
            found.append(name)
        else:
            known = ", ".join(["adaptive", "oracle", "static", f"static-0 .. {statics[-1]}", *PEERS, "peers", "ablations"])
            raise BadInput(f"--policies: must be of {known}, got {name!r}")
    return list(dict.fromkeys(found))


def build(name: str, scenario: Scenario, server: SimulatedServer, seed: int, warm: bool = False) -> Decider:
    """Make the decider of a name from `policy_names`. warm: let `adaptive` start from a profile."""
    if name == "adaptive":
        return Adaptive(scenario, profile=first_phase_profile(scenario, seed) if warm else None)
    if name == "oracle":
        return Oracle(server)
    if name in PEERS:
        return PEERS[name](scenario, seed)
    if name in ABLATIONS:
        return AdaptiveWithout(scenario, Part(name.removeprefix(PREFIX)))
    return Static(int(name.removeprefix("static-")))


def first_phase_profile(scenario: Scenario, seed: int) -> Profile:
    """Profile of a cold run of the scenario's first phase, at most a minute of it, on other requests; used by --warm."""
    end_s = min([*scenario.phase_starts[1:2], scenario.file.duration_s, WARM_S])
    learnt = Adaptive(scenario)
    SimulatedServer(scenario, seed + 1_000_003).run(learnt, end_s)
    return learnt.controller.latency_state(), learnt.controller.calibration_state()
