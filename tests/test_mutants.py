"""The mistakes of `python -m tests.mutants` can still be planted: their places have not changed."""

from __future__ import annotations

import ast

from tests.mutants import MUTANTS
from tests.needs import ROOT


def test_every_mistake_has_its_place() -> None:
    assert len({mutant.name for mutant in MUTANTS}) == len(MUTANTS) >= 25
    for mutant in MUTANTS:
        text = (ROOT / mutant.file).read_text()
        assert text.count(mutant.old) == 1, f"{mutant.name}: look for its new place in {mutant.file}"
        assert mutant.new != mutant.old
        if mutant.file.endswith(".py"):
            ast.parse(text.replace(mutant.old, mutant.new))
        for test in mutant.tests.split():
            path, _, function = test.partition("::")
            assert not function or f"def {function}(" in (ROOT / path).read_text(), test
