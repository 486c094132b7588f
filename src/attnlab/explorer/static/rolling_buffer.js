/* The rolling-buffer explorer: RollingKVCache step by step, and beside it the mask.

   On the left each column is a slot, and positions are written in reading order, as many rows as the text goes round: position
   p stands in column p mod window. What is kept is always the last `window` positions. On the right each row is a query. */

export default explorer("rolling-buffer", ({ data, el }) => rollingBuffer(data, el));

// --- the cache, as in attnlab/cache.py; attnlab/explorer/rolling_buffer.py takes the same steps from it

const range = (start, stop) => Array.from({ length: Math.max(0, stop - start) }, (_, i) => start + i);

/* i - window < j <= i */
const visible = (query, window) => range(Math.max(0, query - window + 1), query + 1);

/* A pass of one token is written, then looks: what it overwrites has just left its window. A longer pass looks first, since
   its first queries still see what it overwrites: a step for each query, and one that writes. Empty slots hold null. */
function rollingSteps(window, n_tokens, chunk) {
  const steps = [];
  let before = Array(window).fill(null);
  for (let start = 0; start < n_tokens; start += chunk) {
    const pass = range(start, Math.min(start + chunk, n_tokens));
    const written = pass.slice(-window); // two tokens of one pass must not meet in one slot
    const after = [...before];
    for (const position of written) after[position % window] = position;
    const overwritten = before.filter((position) => position !== null && !after.includes(position)).sort((a, b) => a - b);
    const looks = pass.map((query) => ({ query, sees: visible(query, window), written: [], overwritten: [], held: before, pass, after }));
    if (pass.length === 1) steps.push({ ...looks[0], written, overwritten, held: after });
    else steps.push(...looks, { query: null, sees: [], written, overwritten, held: after, pass, after });
    before = after;
  }
  return steps;
}

// --- in words

const join = (words) => (words.length < 2 ? words.join("") : `${words.slice(0, -1).join(", ")} and ${words.at(-1)}`);

/* 3, 4, 5 are "3 to 5"; 3, 0, 1 are "3, 0 and 1" */
function listing(numbers) {
  const inARow = numbers.length > 2 && numbers.every((n, i) => n === numbers[0] + i);
  return inARow ? `${numbers[0]} to ${numbers.at(-1)}` : join(numbers);
}

const counted = (noun, numbers) => `${noun}${numbers.length === 1 ? "" : "s"} ${listing(numbers)}`;

function inWords(step, window, name) {
  const { query, sees, written, overwritten, pass, after } = step;
  const over = overwritten.length
    ? `over ${counted("position", overwritten)}, which no query sees from here on`
    : written.length === 1 ? "which was empty" : "which were empty";
  const slots = counted("slot", written.map((position) => position % window));
  if (query === null) {
    const left = pass.length - written.length;
    return `The chunk has looked, and is written: ${counted("position", written)} to ${slots}, ${over}.` +
      (left ? ` ${counted("Position", pass.slice(0, left))} ${left === 1 ? "is" : "are"} never written: the cache keeps the last ${window}.` : "");
  }
  if (pass.length === 1) {
    return `Position ${name(query)} goes to ${slots} (${query} mod ${window}), ${over}. ` +
      `Then its query sees ${counted("position", sees)}: all that is kept.`;
  }
  const lost = sees.filter((position) => !after.includes(position));
  const own = sees.filter((position) => pass.includes(position));
  const kept = sees.filter((position) => !pass.includes(position));
  return `The query at ${name(query)} looks before its chunk, ${listing(pass)}, is written. It sees ` +
    (kept.length ? `${counted("position", kept)} from the cache and ${listing(own)} of the chunk` : `${counted("position", own)}, all of the chunk`) +
    (lost.length ? `. Had the chunk been written first, ${listing(lost)} would be gone.` : ".");
}

// --- the explorer

