"""List the suites, and find one by its name."""

from __future__ import annotations

import difflib

from diffalign.bench.dpgbench import DPGBENCH
from diffalign.bench.geneval import GENEVAL, SHAPES
from diffalign.bench.geneval2 import GENEVAL2
from diffalign.bench.human_preference import HPSV2, PICKAPIC
from diffalign.bench.suite import Suite
from diffalign.bench.t2i_compbench import T2I_COMPBENCH
from diffalign.bench.unigenbench import UNIGENBENCH
from diffalign.bench.wise import WISE
from diffalign.errors import DiffalignError

SUITES: dict[str, Suite] = {
    suite.name: suite
    for suite in (SHAPES, GENEVAL, GENEVAL2, DPGBENCH, T2I_COMPBENCH, HPSV2, PICKAPIC, UNIGENBENCH, WISE)
}
ALSO = {"dpg": "dpgbench", "t2i": "t2i-compbench"}
"""Short names that people write."""


def find_suite(name: str) -> Suite:
    """Return a suite. Raises DiffalignError for a name that is none, with the nearest one."""
    name = ALSO.get(name, name)
    if name not in SUITES:
        near = difflib.get_close_matches(name, SUITES, n=1)
        hint = f"did you mean {near[0]}?" if near else f"one of {', '.join(SUITES)}"
        raise DiffalignError(f"--task {name}: unknown suite; {hint}")
    return SUITES[name]
