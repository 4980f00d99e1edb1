"""After this file you know that a broken file never becomes a wrong model, a traceback or a hang: what `python tests/fuzz.py` checks on ten
thousand mutants, here on a few hundred; that the fuzzer itself can fail; and every fault it has found so far, by name."""
import copy
import json
import os
import shutil
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import eval as evaluation
import fuzz
from data import LONGEST_MESSAGE, BadInput, tasks
from data.tokenizer import LONGEST_TOKEN, Tokenizer
from infosteer import Steering
from model import Config, Transformer

GOLDEN = Path(__file__).parent / "golden"


@pytest.mark.parametrize("kind", fuzz.KINDS)
def test_a_sample_of_mutants(kind):
    results = fuzz.run(kind, 0, range(60))
    assert [result for result in results if result["outcome"] == "failed"] == []
    assert {result["outcome"] for result in results} == {"accepted", "refused"} and len(results) == 60


# ------------------------------------------------------------------------------------------------------ the fuzzer can fail

def reads_another_number(good, files, folder):
    raise fuzz.Wrong("0.1 was read as 0.2")


def writes_elsewhere(good, files, folder):
    (folder.parent / "elsewhere").write_text("x")


def writes_beside_the_input(good, files, folder):
    (folder / "cache").mkdir()


def hangs(good, files, folder):
    while True:
        pass


def takes_memory(good, files, folder):
    bytearray(300 << 20)[::4096] = b"x" * (300 << 8)


def panics(good, files, folder):
    os.write(2, b"thread '<unnamed>' panicked")
    raise BadInput(f"{folder}: refused")


def refuses(message):
    def check(good, files, folder):
        error = BadInput("")
        error.args = (message.format(folder=folder),)          # as if BadInput did not clean its messages
        raise error
    return check


@pytest.mark.parametrize("check, word", [
    (reads_another_number, "another meaning"), (writes_elsewhere, "wrote outside"), (writes_beside_the_input, "wrote outside"), (hangs,
            "more than 1 s"),
    (takes_memory, "are allowed"), (panics, "printed"), (lambda *_: os.abort(), "signal 6"), (lambda *_: {}["key"], "KeyError"),
    (lambda *_: sys.exit(0), "SystemExit"),
    (refuses(""), "an empty message"), (refuses("{folder}: two\nlines"), "control characters"), (refuses("{folder}" + "x" * 600), "characters"),
    (refuses("No."), "does not begin"),
])
def test_a_broken_reader_is_caught(check, word):
    n, seconds = (1, 1) if check is hangs else (2, fuzz.SECONDS)
    results = fuzz.run("tasks", 0, range(n), check=check, goods=list(fuzz.good_tasks())[:1], seconds=seconds)
    assert [result["outcome"] for result in results] == ["failed"] * n and all(word in result["why"] for result in results), results


def test_readers_that_misread_are_caught(monkeypatch):
    def failures(kind, n):
        return [result["why"] for result in fuzz.run(kind, 0, range(n)) if result["outcome"] == "failed"]

    with monkeypatch.context() as patch:                       # one tensor of a checkpoint is off by a little
        true = Transformer.load_state_dict
        patch.setattr(Transformer, "load_state_dict", lambda self, state, **how: true(self, {**state, "norm.weight": state["norm.weight"] * 1.01},
                                                                                      **how))
        assert any("model.norm.weight has other numbers" in why for why in failures("weights", 20))
    with monkeypatch.context() as patch:                       # ids of a tokenizer are in another order
        true_encode = Tokenizer.encode
        patch.setattr(Tokenizer, "encode", lambda *args, **how: true_encode(*args, **how)[::-1])
        assert any("by hand" in why for why in failures("tokenizer", 20))
    with monkeypatch.context() as patch:                       # a row of a task is lost
        true_load = tasks.load
        patch.setattr(tasks, "load", lambda *args: true_load(*args)[:-1])
        assert any("examples of" in why for why in failures("tasks", 20))


