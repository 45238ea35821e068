"""A page in one file: its style, plotly, figures and pictures are inside, so that it opens offline and in a sandbox.

Everything that comes from outside (names, messages, labels) is escaped here, by the functions that make its markup.
"""

from __future__ import annotations

import base64
import gzip
import html
from collections.abc import Sequence

from plotly.offline import get_plotlyjs

from evaluation.report.chart import Chart
from evaluation.report.interactive import FONT, plotly_figure
from evaluation.report.text_table import Table

MAX_ROWS = 1000  # of a table
MAX_PLAIN = 400_000  # characters of a figure's JSON

_STYLE = """
:root { --ink: #1a1a1a; --muted: #62666d; --rule: #e3e5e8; --soft: #f6f7f8; --accent: #2c5aa0; }
* { box-sizing: border-box; }
body { margin: 0; font: 15px/1.55 FONT; color: var(--ink); background: #fff; }
main { max-width: 1180px; margin: 0 auto; padding: 28px 32px 80px; }
h1 { font-size: 26px; line-height: 1.25; margin: 0 0 4px; letter-spacing: -0.01em; }
h2 { font-size: 20px; margin: 52px 0 14px; padding-top: 14px; border-top: 1px solid var(--rule); }
h3 { font-size: 15px; margin: 30px 0 8px; }
p { margin: 8px 0; max-width: 78ch; }
.lead { color: var(--muted); margin: 0; }
nav { margin: 16px 0 0; font-size: 13.5px; }
nav a { color: var(--accent); text-decoration: none; margin-right: 18px; }
nav a:hover { text-decoration: underline; }
.verdict { background: var(--soft); border-left: 4px solid var(--accent); padding: 14px 18px; margin: 18px 0;
  font-size: 16.5px; max-width: none; }
ul.notes { margin: 8px 0 18px; padding-left: 20px; max-width: 95ch; color: #33363b; }
.scroll { overflow-x: auto; margin: 10px 0 18px; }
table { border-collapse: collapse; font-size: 13.5px; font-variant-numeric: tabular-nums; }
th { text-align: left; font-weight: 600; color: var(--muted); border-bottom: 1.5px solid #c9ccd1; }
th, td { padding: 5px 14px 5px 0; vertical-align: top; }
td { border-bottom: 1px solid var(--rule); }
td.n, th.n { text-align: right; white-space: nowrap; }
figure { margin: 18px 0 26px; }
figcaption { color: var(--muted); font-size: 13.5px; max-width: 95ch; margin-top: 4px; }
details { margin: 10px 0; }
summary { cursor: pointer; color: var(--accent); font-size: 14px; }
.strip { display: flex; gap: 10px; overflow-x: auto; padding: 4px 0 12px; }
.strip > div { flex: 0 0 auto; width: 136px; font-size: 11.5px; line-height: 1.35; color: var(--muted); }
.strip img { display: block; width: 136px; image-rendering: auto; margin-bottom: 4px; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: 4px 22px; font-size: 13.5px; margin: 10px 0; }
dt { color: var(--muted); } dd { margin: 0; overflow-wrap: anywhere; }
@media print { nav, details:not([open]) { display: none; } h2 { break-before: page; } }
""".replace("FONT", FONT)

_DRAW = """
async function unpacked(text) {
  const bytes = Uint8Array.from(atob(text), c => c.charCodeAt(0));
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
  return JSON.parse(await new Response(stream).text());
}
function draw(place, figure) {
  Plotly.newPlot(place, figure.data, figure.layout, {responsive: true, displaylogo: false});
}
for (const place of document.querySelectorAll(".chart")) {
  const source = place.nextElementSibling;
  if (source.type === "application/json") draw(place, JSON.parse(source.textContent));
  else unpacked(source.textContent).then(figure => draw(place, figure));
}
"""


