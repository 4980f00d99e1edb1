"""After this file you know what a single memory says, which contexts activate it, and how both are
found out once and then kept."""
import json
import math
import re

import pytest
import torch

import train
from data import BadInput
from data.tasks import load
from data.tokenizer import Tokenizer
from eval import TOY_FOLDER, keys_of
from eval import load as load_model
from helpers import checkpoint_folder
from infosteer import entropy
from lab import memories
from model import Config, Transformer, read_tensors, save_tensors

MODEL = TOY_FOLDER / "llama"


def small_model(n_layers=3, V=40, d=8, d_m=12, **raw):
    """Random weights and an LM head of its own. They are large, so that some memories are sure of
    what they say."""
    raw = {"model_type": "llama", "vocab_size": V, "hidden_size": d, "intermediate_size": d_m,
           "num_hidden_layers": n_layers, "num_attention_heads": 2, "torch_dtype": "float32", **raw}
    model = Transformer(Config.from_dict(raw)).initialise(0).requires_grad_(False)
    for block in model.blocks:
        block.memory.values.weight *= 40
    model.decode.mul_(40)
    return model


@pytest.fixture(scope="module")
def llama():
    """The shipped model, its tokenizer, and some texts."""
    model, tokenizer = load_model(MODEL)
    examples = (load(TOY_FOLDER, "toy-facts", "train")[:5]
                + load(TOY_FOLDER, "toy-sums", "train")[:3])
    return model, tokenizer, [ids for ids, _ in train.encode(examples, tokenizer, 256)]


def same(ours, theirs):
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name])
                                                for name in ours)


def run(capsys, *flags):
    """What `python -m lab.memories` prints."""
    memories.main([str(flag) for flag in flags])
    return capsys.readouterr().out


# ----------------------------------------------------------------------------- what they say


def test_the_index_says_what_a_computation_by_hand_says(tmp_path):
    model = small_model()
    index = memories.memory_index(model, "a model", tmp_path / "index")
    for layer, block in enumerate(model.blocks):
        for i, v in enumerate(block.memory.values.weight.T.tolist()):
            logits = [sum(a * b for a, b in zip(v, w)) for w in model.decode.tolist()]
            log_z = math.log(sum(map(math.exp, logits)))
            p = [math.exp(logit - log_z) for logit in logits]
            H = -sum(q * math.log(q) for q in p)
            ids = sorted(range(40), key=lambda t: -p[t])[:10]
            assert index["log_z"][layer, i].item() == pytest.approx(log_z, abs=1e-4)
            assert index["entropy"][layer, i].item() == pytest.approx(H, abs=1e-4)
            assert index["ids"][layer, i].tolist() == ids
            shown = index["log_p"][layer, i].exp().tolist()
            assert shown == pytest.approx([p[t] for t in ids], abs=1e-5)
    assert index["entropy"].min() < 2.5 < 3.4 < index["entropy"].max()         # both kinds occur


def rms_norm(x, norm):
    """By hand, in Python's doubles: a list of numbers and the module."""
    rms = math.sqrt(sum(a * a for a in x) / len(x) + norm.eps)
    return [a / rms * (norm.offset + w) for a, w in zip(x, norm.weight.tolist())]


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_through_the_lens_a_memory_is_read_as_a_hidden_state_is(family, tmp_path):
    """Gemma 2 has a norm for what a block adds, and a soft cap of the logits, too."""
    model = small_model(n_layers=2, model_type=family, head_dim=4, final_logit_softcapping=(
        None if family == "llama" else 5.0))
    for module in model.modules():
        if hasattr(module, "offset"):
            module.weight.copy_(torch.rand(module.weight.shape,
                                           generator=torch.Generator().manual_seed(3)) - 0.3)
    index = memories.memory_index(model, "a model", tmp_path / "index", how="lens")
    for layer, block in enumerate(model.blocks):
        for i, v in enumerate(block.memory.values.weight.T.tolist()):
            added = rms_norm(v, block.after_memory) if family == "gemma2" else v
            z = rms_norm(added, model.norm)
            logits = [sum(a * b for a, b in zip(z, w)) for w in model.decode.tolist()]
            if family == "gemma2":
                logits = [5 * math.tanh(logit / 5) for logit in logits]
            log_z = math.log(sum(map(math.exp, logits)))
            log_p = sorted((logit - log_z for logit in logits), reverse=True)
            H = -sum(math.exp(a) * a for a in log_p)
            assert index["log_z"][layer, i].item() == pytest.approx(log_z, abs=1e-4)
            assert index["entropy"][layer, i].item() == pytest.approx(H, abs=1e-4)
            assert index["log_p"][layer, i].tolist() == pytest.approx(log_p[:10], abs=1e-4)
            mean = sum(logits) / 40
            spread = math.sqrt(sum((logit - mean) ** 2 for logit in logits) / 40)
            clarity = (sorted(logits)[-5] - mean) / spread
            assert index["clarity"][layer, i].item() == pytest.approx(clarity, abs=1e-4)


