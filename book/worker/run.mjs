// node run.mjs SERVICE [SCRIPT]: runs a Worker in workerd on this machine, its env.AI bound to the service at that url.
import { readFile } from "node:fs/promises";
import { Miniflare } from "miniflare";

const [service, script = "worker.js"] = process.argv.slice(2);
if (!service) {
  console.error("usage: node run.mjs http://127.0.0.1:8000 [worker.js]");
  process.exit(2);
}
const source = (name) => readFile(new URL(name, import.meta.url), "utf8");
const miniflare = new Miniflare({
  host: "127.0.0.1",
  port: 0,
  workers: [
    { name: "worker", modules: true, script: await source(script), wrappedBindings: { AI: { scriptName: "ai" } } },
    { name: "ai", modules: true, script: await source("binding.js"), bindings: { SERVICE: service, TOKEN: process.env.ATTNLAB_TOKEN ?? "" } },
  ],
});
console.log(`worker at ${await miniflare.ready}`);
for (const signal of ["SIGINT", "SIGTERM"]) process.on(signal, () => miniflare.dispose().then(() => process.exit(0)));
