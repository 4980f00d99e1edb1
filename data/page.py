"""Values in, text out: the pieces of a report that is one HTML file, and their likes for a terminal.

The file opens from disk, on a phone too, and asks nobody for anything: no script, no font, no style, no image from elsewhere, and a policy
in its head that would refuse them. Texts come from models and from data files, so every text is hostile until `escape` has been over it.
Charts are SVG whose lengths are percentages of whatever width the reader has, and whose letters therefore keep their size.
"""
import html
import math
import textwrap

NOTHING = "nothing to show"
HUES = 5                               # series colours: told apart by colour-blind readers, and 3:1 against a white and a dark page
DASHES = ("none", "7 4", "2 4", "9 3 2 3")                # of a line, when the colours are used up; HUES * 4 series
KEPT = "\u00a0\u2009\u200c\u200d\u202f\u3000"             # spaces and joiners that real languages need, and repr() would escape
LEVELS = ("low", "middle", "high")
TERMINAL = ("\x1b[38;5;16;48;5;230m", "\x1b[38;5;16;48;5;222m", "\x1b[38;5;16;48;5;208m")     # black on three oranges, as LEVELS
MARKS = (("", ""), ("[", "]"), ("[[", "]]"))

STYLE = """
:root { color-scheme: light dark; --page: #ffffff; --ink: #1d1f24; --faint: #5c6068; --line: #d5d8de; --box: #f4f5f7; --link: #0057a8;
  --hue0: #0072b2; --hue1: #d55e00; --hue2: #009e73; --hue3: #b8578d; --hue4: #2b2b33; --level1: #ffe3ad; --level2: #ffb347; }
@media screen and (prefers-color-scheme: dark) {
  :root { --page: #16181d; --ink: #e8e9ec; --faint: #a4a8b1; --line: #3b3f48; --box: #22252c; --link: #7cb8ff;
    --hue0: #56b4e9; --hue1: #f0a030; --hue2: #00b386; --hue3: #e07ab5; --hue4: #f2f2f2; --level1: #4a3a17; --level2: #854d00; } }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 1rem; max-width: 60rem; background: var(--page); color: var(--ink); font: 16px/1.5 system-ui, sans-serif;
  overflow-wrap: break-word; -webkit-text-size-adjust: 100%; }
h1, h2 { line-height: 1.25; }
h2 { margin: 2.5rem 0 .75rem; padding-top: .75rem; border-top: 1px solid var(--line); }
a { color: var(--link); }
nav ul { padding-left: 1.2rem; }
figure { margin: 1rem 0; }
figcaption, .legend, .axis { margin: .4rem 0; color: var(--faint); font-size: .875rem; }
.legend span { display: inline-block; max-width: calc(100% - 1.1rem); margin-right: 1.1rem; color: var(--ink); }
.legend svg { width: 26px; height: 12px; margin-right: .35rem; vertical-align: -1px; }
.axis { margin-top: 0; text-align: center; }
.wide { overflow-x: auto; }
pre, .heat { padding: .75rem; border-radius: 6px; background: var(--box); font: 14px/1.5 ui-monospace, monospace; }
pre { margin: 1rem 0; overflow-x: auto; }
table { border-collapse: collapse; font-size: .9375rem; }
th, td { padding: .3rem .7rem; border-bottom: 1px solid var(--line); text-align: left; vertical-align: top; }
th { vertical-align: bottom; }
.number { text-align: right; white-space: nowrap; font-variant-numeric: tabular-nums; }
.long { min-width: 16rem; max-width: 32rem; overflow-wrap: anywhere; }
.chart { display: block; width: 100%; overflow: visible; font: 12px system-ui, sans-serif; fill: var(--ink); }
.chart text { stroke: var(--page); stroke-width: 3px; paint-order: stroke; }
.bars { padding: 0 3.2rem 0 1.2rem; }
.curves { padding: 8px 1.8rem 0 56px; }
.faint { fill: var(--faint); }
.grid { stroke: var(--line); }
.zero { stroke: var(--faint); }
.error { fill: var(--ink); stroke: var(--page); stroke-width: .75; }
.hue0 { color: var(--hue0); } .hue1 { color: var(--hue1); } .hue2 { color: var(--hue2); } .hue3 { color: var(--hue3); } .hue4 { color: var(--hue4); }
.bar { fill: currentColor; stroke: currentColor; }
.again1 { fill-opacity: .35; } .again2, .again3 { fill-opacity: 0; stroke-dasharray: 2 2; }
.curve { fill: none; stroke: currentColor; stroke-width: 1.6; stroke-linejoin: round; stroke-linecap: butt; vector-effect: non-scaling-stroke; }
.dot { fill: currentColor; }
.heat { white-space: pre-wrap; overflow-wrap: anywhere; line-height: 1.75; }
.heat small { color: var(--faint); }
.level1 { background: var(--level1); border-bottom: 1px dotted var(--ink); }
.level2 { background: var(--level2); border-bottom: 2px solid var(--ink); }
.heat .level1, .heat .level2 { box-shadow: inset 1px 0 var(--box); }
svg, span { -webkit-print-color-adjust: exact; print-color-adjust: exact; }
@media print { body { max-width: none; padding: 0; } pre { white-space: pre-wrap; } .wide { overflow: visible; }
  tr, .legend { break-inside: avoid; } h2 { break-after: avoid; } }
"""
POLICY = "default-src 'none'; style-src 'unsafe-inline'"

