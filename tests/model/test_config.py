"""The fields of an experiment and their bounds."""

import pytest
from pydantic import ValidationError

from model.config import EvaluationConfig


def test_questions_are_asked_of_items():
    assert EvaluationConfig(items=5, questions=5).questions == 5
    with pytest.raises(ValidationError, match=r"questions \(300\) are asked of items \(256\)"):
        EvaluationConfig(questions=300)
    assert len(EvaluationConfig().prompts) == 10
