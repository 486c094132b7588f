"""The live companion in Chromium: what is loaded, how soon it answers, how fast it goes on, whether the page stays free.

python benchmarks/live.py            writes results/live-<machine>.json
python benchmarks/live.py --quick    one model, once, no record on disk

Each model is opened in a page of its own, from a file that holds its weights, so that no time is the network's. From the press
of the button to the first candidates for the next token: base64, the worker's start, the weights laid out, the prompt read.
Tokens a second are what the page itself says of 48 tokens, each shown as it comes. The longest task is the longest time that
the page could not have answered, from the press until the last map is drawn.
"""

import os
import sys
import tempfile
from pathlib import Path

import torch
from common import interleave, keep, options, script, spread

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tools"))

from attnlab import companion  # noqa: E402
from attnlab.explorer import LiveExplorer, live  # noqa: E402
from attnlab.tokenizer import load_tokenizer  # noqa: E402

TARGETS = {"download_bytes": ("at most", 8_000_000), "first_token_ms": ("at most", 1000), "tokens_per_second": ("at least", 40)}  # fmt: skip
TEXT = "def read(path):\n    with open(path) as file:\n        return file.read()\n\n\n" * 3
DRIVE = """async () => {
  const until = async (holds) => { while (!holds()) await new Promise((done) => setTimeout(done, 2)); };
  const find = (name) => [...document.querySelectorAll("button")].find((one) => one.textContent.startsWith(name));
  let longest = 0;
  const watch = new PerformanceObserver((list) => list.getEntries().forEach(({ duration }) => (longest = Math.max(longest, duration))));
  watch.observe({ type: "longtask" });
  const pressed = performance.now();
  find("Run the").click();
  await until(() => document.querySelector(".live-share")?.textContent);
  const first = performance.now() - pressed;
  await until(() => document.querySelector(".live-maps .attention-title"));
  find("Generate").click();
  await until(() => find("Stop"));
  await until(() => find("Generate"));
  const cells = [...document.querySelector("[data-explorer] tbody tr").cells].map((cell) => cell.textContent);
  const tokens = Number(document.querySelector(".live-cache").getAttribute("aria-label").split(" ")[2]);
  await until(() => document.querySelectorAll(".live-maps .attention-token").length === tokens);
  await new Promise((done) => setTimeout(done, 200));
  return { first_token_ms: first, read_ms: Number(cells[4].split(" ")[2]), tokens_per_second: Number(cells[5]), longest_task_ms: longest };
}"""


def visit(browser, path: Path) -> dict[str, float]:
    page = browser.new_page(viewport={"width": 900, "height": 1200})
    try:
        page.goto(path.as_uri())
        page.wait_for_selector("[data-ready=true]")
        return page.evaluate(DRIVE)
    finally:
        page.close()


def measure(browser, models: tuple[str, ...], repetitions: int, folder: Path) -> list[dict]:
    files = {name: LiveExplorer(TEXT, (name,)).save_html(folder / f"{name}.html") for name in models}
    runs = interleave({name: lambda name=name: visit(browser, files[name]) for name in models}, repetitions)
    tokens = len(load_tokenizer(companion.folder()).encode(TEXT))
    rows = []
    for name in models:
        config = live.described(name)
        rows.append(
            {
                "model": name,
                "n_kv_heads": config["n_kv_heads"],
                "download_bytes": sum(file["length"] for file in config["files"]),
                "prompt_tokens": tokens,
                **{key: spread([run[key] for run in runs[name]]) for key in runs[name][0]},
            }
        )
    return rows


def targets(rows: list[dict]) -> list[dict]:
    """Each figure against what it was to be, by its median."""
    found = []
    for row in rows:
        for what, (bound, limit) in TARGETS.items():
            value = row[what]["median"] if isinstance(row[what], dict) else row[what]
            reached = value <= limit if bound == "at most" else value >= limit
            found.append(
                {
                    "model": row["model"],
                    "what": what,
                    bound.replace(" ", "_"): limit,
                    "measured": value,
                    "reached": reached,
                }
            )
    return found


def agreement(name: str, n_tokens: int) -> dict:
    """How often int8 leaves the first choice as it was, on this package's own sources, which no model was trained on."""
    text = "\n".join(path.read_text(encoding="utf-8") for path in sorted((ROOT / "src" / "attnlab").glob("*.py")))
    ids = load_tokenizer(companion.folder()).encode(text)[:n_tokens]
    rows = torch.tensor(ids[: len(ids) // 128 * 128]).view(-1, 128)
    with torch.inference_mode():
        choices = [model(rows).argmax(-1) for model in (live.float_model(name), live.quantized(name))]
    return {
        "model": name,
        "positions": rows.numel(),
        "same_first_choice": (choices[0] == choices[1]).double().mean().item(),
    }


def main() -> int:
    args = options(__doc__, "one model, once")

    from chromium import FLAGS, MISSING, find
    from playwright.sync_api import sync_playwright

    if (chromium := find()) is None:
        print(MISSING, file=sys.stderr)
        return 1
    busy = round(os.getloadavg()[0], 1)  # processes that ran or waited: beyond the cores, times are the machine's
    models = live.MODELS[:1] if args.quick else live.MODELS
    with sync_playwright() as playwright, tempfile.TemporaryDirectory() as folder:
        browser = playwright.chromium.launch(executable_path=chromium, args=FLAGS)
        version = browser.version
        rows = measure(browser, models, 1 if args.quick else 7, Path(folder))
        browser.close()
    for row in rows:
        times = ", ".join(f"{key} {value['median']:.0f}" for key, value in row.items() if isinstance(value, dict))
        print(f"{row['model']}: {row['download_bytes']:,} bytes, {times}")
    int8 = [agreement(name, 256 if args.quick else 12_800) for name in models]
    for row in int8:
        print(
            f"{row['model']}: int8 keeps the first choice at {row['same_first_choice']:.1%} of {row['positions']:,} positions"
        )
    if args.quick:
        return 0
    content = {"chromium": version, "load_average_at_start": busy, "rows": rows, "int8": int8, "targets": targets(rows)}
    keep("live", args, content)
    return 0


if __name__ == "__main__":
    script(main)
