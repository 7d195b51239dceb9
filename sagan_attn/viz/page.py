"""Parts of HTML pages that show everything and fetch nothing: style, script and pictures are in them."""

import base64
import hashlib
from collections.abc import Sequence
from html import escape

__all__ = ["data_url", "frame", "page", "text"]

STYLE = """
:root { color-scheme: light dark; --ink: #1a1a1a; --dim: #5c5c5c; --paper: #ffffff; --line: #d5d5d5; --soft: #f4f5f7;
  --accent: #0b5cad; }
@media (prefers-color-scheme: dark) { :root { --ink: #e8e8e8; --dim: #a6a6a6; --paper: #16181c; --line: #3a3d44;
  --soft: #22252b; --accent: #7db9f5; } }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 1rem 1.25rem 2rem; max-width: 72rem; background: var(--paper); color: var(--ink);
  font: 16px/1.45 system-ui, sans-serif; overflow-wrap: anywhere; }
h1 { font-size: 1.35rem; margin: .3rem 0 .6rem; }
h2 { font-size: 1.05rem; margin: 1.2rem 0 .4rem; }
.dim { color: var(--dim); font-size: .87rem; max-width: 80ch; }
.wide { overflow-x: auto; border: 1px solid var(--line); border-radius: .4rem; }
table { border-collapse: collapse; font-size: .85rem; font-variant-numeric: tabular-nums; width: 100%; }
th, td { padding: .3rem .6rem; border-bottom: 1px solid var(--line); text-align: right; white-space: nowrap; }
th { background: var(--soft); font-weight: 600; }
tr:last-child td { border-bottom: 0; }
dt { font-weight: 600; } dd { margin: 0 0 .3rem; color: var(--dim); }
summary { cursor: pointer; }
figure { margin: 0; background: #fff; border: 1px solid var(--line); border-radius: .4rem; padding: .4rem; }
figure img { display: block; width: 100%; height: auto; }
@media (max-width: 40rem) { body { padding: .6rem .7rem 1.5rem; font-size: 15px; } }
@media print { :root { --ink: #000; --dim: #333; --paper: #fff; --line: #999; --soft: #eee; } body { padding: 0; } }
"""


def page(title: str, body: Sequence[str], style: str = "", script: str = "") -> str:
    """A whole page in the style of this library's pictures."""
    return frame(title, body, STYLE + style, script)


def frame(title: str, body: Sequence[str], style: str, script: str = "") -> str:
    """A whole page. Its own policy forbids every fetch, and every style and script but those of their hashes."""
    scripts = f"'{_hash(script)}'" if script else "'none'"
    policy = (
        f"default-src 'none'; img-src data:; style-src '{_hash(style)}'; script-src {scripts}; "
        "base-uri 'none'; form-action 'none'"
    )
    parts = [
        "<!DOCTYPE html>",
        '<html lang="en">',
        "<head>",
        '<meta charset="utf-8">',
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">',
        '<meta name="referrer" content="no-referrer">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        f"<title>{text(title)}</title>",
        f"<style>{style}</style>",
        "</head>",
        "<body>",
        *body,
        *([f"<script>{script}</script>"] if script else []),
        "</body>",
        "</html>",
    ]
    return "\n".join(parts) + "\n"


def text(words: object) -> str:
    """Escaped, for content and attributes; control characters, which HTML forbids, replaced."""
    kept = "".join(c if c.isprintable() or c in "\n\t" else "\N{REPLACEMENT CHARACTER}" for c in str(words))
    return escape(kept, quote=True)


def data_url(kind: str, content: bytes) -> str:
    """A file inside an address."""
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"


def _hash(content: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()