def test_the_command_keeps_what_failed_and_says_how_to_see_it_again(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["fuzz.py", "--kind", "tasks", "--mutants", "4", "--keep", str(tmp_path / "kept")])
    with pytest.raises(SystemExit) as end:
        fuzz.main()
    assert end.value.code == 0 and "tasks" in capsys.readouterr().out and not (tmp_path / "kept").exists()
    monkeypatch.setitem(fuzz.KINDS, "tasks", (fuzz.good_tasks, reads_another_number))
    with pytest.raises(SystemExit) as end:
        fuzz.main()
    assert end.value.code == 1 and "4 failed" in capsys.readouterr().out
    kept = tmp_path / "kept" / "tasks-0-3"
    assert "--kind tasks --seed 0 --only 3" in (kept / "why.txt").read_text() and list((kept / "files").rglob("*.json"))


# ------------------------------------------------------------------------------------------------- what has been found so far

def test_a_message_is_one_short_line_whatever_it_quotes():
    message = str(BadInput("config.json: x is " + "a\nb\x1b[31m\ud800" * 100_000 + "; give\ta number"))
    assert len(message) <= LONGEST_MESSAGE == fuzz.LONGEST_MESSAGE and message.isprintable()
    assert message.startswith("config.json: x is a b\\x1b[31m\\ud800") and message.endswith("; give a number")


CONFIGS = {                                            # what was wrong -> the model, its edit, a word of the message
    "a size no tensor can have": ("llama3", dict(hidden_size=2**63), "hidden_size"),
    "sizes whose product no tensor can have": ("llama3", dict(vocab_size=2**40, tie_word_embeddings=False), "vocab_size"),
    "a number that no float can be": ("gemma2", dict(query_pre_attn_scalar=10**400), "query_pre_attn_scalar"),
    "a number too large for arithmetic with tensors": ("gemma2", dict(final_logit_softcapping=10**30), "final_logit_softcapping"),
    "the same in the rotary settings": ("llama3", dict(rope_parameters=dict(rope_theta=10**30)), "rope_theta"),
    "no first local layer": ("qwen25_window", dict(layer_types=None, max_window_layers=""), "max_window_layers"),
    "false in quotes, which counted as true": ("llama32", dict(tie_word_embeddings="false"), "tie_word_embeddings"),
    "the same for the window": ("qwen25_window", dict(layer_types=None, use_sliding_window="false"), "use_sliding_window"),
    "a pattern of 0, which counted as none": ("gemma2", dict(layer_types=None, sliding_window_pattern=0), "sliding_window_pattern"),
    "a local base of 0, which counted as none": ("gemma3", dict(rope_parameters=None, rope_local_base_freq=0), "rope_theta"),
}


@pytest.mark.parametrize("case", CONFIGS)
def test_config(case):
    name, edit, word = CONFIGS[case]
    with pytest.raises(BadInput, match=word):
        Config.from_dict({**json.loads((GOLDEN / "models" / name / "config.json").read_text()), **edit})


@pytest.mark.parametrize("shard", ["x" * 5000, "a\0b", "\ud800"])
def test_a_shard_whose_name_no_file_can_have(shard, tmp_path):
    shutil.copy(GOLDEN / "models" / "llama3" / "config.json", tmp_path)
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"model.norm.weight": shard}}))
    with pytest.raises(BadInput, match="no such file"):
        Transformer.from_pretrained(tmp_path)


def test_a_json_file_that_is_a_folder(tmp_path):
    (tmp_path / "tokenizer_config.json").mkdir()
    with pytest.raises(BadInput, match="cannot read it"):
        evaluation.read_json(tmp_path / "tokenizer_config.json")


def spec_of(name):
    return json.loads((GOLDEN / "tokenizers" / name / "tokenizer.json").read_text("utf-8"))


def pattern(spec, text):
    spec["pre_tokenizer"]["pretokenizers"][0]["pattern"] = {"Regex": text}


SPECS = {                                              # what was wrong -> the tokenizer, its edit
    "an added token without text, found between all characters": ("qwen", lambda s: s["added_tokens"][3].update(content="")),
    "one added token with two ids": ("qwen", lambda s: s["added_tokens"][6].update(content="<|endoftext|>")),
    "half a surrogate pair in an added token": ("qwen", lambda s: s["added_tokens"][3].update(content="\ud800")),
    "a fraction in front of every text": ("llama", lambda s: s["post_processor"]["processors"][1]["special_tokens"]["<|begin_of_text|>"].update(ids=[1.5])),
    "an id in front that no token has": ("gemma", lambda s: s["post_processor"]["special_tokens"]["<bos>"].update(ids=[-1])),
    "false in quotes": ("llama", lambda s: s["model"].update(ignore_merges="false")),
    "a byte fallback that is no flag": ("gemma", lambda s: s["model"].update(byte_fallback="no")),
    "an added token that is special by quotes": ("gemma", lambda s: s["added_tokens"][5].update(special="false")),
    "an empty pattern": ("qwen", lambda s: pattern(s, "")),
    "two patterns": ("qwen", lambda s: s["pre_tokenizer"]["pretokenizers"][0]["pattern"].update(String=" ")),
}


