"""Sidecar health: does it keep up, what did it lose, what does it cost."""

from __future__ import annotations

from grafana_foundation_sdk.models.dashboard import Dashboard

from dashboards.parts import BARE, PREFIX, increase, lines, number, or_zero, page, rate, series

REFITS = f"{PREFIX}refit_duration_seconds"


def health() -> Dashboard:
    panels = [
        number("Engine attached", "bool_yes_no", series("engine_attached"), "Its ring is open and the engine lives."),
        number("Observations", "records/s", rate("observations_total"), "Step records learnt from.", decimals=0),
        number("Dropped", "percentunit",
               f"sum({or_zero(rate('observations_dropped_total'), 'reason')}) / (sum({rate('observations_total')}) > 0)",
               "Step records never learnt from. The alert ObservationsDropped begins at 5 %.", decimals=2,
               bounds=((0.01, "yellow"), (0.05, "red"))),
        number("Policy age", "s", series("policy_age_seconds"), "A good policy may stand for days.", decimals=0),
        number("Memory", "bytes", f"process_resident_memory_bytes{{{BARE}}}", "Resident, of the sidecar.", decimals=0),
        number("CPU", "percentunit", f"rate(process_cpu_seconds_total{{{BARE}}}[$__rate_interval])", "Of one core.", decimals=0),
        lines("Mode", "none", {"{{mode}}": f"{series('mode')} == 1"}, "What the controller did.", steps=True, low=0, high=1),
        lines("Observations and drops", "records/s", {
            "learnt": rate("observations_total"),
            "dropped: {{reason}}": or_zero(f"sum by (reason) ({rate('observations_dropped_total')})", "reason"),
        }, "lost: overwritten before they were read. torn: while they were read. invalid: made no sense.", low=0),
        lines("Refit time, mean", "s", {"{{model}}": f"sum by (model) (rate({REFITS}_sum{{{BARE}}}[$__rate_interval]))"
              f" / (sum by (model) (rate({REFITS}_count{{{BARE}}}[$__rate_interval])) > 0)"}, low=0),
        lines("Refits per second", "refits/s",
              {"{{model}}": f"sum by (model) (rate({REFITS}_count{{{BARE}}}[$__rate_interval]))"},
              "Two by default, also while the engine is idle. None = the alert PolicyStale.", low=0),
        lines("Policy and checkpoint age", "s", {
            "policy": series("policy_age_seconds"), "checkpoint": series("checkpoint_age_seconds"),
        }, low=0),
        lines("Memory", "bytes", {"resident": f"process_resident_memory_bytes{{{BARE}}}"}, low=0),
        lines("CPU", "percentunit", {"sidecar": f"rate(process_cpu_seconds_total{{{BARE}}}[$__rate_interval])"},
              "Of one core.", low=0),
        lines("Time spent on probing", "percentunit", {"of decode time": series("probe_ratio")},
              "Lost to measuring plans that are not the best; below 0 where the trials were lucky."),
        lines("Failures", "none", {
            "controller: {{call}}": or_zero(f"sum by (call) ({increase('controller_failures_total')})", "call"),
            "engine: {{hook}}": or_zero(f"sum by (hook) ({increase('engine_failures_total')})", "hook"),
        }, "Calls of ours that raised, in the sidecar and inside the engine.", low=0),
        lines("Annotations for Grafana", "none", {
            "sent": f"sum({increase('annotations_total')}) or 0 * max({series('engine_attached')})",
            "dropped: {{reason}}": or_zero(f"sum by (reason) ({increase('annotations_dropped_total')})", "reason"),
        }, "Swaps and drift events written to Grafana, where that is configured.", low=0),
    ]  # fmt: skip
    return page(
        "health", "adaptive-spec: sidecar health", "Does the sidecar keep up with its engine, and what does it cost.", panels
    )
