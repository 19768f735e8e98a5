"""Overview: goodput, gain over the launch K, and K by batch size."""

from __future__ import annotations

from grafana_foundation_sdk.models.dashboard import Dashboard

from dashboards.parts import increase, lines, number, page, rate, right_axis, series

POWERS = 'batch_size=~"1|2|4|8|16|32|64|128|256|512"'
WHOLE = 'stage="step"'
STEP_MEAN = f"{rate('step_duration_seconds_sum', WHOLE)} / ({rate('step_duration_seconds_count', WHOLE)} > 0)"
FIRST = 'position="1"'


def overview() -> Dashboard:
    accepted, verified = rate("accepted_tokens_total"), rate("verified_tokens_total")
    reached = rate("reached_tokens_total")
    run_k = f"sum by (batch_size, k) ({rate('run_k_steps_total')})"
    within = rate("slo_requests_total", 'result="within"')
    panels = [
        number("Mode", "none", f"{series('mode')} == 1", "Current mode of the controller.", legend="{{mode}}", as_name=True),
        number("Goodput", "tokens/s", series("goodput_tokens_per_second"),
               "Output tokens per second of decode time, over recent steps.",
               decimals=0),
        number("Gain over the launch K", "percentunit", series("policy_measured_gain_ratio"),
               "Goodput against that of the launch K, the K of the server's flags. Measured by the control arm where it has "
               "a standard error (next panels), else an estimate by the forecast of the launch K.",
               decimals=1,
               base="red", bounds=((-0.05, "yellow"), (0, "green"))),
        number("Mean accept_len", "tokens", f"sum({accepted}) / (sum({rate('draft_tokens_total', FIRST)}) > 0)",
               "Accepted draft tokens per request and step, in steps with K > 0; without the bonus token.", decimals=2),
        number("Calibration error (ECE)", "percentunit", series("calibration_error_ratio"),
               "Mean difference of P(accept | score) and observed acceptance. CalibrationDecay fires above 5 %.", decimals=1,
               bounds=((0.03, "yellow"), (0.05, "red"))),
        number("Swaps in 30 minutes", "none", f"sum(increase({series('policy_swaps_total')}[30m]))",
               "Policy swaps. The alert PolicyFlapping fires above 60.", decimals=0, bounds=((60, "red"),)),
        lines("Goodput", "tokens/s", {
            "of decode time": series("goodput_tokens_per_second"),
            "of total time, including idle": rate("output_tokens_total"),
        }, "Output tokens per second. The difference is time without decode steps.", low=0),
        lines("K by batch size", "none", {"batch {{batch_size}}": series("policy_draft_tokens", POWERS)},
              "K of the current policy, at batch sizes that are powers of two.", steps=True, low=0),
        lines("Mean accept_len", "tokens", {"accept_len": f"sum({accepted}) / (sum({rate('draft_tokens_total', FIRST)}) > 0)"},
              "Accepted draft tokens per request and step, in steps with K > 0.", low=0),
        lines("Acceptance by position", "percentunit", {"position {{position}}": f"{accepted} / ({verified} > 0)"},
              "Accepted / verified draft tokens.", low=0, high=1),
        lines("Acceptance given the one before", "percentunit", {"position {{position}}": f"{accepted} / ({reached} > 0)"},
              "Accepted / verified draft tokens of which all before were accepted.", low=0, high=1),
        lines("K that was run", "percentunit", {
            "batch up to {{batch_size}}, K {{k}}": f"{run_k} / ignoring (k) group_left () (sum by (batch_size) ({run_k}) > 0)",
        }, "Share of the steps of a batch size, in powers of two, by the K that was run, whoever chose it.", low=0, high=1),
        lines("Step time, predicted and measured", "s", {
            "measured": STEP_MEAN,
            "predicted": f"({STEP_MEAN}) * ignoring (stage) {rate('predicted_step_seconds_total')}"
                         f" / ignoring (stage) ({rate('measured_step_seconds_total')} > 0)",
        }, "Mean time of a decode step.", low=0),
        lines("Gain over the launch K", "percentunit", {
            "predicted": series("policy_predicted_gain_ratio"), "measured": series("policy_measured_gain_ratio"),
            "measured, standard error": series("policy_measured_gain_error_ratio"),
            "estimate": series("policy_estimated_gain_ratio"),
        }, "0 % = same goodput as with the launch K. measured: the launch K on a small share of steps (control_share), with its "
           "standard error; without an error it is the estimate: against the forecast of the launch K."),
        lines("Swaps by reason", "none", {"{{reason}}": f"sum by (reason) ({increase('policy_swaps_total')})"},
              "sweep: after a cold start. gain: another K is better. drift: the models changed. rollback: a swap was undone.",
              bars=True, low=0),
        lines("Changes of K per step", "none", {
            "{{reason}}": f"sum by (reason) ({rate('k_switches_total')})"
                          f" / ignoring (reason) group_left () (sum({rate('decode_steps_total')}) > 0)",
        }, "table: another batch size or a swap. step_choice: for the requests of a step. trial: a measurement. allowed: the K "
           "before is not allowed at this batch size. fallback: without a policy.", low=0),
        lines("Steps not as asked, cost of a change of K", "none", {
            "steps not as asked per second": rate("plan_limited_steps_total"),
            "seconds per change of K": series("k_switch_cost_seconds"),
        }, "A step is not as asked when the engine does not run the policy's K at its batch size.", low=0)
        .override_by_name("seconds per change of K", right_axis("s")),
        lines("Requests within the target", "percentunit", {
            "share within slo_tpot_ms": f"sum({within})"
                                        f" / (sum({rate('slo_requests_total')}) > 0)",
        }, "Of the requests that ended: share whose decode time per output token was within slo_tpot_ms. Empty without a target.",
           low=0, high=1),
        lines("Decode steps per second", "steps/s", {"steps": rate("decode_steps_total")}, "0 while the engine is idle.", low=0),
    ]  # fmt: skip
    return page("overview", "adaptive-spec: overview", "Draft length K of a live server, and its gain over the launch K.", panels)
