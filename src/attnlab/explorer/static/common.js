// Helpers that every explorer uses. They stand in front of each explorer's own module, in one scope with it: no import, no export.

/** An explorer's module: what `export default` names. `draw({ data, el })` draws into el; it may be async, and may return
    a function that ends it. The root says what it is and, once drawn, that it is; new data draw it anew; what goes wrong
    is said in words. */
function explorer(kind, draw) {
  return {
    async render({ model, el }) {
      let end;
      let turn = 0;
      async function start() {
        const mine = ++turn;
        end?.();
        end = undefined;
        el.replaceChildren();
        delete el.dataset.ready;
        try {
          const ending = await draw({ data: model.get("data"), model, el });
          if (mine !== turn) return ending?.();
          end = ending;
          el.dataset.ready = "true";
        } catch (error) {
          if (mine === turn) broken(el, `This figure could not be drawn: ${error.message}.`);
        }
      }
      el.classList.add("attnlab-explorer");
      el.dataset.explorer = kind;
      model.on("change:data", start);
      await start();
      return () => {
        model.off("change:data", start);
        turn++;
        end?.();
      };
    },
  };
}

/** Nothing can be drawn: say why. On a page the still picture shows while the root is not ready. */
function broken(el, sentence) {
  delete el.dataset.ready;
  el.replaceChildren(h("p", { class: "x-problem", role: "alert" }, sentence));
}

/** A long string of the data, data[key] or data[key][index]. On a page it may lie in a file, loaded when it is first asked for;
    bytes that were made in the page are handed on. */
async function part(data, key, index) {
  const value = index === undefined ? data[key] : data[key][index];
  return typeof value === "string" || ArrayBuffer.isView(value) ? value : globalThis.attnlabExplorers.file(value);
}

// ---- the document -------------------------------------------------------------------------------------------------

/** An element. Attributes: functions under on…, true and false, a style object; children are text, never markup. */
function h(tag, attributes, ...children) {
  return furnish(document.createElement(tag), attributes, children);
}

/** The same for SVG. */
function svg(tag, attributes, ...children) {
  return furnish(document.createElementNS("http://www.w3.org/2000/svg", tag), attributes, children);
}

function furnish(element, attributes, children) {
  for (const [name, value] of Object.entries(attributes ?? {})) {
    if (value === undefined || value === null || value === false) continue;
    if (typeof value === "function") element.addEventListener(name.slice(2).toLowerCase(), value);
    else if (name === "style" && typeof value === "object") {
      for (const [property, setting] of Object.entries(value)) element.style.setProperty(property, setting);
    } else element.setAttribute(name, value === true ? "" : value);
  }
  const shown = children.flat(Infinity).filter((child) => child !== undefined && child !== null && child !== false);
  element.append(...shown.map((child) => (child instanceof Node ? child : String(child))));
  return element;
}

// ---- controls: each is an element with `.input`, the control itself, and `.set(value)`, which does not call onInput -----

/** `format(value)` is what a person reads, and what a screen reader says, beside the slider. */
function slider({ label, min, max, step = 1, value, format = String, onInput }) {
  const input = h("input", { type: "range", min, max, step, value });
  const output = h("output", { "aria-hidden": "true" });
  const element = h("label", { class: "x-control x-slider" }, h("span", {}, label), input, output);
  const tell = () => {
    output.textContent = format(Number(input.value));
    input.setAttribute("aria-valuetext", output.textContent);
  };
  input.addEventListener("input", () => (tell(), onInput?.(Number(input.value))));
  element.input = input;
  element.set = (next) => ((input.value = next), tell());
  tell();
  return element;
}

/** Options are values, or [value, text] pairs. */
function select({ label, options, value, onInput }) {
  const pairs = options.map((option) => (Array.isArray(option) ? option : [option, option]));
  const input = h("select", {}, pairs.map(([, text], i) => h("option", { value: i }, text)));
  const element = h("label", { class: "x-control" }, h("span", {}, label), input);
  element.input = input;
  element.set = (next) => (input.value = pairs.findIndex(([known]) => known === next));
  input.addEventListener("input", () => onInput?.(pairs[input.value][0]));
  element.set(value ?? pairs[0]?.[0]);
  return element;
}

function toggle({ label, checked = false, onInput }) {
  const input = h("input", { type: "checkbox" });
  const element = h("label", { class: "x-control x-toggle" }, input, h("span", {}, label));
  element.input = input;
  element.set = (next) => (input.checked = next);
  input.addEventListener("input", () => onInput?.(input.checked));
  element.set(checked);
  return element;
}

