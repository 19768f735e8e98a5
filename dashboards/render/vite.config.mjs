import { defineConfig } from 'vite';

export default defineConfig({
  root: 'app',
  esbuild: { jsx: 'automatic' },
  define: { 'process.env': {}, global: 'globalThis' },
  build: { target: 'esnext', outDir: '../out', emptyOutDir: true, minify: false, sourcemap: false, chunkSizeWarningLimit: 50000 },
  logLevel: "error",
});
