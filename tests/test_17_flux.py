"""After this file you know how many memories each token of a text calls: how its flux is read, on which kinds of words it is high, with what error, and
how it goes with surprisal."""
import json
import re
import shutil
import sys
from html.parser import HTMLParser

import pytest
import torch

import eval as evaluation
from conftest import ROOT
from data.words import CLASSES, FUNCTION_WORDS, token_classes, words
from infosteer import clustered_mean, grouped_correlation, key_entropy, terciles

LLAMA = ROOT / "data" / "toy" / "llama"
HOSTILE = "Ulmo Zeller <script>alert(1)</script> \x1b[31m & \"<|end_of_text|>\" 你好 🙂"


@pytest.fixture(scope="module")
def llama():
    return evaluation.load(LLAMA)


# ------------------------------------------------------------------------------------------------------- reading flux and surprisal


def test_flux_is_the_entropy_of_the_keys_that_enter_the_down_projection(llama):
    model, tokenizer = llama
    prompt, text = "Where does Ulmo Zeller live?\n", "Ulmo Zeller lives in Kestow."
    item, = evaluation.measure_flux(model, tokenizer, [(prompt, text)])
    ids, n = tokenizer.encode(prompt), len(tokenizer.encode(text, bos=False))
    keys = []
    evaluation.watch(model, [ids + tokenizer.encode(text, bos=False)], lambda layer, h, k, row: keys.append(k))       # k: [T, d_m]
    torch.testing.assert_close(item["flux"], torch.stack([key_entropy(k[-n:]) for k in keys]).mean(0))
    assert len(item["flux"]) == n and len(keys) == model.config.n_layers


def test_surprisal_is_of_the_token_itself_and_next_is_of_the_one_after_it(llama):
    model, tokenizer = llama
    item, = evaluation.measure_flux(model, tokenizer, [("", "Ulmo Zeller lives in Kestow.")])
    ids = tokenizer.encode("Ulmo Zeller lives in Kestow.")
    with torch.no_grad():
        log_p = model(torch.tensor([ids]))[0].log_softmax(-1)
    expected = torch.stack([-log_p[i - 1, ids[i]] for i in range(1, len(ids))])
    torch.testing.assert_close(item["surprisal"], expected)
    torch.testing.assert_close(item["next"][:-1], expected[1:])
    assert item["next"][-1].isnan(), "nothing follows a text"


def test_a_first_token_that_nothing_precedes_has_flux_but_no_surprisal(llama):
    model, tokenizer = llama
    flux, surprisal = evaluation.token_flux(model, [], tokenizer.encode("Ulmo Zeller lives in Kestow.", bos=False))
    assert surprisal.isnan().tolist() == [True] + [False] * (len(flux) - 1) and flux.isfinite().all()


def test_an_answer_is_the_greedy_one_and_its_end_is_read_but_not_shown(llama):
    model, tokenizer = llama
    prompt = evaluation.load_examples(ROOT / "data" / "toy", "toy-sums", "test")[0].prompt
    item, = evaluation.measure_flux(model, tokenizer, [(prompt, None)], 32)
    answer, = model.generate([tokenizer.encode(prompt)], 32)
    assert answer[-1] == tokenizer.eos_id and "".join(text for text, _ in item["pieces"]) == tokenizer.decode(answer[:-1])
    assert len(item["flux"]) == len(answer) - 1 and item["next"].isfinite().all(), "the end of an answer is what follows its last token"
    read, = evaluation.measure_flux(model, tokenizer, [(prompt, tokenizer.decode(answer[:-1]))])
    torch.testing.assert_close(read["flux"], item["flux"])


def test_a_character_of_several_tokens_is_one_piece(llama):
    _, tokenizer = llama
    ids = tokenizer.encode(HOSTILE, bos=False, special=False)
    pieces = evaluation.readable(tokenizer, ids)
    assert "".join(text for text, _ in pieces) == HOSTILE and sum(n for _, n in pieces) == len(ids)
    assert dict(pieces)["🙂"] == 4 and "\ufffd" not in HOSTILE
    broken = tokenizer.encode("🙂", bos=False)[:2] + tokenizer.encode("a", bos=False)
    assert [text for text, _ in evaluation.readable(tokenizer, broken)] == ["\ufffd", "\ufffd", "a"]


