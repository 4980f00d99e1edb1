"""After this file you know what a single memory says, what calls it, and how both are found out once and then looked up."""
import json
import math
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import eval as evaluation
from data.tokenizer import Tokenizer
from infosteer import agreement, keep_largest, token_log_probability
from model import Config, Transformer

TOY = Path(__file__).parent.parent / "data" / "toy"


def small_model(n_layers=3, V=40, d=8, d_m=12, scale=40.0, **raw):
    """Random weights, an LM head of its own, and memory vectors long enough that some memories are sure of what they say."""
    model = Transformer(Config.from_dict({**dict(model_type="llama", vocab_size=V, hidden_size=d, intermediate_size=d_m, num_hidden_layers=n_layers,
                                                 num_attention_heads=2, torch_dtype="float32"), **raw})).initialise(0).requires_grad_(False)
    for block in model.blocks:
        block.memory.values.weight *= scale
    model.head.weight *= scale
    return model


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.from_pretrained(TOY / "llama")


@pytest.fixture(scope="module")
def llama():
    """The shipped model, its tokenizer, and some development texts."""
    model, tokenizer = evaluation.load(TOY / "llama")
    examples = evaluation.load_examples(TOY, "toy-facts", "train")[:5] + evaluation.load_examples(TOY, "toy-sums", "train")[:3]
    return model.requires_grad_(False), tokenizer, evaluation.development_texts(examples, tokenizer)


def call(monkeypatch, capsys, *flags):
    """eval.py --analyse memories as from the shell: (exit status, standard output, standard error)."""
    monkeypatch.setattr(sys, "argv", ["eval.py", "--analyse", "memories", "--device", "cpu", *map(str, flags)])
    capsys.readouterr()
    status = 0
    try:
        evaluation.command(evaluation.main)
    except SystemExit as stop:
        status = stop.code
    return status, *capsys.readouterr()


# ------------------------------------------------------------------------------------------------------ what memories say


def test_the_index_says_what_a_computation_by_hand_says(tmp_path):
    model = small_model()
    index = evaluation.memory_index(model, tmp_path / "index")
    for layer, block in enumerate(model.blocks):
        for i in range(12):
            logits = [sum(a * b for a, b in zip(block.memory.values.weight[:, i].tolist(), w)) for w in model.head.weight.tolist()]     # Python's float64
            log_z = math.log(sum(map(math.exp, logits)))
            p = [math.exp(x - log_z) for x in logits]
            ids = sorted(range(40), key=lambda t: -p[t])[:10]
            assert index["log_z"][layer, i].item() == pytest.approx(log_z, abs=1e-4)
            assert index["entropy"][layer, i].item() == pytest.approx(-sum(q * math.log(q) for q in p), abs=1e-4)
            assert index["ids"][layer, i].tolist() == ids
            assert index["log_p"][layer, i].exp().tolist() == pytest.approx([p[t] for t in ids], abs=1e-5)
    assert index["entropy"].min() < 2.5 < 3.4 < index["entropy"].max()        # the model has both kinds of memories


def test_a_tied_head_is_the_embedding(tmp_path):
    model = small_model()
    other = Transformer(Config.from_dict({**model.config.raw, "tie_word_embeddings": True})).initialise(0).requires_grad_(False)
    other.embed.weight.copy_(model.head.weight)
    for ours, theirs in zip(other.blocks, model.blocks):
        ours.memory.values.weight.copy_(theirs.memory.values.weight)
    a, b = evaluation.memory_index(model, tmp_path / "a"), evaluation.memory_index(other, tmp_path / "b")
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_pieces_do_not_change_the_index(tmp_path, monkeypatch):
    model, surrogates = small_model(), evaluation.surrogates
    whole = evaluation.memory_index(model, tmp_path / "whole")

    def in_pieces(v, decode):
        for start in range(0, len(v), 5):
            (_, log_p), = surrogates(v[start:start + 5], decode)
            yield slice(start, start + len(log_p)), log_p
    monkeypatch.setattr(evaluation, "surrogates", in_pieces)
    pieces = evaluation.memory_index(model, tmp_path / "pieces")
    assert torch.equal(whole["ids"], pieces["ids"])
    for name in ("entropy", "log_z", "log_p"):
        torch.testing.assert_close(whole[name], pieces[name])


def test_weights_in_bfloat16_are_multiplied_in_float32(tmp_path):
    model = small_model().bfloat16()
    rounded = evaluation.memory_index(model, tmp_path / "a")
    exact = evaluation.memory_index(model.float(), tmp_path / "b")
    assert all(torch.equal(rounded[name], exact[name]) for name in exact)


