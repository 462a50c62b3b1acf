"""The frame and the style sheet of the reports' pages: no scripts, no links, nothing loaded from anywhere."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from html import escape

from .charts import STEPS
from .findings import Finding

PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">
<title>{title}</title>
<style>
{style}
</style>
</head>
<body>
<header><h1>{title}</h1><dl>{facts}</dl></header>
<ul class="findings">{findings}</ul>
{sections}
</body>
</html>
"""

STYLE = (
    """
:root{--page:#f6f6f4;--card:#fff;--text:#1d1f22;--muted:#62666d;--rule:#dfe0dd;--little:#eceff4;--much:#164a9c;
--on-much:#fff;--on-middle:#1d1f22;--even:#e4e6e9;--below:#1668c7;--above:#d8620b;--warn:#b3400a;
--s0:#1668c7;--s1:#d8620b;--s2:#2a8f57;--s3:#a23fb0;--s4:#b8860b;--s5:#c22f4e;--s6:#1b8a98;--s7:#6b6f76}
@media (prefers-color-scheme:dark){:root{--page:#131416;--card:#1c1e21;--text:#e9e9e6;--muted:#a1a5ac;--rule:#33363b;
--little:#282b30;--much:#86b7ff;--on-much:#0c1420;--on-middle:#0c1420;--even:#34373d;--below:#6fb0ff;--above:#ff9f4a;--warn:#ffa366;
--s0:#6fb0ff;--s1:#ff9f4a;--s2:#6fd19a;--s3:#d994e4;--s4:#e6c35c;--s5:#ff8ba1;--s6:#6ed3df;--s7:#a1a5ac}}
*{box-sizing:border-box}
body{margin:0 auto;max-width:1360px;padding:20px 16px 48px;background:var(--page);color:var(--text);
font:15px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,"DejaVu Sans",sans-serif}
h1{font-size:24px;margin:0 0 10px}h2{font-size:18px;margin:36px 0 2px}
p{margin:0 0 10px;color:var(--muted);max-width:80ch}
dl{display:grid;grid-template-columns:max-content 1fr;gap:2px 14px;margin:0}dt{color:var(--muted)}
dd{margin:0;overflow-wrap:anywhere}
.findings{list-style:none;margin:18px 0 0;padding:12px 14px;background:var(--card);border:1px solid var(--rule);
border-radius:8px}
.findings li{display:flex;gap:10px;padding:3px 0;overflow-wrap:anywhere}.findings span{font-weight:700;width:1ch}
.findings .warning span{color:var(--warn)}.findings .warning{font-weight:550}
.cards{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(100%,330px),1fr));gap:14px;align-items:start}
.cards.loose{display:flex;flex-wrap:wrap}.loose figure{max-width:100%}
figure,.wide{margin:0;padding:10px 12px;background:var(--card);border:1px solid var(--rule);border-radius:8px;
min-width:0}
.wide{max-width:760px;margin-bottom:14px}
figcaption{font-size:13px;font-weight:600;margin-bottom:6px;overflow:hidden;text-overflow:ellipsis;white-space:nowrap}
table{border-collapse:collapse;font-size:12px;font-variant-numeric:tabular-nums}
.strips{width:100%;table-layout:auto}.strips td,.strips th{padding:1px 0}
.strips th{font-weight:400;text-align:right;color:var(--muted);padding-right:8px;width:1%;white-space:nowrap}
.strips th span{display:inline-block;max-width:13em;overflow:hidden;text-overflow:ellipsis;vertical-align:middle}
.strips .num{width:1%;padding-left:8px;text-align:right;color:var(--muted);white-space:nowrap}
.axis div{display:flex;justify-content:space-between;color:var(--muted);font-size:11px}
.strip{display:block;width:100%;height:15px;shape-rendering:crispEdges;border-radius:2px}
rect,circle{fill:var(--c)}.cell,.legend i{background:var(--c)}
.n{--c:var(--even)}.x{--c:var(--text)}.none{--c:transparent}
.matrix th{font-weight:400;color:var(--muted);text-align:right;padding:0 6px 0 0;white-space:nowrap}
.matrix th span{display:inline-block;max-width:11em;overflow:hidden;text-overflow:ellipsis;vertical-align:middle}
.matrix .up{padding:0 0 4px;vertical-align:bottom;text-align:center}
.matrix .up span{writing-mode:vertical-rl;transform:rotate(180deg);max-width:none;max-height:9em}
.matrix .cell{min-width:34px;height:20px;text-align:center;border:1px solid var(--card);padding:0 4px}
.scroll{overflow-x:auto}.plain th,.plain td{padding:3px 10px 3px 0;text-align:right;white-space:nowrap;
border-bottom:1px solid var(--rule)}.plain th:first-child{text-align:left}.plain th{font-weight:500}
.legend{display:flex;flex-wrap:wrap;gap:4px 18px;font-size:12px}.legend span{display:flex;align-items:center;gap:7px}
.legend b{display:flex}.legend i{width:15px;height:12px;display:inline-block}
.plot{display:block;width:100%;max-width:460px;height:auto}.plot text{font-size:12px;fill:var(--text)}
.plot .note{fill:var(--muted);font-size:11px}.plot .frame{fill:none;stroke:var(--rule)}
.plot .grid,.plot .lead{stroke:var(--rule)}polyline{fill:none;stroke:var(--c);stroke-width:2;stroke-linejoin:round}
details{margin-top:14px}summary{cursor:pointer;color:var(--muted);margin-bottom:8px}
"""
    + "".join(f".s{i}{{--c:var(--s{i})}}" for i in range(8))
    + "\n"
)


