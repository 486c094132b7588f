/* The live companion: a model runs in the reader's browser, on the reader's text.

   The model is live_model.js in a worker, so that the page answers while it computes; live.py says what is loaded. Its maps
   are drawn by the attention explorer. Nothing is loaded before a button is pressed, and nothing is sent anywhere. */

const GENERATED = 48; // tokens at one press
const TYPING = 250; // ms after the last key before the text is read
const LONG_PASTE = 2000; // characters
const KERNEL_ANSWERS = 60_000; // ms, at most, in a live notebook
const ONE_HEAD = 6; // height of a K/V head in the picture of the cache

export default explorer("live", ({ data, model, el }) => liveExplorer(data, model, el));

// --- where the weights come from

/* A file's text: from the page's host, or in a live notebook from its kernel. */
function fileText(model, { file, length }) {
  if (globalThis.attnlabExplorers) return globalThis.attnlabExplorers.file({ file, length });
  return new Promise((resolve, reject) => {
    const late = setTimeout(() => end(() => reject(new Error("the notebook's kernel does not answer"))), KERNEL_ANSWERS);
    const answered = (message) => message.file === file && end(() => resolve(message.text));
    const end = (settle) => {
      clearTimeout(late);
      model.off("msg:custom", answered);
      settle();
    };
    model.on("msg:custom", answered);
    model.send({ file });
  });
}

/* A model's bytes, file by file. `arrived` keeps what came, so that a second try asks for the rest alone. */
async function fetchModel(model, files, arrived, onProgress) {
  for (let i = 0; i < files.length; i++) {
    onProgress(i);
    arrived[i] ??= bytes64(await fileText(model, files[i]));
  }
  const bytes = new Uint8Array(arrived.reduce((sum, part) => sum + part.length, 0));
  let at = 0;
  for (const part of arrived) {
    bytes.set(part, at);
    at += part.length;
  }
  return bytes;
}

/* `ask(act, what, transfer)` is a promise of the worker's answer. One that can't be started rejects whatever was asked. */
function startWorker() {
  const address = URL.createObjectURL(new Blob([WORKER_SOURCE], { type: "text/javascript" }));
  const worker = new Worker(address);
  const waiting = new Map();
  let asked = 0;
  worker.onmessage = ({ data: { id, result, error } }) => {
    const { resolve, reject } = waiting.get(id);
    waiting.delete(id);
    if (error) reject(new Error(error));
    else resolve(result);
  };
  worker.onerror = () => {
    for (const { reject } of waiting.values()) reject(new Error("its worker could not be started, or broke down"));
    waiting.clear();
  };
  const ask = (act, what = {}, transfer = []) => new Promise((resolve, reject) => {
    waiting.set(++asked, { resolve, reject });
    worker.postMessage({ id: asked, act, ...what }, transfer);
  });
  const end = () => {
    worker.terminate();
    URL.revokeObjectURL(address);
  };
  return { ask, end };
}

// --- words

const whole = (n) => n.toLocaleString("en-US");
const megabytes = (n) => `${number(n / 1e6, 1)} MB`;
const downloadSize = ({ files }) => files.reduce((sum, { length }) => sum + length, 0);
const count = (n, word) => `${whole(n)} ${word}${n === 1 ? "" : "s"}`;
const heads = (n) => count(n, "K/V head");
const percent = (share) => (share < 0.001 ? "<0.1 %" : `${number(100 * share, 1)} %`);
const bytesPerToken = ({ n_layers, n_kv_heads, head_dim }) => 2 * n_layers * n_kv_heads * head_dim * 4;

function cutSentence({ characters, kept_characters, tokens, kept_tokens }) {
  const cut = [];
  if (kept_characters < characters) cut.push(`the last ${whole(kept_characters)} of ${whole(characters)} characters were looked at`);
  if (kept_tokens < tokens) cut.push(`the last ${whole(kept_tokens)} of ${whole(tokens)} tokens are read`);
  if (!cut.length) return `${count(kept_tokens, "token")}, behind the one that begins every text.`;
  return `The text is longer than there is room for: ${cut.join(", and of those ")}.`;
}

function cacheSentence({ n_layers, n_kv_heads, head_dim, window }, { length, filled, nbytes }) {
  const product = `2 (keys and values) × ${n_layers} layers × ${heads(n_kv_heads)} × ${head_dim} numbers × 4 bytes`;
  const kept = filled < length
    ? `${count(length, "token")} seen, the last ${whole(filled)} kept: each new one takes the slot of the one that leaves the window of ${window}. `
    : "";
  return `${kept}${count(filled, "token")} × ${product} = ${whole(nbytes)} bytes.`;
}