def test_a_token_is_found_with_one_product(llama, tmp_path):
    model, tokenizer, _ = llama
    index, token = evaluation.memory_index(model, tmp_path / "index"), tokenizer.encode(" Brindale", bos=False)[0]
    p = torch.stack([(block.memory.values.weight.T.double() @ model.embed.weight.T.double()).softmax(-1) for block in model.blocks])   # [4, 384, V]
    v, w = model.blocks[2].memory.values.weight.T, model.embed.weight[token]
    torch.testing.assert_close(token_log_probability(v, w, index["log_z"][2]).exp().double(), p[2, :, token], rtol=1e-5, atol=0)
    result, text = evaluation.token_search({"model": "m", "layers": 4, "memories": 384, "vocabulary": 1408}, model, tokenizer, token, index)
    best = p[:, :, token].flatten().topk(20)
    assert [(row["layer"] - 1) * 384 + row["memory"] for row in result["found"]] == best.indices.tolist()
    assert [row["probability"] for row in result["found"]] == pytest.approx(best.values.tolist(), rel=1e-4)
    for row in result["found"]:
        here = p[row["layer"] - 1, row["memory"]]
        assert row["rank"] == 1 + int((here > here[token]).sum())
        assert row["specificity"] == pytest.approx(1 + (here * here.log()).sum().item() / math.log(1408), abs=1e-6)
        assert [concept["id"] for concept in row["concepts"]] == here.topk(10).indices.tolist()
    assert text.splitlines()[3].startswith("4:315") and "' Brindale' 0.10%" in text.splitlines()[3]


# ------------------------------------------------------------------------------------------------------ what calls memories


def test_the_largest_are_kept_whatever_the_order():
    k = torch.randn(50, 7, generator=torch.Generator().manual_seed(0))                                # [positions, d_m]
    best, at = torch.full((7, 4), -torch.inf), torch.full((7, 4), -1)
    for start in range(0, 50, 9):
        best, at = keep_largest(best, at, k[start:start + 9], torch.arange(start, min(start + 9, 50)))
    values, places = k.T.topk(4)
    assert torch.equal(best, values) and torch.equal(at, places)


def test_triggers_are_those_of_a_search_through_all_keys(llama, tmp_path):
    model, _, texts = llama
    triggers = evaluation.memory_triggers(model, texts, tmp_path / "triggers")
    keys, places, seen = [[] for _ in model.blocks], [], set()
    for n, ids in enumerate(texts):
        new = [at for at in range(1, len(ids) - 1) if tuple(ids[:at + 1]) not in seen]                # by comparing whole prefixes
        seen |= {tuple(ids[:at + 1]) for at in range(len(ids) - 1)}
        places += [sum(map(len, texts[:n])) + at for at in new]
        evaluation.watch(model, [ids[:-1]], lambda layer, h, k, row: keys[layer].append(k[new]))
    places = torch.tensor(places)
    assert len(places) < sum(len(ids) - 2 for ids in texts)                                           # some texts do begin alike
    for layer, k in enumerate(map(torch.cat, keys)):                                                  # k: [contexts, d_m]
        for name, n, largest in (("largest", 5, True), ("smallest", 3, False)):
            values, order = k.T.topk(n, largest=largest)
            assert torch.equal(triggers[name][layer], values) and torch.equal(triggers[f"{name}_at"][layer].long(), places[order])


def test_fewer_contexts_than_places_leave_places_free(llama, tmp_path):
    triggers = evaluation.memory_triggers(llama[0], [[1, 2, 3, 4]], tmp_path / "triggers")            # contexts: up to 2, and up to 3
    assert (triggers["largest_at"][..., 2:] == -1).all() and (triggers["largest_at"][..., :2] >= 1).all()
    assert triggers["largest"][..., 2:].isinf().all() and triggers["smallest"][..., :2].isfinite().all()


