"""report.html: a leaderboard and a picture for each track."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from pathlib import Path

from gmeta.benchmark.leaderboards import Board
from gmeta.core.files import write_text
from gmeta.evaluation.charts import Points, dot_chart
from gmeta.evaluation.pages import figure, page


def write_page(path: Path, label: str, boards: Sequence[Board], missing: Sequence[str]) -> None:
    """Write the page."""
    parts = [_board(board) for board in boards]
    if missing:
        parts.append(f"<p>{len(missing)} cells are not there yet: {escape(', '.join(missing))}.</p>")
    write_text(path, page("AntM2C", f"{label}: every model beside trivial ones, and what can be known at most", parts))


def _board(board: Board) -> str:
    head = "".join(f"<th>{escape(word)}</th>" for word in board.head)
    rows = "".join(f"<tr>{''.join(map(_cell, row))}</tr>" for row in board.rows)
    notes = "".join(f"<p>{escape(note)}</p>" for note in board.notes)
    table = f'<div class="scroll"><table><tr>{head}</tr>{rows}</table></div>'
    return (
        f"<section><h2>{escape(board.title)}</h2><p>{escape(board.about)}</p>{_picture(board)}{table}{notes}</section>"
    )


def _cell(word: str) -> str:
    """Return a cell; *word* is in italics, as in Markdown."""
    leaning = word.startswith("*") and word.endswith("*")
    return f"<td><em>{escape(word[1:-1])}</em></td>" if leaning else f"<td>{escape(word)}</td>"


def _picture(board: Board) -> str:
    if not board.points:
        return ""
    names = [name for name, *_ in board.points]
    _, value, low, high = zip(*board.points, strict=True)
    points = Points("after", range(len(names)), value, low, high)
    svg = dot_chart(board.title, names, [points], x_label="macro AUC", separate=False)
    return figure("macro AUC", svg, "95 % intervals of the bootstrap; seeds are averaged")
