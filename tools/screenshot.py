"""Pictures of the built pages, wide and narrow, light and dark: `python tools/screenshot.py FOLDER [PAGE …]`.

Without pages it takes all of them. Files are named PAGE-WIDTH-THEME.png. `--viewport` keeps to the first screen.
"""

import argparse
from pathlib import Path

from chromium import FLAGS, MISSING, find
from playwright.sync_api import sync_playwright

ROOT = Path(__file__).resolve().parent.parent
HTML = ROOT / "_build" / "html"
WIDTHS = {1280: 800, 320: 640}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("pages", nargs="*", help="below _build/html, such as book/intro.html")
    parser.add_argument("--viewport", action="store_true", help="the first screen only, not the whole page")
    args = parser.parse_args()
    if not HTML.exists():
        raise SystemExit("no pages in _build/html: run make book first")
    if (path := find()) is None:
        raise SystemExit(MISSING)
    pages = args.pages or [
        p.relative_to(HTML).as_posix() for p in sorted(HTML.glob("*/*.html")) if "_static" not in p.parts
    ]
    args.folder.mkdir(parents=True, exist_ok=True)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=FLAGS)
        for width, height in WIDTHS.items():
            for theme in ("light", "dark"):
                page = browser.new_page(viewport={"width": width, "height": height}, color_scheme=theme)
                for name in pages:
                    page.goto((HTML / name).as_uri(), wait_until="load")
                    page.evaluate("() => window.MathJax?.startup?.promise")
                    page.evaluate("() => document.fonts.ready")
                    target = args.folder / f"{name.removesuffix('.html').replace('/', '-')}-{width}-{theme}.png"
                    page.screenshot(path=target, full_page=not args.viewport)
                    print(target)
                page.close()
        browser.close()
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
