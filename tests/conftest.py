"""Shared by all tests: where things are, the marks, and the optional folder of real files."""
import os
import sys
from pathlib import Path

import pytest
import torch

TESTS = Path(__file__).resolve().parent
ROOT = TESTS.parent
SHARED = ROOT.parent / "shared"        # real datasets and tokenizers, which are no part of this
MODELS = Path(os.environ.get("INFOSTEER_MODELS") or ROOT.parent / "models")
sys.path[:0] = [str(ROOT), str(TESTS)]

MARKS = {
    "course": "the tests to read first, in the order of their numbers",
    "memory": "how much memory a function keeps; a right answer in plain autograd fails these",
    "real": "needs a real published model, and is skipped where there is none",
}


def pytest_configure(config):
    for mark, meaning in MARKS.items():
        config.addinivalue_line("markers", f"{mark}: {meaning}")


@pytest.fixture(autouse=True)
def one_thread():
    """The models are tiny: a second thread would only wait. A command may have asked for more."""
    torch.set_num_threads(1)


@pytest.fixture
def shared():
    if not SHARED.is_dir():
        pytest.skip(f"needs real tokenizer and dataset files in {SHARED}")
    return SHARED


@pytest.fixture(scope="session")
def real_models():
    """The folder of published models: smollm2-135m-instruct, gemma-3-270m, gguf/."""
    if not (MODELS / "smollm2-135m-instruct").is_dir():
        pytest.skip(f"needs published models in {MODELS}; INFOSTEER_MODELS names another folder")
    return MODELS