def test_a_memory_that_says_what_follows_agrees(tokenizer, tmp_path):
    """One-hot embeddings of 8 tokens, no attention. Memory i of either layer is called by token 1 + i; it says the next one in layer 1, the
    one after that in layer 2. So agreement is 1 and 0. Each of four concepts has a share of 1/4, each of four following tokens too: chance is
    4/16 in layer 1, and 3/16 in layer 2, where only three tokens are both."""
    model = small_model(n_layers=2, V=8, d=8, d_m=4)
    model.embed.weight.copy_(torch.eye(8))
    model.head.weight.copy_(torch.eye(8))
    for step, block in enumerate(model.blocks, 1):
        block.attention.output.weight.zero_()
        block.memory.key_gate.weight.copy_(torch.eye(8)[1:5])
        block.memory.key_up.weight.copy_(torch.eye(8)[1:5])
        block.memory.values.weight.copy_(0.01 * torch.eye(8)[1 + step:5 + step].T)
    texts = [[0, 1, 2, 3, 4, 5], [0, 3, 4, 5, 6]]
    index, triggers = evaluation.memory_index(model, tmp_path / "index"), evaluation.memory_triggers(model, texts, tmp_path / "triggers")
    result, text = evaluation.all_memories({"model": "m", "layers": 2, "memories": 4, "vocabulary": 8, "tasks": ["t"], "texts": 2, "contexts": 7},
                                           tokenizer, index, triggers, texts)
    first, second = (row["agreement"] for row in result["by_layer"])
    assert (first["n"], first["share"], first["standard_error"], first["chance"]) == (4, 1.0, 0.0, 0.25)
    assert (second["n"], second["share"], second["chance"]) == (4, 0.0, 3 / 16)
    assert result["agreement"] == {"n": 8, "share": 0.5, "standard_error": math.sqrt(0.25 / 8), "chance": (4 + 3) / 32}
    assert "100.00% ± 0.00%   25.00%" in text


def test_chance_is_what_shuffling_gives():
    concepts, following = torch.tensor([1, 1, 1, 2, 3, 9]), torch.tensor([1, 2, 1, 1, 3, 4])
    share, error, chance = agreement(concepts, following)
    assert share == 0.5 and error == pytest.approx(math.sqrt(0.25 / 6))                               # 1 1, 1 1 and 3 3
    pairs = [(c, f) for c in concepts.tolist() for f in following.tolist()]
    assert chance == pytest.approx(sum(c == f for c, f in pairs) / len(pairs))


# ---------------------------------------------------------------------------------------------------- once, and then looked up


def test_the_second_look_computes_nothing_again(tmp_path, monkeypatch, capsys):
    flags = ["--items", 5, "--out", tmp_path, "--json"]
    first = call(monkeypatch, capsys, *flags)
    assert first[0] == 0 and sorted(path.name for path in tmp_path.iterdir()) == ["memories.safetensors", "memory_triggers.safetensors"]
    for name in ("surrogates", "watch"):
        monkeypatch.setattr(evaluation, name, lambda *args: pytest.fail("computed again"))
    assert call(monkeypatch, capsys, *flags) == first
    status, out, _ = call(monkeypatch, capsys, *flags, "--token", " Brindale")
    assert status == 0 and len(json.loads(out)["found"]) == 20


def test_an_interrupted_first_pass_goes_on_where_it_stopped(tmp_path, monkeypatch):
    model, surrogates, decoded = small_model(), evaluation.surrogates, []
    whole = evaluation.memory_index(model, tmp_path / "whole")

    def counted(v, decode):
        if len(decoded) == 2:
            decoded.append(None)
            raise KeyboardInterrupt
        decoded.append(v)
        return surrogates(v, decode)
    monkeypatch.setattr(evaluation, "surrogates", counted)
    with pytest.raises(KeyboardInterrupt):
        evaluation.memory_index(model, tmp_path / "index")
    assert len(load_file(tmp_path / "index")["entropy"]) == 2                 # layers
    index = evaluation.memory_index(model, tmp_path / "index")
    assert len(decoded) == 4 and all(torch.equal(index[name], whole[name]) for name in whole)         # two layers, the stop, one layer


def test_an_interrupted_watch_goes_on_where_it_stopped(llama, tmp_path, monkeypatch):
    model, _, texts = llama
    whole, watch, watched = evaluation.memory_triggers(model, texts, tmp_path / "whole"), evaluation.watch, []

    def counted(model, some, see):
        if len(watched) == 5:
            watched.append(None)
            raise KeyboardInterrupt
        watched.extend(some[:1])
        watch(model, some, see)
    monkeypatch.setattr(evaluation, "watch", counted)
    monkeypatch.setattr(evaluation, "WATCHED", 1)
    with pytest.raises(KeyboardInterrupt):
        evaluation.memory_triggers(model, texts, tmp_path / "triggers")
    triggers, read = evaluation.memory_triggers(model, texts, tmp_path / "triggers"), [ids[:-1] for ids in texts]
    assert watched == [*read[:5], None, *read[5:]] and all(torch.equal(triggers[name], whole[name]) for name in whole)


