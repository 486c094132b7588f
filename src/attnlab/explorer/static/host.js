// The host of explorers on a page without a kernel, as a classic script: a page opened from a folder may not import modules.
// It gives each module what a notebook's widget manager would: a model to read, and an element to draw into.

globalThis.attnlabExplorers ??= (() => {
  const PATIENCE = 60_000; // ms for one file: a connection that is stuck reports no error
  const modules = {}; // kind → { render }
  const arrived = {}; // file name → text, of data files
  const loading = {}; // file name → promise of the text
  const scripts = document.currentScript?.src || document.baseURI;

  /** A module says what it is, by calling this from its own script. */
  function module(kind, make) {
    modules[kind] = make();
    if (document.readyState !== "loading") drawAll();
  }

  /** A data file hands over its text, by calling this. */
  function data(name, text) {
    arrived[name] = text;
  }

  /** The text of a data file: { file, length }. Rejected, in words, if the file is not there or not whole. */
  function file({ file: name, length }) {
    return (loading[name] ??= new Promise((resolve, reject) => {
      if (arrived[name]?.length === length) return resolve(arrived[name]); // a saved file holds it
      const script = document.createElement("script");
      const lost = (what) => {
        clearTimeout(late);
        script.remove();
        delete loading[name]; // so that a second try can succeed
        reject(new Error(`its data file ${name} ${what}`));
      };
      const late = setTimeout(() => lost("does not come"), PATIENCE);
      script.src = new URL(`data/${name}`, scripts).href;
      script.onerror = () => lost("is missing");
      script.onload = () => {
        clearTimeout(late);
        script.remove();
        const text = arrived[name];
        delete arrived[name];
        text?.length === length ? resolve(text) : lost("is incomplete");
      };
      document.head.append(script);
    }));
  }

  async function draw(figure) {
    const kind = figure.dataset.explorer;
    const el = document.createElement("div");
    delete figure.dataset.explorer; // one root: from here on it is el
    figure.append(el);
    el.dataset.explorer = kind;
    try {
      const content = JSON.parse(figure.querySelector("script[type='application/json']").textContent);
      const model = { get: (name) => (name === "data" ? content : undefined), on() {}, off() {}, set() {}, save_changes() {} };
      await modules[kind].render({ model, el }); // sets data-ready, which hides the still picture
    } catch {
      el.className = "attnlab-explorer";
      el.setAttribute("role", "alert");
      el.textContent = "The data of this figure are damaged, so that it cannot move. The picture shows it as it stood.";
    }
  }

  function drawAll() {
    for (const figure of document.querySelectorAll("figure.attnlab-explorer[data-explorer]")) {
      if (modules[figure.dataset.explorer]) draw(figure);
    }
  }

  if (document.readyState === "loading") document.addEventListener("DOMContentLoaded", drawAll);
  return { module, data, file };
})();
