"""What config.json may say: defaults, nulls, and the one line that refuses what cannot be built."""
import pytest

from data import BadInput
from model import GLOBAL, KEYS, LOCAL, Config

LLAMA = dict(model_type="llama", vocab_size=50, hidden_size=16, intermediate_size=24,
             num_hidden_layers=2, num_attention_heads=4)
ROWS = {key: row for names, *row in KEYS for key in names.split()}


def config(**change):
    return Config.from_dict({**LLAMA, **change}, "DIR/config.json")


def llama3_rope(**change):
    return dict(rope_type="llama3", factor=8, low_freq_factor=1, high_freq_factor=4, **change)


REFUSED = [
    (dict(model_type="mamba"), "model_type is 'mamba'; known are llama, qwen2"),
    (dict(model_type=None), "model_type is None"),
    (dict(model_type=["llama"]), "model_type"),
    (dict(hidden_size="big"), "hidden_size is 'big'; a whole number from 1 to 1,048,576 is needed"),
    (dict(hidden_size=None), "hidden_size is None"),
    (dict(hidden_size=True), "hidden_size is True"),
    (dict(vocab_size=0), "vocab_size is 0"),
    (dict(num_hidden_layers=-1), "num_hidden_layers is -1"),
    (dict(num_hidden_layers=10**6), "num_hidden_layers is 1000000"),
    (dict(intermediate_size=24.5), "intermediate_size is 24.5"),
    (dict(rms_norm_eps=float("nan")), "rms_norm_eps is nan"),
    (dict(rms_norm_eps=0), "rms_norm_eps is 0; a number from 1e-18"),
    (dict(num_key_value_heads=3), "num_key_value_heads, 3"),
    (dict(head_dim=5), "head_dim, 5, even"),
    (dict(hidden_act="relu6"), "the activation is 'relu6'; known are silu"),
    (dict(hidden_act=["silu"]), "the activation"),
    (dict(attention_bias=True), "attention_bias is True; there is no such layer"),
    (dict(mlp_bias=True), "mlp_bias is True"),
    (dict(quantization_config={"bits": 4}), "quantization_config"),
    (dict(use_bidirectional_attention=True), "use_bidirectional_attention"),
    (dict(tie_word_embeddings="yes"), "tie_word_embeddings is 'yes'; true or false is needed"),
    (dict(tie_word_embeddings=1), "tie_word_embeddings is 1"),
    (dict(attn_logit_softcapping=0.0), "attn_logit_softcapping is 0.0"),
    (dict(rope_scaling={"rope_type": "yarn", "factor": 4}), "rope_type is 'yarn'"),
    (dict(rope_scaling={"rope_type": ["linear"]}), "rope_type"),
    (dict(rope_scaling={"type": "linear"}), "factor of the rotary embedding is None"),
    (dict(rope_scaling=llama3_rope()), "original_max_position_embeddings"),
    (dict(rope_scaling=[8]), "rope_scaling is \\[8\\], not an object"),
    (dict(rope_scaling={"partial_rotary_factor": 0.5}), "partial_rotary_factor is 0.5"),
    (dict(rope_theta="10000"), "rope_theta of the rotary embedding is '10000'"),
    (dict(rope_parameters=3), "rope_parameters or rope_scaling is 3"),
    (dict(layer_types=["full_attention"]), "a type for each of the 2 layers"),
    (dict(layer_types="full_attention"), "a type for each of the 2 layers"),
    (dict(layer_types=["full_attention", "ssm"]), "one of layer_types is 'ssm'"),
    (dict(layer_types=[["full_attention"], {}]), "one of layer_types"),
    (dict(layer_types=["sliding_attention"] * 2), "sliding_window is None"),
    (dict(eos_token_id="</s>"), "eos_token_id is '</s>'"),
    (dict(eos_token_id=[1, -2]), "eos_token_id is -2"),
    (dict(eos_token_id=[True]), "eos_token_id is True"),
]


@pytest.mark.parametrize("change, words", REFUSED)
def test_a_configuration_that_cannot_be_built_is_refused_in_one_line(change, words):
    with pytest.raises(BadInput, match=words) as error:
        config(**change)
    assert str(error.value).startswith("DIR/config.json: ") and "\n" not in str(error.value)


