"""After this file you know how many memories each token of a text activates: how its flux is read,
on which kinds of words it is high, with what error, and how it goes with surprisal."""
import json
import re
import shutil
from html.parser import HTMLParser

import pytest
import torch

from conftest import ROOT
from data import command
from data.tasks import load as load_examples
from eval import keys_of, load, which_model
from helpers import checkpoint_folder
from infosteer import Steering, key_entropy
from lab.flux import (POSITIONS, arm_of, first_runs, flux_numbers, flux_of, flux_sections, main,
                      measure_flux, readable, token_flux)
from lab.stats import runs_from
from lab.words import CLASSES

LLAMA = ROOT / "data" / "toy" / "llama"
TEXT = "Ulmo Zeller lives in Kestow."
HOSTILE = "Ulmo Zeller <script>alert(1)</script> \x1b[31m & \"<|end_of_text|>\" 你好 🙂"


@pytest.fixture(scope="module")
def llama():
    return load(LLAMA)


# --------------------------------------------------------------- reading flux and surprisal


def test_flux_is_the_entropy_of_the_key_coefficients_averaged_over_layers(llama):
    model, tokenizer = llama
    prompt = "Where does Ulmo Zeller live?\n"
    item, = measure_flux(model, tokenizer, [(prompt, TEXT)])
    ids, n = tokenizer.encode(prompt), len(tokenizer.encode(TEXT, bos=False))
    [keys] = keys_of(model, [ids + tokenizer.encode(TEXT, bos=False)])         # of each layer
    expected = torch.stack([key_entropy(k) for k in keys]).mean(0)                 # [P + n]
    assert len(keys) == model.config.n_layers
    torch.testing.assert_close(item["fed"], expected[-n:])
    torch.testing.assert_close(item["generating"], expected[-n - 1:-1])


def test_a_token_is_generated_where_the_one_before_it_is_fed(llama):
    """By a loop: after each prefix, the model predicts the next token at its last position."""
    model, tokenizer = llama
    prompt, text = "Where does Ulmo live?\n", "Ulmo lives in Kestow."
    before, ids = tokenizer.encode(prompt), tokenizer.encode(text, bos=False)
    item, = measure_flux(model, tokenizer, [(prompt, text)])
    for i, id in enumerate(ids):
        for position, prefix in (("generating", before + ids[:i]), ("fed", before + ids[:i + 1])):
            [keys] = keys_of(model, [prefix])
            flux = sum(key_entropy(k[-1]).item() for k in keys) / len(keys)
            assert item[position][i].item() == pytest.approx(flux, abs=1e-4)
        with torch.no_grad():
            own = -model(torch.tensor([before + ids[:i]]))[0, -1].log_softmax(-1)[id].item()
        assert item["surprisal"][i].item() == pytest.approx(own, abs=1e-4)


@pytest.mark.parametrize("keeps", [Steering("int", p=0.3, alpha=3.0), Steering("reg", lam=0.05)])
def test_a_steered_flux_is_of_the_keys_as_they_were_changed(llama, keeps):
    model, tokenizer = llama
    item, = measure_flux(model, tokenizer, [("", TEXT)], steering=keeps)
    [keys] = keys_of(model, [tokenizer.encode(TEXT)], keeps)
    expected = torch.stack([key_entropy(k) for k in keys]).mean(0)
    torch.testing.assert_close(item["fed"], expected[1:])
    plain, = measure_flux(model, tokenizer, [("", TEXT)])
    assert torch.equal(item["fed"], plain["fed"]) == (keeps.method == "reg")


def test_surprisal_is_of_the_token_itself(llama):
    model, tokenizer = llama
    item, = measure_flux(model, tokenizer, [("", TEXT)])
    ids = tokenizer.encode(TEXT)
    with torch.no_grad():
        log_p = model(torch.tensor([ids]))[0].log_softmax(-1)
    expected = torch.stack([-log_p[i - 1, ids[i]] for i in range(1, len(ids))])
    torch.testing.assert_close(item["surprisal"], expected)


