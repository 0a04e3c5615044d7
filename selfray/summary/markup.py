"""Pieces of HTML. Whatever comes from outside goes through `escaped`."""

from __future__ import annotations

from collections.abc import Iterable
from html import escape
from typing import Any
from unicodedata import category

PHANTOM = "Synthetic phantom"


def printable(text: str) -> str:
    """Text with a replacement mark for each control character; spaces of any width stay."""
    return "".join(
        c if c.isprintable() or c in "\n\t" or category(c) == "Zs" else "�" for c in text
    )


def escaped(value: Any) -> str:
    """Text for HTML, also within an attribute."""
    return escape(printable(str(value)))


def facts(rows: Iterable[tuple[Any, str]]) -> str:
    """A list of names (escaped here) and values (HTML)."""
    items = "".join(f"<dt>{escaped(name)}</dt><dd>{value}</dd>" for name, value in rows)
    return f'<dl class="facts">{items}</dl>' if items else ""


def command(text: Any) -> str:
    """A command line, as it was given."""
    return f"<pre><code>{escaped(text)}</code></pre>" if text else ""


def figure(content: str, caption: str, *, kind: str = "") -> str:
    """Content (HTML) with a caption (HTML)."""
    attribute = f' class="{kind}"' if kind else ""
    return f"<figure{attribute}>{content}<figcaption>{caption}</figcaption></figure>"


def listed(names: Iterable[str]) -> str:
    """Finding names as words: `pleural_effusion` is pleural effusion."""
    return ", ".join(printable(name).replace("_", " ") for name in names)


def enumerated(items: list[str]) -> str:
    """One, two and three."""
    return " and ".join(filter(None, (", ".join(items[:-1]), items[-1])))


def shortened(name: str, most: int = 30) -> str:
    """A name for a chart, its middle left out where it is long."""
    name = printable(name)
    return name if len(name) <= most else f"{name[: most // 2]}…{name[-(most // 2 - 1) :]}"