def colours() -> str:
    """Return the rules of the colour classes that `charts` names."""
    rules = []
    for i in range(STEPS + 1):
        share = 100 * i // STEPS
        rules.append(f".q{i}{{--c:color-mix(in oklab,var(--much) {share}%,var(--little))}}")
        rules.append(f".b{i}{{--c:color-mix(in oklab,var(--below) {share}%,var(--even))}}")
        rules.append(f".o{i}{{--c:color-mix(in oklab,var(--above) {share}%,var(--even))}}")
    strong = ",".join(f".cell.{kind}{i}" for kind in "qbo" for i in range(7, STEPS + 1))
    return "\n".join([*rules, ".cell.q6{color:var(--on-middle)}", f"{strong}{{color:var(--on-much)}}"])


def page(title: str, facts: Mapping[str, str], findings: Iterable[Finding], sections: Iterable[str]) -> str:
    """Return a page: the title, facts as name and value, sentences, and sections that are HTML already.

    Args:
        title: One line.
        facts: Name to value.
        findings: What stands out.
        sections: Empty ones are left out.
    """
    return PAGE.format(
        title=escape(title),
        style=STYLE + colours(),
        facts="".join(f"<dt>{escape(name)}</dt><dd>{escape(value)}</dd>" for name, value in facts.items()),
        findings="".join(
            f'<li class="{found.level}"><span>{"!" if found.level == "warning" else "·"}</span>'
            f"{escape(found.text)}</li>"
            for found in findings
        ),
        sections="\n".join(each for each in sections if each),
    )


def section(title: str, text: str, *parts: str) -> str:
    """Return a section: its title, a text on what is to be seen, and parts that are HTML already."""
    return f"<section><h2>{escape(title)}</h2><p>{escape(text)}</p>{''.join(parts)}</section>"


def figures(cards: Mapping[str, str], layout: str = "cards") -> str:
    """Return cards beside each other: caption to HTML."""
    named = [(escape(name), card) for name, card in cards.items()]
    items = "".join(f'<figure><figcaption title="{k}">{k}</figcaption>{v}</figure>' for k, v in named)
    return f'<div class="{layout}">{items}</div>'
