"""Tables of plain text for the terminal."""

from __future__ import annotations

from rich.table import Table
from rich.text import Text


def text_table(title: str, columns: list[str], rows: list[list[str]], words: int = 1) -> Table:
    """The first `words` columns are words, the others numbers. Names are shown as they are: [bold] is no markup."""
    table = Table(title=Text(title), title_justify="left")
    for index, column in enumerate(columns):
        table.add_column(Text(column), justify="left" if index < words else "right", overflow="fold")
    for row in rows:
        table.add_row(*[Text(cell) for cell in row])
    return table
