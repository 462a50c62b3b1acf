"""Parts of a page that a script writes, between two comments."""

from __future__ import annotations

from pathlib import Path


def write_between_marks(page: Path, name: str, text: str) -> None:
    """Replace what lies between `<!-- name: … -->` and `<!-- end of name -->`.

    Args:
        page: A Markdown file with both comments.
        name: The part's.
        text: Markdown.

    Raises:
        ValueError: The page lacks a comment; it is left as it is.
    """
    content = page.read_text(encoding="utf-8")
    before, start, rest = content.partition(f"<!-- {name}: ")
    comment, close, rest = rest.partition("-->")
    _, end, after = rest.partition(f"<!-- end of {name} -->")
    if not (start and close and end):
        raise ValueError(f"{page} has no <!-- {name}: … --> followed by <!-- end of {name} -->.")
    page.write_text(f"{before}{start}{comment}{close}\n\n{text.strip()}\n\n{end}{after}", encoding="utf-8")
