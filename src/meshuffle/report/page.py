"""The parts of a self-contained HTML page: escaped text, tables, pictures, and the style.

Everything that reaches a page from outside (class names, file names, configs) goes through
`text`. The page loads nothing and runs no script; its content security policy says so.
"""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Iterable, Sequence
from string import Template

from PIL import Image

MISSING = '<p class="missing">not recorded</p>'
_THUMB = 192  # pixels of the long side: twice what the page shows


def printable(value: object) -> str:
    r"""Return `value` as text in which characters that do not print are escapes.

    These are control characters, overrides of the writing direction, and the lone surrogates
    of a file name that is not UTF-8.

    >>> print(printable("a\u202eb"))
    a\u202eb
    """
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in str(value))


def text(value: object) -> str:
    """Return `value` as HTML text, also safe inside a quoted attribute.

    >>> text('<b> & "x"')
    '&lt;b&gt; &amp; &quot;x&quot;'
    """
    return html.escape(printable(value))


def block(value: str) -> str:
    """Return text of several lines, preformatted."""
    lines = (text(line) for line in value.expandtabs(4).splitlines())
    return "<pre>" + "\n".join(lines) + "</pre>"


def percent(share: float) -> str:
    """Return a share in 0 … 1 with one decimal, never rounded to certainty.

    >>> percent(0.875), percent(0.9999), percent(1e-9), percent(1.0)
    ('87.5 %', '>99.9 %', '<0.1 %', '100 %')
    """
    if share in (0.0, 1.0):
        return f"{100 * share:.0f} %"
    if share > 0.999:
        return ">99.9 %"
    return "<0.1 %" if share < 0.001 else f"{100 * share:.1f} %"


def section(title: str, *parts: str) -> str:
    """Return a section with a heading, or with a note where all `parts` are empty."""
    return f"<section><h2>{text(title)}</h2>{''.join(parts) or MISSING}</section>"


def table(head: Sequence[str], rows: Iterable[Sequence[str]], numeric: int = 0) -> str:
    """Return a table; cells are HTML already, and the last `numeric` columns align right."""
    first = len(head) - numeric

    def line(cells: Sequence[str], tag: str) -> str:
        kinds = (' class="num"' if i >= first else "" for i in range(len(cells)))
        return "".join(f"<{tag}{k}>{c}</{tag}>" for c, k in zip(cells, kinds, strict=True))

    body = "".join(f"<tr>{line(row, 'td')}</tr>" for row in rows)
    return (
        f'<div class="scroll"><table><thead><tr>{line([text(h) for h in head], "th")}</tr>'
        f"</thead><tbody>{body}</tbody></table></div>"
    )


def facts(pairs: Iterable[tuple[str, str]]) -> str:
    """Return keys and values (plain text) in two columns, or "" for none."""
    rows = "".join(f"<dt>{text(key)}</dt><dd>{text(value)}</dd>" for key, value in pairs)
    return f'<dl class="facts">{rows}</dl>' if rows else ""


def picture(light_png: bytes, dark_png: bytes, description: str) -> str:
    """Return one picture that follows the reader's colour scheme; paper gets the light one."""
    return (
        '<picture><source media="screen and (prefers-color-scheme: dark)" '
        f'srcset="{_data_uri(dark_png, "png")}">'
        f'<img src="{_data_uri(light_png, "png")}" alt="{text(description)}"></picture>'
    )


def thumbnail(image: Image.Image, side: int = _THUMB) -> str:
    """Return an image as a data URI of at most `side` pixels a side.

    Small ones grow by a whole factor without smoothing, so that single pixels can be seen.
    """
    longest = max(image.size)
    file = io.BytesIO()
    if longest <= side // 2:
        factor = side // longest
        size = (image.width * factor, image.height * factor)
        image.resize(size, Image.Resampling.NEAREST).save(file, format="PNG")
        return _data_uri(file.getvalue(), "png")
    image = image.copy()
    image.thumbnail((side, side))
    image.save(file, format="JPEG", quality=82)
    return _data_uri(file.getvalue(), "jpeg")


def page(title: str, body: str) -> str:
    """Return the whole document; `title` is plain text, `body` HTML."""
    return _PAGE.substitute(title=text(title), style=_STYLE, body=body)


def _data_uri(content: bytes, kind: str) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(content).decode()}"


_PAGE = Template("""\
<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<meta http-equiv="Content-Security-Policy"
 content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<title>$title</title>
<style>$style</style>
</head>
<body>
$body
</body>
</html>
""")

_SHADES = "".join(
    f".matrix tbody .{kind}{level}{{background:rgb(var(--{name})/{level * 0.105:.2f})"
    f"{';color:#fff' if level > 6 else ''}}}"
    for kind, name in (("h", "hit"), ("m", "miss"))
    for level in range(1, 10)
)

