"""The attention explorer in Chromium: bytes, how soon it is painted, how soon a hover is.

python benchmarks/explorers.py            writes results/explorers-<machine>.json
python benchmarks/explorers.py --quick    a small record, once, no record on disk

A page of the book holds what is large in files of their own, which it fetches when they are opened; a saved file holds all.

The weights are random: 8-bit bytes of them compress worse than a trained model's, so these are upper bounds. Milliseconds of
painting are those until the browser's main thread has painted the frame; the processor draws it, no GPU.
"""

import importlib.util
import json
import os
import statistics
import sys
import tempfile
from pathlib import Path

import numpy as np
from common import interleave, keep, options, script, spread

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tools"))

from attnlab.attention import causal_mask  # noqa: E402
from attnlab.explorer.attention import AttentionExplorer  # noqa: E402
from attnlab.record import AttentionRecord  # noqa: E402

TARGETS = {"bytes": {24: 500_000, 64: 3_000_000}, "first_paint_ms": 300, "hover_ms": 16}

# A frame is over when a message that was posted within it comes: style, layout and paint lie between.
FRAME = """
const frame = (act) => new Promise((done) => requestAnimationFrame(() => {
  const start = performance.now();
  act();
  const channel = new MessageChannel();
  channel.port1.onmessage = () => done(performance.now() - start);
  channel.port2.postMessage(0);
}));
"""
WATCH = (
    "(() => {"
    + FRAME
    + """
  const watch = new MutationObserver(async () => {
    if (!document.querySelector("[data-ready=true]") || watch.seen) return;
    watch.seen = true;
    await frame(() => {});
    globalThis.firstPaint = performance.now(); // since the page was asked for
  });
  watch.observe(document, { subtree: true, childList: true, attributes: true });
})()"""
)
HOVER = (
    "async (what) => {"
    + FRAME
    + """
  const took = [];
  if (what === "token") {
    for (const token of document.querySelectorAll(".attention-token"))
      took.push(await frame(() => token.dispatchEvent(new PointerEvent("pointerover", { bubbles: true }))));
  } else {
    const map = document.querySelector(".attention-heat");
    map.scrollIntoView();
    const { right, bottom } = map.getBoundingClientRect();
    for (let i = 0; i < 60; i++)
      took.push(await frame(() => map.dispatchEvent(new PointerEvent("pointermove", { bubbles: true, clientX: right - 5 * i, clientY: bottom - 5 }))));
  }
  return took;
}"""
)


def random_record(n_layers: int, n_heads: int, n_kv_heads: int, n_tokens: int) -> AttentionRecord:
    """Softmax of normal scores under the causal mask."""
    scores = np.random.default_rng(0).standard_normal((n_layers, n_heads, n_tokens, n_tokens), dtype=np.float32)
    scores[..., ~causal_mask(n_tokens, n_tokens).numpy()] = -np.inf
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    weights /= weights.sum(-1, keepdims=True)
    tokens = [f"token{i}" for i in range(n_tokens)]
    return AttentionRecord(weights.astype(np.float16), tokens, tokens, n_kv_heads, None, True, "random weights")


def open_empty(browser, path: Path) -> float:
    """What a page without anything takes: the browser's own share."""
    page = browser.new_page(viewport={"width": 900, "height": 1200})
    try:
        page.add_init_script(WATCH)
        page.goto(path.as_uri())
        page.wait_for_function("globalThis.firstPaint")
        return page.evaluate("globalThis.firstPaint")
    finally:
        page.close()


def open_and_hover(browser, path: Path) -> dict[str, float]:
    """One page load: when it was painted, then the median hover over tokens and over the heat map."""
    page = browser.new_page(viewport={"width": 900, "height": 1200})
    try:
        page.add_init_script(WATCH)
        page.goto(path.as_uri())
        page.wait_for_function("globalThis.firstPaint")
        first = page.evaluate("globalThis.firstPaint")
        page.wait_for_function(
            "[...document.querySelectorAll('.attention-head img')].every((picture) => picture.src)", polling=200
        )
        tokens, cells = page.evaluate(HOVER, "token"), page.evaluate(HOVER, "cell")
        return {"first paint": first, "token": statistics.median(tokens), "cell": statistics.median(cells)}
    finally:
        page.close()


