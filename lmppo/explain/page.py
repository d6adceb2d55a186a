"""The page of ``lmppo explain``: one self-contained HTML file, readable in light and dark mode.

Tokens are colored by advantage, blue above 0 and orange below, which color-blind people can tell apart. All
text is escaped, so that a model's output is never markup. A short script copies the numbers of the token under the
pointer from the table below; without JavaScript the tables still work.
"""

from html import escape
from typing import Any

_WIDTH, _HEIGHT, _LEFT, _MARGIN = 720, 130, 60, 10  # of the plots, in SVG units
_DARKEST = 0.65  # opacity of the strongest color: text stays readable

_STYLE = """
:root { color-scheme: light dark; --page: #fff; --ink: #1b1b1b; --quiet: #595959; --line: #d0d0d0; --card: #f6f6f6;
  --up: 33 102 190; --down: 220 95 0; }
@media (prefers-color-scheme: dark) {
  :root { --page: #15171a; --ink: #ececec; --quiet: #a8a8a8; --line: #3c4046; --card: #1e2125; } }
body { margin: 0 auto; max-width: 62rem; padding: 1.5rem 1rem 9rem; background: var(--page); color: var(--ink);
  font: 1rem/1.5 system-ui, sans-serif; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.1rem; margin-bottom: .3rem; }
.quiet { color: var(--quiet); }
summary { cursor: pointer; color: var(--quiet); }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .15rem 1rem; } dt { font-weight: 600; } dd { margin: 0; }
.text { background: var(--card); border: 1px solid var(--line); border-radius: 6px; padding: .8rem 1rem;
  font-size: 1.1rem; line-height: 2; white-space: pre-wrap; overflow-wrap: anywhere; }
.t { border-radius: 3px; padding: .15em 0; margin-right: 2px; cursor: pointer; }
.up { background: rgb(var(--up) / var(--a)); } .down { background: rgb(var(--down) / var(--a)); }
.piece { font: .75em ui-monospace, monospace; outline: 1px dashed var(--quiet); }
.unlearned { opacity: .55; }
.clipped { text-decoration: underline wavy; }
.t:hover, .t.on { outline: 2px solid var(--ink); }
.legend { display: flex; align-items: center; gap: .6rem; flex-wrap: wrap; }
.bar { display: inline-block; width: 14rem; height: 1rem; border: 1px solid var(--line); background:
  linear-gradient(to right, rgb(var(--down) / .65), transparent, rgb(var(--up) / .65)); }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font: .8rem ui-monospace, monospace; }
th, td { padding: .1rem .5rem; text-align: right; border-bottom: 1px solid var(--line); white-space: pre; }
th:first-child, td:first-child { text-align: left; position: sticky; left: 0; background: var(--page); }
tr.on { outline: 2px solid var(--ink); outline-offset: -2px; }
svg { width: 100%; height: auto; color: var(--ink); } svg text { font: 11px system-ui, sans-serif; fill: var(--quiet); }
polyline { fill: none; stroke: currentColor; stroke-width: 1.8; stroke-linecap: round; stroke-linejoin: round; }
.dashed { stroke-dasharray: 5 5; } .zero { stroke: var(--line); }
#panel { position: fixed; bottom: 0; left: 0; right: 0; padding: .6rem 1rem; background: var(--card);
  border-top: 1px solid var(--line); font: .85rem ui-monospace, monospace; }
#panel span { display: inline-block; margin-right: 1.2rem; } #panel b { white-space: pre; }
"""

_SCRIPT = """
const panel = document.getElementById("panel");
let pinned = null;
function show(token) {
  const row = document.getElementById("row-" + token.id);
  const names = row.closest("table").tHead.rows[0].cells;
  document.querySelectorAll(".on").forEach(marked => marked.classList.remove("on"));
  token.classList.add("on");
  row.classList.add("on");
  panel.replaceChildren(...Array.from(row.cells, (cell, i) => {
    const item = document.createElement("span"), number = document.createElement("b");
    number.textContent = cell.textContent;
    item.append(names[i].textContent + " ", number);
    return item;
  }));
}
document.addEventListener("mouseover", event => {
  const token = event.target.closest(".t");
  if (token && !pinned) show(token);
});
document.addEventListener("click", event => {
  const token = event.target.closest(".t");
  pinned = token === pinned ? null : token;
  if (token) show(token);
});
"""


def render_page(report: dict[str, Any]) -> str:
    """Render a report as a page.

    Args:
        report: From :func:`lmppo.explain.make_report`.
    """
    scale = colour_scale(report)
    name = escape(report["name"])
    sections = [_completion(completion, report["columns"], scale) for completion in report["completions"]]
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{name}, token by token</title>
<style>{_STYLE}</style>
</head>
<body>
<h1>{name}, token by token</h1>
{_header(report, scale)}
{"".join(sections)}
<div id="panel" role="status">Point at a token to see its numbers; click to keep them.</div>
<script>{_SCRIPT}</script>
</body>
</html>
"""


def colour_scale(report: dict[str, Any]) -> float:
    """The |advantage| with the strongest color: the 95th percentile, so that one outlier does not dim all others."""
    sizes = sorted(abs(a) for c in report["completions"] for t in c["tokens"] if (a := t["advantage"]) is not None)
    return (sizes[int(0.95 * (len(sizes) - 1))] or sizes[-1] or 1.0) if sizes else 1.0


def visible(text: str) -> str:
    """Text with line ends and control characters made visible."""
    marks = {"\n": "⏎\n", "\t": "⇥\t"}
    return "".join(marks.get(c) or (c if c.isprintable() else repr(c)[1:-1]) for c in text)


def in_one_line(text: str) -> str:
    """As :func:`visible`, on one line, for tables."""
    return visible(text).replace("\n", "").replace("\t", "")


def label(token: dict[str, Any]) -> str:
    """A token's text, or its name in the vocabulary if it has no text of its own."""
    return token["text"] or token["token"]


