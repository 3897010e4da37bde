"""What is said to libraries is said in time, and no louder than their user."""

import gc
import os
import subprocess
import sys
from pathlib import Path

import pytest

from model.libraries import prepare_libraries, without_collector


@pytest.mark.parametrize("theirs", [None, "0"])
def test_the_users_own_setting_stays(monkeypatch, theirs):
    monkeypatch.setattr(os, "environ", {} if theirs is None else {"THP_MEM_ALLOC_ENABLE": theirs})
    prepare_libraries()
    assert os.environ["THP_MEM_ALLOC_ENABLE"] == (theirs or "1")
    assert os.environ["GOMP_SPINCOUNT"] == "1000"


@pytest.mark.parametrize("module", ["model.training.__main__", "flows.cli"])
def test_who_says_it_has_not_imported_torch_before(module):
    program = f"import sys, {module}, model.libraries; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, cwd=Path(__file__).parents[2])
    assert done.stdout == "False\n"


def test_nobody_looks_for_garbage_while_libraries_are_imported():
    before = gc.get_freeze_count()
    with without_collector():
        assert not gc.isenabled()
    assert gc.isenabled()
    assert gc.get_freeze_count() > before
    gc.unfreeze()