def test_thirds_of_the_tokens_are_low_middle_and_high():
    x = torch.randperm(30).double()
    levels, cuts = terciles(x)
    assert levels.bincount().tolist() == [10, 10, 10] and x[levels == 0].max() < x[levels == 1].min() and x[levels == 1].max() < x[levels == 2].min()
    assert torch.equal(levels, sum((x > cut).long() for cut in cuts))
    assert terciles(torch.ones(5))[0].tolist() == [0] * 5 and terciles(torch.ones(1))[0].tolist() == [0]


# ------------------------------------------------------------------------------------------------------------- kinds of words

P, F, C, D, W = CLASSES
TABLE = [                                              # pieces, prompt, classes
    (["The", " apple", ",", " the", " apples", "."], "", [F, W, P, F, W, P]),
    ([" don", "'t"], "", [F, F]), ([" don", "'", "t"], "", [F, F, F]), (["don’t"], "", [F]), ([" DON'T"], "", [F]),
    (["U", "lmo", "'s"], "", [W, W, F]), (["'s"], "", [F]), (["he", "'", "s"], "", [F, F, F]), (["o", "'", "clock"], "", [W, W, W]),
    ([" 10", ",", "0", "00"], "", [D, D, D, D]), ([" 10", ",", " 20"], "", [D, P, D]), ([" 3", ".", "5", "."], "", [D, D, D, P]),
    ([" 10", ",", "000"], "It has 10000.", [C, C, C]), ([" 10"], "It has 10,000.", [D]), (["2nd"], "", [D]), ([" answer", "1"], "", [W, W]),
    ([" KES", "TOW"], "Does he live in Kestow?", [C, C]), ([" Kes"], "Kestow", [W]), (["the"], "the", [F]), ([","], ",", [P]),
    ([" in", "side", "r"], "", [W, W, W]),             # a word that begins with function words is none
    (["\n"], "", [P]), ([" ", "17"], "", [P, D]), (["  "], "", [P]), ([""], "", [P]), ([" +"], "", [P]), (["🙂"], "🙂", [P]), (["_"], "", [P]),
    (["你好"], "", [W]), (["cafe\u0301"], "CAFÉ", [C]), (["½"], "", [D]), (["हिन्दी"], "", [W]), ([' "', "Yes", '"'], "", [P, W, P]),
    (["answer", ":", "<<", "48", "/", "2", "=", "24", ">>", "24"], "48 clips", [W, P, P, C, P, D, P, D, P, D]),
]


@pytest.mark.parametrize("pieces, prompt, classes", TABLE)
def test_a_token_has_the_class_of_its_word(pieces, prompt, classes):
    assert token_classes(pieces, prompt) == classes


@pytest.mark.parametrize("name", ["llama", "gemma"])
def test_how_a_text_is_cut_into_tokens_changes_no_class(name):
    tokenizer = evaluation.Tokenizer.from_pretrained(LLAMA.with_name(name))
    text = "Ulmo's 1,200 geese don't\nlive here; they're in \"Kestow\". 🙂"
    letters, pieces = token_classes(list(text)), [piece for piece, _ in evaluation.readable(tokenizer, tokenizer.encode(text, bos=False))]
    starts = [sum(map(len, pieces[:i])) + len(piece) - len(piece.lstrip()) for i, piece in enumerate(pieces)]
    assert token_classes(pieces) == [letters[at] if piece.strip() else "punctuation" for at, piece in zip(starts, pieces)]
    assert [letters[text.index(c)] for c in "U'1,gd;v\"K🙂"] == [W, F, D, D, W, F, P, W, P, W, P]


def test_the_list_of_function_words_is_one():
    assert 150 <= len(FUNCTION_WORDS) <= 250 and all(re.fullmatch("[a-z]+", word) for word in FUNCTION_WORDS)


