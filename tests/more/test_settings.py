"""The settings of a steering: their limits, their names, and the flags and files that hold them.

After reading this you know which settings mean something to which method, how layers are written,
and that a steering survives the way through a command line and through a file.
"""
import json
import math

import pytest

import train
from data import BadInput
from eval import steering_from
from infosteer import GENERIC, METHODS, Steering, format_layers, meaningful
from train import STEERING_FLAGS, parse_layers

STEERINGS = {                          # short name: steering
    "none": Steering("none"),
    "int": Steering("int"),
    "int-p0.05-alpha2-value": Steering("int", p=0.05, alpha=2.0, rank_by="value"),
    "reg-lam-0.3": Steering("reg", lam=-0.3),
    "reg-softmax-layers1,2@lam=0.05":
        Steering("reg", normalise="softmax", layers={1: {}, 2: {"lam": 0.05}}),
    "reg-layers1-2,4": Steering("reg", layers={1: {}, 2: {}, 4: {}}),
    "semantic-groups8-p0.1": Steering("semantic", groups=8, p=0.1),
    "semantic-reg-beta_max2": Steering("semantic", generic="reg", beta_max=2.0),
    "activation-subgroups2": Steering("activation", subgroups=2),
    "surrogate-gamma0.5-lambda_20": Steering("surrogate", gamma=0.5, lambda_2=0.0),
    "surrogate-memory": Steering("surrogate", divergence="memory"),
    "int-random": Steering("int", rank_by="random"), "dropout-p0.1": Steering("dropout", p=0.1),
    "knowledge-entropy-lam0.1": Steering("knowledge-entropy", lam=0.1),
    "resuscitation-p0.5-alpha2": Steering("resuscitation", p=0.5, alpha=2.0),
    "surrogate-entropy-lam1-buckets64": Steering("surrogate-entropy", lam=1.0, buckets=64),
}
each_steering = pytest.mark.parametrize("name, steering", STEERINGS.items(), ids=STEERINGS)


# --------------------------------------------------------------------------------- limits


@pytest.mark.parametrize("settings, message", [
    (dict(method="reg2"), "method is 'reg2'; choose one of none, int, reg"),
    (dict(rank_by="size"), "rank_by is 'size'; choose one of magnitude, value"),
    (dict(normalise="l2"), "normalise is 'l2'; choose one of magnitude, softmax"),
    (dict(generic="none"), "generic is 'none'; choose one of int, reg"),
    (dict(p=1.5), "p is 1.5; it must be a number from 0 to 1"),
    (dict(p=-0.1), "p is -0.1"), (dict(p=math.nan), "p is nan"),
    (dict(alpha=math.inf), "alpha is inf"), (dict(lam=math.nan), "lam is nan"),
    (dict(gamma=-math.inf), "gamma is -inf"), (dict(lambda_1=math.nan), "lambda_1 is nan"),
    (dict(beta_max=-1.0), "beta_max is -1.0; it must be a number from 0"),
    (dict(groups=0), "groups is 0; it must be a number from 1"), (dict(subgroups=0), "subgroups"),
    (dict(buckets=0), "buckets"),
    (dict(method="int", layers={1: {}, 2: {"p": 3.0}}), "p is 3.0; it must be"),
])
def test_a_setting_outside_its_limits_is_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        Steering(**settings)


# --------------------------------------------------------------------------------- layers


def test_layers_are_counted_from_1_as_in_the_paper_and_from_0_in_code():
    steering = Steering("int", layers={1: {}, 3: {}})
    assert [steering.at(layer).method for layer in range(3)] == ["int", "none", "int"]


def test_a_layer_may_have_its_own_strengths_and_the_others_keep_the_common_ones():
    steering = Steering("int", alpha=7.0, layers={1: {"alpha": 2.0}, 2: {"p": 0.5}, 4: {}})
    assert [(here.method, here.alpha, here.p) for here in map(steering.at, range(4))] == [
        ("int", 2.0, 0.01), ("int", 7.0, 0.5), ("none", 7.0, 0.01), ("int", 7.0, 0.01)]


@pytest.mark.parametrize("text, layers", [
    ("3", [3]), ("1-3,8", [1, 2, 3, 8]), (" 2 , 2-3", [2, 3]), ("12,1", [1, 12]), ("5-5", [5])])
def test_layers_are_a_list_of_ranges(text, layers):
    assert parse_layers(text, 12) == {layer: {} for layer in layers}


def test_each_range_may_have_its_own_strengths():
    layers = parse_layers("1-2:alpha=2, 3-4 : alpha=3 : p=.5,6", 6)
    assert layers == {1: {"alpha": 2.0}, 2: {"alpha": 2.0}, 3: {"alpha": 3.0, "p": 0.5},
                      4: {"alpha": 3.0, "p": 0.5}, 6: {}}
    assert parse_layers("1:beta-max=2", 6) == {1: {"beta_max": 2.0}}
    assert parse_layers("1:lam=2e-3", 6) == {1: {"lam": 0.002}}


@pytest.mark.parametrize("text", ["1-2:alpha=2,3-4:alpha=3:p=0.5,6", "1", "1,3,5-6", "2:p=1e-05"])
def test_layers_are_written_as_they_are_read(text):
    assert format_layers(parse_layers(text, 6)) == text


def test_all_layers_are_written_as_all():
    assert format_layers(None) == "all"


@pytest.mark.parametrize("text", [
    "", "0", "13", "3-2", "1-13", "a", "1-", "-3", "1,,2", "1.5", "1-2-3", "²"])
def test_layers_outside_the_model_or_none_at_all_are_refused(text):
    with pytest.raises(ValueError, match=f"^--layers {text!r}: "):
        parse_layers(text, 12)