@pytest.mark.parametrize("case", SPECS)
def test_tokenizer(case, tmp_path):
    name, edit = SPECS[case]
    spec = spec_of(name)
    edit(spec)
    (tmp_path / "tokenizer.json").write_text(json.dumps(spec))
    with pytest.raises(BadInput):
        Tokenizer.from_pretrained(tmp_path)


def test_a_negative_id_of_the_end(tmp_path):
    shutil.copy(GOLDEN / "tokenizers" / "qwen" / "tokenizer.json", tmp_path)
    (tmp_path / "config.json").write_text('{"eos_token_id": -1}')
    with pytest.raises(BadInput, match="eos_token_id"):
        Tokenizer.from_pretrained(tmp_path)


def test_an_added_token_of_a_config_that_is_none(tmp_path):
    model = spec_of("qwen")["model"]
    (tmp_path / "vocab.json").write_text(json.dumps(model["vocab"]))
    (tmp_path / "merges.txt").write_text("\n".join(model["merges"]))
    (tmp_path / "tokenizer_config.json").write_text('{"added_tokens_decoder": {"652": null}}')
    with pytest.raises(BadInput, match="tokenizer_config.json"):
        Tokenizer.from_pretrained(tmp_path)


def test_an_endless_token_is_refused_at_once(tmp_path):
    spec = spec_of("gemma")
    spec["model"]["vocab"]["ab" * LONGEST_TOKEN] = 5000
    start = time.monotonic()
    with pytest.raises(BadInput, match="more than 1,000 characters"):
        Tokenizer(spec, [{}, {}, {}], [])
    assert time.monotonic() - start < 1


@pytest.mark.parametrize("bomb", [r"(a|aa)+(?=c)", r"(?:(?=a)a|a)+b", r"(?:a?){40}a{40}(?!b)c"])
def test_a_regular_expression_that_explodes_is_one_line(bomb, capfd):
    spec = spec_of("llama")
    pattern(spec, bomb)
    tokenizer, start = Tokenizer(spec, [{}, {}, {}], []), time.monotonic()
    with pytest.raises(BadInput, match="cannot cut 'aaaa"):
        tokenizer.encode("a" * 2000)
    assert time.monotonic() - start < 5 and capfd.readouterr() == ("", "")     # a panic prints


@pytest.mark.parametrize("empty", ["a*", "(?:)", "(?=a)", "a|", r"\b", "$"])
def test_a_pattern_that_matches_nothing_loses_no_text(empty, capfd):
    spec = spec_of("llama")
    pattern(spec, empty)
    tokenizer = Tokenizer(spec, [{}, {}, {}], [])
    assert all(tokenizer.decode(tokenizer.encode(text, bos=False)) == text for text in ("aaba", "b", "xyz a\n", ""))
    assert capfd.readouterr() == ("", "")


def row(**change):
    return json.dumps([{"instruction": "q", "input": "", "output": "x\n#### 1", "answer": "1", **change}]).encode()


@pytest.mark.parametrize("task, change, word", [
    ("gsm8k", dict(input=0), '"input" is 0'), ("gsm8k", dict(input=[]), '"input" is'), ("gsm8k", dict(input=False), '"input" is False'),
         # became ""
    ("toy-facts", dict(answer="a", choices=["a", "\udc00"]), "surrogate"), ("toy-facts", dict(answer="a", choices=["a", "a"]), "twice"),
])
def test_task(task, change, word):
    with pytest.raises(BadInput, match=word):
        tasks.parse(row(**change), "FILE", tasks.find(task), "test")


def test_a_rationale_of_spaces_takes_no_time():
    start = time.monotonic()
    for output in ("#### " + " " * 20_000 + "\nx", "x\n####" + " " * 20_000 + "7" + " " * 20_000 + "\n"):
        response = tasks.parse(row(output=output), "FILE", tasks.find("gsm8k"), "train")[0].response
        assert response == (output if output.endswith("x") else "x\nThe final answer is: 7")
    assert time.monotonic() - start < 1