# ---------------------------------------------------------------------------------------------------------- text and numbers


def visible(text, keep="\n\t") -> str:
    """The text with all that is not seen, or would move or recolour what is seen (ESC, NUL, lone surrogates, RTL overrides), as escapes."""
    return "".join(c if c.isprintable() or c in keep or c in KEPT else repr(c)[1:-1] for c in str(text))


def escape(text) -> str:
    """The text, safe in HTML, in SVG and in their attributes."""
    return html.escape(visible(text))


def lines(text) -> str:
    return escape(text).replace("\n", "<br>")


def drawable(value) -> bool:
    return value is not None and abs(value) < 1e100          # NaN fails every comparison


def number(value, digits=4) -> str:
    """A cell's number as a reader wants it: ints whole, floats to so many digits."""
    if isinstance(value, int):
        return str(value)
    if not drawable(value):
        return "n/a"
    return f"{value:.0f}" if 10 ** (digits - 1) <= abs(value) < 1e15 else f"{value:.{digits}g}"


def cell(value) -> str:
    return "" if value is None else number(value) if isinstance(value, (int, float)) else str(value)


def numeric(value) -> bool:
    """Is a cell to be right aligned? A number is, and a string most of whose words are: "39.3 ± 0.6", "none +0.3 [-0.3, +0.8]"."""
    words = [word.strip("()[],;:%") for word in cell(value).split()]
    words = [word for word in words if any(map(str.isalnum, word))]          # not the ± and the dashes between them
    return sum(map(is_number, words)) * 2 > len(words)


def is_number(word) -> bool:
    try:
        return word == "n/a" or float(word.replace(",", "")) is not None
    except ValueError:
        return False


# ------------------------------------------------------------------------------------------------------------ page and blocks


def document(title: str, intro: str, sections: list[tuple[str, str]]) -> str:
    """A whole page, to be written as UTF-8. Titles, headings and intro are texts; the body of a section is what the functions below return."""
    contents = "".join(f'<li><a href="#s{i}">{lines(heading)}</a></li>\n' for i, (heading, _) in enumerate(sections, 1))
    parts = "".join(f'<section id="s{i}">\n<h2>{lines(heading)}</h2>\n{body}\n</section>\n' for i, (heading, body) in enumerate(sections, 1))
    return (f'<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n<meta http-equiv="Content-Security-Policy" content="{POLICY}">\n'
            f'<meta name="viewport" content="width=device-width, initial-scale=1">\n<title>{escape(title)}</title>\n<style>{STYLE}</style>\n'
            f"</head>\n<body>\n<header>\n<h1>{lines(title)}</h1>\n{paragraph(intro)}\n</header>\n"
            f'<nav aria-label="Contents"><ul>\n{contents}</ul></nav>\n<main>\n{parts}</main>\n</body>\n</html>\n')


