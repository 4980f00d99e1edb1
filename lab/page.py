"""Values in, text out: the pieces of a report that is one HTML file, and the same for a terminal.

The file opens from disk, on a phone too. It holds no script and loads nothing from elsewhere: a
policy in its head forbids both. Texts come from models and data files, so every text is hostile
until `escape` has been over it. Lengths in charts are percentages: letters keep their size.
"""
import html
import math
import os
import re
import textwrap
from itertools import zip_longest
from pathlib import Path

from data import BadInput

NOTHING = "nothing to show"
HUES = 5                     # colours that colour-blind readers tell apart, 3:1 against either page
KEPT = "\u00a0\u2009\u200c\u200d\u202f\u3000"  # spaces and joiners that real languages need
LEVELS = ("low", "middle", "high", "not measured")
MARKS = (("", ""), ("[", "]"), ("[[", "]]"), ("(", ")"))       # on a terminal without colours
TERMINAL = [f"\x1b[38;5;16;48;5;{orange}m" for orange in (230, 222, 208)] + [""]  # black on orange

STYLE = """
:root { color-scheme: light dark; --page: #ffffff; --ink: #1d1f24; --faint: #5c6068;
  --line: #d5d8de; --box: #f4f5f7; --level1: #ffe3ad; --level2: #ffb347;
  --hue0: #0072b2; --hue1: #d55e00; --hue2: #009e73; --hue3: #b8578d; --hue4: #2b2b33; }
@media screen and (prefers-color-scheme: dark) {
  :root { --page: #16181d; --ink: #e8e9ec; --faint: #a4a8b1;
    --line: #3b3f48; --box: #22252c; --level1: #4a3a17; --level2: #854d00;
    --hue0: #56b4e9; --hue1: #f0a030; --hue2: #00b386; --hue3: #e07ab5; --hue4: #f2f2f2; } }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 1rem; max-width: 60rem; background: var(--page);
  color: var(--ink); font: 16px/1.5 system-ui, sans-serif; overflow-wrap: break-word; }
h1, h2, p, th, td, figcaption { white-space: pre-line; }
h2 { margin: 2.5rem 0 .75rem; padding-top: .75rem; border-top: 1px solid var(--line); }
figure { margin: 1rem 0; } .wide { overflow-x: auto; }
figcaption, .legend { margin: .4rem 0; color: var(--faint); font-size: .875rem; }
.legend span { display: inline-block; max-width: 90%; margin-right: 1.1rem; color: var(--ink); }
.legend svg { width: 26px; height: 12px; margin-right: .35rem; }
pre, .heat { padding: .75rem; border-radius: 6px; background: var(--box);
  font: 14px/1.6 ui-monospace, monospace; overflow-x: auto; }
table { border-collapse: collapse; font-size: .9375rem; }
th, td { padding: .3rem .7rem; border-bottom: 1px solid var(--line); vertical-align: top; }
th { text-align: left; }
.number { text-align: right; white-space: pre; font-variant-numeric: tabular-nums; }
.chart { display: block; width: 100%; overflow: visible; font-size: 12px; fill: var(--ink); }
.bars { padding: 0 3.2rem 0 1.2rem; } .curves { padding: 8px 1.8rem 0 56px; }
.grid { stroke: var(--line); } .error { fill: var(--ink); stroke: var(--page); stroke-width: .75; }
.hue0 { color: var(--hue0); } .hue1 { color: var(--hue1); } .hue2 { color: var(--hue2); }
.hue3 { color: var(--hue3); } .hue4 { color: var(--hue4); }
.bar { fill: currentColor; stroke: currentColor; }
.bar.again1 { fill-opacity: .35; } .bar.again2, .bar.again3 { fill-opacity: 0; }
.curve { fill: none; stroke: currentColor; stroke-width: 1.6; vector-effect: non-scaling-stroke; }
.curve.again1 { stroke-dasharray: 7 4; }
.again2 { stroke-dasharray: 2 4; } .again3 { stroke-dasharray: 9 3 2 3; }
.heat { white-space: pre-wrap; overflow-wrap: anywhere; }
.level1 { background: var(--level1); border-bottom: 1px dotted var(--ink); }
.level2 { background: var(--level2); border-bottom: 2px solid var(--ink); }
.level1, .level2 { box-shadow: inset 1px 0 var(--box); }
svg, span { -webkit-print-color-adjust: exact; print-color-adjust: exact; }
"""
PAGE = """<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>{style}</style>
<h1>{title}</h1>
{intro}
<nav aria-label="Contents"><ul>
{contents}
</ul></nav>
{sections}
</html>
"""