function rollingBuffer(data, el) {
  const { words } = data;
  const state = { window: data.window, n_tokens: data.n_tokens, chunk: data.chunk, at: data.step };
  const name = (position) => (words ? `${position} “${words[position]}”` : String(position));
  let steps = rollingSteps(state.window, state.n_tokens, state.chunk);
  let drawn = false;

  /* The same query stays, if it is still there. */
  function change(changes) {
    const query = steps[state.at].query ?? steps[state.at].pass.at(-1);
    Object.assign(state, changes);
    state.chunk = Math.min(state.chunk, state.n_tokens);
    steps = rollingSteps(state.window, state.n_tokens, state.chunk);
    const found = steps.findIndex((step) => step.query === query);
    state.at = found < 0 ? steps.length - 1 : found;
    show();
  }

  function go(to) {
    const at = Math.max(0, Math.min(steps.length - 1, to));
    if (at === state.at) return;
    state.at = at;
    showStep();
  }

  const windowSlider = slider({
    label: "window", min: 1, max: data.max_window, value: state.window, onInput: (window) => change({ window }),
  });
  const tokens = slider({
    label: "tokens", min: 1, max: data.max_tokens, value: state.n_tokens, onInput: (n_tokens) => change({ n_tokens }),
  });
  const chunk = slider({
    label: "chunk", min: 1, max: state.n_tokens, value: state.chunk, // tokens of a pass
    onInput: (n) => change({ chunk: n }),
  });
  const stepSlider = slider({
    label: "step", min: 0, max: 0, value: 0, format: (at) => `${at + 1} of ${steps.length}`, onInput: go,
  });
  const first = button("First", () => go(0));
  const back = button("Back", () => go(state.at - 1));
  const forward = button("Forward", () => go(state.at + 1));

  // The slider has these keys itself; beside it they do the same.
  function moveByKey(event) {
    if (event.target === stepSlider.input || event.altKey || event.ctrlKey || event.metaKey) return;
    const to = { ArrowLeft: state.at - 1, ArrowRight: state.at + 1, Home: 0, End: steps.length - 1 }[event.key];
    if (to === undefined) return;
    event.preventDefault(); // the page stays where it is
    go(to);
  }

  const slots = h("div", { class: "x-scroll rolling-box", tabindex: 0, role: "group", "aria-label": "The slots" });
  const mask = h("div", { class: "x-scroll rolling-box", tabindex: 0, role: "group", "aria-label": "The mask" });
  const says = h("p", { class: "rolling-says" });
  const every = h("div");

  function showStep() {
    const step = steps[state.at];
    stepSlider.set(state.at);
    [first, back].forEach((b) => b.setAttribute("aria-disabled", String(state.at === 0))); // still there for the focus
    forward.setAttribute("aria-disabled", String(state.at === steps.length - 1));
    says.textContent = inWords(step, state.window, name);
    redraw(slots, slotGrid(step, state, words));
    redraw(mask, maskPicture(step, state, (query) => go(steps.findIndex((one) => one.query === query))));
    if (drawn) announce(el, `Step ${state.at + 1} of ${steps.length}. ${says.textContent}`);
    drawn = true;
  }

  function show() {
    windowSlider.set(state.window);
    tokens.set(state.n_tokens);
    chunk.input.max = state.n_tokens;
    chunk.set(state.chunk);
    stepSlider.input.max = steps.length - 1;
    every.replaceChildren(table("Every step; kept: slot by slot, when the step is over",
      ["step", "query", "sees", "written", "overwritten", "kept"],
      steps.map(({ query, sees, written, overwritten, held }, i) =>
        [i + 1, query ?? "–", ...[sees, written, overwritten, held].map(cellText)])));
    showStep();
  }

  el.append(
    h("div", { class: "x-row" }, windowSlider, tokens, chunk),
    h("div", { class: "x-row", role: "group", "aria-label": "steps", onKeydown: moveByKey },
      h("span", { class: "rolling-buttons" }, first, back, forward), stepSlider),
    says,
    h("div", { class: "rolling-panels" },
      h("div", {}, h("p", { class: "rolling-title" }, "The cache: slot = position mod window"), slots, legend([
        ["rolling-seen", "seen by this query"], ["rolling-kept", "kept, not seen"], ["rolling-waiting", "of this chunk, not written yet"],
        ["rolling-over", "overwritten in this step"], ["rolling-gone", "gone"], ["rolling-to-come", "to come"],
      ])),
      h("div", {}, h("p", { class: "rolling-title" }, "The mask: a query a row, a key a column"), mask, legend([
        ["rolling-seen", "seen"], ["rolling-old", "beyond the window"], ["rolling-mark", "key is in a slot"],
      ]))),
    h("p", { class: "x-faint" }, "The slots' order is not the text's order, and need not be: each key was rotated by its own " +
      "position before it was stored."),
    details("Every step in a table", every));
  show();
}

const cellText = (positions) => (positions.length ? positions.map((position) => position ?? "–").join(" ") : "–");

/* Draw anew inside a box that scrolls, and bring what is marked into view there, not moving the page. */
function redraw(box, picture) {
  const { scrollLeft, scrollTop } = box;
  box.replaceChildren(picture);
  box.scrollTo(scrollLeft, scrollTop);
  const mark = picture.querySelector(".rolling-now");
  if (!mark) return;
  const [inner, outer] = [mark.getBoundingClientRect(), box.getBoundingClientRect()];
  if (inner.top < outer.top || inner.bottom > outer.bottom) box.scrollTop += inner.top - outer.top - box.clientHeight / 2;
  if (inner.left < outer.left || inner.right > outer.right) box.scrollLeft += inner.left - outer.left - box.clientWidth / 2;
}

