// node types.mjs DASHBOARD.json... : do the dashboards have the types of @grafana/schema? Exit status 1 and tsc's words if not.
// Each panel's options and custom field config are checked against the schema of its panel type, the rest as a Dashboard.
import { execFileSync } from 'node:child_process';
import fs from 'node:fs';
import path from 'node:path';

const folder = path.join(import.meta.dirname, 'typecheck');
fs.rmSync(folder, { recursive: true, force: true });
fs.mkdirSync(folder);
const PANELS = {
  timeseries: ['TimeSeries', 'timeseries'], stat: ['Stat', 'stat'], trend: ['Trend', 'trend'], table: ['Table', 'table'], bargauge: ['BarGauge', 'bargauge'],
};
const lines = [
  "import type { Dashboard, Panel, QueryVariableModel, AnnotationQuery, DataTransformerConfig, FieldConfigSource } from '@grafana/schema';",
  "import type { PrometheusDataQuery } from '@grafana/schema/dist/esm/raw/composable/prometheus/dataquery/x/PrometheusDataQuery_types.gen';",
];