_STYLE = (
    """
:root { --paper:#fff; --ink:#1b1f24; --muted:#667080; --rule:#e3e6eb; --soft:#f5f6f8;
  --hit:37 99 235; --miss:200 60 20; --bad:#b42318 }
@media screen and (prefers-color-scheme:dark) { :root { --paper:#13161b; --ink:#e4e7eb;
  --muted:#98a2b3; --rule:#2b323c; --soft:#1b2027; --hit:70 130 240; --miss:235 95 55;
  --bad:#f97066 } }
* { box-sizing:border-box }
html { -webkit-text-size-adjust:100% }
body { margin:0 auto; max-width:1080px; padding:40px 24px 64px; background:var(--paper);
  color:var(--ink); font:15px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,"Liberation Sans",
  sans-serif; font-variant-numeric:tabular-nums; print-color-adjust:exact;
  -webkit-print-color-adjust:exact }
h1 { margin:0; font-size:28px; line-height:1.2; font-weight:650; letter-spacing:-.01em;
  overflow-wrap:anywhere }
h1 span, .note, .missing, dt, th, .unit { color:var(--muted); font-weight:400 }
h2 { margin:0 0 16px; font-size:17px; font-weight:650 }
h3 { margin:0 0 8px; font-size:14px; font-weight:600 }
section { margin-top:40px; padding-top:20px; border-top:1px solid var(--rule) }
.note, .missing { margin:4px 0 12px; font-size:14px; overflow-wrap:anywhere }
.missing { font-style:italic }
.big { display:flex; flex-wrap:wrap; gap:20px 44px; margin:28px 0 0 }
.big dd { margin:0; font-size:34px; line-height:1.15; font-weight:600; letter-spacing:-.02em }
.big .unit { font-size:19px; letter-spacing:0 }
.big small { display:block; font-size:13px; font-weight:400; letter-spacing:0; line-height:1.5;
  color:var(--muted) }
.big dt { font-size:13px }
.charts { display:grid; grid-template-columns:repeat(auto-fit,minmax(min(100%,420px),1fr));
  gap:24px 32px }
.charts img, .wide img { display:block; width:100%; height:auto }
.wide { overflow-x:auto } .wide img { min-width:720px }
.made img { width:100%; max-width:640px; image-rendering:pixelated }
.columns { display:grid; grid-template-columns:repeat(auto-fit,minmax(min(100%,400px),1fr));
  gap:0 56px }
.pair { display:flex; flex-wrap:wrap; gap:32px 56px; align-items:flex-start }
.pair > * { min-width:0; max-width:100% }
.scroll { overflow-x:auto }
table { border-collapse:collapse; font-size:14px }
th { text-align:left; font-size:13px }
th, td { padding:4px 20px 4px 0; vertical-align:top }
td { border-top:1px solid var(--rule) }
.num { text-align:right; white-space:nowrap }
.bar { width:160px; min-width:80px }
.bar i { display:block; height:8px; margin-top:7px; background:rgb(var(--hit)/.75) }
.matrix { border-spacing:1px; border-collapse:separate; font-size:13px }
.matrix td, .matrix th { min-width:34px; height:30px; padding:0 5px; border:0; text-align:center;
  vertical-align:middle }
.matrix tbody td { background:var(--soft) }
.matrix.wide td, .matrix.wide th { min-width:20px; height:20px; padding:0 1px; font-size:11px }
.matrix tbody th { text-align:right; white-space:nowrap; max-width:14em; overflow:hidden;
  text-overflow:ellipsis; padding-right:8px }
.matrix.tall thead th { height:auto; vertical-align:bottom; text-align:left }
.matrix.tall thead span { writing-mode:vertical-rl; transform:rotate(180deg); max-height:12em;
  overflow:hidden; text-overflow:ellipsis; white-space:nowrap }
.cards { display:grid; grid-template-columns:repeat(auto-fill,minmax(112px,1fr)); gap:20px 16px }
.cards.large { grid-template-columns:repeat(auto-fill,minmax(min(100%,230px),1fr)) }
.cards figure { margin:0; min-width:0; font-size:13px; line-height:1.4; break-inside:avoid }
.cards .frame { display:flex; align-items:center; justify-content:center; aspect-ratio:1;
  margin-bottom:6px; background:var(--soft); color:var(--muted); text-align:center }
.cards .frame img { width:100%; height:100%; object-fit:contain }
.cards figcaption div { display:flex; justify-content:space-between; gap:6px; white-space:nowrap }
.cards figcaption span:first-child { display:-webkit-box; -webkit-box-orient:vertical;
  -webkit-line-clamp:2; min-width:0; overflow:hidden; overflow-wrap:anywhere; white-space:normal }
.cards b { font-weight:600 } .wrong .said b { color:var(--bad) }
.cards .name { color:var(--muted); font-size:12px }
.facts { display:grid; grid-template-columns:max-content minmax(0,1fr); gap:3px 24px; margin:0;
  font-size:14px }
.facts dd { margin:0; overflow-wrap:anywhere }
pre, code { font:12.5px/1.55 ui-monospace,SFMono-Regular,Menlo,Consolas,"Liberation Mono",
  monospace }
pre { margin:0; padding:14px 16px; overflow-x:auto; background:var(--soft) }
ul { margin:0; padding-left:18px; font-size:14px; overflow-wrap:anywhere }
footer { margin-top:48px; font-size:13px; color:var(--muted) }
@media (max-width:560px) { body { padding:24px 16px 48px } h1 { font-size:23px }
  .big { display:grid; grid-template-columns:1fr 1fr; gap:16px 20px } .big dd { font-size:27px }
  .matrix td, .matrix th { min-width:26px; height:26px; padding:0 2px }
  .matrix tbody th { max-width:8em } .cards {
  grid-template-columns:repeat(auto-fill,minmax(96px,1fr)) } .facts { grid-template-columns:1fr;
  gap:0 } .facts dd { margin-bottom:8px } th, td { padding-right:14px } .bar { width:90px } }
@media print { body { max-width:none; padding:0; font-size:12px } h2 { break-after:avoid }
  .scroll, pre { overflow:visible } pre { white-space:pre-wrap } tr { break-inside:avoid } }
"""
    + _SHADES
)