def as_on_a_page(file: Path) -> Path:
    """A saved file's copy whose large data lie beside it, as the book's own extension splits them off."""
    spec = importlib.util.spec_from_file_location("book_explorers", ROOT / "book" / "_ext" / "explorers.py")
    extension = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(extension)
    data = file.parent / "data"
    text = extension.FIGURE.sub(
        lambda found: found[1] + extension.split(found[3], data) + found[4], file.read_text(encoding="utf-8")
    )
    page = file.with_stem(f"{file.stem}-page")
    page.write_text(text, encoding="utf-8")
    return page


def measure(browser, records: list[AttentionRecord], repetitions: int, folder: Path) -> list[dict]:
    pages = {}  # (form, tokens) → its file
    for record in records:
        n = len(record.key_tokens)
        file = AttentionExplorer(record).save_html(folder / f"{n}.html", title="Random weights")
        pages |= {("one file", n): file, ("page of a book", n): as_on_a_page(file)}
    empty = folder / "empty.html"
    empty.write_text('<!doctype html><title>Empty</title><p data-ready="true">Nothing</p>', encoding="utf-8")
    calls = {page: lambda path=path: open_and_hover(browser, path) for page, path in pages.items()}
    runs = interleave({"empty": lambda: open_empty(browser, empty), **calls}, repetitions)
    rows = [{"form": "an empty page", "first_paint_ms": spread(runs["empty"])}]
    for record in records:
        n = len(record.key_tokens)
        data = AttentionExplorer(record).data
        for form in ("one file", "page of a book"):
            rows.append(
                {
                    "form": form,
                    "heads": record.weights.shape[0] * record.weights.shape[1],
                    "tokens": n,
                    "bytes": len(json.dumps(data, separators=(",", ":"))),
                    "as_json_numbers_bytes": json_bytes(record),
                    "first_paint_ms": spread([run["first paint"] for run in runs[form, n]]),
                    "hover_a_token_ms": spread([run["token"] for run in runs[form, n]]),
                    "hover_a_weight_ms": spread([run["cell"] for run in runs[form, n]]),
                }
            )
    return rows


def json_bytes(record: AttentionRecord) -> int:
    """What the same maps take as JSON numbers of four decimals, the zeros of the mask among them."""
    layer = np.round(record.weights[0].astype(float), 4).tolist()
    return len(json.dumps(layer, separators=(",", ":"))) * record.weights.shape[0]


def targets(rows: list[dict]) -> list[dict]:
    """Each figure against what it was to be, by its median."""
    found = []
    for row in rows:
        asked = {"bytes": TARGETS["bytes"].get(row["tokens"]), "first_paint_ms": TARGETS["first_paint_ms"],
                 "hover_a_token_ms": TARGETS["hover_ms"], "hover_a_weight_ms": TARGETS["hover_ms"]}  # fmt: skip
        for what, most in asked.items():
            value = row[what]["median"] if isinstance(row[what], dict) else row[what]
            if most is not None:
                found.append({"form": row["form"], "tokens": row["tokens"], "what": what, "at_most": most, "measured": value,
                              "reached": value <= most})  # fmt: skip
    return found


def main() -> int:
    args = options(__doc__, "a small record, once")

    from chromium import FLAGS, MISSING, find
    from playwright.sync_api import sync_playwright

    if (chromium := find()) is None:
        print(MISSING, file=sys.stderr)
        return 1
    shape = (2, 4, 2) if args.quick else (32, 32, 8)
    busy = round(os.getloadavg()[0], 1)  # processes that ran or waited: beyond the cores, times are the machine's
    records = [random_record(*shape, n_tokens) for n_tokens in ((8,) if args.quick else (24, 64))]
    with sync_playwright() as playwright, tempfile.TemporaryDirectory() as folder:
        browser = playwright.chromium.launch(executable_path=chromium, args=FLAGS)
        version = browser.version
        rows = measure(browser, records, 1 if args.quick else 9, Path(folder))
        browser.close()
    print(f"an empty page: first_paint_ms {rows[0]['first_paint_ms']['median']:.1f}")
    for row in rows[1:]:
        times = ", ".join(f"{key} {row[key]['median']:.1f}" for key in row if key.endswith("_ms"))
        print(f"{row['heads']} heads, {row['tokens']} tokens, {row['form']}: {row['bytes']:,} bytes, {times}")
    if args.quick:
        return 0
    content = {"chromium": version, "weights": "random", "load_average_at_start": busy, "rows": rows}
    keep("explorers", args, content | {"targets": targets(rows[1:])})
    return 0


if __name__ == "__main__":
    script(main)
