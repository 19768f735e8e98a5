"""Parts of all dashboards: variables, queries, panels in one style, and annotations for swaps and drift events."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from grafana_foundation_sdk.builders import common, dashboard, prometheus, stat, timeseries
from grafana_foundation_sdk.cog.builder import Builder
from grafana_foundation_sdk.models import common as kinds
from grafana_foundation_sdk.models import dashboard as models
from grafana_foundation_sdk.models.prometheus import PromQueryFormat

PREFIX = "adaptive_spec_"
TAG = "adaptive-spec"
DATASOURCE = kinds.DataSourceRef(type_val="prometheus", uid="$datasource")
SELECTOR = 'job=~"$job", model=~"$model", gpu=~"$gpu", instance=~"$instance"'
BARE = 'job=~"$job", instance=~"$instance"'
"""For metrics without the engine's labels: process metrics, and refit_duration_seconds, which has its own label `model`."""
STAT_HEIGHT, HEIGHT = 4, 8
UIDS = {"overview": "adaptive-spec-overview", "latency": "adaptive-spec-latency", "calibration": "adaptive-spec-calibration",
        "health": "adaptive-spec-health"}  # fmt: skip
Panel = Builder[models.Panel]


def series(name: str, *matchers: str) -> str:
    """Select a metric by the dashboard's variables: `decode_steps_total` -> adaptive_spec_decode_steps_total{...}."""
    return f"{PREFIX}{name}{{{', '.join((SELECTOR, *matchers))}}}"


def rate(name: str, *matchers: str) -> str:
    """Increase per second of a counter, over Grafana's rate interval."""
    return f"rate({series(name, *matchers)}[$__rate_interval])"


def increase(name: str, *matchers: str) -> str:
    """Increase of a counter, over Grafana's rate interval."""
    return f"increase({series(name, *matchers)}[$__rate_interval])"


def or_zero(expr: str, label: str) -> str:
    """Return `expr`, or 0 with `label` "none" when the counter has no series yet."""
    attached = series("engine_attached")
    return f'{expr} or label_replace(0 * max({attached}), "{label}", "none", "", "")'


def query(expr: str, legend: str = "__auto", ref: str = "A") -> prometheus.Dataquery:
    """Return a range query. legend: "{{label}}" is replaced by the label's value."""
    return prometheus.Dataquery().datasource(DATASOURCE).expr(expr).legend_format(legend).range().ref_id(ref)


def rows(expr: str, ref: str) -> prometheus.Dataquery:
    """Return an instant query in table format: one column per label, and `Value #ref`."""
    return prometheus.Dataquery().datasource(DATASOURCE).expr(expr).instant().format(PromQueryFormat.TABLE).ref_id(ref)


def lines(
    title: str, unit: str, queries: Mapping[str, str], description: str = "", *, width: int = 12, steps: bool = False,
    bars: bool = False, low: float | None = None, high: float | None = None,
) -> timeseries.Panel:  # fmt: skip
    """Return a time series panel. queries: legend -> expression. steps: draw as steps. low, high: ends of the axis."""
    panel = (
        timeseries.Panel().title(title).description(description).datasource(DATASOURCE).unit(unit).height(HEIGHT).span(width)
        .legend(common.VizLegendOptions().display_mode(kinds.LegendDisplayMode.LIST).placement(kinds.LegendPlacement.BOTTOM)
                .show_legend(True))
        .tooltip(common.VizTooltipOptions().mode(kinds.TooltipDisplayMode.MULTI).sort(kinds.SortOrder.DESCENDING))
        .line_width(1).fill_opacity(60 if bars else 0).show_points(kinds.VisibilityMode.NEVER)
        .draw_style(kinds.GraphDrawStyle.BARS if bars else kinds.GraphDrawStyle.LINE)
        .line_interpolation(kinds.LineInterpolation.STEP_AFTER if steps else kinds.LineInterpolation.LINEAR)
    )  # fmt: skip
    if low is not None:
        panel.min(low)
    if high is not None:
        panel.max(high)
    for ref, (legend, expr) in zip("ABCDEFGH", queries.items(), strict=False):
        panel.with_target(query(expr, legend, ref))
    return panel


def right_axis(unit: str) -> list[models.DynamicConfigValue]:
    """Overrides of a series that is drawn by an axis of its own, on the right."""
    return [models.DynamicConfigValue("unit", unit), models.DynamicConfigValue("custom.axisPlacement", "right")]