@pytest.mark.parametrize("key", [key for key, (kind, *_) in ROWS.items() if kind is not bool])
def test_every_number_of_the_table_is_refused_outside_its_limits(key):
    kind, least, most, *_ = ROWS[key]
    for outside in (least - 1, most + 1) if kind is int else (least / 2, most * 2):
        with pytest.raises(BadInput, match=f"{key} is "):
            config(**{key: outside})


@pytest.mark.parametrize("key", [key for key, row in ROWS.items() if len(row) == 3])
def test_every_key_without_a_default_must_be_there(key):
    raw = {name: value for name, value in LLAMA.items() if name != key}
    with pytest.raises(BadInput, match=f"{key} is None"):
        Config.from_dict(raw)


def test_null_means_the_default():
    plain = config()
    nulls = {key: None for key, row in ROWS.items() if len(row) == 4}
    nulls |= dict(hidden_act=None, rope_theta=None, rope_scaling=None, layer_types=None)
    given = config(**nulls)
    assert given.raw != plain.raw
    for name in vars(plain).keys() - {"raw"}:
        assert getattr(given, name) == getattr(plain, name)


def test_what_the_file_leaves_out_follows_from_the_rest():
    plain = config()
    assert (plain.n_kv_heads, plain.head_dim, plain.attn_scale) == (4, 4, 0.5)
    assert (plain.act, plain.tied, plain.norm_eps) == ("silu", False, 1e-6)
    assert plain.layer_types == (GLOBAL, GLOBAL) and plain.window is None
    assert plain.rope[GLOBAL]["rope_theta"] == 10_000


def test_null_switches_a_soft_cap_of_gemma_2_off():
    gemma = config(model_type="gemma2")
    assert (gemma.attn_softcap, gemma.final_softcap) == (50.0, 30.0)
    off = config(model_type="gemma2", attn_logit_softcapping=None)
    assert (off.attn_softcap, off.final_softcap) == (None, 30.0)


def test_gemma_takes_its_activation_from_either_key_and_has_a_default():
    assert config(model_type="gemma2").act == "gelu_pytorch_tanh"
    both = dict(hidden_act="silu", hidden_activation="gelu_pytorch_tanh")
    assert config(model_type="gemma2", **both).act == "gelu_pytorch_tanh"
    assert config(model_type="gemma2", hidden_act="silu").act == "silu"


@pytest.mark.parametrize("keys, types", [
    (dict(use_sliding_window=True, max_window_layers=1), (GLOBAL, LOCAL)),
    (dict(use_sliding_window=True, max_window_layers=0), (LOCAL, LOCAL)),
    (dict(use_sliding_window=True), (GLOBAL, GLOBAL)),             # the first 28 are global
    (dict(use_sliding_window=False, max_window_layers=1), (GLOBAL, GLOBAL)),
    (dict(sliding_window_pattern=2), (LOCAL, GLOBAL)),
    (dict(sliding_window_pattern=1), (GLOBAL, GLOBAL)),
    (dict(sliding_window_pattern=2, layer_types=[GLOBAL, LOCAL]), (GLOBAL, LOCAL)),
])
def test_layer_types_are_listed_or_follow_from_the_classic_keys(keys, types):
    assert config(sliding_window=8, **keys).layer_types == types


def test_the_llama_3_rope_takes_the_first_length_from_either_place():
    scaling = llama3_rope()
    own = config(rope_scaling={**scaling, "original_max_position_embeddings": 32},
                 max_position_embeddings=1024)
    assert own.rope[GLOBAL]["original_max_position_embeddings"] == 32
    other = config(rope_scaling=scaling, max_position_embeddings=1024)
    assert other.rope[GLOBAL]["original_max_position_embeddings"] == 1024


def test_ids_that_end_a_text_are_kept_once_and_written_back():
    assert config().eos_ids == () and config(eos_token_id=0).eos_ids == (0,)
    more = config(eos_token_id=[3, 4, 3]).with_eos(4, 5)
    assert more.eos_ids == (3, 4, 5) and more.raw["eos_token_id"] == [3, 4, 5]
    assert more.with_eos(5) is more