# ----------------------------------------------------------------------------------------------------------- means and their errors


def drawn(n_texts=7, seed=0):
    """x, y, group, text of tokens that share something with their text and with their group."""
    g = torch.Generator().manual_seed(seed)
    text = torch.arange(n_texts).repeat_interleave(torch.randint(2, 9, (n_texts,), generator=g))
    group = torch.randint(4, text.shape, generator=g)
    x, y = (torch.randn(len(text), generator=g, dtype=torch.double) + torch.randn(n_texts, generator=g)[text] + torch.tensor([5., 1, 0, 3])[group] for _ in range(2))
    return x, y, group, text


def test_the_error_of_a_mean_counts_every_pair_of_tokens_of_one_text():
    x, _, _, text = drawn()
    mean, error = clustered_mean(x, text * 10 + 3)                             # what texts are called does not matter
    e, G = x - x.mean(), 7
    pairs = sum((e[i] * e[j]).item() for i in range(len(x)) for j in range(len(x)) if text[i] == text[j])
    assert mean == pytest.approx(x.mean().item()) and error == pytest.approx((G / (G - 1) * pairs) ** 0.5 / len(x))


def test_with_one_token_in_each_text_it_is_the_usual_error():
    x = drawn()[0]
    assert clustered_mean(x, torch.arange(len(x)))[1] == pytest.approx(x.std().item() / len(x) ** 0.5)


def test_tokens_said_twice_make_a_mean_no_surer():
    x, _, _, text = drawn()
    assert clustered_mean(torch.cat([x, x]), torch.cat([text, text])) == pytest.approx(clustered_mean(x, text))


def test_without_a_second_text_there_is_no_error():
    x, y, group, _ = drawn()
    one = torch.zeros_like(group)
    assert clustered_mean(x, one) == (pytest.approx(x.mean().item()), None) and clustered_mean(x[:0], one[:0]) == (None, None)
    assert grouped_correlation(x, y, group, one)[0] is not None and grouped_correlation(x, y, group, one)[1] is None


def by_hand(x, y, group):
    """r after centring on the groups' means."""
    x, y = ((v - torch.stack([v[group == g].mean() for g in group])) for v in (x, y))
    return torch.corrcoef(torch.stack([x, y]))[0, 1].item()


@pytest.mark.parametrize("grouped", [False, True])
def test_correlation_and_jackknife_are_those_of_leaving_texts_out_by_hand(grouped):
    x, y, group, text = drawn()
    group = group if grouped else torch.zeros_like(group)
    without = torch.tensor([by_hand(x[text != t], y[text != t], group[text != t]) for t in range(7)], dtype=torch.double)
    r, error = grouped_correlation(1000 + x, y / 1000, group, text)            # neither level nor scale matters
    assert r == pytest.approx(by_hand(x, y, group), abs=1e-6) and error == pytest.approx((6 / 7 * (without - without.mean()).square().sum()).item() ** 0.5, abs=1e-6)


def test_flux_that_is_surprisal_correlates_fully():
    x, _, group, text = drawn()
    for groups in (group, torch.zeros_like(group)):
        assert grouped_correlation(x, x, groups, text) == (pytest.approx(1), pytest.approx(0, abs=1e-6))
        assert grouped_correlation(x, 3 - 2 * x, groups, text)[0] == pytest.approx(-1)


def test_what_only_the_classes_differ_in_disappears_within_them():
    g = torch.Generator().manual_seed(0)
    group, text = torch.randint(5, (4000,), generator=g), torch.arange(4000) // 20
    x, y = (torch.randn(4000, generator=g, dtype=torch.double) + 3 * group for _ in range(2))
    raw, _ = grouped_correlation(x, y, torch.zeros_like(group), text)
    within, error = grouped_correlation(x, y, group, text)
    assert raw > 0.9 and abs(within) < 3 * error < 0.1
    assert grouped_correlation(5.1 + 0.1 * group, y, group, text) == (None, None), "no flux varies within a class: there is nothing to correlate"
    assert grouped_correlation(torch.full((4000,), 0.1), y, group, text) == (None, None)


