"""After this file you know that the README does not lie: its code is the code, its commands parse, its files exist."""
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_the_layer_shown_is_the_layer_used():
    shown = re.search(r"```python\n(.*?)```", README, re.S)[1].splitlines()
    source = {line.strip() for line in (ROOT / "model.py").read_text(encoding="utf-8").splitlines()}
    assert len(shown) > 6
    for line in shown[1:]:                                       # the first line also says where it stands
        assert line.strip() in source


def test_the_files_named_exist():
    for name in re.findall(r"\| `([\w./]+)` \|", README):
        if "." in name or "/" in name:
            assert (ROOT / name).exists() or name.startswith("model."), name


@pytest.mark.parametrize("script", ["train.py", "eval.py", "data/prepare.py", "data/world.py"])
def test_every_flag_named_is_a_flag(script):
    help = subprocess.run([sys.executable, str(ROOT / script), "--help"], capture_output=True, text=True, check=True).stdout
    commands = [line for line in re.findall(r"(?:^    |`|&& )(python " + re.escape(script) + r"[^`\n&]*)", README, re.M)]
    assert commands
    for command in commands:
        for word in shlex.split(command):
            if word.startswith("--"):
                assert re.search(re.escape(word) + r"\b", help), command


def test_the_test_command_is_the_one_that_is_run():
    assert "python -m pytest tests" in README