def paragraph(text: str) -> str:
    return f"<p>{lines(text)}</p>"


def preformatted(text: str) -> str:
    return f"<pre>\n{escape(text)}</pre>"                   # HTML drops the newline after <pre>, and would drop the text's own


def figure(body, note="") -> str:
    caption = f"<figcaption>{lines(note)}</figcaption>" if note else ""
    return f"<figure>\n{body}\n{caption}</figure>"


def table(header: list[str], rows: list[list], note: str = "") -> str:
    """Cells are texts, numbers or None (empty). What is a number, or reads like one, is right aligned."""
    if not rows:
        return paragraph(NOTHING)

    def one(tag, value, right):
        kind = ' class="number"' if right else ' class="long"' if len(cell(value)) > 60 else ""
        return f"<{tag}{kind}>{lines(cell(value))}</{tag}>"

    head = "".join(one("th", name, right) for name, right in zip(header, right_columns(header, rows)))
    body = "".join("<tr>" + "".join(one("td", value, numeric(value)) for value in row) + "</tr>\n" for row in rows)
    return figure(f'<div class="wide"><table>\n<thead><tr>{head}</tr></thead>\n<tbody>\n{body}</tbody>\n</table></div>', note)


def right_columns(header, rows) -> list[bool]:
    """For each column: is every cell that is not empty a number? Its name goes right then, too."""
    columns = [[row[i] for row in rows if i < len(row) and cell(row[i])] for i in range(len(header))]
    return [bool(column) and all(map(numeric, column)) for column in columns]


# ------------------------------------------------------------------------------------------------------------------- charts


def ticks(values, about=5) -> list[float]:
    """Round numbers (1, 2 or 5 times a power of ten) at equal distances, the first at or below all values, the last at or above."""
    low, high = min(values), max(values)
    if high - low <= 1e-9 * max(abs(low), abs(high)) + 1e-90:                # all the same
        high = low + (0.1 * abs(low) if abs(low) > 1e-80 else 1)
    rough = (high - low) / about
    power = 10.0 ** math.floor(math.log10(rough))
    step = power * next(times for times in (1, 2, 5, 10) if times * power >= rough * 0.999)
    return [i * step for i in range(math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9) + 1)]


