/* The attention explorer: every head as a thumbnail, one head as a heat map, its weights between the tokens of the text.

   What comes from Python (attention.py) is a layer's weights in bytes, and they are unpacked here when they are looked at.
   T queries, S keys; a map is a Float32Array of T × S weights, row by row. Thumbnails are small pictures in buttons with
   names; what is read is SVG and text. */

const THUMBNAIL = 16; // cells a side, at most, of thumbnails sent beside the layers
const SHARP = 64; // cells a side, at most, of a thumbnail whose layer is here
const IN_VIEW = 128; // thumbnails: about as many are seen before one scrolls
const CURVES = 40; // drawn at most from one token
const LARGEST_TABLE = 64 * 64; // weights; beyond that a table shows the chosen token's
const ORDERS = {
  layer: "layer and head",
  entropy: "entropy, lowest first",
  "-entropy": "entropy, highest first",
  distance: "distance, nearest first",
  "-distance": "distance, farthest first",
  "-first": "weight on the first token",
};
const MEASURES = {
  entropy: ["entropy", "bits"],
  distance: ["mean distance", "tokens"],
  first: ["on the first token", ""],
};

export default explorer("attention", ({ data, el }) => attentionExplorer(data, el));

// --- weights

const SCALES = Float32Array.from({ length: 256 }, (_, byte) => 2 ** (-byte / 16) / 255);

async function inflate(text) {
  if (ArrayBuffer.isView(text)) return text; // never packed
  const stream = new Blob([bytes64(text)]).stream().pipeThrough(new DecompressionStream("deflate"));
  return new Uint8Array(await new Response(stream).arrayBuffer());
}

/* Which keys a query sees: [from, to). The last query stands beside the last key; a window counts the query's own. */
function limits({ query_tokens, key_tokens, causal, window }) {
  const [T, S] = [query_tokens.length, key_tokens.length];
  const to = (q) => (causal ? Math.max(0, q + S - T + 1) : S);
  const from = (q) => (causal && window ? Math.max(0, q + S - T + 1 - window) : 0);
  return { T, S, from, to };
}

/* One head's map from its layer's bytes: each row a scale, then the keys up to the query; see encode in attention.py. */
function unpack(bytes, head, { T, S, to }) {
  let length = 0;
  for (let q = 0; q < T; q++) length += to(q) && to(q) + 1;
  if (bytes.length % length) throw new Error("it is cut off");
  const map = new Float32Array(T * S);
  let at = head * length;
  for (let q = 0; q < T; q++) {
    if (!to(q)) continue;
    const scale = SCALES[bytes[at++]];
    map[q * S] = bytes[at++] / 255;
    for (let k = 1; k < to(q); k++) map[q * S + k] = bytes[at++] * scale;
  }
  return map;
}

function mean(maps) {
  const sum = new Float32Array(maps[0].length);
  for (const map of maps) for (let i = 0; i < sum.length; i++) sum[i] += map[i] / maps.length;
  return sum;
}

/* The first key taken out, and what each row has left rescaled to a whole. */
function withoutFirst(map, { T, S }) {
  for (let q = 0; q < T; q++) {
    const row = map.subarray(q * S, (q + 1) * S);
    row[0] = 0;
    const left = row.reduce((sum, weight) => sum + weight, 0);
    if (left > 0) for (let k = 1; k < S; k++) row[k] /= left;
  }
  return map;
}

/* Blocks of tall × wide weights, each its largest, so that a thin line stays a line. */
function largestOfBlocks(map, { T, S }, tall, wide) {
  if (tall === 1 && wide === 1) return map;
  const across = Math.ceil(S / wide);
  const blocks = new Float32Array(Math.ceil(T / tall) * across);
  for (let q = 0; q < T; q++) {
    for (let k = 0; k < S; k++) {
      const at = Math.floor(q / tall) * across + Math.floor(k / wide);
      blocks[at] = Math.max(blocks[at], map[q * S + k]);
    }
  }
  return blocks;
}

// --- pictures

const COLOURS = Array.from({ length: 254 }, (_, i) => cividis(i / 253));
const HATCH = { stroke: 254, ground: 255 }; // in a bitmap's palette, after the colours
const PALETTE = [...COLOURS.map((_, i) => cividisRGB(i / 253)), [125, 132, 140], [232, 235, 238]]
  .flatMap(([red, green, blue]) => [blue, green, red, 0]);
const PALETTE_END = 54 + PALETTE.length;

const colourIndex = (weight, largest) => Math.max(0, Math.min(253, Math.round((253 * weight) / largest)));

/* A small picture as an address: an uncompressed bitmap with a palette. A canvas a head would be a thousand layers, which
   the browser would put together again at every move of the pointer. */
