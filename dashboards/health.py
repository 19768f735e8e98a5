"""Sidecar health: whether it keeps up with its engine, dropped records, CPU and memory."""

from __future__ import annotations

from grafana_foundation_sdk.models.dashboard import Dashboard

from dashboards.parts import BARE, PREFIX, increase, lines, number, or_zero, page, rate, series

REFITS = f"{PREFIX}refit_duration_seconds"


def health() -> Dashboard:
    panels = [
        number("Engine attached", "bool_yes_no", series("engine_attached"),
               "The engine's ring is open and its process is alive."),
        number("Observations", "records/s", rate("observations_total"), "Step records that the models learnt from.", decimals=0),
        number("Dropped", "percentunit",
               f"sum({or_zero(rate('observations_dropped_total'), 'reason')}) / (sum({rate('observations_total')}) > 0)",
               "Step records that were dropped. The alert ObservationsDropped fires above 5 %.", decimals=2,
               bounds=((0.01, "yellow"), (0.05, "red"))),
        number("Policy age", "s", series("policy_age_seconds"), "Time since the last change; a good policy may stay for days.",
               decimals=0),
        number("Memory", "bytes", f"process_resident_memory_bytes{{{BARE}}}", "Resident memory of the sidecar.", decimals=0),
        number("CPU", "percentunit", f"rate(process_cpu_seconds_total{{{BARE}}}[$__rate_interval])",
               "CPU of the sidecar; 100 % = one core.", decimals=0),
        lines("Mode", "none", {"{{mode}}": f"{series('mode')} == 1"}, "Mode of the controller.", steps=True, low=0, high=1),
        lines("Observations and drops", "records/s", {
            "learnt": rate("observations_total"),
            "dropped: {{reason}}": or_zero(f"sum by (reason) ({rate('observations_dropped_total')})", "reason"),
        }, "lost: overwritten before being read. torn: overwritten while being read. invalid: impossible values.", low=0),
        lines("Refit time, mean", "s", {"{{model}}": f"sum by (model) (rate({REFITS}_sum{{{BARE}}}[$__rate_interval]))"
              f" / (sum by (model) (rate({REFITS}_count{{{BARE}}}[$__rate_interval])) > 0)"}, low=0),
        lines("Refits per second", "refits/s",
              {"{{model}}": f"sum by (model) (rate({REFITS}_count{{{BARE}}}[$__rate_interval]))"},
              "Two by default, also while the engine is idle. The alert PolicyStale fires when there is none.", low=0),
        lines("Policy and checkpoint age", "s", {
            "policy": series("policy_age_seconds"), "checkpoint": series("checkpoint_age_seconds"),
        }, low=0),
        lines("Memory", "bytes", {"resident": f"process_resident_memory_bytes{{{BARE}}}"}, low=0),
        lines("CPU", "percentunit", {"sidecar": f"rate(process_cpu_seconds_total{{{BARE}}}[$__rate_interval])"},
              "100 % = one core.", low=0),
        lines("Time lost to probing", "percentunit", {"of decode time": series("probe_ratio")},
              "Estimated share lost by running other plans than the best one; negative when they were faster than predicted."),
        lines("Failures", "none", {
            "controller: {{call}}": or_zero(f"sum by (call) ({increase('controller_failures_total')})", "call"),
            "engine: {{hook}}": or_zero(f"sum by (hook) ({increase('engine_failures_total')})", "hook"),
        }, "Calls that raised an exception, in the sidecar and in the plugin.", low=0),
        lines("Annotations for Grafana", "none", {
            "sent": f"sum({increase('annotations_total')}) or 0 * max({series('engine_attached')})",
            "dropped: {{reason}}": or_zero(f"sum by (reason) ({increase('annotations_dropped_total')})", "reason"),
        }, "Swap and drift events written to Grafana, if configured.", low=0),
    ]  # fmt: skip
    return page(
        "health",
        "adaptive-spec: sidecar health",
        "Whether the sidecar keeps up with its engine, and its CPU and memory use.",
        panels,
    )