def page(title: str, lead: str, sections: Sequence[tuple[str, str]]) -> str:
    """The whole page.

    Args:
        sections: (heading, markup), in order; the headings become the navigation.
    """
    links = "".join(f'<a href="#s{i}">{text(heading)}</a>' for i, (heading, _) in enumerate(sections))
    body = "".join(f'<h2 id="s{i}">{text(heading)}</h2>{markup}' for i, (heading, markup) in enumerate(sections))
    links = f"<nav>{links}</nav>" if len(sections) > 1 else ""
    drawn = 'class="chart"' in body
    return (
        '<!DOCTYPE html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{text(title)}</title><style>{_STYLE}</style>"
        + (f"<script>{get_plotlyjs()}</script>" if drawn else "")
        + f'</head><body><main><h1>{text(title)}</h1><p class="lead">{text(lead)}</p>{links}{body}</main>'
        + (f"<script>{_DRAW}</script>" if drawn else "")
        + "</body></html>\n"
    )


def text(value: str) -> str:
    """Text that is only text."""
    return html.escape(value)


def paragraph(value: str, *, kind: str = "") -> str:
    """A paragraph, of a class of the style sheet."""
    return f'<p class="{kind}">{text(value)}</p>' if kind else f"<p>{text(value)}</p>"


def heading(value: str) -> str:
    return f"<h3>{text(value)}</h3>"


def notes(lines: Sequence[str]) -> str:
    """A list of remarks; nothing where there are none."""
    return f'<ul class="notes">{"".join(f"<li>{text(line)}</li>" for line in lines)}</ul>' if lines else ""


def facts(pairs: Sequence[tuple[str, str]]) -> str:
    """Names and what they are; those that are empty are left out."""
    return f"<dl>{''.join(f'<dt>{text(k)}</dt><dd>{text(v)}</dd>' for k, v in pairs if v)}</dl>"


def table(content: Table) -> str:
    """A table whose columns of numbers are right-aligned, up to MAX_ROWS; nothing where it has no rows."""
    if not content.rows:
        return ""
    kind = {i: "" if i in content.left else ' class="n"' for i in content.used}

    def line(cells: Sequence[str], tag: str) -> str:
        return "<tr>" + "".join(f"<{tag}{kind[i]}>{text(cells[i])}</{tag}>" for i in content.used) + "</tr>"

    body = "".join(line(row, "td") for row in content.rows[:MAX_ROWS])
    rest = len(content.rows) - MAX_ROWS
    more = paragraph(f"{rest:,} more rows are left out here.", kind="lead") if rest > 0 else ""
    head = line(content.header, "th")
    return f'<div class="scroll"><table><thead>{head}</thead><tbody>{body}</tbody></table></div>{more}'


def folded(summary: str, markup: str) -> str:
    """Markup that is shown at a click; nothing where it is empty."""
    return f"<details><summary>{text(summary)}</summary>{markup}</details>" if markup else ""


def chart_figure(chart: Chart, caption: str = "") -> str:
    """An interactive figure. Large ones are packed, since the words for thousands of points repeat themselves."""
    figure = plotly_figure(chart)
    kind, content = "application/json", figure.to_json().replace("<", "\\u003c")
    if len(content) > MAX_PLAIN:
        kind, content = "text/plain", base64.b64encode(gzip.compress(content.encode(), mtime=0)).decode()
    return (
        f'<figure><div class="chart" style="height:{figure.layout.height}px"></div>'
        f'<script type="{kind}">{content}</script><figcaption>{text(caption)}</figcaption></figure>'
    )


def strip(pictures: Sequence[tuple[str, str]]) -> str:
    """Pictures side by side.

    Args:
        pictures: (data address, label); a label's lines stay lines.
    """
    cells = "".join(
        f'<div><img src="{text(source)}" alt="{text(label)}">{"<br>".join(map(text, label.splitlines()))}</div>'
        for source, label in pictures
    )
    return f'<div class="strip">{cells}</div>'
