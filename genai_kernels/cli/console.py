"""Tables and progress on the terminal: by rich where it is installed, in plain text where not."""

from __future__ import annotations

import contextlib
import importlib.util
import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

HAS_RICH = importlib.util.find_spec("rich") is not None
_WIDTH_OF_A_FILE = 200  # columns when the output is not a terminal, so that nothing is cut


def _console(error: bool = False) -> Any:
    from rich.console import Console

    stream = sys.stderr if error else sys.stdout
    return Console(file=stream, highlight=False, width=None if stream.isatty() else _WIDTH_OF_A_FILE)


def plain_table(columns: Sequence[str], rows: Sequence[Sequence[object]], right: Sequence[int] = ()) -> str:
    """The table in plain text; the columns whose numbers are in `right` are aligned to the right."""
    cells = [[str(c) for c in row] for row in (columns, *rows)]
    widths = [max(len(row[i]) for row in cells) for i in range(len(columns))]
    lines = []
    for row in cells:
        parts = [c.rjust(w) if i in right else c.ljust(w) for i, (c, w) in enumerate(zip(row, widths, strict=True))]
        lines.append("  ".join(parts).rstrip())
    lines.insert(1, "  ".join("-" * w for w in widths))
    return "\n".join(lines)


def print_table(
    title: str,
    columns: Sequence[str],
    rows: Sequence[Sequence[object]],
    *,
    right: Sequence[int] = (),
    styles: Sequence[str | None] | None = None,
) -> None:
    """Prints a table.

    Args:
        title: stands above it.
        columns: the headings.
        rows: one sequence of cells a row, `str()` is applied to each.
        right: numbers of the columns aligned to the right.
        styles: a rich style (`"red"`) or None for each row; without effect in plain text.
    """
    if not HAS_RICH:
        print(f"\n{title}\n{plain_table(columns, rows, right)}")
        return
    from rich.markup import escape
    from rich.table import Table

    table = Table(title=escape(title), title_justify="left", header_style="bold")
    for i, name in enumerate(columns):
        table.add_column(escape(name), justify="right" if i in right else "left", overflow="fold")
    for row, style in zip(rows, styles or [None] * len(rows), strict=True):
        table.add_row(*(escape(str(cell)) for cell in row), style=style)
    _console().print(table)


def say(text: str, style: str | None = None) -> None:
    """One line, in a rich style where rich is there."""
    if HAS_RICH:
        from rich.text import Text

        _console().print(Text(text, style=style or ""), soft_wrap=True)
    else:
        print(text)


@contextlib.contextmanager
def progress(total: int) -> Iterator[Callable[[str], None]]:
    """A progress bar over `total` steps, on stderr: call what it gives with the name of each step as it begins."""
    if not sys.stderr.isatty():
        yield lambda name: None
        return
    done = 0
    if not HAS_RICH:
        width = shutil.get_terminal_size().columns - 1

        def show(name: str) -> None:
            nonlocal done
            done += 1
            print(f"\r{f'[{done}/{total}] {name}'[:width]:<{width}}", end="", file=sys.stderr, flush=True)

        yield show
        print("\r" + " " * width + "\r", end="", file=sys.stderr, flush=True)
        return
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("{task.description}"))
    with Progress(*columns, console=_console(error=True), transient=True) as bar:
        task = bar.add_task("", total=total)

        def step(name: str) -> None:
            nonlocal done
            bar.update(task, completed=done, description=name)
            done += 1

        yield step
