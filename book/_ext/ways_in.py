"""From a page to a place where its notebook runs: buttons for Binder and Colab, on pages that know their repository.

They know it from `repository.url` in _config.yml, or in GitHub's CI from the environment, so that a fork's pages lead to the
fork. Where neither says, there are no such buttons: they would lead nowhere. Binder opens the branch as it is; Colab, whose
machines begin empty, the copies that tools/colab.py makes and the Pages workflow keeps on the branch `colab`. A chapter that was
measured to take more memory than Binder gives has no button for it; one that takes less says how much (notebook_memory).

How to use this book writes OWNER/REPOSITORY where a reader must put theirs in; known, it is written out.
"""

import json
import os
from pathlib import Path
from urllib.parse import urlsplit

import yaml
from docutils import nodes
from sphinx.application import Sphinx
from sphinx.config import Config

BINDER = "https://mybinder.org"
COLAB = "https://colab.research.google.com"
COLAB_BRANCH = "colab"
PLACEHOLDER = "OWNER/REPOSITORY"


def repository(folder: str | Path) -> tuple[str, str]:
    """Address and branch of the repository that a book in ``folder`` belongs to; no address where nobody says."""
    settings = yaml.safe_load((Path(folder) / "_config.yml").read_text(encoding="utf-8")).get("repository") or {}
    address = settings.get("url") or ""
    if name := os.environ.get("GITHUB_REPOSITORY"):
        address = f"{os.environ.get('GITHUB_SERVER_URL', 'https://github.com')}/{name}"
    return address.rstrip("/"), settings.get("branch") or "main"


def link_repository(app: Sphinx, config: Config) -> None:
    """Jupyter Book has a default of its own, its own repository, which nobody's book is in: it is always replaced."""
    options = config.html_theme_options
    address, branch = repository(app.srcdir)
    options.update(repository_url=address, repository_branch=branch, use_repository_button=bool(address))
    if not address:
        return
    chosen = {key: value for key, value in options.get("launch_buttons", {}).items() if value}
    colab = {"colab_url": COLAB} if urlsplit(address).netloc == "github.com" else {}  # Colab reads from there alone
    options["launch_buttons"] = {"binderhub_url": BINDER, **colab, **chosen, "notebook_interface": "jupyterlab"}


def memory(folder: str | Path, chapter: str) -> tuple[int, int]:
    """Bytes that a chapter and the Jupyter server take by the largest record, and what Binder gives; (0, 0) if not measured."""
    found = (0, 0)
    for path in (Path(folder) / "benchmarks" / "results").glob("notebook_memory-*.json"):
        record = json.loads(path.read_text(encoding="utf-8"))
        for row in record["rows"]:
            if row["chapter"] == chapter:
                found = max(found, (row["peak_bytes"] + record["jupyterlab_bytes"], record["limit_bytes"]))
    return found


def suit_buttons(app: Sphinx, pagename: str, template: str, context: dict, doctree: nodes.document) -> None:
    """Colab opens the copies; Binder is offered to what fits it."""
    branch = app.config.html_theme_options["repository_branch"]
    taken, given = memory(app.srcdir, Path(pagename).name)
    for group in context.get("header_buttons", []):
        for button in list(group.get("buttons", [])):
            if button["text"] == "Colab":
                button["url"] = button["url"].replace(f"/blob/{branch}/", f"/blob/{COLAB_BRANCH}/", 1)
            elif button["text"] == "Binder" and taken > given:
                group["buttons"].remove(button)
            elif button["text"] == "Binder" and taken:
                button["tooltip"] += f": this chapter takes {taken / 1e9:.1f} of its {given / 1e9:.0f} GB"


def name_repository(app: Sphinx, docname: str, source: list[str]) -> None:
    if address := app.config.html_theme_options["repository_url"]:
        source[0] = source[0].replace(PLACEHOLDER, urlsplit(address).path.strip("/"))


def setup(app: Sphinx) -> dict:
    app.connect("config-inited", link_repository)
    app.connect("source-read", name_repository)
    app.connect("html-page-context", suit_buttons, priority=502)  # after the theme's buttons, at 501
    return {"version": "1", "parallel_read_safe": True, "parallel_write_safe": True}