def number(
    title: str, unit: str, expr: str, description: str = "", *, width: int = 4, decimals: float | None = None,
    base: str = "green", bounds: Sequence[tuple[float, str]] = (), legend: str = "__auto", as_name: bool = False,
) -> stat.Panel:  # fmt: skip
    """Return a panel with one number. bounds: (value, colour from there on). as_name: show the legend, not the value."""
    steps = [models.Threshold(value=None, color=base), *(models.Threshold(value=v, color=c) for v, c in bounds)]
    panel = (
        stat.Panel().title(title).description(description).datasource(DATASOURCE).unit(unit).height(STAT_HEIGHT).span(width)
        .with_target(query(expr, legend))
        .reduce_options(common.ReduceDataOptions().calcs(["lastNotNull"]).fields("").values(False))
        .graph_mode(kinds.BigValueGraphMode.NONE if as_name else kinds.BigValueGraphMode.AREA)
        .color_mode(kinds.BigValueColorMode.VALUE)
        .text_mode(kinds.BigValueTextMode.NAME if as_name else kinds.BigValueTextMode.VALUE)
        .color_scheme(dashboard.FieldColor().mode(models.FieldColorModeId.THRESHOLDS))
        .thresholds(dashboard.ThresholdsConfig().mode(models.ThresholdsMode.ABSOLUTE).steps(steps))
    )  # fmt: skip
    if decimals is not None:
        panel.decimals(decimals)
    return panel


def joined(on: str, columns: Mapping[str, str], sort_by: str) -> list[models.DataTransformerConfig]:
    """Join the tables of several `rows` queries on a label; keep `columns` (name in the data -> name shown), sorted."""
    return [
        models.DataTransformerConfig(id_val="joinByField", options={"byField": on, "mode": "outer"}),
        models.DataTransformerConfig(id_val="filterFieldsByName", options={"include": {"names": list(columns)}}),
        models.DataTransformerConfig(
            id_val="organize", options={"renameByName": dict(columns), "indexByName": {c: i for i, c in enumerate(columns)}}
        ),
        models.DataTransformerConfig(id_val="sortBy", options={"sort": [{"field": sort_by}]}),
    ]


def _variable(name: str, label: str, query_text: str, *, several: bool) -> dashboard.QueryVariable:
    variable = (
        dashboard.QueryVariable(name).label(label).datasource(DATASOURCE).query(query_text).definition(query_text)
        .refresh(models.VariableRefresh.ON_TIME_RANGE_CHANGED).sort(models.VariableSort.ALPHABETICAL_ASC)
    )  # fmt: skip
    if several:
        variable.multi(True).include_all(True).all_value(".*")
        variable.current(models.VariableOption(text="All", value="$__all"))
    return variable


def _annotation(name: str, colour: str, expr: str, title: str) -> dashboard.AnnotationQuery:
    return (
        dashboard.AnnotationQuery().name(name).datasource(DATASOURCE).enable(True).icon_color(colour).expr(expr)
        .title_format(title).step("15s")
    )  # fmt: skip


def page(name: str, title: str, description: str, panels: Sequence[Panel]) -> models.Dashboard:
    """Return a dashboard with variables, links to the others, and annotations for swaps and drift events."""
    source = models.VariableOption(text="Prometheus", value="prometheus")
    ours = dashboard.AnnotationTarget().limit(200).match_any(False).tags([TAG]).type("tags")
    builder = (
        dashboard.Dashboard(title).uid(UIDS[name]).description(description).tags([TAG]).editable().timezone("browser")
        .time("now-1h", "now").refresh("10s").tooltip(models.DashboardCursorSync.CROSSHAIR)
        .link(dashboard.DashboardLink("adaptive-spec").type(models.DashboardLinkType.DASHBOARDS).tags([TAG]).as_dropdown(False)
              .keep_time(True).include_vars(True))
        .with_variable(dashboard.DatasourceVariable("datasource").label("Data source").type("prometheus").current(source))
        .with_variable(_variable("job", "Job", f"label_values({PREFIX}build_info, job)", several=True))
        .with_variable(_variable("engine", "Engine", f'label_values({PREFIX}engine_info{{job=~"$job"}}, engine)', several=True))
        .with_variable(_variable(
            "model", "Model", f'label_values({PREFIX}engine_info{{job=~"$job", engine=~"$engine"}}, model)', several=True))
        .with_variable(_variable(
            "gpu", "GPU", f'label_values({PREFIX}build_info{{job=~"$job", model=~"$model"}}, gpu)', several=True))
        .with_variable(_variable(
            "instance", "Instance",
            f'label_values({PREFIX}engine_info{{job=~"$job", engine=~"$engine", model=~"$model", gpu=~"$gpu"}}, instance)',
            several=False))
        .annotation(_annotation("Swaps", "blue", f"sum by (reason) ({increase('policy_swaps_total')}) > 0",
                          "K policy swapped: {{reason}}"))
        .annotation(_annotation("Drift", "orange", f"sum by (signal) ({increase('drift_events_total')}) > 0",
                          "{{signal}} drift"))
        .annotation(dashboard.AnnotationQuery().name("Event texts").enable(True).icon_color("purple")
                    .datasource(kinds.DataSourceRef(type_val="grafana", uid="-- Grafana --")).target(ours))  # type: ignore[arg-type]  # of a Grafana data source: the SDK has the other kind only
    )  # fmt: skip
    for panel in panels:
        builder.with_panel(panel)
    built = builder.build()
    for number_, panel_ in enumerate(built.panels or [], start=1):
        panel_.id_val = number_
    return built