def test_the_very_first_place_is_not_read(llama):
    model, tokenizer = llama
    ids = tokenizer.encode(TEXT, bos=False)
    for prompt, fed, generating, own in (([], 1, 2, 1), ([5], 0, 1, 0), ([5, 6], 0, 0, 0)):
        flux, surprisal = token_flux(model, prompt, ids)
        for values, unknown in ((flux["fed"], fed), (flux["generating"], generating),
                                (surprisal, own)):
            assert values.isnan().tolist() == [True] * unknown + [False] * (len(ids) - unknown)
        torch.testing.assert_close(flux["generating"][1:], flux["fed"][:-1], equal_nan=True)


def test_such_a_token_is_shown_as_not_measured_and_is_in_no_mean(tmp_path, capsys):
    """Qwen's tokenizer puts no beginning of text before a text; the toy Qwen's puts one."""
    folder = checkpoint_folder(tmp_path / "model", "qwen2")
    status, out, _ = call(capsys, "--model", folder, "--text", "a b c", "--json")
    [model] = json.loads(out)["models"]
    tokens = model["shown"][0]["tokens"]
    assert status == 0 and {token["tokens"] for token in tokens} == {1}
    for key, lost in (("generating", 2), ("fed", 1)):
        values = [token[key] for token in tokens]
        assert values[:lost] == [None] * lost and None not in values[lost:]
        assert model[key]["n"] == len(values[lost:])
        assert model[key]["mean"] == pytest.approx(sum(values[lost:]) / len(values[lost:]))
        _, out, _ = call(capsys, "--model", folder, "--text", "a b c", "--position", key)
        assert out.split("base    ")[1].startswith("(a)")
    assert [token["level"] == 3 for token in tokens] == [True] * 2 + [False] * (len(tokens) - 2)


def test_an_answer_is_the_greedy_one_and_its_end_is_read_but_not_shown(llama):
    model, tokenizer = llama
    prompt = load_examples(ROOT / "data" / "toy", "toy-sums", "test")[0].prompt
    item, = measure_flux(model, tokenizer, [(prompt, None)], 32)
    answer, = model.generate([tokenizer.encode(prompt)], 32)
    text = tokenizer.decode(answer[:-1])
    assert answer[-1] == tokenizer.eos_id
    assert "".join(piece["text"] for piece in item["pieces"]) == text
    assert len(item["fed"]) == len(item["generating"]) == len(answer) - 1
    read, = measure_flux(model, tokenizer, [(prompt, text)])
    torch.testing.assert_close(read["fed"], item["fed"])
    torch.testing.assert_close(read["generating"], item["generating"])


def test_an_answer_that_was_cut_is_shown_whole(llama):
    model, tokenizer = llama
    prompt = load_examples(ROOT / "data" / "toy", "toy-sums", "test")[0].prompt
    item, = measure_flux(model, tokenizer, [(prompt, None)], 3)
    assert len(item["fed"]) == 3 and sum(piece["tokens"] for piece in item["pieces"]) == 3


def test_what_stands_in_the_prompt_is_copied(llama):
    item, = measure_flux(*llama, [("Where does Ulmo Zeller live?\n", TEXT)])
    classes = {piece["text"].strip(): piece["class"] for piece in item["pieces"]}
    assert classes["Zeller"] == "copied" and classes["Kestow"] == "content"


def test_texts_and_answers_mix_in_any_order(llama):
    model, tokenizer = llama
    asked = [(example.prompt, None)
             for example in load_examples(ROOT / "data" / "toy", "toy-sums", "test")[:2]]
    together = measure_flux(model, tokenizer, [asked[0], ("", TEXT), asked[1]])
    alone = measure_flux(model, tokenizer, [("", TEXT), *asked])
    assert [item["pieces"] for item in together] == [alone[i]["pieces"] for i in (1, 0, 2)]


def test_a_character_of_several_tokens_is_one_piece(llama):
    _, tokenizer = llama
    ids = tokenizer.encode(HOSTILE, bos=False, special=False)
    pieces = readable(tokenizer, ids)
    assert "".join(text for text, _ in pieces) == HOSTILE
    assert sum(n for _, n in pieces) == len(ids)
    assert dict(pieces)["🙂"] == 4


def test_bytes_of_no_character_are_pieces_of_their_own(llama):
    _, tokenizer = llama
    broken = tokenizer.encode("🙂", bos=False)[:2] + tokenizer.encode("a", bos=False)
    assert [text for text, _ in readable(tokenizer, broken)] == ["\ufffd", "\ufffd", "a"]


