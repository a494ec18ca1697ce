"""Tables in notebooks. Colours are such as can be read on a light and on a dark page."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape

_COLOURS = {"selected": "#2da44e", "available": "#2da44e", "rejected": "#bf8700"}
_LEFT = "text-align: left; vertical-align: top; padding: 0.1em 1em 0.1em 0"


def table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a table; what is a status of a kernel has its colour."""
    head = "".join(f'<th style="{_LEFT}">{escape(column)}</th>' for column in columns)
    body = "".join(f"<tr>{''.join(map(_cell, row))}</tr>" for row in rows)
    return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


def titled(title: str, after: str = "") -> str:
    """Return a line that begins in bold."""
    return f"<div><b>{escape(title)}</b>{escape(after)}</div>"


def _cell(text: str) -> str:
    colour = f"; color: {_COLOURS[text]}" if text in _COLOURS else ""
    weight = "; font-weight: bold" if text == "selected" else ""
    return f'<td style="{_LEFT}{colour}{weight}">{escape(text)}</td>'
