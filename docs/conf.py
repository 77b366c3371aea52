"""The pages as a site, by Sphinx: `make docs` builds dist/docs, which needs no network to be read.

Pages are Markdown as forges show it. What only a site needs, the order of the pages, is here.
"""

from pathlib import Path

from sphinx.application import Sphinx

project = "microguest"
extensions = ["myst_parser"]
myst_heading_anchors = 4  # links to headings, by the names that forges give them
exclude_patterns = ["examples"]
highlight_language = "text"
html_theme = "furo"
html_title = project
html_static_path = ["static"]
html_css_files = ["site.css"]
html_show_copyright = False
html_copy_source = False
html_use_index = False

# A folder's first pages, in this order; the others follow by name.
PARTS = {
    "guide": ["getting-started", "python", "cli", "deploying", "ubuntu", "troubleshooting", "faq"],
    "reference": ["host", "cli", "boot-config", "protocol"],
    "design": ["architecture", "boot", "roots", "images", "network", "processes", "workload"],
    "developing": ["code-map", "glossary", "tests", "building"],
}


def pages(folder: str) -> list[str]:
    """Those that there are, in order."""
    there = sorted(page.stem for page in (Path(__file__).parent / folder).glob("*.md"))
    first = [name for name in PARTS[folder] if name in there]
    return first + [name for name in there if name not in first]


def order_pages(app: Sphinx, page: str, source: list[str]) -> None:
    """Tell Sphinx the pages of each folder, at the end of the index."""
    if page != "index":
        return
    for folder in PARTS:
        if names := pages(folder):
            lines = "\n".join(f"{folder}/{name}" for name in names)
            options = f":hidden:\n:caption: {folder.capitalize()}"
            source[0] += f"\n```{{toctree}}\n{options}\n\n{lines}\n```\n"


def setup(app: Sphinx) -> None:
    """Called by Sphinx."""
    app.connect("source-read", order_pages)