// --- the explorer

function liveExplorer(data, host, el) {
  const byName = new Map(data.models.map((one) => [one.name, one]));
  const first = data.models[0];
  if (typeof Worker === "undefined") {
    el.append(h("p", { class: "x-problem" }, "This browser starts no workers, so the model cannot run here."));
    return undefined;
  }
  const arrived = new Map(data.models.map(({ name }) => [name, []])); // what came of each model's files
  const inWorker = new Set(); // names of models that it has
  const tried = new Map(); // name → what this text took
  const view = {}; // of the maps
  const state = {
    name: first.name,
    text: data.text,
    read: null, // the text that was read last
    prompt: null, // where the reading stood then
    reading: null, // and where it stands
    generated: 0,
    busy: false,
    closed: false,
  };
  let worker = null;
  let endMaps = null;
  let typing = null; // what waits for the end of typing
  const current = () => byName.get(state.name);

  // loading

  const problem = h("p", { class: "x-problem", role: "alert" });
  const bar = h("progress", { max: 1, value: 0, "aria-label": "Loading" });
  const loading = h("p", { class: "live-loading", hidden: true }, bar, h("span"));
  const status = h("div", {}, loading, problem);
  const start = button(`Run the ${first.name} here (${megabytes(downloadSize(first))})`, () => change(first.name));
  const invitation = h("div", {},
    h("p", {}, "The model can run here, in your browser. What you type stays with you; the weights come from where this page comes from."),
    h("div", { class: "x-row" }, start));

  /* Have a model in the worker. False, and why in words, if that was not to be had. */
  async function have(name) {
    problem.textContent = "";
    if (inWorker.has(name)) return true;
    const { files } = byName.get(name);
    const size = downloadSize(byName.get(name));
    let done = 0;
    try {
      loading.hidden = false;
      const bytes = await fetchModel(host, files, arrived.get(name), (i) => {
        done = files.slice(0, i).reduce((sum, { length }) => sum + length, 0);
        bar.value = done / size;
        loading.lastChild.textContent = ` ${name}: ${megabytes(done)} of ${megabytes(size)}`;
      });
      if (state.closed) return false;
      worker ??= startWorker();
      await worker.ask("load", { name, bytes }, [bytes.buffer]);
      arrived.set(name, []);
      inWorker.add(name);
      return true;
    } catch (error) {
      if (arrived.get(name).filter(Boolean).length === files.length) {
        problem.textContent = `The model could not run here: ${error.message}.`;
        if (!inWorker.size) {
          worker?.end();
          worker = null; // the next press tries another
        }
      } else {
        problem.textContent = `Loading ${name} broke off after ${megabytes(done)}: ${error.message}. What has come is kept; press again to load the rest.`;
      }
      return false;
    } finally {
      loading.hidden = true;
    }
  }

  // what is asked of the worker: one thing at a time, and of several wishes that wait the last

  let wish = null;
  async function work(act) {
    wish = act;
    el.dataset.working = "true";
    if (state.busy) return;
    state.busy = true;
    try {
      while (wish && !state.closed) {
        const next = wish;
        wish = null;
        await next();
      }
    } catch (error) {
      problem.textContent = `The model stopped: ${error.message}. Load the page again.`;
    } finally {
      state.busy = false;
      el.dataset.working = String(typing !== null);
    }
  }

  /* Another model, the same text; and as many tokens as the last one went on by. */
  function change(name) {
    return work(async () => {
      if (!(await have(name)) || state.closed) return;
      const again = state.generated;
      if (name !== state.name) forget(view, current(), byName.get(name));
      state.name = name;
      if (!el.contains(panel)) {
        el.replaceChildren(status, panel);
        el.dataset.running = "true"; // hides the recorded example
        textBox.focus();
      }
      await read();
      announce(el, `${name} has read the text`);
      if (again) await generate(again);
      await drawAtRest();
    });
  }

  async function read() {
    if (state.text !== state.read) tried.clear(); // what it took is of another text
    state.read = state.text;
    state.prompt = state.reading = await worker.ask("read", { name: state.name, text: state.text });
    state.generated = 0;
    note.textContent = cutSentence(state.prompt);
    if (state.text === state.read && textBox.value !== state.prompt.kept) textBox.value = state.prompt.kept;
    tried.set(state.name, { ...tried.get(state.name), read: [state.prompt.kept_tokens + 1, state.prompt.seconds] });
    show();
  }

  /* One token, the one given or the most probable. False where there is no room for more. */
  async function take(token) {
    const reading = await worker.ask("take", { token });
    if (reading.full) {
      note.textContent = `There is room for ${whole(state.reading.ids.length)} tokens on this page, and it is full. Change the text to begin again.`;
      return false;
    }
    state.reading = reading;
    state.generated++;
    show();
    return true;
  }

  async function generate(n) {
    const begun = performance.now();
    let done = 0;
    goOn.textContent = "Stop";
    while (done < n && !wish && !state.closed && !state.reading.next[0].ends && (await take())) done++;
    goOn.textContent = `Generate ${GENERATED} tokens`;
    if (done > 1) tried.set(state.name, { ...tried.get(state.name), rate: (1000 * done) / (performance.now() - begun) });
    if (state.closed) return;
    announce(el, `${done} tokens: ${state.reading.text.slice(state.prompt.text.length)}`);
  }

  // the text

  const note = h("p", { class: "x-faint", role: "status" });
  const textBox = h("textarea", { rows: 4, spellcheck: "false", autocapitalize: "off", autocomplete: "off" });
  textBox.value = state.text;
  textBox.addEventListener("input", () => readSoon(textBox.value));
  /* A box takes seconds to take in thousands of lines. What is long goes round it; read() puts into it what is kept. */
  textBox.addEventListener("paste", (event) => {
    const pasted = event.clipboardData.getData("text/plain");
    if (pasted.length < LONG_PASTE) return;
    event.preventDefault();
    const { value, selectionStart, selectionEnd } = textBox;
    readSoon(value.slice(0, selectionStart) + pasted.replace(/\r\n?/g, "\n") + value.slice(selectionEnd));
  });

  function readSoon(text) {
    state.text = text;
    el.dataset.working = "true";
    clearTimeout(typing);
    typing = setTimeout(() => {
      typing = null;
      work(async () => (await read(), await drawAtRest()));
    }, TYPING);
  }

  const models = h("div", { class: "x-row", role: "group", "aria-label": "Model" },
    data.models.map((one) => Object.assign(button("", () => change(one.name)), { model: one })));

  /* Go on by a candidate: the one that was pressed, else the most probable when its turn comes. */
  const add = (pressed) => work(async () => {
    const { id, piece } = pressed ?? state.reading.next[0];
    if (await take(id)) announce(el, `added ${piece}; now the most probable is ${state.reading.next[0].piece}`);
    await drawAtRest();
  });
  const step = button("Next token", () => add());
  /* The same button ends what it began: any new wish does. */
  const goOn = button(`Generate ${GENERATED} tokens`, () => {
    if (goOn.textContent === "Stop") wish = drawAtRest;
    else work(async () => (await generate(GENERATED), await drawAtRest()));
  });
  const back = button("Take them back", () => work(async () => (await read(), await drawAtRest())));

  const written = h("p", { class: "live-text x-scroll", tabindex: 0, role: "group", "aria-label": "The text, and what the model went on with" },
    h("span"), h("b"));

  // what comes next: buttons that stay, so that the focus does

  const candidates = Array.from({ length: 10 }, () => {
    const label = h("span", { class: "live-piece" });
    const share = h("span", { class: "live-share" });
    const fill = h("span", { class: "live-bar", "aria-hidden": "true" });
    const made = h("button", { type: "button", class: "live-candidate" }, label, fill, share);
    made.addEventListener("click", () => add(made.candidate));
    return Object.assign(made, { label, share, fill });
  });

  function showCandidates() {
    state.reading.next.forEach((candidate, i) => {
      const one = candidates[i];
      one.candidate = candidate;
      one.label.textContent = candidate.piece;
      one.share.textContent = percent(candidate.probability);
      one.fill.style.setProperty("--share", candidate.probability);
    });
  }

  // the cache

  const slot = svg("rect", { class: "live-slot" });
  const kept = svg("rect", { class: "live-kept" });
  const room = svg("rect", { class: "live-room" });
  const lines = svg("path", { class: "live-lines" });
  const cachePicture = svg("svg", { class: "live-cache", preserveAspectRatio: "none", role: "img" }, room, kept, slot, lines);
  const cacheWords = h("p", {});

  function showCache() {
    const { n_kv_heads, n_heads } = current();
    const { slots, length, filled } = state.reading.cache;
    const [width, height] = [Math.max(...data.models.map(({ window }) => window ?? 0), slots), ONE_HEAD * n_kv_heads];
    cachePicture.setAttribute("viewBox", `0 0 ${width} ${ONE_HEAD * n_heads}`);
    cachePicture.setAttribute("aria-label", `KV cache: ${whole(filled)} of ${whole(slots)} slots filled, ${heads(n_kv_heads)}`);
    const place = (rect, x, w) => Object.entries({ x, y: 0, width: w, height }).forEach(([name, value]) => rect.setAttribute(name, value));
    place(room, 0, slots);
    place(kept, 0, filled);
    place(slot, (length - 1) % slots, 1);
    lines.setAttribute("d", Array.from({ length: n_kv_heads - 1 }, (_, i) => `M0 ${ONE_HEAD * (i + 1)}h${slots}`).join(""));
    cacheWords.textContent = cacheSentence(current(), state.reading.cache);
  }

  // model beside model

  const comparison = h("div", { class: "live-comparison" });

  function showComparison() {
    const rows = data.models.filter(({ name }) => tried.has(name)).map((one) => {
      const { read: [tokens, seconds], rate } = tried.get(one.name);
      const keeps = Math.min(state.reading.cache.length, one.window ?? Infinity);
      return [one.name, one.n_kv_heads, whole(bytesPerToken(one)), whole(keeps * bytesPerToken(one)),
        `${whole(tokens)} in ${whole(Math.round(1000 * seconds))} ms`, rate ? whole(Math.round(rate)) : "–"];
    });
    const head = ["model", "K/V heads", "cache bytes a token", "cache bytes now", "tokens read", "tokens a second"];
    comparison.replaceChildren(table("Model beside model, on this text and this machine", head, rows));
  }

  function show() {
    const { text } = state.reading;
    const given = state.prompt.text.length;
    written.firstChild.textContent = text.slice(0, given);
    written.lastChild.textContent = text.slice(given);
    written.scrollTop = written.scrollHeight;
    for (const one of models.children) {
      const { name, n_kv_heads } = one.model;
      const size = inWorker.has(name) ? "" : ` (${megabytes(downloadSize(one.model))})`;
      one.textContent = `${name}: ${heads(n_kv_heads)}${size}`;
      one.setAttribute("aria-pressed", String(name === state.name));
    }
    showCandidates();
    showCache();
  }

  // the maps

  const maps = h("div", { class: "live-maps" });

  /* What takes longer than a token, and need not follow each of many. */
  async function drawAtRest() {
    if (state.closed || wish) return;
    showComparison();
    const record = await worker.ask("record");
    const last = record.key_tokens.length - 1;
    Object.assign(view, { at: last, side: "query", cell: null, shift: false, find: "" });
    maps.style.minHeight = `${maps.offsetHeight}px`; // so that the page does not jump
    endMaps?.();
    endMaps = await attentionExplorer({ ...record, head: data.head }, maps, view);
    maps.style.minHeight = "";
  }

  const panel = h("div", {},
    models,
    h("label", { class: "live-label" }, h("span", {}, "Text"), textBox), note,
    h("div", { class: "x-row" }, step, goOn, back),
    written,
    h("p", { class: "live-heading" }, "What may come next: press one to go on with it"),
    h("div", { class: "live-candidates" }, candidates),
    h("p", { class: "live-heading" }, "The KV cache: a column a slot, a row a K/V head; every layer has one like it"),
    cachePicture, cacheWords, comparison,
    h("p", { class: "live-heading" }, "What every head looks at"), maps);
  el.append(invitation, status);

  return () => {
    state.closed = true;
    clearTimeout(typing);
    worker?.end();
    endMaps?.();
    delete el.dataset.running;
    delete el.dataset.working;
    el.replaceChildren();
  };
}

/* A view of one model's maps, for another's: what hangs on K/V heads begins anew. */
function forget(view, before, after) {
  if (view.byGroup) Object.assign(view, { index: view.index * (before.n_heads / before.n_kv_heads), byGroup: false });
  if (!(view.layer < after.n_layers && view.index < after.n_heads)) Object.assign(view, { layer: 0, index: 0 });
}