def test_a_piece_has_the_mean_flux_of_its_tokens(llama):
    item, = measure_flux(*llama, [("", "🙂 Ulmo 🙂 lives")])
    start = 0
    for piece in item["pieces"]:
        for at in POSITIONS:
            flux = item[at][start:start + piece["tokens"]]
            if start == 0 and at == "generating":
                assert flux[0].isnan()
                flux = flux[1:]
            assert piece[at] == pytest.approx(flux.mean().item())
        start += piece["tokens"]
    assert start == len(item["fed"])


# ----------------------------------------------------------------------------- the numbers


def correlation(x, y):
    return torch.corrcoef(torch.stack([x, y]))[0, 1].item()


def test_the_numbers_of_measured_texts():
    g = torch.Generator().manual_seed(0)
    text = torch.arange(7).repeat_interleave(torch.randint(2, 9, (7,), generator=g))
    N, group = len(text), torch.randint(4, text.shape, generator=g)
    flux = (5 + 0.1 * group).double()
    own = torch.randn(N, generator=g, dtype=torch.double) + group
    unknown = torch.arange(N) % 3 == 0
    surprisal = torch.where(unknown, torch.nan, own)
    measured = []
    for t in range(7):
        here = text == t
        pieces = [{"class": CLASSES[i], "tokens": 1} for i in group[here]]
        measured.append({"fed": flux[here], "surprisal": surprisal[here], "pieces": pieces})
    numbers = flux_numbers(measured, "fed")
    assert numbers["n"] == N and numbers["mean"] == pytest.approx(flux.mean().item())
    raw, within = numbers["correlations"].values()
    expected = correlation(flux[~unknown], own[~unknown])
    assert raw["r"] == pytest.approx(expected, abs=1e-6) and raw["n"] == int((~unknown).sum())
    assert within["r"] is None, "no flux varies within a class"
    for i, name in enumerate(CLASSES[:4]):
        cell = numbers["classes"][name]
        assert cell["mean"] == pytest.approx(5 + 0.1 * i)
        assert cell["standard_error"] == pytest.approx(0, abs=1e-6)
        assert cell["n"] == int((group == i).sum())
    assert numbers["classes"]["content"] == {"mean": None, "standard_error": None, "n": 0}


def test_a_piece_of_several_tokens_counts_as_several():
    flux = torch.tensor([1.0, 2.0, 6.0])
    item = {"generating": flux, "surprisal": flux,
            "pieces": [{"class": "content", "tokens": 2}, {"class": "digits", "tokens": 1}]}
    classes = flux_numbers([item], "generating")["classes"]
    assert (classes["content"]["mean"], classes["content"]["n"]) == (1.5, 2)
    assert (classes["digits"]["mean"], classes["digits"]["n"]) == (6, 1)


def test_content_words_are_compared_with_others_within_each_text_that_has_both():
    """Texts differ by whole nats, content and function words by 0.1, 0.2 and 0.6 in each."""
    words = {"content": [[5.0, 5.2], [1.0], [9.0], [7.0]],
             "function": [[5.0], [0.7, 0.9], [8.4], []], "copied": [[], [], [], [1.0, 2.0]]}
    measured = []
    for t in range(4):
        pieces = [{"class": name, "tokens": 1} for name in words for _ in words[name][t]]
        flux = torch.tensor([x for name in words for x in words[name][t]] + [torch.nan]).double()
        measured.append({"fed": flux, "surprisal": flux,
                         "pieces": [*pieces, {"class": "function", "tokens": 1}]})
    found = flux_numbers(measured, "fed")["content_against"]
    assert list(found) == ["punctuation", "function", "copied", "digits"]
    # mean 0.3, variance (0.2^2 + 0.1^2 + 0.3^2) / 2 = 0.07; t is 4.3027
    half = 4.3027 * (0.07 / 3) ** 0.5
    assert found["function"]["texts"] == 3 and found["function"]["mean"] == pytest.approx(0.3)
    assert found["function"]["high"] == pytest.approx(0.3 + half, abs=1e-4)
    assert found["copied"]["texts"] == 1 and found["copied"]["mean"] == pytest.approx(5.5)
    assert found["digits"]["texts"] == 0 and found["copied"]["p"] is found["digits"]["p"] is None


