"""What docs/operations.md says about faults is shown by tests that exist; and every fault test is told of there."""

import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
OPERATIONS = (ROOT / "docs" / "operations.md").read_text(encoding="utf-8")


def test_every_test_that_the_table_of_faults_names_exists():
    there = {name for path in (ROOT / "tests").rglob("test_*.py") for name in re.findall(r"^def (test_\w+)", path.read_text(), re.M)}
    named = set(re.findall(r"`(test_\w+)`", OPERATIONS))
    assert len(named) > 30
    assert named <= there, sorted(named - there)
