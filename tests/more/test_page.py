"""After this file you know that a report can be trusted: it is one file that asks nobody for
anything, no text in it can become markup or reach a terminal's controls, and the lengths in its
charts are the numbers it was given.
"""
import itertools
import math
import re
import xml.etree.ElementTree as ElementTree
from html.parser import HTMLParser

import pytest

from lab import page

EVIL = ("</text></title></style></pre><script>alert(1)</script><img src=x onerror='a'> \" ' & &lt; "
        "]]> <!-- {} \x1b[31m \x00 \x07 \x7f \x9b \r \ud800 \u202e \u2066 \ufffe\nsecond line\t")
TAME = re.sub(r"\S", "x", page.visible(EVIL))  # as long, with the same words and lines
NAN, INF = math.nan, math.inf


class Outline(HTMLParser):
    """The tags and attribute names in order, the texts between them, and a complaint about every
    tag that does not close its own."""

    def __init__(self, source):
        super().__init__()
        self.tags, self.attributes, self.text, self.open = [], [], "", []
        self.feed(source)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, *(name for name, _ in attributes)))
        self.attributes += attributes
        if tag != "meta":
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


def everything(text):
    """A page that uses every function, with one text in every place that takes one."""
    series = {text: [(3.0, 0.5), (NAN, None)], "other": [None, (-2.0, INF)]}
    points = {text: [(0, 1), (1, NAN), (2, INF), (3, 5.0)], "other": []}
    body = [page.paragraph(text),
            page.preformatted(text),
            page.table([text, "number"], [[text, 1.5], [None, NAN]], text),
            page.bars([text, "second"], series, text, text),
            page.curves(points, text, text, text),
            page.heat([text, text, text], [0, 1, 2], text)]
    return page.document(text, text, [(text, "\n".join(body)), ("second", "")])


def svgs(source):
    return [ElementTree.fromstring(svg)
            for svg in re.findall(r'<svg class="chart.*?</svg>(?=</div>)', source, re.S)]


def rects(source, kind):
    """(x, width) of the chart's rectangles of a kind, in percent."""
    [svg] = svgs(source)
    return [tuple(float(rect.get(name).rstrip("%")) for name in ("x", "width"))
            for rect in svg.iter("rect") if rect.get("class").startswith(kind)]


# -------------------------------------------------------------------------------- the page


@pytest.mark.parametrize("text", [TAME, EVIL, ""])
def test_every_tag_is_closed_and_every_chart_is_xml(text):
    source = everything(text)
    tags = {tag for tag, *_ in Outline(source).tags}
    assert {"title", "section", "table", "svg", "pre", "span"} <= tags
    assert len(svgs(source)) == 2
    for svg in re.findall(r"<svg aria-hidden.*?</svg>", source):
        ElementTree.fromstring(svg)


def test_the_page_asks_nobody_for_anything():
    source, outline = everything(TAME), Outline(everything(TAME))
    for reference in ("http:", "https:", "//", "url(", "@import", "<script", "<link", "<img",
                      "<iframe", "<base", "src=", "javascript:"):
        assert reference not in source
    assert all(value.startswith("#s") for name, value in outline.attributes if name == "href")
    assert not any(name.startswith("on") for name, _ in outline.attributes)


def test_a_browser_would_refuse_what_the_page_may_not_load():
    attributes = Outline(everything(EVIL)).attributes
    assert ("http-equiv", "Content-Security-Policy") in attributes
    assert ("content", "default-src 'none'; style-src 'unsafe-inline'") in attributes


def test_the_page_is_made_for_phones_and_for_dark_rooms():
    source = everything(TAME)
    assert source.startswith('<!doctype html>\n<html lang="en">')
    assert '<meta charset="utf-8">' in source
    assert 'name="viewport" content="width=device-width, initial-scale=1"' in source
    assert "prefers-color-scheme: dark" in source


def test_the_contents_lead_to_every_section():
    outline = Outline(page.document("t", "i", [("One", ""), ("Two", "")]))
    values = [value for name, value in outline.attributes if name in ("href", "id")]
    assert values == ["#s1", "#s2", "s1", "s2"]