@pytest.mark.parametrize("position", POSITIONS)
def test_levels_are_thirds_of_a_model_s_own_tokens(position):
    items = [("", TEXT), ("", "The town of Ulmo Zeller is Kestow.")]
    result = flux_of([LLAMA], items, position=position)
    [model] = result["models"]
    low, high = model[position]["cuts"]
    tokens = [token for item in model["shown"] for token in item["tokens"]]
    assert [token["level"] == 3 for token in tokens].count(True) == 2 * (position == "generating")
    read = [token for token in tokens if token[position] is not None]
    for token in read:
        assert token["level"] == (token[position] > low) + (token[position] > high)
    levels = [token["level"] for token in read]
    assert max(levels.count(i) for i in range(3)) - min(levels.count(i) for i in range(3)) <= 1


# ----------------------------------------------------------------------------- the command


def call(capsys, *flags):
    """python -m lab.flux in this process: (exit status, standard output, standard error)."""
    argv = ["--device", "cpu", *map(str, flags)]
    try:
        command(lambda: main(argv))
    except SystemExit as stop:
        return stop.code, *capsys.readouterr()
    return 0, *capsys.readouterr()


def fake_run(folder, name, model=LLAMA, **settings):
    """A run as train.py leaves it, whose weights are still those of the base model."""
    shutil.copytree(LLAMA, folder / name, ignore=shutil.ignore_patterns("pretraining.json"))
    settings = {"model": str(model), "model_sha256": which_model(model), "seed": 0,
                "steering": {"method": "none"}, **settings}
    (folder / name / "args.json").write_text(json.dumps(settings))


@pytest.fixture
def runs(tmp_path):
    """Runs from two models, one of them unfinished, and the scores of a base model."""
    steering = {"method": "int", "p": 0.05}
    fake_run(tmp_path, "llama-none-seed1", seed=1)
    fake_run(tmp_path, "llama-none-seed0")
    fake_run(tmp_path, "llama-int-seed3", seed=3, steering=steering)
    fake_run(tmp_path, "llama-reg-seed0.partial", steering={"method": "reg"})
    fake_run(tmp_path, "qwen-reg-seed0", LLAMA.with_name("qwen"), steering={"method": "reg"})
    (tmp_path / "llama-base").mkdir()
    about = {"model": str(LLAMA), "model_sha256": which_model(LLAMA), "base": True}
    (tmp_path / "llama-base" / "args.json").write_text(json.dumps(about))
    return tmp_path


def test_the_first_seed_of_each_arm_is_taken_plain_fine_tuning_first(runs):
    found = first_runs(runs_from(runs, LLAMA))
    assert list(found) == ["none", "int-p0.05"]
    names = [run.rsplit("/", 1)[-1] for run in found.values()]
    assert names == ["llama-none-seed0", "llama-int-seed3"]
    assert [arm_of(runs / name) for name in names] == [("none", 0), ("int-p0.05", 3)]


def test_a_model_that_ships_is_a_base_model():
    assert arm_of(LLAMA) == ("base", None)


def test_the_first_seed_of_each_arm_stands_beside_the_base_model(runs, capsys):
    status, out, _ = call(capsys, "--runs", runs, "--items", 2, "--json")
    models = json.loads(out)["models"]
    assert status == 0
    assert [(model["arm"], model["seed"]) for model in models] == [
        ("base", None), ("none", 0), ("int-p0.05", 3)]
    base, plain, _ = models
    for at in POSITIONS:
        assert base[at] == plain[at], "the same weights"
        assert base[at]["n"] == sum(cell["n"] for cell in base[at]["classes"].values())
    assert base["shown"] == plain["shown"]
    assert len(base["shown"]) == 2


def test_a_model_that_was_asked_for_stands_alone(tmp_path, monkeypatch, capsys):
    fake_run(tmp_path, "out/llama-reg-seed0", steering={"method": "reg"})
    monkeypatch.chdir(tmp_path)
    _, out, _ = call(capsys, "--model", LLAMA, "--items", 1, "--json")
    assert [model["arm"] for model in json.loads(out)["models"]] == ["base"]
    _, out, _ = call(capsys, "--items", 1, "--json")
    assert [model["arm"] for model in json.loads(out)["models"]] == ["base", "reg"]