# -------------------------------------------------------------------------- text and numbers


def visible(text, keep="\n\t") -> str:
    """The text with escapes for what cannot be seen or changes what can: ESC, NUL, RTL marks."""
    return "".join(c if c.isprintable() or c in keep or c in KEPT else repr(c)[1:-1]
                   for c in str(text))


def escape(text) -> str:
    """The text, safe in HTML, in SVG and in their attributes."""
    return html.escape(visible(text))


def element(tag, content="", **attributes) -> str:
    """<tag attributes>content</tag>. The content is markup, the attributes' values are texts."""
    pairs = "".join(f' {name.strip("_").replace("_", "-")}="{escape(value)}"'
                    for name, value in attributes.items())
    return f"<{tag}{pairs}>{content}</{tag}>"


def drawable(value) -> bool:
    return value is not None and abs(value) < 1e100          # NaN fails every comparison


def cell(value, digits=4) -> str:
    """What stands in a table: nothing for None, a float to so many digits, all else whole."""
    if not isinstance(value, float):
        return "" if value is None else str(value)
    if not drawable(value):
        return "n/a"
    return f"{value:.0f}" if 10 ** (digits - 1) <= abs(value) < 1e15 else f"{value:.{digits}g}"


def numeric(text) -> bool:
    """Are most words numbers? They are in "39.3 ± 0.6" and "not shown +0.3 [-0.3, +0.8]"."""
    words = re.findall(r"n/a|\w[\w.]*", text)
    return sum(word == "n/a" or word[0].isdigit() for word in words) * 2 > len(words)


def layout(header, rows):
    """A table -> (rows of texts of one length, header first; which columns hold numbers only)."""
    texts = [[cell(value) for value in row] for row in (header, *rows)]
    columns = list(zip_longest(*texts, fillvalue=""))
    right = [any(below) and all(numeric(text) for text in below if text) for _, *below in columns]
    return list(zip(*columns)), right


# --------------------------------------------------------------------------- page and blocks


def check_page(path, flag):
    """Raises BadInput unless a page can be written to `path`, replacing nothing but a page."""
    path, ours = Path(path), PAGE.partition("<title>")[0].encode()
    if not os.access(path.parent, os.W_OK):
        raise BadInput(f"{path}: cannot be written; {flag} names another file")
    if path.exists() and not (path.is_file() and path.read_bytes().startswith(ours)):
        raise BadInput(f"{path}: is there already, and no page that was made here, so it is not "
                       f"replaced; {flag} names another file")


def document(title: str, intro: str, sections: list[tuple[str, str]]) -> str:
    """A whole page, to be written as UTF-8. Title, intro and headings are texts; the body of a
    section is what the functions below return."""
    contents, parts = [], []
    for i, (heading, body) in enumerate(sections, 1):
        contents.append(element("li", element("a", escape(heading), href=f"#s{i}")))
        parts.append(element("section", f"\n<h2>{escape(heading)}</h2>\n{body}\n", id=f"s{i}"))
    return PAGE.format(title=escape(title), style=STYLE, intro=paragraph(intro),
                       contents="\n".join(contents), sections="\n".join(parts))


def paragraph(text: str) -> str:
    return element("p", escape(text))


def preformatted(text: str) -> str:
    return element("pre", f"\n{escape(text)}")       # HTML drops the first newline in <pre>


def figure(body: str, note: str = "") -> str:
    return element("figure", body + (element("figcaption", escape(note)) if note else ""))


