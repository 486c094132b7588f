/* The memory explorer: two models against a card.

   `accounts` is attnlab.memory once more, function by function under the same names, because a page has no Python to ask.
   Everything is whole bytes below 2^53, which a number here holds exactly. Shapes, cards and constants come with the data. */

export default explorer("memory", ({ data, el }) => memoryExplorer(data, el));

// --- the accounts, as in attnlab/memory.py

function accounts({ bytes_per_element, quantized, reserve_bytes: RESERVE_BYTES }) {
  const element_bytes = (dtype) => bytes_per_element[dtype];

  const n_params = ({ weights }) => weights.linear + weights.embedding + weights.other;

  /* bits a weight, how many share a scale (null: a row of the matrix), and bytes kept for each scale */
  function linear_bytes(linear, rows, size, quantize) {
    if (!quantize) return linear * size;
    const [bits, sharing, per_scale] = quantized[quantize];
    const scales = sharing === null ? rows : Math.floor(linear / sharing);
    return Math.floor((linear * bits) / 8) + scales * per_scale;
  }

  function weight_bytes({ weights }, dtype, quantize) {
    const size = element_bytes(dtype);
    return (weights.embedding + weights.other) * size + linear_bytes(weights.linear, weights.linear_rows, size, quantize);
  }

  const kv_bytes_per_token = (model, dtype) => model.n_layers * model.elements_per_token * element_bytes(dtype);

  /* A layer with a window keeps no more than the window. */
  function kv_cache_bytes(model, context, batch, dtype) {
    let slots = 0;
    for (const [window, layers] of model.windows) slots += layers * (window ? Math.min(context, window) : context);
    return batch * slots * model.elements_per_token * element_bytes(dtype);
  }

  /* Every weight but the embedding's rows, once for the whole batch; of experts, one token's; and every row's cache. */
  function bytes_per_step(model, context, batch, dtype, quantize) {
    const { linear, linear_rows, idle, idle_rows, other } = model.weights;
    const size = element_bytes(dtype);
    const read = linear_bytes(linear - idle, linear_rows - idle_rows, size, quantize);
    return other * size + read + kv_cache_bytes(model, context, batch, dtype);
  }

  const decode_ceiling = (model, bandwidth, context, batch, dtype, quantize) =>
    (batch * bandwidth) / bytes_per_step(model, context, batch, dtype, quantize);

  const reserve_bytes = (used) => Math.min(RESERVE_BYTES, Math.floor(used / 10));

  /* The most that weights and cache may take together: used + reserve_bytes(used) is the device. */
  const usable = (device) => Math.max(device - RESERVE_BYTES, Math.floor(device / 11) * 10 + Math.min(9, device % 11));

  function largest_batch(model, device_bytes, context, dtype, quantize) {
    const free = usable(device_bytes) - weight_bytes(model, dtype, quantize);
    return Math.max(0, Math.floor(free / kv_cache_bytes(model, context, 1, dtype)));
  }

  function fits(model, device, context, batch, dtype, quantize) {
    const weights = weight_bytes(model, dtype, quantize);
    const cache = kv_cache_bytes(model, context, batch, dtype);
    const reserve = reserve_bytes(weights + cache);
    return { weights, cache, reserve, total: weights + cache + reserve, spare: device - weights - cache - reserve };
  }

  return { n_params, weight_bytes, kv_bytes_per_token, kv_cache_bytes, bytes_per_step, decode_ceiling, largest_batch, fits };
}

/* Halves go to the even digit, as Python's formatting has them. */
function human_bytes(amount) {
  const two = (x, useGrouping) =>
    x.toLocaleString("en-US", { minimumFractionDigits: 2, maximumFractionDigits: 2, roundingMode: "halfEven", useGrouping });
  if (Math.abs(amount) < 1024) return `${amount} B`;
  for (const unit of ["KiB", "MiB", "GiB"]) {
    amount /= 1024;
    if (Math.abs(amount) < 1024) return `${two(amount, false)} ${unit}`;
  }
  return `${two(amount / 1024, true)} TiB`;
}

// --- the explorer

