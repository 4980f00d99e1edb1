"""After this file you know that a broken file never becomes a wrong model, a traceback or a hang:
what `python tests/more/fuzz.py` checks on ten thousand mutants, here on a few hundred; that the
fuzzer itself can fail; and every fault it has found so far, by name."""
import copy
import json
import os
import shutil
import sys
import time
from dataclasses import replace

import pytest
import torch
from safetensors.torch import save_file

import eval as evaluation
import fuzz
from data import BadInput, read_json, tasks
from data.tokenizer import LONGEST_TOKEN, Tokenizer
from eval import steering_from, steering_of, with_per_memory
from infosteer import Steering
from lab import stats
from model import Config, Transformer, read_tensors

GOLDEN = fuzz.GOLDEN


@pytest.mark.parametrize("kind", fuzz.KINDS)
def test_a_sample_of_mutants_is_refused_in_one_line_or_read_as_meant(kind):
    results = fuzz.run(kind, 0, range(40))
    assert [result for result in results if result["outcome"] == "failed"] == []
    outcomes = {result["outcome"] for result in results}
    # A damaged run costs itself only: the folder is read without it.
    assert outcomes == ({"accepted"} if kind == "run" else {"accepted", "refused"})


def test_a_mutant_is_always_the_same():
    goods = list(fuzz.good_tasks())
    one, two, other = (fuzz.mutant("tasks", seed, 7, goods) for seed in (0, 0, 1))
    assert one == two != other
    assert one[2] != one[0].files and one[2].keys() == one[0].files.keys()


# ---------------------------------------------------------------------- the fuzzer can fail


def writes_elsewhere(folder, about):
    (folder.parent / "elsewhere").write_text("x")


def writes_beside_the_input(folder, about):
    (folder / "cache").mkdir()


def hangs(folder, about):
    while True:
        pass


def takes_memory(folder, about):
    bytearray(b"x") * (300 << 20)


def panics(folder, about):
    os.write(2, b"thread '<unnamed>' panicked")
    raise BadInput(f"{folder}: refused")


def refuses(message):
    def read(folder, about):
        error = BadInput("")
        error.args = (message.format(folder=folder),)  # as if BadInput did not clean its messages
        raise error
    return read


def accepts(read, files, good, out):
    pass


@pytest.mark.parametrize("read, word", [
    (writes_elsewhere, "wrote outside"), (writes_beside_the_input, "wrote outside"),
    (hangs, "more than 1 s"), (takes_memory, "are allowed"), (panics, "printed"),
    (lambda *_: os.abort(), "signal 6"), (lambda *_: {}["key"], "KeyError"),
    (lambda *_: sys.exit(0), "SystemExit"), (refuses(""), "an empty message"),
    (refuses("{folder}: two\nlines"), "control characters"), (refuses("No."), "does not begin"),
    (refuses("{folder}" + "x" * 600), "characters")])
def test_a_reader_that_misbehaves_is_caught(read, word):
    goods = list(fuzz.good_tasks())[:1]
    result, = fuzz.run("tasks", 0, [0], read, accepts, goods, seconds=1)
    assert result["outcome"] == "failed" and word in result["why"]


def failures(kind, n, read):
    return [result["why"] for result in fuzz.run(kind, 0, range(n), read)
            if result["outcome"] == "failed"]


def test_a_reader_that_misreads_weights_is_caught():
    def read(folder, about):
        model = Transformer.from_pretrained(folder)
        model.norm.weight.data *= 1.01             # one tensor is off by a little
        return model

    assert any("model.norm.weight has other" in why for why in failures("weights", 20, read))


def test_a_reader_that_misreads_a_configuration_is_caught():
    def read(folder, about):
        config, _ = fuzz.read_config(folder, about)
        return replace(config, norm_eps=config.norm_eps * 2), None

    assert any("['norm_eps'] are" in why for why in failures("config", 20, read))


def test_a_reader_that_misreads_text_is_caught():
    def read(folder, about):
        tokenizer, texts, ids = fuzz.read_tokenizer(folder, about)
        return tokenizer, texts, [one[::-1] for one in ids]

    assert any("by hand" in why for why in failures("tokenizer", 20, read))


def test_a_reader_that_loses_a_row_of_a_task_is_caught():
    def read(folder, about):
        return tasks.load(folder, about["task"].name, about["split"])[:-1]

    assert any("examples of" in why for why in failures("tasks", 20, read))