def cell(value: float | bool | None) -> str:
    """A number as shown; empty for None."""
    if value is None:
        return ""
    return ("yes" if value else "no") if isinstance(value, bool) else f"{value:.3f}"


def stream_facts(streams: dict[str, dict[str, float]]) -> str:
    """The reward streams with their settings."""
    return ", ".join(f"{name} ({', '.join(f'{k} {v}' for k, v in facts.items())})" for name, facts in streams.items())


def _header(report: dict[str, Any], scale: float) -> str:
    settings = {name: str(value) for name, value in report["settings"].items()}
    settings["reward streams"] = stream_facts(report["streams"])
    return f"""<p class="quiet">{escape(report["checkpoint"])}</p>
<p class="legend"><span>advantage</span> <span>≤ {-scale:.2f}</span><span class="bar"></span><span>≥ +{scale:.2f}</span>
<span class="clipped">clipped</span> <span class="piece">no text of its own</span>
<span class="unlearned">not learned from</span></p>
<details><summary>Settings</summary>{_definitions(settings)}</details>
<details><summary>What the columns mean</summary>{_definitions(report["columns"])}
<p class="quiet">"Next" is the next token that counts; after the last one it is 0, or the critic's value where a cut
completion is bootstrapped. Ratio, outside and clipped are computed after the whole update; everything else was fixed
before it.</p></details>"""


def _definitions(entries: dict[str, str]) -> str:
    return "<dl>" + "".join(f"<dt>{escape(k)}</dt><dd>{escape(v)}</dd>" for k, v in entries.items()) + "</dl>"


def _completion(completion: dict[str, Any], columns: dict[str, str], scale: float) -> str:
    row, tokens = completion["row"], completion["tokens"]
    ending = "ended" if completion["ended"] else "cut"
    facts = f"score {cell(completion['score'])}, KL {cell(completion['kl'])} nats, {len(tokens)} tokens, {ending}"
    spans = "".join(_span(token, f"{row}-{t}", scale) for t, token in enumerate(tokens))
    return f"""<section>
<h2>Row {row} <span class="quiet">{facts}</span></h2>
<div class="text"><span class="quiet">{escape(visible(completion["prompt"]))}</span>{spans}</div>
{_plot(tokens)}
<details><summary>All numbers of row {row}</summary><div class="scroll">{_table(row, tokens, columns)}</div></details>
</section>
"""


def _span(token: dict[str, Any], name: str, scale: float) -> str:
    advantage = token["advantage"]
    classes, style = ["t"], ""
    if advantage is not None:
        classes.append("up" if advantage > 0 else "down")
        style = f' style="--a:{_DARKEST * min(1.0, abs(advantage) / scale):.3f}"'
    marks = {"piece": not token["text"], "clipped": token["clipped"], "unlearned": not token["learned"]}
    classes += [mark for mark, holds in marks.items() if holds]
    return f'<span id="{name}" class="{" ".join(classes)}"{style}>{escape(visible(label(token)))}</span>'


def _table(row: int, tokens: list[dict[str, Any]], columns: dict[str, str]) -> str:
    heads = "".join(f'<th scope="col" title="{escape(meaning)}">{escape(n)}</th>' for n, meaning in columns.items())
    body = []
    for t, token in enumerate(tokens):
        numbers = "".join(f"<td>{cell(token[name])}</td>" for name in columns)
        body.append(f'<tr id="row-{row}-{t}"><td>{escape(in_one_line(label(token)))}</td>{numbers}</tr>')
    return f'<table><thead><tr><th scope="col">token</th>{heads}</tr></thead><tbody>{"".join(body)}</tbody></table>'


def _plot(tokens: list[dict[str, Any]]) -> str:
    """Value (solid) and reward-to-go (dashed) along the tokens."""
    points = [(t, token["value"], token["to_go"]) for t, token in enumerate(tokens)]
    points = [point for point in points if None not in point]
    if not points:
        return ""
    numbers = [0.0, *(y for point in points for y in point[1:])]
    low, high = min(numbers), max(numbers)
    wide = (_WIDTH - _LEFT - _MARGIN) / max(1, len(tokens) - 1)
    tall = (_HEIGHT - 2 * _MARGIN) / ((high - low) or 1.0)

    def line(numbers: list[tuple[int, float]], kind: str) -> str:
        corners = [f"{_LEFT + wide * t:.1f},{_MARGIN + tall * (high - y):.1f}" for t, y in numbers]
        return f'<polyline class="{kind}" points="{" ".join(corners * 2 if len(corners) == 1 else corners)}"/>'

    ticks = "".join(
        f'<text x="{_LEFT - 8}" y="{_MARGIN + tall * (high - y) + 4:.1f}" text-anchor="end">{y:.2f}</text>'
        for y in {low, high}
    )
    return f"""<svg viewBox="0 0 {_WIDTH} {_HEIGHT + 16}" role="img" aria-label="value and reward to go along the tokens">
{ticks}{line([(0, 0.0), (len(tokens) - 1, 0.0)], "zero")}
{line([(t, value) for t, value, _ in points], "value")}{line([(t, to_go) for t, _, to_go in points], "dashed")}
<text x="{_LEFT}" y="{_HEIGHT + 10}">solid: value, dashed: reward to go, along the tokens</text>
</svg>"""
