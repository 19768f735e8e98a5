// Draws one dashboard. Query parameters: dashboard (file), prometheus (address), minutes (time range), theme, interval (s).
import { useEffect, useState } from 'react';
import { createRoot } from 'react-dom/client';
import { createTheme, ThemeContext } from '@grafana/data';
import { GlobalStyles, PortalContainer } from '@grafana/ui';
import { configured, PanelBox } from './panels.jsx';
import { framesOf } from './queries.js';

const asked = new URLSearchParams(location.search);
const theme = createTheme({ colors: { mode: asked.get('theme') ?? 'dark' } });
const to = Date.now(), from = to - Number(asked.get('minutes') ?? 5) * 60e3, step = Number(asked.get('interval') ?? 2);
const range = { from, to, step };
const variables = {
  __rate_interval: `${4 * step}s`, __interval: `${step}s`, job: '.*', model: '.*', gpu: '.*', instance: asked.get('instance') ?? '.*',
};
const unit = { x: (window.innerWidth - 8) / 24, y: 34 };
document.body.style.background = theme.colors.background.canvas;

function Dashboard({ document }) {
  const [results, setResults] = useState({});
  useEffect(() => {
    for (const panel of document.panels) {
      framesOf(panel, asked.get('prometheus'), variables, range)
        .then(({ frames, counts }) => ({ frames: configured(panel, frames, theme), counts }))
        .catch((error) => ({ error: String(error) }))
        .then((result) => setResults((before) => ({ ...before, [panel.id]: result })));
    }
  }, []);
  const height = unit.y * Math.max(...document.panels.map((p) => p.gridPos.y + p.gridPos.h));
  return (
    <div id="dashboard" style={{ color: theme.colors.text.primary, fontFamily: 'sans-serif' }}>
      <h1 style={{ fontSize: 20, margin: '10px 12px' }}>{document.title}</h1>
      <div style={{ position: 'relative', height }}>
        {document.panels.map((panel) => <PanelBox key={panel.id} panel={panel} result={results[panel.id]} theme={theme} range={range} unit={unit} />)}
      </div>
    </div>
  );
}

const document_ = await (await fetch(`/dashboards/${asked.get('dashboard')}`)).json();
createRoot(document.getElementById('root')).render(
  <ThemeContext.Provider value={theme}>
    <GlobalStyles isExtensionSidebarOpen={false} />
    <Dashboard document={document_} />
    <PortalContainer />
  </ThemeContext.Provider>
);