def test_two_models_of_one_arm_are_told_apart(capsys):
    models = [LLAMA, LLAMA.with_name("qwen")]
    _, out, _ = call(capsys, "--model", *models, "--text", "a b c", "--json")
    titles = [model["title"] for model in json.loads(out)["models"]]
    assert titles == [f"base ({model})" for model in models]


def test_people_see_a_line_for_each_model_below_each_prompt(runs, capsys):
    status, out, _ = call(capsys, "--runs", runs, "--items", 4)
    lines = out.splitlines()
    at = [i for i, line in enumerate(lines) if line.startswith("prompt")]
    assert status == 0 and len(at) == 3
    assert "4 items of toy-sums" in out and "±" in out and "\x1b" not in out
    for i in at:
        assert [line.split()[0] for line in lines[i + 1:i + 4]] == ["base", "none", "int-p0.05"]
    assert all("[[" in line for line in lines[at[0] + 1:at[0] + 4])


def test_tasks_take_turns_and_have_a_table(capsys):
    flags = ["--model", LLAMA, "--task", "toy-sums,toy-cloze", "--items", 3]
    _, out, _ = call(capsys, *flags)
    prompts = [load_examples(ROOT / "data" / "toy", name, "test")[i].prompt.rstrip()
               for i, name in ((0, "toy-sums"), (0, "toy-cloze"), (1, "toy-sums"))]
    shown = [line.split(maxsplit=1)[1] for line in out.splitlines() if line[:7] == "prompt "]
    assert shown == [prompt.replace("\n", "↵") for prompt in prompts]
    assert re.search(r"model +position +toy-sums +toy-cloze\nbase +generating +\d\.\d{3} ± ", out)
    [model] = json.loads(call(capsys, *flags, "--json")[1])["models"]
    for at in POSITIONS:
        parts = [of[at] for of in model["tasks"].values()]
        total = sum(part["mean"] * part["n"] for part in parts)
        assert total / sum(part["n"] for part in parts) == pytest.approx(model[at]["mean"])
    [alone] = json.loads(call(capsys, *flags[:3], "toy-cloze", *flags[4:], "--json")[1])["models"]
    assert alone["fed"]["mean"] == pytest.approx(model["tasks"]["toy-cloze"]["fed"]["mean"])


def test_a_prompt_of_one_s_own_is_answered(capsys):
    prompt = "Where does Ulmo Zeller live?\n"
    _, out, _ = call(capsys, "--model", LLAMA, "--prompt", prompt, "--max-new-tokens", 5)
    model, tokenizer = load(LLAMA)
    answer, = model.generate([tokenizer.encode(prompt)], 5)
    shown = next(line for line in out.splitlines() if line.startswith("base "))
    assert "prompt  Where does Ulmo Zeller live?" in out and "own greedy answer." in out
    text = tokenizer.decode(answer).lstrip().replace("\n", "↵")
    assert re.sub(r"^base +|[\[\]]", "", shown) == text


def test_a_run_keeps_its_steering_when_asked_to(runs, capsys):
    flags = ["--items", 2, "--json", "--runs", runs]
    plain, steered = (json.loads(call(capsys, *flags, *more)[1])["models"]
                      for more in ([], ["--steered"]))
    assert [model["title"] for model in steered] == ["base", "none", "int-p0.05, steered"]
    assert plain[:2] == steered[:2] and plain[2]["fed"] == plain[0]["fed"]
    assert plain[2]["fed"]["mean"] != steered[2]["fed"]["mean"]
    status, _, error = call(capsys, "--model", LLAMA, "--text", TEXT, "--steered")
    assert status == 2 and "--steered: none of these models was trained with" in error


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