@pytest.mark.parametrize("part", ["head", "values"])
def test_other_weights_make_another_index(part, tmp_path, capsys):
    model, path = small_model(), tmp_path / "index"
    before = evaluation.memory_index(model, path)
    weight = model.head.weight if part == "head" else model.blocks[1].memory.values.weight
    weight[3, 2] += 0.01                                                      # the norm of all weights hardly knows
    after = evaluation.memory_index(model, path)
    assert not torch.equal(before["entropy"], after["entropy"])
    assert capsys.readouterr().err == f"{path}: made from other weights; made again\n"
    assert all(torch.equal(load_file(path)[name], after[name]) for name in after)


def test_other_texts_make_other_triggers_and_keep_the_index(llama, tmp_path, capsys):
    model, _, texts = llama
    evaluation.memory_triggers(model, texts[:2], tmp_path / "triggers")
    again = evaluation.memory_triggers(model, texts[2:4], tmp_path / "triggers")
    assert "made from other texts; made again" in capsys.readouterr().err
    fresh = evaluation.memory_triggers(model, texts[2:4], tmp_path / "fresh")
    assert all(torch.equal(again[name], fresh[name]) for name in fresh)


def cut(path):
    path.write_bytes(path.read_bytes()[:-100])


def foreign(path):
    save_file({"entropy": torch.zeros(4, 384)}, path)


def spoilt(change):
    """Write the file again with its own metadata, after a change to its tensors."""
    def spoil(path):
        with evaluation.safe_open(path, framework="pt") as file:
            made = file.metadata()
        tensors = load_file(path)
        change(tensors)
        save_file(tensors, path, made)
    return spoil