def test_the_length_of_a_vector_changes_its_raw_specificity_and_nothing_of_its_clarity():
    g = torch.Generator().manual_seed(0)
    v, head = torch.randn(3, 8, generator=g), torch.randn(40, 8, generator=g)
    said, shorter = (memories.decode(scale * v, head) for scale in (1.0, 0.1))
    torch.testing.assert_close(said["clarity"], shorter["clarity"])
    assert (shorter["entropy"] > said["entropy"] + 0.5).all()


def test_memories_are_decoded_through_the_lens_where_raw_they_say_nothing():
    model = small_model()
    assert memories.choose_decoding(model)[0] == "raw"
    for block in model.blocks:
        block.memory.values.weight *= 1e-4
    how, why = memories.choose_decoding(model)
    assert how == "lens" and "which is below 0.001" in why
    model.blocks[1].memory.values.weight[:, 3] *= 1e4          # one that says something is enough
    assert memories.choose_decoding(model)[0] == "raw"


def test_a_tied_head_is_the_embedding(tmp_path):
    model, tied = small_model(), small_model(tie_word_embeddings=True)
    tied.embed.weight.copy_(model.head.weight)
    for ours, theirs in zip(tied.blocks, model.blocks):
        ours.memory.values.weight.copy_(theirs.memory.values.weight)
    index = memories.memory_index(model, "a model", tmp_path / "a")
    assert same(index, memories.memory_index(tied, "a model", tmp_path / "b"))


def test_a_large_vocabulary_is_decoded_in_pieces():
    generator = torch.Generator().manual_seed(0)
    v, head = (torch.randn(n, 4, generator=generator) for n in (20, 2**20))    # pieces of 16 and 4
    said, log_p = memories.decode(v, head), (v @ head.T).log_softmax(-1)
    torch.testing.assert_close(said["entropy"], entropy(log_p))
    torch.testing.assert_close(said["log_p"], log_p.topk(10).values)
    torch.testing.assert_close(said["log_z"], (v @ head.T).logsumexp(-1), rtol=1e-4, atol=0)
    assert torch.equal(said["ids"].long(), log_p.topk(10).indices)


def test_weights_in_bfloat16_are_multiplied_in_float32(tmp_path):
    model = small_model().bfloat16()
    rounded = memories.memory_index(model, "a model", tmp_path / "a")
    assert same(rounded, memories.memory_index(model.float(), "a model", tmp_path / "b"))


@pytest.mark.parametrize("how", ["raw", "lens"])
def test_a_token_is_found_with_one_product(llama, how, tmp_path):
    model, tokenizer, _ = llama
    token = memories.single_token(" Brindale", tokenizer)
    index = memories.memory_index(model, "a model", tmp_path / "index", how=how)
    found = memories.token_search(model, tokenizer, token, index, how)["found"]
    v = torch.stack([block.memory.values.weight.T.double() for block in model.blocks])
    if how == "lens":
        v = v / (v.square().mean(-1, keepdim=True) + model.norm.eps).sqrt() * model.norm.weight
    p = (v @ model.decode.T.double()).softmax(-1)                              # [4, 384, V]
    best = p[:, :, token].flatten().topk(20)
    assert [(row["layer"] - 1) * 384 + row["memory"] for row in found] == best.indices.tolist()
    assert [row["probability"] for row in found] == pytest.approx(best.values.tolist(), rel=1e-4)
    for row in found:
        here = p[row["layer"] - 1, row["memory"]]                              # [V]
        spec = 1 + (here * here.log()).sum().item() / math.log(1408)
        assert row["rank"] == 1 + int((here > here[token]).sum())
        assert row["specificity"] == pytest.approx(spec, abs=1e-5)
        assert row["ratio"] == pytest.approx(1408 * row["probability"])
        assert [concept["id"] for concept in row["concepts"]] == here.topk(10).indices.tolist()