def table(header: list[str], rows: list[list], note: str = "") -> str:
    """Cells are texts, numbers or None (empty). Columns of numbers are right aligned."""
    if not rows:
        return paragraph(NOTHING)
    texts, right = layout(header, rows)
    kinds = [{"class_": "number"} if side else {} for side in right]
    body = [element("tr", "".join(element(tag, escape(text), **kind)
                                  for text, kind in zip(row, kinds)))
            for tag, row in zip(["th"] + ["td"] * len(rows), texts)]
    return figure(element("div", element("table", "\n".join(body)), class_="wide"), note)


# ------------------------------------------------------------------------------------ charts


def axis(values):
    """(round numbers at equal distances around all values: the ticks; value -> its place between
    the first and the last tick, from 0 to 100). Ticks are 1, 2 or 5 times a power of ten apart."""
    low, high = min(values), max(values)
    if high - low <= 1e-9 * max(abs(low), abs(high)):                  # all the same
        high = low + (abs(low) / 10 or 1)
    rough = (high - low) / 5
    power = 10.0 ** math.floor(math.log10(rough))
    step = power * next(times for times in (1, 2, 5, 10) if times * power >= rough * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return ([i * step for i in range(first, last + 1)],
            lambda value: round(100 * (value / step - first) / (last - first), 4))


def hue(kind, i) -> str:
    """The class of series i: colours first, then other fillings of bars and dashes of curves."""
    return f"{kind} hue{i % HUES} again{i // HUES}"


def chart(kind, names, swatch, about, height, drawing, note) -> str:
    """What is measured, a legend, where `swatch` is the points of a mark, and the drawing."""
    marks = [element("polyline", class_=hue(kind, i), points=swatch) for i in range(len(names))]
    key = " ".join(element("span", element("svg", mark, aria_hidden="true") + escape(name))
                   for mark, name in zip(marks, names))
    drawing = element("svg", drawing, class_=f"chart {kind}s", role="img",
                      aria_label=f"chart: {kind}s", height=height)
    return figure(element("p", f"{escape(about)}\n{key}", class_="legend")
                  + element("div", drawing, class_="wide"), note)


def bars(groups: list[str], series: dict[str, list], unit: str = "%", note: str = "") -> str:
    """Horizontal bars under the name of each group, one for each series. A series is a list of
    (value, standard error or None), one for each group, or None where there is no bar."""
    pairs = [pair for values in series.values() for pair in values if pair is not None]
    if not pairs:
        return paragraph(NOTHING)
    ends = [value + side * (error if drawable(error) else 0)
            for value, error in pairs if drawable(value) for side in (-1, 1)]
    at, drawn, y = axis([0, *ends])[1], "", 0                  # y: pixels from the top
    for group, *values in zip(groups, *series.values(), strict=True):
        for line in textwrap.wrap(visible(group), 40, max_lines=3, placeholder=" …"):
            drawn += element("text", escape(line), x=0, y=y + 12, font_weight=600)
            y += 16
        for i, (name, pair) in enumerate(zip(series, values)):
            if pair is not None:
                drawn += bar(f"{group}, {name}: ", *pair, unit, at, y + 1, hue("bar", i))
            y += 13
        y += 12
    zero = element("line", class_="grid", x1=f"{at(0)}%", x2=f"{at(0)}%", y1=0, y2=y)
    return chart("bar", series, "1,1 25,1 25,11 1,11 1,1", unit, y, zero + drawn, note)


def bar(name, value, error, unit, at, y, kind) -> str:
    """One bar from zero to its value, its standard error, and its number behind both."""
    if not drawable(value):
        return element("text", "n/a", x=f"{at(0)}%", y=y + 9, dx=4)
    error = error if drawable(error) else 0
    exact = cell(value, 6) + (f" ± {cell(error, 6)}" if error else "")
    title = element("title", escape(f"{name}{exact} {unit}"))
    shapes = [(kind, min(0, value), max(0, value), y, 10)]
    shapes += [("error", value - error, value + error, y + 4, 2)] if error else []
    drawn = "".join(element("rect", title, class_=kind, x=f"{at(low)}%", y=top, height=height,
                            width=f"{at(high) - at(low):.6g}%")
                    for kind, low, high, top, height in shapes)
    end = f"{at(max(0, value + error))}%"
    return drawn + element("text", cell(value), x=end, y=y + 9, dx=5, font_size=10)


def thin(points, size) -> list:
    """The lowest and the highest of every `size` points, so that spikes survive."""
    pieces = [sorted(points[start:start + size], key=lambda point: point[1])
              for start in range(0, len(points), size)]
    return [point for piece in pieces for point in sorted({piece[0], piece[-1]})]


def curves(series: dict[str, list], x: str, y: str, note: str = "") -> str:
    """A line for each series, a list of (x, y). Points that are no numbers are left out, and the
    legend says how many."""
    clean = {name: [point for point in points if all(map(drawable, point))]
             for name, points in series.items()}
    if not any(clean.values()):
        return paragraph(NOTHING)
    wide, high = 1000, 240
    (across, at), (up, above) = (axis(values) for values in zip(*sum(clean.values(), [])))
    drawn = paths = ""
    for mark in across:
        drawn += element("text", f"{mark:.6g}", x=f"{at(mark)}%", y=high + 19, text_anchor="middle")
    for mark in up:
        place = high - high / 100 * above(mark)              # SVG counts from the top
        drawn += element("line", class_="grid", x1=0, x2="100%", y1=place, y2=place)
        drawn += element("text", f"{mark:.6g}", x=-8, y=place, dy=4, text_anchor="end")
    for i, (name, kept) in enumerate(clean.items()):
        points = " ".join(f"{wide / 100 * at(a):.6g},{high - high / 100 * above(b):.6g}"
                          for a, b in thin(kept, len(kept) // 200 + 1))
        paths += element("polyline", element("title", escape(name)), class_=hue("curve", i),
                         points=points)
    drawn += element("svg", paths, viewBox=f"0 0 {wide} {high}", width="100%", height=high,
                     preserveAspectRatio="none", overflow="visible")
    lost = [len(series[name]) - len(clean[name]) for name in series]
    names = [name + f" ({n} n/a)" * (n > 0) for name, n in zip(series, lost)]
    return chart("curve", names, "1,6 25,6", f"{y}, by {x}", high + 32, drawn, note)


def heat(tokens: list[str], levels: list[int], title: str = "") -> str:
    """A text whose tokens are coloured, and underlined, by their level, an index of LEVELS."""
    if not tokens:
        return paragraph(NOTHING)
    key = "".join(element("span", name, class_=f"level{i}") for i, name in enumerate(LEVELS)
                  if i < 3 or i in levels)
    key = element("p", element("span", escape(title)) + key, class_="legend")
    spans = "".join(element("span", escape(token).replace("\n", "↵\n"), class_=f"level{level}",
                            title=LEVELS[level])
                    for token, level in zip(tokens, levels, strict=True))
    return figure(key + element("div", spans, class_="heat"))


def heat_terminal(tokens: list[str], levels: list[int], colour: bool) -> str:
    """The same as one line of a terminal: in three backgrounds, or as MARKS say."""
    def paint(text, level):
        if colour:
            return f"{TERMINAL[level]}{text}\x1b[0m"
        word = text.lstrip(" ") or text      # the space before a word stays outside the brackets
        return text[:len(text) - len(word)] + word.join(MARKS[level])

    return "".join(paint(visible(token.replace("\n", "↵"), ""), level)
                   for token, level in zip(tokens, levels, strict=True) if token)


def columns(header: list[str], rows: list[list]) -> str:
    """A table for a terminal: the first column left aligned, columns of numbers right aligned."""
    if not rows:
        return NOTHING
    texts, right = layout(header, rows)
    texts = [[visible(text.replace("\n", " "), "") for text in row] for row in texts]
    widths = [max(map(len, column)) for column in zip(*texts)]
    sides = [str.rjust if side and i else str.ljust for i, side in enumerate(right)]
    return "\n".join("  ".join(side(text, width) for text, width, side in zip(row, widths, sides))
                     .rstrip() for row in texts)
