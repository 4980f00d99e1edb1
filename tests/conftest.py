"""Shared by all tests: the project's root on the path, and the optional folder of real files."""
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
SHARED = ROOT.parent / "shared"            # real datasets and tokenizers; not part of the project, so tests skip without it
sys.path.insert(0, str(ROOT))
torch.set_num_threads(1)                   # the models are tiny: a second thread only waits, and badly so on a busy machine


@pytest.fixture
def shared():
    if not SHARED.is_dir():
        pytest.skip(f"needs real tokenizer and dataset files in {SHARED}")
    return SHARED
