"""Results of a run: by phase, in total, and relative to the oracle's run of the same scenario."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from adaptive_spec.engines.simulated.scenario import Scenario

WINDOW_STEPS = 50
GOOD = 0.95
"""A phase is good after the first window of WINDOW_STEPS steps whose goodput reaches this share of the oracle's."""


@dataclass
class Phase:
    """The steps between two events. tokens, seconds: of the steps begun in it. good_after: decode steps until the
    50-step mean of the chosen plans' expected goodput reached 95 % of the oracle's in the same states, None if never.
    expected_tokens, expected_s: what the chosen plans gave and took in expectation, without noise of acceptance or time.
    """

    at_s: float
    tokens: int = 0
    seconds: float = 0.0
    steps: int = 0
    good_after: int | None = None
    expected_tokens: float = 0.0
    expected_s: float = 0.0
    _chosen: list[float] = field(default_factory=list, repr=False)
    _best: list[float] = field(default_factory=list, repr=False)

    @property
    def goodput(self) -> float:
        """Tokens per simulated second, 0 when no step began in it."""
        return self.tokens / self.seconds if self.seconds > 0.0 else 0.0

    def expect(self, tokens: float, seconds: float) -> None:
        """Count one step's expected output and time."""
        self.expected_tokens += tokens
        self.expected_s += seconds

    def compare(self, chosen: float, best: float) -> None:
        """Count one step's expected goodput beside the oracle's."""
        self._chosen.append(chosen)
        self._best.append(best)
        if len(self._best) >= WINDOW_STEPS:
            if sum(self._chosen[-WINDOW_STEPS:]) >= GOOD * sum(self._best[-WINDOW_STEPS:]):
                self.good_after = self.steps
            if len(self._best) >= 20 * WINDOW_STEPS:
                del self._chosen[: -WINDOW_STEPS + 1], self._best[: -WINDOW_STEPS + 1]


@dataclass(frozen=True)
class Run:
    """One policy in one scenario. probe_share: share of decode time lost to trials, None where it is not known.
    failures: calls inside the policy that raised and were caught. k_switches: changes of the K that was run. limited_steps: steps
    that ran another K than asked for, because the server does not run that one at their batch size.
    """

    tokens: int
    seconds: float
    steps: int
    swaps: int
    phases: tuple[Phase, ...]
    probe_share: float | None = None
    failures: int = 0
    k_switches: int = 0
    limited_steps: int = 0

    @property
    def goodput(self) -> float:
        """Tokens per simulated second."""
        return self.tokens / self.seconds

    @property
    def expected_goodput(self) -> float:
        """Expected tokens per expected second of the plans that were run: goodput without the noise of single steps."""
        return sum(phase.expected_tokens for phase in self.phases) / sum(phase.expected_s for phase in self.phases)


@dataclass(frozen=True)
class Result:
    """Runs of one scenario by policy, in the order given. oracle: the reference, also when it was not among the policies."""

    scenario: Scenario
    runs: dict[str, Run]
    oracle: Run

    def document(self, expected: bool = False) -> dict[str, Any]:
        """The scenario's part of `--json`. expected: with the efficiency by expected goodput of each policy."""
        policies = {name: self._policy(run) for name, run in self.runs.items()}
        if expected:
            for name, run in self.runs.items():
                policies[name]["expected_efficiency"] = self.expected_efficiency(run)
        return {"name": self.scenario.name, "granularity": self.scenario.file.granularity, "policies": policies}

    def efficiency(self, run: Run, phase: int | None = None) -> float:
        """Goodput over the oracle's, of the whole run or of one phase."""
        if phase is None:
            return run.goodput / self.oracle.goodput
        own, best = run.phases[phase].goodput, self.oracle.phases[phase].goodput
        return own / best if best > 0.0 else 0.0

    def expected_efficiency(self, run: Run) -> float:
        """Expected goodput of the plans that were run over that of the oracle's."""
        return run.expected_goodput / self.oracle.expected_goodput

    def _policy(self, run: Run) -> dict[str, Any]:
        file = self.scenario.file
        limited = file.k_by_batch is not None or file.latency.k_switch_ms > 0.0
        switching = {"k_switches": run.k_switches, "limited_steps": run.limited_steps} if limited else {}
        return {
            "goodput_tokens_per_s": run.goodput,
            "efficiency": self.efficiency(run),
            "swaps": run.swaps,
            "steps": run.steps,
            **switching,
            "phases": [
                {
                    "at_s": phase.at_s,
                    "goodput_tokens_per_s": phase.goodput,
                    "efficiency": self.efficiency(run, index),
                    "steps_to_95pct": phase.good_after,
                }
                for index, phase in enumerate(run.phases)
            ],
        }
