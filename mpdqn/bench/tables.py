"""`Table`: what a paper or a terminal shows of measurements, in markdown and in LaTeX."""

from __future__ import annotations

import math
import re
import statistics
import textwrap
import unicodedata
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

NOTHING = "–"

_LATEX = {
    **{c: f"\\{c}" for c in "&%$#_{}"},
    **{"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", '"': "''", "\u200b": "{}"},
    **{"<": r"\textless{}", ">": r"\textgreater{}", "|": r"\textbar{}", "–": "--", "—": "---", "…": r"\ldots{}"},
    **{"\u00a0": "~", "†": r"\dag{}", "‡": r"\ddag{}", "§": r"\S{}", "\n": " "},
    **{
        c: rf"\ensuremath{{{math_}}}"
        for c, math_ in {
            **{"×": r"\times", "·": r"\cdot", "±": r"\pm", "−": "-", "≤": r"\leq", "≥": r"\geq", "≈": r"\approx"},
            **{"‖": r"\|", "₂": "_2", "²": "^2", "→": r"\to", "∞": r"\infty", "µ": r"\mu", "μ": r"\mu"},
            **{"α": r"\alpha", "β": r"\beta", "γ": r"\gamma", "ε": r"\varepsilon", "λ": r"\lambda", "σ": r"\sigma"},
        }.items()
    },
}
_NUMERIC = re.compile(r"[<≤−+-]?\d[\d.,]*(e[+-]?\d+)?(?![\w.])")


@dataclass(frozen=True, kw_only=True)
class Summary:
    """Median, smallest and largest of some measurements, in their unit."""

    median: float
    low: float
    high: float


def summarize(values: Iterable[float]) -> Summary:
    """The `Summary` of ``values``; ValueError if there are none or one is not finite."""
    numbers = list(values)
    if not numbers or not all(map(math.isfinite, numbers)):
        raise ValueError(f"{numbers} has no median; measure at least one round with finite values")
    return Summary(median=statistics.median(numbers), low=min(numbers), high=max(numbers))


def spread(summary: Summary, digits: int) -> str:
    """``summary`` as ``123.4 [120.1–125.0]``, with ``digits`` decimals."""
    return f"{summary.median:.{digits}f} [{summary.low:.{digits}f}–{summary.high:.{digits}f}]"


def decimals(value: float) -> int:
    """How many decimals leave a positive ``value`` at least three significant digits, at most 2."""
    return 2 if abs(value) < 10 else 1 if abs(value) < 1000 else 0


@dataclass(frozen=True, kw_only=True)
class Table:
    """A table as text: ``rows`` of as many cells as there are ``columns``; ``notes`` stand below it.

    Raises:
        ValueError: if a row has another number of cells.
    """

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    notes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for row in self.rows:
            if len(row) != len(self.columns):
                raise ValueError(f"row {row} has {len(row)} cells for {len(self.columns)} columns; give one per column")

    def markdown(self) -> str:
        """GitHub markdown, aligned so that it reads as plain text too."""
        grid = [[_markdown_cell(cell) for cell in line] for line in (self.columns, *self.rows)]
        widths = [max(3, *map(len, column)) for column in zip(*grid, strict=True)]
        right = self._numeric()
        lines = [
            "| "
            + " | ".join(c.rjust(w) if r else c.ljust(w) for c, w, r in zip(line, widths, right, strict=True))
            + " |"
            for line in grid
        ]
        rule = ("-" * (w - 1) + ":" if r else "-" * w for w, r in zip(widths, right, strict=True))
        lines.insert(1, "| " + " | ".join(rule) + " |")
        notes = (_wrapped(_markdown_text(note)) for note in self.notes)
        return "\n".join([f"### {_markdown_text(self.title)}", "", *lines, *([""] if self.notes else []), *notes, ""])

    def latex(self) -> str:
        """A floating booktabs table; it needs the packages booktabs and graphicx, and no others."""
        # A page may be narrower than the table: shrink it then, and only then.
        shrink = r"\resizebox{\ifdim\width>\linewidth\linewidth\else\width\fi}{!}{%"
        float_ = "table*" if len(self.columns) > 6 else "table"
        return "\n".join(
            [
                r"% \usepackage{booktabs,graphicx}",
                rf"\begin{{{float_}}}",
                r"\centering",
                rf"\caption{{{latex_text(self.title)}}}",
                shrink,
                rf"\begin{{tabular}}{{{''.join('r' if right else 'l' for right in self._numeric())}}}",
                r"\toprule",
                _latex_row(self.columns),
                r"\midrule",
                *map(_latex_row, self.rows),
                r"\bottomrule",
                r"\end{tabular}}",
                *([r"\par\smallskip", r"\raggedright\footnotesize"] if self.notes else []),
                *(latex_text(note) + r"\par" for note in self.notes),
                rf"\end{{{float_}}}",
                "",
            ]
        )

    def _numeric(self) -> list[bool]:
        """For each column, whether it holds numbers (or nothing) only: such a column is aligned to the right."""
        return [
            all(cell in ("", NOTHING) or _NUMERIC.match(cell) is not None for cell in cells)
            for cells in (zip(*self.rows, strict=True) if self.rows else ((),) * len(self.columns))
        ]


def latex_text(text: str) -> str:
    """``text`` such that LaTeX prints it: no character of it is a command, and each is one that its fonts know."""
    text = re.sub("-(?=-)", "-\u200b", text)  # keeps the two hyphens of an option from becoming a dash
    return "".join(_LATEX.get(c) or _plain(c) for c in text)


def _plain(character: str) -> str:
    if character.isascii() or (character.isalpha() and "À" <= character <= "ÿ"):
        return character
    return unicodedata.normalize("NFKD", character).encode("ascii", "ignore").decode() or "?"


def _latex_row(cells: Sequence[str]) -> str:
    row = " & ".join(map(latex_text, cells)) + r" \\"
    return "{}" + row if row[0] in "[*" else row  # \\ of the row above would take it for its argument


def _markdown_text(text: str) -> str:
    text = text.replace("\n", " ")
    return text.replace("*", r"\*") if text.count("*") > 1 else text  # a pair would be emphasis


def _markdown_cell(text: str) -> str:
    return _markdown_text(text).replace("|", r"\|")


def _wrapped(note: str) -> str:
    return textwrap.fill(
        note, 150, initial_indent="- ", subsequent_indent="  ", break_long_words=False, break_on_hyphens=False
    )
