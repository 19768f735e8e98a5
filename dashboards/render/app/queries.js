// A panel's targets, asked of Prometheus as Grafana's Prometheus data source would, and turned into Grafana's data frames.
import { FieldType, standardTransformers, standardTransformersRegistry, toDataFrame, transformDataFrame } from '@grafana/data';
import { lastValueFrom } from 'rxjs';

standardTransformersRegistry.setInit(() =>
  [...new Map(Object.values(standardTransformers).map((t) => [t.id, t])).values()].map((t) => ({ id: t.id, name: t.name, transformation: async () => t, editor: () => null }))
);

const legend = (format, labels) => {
  if (format && format !== '__auto') return format.replace(/{{\s*(\w+)\s*}}/g, (_, key) => labels[key] ?? '');
  const { __name__: name, ...rest } = labels;
  return `${name ?? ''}{${Object.entries(rest).map(([key, value]) => `${key}="${value}"`).join(', ')}}`;
};

export const substituted = (text, variables) =>
  Object.entries(variables).reduce((result, [name, value]) => result.replaceAll(`$${name}`, value), text);

async function ask(prometheus, path, parameters) {
  const answer = await (await fetch(`${prometheus}/api/v1/${path}?${new URLSearchParams(parameters)}`)).json();
  if (answer.status !== 'success') throw new Error(answer.error);
  return answer.data.result;
}

async function series(prometheus, target, expr, range) {
  const found = await ask(prometheus, 'query_range', { query: expr, start: range.from / 1e3, end: range.to / 1e3, step: range.step });
  return found.map(({ metric, values }) => {
    const name = legend(target.legendFormat, metric);
    return toDataFrame({ refId: target.refId, fields: [
      { name: 'Time', type: FieldType.time, values: values.map((v) => v[0] * 1e3), config: {} },
      { name, type: FieldType.number, values: values.map((v) => Number(v[1])), labels: metric, config: { displayName: name } },
    ] });
  });
}

async function table(prometheus, target, expr, range, several) {
  const found = await ask(prometheus, 'query', { query: expr, time: range.to / 1e3 });
  const labels = [...new Set(found.flatMap(({ metric }) => Object.keys(metric)))].sort();
  return [toDataFrame({ refId: target.refId, fields: [
    { name: 'Time', type: FieldType.time, values: found.map((row) => row.value[0] * 1e3), config: {} },
    ...labels.map((label) => ({ name: label, type: FieldType.string, values: found.map((row) => row.metric[label] ?? ''), config: {} })),
    { name: several ? `Value #${target.refId}` : 'Value', type: FieldType.number, values: found.map((row) => Number(row.value[1])), config: {} },
  ] })];
}

// Every target on its own, so that one which returns nothing is seen; then the panel's transformations, by Grafana's own code.
export async function framesOf(panel, prometheus, variables, range) {
  const returned = await Promise.all(panel.targets.map((target) => {
    const expr = substituted(target.expr, variables);
    return target.format === 'table' ? table(prometheus, target, expr, range, panel.targets.length > 1) : series(prometheus, target, expr, range);
  }));
  const counts = Object.fromEntries(panel.targets.map((t, i) => [t.refId, returned[i].reduce((n, frame) => n + frame.length, 0)]));
  const frames = await lastValueFrom(transformDataFrame(panel.transformations ?? [], returned.flat()));
  return { frames, counts };
}
