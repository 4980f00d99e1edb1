"""After this file you know what the page about a folder of runs shows, and what it must not say."""
import contextlib
import html.parser
import io
import json
import re
import shutil

import pytest

from data import BadInput
from eval import with_error
from helpers import checkpoint_folder, write_task
from lab.experiment import main as experiment
from lab.report import claims, claims_section, main, report, verdict
from lab.stats import compare, difference, estimate, find_runs

HEADINGS = ["What was run", "What the paper claims, and what is seen here", "Accuracy",
            "Suite by suite", "Task by task (the paper's Fig. 3)", "Training",
            "Key regions (the paper's Fig. 4)", "Flux, token by token",
            "Mean flux of kinds of words", "Clear memories"]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A folder of runs of a tiny model, which lies beside it."""
    folder = tmp_path_factory.mktemp("report")
    model, data = checkpoint_folder(folder / "tiny"), folder / "data"
    questions = [(f"is {n} even?", "true" if n % 2 == 0 else "false") for n in range(12)]
    write_task(data, "boolq", "train", questions)
    write_task(data, "boolq", "test", questions[:6])
    argv = ["--steer", "none", "int", "reg", "--seed", "0", "1", "--model", model, "--task",
            "boolq", "--data", data, "--steps", "2", "--batch", "4", "--device", "cpu", "--out",
            folder / "out"]
    with contextlib.redirect_stdout(io.StringIO()):
        experiment([str(one) for one in argv])
    return folder / "out"


class Page(html.parser.HTMLParser):
    """Collects what a page would ask of somebody else, and its headings."""

    def __init__(self, text):
        super().__init__()
        self.asked, self.headings, self.inside = [], [], None
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.inside = tag
        if tag in ("script", "link", "img", "iframe", "object"):
            self.asked.append(tag)
        self.asked += [value for name, value in attributes
                       if name in ("src", "href", "srcset", "action") and value[:1] != "#"]

    def handle_data(self, text):
        if self.inside == "h2" and text.strip():
            self.headings.append(text.strip())


def test_the_report_shows_everything_and_asks_nobody(made, tmp_path, capsys):
    folder = tmp_path / "<script>alert(1)</script>"
    shutil.copytree(made, folder)
    main([str(folder), "--device", "cpu"])
    assert "report.html: open it in a browser" in capsys.readouterr().out
    text = (folder / "report.html").read_text(encoding="utf-8")
    page = Page(text)
    assert [heading for heading in page.headings if heading in HEADINGS] == HEADINGS
    assert not page.asked and "<script" not in text
    assert "://" not in re.sub(r'xmlns="[^"]*"', "", text)
    for row in compare(find_runs(folder)):
        assert with_error(row["mean"], row["standard_error"]) in text
        assert f"{row['nll']:.3f} ± " * (row["seeds"] > 1) in text
        assert difference(row) in text and difference(row, "nll_") in text
    for run in find_runs(folder):
        assert html.escape(run["settings"].get("command", "")) in text


def test_without_the_base_model_the_page_says_so_and_shows_the_rest(made, tmp_path):
    shutil.copytree(made, tmp_path / "out")
    for path in (tmp_path / "out").glob("*/args.json"):
        path.write_text(json.dumps({**json.loads(path.read_text()), "model": "gone/away"}))
    text = report(tmp_path / "out", find_runs(tmp_path / "out"))
    headings = Page(text).headings
    assert headings == HEADINGS[:6] + ["Memories"]
    assert "is not at gone/away" in text


def test_another_model_at_the_same_place_is_not_the_base_model(made, tmp_path):
    shutil.copytree(made, tmp_path / "out")
    for path in (tmp_path / "out").glob("*/args.json"):
        path.write_text(json.dumps({**json.loads(path.read_text()), "model_sha256": "another"}))
    text = report(tmp_path / "out", find_runs(tmp_path / "out"))
    assert "What memories do cannot be shown" in text


def test_runs_of_two_models_have_sections_of_their_own(made, tmp_path):
    shutil.copytree(made, tmp_path / "out")
    for name in ("tiny-none-seed0", "tiny-int-seed0"):
        path = tmp_path / "out" / name / "args.json"
        settings = {**json.loads(path.read_text()), "model_sha256": "another", "model": "gone/away"}
        path.write_text(json.dumps(settings))
    headings = Page(report(tmp_path / "out", find_runs(tmp_path / "out"))).headings
    assert "gone/away: Accuracy" in headings and headings.count("gone/away: Memories") == 1
    assert len([heading for heading in headings if heading.endswith(": Accuracy")]) == 2


@pytest.mark.parametrize("folder, message", [(".", "no scored run"), ("nowhere", "no such folder")])
def test_a_report_about_nothing_is_refused(tmp_path, folder, message):
    with pytest.raises(BadInput, match=message):
        main([str(tmp_path / folder)])
    assert not list(tmp_path.iterdir())


# ------------------------------------------------------------------------------------ claims


def test_a_verdict_follows_the_corrected_p_and_the_sign_of_the_claim():
    assert verdict(2, 0.05) == verdict(2, 1) == verdict(2, None) == "not shown"
    assert verdict(0.1, 0.04) == verdict(-0.2, 0.04, -1) == "as claimed"
    assert verdict(-0.2, 0.04) == verdict(0.1, 0.04, -1) == "the opposite"


def row(arm, mean, low=None, high=None, holm=None, against="none"):
    found = {"seeds and items": {"mean": mean, "low": low, "high": high}}
    level = "seeds and items" if low is not None else None
    nothing = {"nll_difference": None}
    return {"arm": arm, "suite": "s", "against": against, "difference": mean, "holm": holm,
            "level": level, "levels": {**found, "seeds": found["seeds and items"]}, **nothing}


def test_accuracies_are_compared_with_plain_fine_tuning_after_holm_s_correction():
    found = claims([row("none", None), row("int-value", 0.02, 0.01, 0.03, 0.01),
                    row("int", 0.02, 0.001, 0.03, 0.3),        # one of many: not shown
                    row("reg", 0.02), row("surrogate", 0.02, 0.01, 0.03, 0),
                    row("int-value (a copy)", 0.02, 0.01, 0.03, 0)], None, None)
    assert [line[1:] for line in found] == [
        ["int-value, s", "+2.0 [+1.0, +3.0]", "as claimed"],
        ["int, s", "+2.0 [+0.1, +3.0]", "not shown"],
        ["reg, s", "+2.0 (one seed)", "not shown"]]


def test_controls_and_rivals_are_judged_and_int_against_its_control():
    found = claims([row("int-random", 0.02, 0.01, 0.03, 0.01),
                    row("none-anchor=70", -0.02, -0.03, -0.01, 0.01),
                    row("knowledge-entropy", 0.01, -0.01, 0.03, 1),
                    row("int", 0.01, 0.001, 0.02, 0.02, "int-random"),
                    row("int-random", None, against="int-random")], None, None)
    rival = "A control or rival beats plain fine-tuning (not in the paper)"
    assert [(line[0], line[1], line[3]) for line in found] == [
        (rival, "int-random, s", "as claimed"), (rival, "none-anchor=70, s", "the opposite"),
        (rival, "knowledge-entropy, s", "not shown"),
        ("Raising the smallest coefficients beats raising random ones (not in the paper)",
         "int, s", "as claimed")]


def test_a_smaller_loss_is_better():
    better = {**row("reg", None), **{f"nll_{name}": value for name, value in row(
        "reg", -0.02, -0.03, -0.01, 0.001).items()}}
    line, = claims([better], None, None)
    assert line[1:] == ["reg, s, nll", "-0.020 [-0.030, -0.010]", "as claimed"]


def shares(low, high):
    """Shares of the regions, of |k| and of k; the claims are about |k|."""
    return [[low, 1 - low - high, high], [0.25, 0.5, 0.25]]


def test_regions_are_compared_seed_by_seed_with_base_and_plain_fine_tuning():
    arms = {"base": {None: shares(0.25, 0.25)},
            "none": {0: shares(0.30, 0.25), 1: shares(0.40, 0.25), 2: shares(0.9, 0.1)},
            "int": {1: shares(0.35, 0.25), 0: shares(0.25, 0.25)}}         # in another order
    found = claims([], {"arms": {arm: {"by_seed": of} for arm, of in arms.items()}}, None)
    lines = {(line[0], line[1]): line[2:] for line in found}
    out_of_low = "int moves coefficients out of the low region (Fig. 4)"
    assert lines[out_of_low, "int against none"] == ["-5.0 [-5.0, -5.0]", "as claimed"]
    assert lines[out_of_low, "int against base"] == ["+5.0 [-58.5, +68.5]", "not shown"]
    assert not any("none against none" in where for _, where in lines)
    into_low = "Plain fine-tuning moves coefficients into the low region (Fig. 4)"
    (text, said), alone = lines[into_low, "none against base"], {"none": arms["none"]}
    assert text.startswith("+28.3 [") and said == "not shown"
    assert claims([], {"arms": {arm: {"by_seed": of} for arm, of in alone.items()}}, None) == []


def test_the_flux_of_content_words_is_compared_with_that_of_others_text_by_text():
    def words(n):
        return {"mean": 5.0, "standard_error": 0.01, "n": n}

    def gap(mean, error):
        return {"texts": 40, **estimate(mean, [(error**2, 39)])}

    classes = {"content": words(90), "punctuation": words(30), "function": words(50),
               "copied": words(29), "digits": {"mean": None, "standard_error": None, "n": 0}}
    here = {"classes": classes, "content_against": {
        "punctuation": gap(1.0, 0.1), "function": gap(-0.01, 0.1), "copied": gap(9.0, 0.1)}}
    fed = {"classes": classes, "content_against": {
        "punctuation": gap(-1.0, 0.1), "function": gap(0.22, 0.1), "copied": gap(9.0, 0.1)}}
    found = claims([], None, {"models": [{"title": "base", "generating": here, "fed": fed}]})
    lines = {(line[0].split()[6], line[1].split()[-1]): line[2:] for line in found}
    assert lines["punctuation", "generating"] == [
        "+1.000 [+0.798, +1.202] nats in 40 texts", "as claimed"]
    assert lines["punctuation", "fed"][1] == "the opposite"
    # p is 0.03 of the last one, and 0.07 after the correction for four comparisons
    assert lines["function", "fed"] == ["+0.220 [+0.018, +0.422] nats in 40 texts", "not shown"]
    assert lines["words", "fed"] == lines["words", "generating"] == ["", "too few tokens (29)"]
    classes["copied"]["n"] = 30
    here["content_against"]["copied"] = {"texts": 1, **estimate(9.0, [])}
    found = claims([], None, {"models": [{"title": "base", "generating": here, "fed": here}]})
    assert found[0][3] == "too few texts that have both"


def test_every_comparison_is_counted():
    found = [["a claim", "here", "+1", "not shown"], ["a claim", "there", "+2", "as claimed"],
             ["a claim", "elsewhere", "", "too few tokens (3)"]]
    text = re.sub("<[^>]*>", " ", claims_section(found))
    assert re.search(r"a claim\s+2\s+1\s+0\s+1\s", text)