def luminance(colour):
    parts = [int(colour[i:i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4
              for part in parts]
    return sum(weight * part for weight, part in zip((0.2126, 0.7152, 0.0722), linear))


@pytest.mark.parametrize("scheme", [0, 1], ids=["light", "dark"])
def test_colours_stand_out_from_what_is_behind_them(scheme):
    root = re.findall(r":root \{.*?\}", page.STYLE, re.S)[scheme]
    colour = dict(re.findall(r"--(\w+): (#\w{6})", root))

    def contrast(one, other):
        low, high = sorted((luminance(colour[one]), luminance(colour[other])))
        return (high + 0.05) / (low + 0.05)

    for i in range(page.HUES):
        assert contrast(f"hue{i}", "page") >= 3      # what WCAG asks for graphics
    for behind in ("page", "box", "level1", "level2"):
        assert contrast("ink", behind) >= 4.5        # and for text
    assert contrast("faint", "page") >= 4.5


# ---------------------------------------------------------------------------- hostile texts


def test_a_hostile_text_makes_the_same_page_as_an_honest_one():
    assert Outline(everything(EVIL)).tags == Outline(everything(TAME)).tags


def test_what_cannot_be_seen_is_shown_as_an_escape():
    source = everything(EVIL)
    source.encode("utf-8")                           # a lone surrogate would raise
    assert not [c for c in source if not c.isprintable() and c not in "\n\t"]
    assert r"\x1b[31m \x00 \x07 \x7f \x9b \r \ud800 \u202e \u2066 \ufffe" in Outline(source).text
    assert "<script>" in Outline(source).text


def test_real_languages_are_left_alone():
    text = "naïve 東京 שלום हिन्दी क्\u200dष 1\u202f000 👩\u200d🔬"
    assert Outline(page.paragraph(text)).text == text


def test_a_block_keeps_its_first_newline():
    assert page.preformatted("\n{}") == "<pre>\n\n{}</pre>"    # HTML drops one


# ----------------------------------------------------------------------- tables and numbers


@pytest.mark.parametrize("value", [
    3, -2.5, NAN, "39.3 ± 0.6", "+0.2", "12%", "1,234", "n/a", "1e-5", "4 of 100",
    "not shown: +0.3 [-0.3, +0.8]", "5.1 ± 0.2\n(12)"])
def test_what_reads_like_a_number_goes_right(value):
    assert '<td class="number">' in page.table(["a"], [[value]])


@pytest.mark.parametrize("value", [None, "", "none", "Llama 3", "reg lam=0.01", "-",
                                   "seed 1 of reg", "out/llama-reg-seed0"])
def test_what_does_not_stays_left(value):
    assert "<td>" in page.table(["a"], [[value]])


def test_cells_say_what_they_were_given():
    said = {7: "7", 123456: "123456", 39.271: "39.27", 1234.5678: "1235", 9999.96: "10000",
            0.00012345: "0.0001234", NAN: "n/a", -INF: "n/a", None: "", "a\nb": "a\nb",
            "39.3 ± 0.6": "39.3 ± 0.6"}
    source = page.table(["x"] * len(said), [list(said)])
    assert re.findall(r"<td[^>]*>(.*?)</td>", source, re.S) == list(said.values())


def test_a_column_of_numbers_has_its_name_above_them():
    source = page.table(["run", "score"], [["none", "39.3 ± 0.6"], ["reg", None]])
    assert '<th>run</th><th class="number">score</th>' in source


def test_a_short_row_gets_empty_cells():
    assert page.table(["a", "b"], [["x", "y"], ["z"]]).count("<td>") == 4


@pytest.mark.parametrize("empty", [
    page.table(["a"], []), page.bars([], {"a": []}), page.bars(["g"], {}),
    page.bars(["g"], {"a": [None]}), page.heat([], []), page.curves({}, "x", "y"),
    page.curves({"a": []}, "x", "y"), page.curves({"a": [(0, NAN)]}, "x", "y")])
def test_nothing_to_show_is_said(empty):
    assert empty == "<p>nothing to show</p>"


def test_nothing_to_show_is_said_in_a_terminal_too():
    assert page.columns(["a"], []) == "nothing to show"
    assert page.heat_terminal([], [], True) == ""


# ----------------------------------------------------------------------------------- charts


def test_bars_are_as_long_as_their_values():
    values = [10.0, 39.3, 0.0, 75.0]
    drawn = rects(page.bars(list("abcd"), {"s": [(value, None) for value in values]}), "bar")
    assert [x for x, _ in drawn] == [0] * 4
    whole = 80                                       # where the axis ends
    expected = [value / whole * 100 for value in values]
    assert [width for _, width in drawn] == pytest.approx(expected, abs=1e-3)


def test_a_negative_bar_ends_where_a_positive_one_begins():
    series = {"s": [(-2.0, None)], "t": [(4.0, None)]}
    (left, width), (x, other) = rects(page.bars(["a"], series, "points"), "bar")
    assert left >= 0
    assert left + width == pytest.approx(x, abs=1e-3)
    assert other == pytest.approx(2 * width, abs=1e-3)


def test_error_bars_reach_one_standard_error_to_either_side():
    source = page.bars(["a", "b", "c"], {"s": [(50.0, 4.0), (20.0, None), (30.0, NAN)]})
    [(x, width)] = rects(source, "error")
    end = sum(rects(source, "bar")[0])
    assert x + width / 2 == pytest.approx(end, abs=1e-3)
    assert width / 2 == pytest.approx(4 / 50 * end, abs=1e-3)


def test_the_error_of_a_negative_bar_is_inside_the_chart():
    [(x, width)] = rects(page.bars(["a"], {"s": [(-2.0, 1.5)]}), "error")
    assert 0 <= x and x + width <= 100


def test_a_bar_tells_its_exact_number():
    source = page.bars(["BoolQ"], {"reg": [(39.2714, 0.61)]})
    assert "<title>BoolQ, reg: 39.2714 ± 0.61 %</title>" in source
    assert ">39.27</text>" in source


def test_a_missing_bar_leaves_a_gap_and_a_broken_one_says_so():
    series = {"s": [None], "t": [(NAN, 1.0)], "u": [(INF, None)], "v": [(5.0, 1.0)]}
    source = page.bars(["a"], series)
    assert len(rects(source, "bar")) == 1
    assert source.count(">n/a</text>") == 2


def test_each_group_needs_its_bar():
    with pytest.raises(ValueError):
        page.bars(["a", "b"], {"s": [(1.0, None)]})


def test_twelve_groups_of_eight_do_not_collide():
    wording = "asked in a wording that is too long for one line of a telephone "
    groups = [f"task {i}, " + wording * (1 + i % 3) for i in range(12)]
    [svg] = svgs(page.bars(groups, {f"run {i}": [(10.0 + i, 1.0)] * 12 for i in range(8)}))
    boxes = [(float(shape.get("y")), float(shape.get("height"))) for shape in svg.iter("rect")
             if shape.get("class").startswith("bar")]
    names = [text for text in svg.iter("text") if text.get("font-weight")]
    boxes = sorted(boxes + [(float(text.get("y")) - 11, 12) for text in names])
    assert len(boxes) > 12 * 8 + 12
    assert all(y + height <= lower for (y, height), (lower, _) in itertools.pairwise(boxes))
    assert boxes[-1][0] + boxes[-1][1] < float(svg.get("height"))
    assert all(len(text.text) <= 40 for text in names)         # as many letters as a phone shows


@pytest.mark.parametrize("values", [
    [0, 100], [0.2, 0.31], [-3, 7.4], [5, 5], [-5, -5], [0, 0], [-1e-300, 0], [1e-7, 3e-7],
    [-1e99, 1e99], [1e15, 1e15 + 1]])
def test_an_axis_has_a_few_round_ticks_around_all_values(values):
    marks, place = page.axis(values)
    step = marks[1] - marks[0]
    assert 2 <= len(marks) <= 12
    assert marks[0] <= min(values) + 1e-6 * step
    assert marks[-1] >= max(values) - 1e-6 * step
    assert round(step / 10.0 ** math.floor(math.log10(step) + 1e-6), 3) in (1, 2, 5)
    assert [place(marks[0]), place(marks[-1])] == pytest.approx([0, 100])


def polylines(source):
    [svg] = svgs(source)
    return [[tuple(map(float, point.split(","))) for point in line.get("points").split()]
            for line in svg.iter("polyline")]


def test_a_curve_passes_through_its_points():
    source = page.curves({"loss": [(0, 4.0), (100, 1.0), (200, 0.0)]}, "step", "loss")
    assert polylines(source) == [[(0, 0), (500, 180), (1000, 240)]]    # 1000 across, 240 down
    [svg] = svgs(source)
    place = {text.text: float(text.get("y")) for text in svg.iter("text") if text.get("x") == "-8"}
    assert place["4"] == 0 and place["1"] == 180 and place["0"] == 240
    assert max(float(text.get("y")) for text in svg.iter("text")) < float(svg.get("height"))
    assert {"0", "50", "100", "150", "200"} <= {text.text for text in svg.iter("text")}


def test_a_long_curve_is_thinned_but_keeps_its_spikes():
    points = [(i, 1.0) for i in range(100_000)]
    points[777], points[55_555] = (777, 9.0), (55_555, -7.0)
    kept = page.thin(points, 500)
    assert len(kept) <= 400 and kept == sorted(kept)
    assert {points[777], points[55_555]} <= set(kept)
    assert page.thin(points[:1000], 1) == points[:1000]


def test_twenty_curves_look_different():
    [svg] = svgs(page.curves({str(i): [(0, i), (1, i)] for i in range(20)}, "x", "y"))
    kinds = {line.get("class") for line in svg.iter("polyline")}
    assert len(kinds) == 20
    assert all(f".{name} " in page.STYLE for kind in kinds for name in kind.split()[1:]
               if name != "again0")


def test_a_curve_that_diverged_says_so_and_breaks_nothing():
    series = {"a": [(0, 1.0), (1, 2.0), (2, NAN), (3, INF)], "b": [(0, 1.0)]}
    source = page.curves(series, "step", "loss")
    assert "a (2 n/a)" in source and "b (" not in source
    assert [len(line) for line in polylines(source)] == [2, 1]
    assert not re.search(r'="[^"]*\b(nan|inf)\b', source)


# -------------------------------------------------------------------- tokens in three levels

TOKENS, PICKED = ["The", " town", " of\n\n", "<b>", "  "], [0, 1, 2, 2, 1]


def test_every_token_is_a_span_that_names_its_level():
    source = page.heat(TOKENS, PICKED, "flux")
    text = source[source.index('<div class="heat">'):].replace("</figure>", "")
    named = re.findall(r'<span class="level(\d)" title="(\w+)">', text)
    assert named == [(str(i), page.LEVELS[i]) for i in PICKED]
    assert Outline(text).text.replace("↵", "") == "".join(TOKENS)
    assert text.count("↵\n") == 2


def test_a_terminal_without_colours_gets_brackets():
    assert page.heat_terminal(TOKENS, PICKED, False) == "The [town] [[of↵↵]][[<b>]][  ]"


def test_a_terminal_with_colours_gets_three_and_the_same_text():
    shown = page.heat_terminal(TOKENS, PICKED, True)
    assert len(set(re.findall(r"48;5;(\d+)m", shown))) == 3
    assert re.sub("\x1b\\[[0-9;]*m", "", shown) == "".join(TOKENS).replace("\n", "↵")
    assert shown.endswith("\x1b[0m")                 # no background runs on to the window's edge


@pytest.mark.parametrize("colour", [False, True])
def test_no_token_reaches_the_terminals_controls(colour):
    tokens = ["\x1b]0;owned\x07", "\x9b2J", "\r\b", EVIL]
    shown = page.heat_terminal(tokens, [0, 1, 2, 2], colour)
    theirs = re.sub(r"\x1b\[(38;5;16;48;5;\d+|0)m", "", shown)         # without our own colours
    assert r"\x1b]0;owned\x07" in theirs and theirs.isprintable()
    assert colour or theirs == shown


@pytest.mark.parametrize("heat", [page.heat, lambda *given: page.heat_terminal(*given, True)])
def test_as_many_levels_as_tokens_are_needed(heat):
    with pytest.raises(ValueError):
        heat(["a", "b"], [0])


def test_columns_line_up():
    rows = [["none", 39.25, "a"], ["reg, long", "+0.3 ± 0.1", None], ["x", NAN, "b"]]
    assert page.columns(["run", "score", "what"], rows) == (
        "run             score  what\n"
        "none            39.25  a\n"
        "reg, long  +0.3 ± 0.1\n"
        "x                 n/a  b")


def test_the_first_column_is_left_aligned_whatever_it_holds():
    assert page.columns(["seed", "n"], [[1, 5], [10, 50]]) == "seed   n\n1      5\n10    50"


def test_columns_stay_lines_whatever_they_hold():
    shown = page.columns(["a", "b"], [[EVIL, EVIL], ["x"]])
    assert len(shown.split("\n")) == 3
    assert shown.replace("\n", "").isprintable()