function bitmap(width, height, colourAt) {
  const stride = Math.ceil(width / 4) * 4;
  const bytes = new Uint8Array(PALETTE_END + stride * height);
  const view = new DataView(bytes.buffer);
  bytes.set([0x42, 0x4d]); // BM
  const words = [[2, bytes.length], [10, PALETTE_END], [14, 40], [18, width], [22, height]];
  for (const [at, word] of words) view.setUint32(at, word, true);
  view.setUint16(26, 1, true); // plane
  view.setUint16(28, 8, true); // bits a pixel
  bytes.set(PALETTE, 54);
  for (let y = 0; y < height; y++) {
    const row = PALETTE_END + (height - 1 - y) * stride; // the last row comes first
    for (let x = 0; x < width; x++) bytes[row + x] = colourAt(y, x);
  }
  return `data:image/bmp;base64,${btoa(String.fromCharCode(...bytes))}`;
}

/* The lines where the masks end: a staircase to the right (causal), one to the left (window). */
function edges({ causal }, { T, from, to }) {
  const staircase = (edge) =>
    Array.from({ length: T }, (_, q) => `${q ? "L" : "M"}${edge(q)} ${q}v1`).join("");
  return (causal ? staircase(to) : "") + (from(T - 1) > 0 ? staircase(from) : "");
}

/* The cells of a map as paths, a cell being 1 × 1: one path a colour, for thousands of rectangles are slow and 254 paths
   are not, and one for the strokes that say a cell is hidden. */
function cellPaths(map, largest, { T, S, from, to }) {
  const colours = new Map();
  let hatch = "";
  for (let q = 0; q < T; q++) {
    for (let k = 0; k < S; k++) {
      if (k < from(q) || k >= to(q)) {
        hatch += `M${k} ${q + 1}l1 -1`;
        continue;
      }
      const colour = colourIndex(map[q * S + k], largest);
      const start = k; // neighbours of one colour are one rectangle
      while (k + 1 < to(q) && colourIndex(map[q * S + k + 1], largest) === colour) k++;
      const width = k + 1 - start;
      colours.set(colour, `${colours.get(colour) ?? ""}M${start} ${q}h${width}v1h${-width}z`);
    }
  }
  return { colours, hatch };
}

/* The heat map's SVG; over it another for what moves, so that the map is not painted again when it does. */
function heatMap({ map, largest, name, data, see, seen }) {
  const { T, S } = see;
  const size = Math.max(4, Math.min(16, Math.floor(580 / Math.max(T, S))));
  const font = Math.min(12, Math.max(9, size));
  const every = Math.ceil((font + 1) / size);
  const room = (tokens) => 8 + 0.62 * font * Math.max(...tokens.map((token) => short(token).length));
  const [left, top] = [room(data.query_tokens), room(data.key_tokens)];
  const [width, height] = [left + S * size + 2, top + T * size + 2];
  const box = { viewBox: `0 0 ${width} ${height}`, width, height };
  const inside = { transform: `translate(${left} ${top})` };

  const label = { dy: "0.35em", fill: "currentColor" };
  const middle = (i) => (i + 0.5) * size;
  const queries = data.query_tokens.map((token, q) =>
    q % every ? null : svg("text", { ...label, x: -4, y: middle(q), "text-anchor": "end" }, short(token)));
  const keys = data.key_tokens.map((token, k) =>
    k % every ? null : svg("text", { ...label, transform: `translate(${middle(k)} -4) rotate(-90)` }, short(token)));

  const { colours, hatch } = cellPaths(map, largest, seen);
  const root = svg("svg", {
    ...box, class: "attention-heat", tabindex: 0, role: "application", "font-size": font,
    "font-family": "system-ui, sans-serif", "aria-label": `Heat map of ${name}: arrow keys move from weight to weight`,
  },
    svg("g", inside,
      svg("g", { transform: `scale(${size})`, "shape-rendering": "crispEdges" },
        [...colours].map(([colour, d]) => svg("path", { d, fill: COLOURS[colour] }))),
      svg("g", { transform: `scale(${size})`, fill: "none", stroke: "currentColor" },
        svg("path", { d: hatch, "stroke-width": 0.5 / size, opacity: 0.45 }),
        svg("path", { class: "attention-limit", d: edges(data, see), "stroke-width": 1.5 / size })),
      queries, keys));

  const row = svg("rect", { class: "attention-band" });
  const column = svg("rect", { class: "attention-band" });
  const cell = svg("rect", { class: "attention-cell" });
  const cursor = svg("svg", { ...box, class: "attention-cursor", "aria-hidden": "true" },
    svg("g", inside, row, column, cell));
  return { root, cursor, row, column, cell, queries, keys, size, left, top, width, height };
}

/* From one token's place to another's: a bow over a line of text, or across the space between two lines. */
function curve(start, end) {
  const bow = Math.min(26, 8 + Math.abs(end.x - start.x) / 12);
  if (Math.abs(end.top - start.top) <= 2) {
    return `M${start.x} ${start.top}C${start.x} ${start.top - bow} ${end.x} ${end.top - bow} ${end.x} ${end.top}`;
  }
  const down = end.top > start.top;
  const [leave, arrive] = down ? [start.bottom, end.top] : [start.top, end.bottom];
  const lean = down ? bow : -bow;
  return `M${start.x} ${leave}C${start.x} ${leave + lean} ${end.x} ${arrive - lean} ${end.x} ${arrive}`;
}