function button(label, onClick) {
  return h("button", { type: "button", onClick }, label);
}

/** A table that scrolls inside itself; the first cell of a row names the row. */
function table(caption, head, rows) {
  return h("div", { class: "x-scroll", tabindex: 0, role: "group", "aria-label": caption },
    h("table", {},
      h("caption", {}, caption),
      h("thead", {}, h("tr", {}, head.map((cell) => h("th", { scope: "col" }, cell)))),
      h("tbody", {}, rows.map(([name, ...cells]) =>
        h("tr", {}, h("th", { scope: "row" }, name), cells.map((cell) => h("td", {}, cell)))))));
}

function details(summary, ...children) {
  return h("details", {}, h("summary", {}, summary), children);
}

/** Tell a screen reader, politely; nothing is seen. Only the last of a quick succession is said. */
function announce(el, text) {
  const root = el.closest("[data-explorer]") ?? el;
  let line = root.querySelector(":scope > .x-announcement");
  if (!line) root.append((line = h("p", { class: "x-announcement x-unseen", role: "status", "aria-live": "polite" })));
  clearTimeout(line.waiting);
  line.waiting = setTimeout(() => (line.textContent = text), 150);
}

// ---- colours and numbers --------------------------------------------------------------------------------------------

// matplotlib's cividis, every sixteenth colour
const CIVIDIS = ("00224e 002e6a 1a386f 32436d 434e6c 535a6d 61656f 6f7073 7d7c78 8b8778 9a9376 aaa073 bbad6d ccba64 " +
  "ddc858 efd748 fee838").split(" ").map((hex) => [0, 2, 4].map((i) => parseInt(hex.slice(i, i + 2), 16)));

/** [red, green, blue] of a number from 0 to 1. */
function cividisRGB(t) {
  const place = Math.min(1, Math.max(0, t)) * (CIVIDIS.length - 1);
  const i = Math.min(CIVIDIS.length - 2, Math.floor(place));
  return CIVIDIS[i].map((channel, k) => Math.round(channel + (place - i) * (CIVIDIS[i + 1][k] - channel)));
}

function cividis(t) {
  return `rgb(${cividisRGB(t).join(", ")})`;
}

/** Ink that can be read on cividis(t): 4.5:1 everywhere. */
function textOn(t) {
  return t < 0.47 ? "#ffffff" : "#000000";
}

/** A number with so many decimals, a real minus, and thousands apart. */
function number(x, digits = 2) {
  const text = Math.abs(x).toLocaleString("en-US", { minimumFractionDigits: digits, maximumFractionDigits: digits });
  return x < 0 && /[1-9]/.test(text) ? `−${text}` : text;
}

// ---- bytes ------------------------------------------------------------------------------------------------------------

function bytes64(base64) {
  return Uint8Array.from(atob(base64), (character) => character.charCodeAt(0));
}

/** Hand a file to the reader; content is a string, bytes or a Blob. */
function download(name, mime, content) {
  const address = URL.createObjectURL(content instanceof Blob ? content : new Blob([content], { type: mime }));
  const link = h("a", { href: address, download: name });
  link.click();
  setTimeout(() => URL.revokeObjectURL(address), 10_000);
}

/** An SVG element as the text of a file. Colours must be in its attributes: a file has no style sheet of ours. */
function svgText(element) {
  const copy = element.cloneNode(true);
  copy.setAttribute("xmlns", "http://www.w3.org/2000/svg");
  return new XMLSerializer().serializeToString(copy);
}

/** A promise of the same as a PNG Blob; width and height are those of its viewBox, times scale. */
function svgToPng(element, scale = 2) {
  const { width, height } = element.viewBox.baseVal;
  const copy = element.cloneNode(true);
  copy.setAttribute("width", width);
  copy.setAttribute("height", height);
  return new Promise((resolve, reject) => {
    const image = new Image();
    image.onload = () => {
      const canvas = h("canvas", { width: Math.round(width * scale), height: Math.round(height * scale) });
      canvas.getContext("2d").drawImage(image, 0, 0, canvas.width, canvas.height);
      canvas.toBlob((blob) => (blob ? resolve(blob) : reject(new Error("the picture is too large"))), "image/png");
    };
    image.onerror = () => reject(new Error("the picture could not be drawn"));
    image.src = `data:image/svg+xml;charset=utf-8,${encodeURIComponent(svgText(copy))}`;
  });
}
