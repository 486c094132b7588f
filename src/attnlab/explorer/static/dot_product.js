// The dot-product explorer: move a query in the plane; scores, their division, softmax and output follow.
//
// The query is the plane's (x, y) over and over: (x, y, x, y, …), d_k coordinates. All that it can see of a key is the sum of
// the key's pairs, which Python sends for every d_k: an arrow in the plane. So the plane's dot product is the whole one.

const REACH = 3; // the plane shows -3 … 3, and the query stays in it
const SIZE = 300; // units of the SVG
const STEP = 0.1;

export default explorer("dot-product", ({ data, el }) => {
  const { dims, arrows, values, labels } = data; // arrows[i][key] = [x, y] at dims[i]
  const state = { query: data.query, at: dims.indexOf(data.d_k), divide: data.divide };

  // ---- the numbers

  function compute() {
    const [x, y] = state.query;
    const d_k = dims[state.at];
    const scores = arrows[state.at].map(([kx, ky]) => x * kx + y * ky);
    const scaled = scores.map((score) => (state.divide ? score / Math.sqrt(d_k) : score));
    const weights = softmax(scaled);
    return { d_k, scores, scaled, weights, output: weights.reduce((sum, weight, i) => sum + weight * values[i], 0) };
  }

  // ---- the plane

  const place = ([x, y]) => [((x + REACH) / (2 * REACH)) * SIZE, ((REACH - y) / (2 * REACH)) * SIZE];
  const keyMarks = labels.map((label) => {
    const line = svg("line", { class: "key-line", x1: SIZE / 2, y1: SIZE / 2 });
    const tip = svg("circle", { class: "key-tip" });
    const name = svg("text", { "text-anchor": "middle" }, label);
    return { line, tip, name };
  });
  const queryLine = svg("line", { class: "query-line", x1: SIZE / 2, y1: SIZE / 2 });
  const queryTip = svg("path", { class: "query-tip", d: "M0,-9 9,0 0,9 -9,0Z" }); // a diamond: not told from keys by colour alone
  const queryName = svg("text", { class: "query-name", y: -13, "text-anchor": "middle" }, "query");
  const handle = svg("g", {
    class: "dot-handle", tabindex: 0, role: "slider", "aria-label": "query", "aria-roledescription": "two-dimensional slider",
    "aria-valuemin": -REACH, "aria-valuemax": REACH, onKeydown: moveByKey,
  }, svg("circle", { class: "dot-grip", r: 22 }), queryTip, queryName);
  const plane = svg("svg", { class: "dot-plane", viewBox: `0 0 ${SIZE} ${SIZE}`, role: "group", "aria-label": "The plane of the query and the keys" },
    svg("path", { class: "axes", d: `M0,${SIZE / 2}H${SIZE}M${SIZE / 2},0V${SIZE}` }),
    svg("circle", { class: "typical", cx: SIZE / 2, cy: SIZE / 2, r: (Math.SQRT2 / (2 * REACH)) * SIZE }),
    keyMarks.map(({ line, tip }) => [line, tip]), keyMarks.map(({ name }) => name), queryLine, handle);
  const drawnAt = h("p", { class: "x-faint" });

  function moveTo([x, y]) {
    const inside = (v) => Math.max(-REACH, Math.min(REACH, Math.round(v * 100) / 100)) + 0;
    state.query = [inside(x), inside(y)];
    update();
  }

  function moveByKey(event) {
    const way = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, 1], ArrowDown: [0, -1] }[event.key];
    if (!way || event.altKey || event.ctrlKey || event.metaKey) return;
    event.preventDefault(); // the page stays where it is
    const step = event.shiftKey ? 5 * STEP : STEP;
    moveTo(state.query.map((v, i) => v + step * way[i]));
  }

  function moveToPointer(event) {
    const box = plane.getBoundingClientRect();
    const [right, down] = [(event.clientX - box.left) / box.width, (event.clientY - box.top) / box.height];
    moveTo([(2 * right - 1) * REACH, (1 - 2 * down) * REACH]);
  }

  // A finger drags the query by its handle alone, so that it can still scroll the page elsewhere; a tap puts it anywhere.
  // (touch-action: none would say so in CSS, but browsers don't heed it inside an SVG.)
  handle.addEventListener("touchstart", (event) => event.preventDefault(), { passive: false });
  plane.addEventListener("pointerdown", (event) => {
    if (event.pointerType === "touch" && !handle.contains(event.target)) return;
    plane.setPointerCapture(event.pointerId);
    moveToPointer(event);
    handle.focus({ preventScroll: true });
    event.preventDefault();
  });
  plane.addEventListener("pointermove", (event) => plane.hasPointerCapture(event.pointerId) && moveToPointer(event));
  plane.addEventListener("click", moveToPointer);

  // ---- the table: every number with its bar

  const rows = labels.map((label, i) => {
    const cells = { score: barCell(true), scaled: barCell(true), weight: barCell(false) };
    const row = h("tr", {}, h("th", { scope: "row" }, label), h("td", {}, shortest(values[i])), cells.score, cells.scaled, cells.weight);
    return { ...cells, row };
  });
  const scaledHead = h("th", { scope: "col" });
  const output = h("td", { colspan: 4 });
  const numbers = h("div", { class: "x-scroll", tabindex: 0, role: "group", "aria-label": "From scores to the output" },
    h("table", {},
      h("caption", {}, "From scores to the output"),
      h("thead", {}, h("tr", {}, ["key", "value", "q · k"].map((name) => h("th", { scope: "col" }, name)), scaledHead, h("th", { scope: "col" }, "weight"))),
      h("tbody", {}, rows.map(({ row }) => row)),
      h("tfoot", {}, h("tr", {}, h("th", { scope: "row" }, "output"), output))));
  const readout = h("p");

  // ---- what can be turned

  const size = slider({
    label: "d_k", min: 0, max: dims.length - 1, value: state.at, format: (i) => number(dims[i], 0),
    onInput: (i) => ((state.at = i), update()),
  });
  const divide = toggle({ label: "divide by √d_k", checked: state.divide, onInput: (on) => ((state.divide = on), update()) });

  function update() {
    const { d_k, scores, scaled, weights, output: answer } = compute();
    const [x, y] = state.query;
    const shrink = Math.sqrt(d_k / 2);
    keyMarks.forEach(({ line, tip, name }, i) => {
      const [kx, ky] = arrows[state.at][i];
      const [left, top] = place([kx / shrink, ky / shrink]);
      set(line, { x2: left, y2: top });
      set(tip, { cx: left, cy: top, r: 4 + 9 * Math.sqrt(weights[i]) });
      set(name, { x: Math.min(SIZE - 12, Math.max(12, left + (kx < 0 ? -20 : 20))), y: Math.min(SIZE - 4, Math.max(14, top + 5)) });
    });
    const [left, top] = place(state.query);
    set(queryLine, { x2: left, y2: top });
    set(handle, { transform: `translate(${left}, ${top})`, "aria-valuenow": x, "aria-valuetext": `x ${number(x)}, y ${number(y)}` });
    queryName.setAttribute("y", top < 24 ? 24 : -13);
    drawnAt.textContent = d_k === 2 ? "Keys are drawn to scale." : `Keys are drawn ${number(shrink, 1)} = √(d_k / 2) times smaller than they are.`;

    const widest = Math.max(4, ...scores.map(Math.abs)); // one scale for both columns of scores
    rows.forEach((row, i) => {
      row.score.show(scores[i] / widest, number(scores[i]));
      row.scaled.show(scaled[i] / widest, number(scaled[i]));
      row.weight.show(weights[i], number(weights[i], 3));
    });
    scaledHead.textContent = `÷ ${state.divide ? number(Math.sqrt(d_k), 1) : 1}`;
    output.textContent = `Σ weight × value = ${number(answer)}`;
    const apart = Math.max(...scaled) - Math.min(...scaled);
    readout.textContent = `Softmax sees scores up to ${number(apart, 1)} apart. The largest weight is ${number(Math.max(...weights), 2)}.`;
    announce(el, `Query ${number(x)}, ${number(y)}. Weights ${weights.map((w) => number(w)).join(", ")}. Output ${number(answer)}.`);
  }

  el.append(
    h("div", { class: "x-row" }, size, divide),
    h("div", { class: "dot-product" },
      h("div", {}, plane, drawnAt),
      h("div", {}, numbers, readout)),
    h("p", { class: "x-faint" }, "Drag the query, click where it should go, or use the arrow keys (with Shift, longer steps)."),
    details("What is drawn",
      h("p", {}, "The query has d_k coordinates: the plane's x and y, over and over. The keys' first two coordinates are given; " +
        "all others are random numbers with mean 0 and variance 1, always the same ones. All that such a query can see of a key is the " +
        "sum of the key's pairs of coordinates, and that sum is the arrow you see: a walk of d_k / 2 random steps. So the dot product in the plane is the " +
        "whole dot product, and nothing is left out."),
      h("p", {}, "On the dashed circle the query's coordinates have the mean square 1, as the keys' random ones have. There the scores of such " +
        "keys have the variance d_k. A key's dot grows with its weight.")));
  update();
});

function softmax(scores) {
  const largest = Math.max(...scores);
  const powers = scores.map((score) => Math.exp(score - largest));
  const total = powers.reduce((sum, power) => sum + power, 0);
  return powers.map((power) => power / total);
}

/** A cell with a bar under its number: from the left, or from the middle for what has a sign. `show` takes a share, -1 … 1. */
function barCell(signed) {
  const bar = h("span", { class: "dot-bar" });
  const text = h("span");
  const cell = h("td", {}, text, h("span", { class: signed ? "dot-track dot-signed" : "dot-track" }, bar));
  cell.show = (share, words) => {
    const width = Math.abs(share) * (signed ? 50 : 100);
    bar.style.width = `${width}%`;
    bar.style.left = `${!signed ? 0 : share < 0 ? 50 - width : 50}%`;
    text.textContent = words;
  };
  return cell;
}

function shortest(value) {
  return number(value, Number.isInteger(value) ? 0 : 2);
}

function set(element, attributes) {
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
}