// --- words

const endsLine = (token) => /[\n⏎Ċ]$/.test(token);
const quoted = (token) => `“${shown(token)}”`;
const short = (token) => (shown(token).length > 12 ? `${shown(token).slice(0, 11)}…` : shown(token));
const weightText = (weight) => {
  if (weight === undefined) return "–"; // hidden
  return weight > 0 && weight < 0.005 ? "<0.01" : weight.toFixed(2);
};
function shown(token) {
  if (token === "") return "(empty)";
  const visible = token.replace(/\n/g, "⏎").replace(/\t/g, "⇥");
  return visible.trim() === "" ? visible.replace(/ /g, "·") : visible;
}

// --- the explorer

/* view: where the reader stands. live.js draws anew after every token, and hands over the last drawing's. */
async function attentionExplorer(data, el, view = {}) {
  const { n_layers, n_heads, n_kv_heads, query_tokens, key_tokens, cross } = data;
  const groupSize = n_heads / n_kv_heads;
  const see = limits(data);
  const { T, S } = see;
  const inView = Math.ceil(IN_VIEW / n_heads); // layers
  const everyLayer = Array.from({ length: n_layers }, (_, layer) => layer);
  const measures = Object.keys(MEASURES).filter((name) => !cross || name !== "distance");
  const layers = new Map(); // layer → bytes, once they are here
  let pooled = null; // the thumbnails' bytes, where they came beside the layers
  let map = null; // of the open head
  let closed = false;
  const state = Object.assign(view, {
    layer: data.head[0],
    index: data.head[1], // a head, or a K/V head where heads are averaged
    byGroup: false,
    hideFirst: false,
    oneScale: false,
    order: "layer",
    side: "query", // of the chosen token
    at: T - 1,
    cell: null, // [query, key] under the pointer
    whoLooks: false, // at the chosen token; Shift turns it over
    shift: false,
    find: "",
  }, { ...view });

  const perLayer = () => (state.byGroup ? n_kv_heads : n_heads);
  const kvHead = (index) => (state.byGroup ? index : Math.floor(index / groupSize));
  const seen = { ...see, from: (q) => (state.hideFirst ? Math.max(1, see.from(q)) : see.from(q)) };
  const weightAt = (q, k) => (k >= seen.from(q) && k < seen.to(q) ? map[q * S + k] : undefined);
  const scale = (weights) => (state.oneScale ? 1 : weights.reduce((a, b) => Math.max(a, b), 0) || 1);
  const looksAt = () => (cross ? state.side === "query" : state.whoLooks === state.shift); // else: who looks at it

  function measure(name, layer, index) {
    const numbers = data.numbers[state.byGroup ? "groups" : "heads"];
    const column = state.hideFirst && name !== "first" ? `${name}_without_first` : name;
    return numbers[column][layer * perLayer() + index];
  }

  function headName(layer, index) {
    const shared = groupSize > 1 ? ` (K/V head ${kvHead(index)})` : "";
    if (!state.byGroup) return `layer ${layer}, head ${index}${shared}`;
    return `layer ${layer}, mean of heads ${index * groupSize} to ${(index + 1) * groupSize - 1}${shared}`;
  }

  async function fetchLayers(...wanted) {
    const fetchOne = async (layer) => layers.set(layer, await inflate(await part(data, "layers", layer)));
    await Promise.all(wanted.filter((layer) => !layers.has(layer)).map(fetchOne));
  }

  function headMap(layer, index) {
    const members = state.byGroup ? Array.from({ length: groupSize }, (_, g) => index * groupSize + g) : [index];
    const found = mean(members.map((head) => unpack(layers.get(layer), head, see)));
    return state.hideFirst ? withoutFirst(found, see) : found;
  }

  // thumbnails

  const heads = h("div", {
    class: "attention-heads", role: "group", "aria-label": "All heads: arrow keys move, Enter opens one",
  });
  let headButtons = []; // in the order shown
  let builds = 0; // how often they were built: what was still to come of an earlier time is dropped

  function ordered() {
    const all = everyLayer.flatMap((layer) => Array.from({ length: perLayer() }, (_, index) => [layer, index]));
    if (state.order === "layer") return all;
    const [name, sign] = [state.order.replace("-", ""), state.order.startsWith("-") ? -1 : 1];
    return all.sort((a, b) => sign * (measure(name, ...a) - measure(name, ...b)));
  }

  function headButton([layer, index]) {
    const sorted = state.order !== "layer";
    const value = sorted ? measure(state.order.replace("-", ""), layer, index).toFixed(2) : "";
    const picture = h("img", { alt: "", width: 34, height: 34 });
    const label = h("span", { class: "attention-head-label" }, sorted ? `${layer}.${index} ${value}` : index);
    const name = headName(layer, index) + (sorted ? `, ${value}` : "");
    const made = h("button", { type: "button", class: "attention-head", "aria-label": name }, picture, label);
    return press(Object.assign(made, { layer, index, picture }));
  }

  /* One layer: heads that share a K/V head stand in one frame. */
  function headRow(layer, mine) {
    const frames = Array.from({ length: n_kv_heads }, (_, kv) =>
      h("div", { class: "attention-group" },
        groupSize > 1 && h("span", { class: "attention-group-label" }, `K/V ${kv}`),
        h("div", { class: "attention-members" }, mine.filter((button) => kvHead(button.index) === kv))));
    return h("div", { class: "attention-layer" },
      h("span", { class: "attention-layer-label" }, `layer ${layer}`), h("div", { class: "attention-groups" }, frames));
  }

  function rowsOf(made) {
    const rows = [];
    for (let at = 0; at < made.length; at += perLayer()) rows.push(headRow(made[at].layer, made.slice(at, at + perLayer())));
    return rows;
  }

  /* Once what is drawn now has been seen: at the start of the frame after its own. */
  const afterFrame = (act) => requestAnimationFrame(() => requestAnimationFrame(() => closed || act()));

  /* A thousand thumbnails take longer than a frame: what is in view comes first, the rest while the page already answers. */
  function buildHeads() {
    const all = ordered();
    const first = inView * perLayer();
    const sorted = state.order !== "layer" && h("div", { class: "attention-sorted" });
    headButtons = [];
    heads.replaceChildren(sorted || "");
    const add = (some) => {
      const made = some.map(headButton);
      headButtons.push(...made);
      if (sorted) sorted.append(...made);
      else heads.append(...rowsOf(made));
      paintSoon(made, 25);
    };
    add(all.slice(0, first));
    const build = ++builds;
    if (all.length > first) afterFrame(() => build === builds && add(all.slice(first)));
  }

  function paintSoon(waiting, milliseconds) {
    const until = performance.now() + milliseconds;
    let next = 0;
    while (next < waiting.length && performance.now() < until) paint(waiting[next++]);
    const left = waiting.slice(next);
    if (left.length) afterFrame(() => left[0].isConnected && paintSoon(left, 10));
  }

  function paint({ picture, layer, index }) {
    const here = layers.has(layer);
    if (!here && !pooled) return;
    const cells = here ? SHARP : THUMBNAIL;
    const [tall, wide] = [Math.ceil(T / cells), Math.ceil(S / cells)]; // queries and keys in one cell
    const [down, across] = [Math.ceil(T / tall), Math.ceil(S / wide)];
    const blocks = here
      ? largestOfBlocks(headMap(layer, index), see, tall, wide)
      : pooledBlocks(layer, index, down * across);
    const largest = scale(blocks);
    picture.src = bitmap(across, down, (y, x) => {
      const [first, last] = [y * tall, Math.min(T, (y + 1) * tall) - 1];
      const visible = x * wide < seen.to(last) && (x + 1) * wide > seen.from(first);
      if (visible) return colourIndex(blocks[y * across + x], largest);
      return (x + y) % 3 ? HATCH.ground : HATCH.stroke;
    });
  }

  /* The same before its layer is here, as thumbnails in attention.py made them. */
  function pooledBlocks(layer, index, length) {
    const members = state.byGroup ? groupSize : 1;
    const start = (layer * n_heads + index * members) * length;
    return mean(Array.from({ length: members }, (_, g) => {
      const bytes = pooled.subarray(start + g * length, start + (g + 1) * length);
      return Float32Array.from(bytes, (byte) => byte / 255);
    }));
  }

  function press(button) {
    const open = String(button.layer === state.layer && button.index === state.index);
    if (button.getAttribute("aria-pressed") !== open) button.setAttribute("aria-pressed", open);
    button.tabIndex = open === "true" ? 0 : -1;
    return button;
  }

  heads.addEventListener("click", (event) => {
    const button = event.target.closest(".attention-head");
    if (button) open(button.layer, button.index);
  });
  heads.addEventListener("keydown", (event) => {
    const at = headButtons.indexOf(event.target);
    const row = state.order === "layer" ? perLayer() : 1;
    const moves = { ArrowLeft: at - 1, ArrowRight: at + 1, ArrowUp: at - row, ArrowDown: at + row };
    const to = { ...moves, Home: 0, End: headButtons.length - 1 }[event.key];
    if (at < 0 || to === undefined) return;
    event.preventDefault();
    if (!headButtons[to]) return;
    headButtons[at].tabIndex = -1;
    headButtons[to].tabIndex = 0;
    headButtons[to].focus();
  });

  // the open head

  const title = h("p", { class: "attention-title" });
  const figures = h("p", { class: "attention-figures" });
  const trouble = h("p", { class: "x-problem", role: "alert", hidden: true });
  const mapBox = h("div", { class: "attention-map" });
  const legend = h("p", { class: "attention-legend" });
  const readout = h("p", { class: "attention-readout" });
  let drawing = null; // what heatMap made

  async function open(layer, index) {
    Object.assign(state, { layer, index });
    headButtons.forEach(press);
    const gone = () => closed || state.layer !== layer || state.index !== index; // to another head, meanwhile
    try {
      const fresh = !layers.has(layer);
      await fetchLayers(layer);
      if (gone()) return;
      if (fresh) headButtons.filter((button) => button.layer === layer).forEach(paint);
      drawHead();
    } catch (error) {
      if (gone()) return;
      fail(`The maps of layer ${layer} could not be read (${error.message}). Load the page again; other layers may open.`);
    }
  }

  function fail(sentence) {
    trouble.textContent = sentence;
    trouble.hidden = false;
    whole.hidden = true;
  }

  function drawHead() {
    map = headMap(state.layer, state.index);
    trouble.hidden = true;
    whole.hidden = false;
    const name = headName(state.layer, state.index);
    title.textContent = name[0].toUpperCase() + name.slice(1);
    figures.textContent = measures.map((key) => {
      const [words, unit] = MEASURES[key];
      return `${words} ${measure(key, state.layer, state.index).toFixed(2)} ${unit}`.trim();
    }).join(" · ");
    drawing = heatMap({ map, largest: scale(map), name, data, see, seen });
    drawing.root.addEventListener("pointermove", point);
    drawing.root.addEventListener("pointerdown", point);
    drawing.root.addEventListener("keydown", step);
    mapBox.replaceChildren(h("div", { class: "attention-layers" }, drawing.root, drawing.cursor));
    fillLegend();
    markFound();
    repaint();
    if (headTable.open) fillHeadTable();
  }

  function fillLegend() {
    const hidden = [];
    if (data.causal) hidden.push("what comes after the query");
    if (see.from(T - 1) > 0) hidden.push(`what lies outside the window of ${data.window}`);
    if (state.hideFirst) hidden.push("the first token");
    const ramp = `linear-gradient(to right, ${[0, 0.25, 0.5, 0.75, 1].map(cividis)})`;
    legend.replaceChildren(
      h("span", { class: "attention-ramp", style: { background: ramp }, "aria-hidden": "true" }),
      `0 (dark) to ${scale(map).toFixed(2)} (light)${hidden.length ? `; hatched: ${hidden.join(", ")}` : ""}`);
  }

  function point(event) {
    const { root, size, left, top, width, height } = drawing;
    const box = root.getBoundingClientRect();
    const k = Math.floor(((event.clientX - box.left) * (width / box.width) - left) / size);
    const q = Math.floor(((event.clientY - box.top) * (height / box.height) - top) / size);
    if (k >= 0 && q >= 0 && k < S && q < T) chooseCell(q, k, event.shiftKey);
  }

  function step(event) {
    const move = { ArrowLeft: [0, -1], ArrowRight: [0, 1], ArrowUp: [-1, 0], ArrowDown: [1, 0] }[event.key];
    if (!move) return;
    event.preventDefault();
    const [q, k] = state.cell ?? [state.side === "query" ? state.at : T - 1, 0];
    const within = (place, n) => Math.max(0, Math.min(n - 1, place));
    chooseCell(within(q + move[0], T), within(k + move[1], S), event.shiftKey);
    drawing.cell.scrollIntoView({ block: "nearest", inline: "nearest" });
    announce(el, readout.textContent);
  }

  function chooseCell(q, k, shift) {
    Object.assign(state, { cell: [q, k], shift });
    Object.assign(state, cross || looksAt() ? { side: "query", at: q } : { side: "key", at: k });
    repaint();
  }

  // the text

  const curves = Array.from({ length: CURVES }, () => svg("path", { fill: "none" }));
  const texts = h("div", {
    class: "attention-texts", role: "group",
    "aria-label": "The text: arrow keys move from token to token, Shift shows who looks at it",
  }, svg("svg", { class: "attention-curves", "aria-hidden": "true" }, curves));
  const tokens = { query: [], key: [] }; // buttons
  const allTokens = [];
  let places = null; // of the tokens; read again when the text was laid out anew

  function buildText(side, labels, name) {
    const text = h("div", { class: "attention-text" }, name && h("span", { class: "attention-text-name" }, name));
    labels.forEach((token, at) => {
      const weight = h("span", { class: "attention-token-weight" });
      const made = h("button", { type: "button", class: "attention-token", tabindex: -1, "aria-pressed": "false" },
        h("span", { class: "attention-token-text" }, shown(token)), weight);
      tokens[side].push(Object.assign(made, { side, at, weight, token }));
      allTokens.push(made);
      text.append(made);
      if (endsLine(token)) text.append(h("br"));
    });
    texts.append(text);
  }
  if (cross) {
    buildText("query", query_tokens, "queries");
    buildText("key", key_tokens, "keys");
  } else {
    buildText("key", key_tokens);
    tokens.query = tokens.key.slice(S - T); // the same tokens; the last query is the last key
  }

  const chosenToken = () => tokens[state.side][state.at];

  function choose(button, shift) {
    Object.assign(state, { shift, cell: null });
    const query = button.at - (S - T);
    if (cross) Object.assign(state, { side: button.side, at: button.at });
    else if (looksAt() && query >= 0) Object.assign(state, { side: "query", at: query });
    else Object.assign(state, { side: "key", at: button.at });
    repaint();
  }

  const tokenOf = (event) => event.target.closest?.(".attention-token");
  const chooseIt = (event) => tokenOf(event) && choose(tokenOf(event), event.shiftKey);
  texts.addEventListener("pointerover", chooseIt);
  texts.addEventListener("click", chooseIt);
  texts.addEventListener("keydown", (event) => {
    const to = tokenOf(event) && neighbour(tokenOf(event), event.key);
    if (!to) return;
    event.preventDefault();
    choose(to, event.shiftKey);
    to.focus();
    announce(el, readout.textContent);
  });
  /* Shift turns the question over, also when the pointer rests and nothing has the focus. */
  const onShift = (event) => {
    const shift = event.type === "keydown";
    if (event.key !== "Shift" || cross || !map || shift === state.shift) return;
    if (texts.matches(":hover, :focus-within")) choose(chosenToken(), shift);
  };
  const page = el.ownerDocument;
  page.addEventListener("keydown", onShift);
  page.addEventListener("keyup", onShift);

  function neighbour(button, key) {
    const at = allTokens.indexOf(button);
    const along = { ArrowLeft: at - 1, ArrowRight: at + 1, Home: 0, End: allTokens.length - 1 }[key];
    if (along !== undefined) return allTokens[along];
    if (key !== "ArrowUp" && key !== "ArrowDown") return undefined;
    const here = where().get(button);
    const sign = key === "ArrowUp" ? -1 : 1;
    const lines = (other) => sign * (where().get(other).top - here.top); // nearest line first, then nearest in it
    const distance = (other) => 1000 * lines(other) + Math.abs(where().get(other).x - here.x);
    return allTokens.filter((other) => lines(other) > 2).sort((a, b) => distance(a) - distance(b))[0];
  }

  function where() {
    const place = ({ offsetLeft, offsetTop, offsetWidth, offsetHeight }) => ({
      x: offsetLeft + offsetWidth / 2, top: offsetTop, bottom: offsetTop + offsetHeight,
    });
    places ??= new Map(allTokens.map((button) => [button, place(button)]));
    return places;
  }

  // what a hover paints again: the text's colours and curves, the sentence, the heat map's bands

  /* What the chosen token looks at, or who looks at it: [button, weight], undefined where it is hidden. */
  function weightsOfChosen() {
    if (state.side === "query") return tokens.key.map((button, k) => [button, weightAt(state.at, k)]);
    return tokens.query.map((button, q) => [button, weightAt(q, state.at)]);
  }

  function repaint() {
    const places = where(); // read before anything is written
    const weights = weightsOfChosen();
    const visible = weights.filter(([, weight]) => weight !== undefined).sort((a, b) => b[1] - a[1]);
    const largest = state.oneScale ? 1 : visible[0]?.[1] || 1;
    paintTokens(new Map(weights), largest);
    drawCurves(visible, largest, places);
    readout.textContent = state.cell ? cellSentence(...state.cell) : sentence(visible);
    moveCursor();
    if (headTable.open && T * S > LARGEST_TABLE) fillHeadTable();
  }

  function paintTokens(weights, largest) {
    const chosen = chosenToken();
    for (const button of allTokens) {
      const weight = weights.get(button);
      const t = weight === undefined ? null : weight / largest;
      button.style.background = t === null ? "" : cividis(t);
      button.style.color = t === null ? "" : textOn(t);
      button.classList.toggle("attention-unseen", t === null && weights.has(button));
      const text = weight >= 0.05 ? weight.toFixed(2) : "";
      if (button.weight.textContent !== text) button.weight.textContent = text;
      if ((button === chosen) === (button.tabIndex === 0)) continue;
      button.tabIndex = button === chosen ? 0 : -1;
      button.setAttribute("aria-pressed", button === chosen ? "true" : "false");
    }
  }

  function drawCurves(visible, largest, places) {
    const chosen = chosenToken();
    const drawn = visible.filter(([button, weight]) => button !== chosen && weight >= 0.005);
    curves.forEach((path, i) => {
      if (!drawn[i]) return path.removeAttribute("d");
      const [button, weight] = drawn[i];
      path.setAttribute("d", curve(places.get(chosen), places.get(button)));
      path.style.strokeWidth = `${0.75 + (4 * weight) / largest}px`;
      path.style.opacity = 0.25 + (0.6 * weight) / largest;
    });
  }

  function sentence(visible) {
    const strongest = visible.slice(0, 4).filter(([, weight]) => weight > 0);
    const list = strongest.map(([button, weight]) => `${quoted(button.token)} ${weightText(weight)}`).join(", ");
    const verb = state.side === "query" ? "looks at" : "is looked at by";
    return `${quoted(chosenToken().token)} ${verb} ${list || "nothing"}`;
  }

  function cellSentence(q, k) {
    const weight = weightAt(q, k);
    const value = weight === undefined ? "hidden" : weightText(weight);
    return `Query ${q} ${quoted(query_tokens[q])}, key ${k} ${quoted(key_tokens[k])}: ${value}`;
  }

  function moveCursor() {
    const { row, column, cell, size, left, top } = drawing;
    const place = (rect, box) => {
      rect.style.visibility = box ? "visible" : "hidden";
      for (const [name, value] of Object.entries(box || {})) rect.setAttribute(name, value);
    };
    const [q, k] = state.cell ?? (state.side === "query" ? [state.at, null] : [null, state.at]);
    place(row, q !== null && { x: 1 - left, y: q * size, width: left + S * size - 1, height: size });
    place(column, k !== null && { x: k * size, y: 1 - top, width: size, height: top + T * size - 1 });
    place(cell, state.cell && { x: k * size, y: q * size, width: size, height: size });
  }

  // find a token

  const matches = (token) => state.find !== "" && shown(token).toLowerCase().includes(state.find.toLowerCase());
  const found = h("span", { role: "status" });
  const search = h("input", { type: "search", spellcheck: "false", autocomplete: "off" });
  search.addEventListener("input", () => {
    state.find = search.value;
    markFound();
    const n = allTokens.filter((button) => matches(button.token)).length;
    const count = `${n} of ${allTokens.length}${n ? "; Enter goes to the next" : ""}`;
    found.textContent = state.find ? count : "";
  });
  search.addEventListener("keydown", (event) => {
    const all = allTokens.filter((button) => matches(button.token));
    if (event.key !== "Enter" || !all.length) return;
    event.preventDefault();
    const now = allTokens.indexOf(chosenToken());
    choose(all.find((button) => allTokens.indexOf(button) > now) ?? all[0], false);
    announce(el, readout.textContent);
  });

  function markFound() {
    const mark = (element, token) => element?.classList.toggle("attention-found", matches(token));
    for (const button of allTokens) mark(button, button.token);
    drawing.queries.forEach((text, q) => mark(text, query_tokens[q]));
    drawing.keys.forEach((text, k) => mark(text, key_tokens[k]));
  }

  // tables

  const headRows = h("div", { class: "attention-table" });
  const headTable = details("The weights in numbers", headRows);
  headTable.addEventListener("toggle", () => headTable.open && fillHeadTable());

  function fillHeadTable() {
    headRows.replaceChildren(T * S <= LARGEST_TABLE ? wholeTable() : tokenTable());
  }

  /* Rows that were rescaled are as fine as what they had left. */
  const precision = () => (state.hideFirst ? "" : "; sent in 8 bits, within 0.002 of the model's");

  function wholeTable() {
    const row = (token, q) => [shown(token), ...key_tokens.map((_, k) => weightText(weightAt(q, k)))];
    const caption = `Weights of ${headName(state.layer, state.index)}: a row a query, a column a key; –: hidden${precision()}`;
    return table(caption, ["query", ...key_tokens.map(shown)], query_tokens.map(row));
  }

  function tokenTable() {
    const token = quoted(chosenToken().token);
    const what = state.side === "query" ? `from ${token} to each key` : `from each query to ${token}`;
    const rows = weightsOfChosen().map(([button, weight], i) => [i, shown(button.token), weightText(weight)]);
    const caption = `Weights of ${headName(state.layer, state.index)}, ${what}; –: hidden${precision()}`;
    return table(caption, ["position", "token", "weight"], rows);
  }

  const allRows = h("div", { class: "attention-table" });
  const allTable = details("All heads in numbers", allRows);
  allTable.addEventListener("toggle", () => allTable.open && fillAllTable());

  function fillAllTable() {
    const names = measures.map((key) => MEASURES[key][0] + (MEASURES[key][1] && ` (${MEASURES[key][1]})`));
    const rows = ordered().map(([layer, index]) => {
      const which = state.byGroup ? [layer, index] : [layer, index, kvHead(index)];
      return [...which, ...measures.map((key) => measure(key, layer, index).toFixed(2))];
    });
    const which = state.byGroup ? ["layer", "K/V head"] : ["layer", "head", "K/V head"];
    const caption = `Each a mean over the queries that have a choice of keys; in the order of ${ORDERS[state.order]}`;
    const drawn = table(caption, [...which, ...names], rows);
    const headings = [...drawn.querySelectorAll("thead th")].slice(-measures.length);
    headings.forEach((heading, i) => sortable(heading, measures[i]));
    allRows.replaceChildren(drawn);
  }

  /* A heading that sorts by its column, and by it the other way round. */
  function sortable(heading, key) {
    const [up, down] = [state.order === key, state.order === `-${key}`];
    if (up || down) heading.setAttribute("aria-sort", up ? "ascending" : "descending");
    const words = heading.textContent + (up ? " ▲" : down ? " ▼" : "");
    heading.replaceChildren(button(words, () => {
      const wanted = up || !(key in ORDERS) ? `-${key}` : key;
      orders.set(wanted);
      reorder(wanted);
      allRows.querySelectorAll("thead button")[measures.indexOf(key)].focus();
    }));
  }

  // controls

  function reorder(order) {
    state.order = order;
    buildHeads();
    if (allTable.open) fillAllTable();
  }

  function redraw() {
    reorder(state.order);
    if (layers.has(state.layer)) drawHead();
  }

  function average(byGroup) {
    state.byGroup = byGroup;
    state.index = byGroup ? Math.floor(state.index / groupSize) : state.index * groupSize;
    redraw();
  }

  /* Rows can only be rescaled where they are: this asks for every layer. */
  async function hideFirst(hide) {
    state.hideFirst = hide;
    try {
      await fetchLayers(...everyLayer);
      if (!closed) redraw();
    } catch (error) {
      fail(`A layer could not be read (${error.message}), so its rows cannot be rescaled. Load the page again.`);
    }
  }

  function useOneScale(oneScale) {
    state.oneScale = oneScale;
    redraw();
  }

  function askWhoLooks(whoLooks) {
    const now = chosenToken();
    state.whoLooks = whoLooks;
    choose(now, false);
  }

  const orders = select({
    label: "Order of the heads",
    options: Object.entries(ORDERS).filter(([order]) => !cross || !order.includes("distance")),
    value: state.order,
    onInput: reorder,
  });
  const controls = h("div", { class: "x-row" },
    orders,
    groupSize > 1 && toggle({ label: "Average the heads that share a K/V head", checked: state.byGroup, onInput: average }),
    S > 1 && toggle({ label: "Hide the first token and rescale", checked: state.hideFirst, onInput: hideFirst }),
    toggle({ label: "One scale, 0 to 1, for all heads", checked: state.oneScale, onInput: useOneScale }));
  const questions = h("div", { class: "x-row" },
    !cross && toggle({ label: "Who looks at it (or hold Shift)", checked: state.whoLooks, onInput: askWhoLooks }),
    h("label", { class: "x-control" }, "Find a token ", search), found);

  /* For paper: dark on white. */
  function paper() {
    const copy = drawing.root.cloneNode(true);
    for (const name of ["class", "tabindex", "role"]) copy.removeAttribute(name);
    copy.setAttribute("color", "#1a1a1a");
    const caption = svg("title", {}, `${data.model_name}, ${headName(state.layer, state.index)}`);
    copy.prepend(caption, svg("rect", { width: "100%", height: "100%", fill: "#ffffff" }));
    return copy;
  }
  const fileName = () => `layer-${state.layer}-${state.byGroup ? "kv-" : ""}head-${state.index}`;
  const exports = h("div", { class: "x-row" },
    button("Save as SVG", () => download(`${fileName()}.svg`, "image/svg+xml", svgText(paper()))),
    button("Save as PNG", async () => download(`${fileName()}.png`, "image/png", await svgToPng(paper(), 3))));
  const whole = h("div", {}, title, figures, questions, texts, readout, mapBox, legend, exports, headTable);

  // from here on it runs

  let size = "";
  const watch = new ResizeObserver(() => {
    const now = `${texts.clientWidth} × ${texts.scrollHeight}`;
    if (now === size) return;
    places = null;
    if (size) repaint(); // the first call only says how large it is
    size = now;
  });

  /* The layers that make their thumbnails themselves, after the first paint. One that cannot be read says so when opened. */
  async function fetchRest() {
    const waiting = everyLayer.filter((layer) => !layers.has(layer));
    await Promise.allSettled(waiting.map((layer) => fetchLayers(layer)));
    if (!closed) paintSoon(headButtons.filter((button) => waiting.includes(button.layer)), 10);
  }

  const wanted = fetchLayers(state.layer);
  if (data.thumbnails) pooled = await inflate(await part(data, "thumbnails"));
  else await Promise.allSettled(everyLayer.slice(0, inView).map((layer) => fetchLayers(layer)));
  await wanted;
  el.replaceChildren(controls, heads, trouble, whole, allTable);
  buildHeads();
  drawHead();
  watch.observe(texts);
  if (!pooled) afterFrame(fetchRest);

  return () => {
    closed = true;
    watch.disconnect();
    page.removeEventListener("keydown", onShift);
    page.removeEventListener("keyup", onShift);
    el.replaceChildren();
  };
}