@pytest.fixture(scope="module")
def profiles():
    return {good.name: good for good in fuzz.good_profiles()}


def gap(tensor):
    return torch.where(tensor == tensor.max(), tensor + 1, tensor)


PROFILES = {                                           # what was wrong -> the method, the tensor, what it became
    "a fingerprint of another type": ("semantic", "fingerprint", lambda t: t.double()),
    "a fingerprint of whole numbers": ("surrogate", "fingerprint", lambda t: t.long()),
    "numbers of a type that has no arithmetic": ("surrogate", "entropy", lambda t: t.to(torch.float8_e4m3fn)),
    "half the digits": ("semantic", "usage", lambda t: t.half()),
    "groups with a gap, which made every strength NaN": ("semantic", "semantic", gap),
    "numbers whose squares are infinite": ("surrogate", "divergence", lambda t: t * 1e30),
    "one dimension more": ("semantic", "usage", lambda t: t[..., None].contiguous()),
    "nothing said": ("surrogate-entropy", "says", lambda t: t[..., :0].contiguous()),
}


@pytest.mark.parametrize("case", PROFILES)
def test_profile(case, profiles, tmp_path):
    method, name, change = PROFILES[case]
    good, path = profiles[method], tmp_path / evaluation.PROFILE
    path.write_bytes(good.files[evaluation.PROFILE])
    with evaluation.safe_open(path, framework="pt") as file:
        about = file.metadata()
    tensors = load_file(path)
    save_file({**tensors, name: change(tensors[name])}, path, about)
    with pytest.raises(BadInput):
        evaluation.load_profile(path, good.about["model"], good.about["steering"])


RUNS = {                                               # what was wrong -> the file, its edit
    "a steering that is none": ("int-seed0/args.json", dict(steering=[])), "a steering without a method": ("int-seed0/args.json", dict(steering={})),
    "no steering": ("int-seed0/args.json", dict(steering=None)), "an unknown method": ("int-seed0/args.json", dict(steering={"method": "more"})),
    "an unknown setting": ("int-seed0/args.json", dict(steering={"method": "int", "force": 1})), "a setting in quotes": ("int-seed0/args.json",
            dict(steering={"method": "int", "alpha": "2"})),
    "layers that are a number": ("int-seed0/args.json", dict(steering={"method": "int", "layers": 0.0})),
    "layers in a list": ("int-seed0/args.json", dict(steering={"method": "int", "layers": [1]})),
    "an unknown strength of a layer": ("int-seed0/args.json", dict(steering={"method": "int", "layers": {"1": {"force": 1}}})),
    "no model": ("int-seed0/args.json", dict(model=1)), "a model whose name no folder can have": ("int-seed0/args.json", dict(model="a\0\udc00")),
    "a seed that is a list": ("int-seed0/args.json", dict(seed=[])), "no task": ("int-seed0/eval/boolq.json", dict(task=None)),
    "another task": ("int-seed0/eval/boolq.json", dict(task="piqa")),
    "an accuracy in quotes": ("int-seed0/eval/boolq.json", dict(accuracy="0.5")), "an accuracy above 1": ("int-seed0/eval/boolq.json",
            dict(accuracy=65.1)),
}


@pytest.mark.parametrize("case", RUNS)
def test_run(case, tmp_path):
    good, = fuzz.good_runs()
    name, edit = RUNS[case]
    fuzz.write(tmp_path, {**good.files, name: json.dumps({**json.loads(good.files[name]), **edit}).encode()})
    with pytest.raises(BadInput) as error:
        evaluation.compare(evaluation.find_runs(tmp_path))
        evaluation.runs_from(tmp_path, "toy/llama")
    assert str(error.value).startswith(str(tmp_path / name))


def test_a_steering_is_read_back_as_it_was_written():
    steering = Steering("int", p=0.05, layers={2: {}, 3: {"alpha": 2.0}})
    assert evaluation.as_steering(json.loads(json.dumps(steering.settings))) == steering
    old = copy.deepcopy(steering.settings)
    del old["layers"]                                  # a run from before there was such a setting
    assert evaluation.as_steering(old) == Steering("int", p=0.05)
