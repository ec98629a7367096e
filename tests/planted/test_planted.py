# SPDX-License-Identifier: Apache-2.0
"""The table of mistakes fits the project, and those in the sources of the site are seen.

`make planted` plants all of them; that takes too long here.
"""

import re
from collections import Counter

import plant
import pytest

FAULTS = plant.read_table()
QUICK = plant.batches([fault for fault in FAULTS if fault.check == plant.SOURCES])[0]


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name)
def test_a_fault_can_be_planted(fault):
    text = (plant.TOP / fault.file).read_text(encoding="utf-8")
    assert text.count(fault.old) == 1, (
        f"{fault.file} holds the old text {text.count(fault.old)} times"
    )
    assert fault.old != fault.new and all(fault.says)
    file, _, name = fault.check.partition("::")
    if fault.check != plant.SOURCES:
        tests = (plant.TOP / file).read_text(encoding="utf-8")
        assert not name or f"def {name.partition('[')[0]}(" in tests
        assert not fault.says[0].startswith("test_") or re.search(
            rf"def {fault.says[0]}\w*\(", tests
        )


def test_the_table_is_long_enough():
    assert len(FAULTS) >= 100
    assert max(Counter(fault.name for fault in FAULTS).values()) == 1


def test_faults_in_the_sources_of_the_site_are_seen(tmp_path):
    """Those that can be planted together, in a copy."""
    assert len(QUICK) >= 20
    copy = plant.copy_project(tmp_path)
    for fault, code, output in plant.plant(QUICK, [copy]):
        assert fault.is_seen(code, output), f"{fault.name}: expected {fault.says} in\n{output}"


def test_a_fault_that_nothing_sees_is_told():
    fault = FAULTS[0]
    assert not fault.is_seen(0, "")
    assert not fault.is_seen(1, f"another.md:1: {fault.says[0]}")
    assert fault.is_seen(1, f"{fault.file}:1: {' '.join(fault.says)}")


def test_an_old_text_that_is_gone_is_an_error(tmp_path):
    fault = FAULTS[0]
    (tmp_path / fault.file).parent.mkdir(parents=True)
    (tmp_path / fault.file).write_text("something else")
    with pytest.raises(ValueError, match="stands 0 times"):
        fault.apply(tmp_path)
