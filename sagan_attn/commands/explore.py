"""`python -m sagan_attn explore`: one HTML page in which to point at an image and see what attention looks at."""

import argparse
from pathlib import Path

from sagan_attn.commands.attention_images import add_image_arguments, look_at
from sagan_attn.errors import one_line

__all__ = ["add_arguments", "run"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_image_arguments(parser)
    parser.add_argument("--out", type=Path, required=True, metavar="FILE", help="page.html")
    parser.add_argument(
        "--max-page-bytes", type=float, default=5e6, metavar="BYTES", help="of the page (default: 5,000,000)"
    )
    parser.add_argument("--title", help="of the page (default: the run's name)")


def run(arguments: argparse.Namespace) -> int:
    """Write the page. Returns 0, or 1 when an image was passed over as broken. Raises errors of the library."""
    from sagan_attn.viz.draw import check_output, write_file
    from sagan_attn.viz.explorer import explorer_page

    check_output(arguments.out, (".html", ".htm"))
    seen, broken = look_at(arguments)
    title = arguments.title or f"Attention of {arguments.checkpoint.resolve().name}"
    words = explorer_page(seen, title, int(arguments.max_page_bytes)).encode()
    write_file(arguments.out, words)
    print(one_line(f"{arguments.out}: {len(seen.captions)} images, {', '.join(seen.records)}; {len(words):,} bytes"))
    return 1 if broken else 0