function memoryExplorer(data, el) {
  const memory = accounts(data);
  const named = (list, name) => list.find((item) => item.name === name);
  const state = {
    ...data.setting,
    models: data.setting.models.map((name) => named(data.models, name)),
    card: named(data.cards, data.setting.card),
  };
  const results = h("div", { class: "memory-results" });
  let drawn = false;

  const change = (changes) => {
    Object.assign(state, changes);
    show();
  };
  const chooseModel = (i, label) =>
    select({
      label,
      options: data.models.map(({ name }) => name),
      value: state.models[i].name,
      onInput: (name) => change({ models: state.models.map((model, k) => (k === i ? named(data.models, name) : model)) }),
    });
  const batch = amount({
    label: "batch, rows",
    value: state.batch,
    largest: data.max_batch,
    onInput: (rows) => change({ batch: rows }),
  });

  const controls = h("div", { class: "memory-controls" },
    h("div", { class: "x-row" }, chooseModel(0, "first model"), chooseModel(1, "second model")),
    h("div", { class: "x-row" },
      amount({
        label: "context, tokens",
        value: state.context,
        largest: data.max_context,
        onInput: (tokens) => change({ context: tokens }),
      }),
      batch,
      toggle({ label: "each its largest batch", checked: state.fill, onInput: (fill) => change({ fill }) })),
    h("div", { class: "x-row" },
      select({
        label: "weights and cache in",
        options: Object.keys(data.bytes_per_element),
        value: state.dtype,
        onInput: (dtype) => change({ dtype }),
      }),
      select({
        label: "linear weights in",
        options: [[null, "the same"], ...Object.keys(data.quantized)],
        value: state.quantize,
        onInput: (quantize) => change({ quantize }),
      }),
      select({
        label: "card",
        options: data.cards.map(({ name }) => name),
        value: state.card.name,
        onInput: (name) => change({ card: named(data.cards, name) }),
      })));

  /* Everything that is said of one model. */
  function account(model) {
    const { context, dtype, quantize, card } = state;
    const largest = memory.largest_batch(model, card.nbytes, context, dtype, quantize);
    const rows = state.fill ? largest : state.batch;
    return {
      model,
      rows,
      largest,
      ...memory.fits(model, card.nbytes, context, rows, dtype, quantize),
      n_params: memory.n_params(model),
      per_token: memory.kv_bytes_per_token(model, dtype),
      step: memory.bytes_per_step(model, context, rows, dtype, quantize),
      ceiling: memory.decode_ceiling(model, card.bandwidth, context, rows, dtype, quantize),
    };
  }

  function show() {
    batch.disable(state.fill);
    const both = state.models.map(account);
    const exact = results.querySelector("details")?.open;
    results.replaceChildren(bars(both, state.card), summary(both), numbers(both), inBytes(both, exact), notes(both));
    if (drawn) announce(el, both.map(sentence).join(" "));
    drawn = true;
  }

  const sentence = ({ model, rows, spare, ceiling }) =>
    rows === 0
      ? `${model.name}: not even one row fits.`
      : `${model.name}: ${spare < 0 ? "does not fit" : "fits"}, at most ${number(ceiling, 0)} tokens a second.`;

  function summary([one, other]) {
    if (!one.rows || !other.rows) return h("p", { class: "memory-summary" }, [one, other].map(sentence).join(" "));
    const ratio = one.ceiling / other.ceiling;
    return h("p", { class: "memory-summary" },
      `Ceilings on this card: ${number(one.ceiling, 0)} and ${number(other.ceiling, 0)} tokens/s, a ratio of `,
      h("strong", { class: "memory-ratio" }, number(ratio, 2)), ".");
  }

  function numbers(both) {
    const row = (name, of) => [name, ...both.map(of)];
    return table("The two accounts", ["account", ...both.map(({ model }) => model.name)], [
      row("parameters", ({ n_params }) => `${number(n_params / 1e9, 2)} × 10⁹`),
      row("weights", ({ weights }) => human_bytes(weights)),
      row("cache, one token", ({ per_token }) => human_bytes(per_token)),
      row("cache, all rows", ({ cache }) => human_bytes(cache)),
      row("reserve", ({ reserve }) => human_bytes(reserve)),
      row("together", ({ total }) => human_bytes(total)),
      row("spare", ({ spare }) => (spare < 0 ? `−${human_bytes(-spare)}` : human_bytes(spare))),
      row("largest batch", ({ largest }) => number(largest, 0)),
      row("batch here", ({ rows }) => number(rows, 0)),
      row("bytes a step reads", ({ step, rows }) => (rows ? human_bytes(step) : "–")),
      row("ceiling, tokens/s", ({ ceiling, rows }) => (rows ? number(ceiling, 1) : "–")),
      row("ceiling for one row", ({ ceiling, rows }) => (rows ? number(ceiling / rows, 1) : "–")),
    ]);
  }

  function inBytes(both, open) {
    const exactly = (name, key) => [name, ...both.map((one) => number(one[key], 0))];
    const box = details("In bytes, exactly",
      table("Exact numbers", ["account", ...both.map(({ model }) => model.name)], [
        exactly("parameters", "n_params"),
        exactly("weights", "weights"),
        exactly("cache, one token", "per_token"),
        exactly("cache, all rows", "cache"),
        exactly("reserve", "reserve"),
        exactly("together", "total"),
        exactly("spare", "spare"),
        exactly("a step", "step"),
      ]));
    box.open = Boolean(open);
    return box;
  }

  /* What the numbers take for granted. */
  function notes(both) {
    const lines = [];
    for (const { model, rows } of both.filter(({ model }, i) => i === 0 || model !== both[0].model)) {
      const said = [];
      if (model.max_context && state.context > model.max_context)
        said.push(`made for ${number(model.max_context, 0)} tokens; beyond them this is arithmetic`);
      for (const [window, layers] of model.windows)
        if (window) {
          const which = layers === model.n_layers ? "all" : `${layers} of ${model.n_layers}`;
          said.push(`${which} layers keep no more than ${number(window, 0)} tokens`);
        }
      if (model.kind === "latent") said.push(`keeps a latent of ${model.elements_per_token} numbers per token and layer`);
      if (model.weights.idle && rows > 1)
        said.push("a step is counted with the experts of one token, the least; rows sent to others read those too");
      if (said.length) lines.push(h("li", {}, `${model.name}: ${said.join("; ")}.`));
    }
    return h("div", { class: "x-faint" },
      lines.length > 0 && h("ul", { class: "memory-notes" }, lines),
      h("p", {},
        `${state.card.name}: ${human_bytes(state.card.nbytes)}, reads ${number(state.card.bandwidth / 1e9, 0)} GB/s at most` +
        `${state.card.source && ` (${state.card.source})`}. The reserve, a tenth and at most 2 GB, is an assumption. ` +
        `Shapes: ${[...new Set(both.map(({ model }) => `${model.name}, ${model.source}`))].join("; ")}.`));
  }

  el.append(controls, results);
  show();
}

