"""Latency model: the current staircase, and its tile boundaries over time."""

from __future__ import annotations

from grafana_foundation_sdk.builders import common, table, trend
from grafana_foundation_sdk.models import common as kinds
from grafana_foundation_sdk.models.dashboard import Dashboard, DynamicConfigValue

from dashboards.parts import DATASOURCE, HEIGHT, joined, lines, number, page, rate, right_axis, rows, series

FIRST, LAST = series("latency_segment_first_tokens"), series("latency_segment_last_tokens")
SLOPE, INTERCEPT = series("latency_segment_slope_seconds_per_token"), series("latency_segment_intercept_seconds")


def _ends(first: str, last: str) -> str:
    """Return the values at both ends of every segment, with a label `point`."""
    ends = [
        f'label_replace({expr}, "point", "$1 {name}", "segment", "(.*)")' for expr, name in ((first, "first"), (last, "last"))
    ]
    return f"sum by (point) ({ends[0]} or {ends[1]})"


def _staircase() -> trend.Panel:
    return (
        trend.Panel().title("Current staircase").datasource(DATASOURCE).unit("s").min(0).height(HEIGHT).span(12)
        .description("Fitted verify latency by tokens of the verify step. It jumps at tile boundaries.")
        .with_target(rows(_ends(FIRST, LAST), "A"))
        .with_target(rows(_ends(f"{INTERCEPT} + {SLOPE} * {FIRST}", f"{INTERCEPT} + {SLOPE} * {LAST}"), "B"))
        .transformations(joined("point", {"Value #A": "tokens", "Value #B": "verify latency"}, "tokens"))
        .x_field("tokens").line_width(2).fill_opacity(6).show_points(kinds.VisibilityMode.ALWAYS).point_size(5)
        .override_by_name("tokens", [DynamicConfigValue("unit", "none"),
                                      DynamicConfigValue("custom.axisLabel", "tokens of the verify step")])
        .legend(common.VizLegendOptions().display_mode(kinds.LegendDisplayMode.LIST).placement(kinds.LegendPlacement.BOTTOM)
                .show_legend(True))
    )  # fmt: skip


def _segments() -> table.Panel:
    columns = {"segment": "segment", "Value #A": "from", "Value #B": "to", "Value #C": "at 0 tokens", "Value #D": "per token"}
    panel = table.Panel().title("Segments").description("Latency of a segment = at 0 tokens + per token * tokens.")
    panel.datasource(DATASOURCE).height(HEIGHT).span(12).unit("s").min_width(50).transformations(
        joined("segment", columns, "from")
    )
    for name in ("from", "to"):
        panel.override_by_name(name, [DynamicConfigValue("unit", "none")])
    for ref, expr in zip("ABCD", (FIRST, LAST, INTERCEPT, SLOPE), strict=True):
        panel.with_target(rows(f"sum by (segment) ({expr})", ref))
    return panel


def latency() -> Dashboard:
    buckets = f"sum by (le, stage) ({rate('step_duration_seconds_bucket')})"
    panels = [
        number("Tile boundaries", "none", f"count({series('tile_boundary_tokens')}) or 0 * max({series('engine_attached')})",
               "Token counts after which the verify latency jumps.", decimals=0, width=6),
        number("Fit error", "percentunit", series("latency_error_ratio"),
               "Mean absolute relative error of the latency fit. The alert LatencyModelDrift fires above 20 %.",
               decimals=1, width=6,
               bounds=((0.1, "yellow"), (0.2, "red"))),
        number("Measured / predicted", "percentunit",
               f"{rate('measured_step_seconds_total')} / ({rate('predicted_step_seconds_total')} > 0)",
               "Measured / predicted step time. The alert LatencyModelDrift fires below 85 % and above 115 %.",
               decimals=1, width=6,
               base="red", bounds=((0.85, "green"), (1.15, "red"))),
        number("Latency drift events", "none", series("drift_events_total", 'signal="latency"'),
               "Since the sidecar's models were created.", decimals=0, width=6),
        _staircase(),
        _segments(),
        lines("Tile boundaries over time", "tokens", {"boundary {{boundary}}": series("tile_boundary_tokens")},
              "Last token count of the cheaper tile.", steps=True, low=0).no_value("no tile boundary"),
        lines("Jump ratios", "none", {"boundary {{boundary}}": series("tile_jump_ratio")},
              "Latency just above a tile boundary / latency just below it.", steps=True, low=1,
              ).no_value("no tile boundary"),
        lines("Time by stage, median", "s", {"{{stage}}": f"histogram_quantile(0.5, {buckets})"}, low=0),
        lines("Time by stage, 99th percentile", "s", {"{{stage}}": f"histogram_quantile(0.99, {buckets})"}, low=0),
        lines("Measured / predicted step time", "percentunit",
              {"measured / predicted": f"{rate('measured_step_seconds_total')} / ({rate('predicted_step_seconds_total')} > 0)"},
              "100 % = as predicted."),
        lines("Fit error and drift events", "percentunit", {
            "fit error": series("latency_error_ratio"),
            "drift events per second": rate("drift_events_total", 'signal="latency"'),
        }, low=0).override_by_name("drift events per second", right_axis("events/s")),
    ]  # fmt: skip
    return page("latency", "adaptive-spec: latency model", "The staircase of verify latency and how it changes.", panels)