@pytest.mark.parametrize("text, message", [
    ("1:alpha", "'1:alpha' is not a layer, a range or a strength"),
    ("1:alpha=x", "'1:alpha=x' is not a"), ("1:", "'1:' is not a"),
    ("1-3:alpha=1,2", "layer 2 has two different strengths")])
def test_what_is_no_strength_of_a_range_is_refused(text, message):
    with pytest.raises(ValueError, match=message):
        parse_layers(text, 12)


@pytest.mark.parametrize("name", ["beta", "method", "lam", "rank_by", "gamma"])
def test_strengths_of_layers_that_mean_nothing_to_the_method_are_refused(name):
    with pytest.raises(ValueError, match=f"layer 1 has {name}, but the strengths of int are p, al"):
        Steering("int", layers={1: {name: 2.0}})


# ------------------------------------------------------------------------- names and texts


@each_steering
def test_an_arm_has_a_short_name_of_what_is_not_usual(name, steering):
    assert steering.name == name and not set(name) & set(":/\\ ")


def test_a_steering_as_text_says_all_that_means_something():
    assert str(Steering("none")) == "none"
    assert str(Steering("int", p=0.05)) == (
        "int p=0.05 alpha=1.0 rank_by=magnitude layers=all")
    assert str(Steering("reg", layers={1: {}, 2: {}})) == (
        "reg lam=0.01 normalise=magnitude layers=1-2")


def test_the_settings_of_a_group_method_are_its_own_and_those_of_its_generic_method():
    assert Steering("semantic").settings.keys() == {
        "method", "generic", "groups", "beta_max", "layers", "p", "alpha", "rank_by"}
    assert Steering("semantic", generic="reg").settings.keys() == {
        "method", "generic", "groups", "beta_max", "layers", "lam", "normalise"}


# ------------------------------------------------------------------- through a file and back


@each_steering
def test_a_steering_survives_the_way_through_a_file(name, steering):
    written = json.dumps(steering.settings)
    assert steering_from(json.loads(written), "args.json") == steering


@pytest.mark.parametrize("settings", [
    {}, [], "int", {"p": 0.1}, {"method": "more"}, {"method": ["int"]}, {"method": "int", "p": 2},
    {"method": "int", "p": "x"}, {"method": "int", "lam": 0.1}, {"method": "none", "layers": None},
    {"method": "int", "more": 1}, {"method": "int", "per_memory": 1},
    {"method": "int", "layers": "all"}, {"method": "int", "layers": {"x": {}}},
    {"method": "int", "layers": {"1": 5}}, {"method": "int", "layers": {"1": {"q": 5}}},
    {"method": "int", "layers": {"1": {"p": 5}}}], ids=json.dumps)
def test_a_file_that_describes_no_steering_is_refused_in_one_line(settings):
    with pytest.raises(BadInput, match="^args.json: steering is .* which train.py does not write"):
        steering_from(settings, "args.json")


# --------------------------------------------------------------------- through a command line


def asked_for(*flags):
    """The steering that train.py's flags ask for."""
    return train.read_settings(list(flags)).steering


def test_without_flags_nothing_is_steered():
    assert asked_for() == Steering("none")


@each_steering
def test_a_steering_survives_the_way_through_a_command_line(name, steering):
    given = {**steering.settings, "layers": steering.layers and format_layers(steering.layers)}
    flags = ["--steer", given.pop("method")]
    for setting, value in given.items():
        if value is not None:
            flags += [f"--{setting.replace('_', '-')}", str(value)]
    assert asked_for(*flags) == steering


COMBINATIONS = [(method, generic) for method in METHODS
                for generic in (GENERIC if "generic" in METHODS[method].settings else ("int",))]
VALUES = {"rank_by": "value", "normalise": "softmax", "layers": "2", "divergence": "memory"}


@pytest.mark.parametrize("method, generic", COMBINATIONS)
@pytest.mark.parametrize("name", [name for name in STEERING_FLAGS if name != "generic"])
def test_a_flag_is_taken_where_it_means_something_and_refused_elsewhere(name, method, generic,
                                                                        capsys):
    flag = f"--{name.replace('_', '-')}"
    flags = ["--steer", method, flag, VALUES.get(name, "1")]
    if "generic" in METHODS[method].settings:
        flags += ["--generic", generic]
    if name in meaningful(method, generic):
        value = asked_for(*flags).settings[name]
        assert value in (1, VALUES.get(name), {2: {}})
    else:
        with pytest.raises(SystemExit) as stopped:
            asked_for(*flags)
        assert stopped.value.code == 2
        assert f"{flag} means nothing with --steer {method}" in capsys.readouterr().err


@pytest.mark.parametrize("method", [name for name in METHODS
                                    if "generic" not in METHODS[name].settings])
def test_only_methods_that_scale_a_generic_one_take_its_name(method, capsys):
    with pytest.raises(SystemExit):
        asked_for("--steer", method, "--generic", "reg")
    assert f"--generic means nothing with --steer {method}" in capsys.readouterr().err


@pytest.mark.parametrize("flags, message", [
    (["--layers", "1-9"], "outside the model's layers 1-4"),
    (["--layers", "1:p=3"], "p is 3.0"), (["--layers", "1:gamma=2"], "gamma"),
    (["--p", "1.5"], "p is 1.5"), (["--alpha", "nan"], "'nan' is not a number from")])
def test_a_value_outside_its_limits_is_one_line_on_standard_error(flags, message, capsys):
    with pytest.raises(SystemExit):
        asked_for("--steer", "int", *flags)
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
