/* The shape explorer: one attention layer, GroupedQueryAttention(d_model, n_heads, n_kv_heads, head_dim).

   The diagram is SVG: query heads below, joined to the key and value head that they read. Query head h reads K/V head
   h // group_size. Everything a pointer can choose there, the slider "query head" can too. */

export default explorer("shape", ({ data, el }) => shapeExplorer(data, el));

// --- the layer, as in attnlab/layers.py and attnlab/memory.py

const divisors = (n) => Array.from({ length: n }, (_, i) => i + 1).filter((d) => n % d === 0);

const styleOf = (n_heads, n_kv_heads) =>
  n_kv_heads === n_heads ? "multi-head" : n_kv_heads === 1 ? "multi-query" : "grouped-query";

/* weight.shape of each matrix: (outputs, inputs); no biases */
function projections({ d_model, n_heads, n_kv_heads, head_dim }) {
  const [queries, keys] = [n_heads * head_dim, n_kv_heads * head_dim];
  return { W_Q: [queries, d_model], W_K: [keys, d_model], W_V: [keys, d_model], W_O: [d_model, queries] };
}

const layerParams = (layer) => Object.values(projections(layer)).reduce((sum, [rows, columns]) => sum + rows * columns, 0);

/* one key and one value for each K/V head */
const cacheBytes = ({ n_kv_heads, head_dim }, size) => 2 * n_kv_heads * head_dim * size;

/* The kind of attention stays when the number of heads changes. */
function sameStyle(n_heads, before) {
  if (before.n_kv_heads === before.n_heads) return n_heads;
  return divisors(n_heads).findLast((d) => d <= before.n_kv_heads);
}

/* What "grouped-query" alone can mean: the number of K/V heads between the extremes that is nearest to a quarter. */
function between(n_heads) {
  const off = (d) => Math.abs(Math.log((4 * d) / n_heads));
  return divisors(n_heads).slice(1, -1).sort((a, b) => off(a) - off(b))[0];
}

// --- the explorer