/* What has become of a position when a step is over. */
function fate(position, { query, overwritten, held, pass, sees }) {
  const waiting = query !== null && pass.length > 1 && pass.includes(position);
  if (sees.includes(position)) return waiting ? "seen rolling-waiting" : "seen";
  if (overwritten.includes(position)) return "over";
  if (held.includes(position)) return "kept";
  if (waiting) return "waiting";
  return position <= pass.at(-1) ? "gone" : "to-come";
}

function slotGrid(step, { window, n_tokens }, words) {
  const cell = (position, classes) => h("div", { class: `rolling-cell ${classes}`, "data-position": position ?? "" },
    position ?? "–", words && position !== null && h("small", {}, words[position]));
  const laps = range(0, Math.ceil(n_tokens / window)).map((lap) => range(lap * window, Math.min((lap + 1) * window, n_tokens)));
  const label = (text) => h("div", { class: "rolling-label" }, text);
  const kept = step.held.map((position) => {
    const state = position === null ? "to-come" : step.sees.includes(position) ? "seen" : "kept";
    return cell(position, `rolling-${state}${step.written.includes(position) ? " rolling-new" : ""}`);
  });
  const what = `Slot by slot the cache holds ${join(step.held.map((position) => position ?? "nothing"))}`;
  return h("div", {
    class: `rolling-grid${words ? " rolling-words" : ""}`, role: "img", "aria-label": what, style: { "--slots": window },
  },
    label("slot"), range(0, window).map((slot) => h("div", { class: "rolling-slot" }, slot)),
    label("kept"), kept.map((one) => (one.classList.add("rolling-held"), one)),
    laps.map((lap) => [
      h("div", { class: "rolling-label rolling-lap" }, lap.length === 1 ? lap[0] : `${lap[0]}–${lap.at(-1)}`),
      lap.map((position) => cell(position, `rolling-${fate(position, step)}${position === step.query ? " rolling-now" : ""}`)),
    ]));
}

function maskPicture(step, { window, n_tokens }, onChoose) {
  const [size, edge] = [n_tokens <= 12 ? 20 : 16, 22];
  const at = (i) => edge + i * size;
  const rows = range(0, n_tokens).map((query) => {
    const seen = visible(query, window);
    const now = query === step.query;
    return svg("g", { class: `rolling-row${now ? " rolling-now" : ""}`, "data-query": query, onClick: () => onChoose(query) },
      svg("rect", { class: "rolling-ground", x: 0, y: at(query), width: at(n_tokens), height: size }),
      svg("text", { x: edge - 4, y: at(query) + size / 2 + 4, "text-anchor": "end" }, query),
      range(0, query + 1).map((key) => (seen.includes(key)
        ? svg("rect", { class: "rolling-seen", "data-key": key, x: at(key) + 1, y: at(query) + 1, width: size - 2, height: size - 2 })
        : svg("path", { class: "rolling-old", d: `M${at(key) + 4},${at(query) + size - 4}l${size - 8},${8 - size}` }))));
  });
  // of a chunk that is written at once, all rows
  const band = step.query === null ? step.pass : [step.query];
  const outline = svg("rect", {
    class: "rolling-outline", x: at(0) - 0.5, y: at(band[0]) - 0.5, width: n_tokens * size + 1, height: band.length * size + 1,
  });
  const names = range(0, n_tokens).map((key) => svg("text", { x: at(key) + size / 2, y: 12, "text-anchor": "middle" }, key));
  const marks = step.held.filter((key) => key !== null).map((key) =>
    svg("rect", { class: "rolling-mark", "data-kept": key, x: at(key) + 2, y: 15, width: size - 4, height: 4 }));
  const [width, high] = [at(n_tokens) + 2, at(n_tokens) + 2];
  const what = step.query === null
    ? `Mask of ${n_tokens} tokens with a window of ${window}`
    : `Mask of ${n_tokens} tokens: the query at ${step.query} sees ${listing(step.sees)}`;
  return svg("svg", { width, height: high, viewBox: `0 0 ${width} ${high}`, role: "img", "aria-label": what }, names, marks, rows, outline);
}

function legend(entries) {
  return h("ul", { class: "rolling-legend" }, entries.map(([look, text]) =>
    h("li", {}, h("span", { class: `rolling-swatch ${look}`, "aria-hidden": "true" }), text)));
}
