"""After this file you know how arms and seeds become runs, and runs a table of the paper."""
import contextlib
import io
import json
import shutil

import pytest

from data import BadInput
from data.tasks import SUITES, TOY
from helpers import checkpoint_folder, write_task
from infosteer import Steering
from lab.experiment import TABLES, arms_of, figures, flags_of, main, table8, tasks_tested
from train import read_settings

RECIPE = ["--steps", "2", "--batch", "4", "--warmup", "1", "--device", "cpu"]
ARMS = ["--steer", "none", "int", "reg", "--rank-by", "value", "--lam", "0.05", "--seed", "0", "1"]


def output(argv):
    """What the command prints on standard output."""
    with contextlib.redirect_stdout(io.StringIO()) as said:
        main([str(one) for one in argv])
    return said.getvalue()


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A folder of runs of a tiny model, the flags that made it, and the rows that were printed."""
    folder = tmp_path_factory.mktemp("experiment")
    model, data = checkpoint_folder(folder / "tiny"), folder / "data"
    questions = [(f"is {n} even?", "true" if n % 2 == 0 else "false") for n in range(12)]
    write_task(data, "boolq", "train", questions)
    write_task(data, "boolq", "test", questions[:6])
    what = ["--model", model, "--task", "boolq", "--data", data, *RECIPE]
    rows = json.loads(output([*ARMS, *what, "--out", folder / "out", "--json"]))["rows"]
    return folder / "out", what, rows


@pytest.fixture
def copied(made, tmp_path):
    shutil.copytree(made[0], tmp_path / "out")
    return tmp_path / "out", made[1]


def settings(folder, name):
    return json.loads((folder / name / "args.json").read_text())


# -------------------------------------------------------------------------------- arms and seeds


def test_every_arm_and_seed_is_a_run_in_a_folder_of_its_own(made):
    assert sorted(path.name for path in made[0].iterdir() if path.is_dir()) == ["tiny-base"] + [
        f"tiny-{arm}-seed{seed}" for arm in ("int-value", "none", "reg-lam0.05") for seed in (0, 1)]


def test_a_steering_flag_goes_to_the_arms_for_which_it_means_something(made):
    assert settings(made[0], "tiny-int-value-seed1")["steering"]["rank_by"] == "value"
    assert settings(made[0], "tiny-reg-lam0.05-seed0")["steering"]["lam"] == 0.05
    assert settings(made[0], "tiny-none-seed0")["steering"] == {"method": "none"}


def test_all_other_flags_go_to_every_run(made):
    for name in ("none", "int-value", "reg-lam0.05"):
        of = settings(made[0], f"tiny-{name}-seed1")
        assert (of["steps"], of["batch"], of["warmup"], of["seed"]) == (2, 4, 1, 1)


def test_the_rows_are_means_over_the_seeds(made):
    rows = {row["arm"]: row for row in made[2]}
    assert list(rows) == ["base", "none", "int-value", "reg-lam0.05"]
    assert [row["seeds"] for row in rows.values()] == [1, 2, 2, 2]
    for arm in ("none", "int-value", "reg-lam0.05"):
        paths = [made[0] / f"tiny-{arm}-seed{seed}" / "eval" / "boolq.json" for seed in (0, 1)]
        found = [json.loads(path.read_text())["accuracy"] for path in paths]
        assert rows[arm]["mean"] == sum(found) / 2
        losses = [json.loads(path.read_text())["nll"] for path in paths]
        assert rows[arm]["nll"] == sum(losses) / 2 > 0
    assert rows["none"]["nll_difference"] is None and len(rows["reg-lam0.05"]["nll_interval"]) == 2


def test_json_has_every_number_of_every_run_and_item(made):
    found = json.loads(output(["--compare", made[0], "--json"]))
    rows, runs = {row["arm"]: row for row in found["rows"]}, found["runs"]
    assert [(run["arm"], run["seed"]) for run in runs] == [("base", None), *(
        (arm, seed) for arm in ("none", "int-value", "reg-lam0.05") for seed in (0, 1))]
    for run in runs:
        path = made[0] / (f"tiny-{run['arm']}" + f"-seed{run['seed']}" * (run["arm"] != "base"))
        lines = (path / "eval" / "boolq.jsonl").read_text().splitlines()
        assert run["items"]["boolq"] == [
            {name: json.loads(line)[name] for name in ("index", "correct", "nll")}
            for line in lines] and len(lines) == 6
    for arm in ("int-value", "reg-lam0.05"):                   # a p value for either kind and both
        of = rows[arm]["nll_levels"]
        assert list(of) == ["seeds", "items", "seeds and items"]
        assert all(0 <= one["p"] <= 1 and one["low"] < one["mean"] < one["high"]
                   for one in of.values())
        assert rows[arm]["nll_holm"] >= rows[arm]["nll_p"] == of["seeds and items"]["p"]
        assert rows[arm]["by_seed"].keys() == {"0", "1"}


def test_finished_runs_are_not_trained_again(made, capsys):
    weights = {path: path.stat().st_mtime_ns for path in made[0].glob("*/model.safetensors")}
    again = json.loads(output([*ARMS, *made[1], "--out", made[0], "--json"]))["rows"]
    assert again == made[2] and len(weights) == 6
    assert weights == {path: path.stat().st_mtime_ns for path in weights}
    assert "6 runs, 6 of them finished; 0 to train" in capsys.readouterr().err


def test_an_interrupted_run_goes_on(copied, capsys):
    out, what = copied
    run = out / "tiny-reg-lam0.05-seed1"
    weights = (run / "model.safetensors").read_bytes()
    run.rename(f"{run}.partial")
    output([*ARMS, *what, "--out", out])
    assert "6 runs, 5 of them finished; 1 to train" in capsys.readouterr().err
    assert (run / "model.safetensors").read_bytes() == weights
    assert not list(out.glob("*.partial"))


def test_a_finished_run_of_another_recipe_is_refused(made):
    with pytest.raises(BadInput, match="another lr"):
        output([*ARMS, *made[1], "--out", made[0], "--lr", "1e-3"])


def test_runs_on_other_data_are_not_compared(copied):
    out, what = copied
    path = out / "tiny-reg-lam0.05-seed1" / "args.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "data_sha256": "another"}))
    with pytest.raises(BadInput, match="seed1: another recipe than the others, another data_sha"):
        output([*ARMS, *what, "--out", out])


def test_overwrite_trains_everything_again(copied, capsys):
    out, what = copied
    output(["--steer", "none", "--seed", "0", *what, "--out", out, "--overwrite", "--lr", "1e-3"])
    assert settings(out, "tiny-none-seed0")["lr"] == 1e-3
    assert "1 runs, 0 of them finished; 1 to train" in capsys.readouterr().err


def test_compare_shows_a_folder_again(made):
    assert json.loads(output(["--compare", made[0], "--json"]))["rows"] == made[2]
    text = output(["--compare", made[0]])
    assert text.splitlines()[2].split() == "arm seeds accuracy, % difference to none".split()
    assert text.splitlines()[9].split() == "arm seeds nll difference to none".split()
    assert max(map(len, text.splitlines())) <= 100
    assert "reg-lam0.05" in text and "95% interval" in text and "the paper" not in text
    assert "(seeds)" not in text.partition("Accuracy, and nll")[0]             # items are there


def test_a_missing_test_file_shows_before_hours_of_training(tmp_path, made):
    write_task(tmp_path / "data", "boolq", "train", [("is it?", "true")])
    with pytest.raises(BadInput, match="boolq.*test.json"):
        output(["--steer", "none", *made[1], "--data", tmp_path / "data", "--out", tmp_path / "o"])
    assert not (tmp_path / "o").exists()


# ----------------------------------------------------------------------------- refused in one line


@pytest.mark.parametrize("argv, message", [
    ([], "give one of these: a table (table1, table2, "),
    (["table2", "--steer", "int"], "give one of these"),
    (["table3"], "'table3' is no table"),
    (["--steer", "int", "int"], "--steer names something twice"),
    (["--steer", "int", "--seed", "1", "1"], "--seed names something twice"),
    (["--steer", "none", "reg", "--rank-by", "value"],
     "--rank-by means nothing with --steer none reg"),
    (["--steer", "semantic", "--lam", "1"], "--lam means nothing with --steer semantic"),
    (["table1", "--lam", "0.5"], "--lam means nothing with table1, whose arms are the paper's"),
    (["--compare", "out", "--lr", "1"], "--compare trains nothing, so --lr means nothing"),
    (["--compare", "out", "--seed", "0"], "--compare trains nothing, so --seed means nothing"),
    (["--compare", "out", "--items", "3"], "--compare trains nothing, so --items means nothing"),
    (["--compare", "out", "--out", "o"], "--compare trains nothing, so --out means nothing"),
    (["--compare", "out", "--lam", "1"], "--compare trains nothing, so --lam means nothing"),
    (["--steer", "int", "--lr", "x"], "argument --lr: "),
    (["--steer", "int", "--p", "x"], "argument --p: "),
    (["--steer", "int", "--seed", "-1"], "argument --seed: '-1' is not a whole number"),
    (["--steer", "int", "--seed", "99999999999999999999"], "argument --seed: '99999999999999999"),
    (["--steer", "int", "--seed", "1", "01"], "--seed names something twice"),
    (["--steer", "int", "--items", "0"], "argument --items: '0' is not a whole number above 0"),
    (["--steer", "int", "--items", "99999999999999999999"], "argument --items: '9999999999"),
    (["--steer", "int", "--nonsense"], "unrecognized arguments: --nonsense"),
], ids=lambda value: " ".join(value) if isinstance(value, list) else "")
def test_what_means_nothing_is_refused_in_one_line(argv, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stopped:
        main(argv)
    error = capsys.readouterr().err
    assert stopped.value.code == 2 and message in error and error.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_table4_is_about_gsm8k():
    with pytest.raises(BadInput, match="table4 trains on gsm8k"):
        tasks_tested("table4", ["boolq"])


# ----------------------------------------------------------------------------- the paper's tables


@pytest.mark.parametrize("name", TABLES)
def test_every_arm_of_a_table_can_be_asked_for_and_has_a_name_of_its_own(name):
    arms = [arm for arm, _ in arms_of(TABLES[name], 4) if arm]
    assert [arm.name for arm in arms][0] == "none"
    assert len({arm.name for arm in arms}) == len(arms)
    for arm in arms:
        assert read_settings(flags_of(arm)).steering == arm


@pytest.mark.parametrize("name", TABLES)
def test_int_stands_in_every_table_in_both_readings_of_eq_4(name):
    arms = [arm for arm, _ in arms_of(TABLES[name], 24) if arm and "rank_by" in arm.settings]
    assert bool(arms) == (name != "table7")
    for one, other in zip(arms[::2], arms[1::2], strict=True):
        assert (one.rank_by, other.rank_by) == ("magnitude", "value")
        assert {**other.settings, "rank_by": "magnitude"} == one.settings


def test_thirds_of_the_layers_are_those_of_table_8():
    names, toy = [arm.name for arm, _ in table8(24)], [arm.name for arm, _ in table8(4)]
    assert names[1:4] == ["int-layers1-8", "int-layers9-16", "int-layers17-24"]
    assert names[4:6] == ["int-layers1-16", "int-layers9-24"]
    assert names[6] == "int-layers1-8@alpha=2,9-16@alpha=3,17-24@alpha=1"
    assert toy[1:4] == ["int-layers1", "int-layers2-3", "int-layers4"]
    with pytest.raises(BadInput, match="2 layers cannot be divided"):
        table8(2)


def test_in_the_toy_world_a_figure_of_the_paper_stands_in_distribution():
    suites = tasks_tested("table2", ["toy-facts"])
    assert list(suites) == list(SUITES)
    paper = figures("table2", arms_of(TABLES["table2"], 4), suites)
    assert paper["int-alpha2", SUITES[0]] == 75.5 and paper["base", SUITES[0]] == 71.4
    assert {suite for _, suite in paper} == {SUITES[0]}
    assert not any("value" in arm for arm, _ in paper)


def test_table_1_has_a_figure_for_each_of_its_tasks():
    tasks = ["boolq", "piqa"]
    suites = tasks_tested("table1", tasks)
    assert suites == {"mean": tasks, "boolq": ["boolq"], "piqa": ["piqa"]}
    paper = figures("table1", arms_of(TABLES["table1"], 4), suites)
    assert (paper["base", "boolq"], paper["none", "boolq"]) == (67.9, 71.6)
    assert (paper["int", "piqa"], paper["reg", "piqa"]) == (87.0, 86.3)
    assert paper["none", "mean"] == round((71.6 + 85.1) / 2, 1)


def test_the_mean_over_the_tasks_of_table_1_is_the_one_it_states():
    suites = tasks_tested("table1", ["commonsense"])
    assert len(suites["mean"]) == 8 and len(suites) == 9
    paper = figures("table1", arms_of(TABLES["table1"], 4), suites)
    for arm, figure in TABLES["table1"]:
        assert paper[arm.name if arm else "base", "mean"] == figure


def test_table_1_has_no_figure_for_a_task_that_is_not_in_it():
    assert figures("table1", arms_of(TABLES["table1"], 4), tasks_tested("table1", ["gsm8k"])) == {}


def test_table_4_scores_five_other_sets_and_aqua_after_gsm8k():
    suites = tasks_tested("table4", ["gsm8k"])
    assert [len(tasks) for tasks in suites.values()] == [1, 5] + [1] * 6 and "AQuA" in suites
    assert "AQuA" not in suites["out of distribution"]
    paper = figures("table4", arms_of(TABLES["table4"], 4), suites)
    assert paper["int", "in distribution"] == 66.8 and paper["int", "out of distribution"] == 86.6
    assert set(tasks_tested("table4", ["toy-sums"])) == {*SUITES, *TOY}


def test_a_table_is_trained_scored_and_set_beside_the_paper_s(tmp_path, capsys):
    recipe = ["--steps", "1", "--limit", "10", "--items", "2", "--device", "cpu"]
    main(["table1", "--seed", "0", *recipe, "--out", str(tmp_path)])
    out = capsys.readouterr().out
    lines = [line.split() for line in out.splitlines()]
    assert lines[2][-3:] == ["the", "paper", "excludes"]
    assert [(line[0], *(word for word in line if word in {"76.8", "81.2", "83.3", "82.6"}))
            for line in lines[4:9]] == [("base", "76.8"), ("none", "81.2"), ("int", "83.3"),
                                        ("int-value",), ("reg", "82.6")]
    assert lines[6][-2] == "(items)"   # one seed has an interval over its items
    assert "The paper: Table 1" in out and "next" not in out
    assert len(list(tmp_path.glob("llama-*-seed0"))) == 4