function shapeExplorer(data, el) {
  const OWN = "your own numbers";
  const state = { ...data, query: 0, follows: data.d_model === data.n_heads * data.head_dim };
  const isPreset = (p) => ["d_model", "n_heads", "n_kv_heads", "head_dim"].every((name) => p[name] === state[name]);
  const preset = () => data.presets.find((p) => p.name === state.preset && isPreset(p)) ?? null;
  const kv = (head) => Math.floor((head * state.n_kv_heads) / state.n_heads);

  /* Keep what belongs together together, then draw. */
  function change(changes) {
    const before = { ...state };
    Object.assign(state, changes);
    if (state.n_heads % state.n_kv_heads || (changes.n_heads && !changes.n_kv_heads))
      state.n_kv_heads = sameStyle(state.n_heads, before);
    if (changes.d_model === undefined && state.follows) state.d_model = state.n_heads * state.head_dim;
    state.query = Math.min(state.query, state.n_heads - 1);
    show();
  }

  const choose = select({
    label: "model",
    options: [OWN, ...data.presets.map(({ name }) => name)],
    value: OWN,
    onInput: (name) => {
      const found = data.presets.find((p) => p.name === name);
      if (!found) return change({ preset: null });
      const { d_model, n_heads, n_kv_heads, head_dim } = found;
      change({ d_model, n_heads, n_kv_heads, head_dim, preset: name, follows: d_model === n_heads * head_dim });
    },
  });
  const heads = slider({
    label: "n_heads", min: 1, max: data.max_heads, value: state.n_heads, onInput: (n_heads) => change({ n_heads }),
  });
  const kvHeads = slider({
    label: "n_kv_heads", min: 0, max: 0, value: 0,
    format: (place) => String(divisors(state.n_heads)[place]),
    onInput: (place) => change({ n_kv_heads: divisors(state.n_heads)[place] }),
  });
  const headDim = slider({
    label: "head_dim", min: 1, max: data.max_head_dim, value: state.head_dim, onInput: (head_dim) => change({ head_dim }),
  });
  const width = slider({
    label: "d_model", min: 1, max: data.max_d_model, value: state.d_model,
    format: (n) => number(n, 0),
    onInput: (d_model) => change({ d_model }),
  });
  const follow = toggle({
    label: "d_model = n_heads · head_dim", checked: state.follows, onInput: (follows) => change({ follows }),
  });
  const dtype = select({
    label: "cache in",
    options: Object.keys(data.bytes_per_element),
    value: state.dtype,
    onInput: (dtype) => change({ dtype }),
  });
  const query = slider({
    label: "query head", min: 0, max: state.n_heads - 1, value: 0, onInput: look,
  });
  const styles = {
    "multi-head": () => state.n_heads,
    "grouped-query": () => between(state.n_heads),
    "multi-query": () => 1,
  };
  const styleButtons = Object.entries(styles).map(([name, n]) => button(name, () => change({ n_kv_heads: n() })));

  const diagram = h("div", {
    class: "x-scroll shape-diagram", tabindex: 0, role: "group", "aria-label": "Diagram of the heads",
  });
  const reads = h("p", { class: "shape-reads" });
  const results = h("div", { class: "shape-results" });
  let drawn = false;

  function look(head) {
    if (head === state.query) return;
    state.query = head;
    query.set(head);
    showHead();
    announce(el, reads.textContent);
  }

  function showHead() {
    draw();
    reads.textContent = readsText();
  }

  function show() {
    const all = divisors(state.n_heads);
    choose.set(preset()?.name ?? OWN);
    heads.set(state.n_heads);
    kvHeads.input.max = all.length - 1;
    kvHeads.set(all.indexOf(state.n_kv_heads));
    headDim.set(state.head_dim);
    width.set(state.d_model);
    width.hidden = state.follows;
    follow.set(state.follows);
    query.input.max = state.n_heads - 1;
    query.set(state.query);
    const style = styleOf(state.n_heads, state.n_kv_heads);
    styleButtons.forEach((b) => {
      b.setAttribute("aria-pressed", String(b.textContent === style));
      b.disabled = styles[b.textContent]() === undefined;
    });
    showHead();
    results.replaceChildren(matrices(state, el.clientWidth < 420 ? 56 : 96), projectionTable(), styleTable(), total());
    if (drawn) announce(el, `${style}: ${state.n_heads} query heads, ${state.n_kv_heads} K/V heads. ${reads.textContent}`);
    drawn = true;
  }

  function readsText() {
    const groupSize = state.n_heads / state.n_kv_heads;
    const mine = kv(state.query);
    const group = Array.from({ length: groupSize }, (_, g) => mine * groupSize + g);
    const others = group.filter((head) => head !== state.query);
    const listed = others.length > 8 ? `${others[0]} to ${others.at(-1)}` : others.join(", ");
    const shared = others.length
      ? `shared with ${others.length === 1 ? "head" : "heads"} ${listed}`
      : "which no other head reads";
    return `Query head ${state.query} reads K/V head ${mine} (${state.query} // ${groupSize}), ${shared}.`;
  }

  function draw() {
    const room = diagram.clientWidth || 600;
    const picture = headDiagram(state, room, look);
    diagram.replaceChildren(picture);
    const at = ((state.query + 0.5) * picture.width.baseVal.value) / state.n_heads; // in view, where the heads are many
    if (at < diagram.scrollLeft || at > diagram.scrollLeft + room) diagram.scrollLeft = at - room / 2;
  }

  function projectionTable() {
    const rows = Object.entries(projections(state)).map(([name, [out, into]]) =>
      [name, `(${out}, ${into})`, number(out * into, 0)]);
    return table("The projections: weight.shape, and parameters", ["matrix", "shape", "parameters"],
      [...rows, ["together", "", number(layerParams(state), 0)]]);
  }

  function styleTable() {
    const size = data.bytes_per_element[state.dtype];
    const style = styleOf(state.n_heads, state.n_kv_heads);
    const full = cacheBytes({ ...state, n_kv_heads: state.n_heads }, size);
    const compared = [["multi-head", state.n_heads], ["multi-query", 1]].filter(([name]) => name !== style);
    compared.splice(style === "multi-head" ? 0 : 1, 0, [style, state.n_kv_heads]);
    const rows = compared.map(([name, n_kv_heads]) => {
      const layer = { ...state, n_kv_heads };
      const bytes = cacheBytes(layer, size);
      const numbers = [n_kv_heads, layerParams(layer), bytes].map((n) => number(n, 0));
      return [name === style ? `${name} (chosen)` : name, ...numbers, `${number(full / bytes, 0)} ×`];
    });
    return table(`The styles with these numbers; cache: bytes a token and layer, in ${state.dtype}`,
      ["style", "K/V heads", "parameters", "cache", "smaller"], rows);
  }

  function total() {
    const bytes = cacheBytes(state, data.bytes_per_element[state.dtype]);
    const found = preset();
    return h("p", { class: "x-faint" },
      found && h("span", { class: "shape-total" },
        `${found.name}: ${found.n_layers} layers × ${number(bytes, 0)} = ${number(found.n_layers * bytes, 0)} bytes a token. ` +
        `Source: ${found.source}. `),
      "Matrices alone, as in GroupedQueryAttention; some models add biases.");
  }

  el.append(
    h("div", { class: "x-row" }, choose, dtype,
      h("span", { class: "shape-styles", role: "group", "aria-label": "style" }, styleButtons)),
    h("div", { class: "x-row" }, heads, kvHeads, headDim, follow, width),
    diagram, h("div", { class: "x-row" }, query), reads, results);
  show();
  const watch = new ResizeObserver(draw);
  watch.observe(diagram);
  return () => watch.disconnect();
}