INDEX, TRIGGERS = evaluation.memory_index, lambda model, path, *rest: evaluation.memory_triggers(model, [[1, 2, 3, 4], [5, 6, 7]], path, *rest)
DAMAGES = {
    "an index cut short": (INDEX, cut, "not readable as safetensors"),
    "no safetensors": (INDEX, lambda path: path.write_text("hello"), "not readable as safetensors"),
    "of something else": (INDEX, foreign, "not a file of --analyse memories"),
    "an id outside": (INDEX, spoilt(lambda t: t["ids"].fill_(40)), "holds what cannot be"),
    "not a number": (INDEX, spoilt(lambda t: t["log_z"][0].fill_(torch.nan)), "holds what cannot be"),
    "layers missing": (INDEX, spoilt(lambda t: t.update(entropy=t["entropy"][:2].clone())), "holds what cannot be"),
    "more layers": (INDEX, spoilt(lambda t: t.update({name: torch.cat([x, x]) for name, x in t.items()})), "holds what cannot be"),
    "another shape": (INDEX, spoilt(lambda t: t.update(log_p=t["log_p"][:, :7].clone())), "log_p is torch.float32 [3, 7, 10]"),
    "a tensor missing": (INDEX, spoilt(lambda t: t.pop("log_z")), "log_z is missing"),
    "triggers cut short": (TRIGGERS, cut, "not readable as safetensors"),
    "a place outside": (TRIGGERS, spoilt(lambda t: t["largest_at"].fill_(7)), "holds what cannot be"),
    "too many texts": (TRIGGERS, spoilt(lambda t: t["texts"].fill_(3)), "holds what cannot be"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_file_is_refused_and_can_be_made_again(damage, tmp_path):
    (make, spoil, word), model, path = DAMAGES[damage], small_model(), tmp_path / "file"
    right = make(model, path)
    spoil(path)
    with pytest.raises(evaluation.BadInput) as error:
        make(model, path)
    assert str(error.value).startswith(f"{path}: ") and word in str(error.value) and "--overwrite" in str(error.value)
    again = make(model, path, True)
    assert all(torch.equal(again[name], right[name]) for name in right)


def test_a_damaged_file_is_one_line_from_the_command(tmp_path, monkeypatch, capsys):
    (tmp_path / "memories.safetensors").write_bytes(b"\xff" * 100)
    status, out, error = call(monkeypatch, capsys, "--items", 2, "--out", tmp_path)
    assert status == 2 and out == "" and error.count("\n") == 1 and error.startswith(f"eval.py: error: {tmp_path}/memories.safetensors: not readable")
    assert call(monkeypatch, capsys, "--items", 2, "--out", tmp_path, "--overwrite")[0] == 0


# ------------------------------------------------------------------------------------------------------------- the command


def test_one_memory_and_the_texts_that_call_it(tmp_path, monkeypatch, capsys):
    """In the shipped Llama, memory 4:377 says first names, and is called where one follows: "What is the craft of". No index is needed for it."""
    monkeypatch.setattr(evaluation, "memory_index", lambda *args: pytest.fail("made the index for one memory"))
    flags = ["--items", 50, "--out", tmp_path, "--index", "4:377"]
    _, out, _ = call(monkeypatch, capsys, *flags, "--json")
    memory = json.loads(out)
    assert (memory["layer"], memory["memory"], len(memory["concepts"]), len(memory["largest"]), len(memory["smallest"])) == (4, 377, 10, 5, 3)
    names = {concept["token"] for concept in memory["concepts"]}
    assert names >= {" Kalla", " Elvi"} and {trigger["token"] for trigger in memory["largest"]} == {" of"}
    assert memory["largest"][0]["k"] > memory["largest"][4]["k"] > 0 > memory["smallest"][2]["k"] > memory["smallest"][0]["k"]
    for trigger in memory["largest"]:
        example = evaluation.load_examples(TOY, trigger["task"], "train")[trigger["row"]]
        assert trigger["context"] + trigger["token"] + trigger["next"] in example.prompt + example.response
    _, text, _ = call(monkeypatch, capsys, *flags)
    assert f"« of» -> '{memory['largest'][0]['next']}'" in text and f"{memory['largest'][0]['k']:+.3f}" in text


@pytest.mark.parametrize("flags, words", [
    (["--token", "Brindale town"], ["--token 'Brindale town': not one token of this model but 2: 'Brindale' + ' town'; try 'Brindale'"]),
    (["--token", "  Eskton"], ["try ' Eskton'"]),
    (["--token", ""], ["the text is empty"]),
    (["--token", "\x1b[31m"], ["'\\x1b' + '['"]),
    (["--index", "0:1"], ["--index 0:1", "layers 1 to 4", "memories 0 to 383"]),
    (["--index", "5:1"], ["layers 1 to 4"]),
    (["--index", "1:384"], ["memories 0 to 383"]),
    (["--index", "3"], ["--index '3'", "LAYER:MEMORY"]),
    (["--index", "-1:2"], ["--index"]),
    (["--index", "1:1", "--token", " the"], ["not allowed with"]),
    (["--task", "bool"], ["did you mean boolq"]),
    (["--data", "nowhere"], ["nowhere/toy-facts/train.json is missing"]),
    (["--model", TOY / "llama", TOY / "qwen"], ["one model"]),
    (["--model", TOY / "nothing"], ["no such folder"]),
])
def test_what_is_wrong_is_one_line(flags, words, tmp_path, monkeypatch, capsys):
    status, out, error = call(monkeypatch, capsys, *flags, "--out", tmp_path)
    assert status == 2 and out == "" and error.count("\n") == 1 and "\x1b" not in error and all(word in error for word in words), error
    assert not [*tmp_path.iterdir()]


def test_the_flags_belong_to_this_analysis(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["eval.py", "--model", "x", "--token", " the"])
    with pytest.raises(SystemExit):
        evaluation.main()
    assert "--token and --index need --analyse memories" in capsys.readouterr().err


def test_no_token_moves_the_cursor(tokenizer):
    shown = [evaluation.visible(tokenizer, id) for id in range(1408)]
    assert all(text.isprintable() for text in shown) and "'\\x1b'" in shown and "' Brindale'" in shown
    assert "b'\\xe2'" in shown                                                # a part of a character
    assert evaluation.visible(tokenizer, 5000) == evaluation.token_text(tokenizer, 5000) == "<id 5000>"


def test_the_development_set_is_the_same_each_time_and_as_in_training(tokenizer):
    class Arguments:
        task, data, items = None, None, 20
    examples = evaluation.development_examples(Arguments)
    assert examples == evaluation.development_examples(Arguments) and len(examples) == 20
    assert {example.task for example in examples} == {"toy-facts", "toy-pick", "toy-sums"}
    import train
    assert [ids for ids, _ in train.encode(examples, tokenizer, 256)] == evaluation.development_texts(examples, tokenizer)
    Arguments.task = "toy-common"                                             # it has a test split only
    assert {example.task for example in evaluation.development_examples(Arguments)} == {"toy-common"}
