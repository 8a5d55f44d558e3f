"""Pages that MkDocs does not find in ``docs/``: the README as the front page, and the changelog."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[2]


def on_files(files: Files, *, config: Any) -> Files:
    """Add the pages that lie elsewhere in the repository."""
    readme = (ROOT / "README.md").read_text("utf-8")
    pages = {
        "index.md": relative_links(readme, config["site_url"]),
        "changelog.md": (ROOT / "CHANGELOG.md").read_text("utf-8"),
    }
    for name, text in pages.items():
        files.append(File.generated(config, name, content=text))
    return files


def relative_links(text: str, site: str) -> str:
    """Return a page with its links to the site as links to its sources, which a strict build checks."""
    text = re.sub(rf"{re.escape(site)}([\w-]+)/(?=[#)\"])", r"\1.md", text)
    return text.replace(site, "")