def labels(marks) -> list[tuple[float, str]]:
    """The ticks and what is written at them, short enough for a telephone: 200k, 400k."""
    size, letter = next((unit for unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")) if max(map(abs, marks)) >= 10 * unit[0]), (1, ""))
    return [(mark, f"{mark / size:.6g}{letter if mark else ''}") for mark in marks]


def scale(marks):
    """value -> its place between the first and the last tick, from 0 to 100."""
    return lambda value: round(100 * (value - marks[0]) / (marks[-1] - marks[0]), 4)


def legend(names, swatch) -> str:
    entries = (f'<span><svg aria-hidden="true">{swatch(i)}</svg>{lines(name)}</span>' for i, name in enumerate(names))
    return f'<p class="legend">{" ".join(entries)}</p>'


def chart(kind, height, drawing) -> str:
    return f'<div class="wide"><svg class="chart {kind}" role="img" aria-label="chart: {kind}" height="{height}">{drawing}</svg></div>'


def axis(name) -> str:
    return f'<p class="axis">{lines(name)}</p>'             # not in the SVG, whose texts do not wrap


def rectangle(kind, left, right, y, height, title="") -> str:
    title = f"<title>{escape(title)}</title>" if title else ""
    return f'<rect class="{kind}" x="{left}%" width="{right - left:.6g}%" y="{y}" height="{height}">{title}</rect>'


def fill(i) -> str:
    return f"bar hue{i % HUES} again{i // HUES}"


def stroke(i) -> str:
    return f'class="curve hue{i % HUES}" stroke-dasharray="{DASHES[i // HUES % len(DASHES)]}"'


def bars(groups: list[str], series: dict[str, list[tuple[float, float | None] | None]], unit: str = "%", note: str = "") -> str:
    """Horizontal bars, a group of them under each group's name: (value, standard error or None) for each series, or None where there is none."""
    pairs = [pair for values in series.values() for pair in values if pair is not None]
    if not groups or not pairs:
        return paragraph(NOTHING)
    ends = [value + side * (error if drawable(error) else 0) for value, error in pairs if drawable(value) for side in (-1, 1)]
    marks = ticks([0, *ends])
    at, high, parts, y = scale(marks), 13, [], 26
    for group, *values in zip(groups, *series.values(), strict=True):
        for line in textwrap.wrap(visible(group), 40, max_lines=3, placeholder=" …") or [""]:         # 40 letters fit a phone
            parts.append(f'<text x="0" y="{y + 12}" font-weight="600">{escape(line)}</text>')
            y += 16
        y += 2
        for i, (name, pair) in enumerate(zip(series, values)):
            parts.append("" if pair is None else bar(f"{group}, {name}: ", *pair, unit, at, y, i))
            y += high
        y += 12
    grid = "".join(f'<line class="{"grid" if mark else "zero"}" x1="{at(mark)}%" x2="{at(mark)}%" y1="18" y2="{y}"/>'
                   + "".join(f'<text class="faint" text-anchor="middle" x="{at(mark)}%" y="{place}">{label}</text>' for place in (12, y + 14))
                   for mark, label in labels(marks))
    key = legend(series, lambda i: f'<rect class="{fill(i)}" x="1" y="1" width="24" height="10"/>')
    return figure(key + chart("bars", y + 18, grid + "".join(parts)) + axis(unit), note)


def bar(name, value, error, unit, at, y, i) -> str:
    """One bar from the axis to its value, its standard error, and its number behind both."""
    if not drawable(value):
        return f'<text class="faint" x="{at(0)}%" dx="4" y="{y + 9}" font-size="10">n/a<title>{escape(name)}n/a</title></text>'
    error = error if drawable(error) else 0
    exact = number(value, 6) + (f" ± {number(error, 6)}" if error else "")
    return (rectangle(fill(i), at(min(0, value)), at(max(0, value)), y + .5, 10, f"{name}{exact} {unit}")
            + (rectangle("error", at(value - error), at(value + error), y + 4.5, 2) if error else "")
            + f'<text x="{at(max(0, value + error))}%" dx="5" y="{y + 9}" font-size="10">{number(value)}</text>')


def thin(points, most=400) -> list:
    """The lowest and the highest point of each of most / 2 equal pieces, so that spikes survive, and the last point."""
    size = math.ceil(len(points) / most * 2)
    if len(points) <= most:
        return points
    pieces = [range(start, min(start + size, len(points))) for start in range(0, len(points), size)]
    kept = {pick(piece, key=lambda i: points[i][1]) for piece in pieces for pick in (min, max)}
    return [points[i] for i in sorted(kept | {len(points) - 1})]


def curves(series: dict[str, list[tuple[float, float]]], x: str, y: str, note: str = "") -> str:
    """A line for each series of (x, y). Points that are no numbers are left out, and the legend says how many."""
    clean = {name: [point for point in points if all(map(drawable, point))] for name, points in series.items()}
    points = [point for kept in clean.values() for point in kept]
    if not points:
        return paragraph(NOTHING)
    across, up, high = ticks([a for a, _ in points]), ticks([b for _, b in points]), 240
    at, above = scale(across), scale(up)

    def down(value):                           # pixels below the highest tick
        return round(high * (1 - above(value) / 100), 2)

    def line(i, name, kept):
        path = " ".join(f"{10 * at(a):.6g},{down(b)}" for a, b in thin(kept))
        last = f"{escape(name)}: {number(kept[-1][1], 6)} at {number(kept[-1][0], 6)}" if kept else ""
        return f'<polyline {stroke(i)} points="{path}"><title>{last}</title></polyline>'

    def dots(i, name, kept):                   # few points are measurements each, many are a line
        return "".join(f'<circle class="dot hue{i % HUES}" cx="{at(a)}%" cy="{down(b)}" r="3"><title>{escape(name)}: {number(b, 6)} at '
                       f"{number(a, 6)}</title></circle>" for a, b in (kept if len(kept) <= 40 else ()))

    grid = "".join(f'<line class="grid" x1="0" x2="100%" y1="{down(mark)}" y2="{down(mark)}"/>'
                   f'<text class="faint" text-anchor="end" x="-8" y="{down(mark)}" dy="4">{label}</text>' for mark, label in labels(up))
    grid += "".join(f'<line class="zero" x1="{at(mark)}%" x2="{at(mark)}%" y1="{high}" y2="{high + 5}"/>'
                    f'<text class="faint" text-anchor="middle" x="{at(mark)}%" y="{high + 19}">{label}</text>' for mark, label in labels(across))
    drawn = "".join(line(i, *item) for i, item in enumerate(clean.items()))
    drawn = f'<svg viewBox="0 0 1000 {high}" width="100%" height="{high}" preserveAspectRatio="none" overflow="visible">{drawn}</svg>'
    drawn += "".join(dots(i, *item) for i, item in enumerate(clean.items()))
    names = [name + f" ({len(series[name]) - len(kept)} n/a)" * (len(kept) < len(series[name])) for name, kept in clean.items()]
    key = legend(names, lambda i: f'<line {stroke(i)} x1="0" x2="26" y1="6" y2="6"/>')
    return figure(f'{key}<p class="legend">{lines(y)}</p>{chart("curves", high + 32, grid + drawn)}{axis(x)}', note)


# ------------------------------------------------------------------------------------------------------- tokens in three levels


def heat(tokens: list[str], levels: list[int], title: str = "") -> str:
    """A text whose tokens are coloured, and underlined, by their level: 0 low, 1 middle, 2 high."""
    if not tokens:
        return paragraph(NOTHING)
    spans = "".join(f'<span class="level{level}" title="{LEVELS[level]}">' + escape(token).replace("\n", "<small>↵</small>\n") + "</span>"
                    for token, level in zip(tokens, levels, strict=True))
    key = "".join(f'<span class="level{level}">{name}</span>' for level, name in enumerate(LEVELS))
    return figure(f'<p class="legend"><span>{lines(title)}</span>{key}</p><div class="heat">{spans}</div>')


def heat_terminal(tokens: list[str], levels: list[int], colour: bool) -> str:
    """The same for a terminal: three backgrounds, or [middle] and [[high]]. No token can reach the terminal's controls."""
    def paint(text, level):
        if colour:
            return f"{TERMINAL[level]}{text}\x1b[0m" if text else ""
        word = text.lstrip(" ") or text                     # the space before a word stays outside, a token of spaces does not
        before, after = MARKS[level] if text else ("", "")
        return text[:len(text) - len(word)] + before + word + after

    return "".join("\n".join(paint(line, level) for line in visible(token, "\n").replace("\n", "↵\n").split("\n"))
                   for token, level in zip(tokens, levels, strict=True))


def columns(header: list[str], rows: list[list]) -> str:
    """A table for a terminal: the first column left aligned, numbers right aligned."""
    if not rows:
        return NOTHING
    right = [False, *right_columns(header, rows)[1:]]
    grid = [[(visible(" ".join(cell(value).split("\n")), ""), side) for value, side in zip(header, right)],
            *([(visible(" ".join(cell(value).split("\n")), ""), i > 0 and numeric(value)) for i, value in enumerate(row)] for row in rows)]
    widths = [max(len(row[i][0]) for row in grid if i < len(row)) for i in range(max(map(len, grid)))]
    return "\n".join("  ".join(text.rjust(width) if side else text.ljust(width) for (text, side), width in zip(row, widths)).rstrip() for row in grid)
