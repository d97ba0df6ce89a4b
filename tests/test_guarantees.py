"""Every guarantee has a test that provokes its failure; docs/guarantees.md is generated from them."""

import sys
from pathlib import Path

TESTS = Path(__file__).parent


def test_each_guarantee_has_a_test_that_provokes_its_failure_and_names_only_tests_that_exist() -> None:
    sys.path.insert(0, str(TESTS.parent / "docs"))
    from guarantees_page import list_guarantees

    guarantees = list_guarantees()
    assert [guarantee.number for guarantee in guarantees] == list(range(29))
    for guarantee in guarantees:
        assert guarantee.provokes, f"{guarantee.test} never looks at the message that the page has"
        for named in (guarantee.test, *guarantee.also):
            file, _, test = named.partition("::")
            text = (TESTS / file).read_text()
            assert not test or f"def {test}(" in text, named
        for case in guarantee.cases:
            assert (TESTS.parent / "benchmarks" / "conformance" / "cases" / f"{case}.py").exists(), case