def test_a_reader_that_misreads_what_a_method_found_out_is_caught():
    def read(folder, about):
        steering = with_per_memory(about["steering"], folder / evaluation.PER_MEMORY)
        return replace(steering, per_memory=steering.per_memory * 2)

    assert any("other bytes" in why for why in failures("memory", 20, read))


def test_a_reader_that_misreads_a_score_is_caught():
    def read(folder, about):
        runs, lines = fuzz.read_runs(folder, about)
        return [{**run, "scores": {"boolq": 0.5}} for run in runs], lines

    assert any("other scores" in why for why in failures("run", 20, read))


def test_the_command_keeps_what_failed_and_says_how_to_see_it_again(tmp_path, capsys):
    argv = ["--kind", "tasks", "--mutants", "4", "--keep", str(tmp_path / "kept")]
    assert fuzz.main(argv) == 0
    assert "tasks" in capsys.readouterr().out and not (tmp_path / "kept").exists()
    assert fuzz.main(argv, {"tasks": (fuzz.good_tasks, writes_elsewhere, accepts)}) == 1
    assert "tasks 3 " in capsys.readouterr().out
    kept = tmp_path / "kept" / "tasks-0-3"
    assert "--kind tasks --seed 0 --only 3" in (kept / "why.txt").read_text()
    assert list((kept / "files").rglob("*.json"))


# ------------------------------------------------------------------ what it has found so far


def test_a_message_is_one_short_line_whatever_it_quotes():
    quoted = "a\nb\x1b[31m\ud800" * 100_000
    message = str(BadInput(f"config.json: x is {quoted}; give\ta number"))
    assert len(message) <= fuzz.LONGEST_MESSAGE and message.isprintable()
    assert message.startswith("config.json: x is a b\\x1b[31m\\ud800")
    assert message.endswith("; give a number")


CONFIGS = {                            # what was wrong -> the model, its edit, a word
    "a size no tensor can have": ("llama3", dict(hidden_size=2**63), "hidden_size"),
    "sizes whose product no tensor can have": (
        "llama3", dict(vocab_size=2**40, tie_word_embeddings=False), "vocab_size"),
    "a number that no float can be": (
        "gemma2", dict(query_pre_attn_scalar=10**400), "query_pre_attn_scalar"),
    "a number too large for arithmetic with tensors": (
        "gemma2", dict(final_logit_softcapping=10**30), "final_logit_softcapping"),
    "the same in the rotary settings": (
        "llama3", dict(rope_parameters=dict(rope_theta=10**30)), "rope_theta"),
    "no first local layer": (
        "qwen25_window", dict(layer_types=None, max_window_layers=""), "max_window_layers"),
    "false in quotes, which counted as true": (
        "llama32", dict(tie_word_embeddings="false"), "tie_word_embeddings"),
    "the same for the window": (
        "qwen25_window", dict(layer_types=None, use_sliding_window="false"), "use_sliding_window"),
    "a pattern of 0, which counted as none": (
        "gemma2", dict(layer_types=None, sliding_window_pattern=0), "sliding_window_pattern"),
    "a local base of 0, which counted as none": (
        "gemma3", dict(rope_parameters=None, rope_local_base_freq=0), "rope_theta"),
}


@pytest.mark.parametrize("case", CONFIGS)
def test_a_configuration_that_means_nothing_is_refused_by_its_key(case):
    name, edit, word = CONFIGS[case]
    raw = json.loads((GOLDEN / "models" / name / "config.json").read_text())
    with pytest.raises(BadInput, match=word):
        Config.from_dict({**raw, **edit})