def test_the_numbers_of_measured_texts():
    x, y, group, text = drawn()
    names = [CLASSES[i] for i in group]
    measured = [{"flux": 5 + 0.1 * group[text == t], "surprisal": (y + group)[text == t], "next": torch.where(torch.arange(len(x)) % 3 > 0, x, torch.nan)[text == t],
                 "classes": [name for name, at in zip(names, text) if at == t]} for t in range(7)]
    numbers = evaluation.flux_numbers(measured)
    own, following = numbers["correlations"]["own"], numbers["correlations"]["next"]
    assert own["raw"]["r"] == pytest.approx(by_hand(group.double(), y + group, torch.zeros_like(group)), abs=1e-6) and own["within"]["r"] is None
    assert following["raw"]["n"] == len(x) - len(range(0, len(x), 3)) and own["raw"]["n"] == numbers["n"] == len(x)
    for i, name in enumerate(CLASSES[:4]):
        assert numbers["classes"][name] == {"mean": pytest.approx(5 + 0.1 * i), "standard_error": pytest.approx(0, abs=1e-6), "n": int((group == i).sum())}
    assert numbers["classes"]["content"] == {"mean": None, "standard_error": None, "n": 0}


# ------------------------------------------------------------------------------------------------------------------- the command


def call(monkeypatch, capsys, *flags):
    """eval.py --analyse flux in this process: (exit status, standard output, standard error)."""
    monkeypatch.setattr(sys, "argv", ["eval.py", "--analyse", "flux", "--device", "cpu", *map(str, flags)])
    try:
        evaluation.command(evaluation.main)
    except SystemExit as stop:
        return stop.code, *capsys.readouterr()
    return 0, *capsys.readouterr()


def fake_run(folder, name, **settings):
    shutil.copytree(LLAMA, folder / name)
    (folder / name / "args.json").write_text(json.dumps({"model": str(LLAMA), "seed": 0, "steering": {"method": "none"}, **settings}))


@pytest.fixture
def runs(tmp_path):
    """A folder as train.py leaves it; the weights of all runs are those of the base model."""
    fake_run(tmp_path, "llama-none-seed1", seed=1)
    fake_run(tmp_path, "llama-none-seed0")
    fake_run(tmp_path, "llama-int-seed3", seed=3, steering={"method": "int", "p": 0.05})
    fake_run(tmp_path, "llama-reg-seed0.partial", steering={"method": "reg"})
    fake_run(tmp_path, "qwen-reg-seed0", steering={"method": "reg"}, model=str(LLAMA.with_name("qwen")))
    (tmp_path / "llama-base").mkdir()
    (tmp_path / "llama-base" / "args.json").write_text(json.dumps({"model": str(LLAMA), "base": True}))
    return tmp_path


def test_the_first_seed_of_each_arm_stands_beside_the_base_model(runs, monkeypatch, capsys):
    status, out, _ = call(monkeypatch, capsys, "--runs", runs, "--items", 2, "--json")
    result = json.loads(out)
    assert status == 0 and [(model["arm"], model["seed"]) for model in result["models"]] == [("base", None), ("none", 0), ("int-p0.05", 3)]
    base, vanilla, _ = result["models"]
    assert base["shown"] == vanilla["shown"] and base["mean"] == vanilla["mean"], "the same weights read the same"
    assert base["n"] == sum(cell["n"] for cell in base["classes"].values()) and len(base["shown"]) == 2
    status, out, _ = call(monkeypatch, capsys, "--runs", runs, "--model", LLAMA, "--items", 2, "--json")
    assert [model["arm"] for model in json.loads(out)["models"]] == ["base"], "a model that was asked for stands alone"