/* Two bars on one scale, and where the card ends. */
function bars(both, card) {
  const whole = 1.03 * Math.max(card.nbytes, ...both.map(({ total }) => total));
  const share = (bytes) => `${(100 * bytes) / whole}%`;
  const part = (name, bytes) => bytes > 0 && h("span", { class: `memory-part memory-${name}`, style: { width: share(bytes) } });
  const key = (name) => h("span", { class: "memory-key" }, h("span", { class: `memory-swatch memory-${name}` }), name);
  return h("div", { class: "memory-bars" },
    h("p", { class: "x-row memory-legend", "aria-hidden": "true" },
      key("weights"), key("cache"), key("reserve"),
      h("span", { class: "memory-key" }, h("span", { class: "memory-swatch memory-end" }), `end of the ${card.name} card`)),
    both.map(({ model, rows, weights, cache, reserve, total, spare }) => {
      const verdict = spare < 0 ? `does not fit: ${human_bytes(-spare)} missing` : `fits, ${human_bytes(spare)} to spare`;
      return h("div", { class: "memory-account" },
        h("p", { class: "memory-name" }, h("strong", {}, model.name),
          ` ${number(rows, 0)} ${rows === 1 ? "row" : "rows"}: `,
          h("span", { class: spare < 0 ? "x-problem" : undefined }, verdict)),
        h("div", {
          class: "memory-bar",
          role: "img",
          "aria-label": `${model.name}: weights ${human_bytes(weights)}, cache ${human_bytes(cache)}, reserve ` +
            `${human_bytes(reserve)}; ${human_bytes(total)} of ${human_bytes(card.nbytes)}`,
        },
          part("weights", weights), part("cache", cache), part("reserve", reserve),
          h("span", { class: "memory-end", style: { left: share(card.nbytes) } })));
    }));
}

/* A whole number from 1 to largest: a slider that goes in doublings and their halves, and a field for any. */
function amount({ label, value, largest, onInput }) {
  const steps = [];
  for (let n = 1; n <= largest; n *= 2) steps.push(n, ...(n > 1 && 1.5 * n <= largest ? [1.5 * n] : []));
  const nearest = (n) => steps.findLastIndex((step) => step <= n);
  const problem = h("span", { class: "x-problem", role: "alert" });
  const range = h("input", { type: "range", min: 0, max: steps.length - 1, "aria-label": label });
  const field = h("input", { type: "number", min: 1, max: largest, step: 1, "aria-label": `${label}, exactly` });
  const tell = (n) => {
    range.value = nearest(n);
    range.setAttribute("aria-valuetext", number(n, 0));
  };
  range.addEventListener("input", () => {
    field.value = steps[range.value];
    problem.textContent = "";
    tell(steps[range.value]);
    onInput(steps[range.value]);
  });
  field.addEventListener("input", () => {
    const n = Number(field.value);
    const good = Number.isInteger(n) && n >= 1 && n <= largest;
    problem.textContent = good ? "" : `a whole number from 1 to ${number(largest, 0)}`;
    if (good) (tell(n), onInput(n));
  });
  field.value = value;
  tell(value);
  const element = h("div", { class: "x-control x-slider memory-amount", role: "group", "aria-label": label },
    h("span", { "aria-hidden": "true" }, label), range, field, problem);
  element.disable = (off) => (range.disabled = field.disabled = off);
  return element;
}