@pytest.mark.parametrize("shard", ["x" * 5000, "a\0b", "\ud800"])
def test_a_shard_whose_name_no_file_can_have_is_refused(shard, tmp_path):
    shutil.copy(GOLDEN / "models" / "llama3" / "config.json", tmp_path)
    index = {"weight_map": {"model.norm.weight": shard}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(BadInput, match="no such file"):
        Transformer.from_pretrained(tmp_path)


def test_a_json_file_that_is_a_folder_is_refused(tmp_path):
    (tmp_path / "tokenizer_config.json").mkdir()
    with pytest.raises(BadInput, match="cannot read it"):
        read_json(tmp_path / "tokenizer_config.json")


# ---- tokenizers


def spec_of(name):
    return json.loads((GOLDEN / "tokenizers" / name / "tokenizer.json").read_text("utf-8"))


def pattern(spec, text):
    spec["pre_tokenizer"]["pretokenizers"][0]["pattern"] = {"Regex": text}


def added(place, **change):
    return lambda spec: spec["added_tokens"][place].update(change)


def of_the_model(**change):
    return lambda spec: spec["model"].update(change)


def front_of_llama(spec):
    tokens = spec["post_processor"]["processors"][1]["special_tokens"]
    tokens["<|begin_of_text|>"].update(ids=[1.5])


def front_of_gemma(spec):
    spec["post_processor"]["special_tokens"]["<bos>"].update(ids=[-1])


SPECS = {                              # what was wrong -> the tokenizer, its edit
    "an added token without text, found between all characters": ("qwen", added(3, content="")),
    "one added token with two ids": ("qwen", added(6, content="<|endoftext|>")),
    "half a surrogate pair in an added token": ("qwen", added(3, content="\ud800")),
    "a fraction in front of every text": ("llama", front_of_llama),
    "an id in front that no token has": ("gemma", front_of_gemma),
    "false in quotes": ("llama", of_the_model(ignore_merges="false")),
    "a byte fallback that is no flag": ("gemma", of_the_model(byte_fallback="no")),
    "an added token that is special by quotes": ("gemma", added(5, special="false")),
    "an empty pattern": ("qwen", lambda spec: pattern(spec, "")),
}


@pytest.mark.parametrize("case", SPECS)
def test_a_tokenizer_that_means_nothing_is_refused(case, tmp_path):
    name, edit = SPECS[case]
    spec = spec_of(name)
    edit(spec)
    (tmp_path / "tokenizer.json").write_text(json.dumps(spec))
    with pytest.raises(BadInput, match="tokenizer.json"):
        Tokenizer.from_pretrained(tmp_path)


def test_a_negative_id_of_the_end_is_refused(tmp_path):
    shutil.copy(GOLDEN / "tokenizers" / "qwen" / "tokenizer.json", tmp_path)
    (tmp_path / "config.json").write_text('{"eos_token_id": -1}')
    with pytest.raises(BadInput, match="eos_token_id"):
        Tokenizer.from_pretrained(tmp_path)


def test_an_added_token_of_a_config_that_is_none_is_refused(tmp_path):
    model = spec_of("qwen")["model"]
    (tmp_path / "vocab.json").write_text(json.dumps(model["vocab"]))
    (tmp_path / "merges.txt").write_text("\n".join(model["merges"]))
    (tmp_path / "tokenizer_config.json").write_text('{"added_tokens_decoder": {"652": null}}')
    with pytest.raises(BadInput, match="tokenizer_config.json"):
        Tokenizer.from_pretrained(tmp_path)


def test_an_endless_token_is_refused_at_once():
    spec = spec_of("gemma")
    spec["model"]["vocab"]["ab" * LONGEST_TOKEN] = 5000
    start = time.process_time()
    with pytest.raises(BadInput, match="more than 1,000 characters"):
        Tokenizer(spec, [{}, {}, {}], [])
    assert time.process_time() - start < 1


@pytest.mark.parametrize("bomb", ["(a|aa)+(?=c)", "(?:(?=a)a|a)+b", "(?:a?){40}a{40}(?!b)c"])
def test_a_regular_expression_that_explodes_is_one_line(bomb, capfd):
    spec = spec_of("llama")
    pattern(spec, bomb)
    tokenizer, start = Tokenizer(spec, [{}, {}, {}], []), time.process_time()
    with pytest.raises(BadInput, match="cannot cut 'aaaa"):
        tokenizer.encode("a" * 2000)
    assert time.process_time() - start < 5 and capfd.readouterr() == ("", "")  # a panic prints


@pytest.mark.parametrize("empty", ["a*", "(?:)", "(?=a)", "a|", r"\b", "$"])
def test_a_pattern_that_matches_nothing_loses_no_text(empty, capfd):
    spec = spec_of("llama")
    pattern(spec, empty)
    tokenizer = Tokenizer(spec, [{}, {}, {}], [])
    for text in ("aaba", "b", "xyz a\n", ""):
        assert tokenizer.decode(tokenizer.encode(text, bos=False)) == text
    assert capfd.readouterr() == ("", "")


# ---- tasks


def row(**change):
    good = {"instruction": "q", "input": "", "output": "x\n#### 1", "answer": "1"}
    return json.dumps([{**good, **change}]).encode()


@pytest.mark.parametrize("task, change, word", [
    ("gsm8k", dict(input=0), '"input" is 0'), ("gsm8k", dict(input=[]), '"input" is'),
    ("gsm8k", dict(input=False), '"input" is False'),          # they all became ""
    ("gsm8k", dict(input="\udc00"), "half of a surrogate pair"),
    ("toy-facts", dict(answer="a", choices=["a", "a"]), "different answers")])
def test_a_row_of_a_task_that_means_nothing_is_refused(task, change, word):
    with pytest.raises(BadInput, match=word):
        tasks.parse(row(**change), "FILE", tasks.find(task), "test")


@pytest.mark.parametrize("output, response", [
    ("#### " + " " * 20_000 + "\nx", "#### " + " " * 20_000 + "\nx"),
    ("x\n####" + " " * 20_000 + "7" + " " * 20_000 + "\n", "x\nThe final answer is: 7")])
def test_a_rationale_of_spaces_takes_no_time(output, response):
    start = time.process_time()
    example, = tasks.parse(row(output=output), "FILE", tasks.find("gsm8k"), "train")
    assert example.response == response and time.process_time() - start < 1


# ---- runs


@pytest.mark.parametrize("spoil, word", [
    (lambda path: path.unlink(), "not a readable safetensors file"),
    (lambda path: os.truncate(path, 100), "not a readable safetensors file"),
    (lambda path: save_file({"other": torch.zeros(1)}, path), "holds no per_memory")])
def test_what_a_method_found_out_is_refused_where_it_is_damaged(spoil, word, tmp_path):
    good = next(good for good in fuzz.good_memories() if good.name == "semantic")
    path = tmp_path / evaluation.PER_MEMORY
    fuzz.write(tmp_path, good.files)
    settings = {"steering": good.about["steering"].settings}
    (tmp_path / "args.json").write_text(json.dumps(settings))
    assert torch.equal(steering_of(tmp_path).per_memory, read_tensors(path)[0]["per_memory"])
    spoil(path)
    with pytest.raises(BadInput, match=word):
        steering_of(tmp_path)


ARGS, SCORE = "int-seed0/args.json", "int-seed0/eval/boolq.json"
RUNS = {                               # what was wrong -> the file, its edit
    "a steering that is none": (ARGS, dict(steering=[])),
    "a steering without a method": (ARGS, dict(steering={})),
    "no steering": (ARGS, dict(steering=None)),
    "an unknown method": (ARGS, dict(steering={"method": "more"})),
    "an unknown setting": (ARGS, dict(steering={"method": "int", "force": 1})),
    "a setting of another method": (ARGS, dict(steering={"method": "int", "lam": 0.1})),
    "a setting in quotes": (ARGS, dict(steering={"method": "int", "alpha": "2"})),
    "layers that are a number": (ARGS, dict(steering={"method": "int", "layers": 0.0})),
    "layers in a list": (ARGS, dict(steering={"method": "int", "layers": [1]})),
    "an unknown strength of a layer": (
        ARGS, dict(steering={"method": "int", "layers": {"1": {"force": 1}}})),
    "no model": (ARGS, dict(model=1)),
    "a seed that is a list": (ARGS, dict(seed=[])),
    "an accuracy in quotes": (SCORE, dict(accuracy="0.5")),
    "an accuracy above 1": (SCORE, dict(accuracy=65.1)),
}


@pytest.mark.parametrize("case", RUNS)
def test_a_damaged_run_is_left_out_by_name_and_costs_no_other(case, tmp_path, capsys):
    (good,), (name, edit) = fuzz.good_runs(), RUNS[case]
    spoilt = json.dumps({**json.loads(good.files[name]), **edit}).encode()
    fuzz.write(tmp_path, {**good.files, name: spoilt})
    found = {run["folder"].name for run in stats.find_runs(tmp_path)}
    assert found == {"base", "none-seed0", "none-seed1", "int-seed1"}
    message = capsys.readouterr().err
    assert message.startswith(f"left out: {tmp_path / name}: ") and message.count("\n") == 1


def test_a_steering_is_read_back_as_it_was_written():
    steering = Steering("int", p=0.05, layers={2: {}, 3: {"alpha": 2.0}})
    settings = json.loads(json.dumps(steering.settings))
    assert steering_from(settings, "args.json") == steering
    fewer = copy.deepcopy(settings)
    del fewer["layers"]                # what is not said has its default
    assert steering_from(fewer, "args.json") == Steering("int", p=0.05)