def test_a_hostile_text_is_shown_and_does_nothing(tmp_path, capsys):
    models = [LLAMA, LLAMA.with_name("qwen"), LLAMA.with_name("gemma")]
    path = tmp_path / "flux.html"
    status, out, _ = call(capsys, "--model", *models, "--text", HOSTILE, "--html", path, "--json")
    result = json.loads(out, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    assert status == 0 and list(tmp_path.iterdir()) == [path]
    for model in result["models"]:
        tokens = model["shown"][0]["tokens"]
        texts = [token["text"] for token in tokens]
        assert "".join(texts) == HOSTILE
        assert "<|end_of_text|>" not in texts, "what looks like a control token is plain text"
        assert {token["level"] for token in tokens[1:]} == {0, 1, 2} and tokens[0]["level"] == 3
        for numbers in (model[at] for at in POSITIONS):
            assert numbers["standard_error"] is None and numbers["classes"]["copied"]["n"] == 0
            assert numbers["correlations"]["within"]["standard_error"] is None
            assert numbers["correlations"]["raw"]["n"] == numbers["n"]
    whole = path.read_text(encoding="utf-8")
    page = Text(whole)
    assert "script" not in page.tags and {"table", "div", "h2"} <= page.tags
    assert page.text.count(HOSTILE.replace("\x1b", "\\x1b")) == 3 and "\x1b" not in page.text
    assert all(body in whole for _, body in flux_sections(result)), "JSON holds all of the page"


def test_a_hostile_text_does_nothing_in_a_terminal_either(capsys):
    status, out, _ = call(capsys, "--model", LLAMA, "--text", HOSTILE)
    assert status == 0 and "\x1b" not in out and "\\x1b" in re.sub(r"[\[\] ]", "", out)


def test_an_answer_of_no_token_is_nothing_and_no_crash(tmp_path, capsys):
    """A model of which every logit is 0 says token 0, and here that token ends an answer."""
    model, _ = load(LLAMA)
    with torch.no_grad():
        model.norm.weight.zero_()
    silent = shutil.copytree(LLAMA, tmp_path / "silent")
    model.save_pretrained(silent)
    config = json.loads((silent / "config.json").read_text())
    (silent / "config.json").write_text(json.dumps({**config, "eos_token_id": [0]}))
    flags = ["--model", silent, "--items", 2, "--html", tmp_path / "flux.html"]
    status, out, _ = call(capsys, *flags)
    assert status == 0 and "(nothing)" in out and "n/a" in out
    assert "(nothing)" in (tmp_path / "flux.html").read_text(encoding="utf-8")


def test_weights_that_are_no_numbers_are_named(tmp_path, capsys):
    model, _ = load(LLAMA)
    with torch.no_grad():
        model.blocks[1].memory.values.weight.fill_(torch.nan)
    broken = shutil.copytree(LLAMA, tmp_path / "broken")
    model.save_pretrained(broken)
    status, out, error = call(capsys, "--model", broken, "--text", TEXT)
    assert (status, out) == (2, "") and "is not finite" in error and error.count("\n") == 1


@pytest.mark.parametrize("flags, word", [
    (["--text", ""], "--text or --prompt is empty"),
    (["--prompt", " \n"], "--text or --prompt is empty"),
    (["--prompt", "a", "--text", "a b"], "--text"),
    (["--text", "a"], "is one token"),
    (["--text", "a b", "--task", "boolq"], "--text"),
    (["--model", LLAMA, "--runs", "."], "--runs"),
    (["--text", "a b", "--model", "nowhere"], "nowhere: no such folder"),
    (["--task", "commonsense"], "no test split"),
    (["--task", "piqa"], "prepare.py"),
    (["--html", "nowhere/flux.html"], "nowhere/flux.html: "),
    (["--html", "."], ".: is there already"),
    (["--runs", "nowhere"], "no such folder"),
    (["--items", "0"], "--items"),
    (["--limit", "3"], "--limit"),
    (["--text", "a\udce9 b"], "surrogate")])
def test_what_is_wrong_is_one_line(tmp_path, monkeypatch, capsys, flags, word):
    monkeypatch.chdir(tmp_path)
    status, out, error = call(capsys, *flags)
    assert (status, out) == (2, "")
    assert word in error and error.count("\n") == 1 and "error: " in error
    assert not list(tmp_path.iterdir())


def test_help_teaches_what_flux_is(capsys):
    status, out, _ = call(capsys, "--help")
    assert status == 0 and "entropy of its key distribution" in out and "start here" in out
    assert max(map(len, out.splitlines())) <= 100
