"""Calibration: how well draft scores predict acceptance."""

from __future__ import annotations

from grafana_foundation_sdk.builders import common, trend
from grafana_foundation_sdk.models import common as kinds
from grafana_foundation_sdk.models.dashboard import Dashboard, DataTransformerConfig, DynamicConfigValue

from dashboards.parts import DATASOURCE, increase, joined, lines, number, page, rate, rows, series

OURS = 'signal="calibration"'
BALANCE = (
    f"({rate('expected_accepted_tokens_total')} - sum without (position) ({rate('accepted_tokens_total')}))"
    f" / (sum without (position) ({rate('verified_tokens_total')}) > 0)"
)


def _by_vllm(tokens: str) -> str:
    return f"sum(rate(vllm:spec_decode_num_{tokens}_tokens_total[$__rate_interval]))"


def _reliability() -> trend.Panel:
    # The label `score` is text; converted to a number it is the x axis.
    columns = {"score": "score", "Value #A": "calibrated", "Value #B": "observed"}
    as_number = DataTransformerConfig(
        id_val="convertFieldType", options={"fields": {}, "conversions": [{"targetField": "score", "destinationType": "number"}]}
    )
    return (
        trend.Panel().title("Current reliability").datasource(DATASOURCE).unit("percentunit").min(0).max(1).height(12).span(12)
        .description("P(accept) by cumulative draft score: calibrated and observed. The two curves should agree.")
        .with_target(rows(f"sum by (score) ({series('calibration_curve_probability')})", "A"))
        .with_target(rows(f"sum by (score) ({series('calibration_observed_probability')})", "B"))
        .transformations([*joined("score", columns, "score")[:3], as_number, *joined("score", columns, "score")[3:]])
        .x_field("score").override_by_name("score", [DynamicConfigValue("unit", "none"),
                                     DynamicConfigValue("custom.axisLabel", "cumulative draft score")])
        .line_width(2).fill_opacity(0).show_points(kinds.VisibilityMode.ALWAYS).point_size(6)
        .legend(common.VizLegendOptions().display_mode(kinds.LegendDisplayMode.LIST).placement(kinds.LegendPlacement.BOTTOM)
                .show_legend(True))
    )  # fmt: skip


def calibration() -> Dashboard:
    accepted, verified = rate("accepted_tokens_total"), rate("verified_tokens_total")
    panels = [
        number("Calibration error (ECE)", "percentunit", series("calibration_error_ratio"),
               "Mean difference of calibrated and observed acceptance. CalibrationDecay fires above a mean of 5 %.",
               decimals=1, width=6,
               bounds=((0.03, "yellow"), (0.05, "red"))),
        number("Brier score", "none", series("calibration_brier_ratio"), "Mean squared error of P(accept), 0..1.", decimals=3,
               width=6),
        number("Log loss", "none", series("calibration_log_loss"),
               "Nats per draft token; a constant P(accept) of 0.5 gives 0.693.", decimals=3, width=6,
               bounds=((0.693, "red"),)),
        number("Expected minus accepted", "percentunit", BALANCE,
               "Share of the verified draft tokens. The alert CalibrationDecay fires below -5 % and above 5 %.",
               decimals=1, width=6,
               base="red", bounds=((-0.05, "green"), (0.05, "red"))),
        _reliability(),
        lines("Calibrated P(accept) by score, over time", "percentunit",
              {"score {{score}}": series("calibration_curve_probability")},
              "Scores are the centres of 15 bins.", low=0, high=1).height(12),
        lines("Calibration error (ECE)", "percentunit", {"ECE": series("calibration_error_ratio")}, low=0),
        lines("Draft tokens, beside vLLM's own counters", "tokens/s", {
            "verified": f"sum({verified})", "accepted": f"sum({accepted})",
            "verified, by vLLM": _by_vllm("draft"), "accepted, by vLLM": _by_vllm("accepted"),
        }, "On a vLLM server that Prometheus scrapes too, both count the same tokens. vLLM's are those of all its servers here.",
              low=0),
        lines("Brier score and log loss", "none", {
            "Brier score": series("calibration_brier_ratio"), "log loss": series("calibration_log_loss"),
        }, low=0),
        lines("Accepted draft tokens, expected and actual", "tokens/s", {
            "expected": rate("expected_accepted_tokens_total"), "accepted": f"sum without (position) ({accepted})",
        }, low=0),
        lines("Expected minus accepted", "percentunit", {"share of verified": BALANCE}, "0 = as many accepted as expected."),
        lines("Acceptance by position", "percentunit", {"position {{position}}": f"{accepted} / ({verified} > 0)"},
              "Accepted / verified draft tokens.", low=0, high=1),
        lines("Calibration drift events", "none",
              {"events": f"sum({increase('drift_events_total', OURS)})"},
              "Changes in acceptance or in the draft model's confidence.", bars=True, low=0),
    ]  # fmt: skip
    return page(
        "calibration", "adaptive-spec: calibration", "P(accept) by cumulative draft score, and how accurate it is.", panels
    )
