"""Fails where a test was skipped for a reason that is not on a list.

python .ci/skips.py TESTS.xml ALLOWED.txt
"""

from __future__ import annotations

import sys
from pathlib import Path
from xml.etree import ElementTree


def main(report: Path, allowed: Path) -> int:
    """0 where every skipped test had an allowed reason, else 1."""
    lines = (line.split("#")[0].strip() for line in allowed.read_text().splitlines())
    reasons = [line for line in lines if line]
    n_tests = n_skipped = n_refused = 0
    for test in ElementTree.parse(report).iter("testcase"):
        n_tests += 1
        for skipped in test.iter("skipped"):
            n_skipped += 1
            message = skipped.get("message", "")
            if not any(reason in message for reason in reasons):
                n_refused += 1
                print(f"{test.get('classname')}::{test.get('name')} was skipped: {message}")
    if n_tests == 0:
        print("no test ran")
        return 1
    print(f"{n_tests} tests, {n_skipped} skipped, {n_refused} of them without an allowed reason")
    return 1 if n_refused else 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), Path(sys.argv[2])))