/* Values on top, keys under them, queries below, as many boxes as heads. */
function headDiagram({ n_heads, n_kv_heads, query }, room, onChoose) {
  const groupSize = n_heads / n_kv_heads;
  const pitch = Math.min(44, Math.max(14, Math.floor((room - 4) / n_heads)));
  const mine = Math.floor(query / groupSize);
  const [width, high] = [n_heads * pitch, 150];
  const middle = (kv) => (kv + 0.5) * groupSize * pitch;
  const box = (kind, x, y, wide, text, chosen, head) => {
    const choose = () => onChoose(head);
    const classes = `shape-box shape-${kind}${chosen ? " shape-chosen" : ""}`;
    return svg("g", { class: classes, onPointerenter: choose, onClick: choose },
      svg("rect", { x: x - wide / 2, y, width: wide, height: 28, rx: 3 }),
      text !== "" && svg("text", { x, y: y + 18, "text-anchor": "middle" }, text));
  };
  const lines = [];
  const boxes = [];
  for (let kv = 0; kv < n_kv_heads; kv++) {
    const wide = Math.min(groupSize * pitch - 4, Math.max(pitch - 4, 40));
    const chosen = kv === mine;
    const name = (letter) => (wide >= 34 ? `${letter} ${kv}` : wide >= 20 ? letter : "");
    const first = chosen ? query : kv * groupSize;
    boxes.push(
      box("value", middle(kv), 4, wide, name("V"), chosen, first),
      box("key", middle(kv), 38, wide, name("K"), chosen, first));
  }
  for (let head = 0; head < n_heads; head++) {
    const kv = Math.floor(head / groupSize);
    const x = (head + 0.5) * pitch;
    lines.push(svg("line", {
      class: `shape-line${kv === mine ? " shape-chosen" : ""}`, "data-query": head, "data-kv": kv,
      x1: middle(kv), y1: 66, x2: x, y2: 116,
    }));
    const text = pitch >= 34 ? `Q ${head}` : pitch >= 19 ? head : "";
    boxes.push(box("query", x, 116, pitch - 4, text, head === query, head));
  }
  const what = `${n_heads} query heads joined to ${n_kv_heads} K/V heads, ${groupSize} to each`;
  return svg("svg", { width, height: high, viewBox: `0 0 ${width} ${high}`, role: "img", "aria-label": what }, lines, boxes);
}

/* The four matrices, drawn to scale: the longest side is so many pixels. */
function matrices(layer, longest) {
  const all = Object.entries(projections(layer));
  const scale = longest / Math.max(...all.flatMap(([, shape]) => shape));
  return h("div", { class: "shape-matrices", "aria-hidden": "true" }, all.map(([name, [out, into]]) =>
    h("div", {},
      svg("svg", { width: Math.max(2, into * scale), height: Math.max(2, out * scale) },
        svg("rect", { width: "100%", height: "100%", class: `shape-matrix shape-${name}` })),
      h("div", {}, name))));
}
