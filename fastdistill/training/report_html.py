"""A report as one HTML file that needs nothing beside it: no script, no font, no image of another place."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from html import escape

from fastdistill.training import plots
from fastdistill.training.plots import Plot
from fastdistill.training.report_parts import Items, Section, Table

_STYLE = """
:root { color-scheme: light dark; --line: #8884; --quiet: #777; }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 63rem; margin: 0 auto; padding: 1rem; }
h1 { font-size: 1.5rem; line-height: 1.25; }
h2 { font-size: 1.15rem; margin-top: 2.2rem; border-bottom: 1px solid var(--line); }
p, li { max-width: 46rem; overflow-wrap: anywhere; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-size: .9rem; font-variant-numeric: tabular-nums; }
th, td { padding: .25rem .6rem; text-align: right; white-space: nowrap; border-bottom: 1px solid var(--line); }
th { color: var(--quiet); font-weight: 600; white-space: normal; vertical-align: bottom; }
th:first-child, td:first-child { text-align: left; padding-left: 0; }
.settings td { text-align: left; white-space: normal; overflow-wrap: anywhere; }
img { width: 31rem; max-width: 100%; margin: .3rem 0; background: white; }
@media (max-width: 40rem) {
  table { font-size: .8rem; }
  th, td { padding: .25rem .4rem; }
  th:first-child, td:first-child { position: sticky; left: 0; background: Canvas; }
  td:first-child { white-space: normal; min-width: 7rem; }
}
@media print {
  :root { color-scheme: light; }
  body { font-size: 10pt; max-width: none; padding: 0; }
  table { font-size: 7.5pt; }
  img { width: 49%; }
  tr, img { break-inside: avoid; }
  h2 { break-after: avoid; }
}
"""


def page(title: str, sections: Sequence[Section], settings: Table) -> str:
    """The whole file: `sections` under the first one's title, and `settings` folded up at the end."""
    body = []
    for level, section in zip(("h1", *["h2"] * len(sections)), sections, strict=False):
        body += [f"<{level}>{escape(section.title)}</{level}>", *(_part(part) for part in section.parts)]
    body.append(f'<details class="settings"><summary>All settings</summary>{_table(settings)}</details>')
    content = "\n".join(body)
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{escape(title)}</title>
<style>{_STYLE}</style>
</head>
<body>
{content}
</body>
</html>
"""


def _part(part: str | Table | Items | Plot) -> str:
    match part:
        case str():
            return f"<p>{escape(part)}</p>"
        case Table():
            return _table(part)
        case Items():
            return f"<ul>{''.join(f'<li>{escape(line)}</li>' for line in part.lines)}</ul>"
        case Plot():
            return "\n".join(_image(panel) for panel in part.panels)


def _table(content: Table) -> str:
    head = "".join(f'<th scope="col">{escape(column)}</th>' for column in content.columns)
    rows = ("".join(f"<td>{escape(cell)}</td>" for cell in cells) for cells in content.rows)
    body = "\n".join(f"<tr>{cells}</tr>" for cells in rows)
    return f'<div class="wide"><table>\n<thead><tr>{head}</tr></thead>\n<tbody>\n{body}\n</tbody>\n</table></div>'


def _image(panel: plots.Panel) -> str:
    """Drawn as SVG, which is sharp at any size and on paper, and a fraction of the bytes of pixels."""
    data = base64.b64encode(plots.svg(panel)).decode()
    return f'<img alt="{escape(panel.title)}" src="data:image/svg+xml;base64,{data}">'