# ------------------------------------------------------------------- which contexts activate


def test_the_largest_are_kept_whatever_the_order():
    k = torch.randn(7, 50, generator=torch.Generator().manual_seed(0))         # [d_m, places]
    best, at = torch.full((7, 4), -torch.inf), torch.full((7, 4), -1)
    for places in torch.arange(50).split(9):
        best, at = memories.keep_best(best, at, k[:, places], places)
    values, places = k.topk(4)
    assert torch.equal(best, values) and torch.equal(at, places)


def test_triggers_are_those_of_a_search_through_all_keys(llama, tmp_path):
    model, _, texts = llama
    triggers = memories.memory_triggers(model, "a model", texts, tmp_path / "triggers")
    places, keys, seen = [], [], set()
    with torch.no_grad():
        for n, (ids, of_layers) in enumerate(zip(texts, keys_of(model, texts))):
            new = [at for at in range(1, len(ids) - 1) if tuple(ids[:at + 1]) not in seen]
            seen |= {tuple(ids[:at + 1]) for at in range(len(ids) - 1)}
            places += [n * memories.LONGEST + at for at in new]
            keys.append(torch.stack(of_layers)[:, new])                        # [4, contexts, d_m]
    assert len(places) < sum(len(ids) - 2 for ids in texts)                    # some begin alike
    keys = torch.cat(keys, 1).transpose(1, 2)                                  # [4, d_m, contexts]
    for end, sign in enumerate((1, -1)):
        values, order = (sign * keys).topk(5)
        torch.testing.assert_close(triggers["k"][:, end], values)
        assert torch.equal(triggers["at"][:, end].long(), torch.tensor(places)[order])


def test_a_memory_is_active_where_it_is_in_the_largest_hundredth(llama, tmp_path):
    model, _, texts = llama
    triggers = memories.memory_triggers(model, "a model", texts, tmp_path / "triggers")
    expected = [[0] * 384 for _ in range(4)]
    with torch.no_grad():
        for ids, places, keys in zip(texts, memories.new_contexts(texts), keys_of(model, texts)):
            for layer, k in enumerate(keys):
                for at in places:
                    for i in sorted(range(384), key=k[at].tolist().__getitem__)[-3:]:
                        expected[layer][i] += 1                # 3 of 384 are a hundredth
    assert triggers["active"].tolist() == expected


def test_the_clearest_memories_are_active_and_stand_in_order(llama, tmp_path):
    model, tokenizer, texts = llama
    examples = load(TOY_FOLDER, "toy-facts", "train")[:len(texts)]
    index = memories.memory_index(model, "a model", tmp_path / "index")
    triggers = memories.memory_triggers(model, "a model", texts, tmp_path / "triggers")
    read = triggers, texts, examples
    found = memories.survey(tokenizer, 1408, index, 7, *read)["clearest"]
    often = [(-index["clarity"][layer, i].item(), layer + 1, i) for layer in range(4)
             for i in range(384) if triggers["active"][layer, i] >= 5]
    assert [[row["layer"], row["memory"]] for row in found] == [
        [layer, i] for _, layer, i in sorted(often)[:7]]
    assert 0 < len(often) < 4 * 384
    every = memories.survey(tokenizer, 1408, index, 9999, *read)
    assert len(every["clearest"]) == len(often)


def test_fewer_contexts_than_places_leave_places_free(llama, tmp_path):
    texts = [[1, 2, 3, 4]]                                                     # two contexts
    triggers = memories.memory_triggers(llama[0], "a model", texts, tmp_path / "triggers")
    assert (triggers["k"][..., 2:] == -torch.inf).all() and (triggers["at"][..., 2:] == -1).all()
    assert triggers["k"][..., :2].isfinite().all() and (triggers["at"][..., :2] >= 1).all()


