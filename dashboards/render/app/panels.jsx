// Grafana's own components for the panel types of these dashboards, with the same input as from its panel plugins.
import { dateTime, fieldMatchers, FieldMatcherID, FieldType, getDisplayProcessor, getFieldDisplayName, getMinMaxAndDelta, LoadingState, reduceField } from '@grafana/data';
import { BigValue, BigValueTextMode, PanelChrome, preparePlotFrame, Table, TimeSeries } from '@grafana/ui';

const trendFrame = (frames, dimensions) =>
  preparePlotFrame(frames, { ...dimensions, x: fieldMatchers.get(FieldMatcherID.numeric).get({}) });

// Applies field defaults and overrides by name, the two ways these dashboards configure fields.
export function configured(panel, frames, theme) {
  const defaults = panel.fieldConfig?.defaults ?? {};
  const overrides = panel.fieldConfig?.overrides ?? [];
  let index = 0;
  for (const frame of frames) {
    for (const field of frame.fields) {
      const name = getFieldDisplayName(field, frame, frames);
      const config = { ...field.config };
      if (field.type === FieldType.number) {
        const thresholds = defaults.thresholds && {
          ...defaults.thresholds, steps: defaults.thresholds.steps.map((s) => ({ ...s, value: s.value ?? -Infinity })),
        };
        Object.assign(config, defaults, { displayName: config.displayName, thresholds, color: defaults.color ?? { mode: 'palette-classic' } });
        config.custom = { ...(defaults.custom ?? {}) };
        for (const { matcher, properties } of overrides) {
          if (matcher.id !== 'byName') throw new Error(`override by ${matcher.id} is not drawn here`);
          if (matcher.options !== name) continue;
          for (const { id, value } of properties) {
            if (id.startsWith('custom.')) config.custom[id.slice(7)] = value;
            else config[id] = value;
          }
        }
        field.state = { ...field.state, seriesIndex: index++, range: getMinMaxAndDelta(field) };
      }
      field.config = config;
      field.display = getDisplayProcessor({ field, theme });
    }
  }
  return frames;
}

function Body({ panel, frames, theme, range, width, height }) {
  const rows = frames.reduce((n, frame) => n + frame.length, 0);
  if (!rows) return <div>{panel.fieldConfig?.defaults?.noValue ?? 'No data'}</div>;
  const time = { from: dateTime(range.from), to: dateTime(range.to), raw: { from: 'now-5m', to: 'now' } };
  const common = { frames, structureRev: 1, width, height, timeRange: time, timeZone: 'browser', legend: panel.options.legend ?? { showLegend: true, calcs: [] } };
  switch (panel.type) {
    case 'stat': {
      const field = frames.at(-1).fields.find((f) => f.type === FieldType.number);
      const byName = panel.options.textMode === 'name';
      const newest = frames.map((f) => ({ field: f.fields[1], at: f.fields[0].values.at(-1) })).sort((a, b) => b.at - a.at)[0].field;
      const chosen = byName ? newest : field;
      const value = chosen.display(reduceField({ field: chosen, reducers: ['lastNotNull'] }).lastNotNull);
      return <BigValue width={width} height={height} theme={theme} value={{ ...value, title: chosen.config.displayName }}
        colorMode={panel.options.colorMode} graphMode={panel.options.graphMode} textMode={byName ? BigValueTextMode.Name : BigValueTextMode.Value}
        sparkline={panel.options.graphMode === 'area' ? { y: { ...chosen, config: { ...chosen.config, custom: {} } }, x: frames.at(-1).fields[0] } : undefined} />;
    }
    case 'timeseries':
      return <TimeSeries {...common} />;
    case 'trend':
      return <TimeSeries {...common} preparePlotFrame={trendFrame} />;
    case 'table':
      return <Table data={frames[0]} width={width} height={height} />;
    default:
      throw new Error(`panel type ${panel.type} is not drawn here`);
  }
}

export function PanelBox({ panel, result, theme, range, unit }) {
  const { x, y, w, h } = panel.gridPos;
  const width = unit.x * w - 8, height = unit.y * h - 8;
  const frames = result?.frames ?? [];
  const points = frames.reduce((n, f) => n + f.fields.filter((v) => v.type === FieldType.number).reduce((m, v) => m + v.values.filter(Number.isFinite).length, 0), 0);
  return (
    <div className="panel" style={{ position: 'absolute', left: unit.x * x + 4, top: unit.y * y + 4, width, height }}
      data-title={panel.title} data-type={panel.type} data-points={points} data-counts={JSON.stringify(result?.counts ?? {})}
      data-error={result?.error ?? ''} data-ready={result ? 1 : 0}>
      <PanelChrome width={width} height={height} title={panel.title} loadingState={LoadingState.Done} statusMessage={result?.error}>
        {(inner, innerHeight) => result?.error ? <div>{result.error}</div> :
          <Body panel={panel} frames={frames} theme={theme} range={range} width={inner} height={innerHeight} />}
      </PanelChrome>
    </div>
  );
}