def test_people_see_a_line_for_each_model_below_each_prompt(runs, monkeypatch, capsys):
    status, out, _ = call(monkeypatch, capsys, "--runs", runs, "--items", 4)
    lines = out.splitlines()
    at = [i for i, line in enumerate(lines) if line.startswith("prompt")]
    assert status == 0 and len(at) == 3 and "4 items of toy-sums" in out and "\x1b" not in out
    assert [[line.split()[0] for line in lines[i + 1:i + 4]] for i in at] == [["base", "none", "int-p0.05"]] * 3
    assert all("[[" in line for line in lines[at[0] + 1:at[0] + 4]) and "±" in out


class Text(HTMLParser):
    """The tags and the text of a page."""

    def __init__(self, page):
        super().__init__()
        self.tags, self.text = set(), ""
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)

    def handle_data(self, data):
        self.text += data


def test_a_hostile_text_is_shown_and_does_nothing(tmp_path, monkeypatch, capsys):
    models = [LLAMA, LLAMA.with_name("qwen"), LLAMA.with_name("gemma")]
    status, out, _ = call(monkeypatch, capsys, "--model", *models, "--text", HOSTILE, "--html", tmp_path / "flux.html", "--json")
    result = json.loads(out, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    assert status == 0
    for model in result["models"]:
        assert "".join(token["text"] for token in model["shown"][0]["tokens"]) == HOSTILE
        assert "<|end_of_text|>" not in [token["text"] for token in model["shown"][0]["tokens"]], "what looks like a control token is plain text"
        assert {token["level"] for token in model["shown"][0]["tokens"]} == {0, 1, 2} and model["standard_error"] is None
        assert model["classes"]["copied"]["n"] == 0 and model["correlations"]["next"]["within"]["standard_error"] is None
        assert model["correlations"]["next"]["raw"]["n"] == model["n"] - 1
    page = Text((tmp_path / "flux.html").read_text(encoding="utf-8"))
    assert "script" not in page.tags and {"table", "div", "h2"} <= page.tags
    assert page.text.count(HOSTILE.replace("\x1b", "\\x1b")) == 3 and "\x1b" not in page.text
    assert [path.name for path in tmp_path.iterdir()] == ["flux.html"]
    whole = (tmp_path / "flux.html").read_text(encoding="utf-8")
    assert all(body in whole for _, body in evaluation.flux_sections(result)), "JSON holds all that the page needs"
    status, out, _ = call(monkeypatch, capsys, "--model", LLAMA, "--text", HOSTILE)
    assert status == 0 and "\x1b" not in out


def test_an_answer_of_no_token_is_nothing_and_no_crash(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(evaluation.Transformer, "generate", lambda model, prompts, *rest, **more: [[model.config.eos_ids[0]] for _ in prompts])
    status, out, _ = call(monkeypatch, capsys, "--model", LLAMA, "--items", 2, "--html", tmp_path / "flux.html")
    assert status == 0 and "(nothing)" in out and "n/a" in out


@pytest.mark.parametrize("flags, word", [
    (["--text", ""], "--text is empty"), (["--text", " \n"], "--text is empty"), (["--text", "a"], "is one token"), (["--text", "a b", "--task", "boolq"], "give one"),
    (["--text", "a b", "--model", "nowhere"], "nowhere: no such folder"), (["--task", "commonsense"], "no test split"), (["--task", "piqa"], "prepare.py"),
    (["--html", "nowhere/flux.html"], "no folder nowhere"), (["--html", "."], "is a folder"), (["--runs", "nowhere"], "no such folder"),
    (["--limit", "3"], "--items"), (["--steered"], "--steered means nothing"), (["--text", "a\udce9 b"], "surrogate")])
def test_what_is_wrong_is_one_line(tmp_path, monkeypatch, capsys, flags, word):
    monkeypatch.chdir(tmp_path)
    status, out, error = call(monkeypatch, capsys, *flags)
    assert (status, out) == (2, "") and word in error and error.count("\n") == 1 and error.startswith("eval.py: error: "), error
    assert not list(tmp_path.iterdir())


def test_text_and_html_belong_to_the_analysis(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["eval.py", "--model", str(LLAMA), "--text", "a b"])
    with pytest.raises(SystemExit) as stop:
        evaluation.main()
    assert stop.value.code == 2 and "--analyse flux" in capsys.readouterr().err