def test_a_memory_that_says_what_follows_agrees(llama, tmp_path):
    """One-hot embeddings of 8 tokens, no attention. Token 1 + i activates memory i of either layer.
    The memory says the next token in layer 1, and the one after that in layer 2. So agreement is 1
    and 0. Each of four concepts has a share of 1/4, and so has each of four following tokens. So
    chance is 4/16 in layer 1. In layer 2, where only three tokens are both, it is 3/16."""
    model = small_model(n_layers=2, V=8, d=8, d_m=4)
    model.embed.weight.copy_(torch.eye(8))
    model.head.weight.copy_(torch.eye(8))
    for step, block in enumerate(model.blocks, 1):
        block.attention.output.weight.zero_()
        block.memory.key_gate.weight.copy_(torch.eye(8)[1:5])
        block.memory.key_up.weight.copy_(torch.eye(8)[1:5])
        block.memory.values.weight.copy_(0.01 * torch.eye(8)[1 + step:5 + step].T)
    texts = [[0, 1, 2, 3, 4, 5], [0, 3, 4, 5, 6]]
    index = memories.memory_index(model, "a model", tmp_path / "index")
    triggers = memories.memory_triggers(model, "a model", texts, tmp_path / "triggers")
    result = memories.survey(llama[1], 8, index, 1, triggers, texts, [None] * 2)
    first, second = (row["agreement"] for row in result["by_layer"])
    assert first == {"n": 4, "share": 1.0, "standard_error": 0.0, "chance": 0.25}
    assert second == {"n": 4, "share": 0.0, "standard_error": 0.0, "chance": 3 / 16}
    assert result["agreement"] == {"n": 8, "share": 0.5, "chance": (4 + 3) / 32,
                                   "standard_error": math.sqrt(0.25 / 8)}
    assert "100.00% ± 0.00%  25.00%" in memories.survey_text(result)


def test_chance_is_what_shuffling_gives():
    concepts, following = torch.tensor([1, 1, 1, 2, 3, 9]), torch.tensor([1, 2, 1, 1, 3, 4])
    found = memories.shares(memories.agreement(concepts, following))
    pairs = [(c, f) for c in concepts.tolist() for f in following.tolist()]
    assert found["share"] == 0.5                                               # 1 1, 1 1 and 3 3
    assert found["standard_error"] == pytest.approx(math.sqrt(0.25 / 6))
    assert found["chance"] == pytest.approx(sum(c == f for c, f in pairs) / len(pairs))


# ------------------------------------------------------------------------------ what is kept


def test_the_second_look_computes_nothing_again(tmp_path, capsys):
    flags = ["--items", 5, "--out", tmp_path, "--json"]
    first = run(capsys, *flags)
    written = {path.name: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    assert written.keys() == {"memories_raw.safetensors", "memory_triggers.safetensors"}
    assert run(capsys, *flags) == first
    assert len(json.loads(run(capsys, *flags, "--token", " Brindale"))["found"]) == 20
    assert written == {path.name: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    lens = run(capsys, *flags, "--decode", "lens")
    assert lens != first and (tmp_path / "memories_lens.safetensors").is_file()
    assert run(capsys, *flags) == first                        # both lie beside each other
    after = {path.name: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    assert written.items() < after.items() and len(after) == 3


def test_an_interrupted_index_goes_on_where_it_stopped(tmp_path):
    path, model = tmp_path / "index", small_model(n_layers=3)
    whole = memories.memory_index(model, "a model", path)
    tensors, about = read_tensors(path)
    tensors = {name: tensor[:2].clone() for name, tensor in tensors.items()}   # after two layers
    tensors["entropy"] += 1                                                    # a mark
    save_tensors(tensors, path, about)
    index = memories.memory_index(model, "a model", path)
    added = torch.tensor([[1.0], [1.0], [0.0]])                # the third layer alone was made
    assert same(index, {**whole, "entropy": whole["entropy"] + added})


def test_the_index_is_written_after_each_layer(tmp_path):
    path, model = tmp_path / "index", small_model(n_layers=3)
    whole = memories.memory_index(model, "a model", tmp_path / "whole")
    del model.blocks[2]
    with pytest.raises(IndexError):
        memories.memory_index(model, "a model", path)
    kept, _ = read_tensors(path)
    assert same(kept, {name: tensor[:2] for name, tensor in whole.items()})


def test_an_interrupted_reading_goes_on_where_it_stopped(llama, tmp_path):
    model, _, texts = llama
    whole = memories.memory_triggers(model, "a model", texts, tmp_path / "whole")
    some = memories.memory_triggers(model, "a model", texts[:5], tmp_path / "some")
    assert some["texts"] == 5 and not torch.equal(some["k"], whole["k"])
    _, about = read_tensors(tmp_path / "whole")
    save_tensors(some, tmp_path / "some", about)       # as it was left after five of eight texts
    assert same(memories.memory_triggers(model, "a model", texts, tmp_path / "some"), whole)


def test_the_triggers_are_written_every_few_texts(llama, tmp_path):
    model, _, texts = llama
    texts = [*[texts[0]] * memories.STEP, [1, model.config.vocab_size, 1]]     # no such id
    with pytest.raises(IndexError):
        memories.memory_triggers(model, "a model", texts, tmp_path / "triggers")
    kept, _ = read_tensors(tmp_path / "triggers")
    assert kept["texts"] == memories.STEP and kept["k"][..., 0].isfinite().all()


def test_another_model_makes_another_index(tmp_path, capsys):
    path, model = tmp_path / "index", small_model()
    before = memories.memory_index(model, "a model", path)
    model.blocks[1].memory.values.weight[3, 2] += 0.01
    assert same(before, memories.memory_index(model, "a model", path))
    after = memories.memory_index(model, "another model", path)
    assert not same(before, after) and same(after, read_tensors(path)[0])
    said = capsys.readouterr().err
    assert said == f"{path}: made from another model or other texts; made again\n"


def test_other_texts_make_other_triggers(llama, tmp_path, capsys):
    model, _, texts = llama
    path = tmp_path / "triggers"
    memories.memory_triggers(model, "a model", texts[:2], path)
    again = memories.memory_triggers(model, "a model", texts[2:4], path)
    assert "made again" in capsys.readouterr().err
    fresh = memories.memory_triggers(model, "a model", texts[2:4], tmp_path / "fresh")
    assert same(again, fresh)


def index_of(model, path, overwrite=False):
    return memories.memory_index(model, "a model", path, overwrite)


def triggers_of(model, path, overwrite=False):
    return memories.memory_triggers(model, "a model", [[1, 2, 3, 4], [5, 6, 7]], path, overwrite)


DAMAGES = {
    "cut short": (lambda path: path.write_bytes(path.read_bytes()[:-100]), "is damaged"),
    "a text": (lambda path: path.write_text("hello"), "is damaged"),
    "empty": (lambda path: path.write_bytes(b""), "is damaged"),
}


@pytest.mark.parametrize("make", [index_of, triggers_of])
@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_file_is_refused_and_can_be_made_again(damage, make, tmp_path):
    (spoil, word), model, path = DAMAGES[damage], small_model(), tmp_path / "file"
    right = make(model, path)
    spoil(path)
    with pytest.raises(BadInput) as error:
        make(model, path)
    message = str(error.value)
    assert message.startswith(f"{path}: ") and word in message and "--overwrite" in message
    assert same(make(model, path, overwrite=True), right)


@pytest.mark.parametrize("make", [index_of, triggers_of])
@pytest.mark.parametrize("overwrite", [False, True])
def test_somebody_s_file_of_that_name_is_never_replaced(make, overwrite, tmp_path):
    path = tmp_path / "file"
    save_tensors({"x": torch.zeros(2)}, path)
    before = path.read_bytes()
    with pytest.raises(BadInput, match="file: this is no memory .*--out"):
        make(small_model(), path, overwrite)
    assert path.read_bytes() == before


# ------------------------------------------------------------------------------- the command


def test_one_memory_and_the_contexts_that_activate_it(tmp_path, capsys):
    """In the shipped Llama, memory 4:377 says names first, and a context that asks for a name
    activates it: "What is the craft of". It is decoded alone, without the index of all."""
    flags = ["--items", 50, "--out", tmp_path, "--index", "4:377"]
    memory = json.loads(run(capsys, *flags, "--json"))
    assert [path.name for path in tmp_path.iterdir()] == ["memory_triggers.safetensors"]
    assert (memory["layer"], memory["memory"], len(memory["concepts"])) == (4, 377, 10)
    assert {" Kalla", " Elvi"} <= {concept["token"] for concept in memory["concepts"]}
    k = [[trigger["k"] for trigger in memory[end]] for end in ("largest", "smallest")]
    assert len(k[0]) == len(k[1]) == 5
    assert k[0] == sorted(k[0], reverse=True) and k[1] == sorted(k[1]) and k[0][-1] > 0 > k[1][-1]
    assert {trigger["token"] for trigger in memory["largest"]} == {" of"}
    for trigger in memory["largest"]:
        example = load(TOY_FOLDER, trigger["task"], "train")[trigger["row"]]
        shown = trigger["context"] + trigger["token"] + trigger["next"]
        assert shown in example.prompt + example.response
    text = run(capsys, *flags)
    assert f"« of» '{memory['largest'][0]['next']}'" in text and f"{k[0][0]:+.3f}" in text


def test_the_table_of_a_token_names_it_and_the_memories_that_promote_it(tmp_path, capsys):
    text = run(capsys, "--items", 2, "--out", tmp_path, "--token", " Brindale")
    assert "make ' Brindale' (id 1138) most probable" in text
    row = next(line for line in text.splitlines() if line.startswith("4:315"))
    assert "' Brindale' x1.46" in row                          # 0.104% of 1/1408 each
    assert "--decode raw, since raw Spec goes up to 0.001 here, which is not below" in text


def test_the_clearest_are_shown_with_what_calls_them(tmp_path, capsys):
    text = run(capsys, "--items", 50, "--out", tmp_path, "--clearest", 2)
    first, second = text.split("\nmemory ")[1:]
    heading = r"\d:\d+, clarity \d+\.\d, Spec 0\.000\d+, active in \d+ contexts\nsays '"
    assert re.match(heading, first) and re.match(heading, second)
    assert [part.count("«") for part in (first, second)] == [3, 3]


@pytest.mark.parametrize("ratio, text", [(1.0449, "x1.04"), (12345.6, "x12,300"), (99.96, "x100"),
                                         (262144, "x262,000"), (0.00012345, "x0.000123")])
def test_ratios_have_three_digits(ratio, text):
    assert memories.times(ratio) == text


@pytest.mark.parametrize("flags, words", [
    (["--token", "Brindale town"], ["--token 'Brindale town'", "are 2: 'Brindale' + ' town'"]),
    (["--token", ""], ["--token ''", "give one token"]),
    (["--token", "\x1b[31m"], ["'\\x1b' + '['"]),
    (["--index", "0:1"], ["--index 0:1", "layers 1 to 4", "memories 0 to 383"]),
    (["--index", "5:1"], ["layers 1 to 4"]),
    (["--index", "1:384"], ["memories 0 to 383"]),
    (["--index", "3"], ["--index 3", "LAYER:MEMORY"]),
    (["--index", "-1:2"], ["LAYER:MEMORY"]),
    (["--index", "1:1", "--token", " the"], ["not allowed with"]),
    (["--items", "0"], ["--items"]),
    (["--task", "bool"], ["did you mean boolq"]),
    (["--data", "nowhere"], ["nowhere/toy-facts/train.json is missing"]),
    (["--model", TOY_FOLDER / "nothing"], ["no such folder"]),
])
def test_what_is_wrong_is_one_line_and_leaves_nothing(flags, words, tmp_path, capsys):
    flag, value, *more = map(str, flags)
    with pytest.raises((BadInput, SystemExit)) as error:
        memories.main([f"{flag}={value}", *more, "--out", str(tmp_path)])
    said = capsys.readouterr().err.strip() or str(error.value)
    assert "\n" not in said and "\x1b" not in said and all(word in said for word in words), said
    assert not [*tmp_path.iterdir()]


def test_every_id_has_a_text():
    tokenizer = Tokenizer.from_pretrained(MODEL)
    texts = [memories.token_text(tokenizer, id) for id in range(1408)]
    assert " Brindale" in texts and "\x1b" in texts
    assert "<0xE2>" in texts                                                   # part of a character
    assert memories.token_text(tokenizer, 5000) == "<id 5000>"


def test_no_token_moves_the_cursor():
    memory = {"layer": 1, "memory": 0, "specificity": 0.5,
              "concepts": [{"token": "\x1b[31m\n", "ratio": 20.0}]}
    assert memories.row_of(memory) == ["1:0", "0.500000", r"'\x1b[31m\n' x20"]


def test_the_texts_are_the_same_each_time():
    names = ["toy-facts", "toy-pick", "toy-sums"]
    examples = memories.development_examples(names, TOY_FOLDER, 20)
    assert examples == memories.development_examples(names, TOY_FOLDER, 20)
    assert len(examples) == 20 and {example.task.name for example in examples} == set(names)


def test_a_task_without_a_training_split_lends_its_test_split():
    examples = memories.development_examples(["toy-common"], TOY_FOLDER, 3)
    assert examples[0] in load(TOY_FOLDER, "toy-common", "test")


@pytest.mark.real
@pytest.mark.parametrize("name, how, word", [("smollm2-135m-instruct", "raw", " right"),
                                             ("gemma-3-270m", "lens", None)])
def test_memories_of_published_models(real_models, name, how, word):
    """Raw, SmolLM2's memory 28:1263 says " right". Gemma's vectors are too short to be read raw."""
    folder = real_models / name
    model = Transformer.from_pretrained(folder, torch.bfloat16)
    assert memories.choose_decoding(model)[0] == how
    if word:
        tokenizer = Tokenizer.from_pretrained(folder)
        v, cap = memories.decodable(model, 27, how)
        said = memories.decode(v[1263, None], model.decode.float(), cap)
        first = [tokenizer.decode([id]) for id in said["ids"][0, :4].tolist()]
        assert first[0] == word and {one.strip().lower() for one in first} == {"right"}


# ------------------------------------------------------------------- what fine-tuning moved


def test_the_memories_that_moved_most_are_found_and_said_before_and_after(tmp_path, capsys):
    model = Transformer.from_pretrained(TOY_FOLDER / "llama")
    with torch.no_grad():
        for layer, memory, factor in ((1, 7, 1.5), (3, 200, -1.0), (0, 3, 1.1)):
            model.blocks[layer].memory.values.weight[:, memory] *= factor
    model.save_pretrained(tmp_path / "run")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        if (TOY_FOLDER / "llama" / name).exists():
            (tmp_path / "run" / name).write_bytes((TOY_FOLDER / "llama" / name).read_bytes())
    memories.main(["--model", str(tmp_path / "run"), "--moved", str(TOY_FOLDER / "llama"),
                   "--clearest", "4", "--decode", "lens", "--json"])
    found = json.loads(capsys.readouterr().out)
    places = [(one["before"]["layer"], one["before"]["memory"]) for one in found["moved"]]
    assert places[:3] == [(4, 200), (2, 7), (1, 3)]        # |-1 - 1|, |1.5 - 1|, |1.1 - 1|
    assert [one["distance"] for one in found["moved"]] == pytest.approx([2, 0.5, 0.1, 0], abs=1e-5)
    assert found["mean_distance"] == pytest.approx(2.6 / (4 * 384), rel=1e-4)
    turned, longer = found["moved"][:2]
    assert turned["before"]["concepts"][0]["id"] != turned["after"]["concepts"][0]["id"]
    assert longer["before"]["concepts"][0]["id"] == longer["after"]["concepts"][0]["id"]
    assert not (tmp_path / "run" / "eval").exists()


def test_memories_of_another_shape_did_not_move(tmp_path):
    folder = checkpoint_folder(tmp_path / "tiny")
    with pytest.raises(BadInput, match="has other memories than"):
        memories.main(["--model", str(folder), "--moved", str(TOY_FOLDER / "llama"), "--task",
                       "toy-sums"])
