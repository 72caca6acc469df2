"""`make audit`: known vulnerabilities of the packages of .venv, from the advisories of PyPI.

The exit status is 0 if every package was looked up and has none, 1 for one that has some, 2 if some were not looked up.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent


def main() -> int:
    """Look up, and print what was found."""
    (packages,) = (ROOT / ".venv" / "lib").glob("python*/site-packages")
    audit = [sys.executable, "-m", "pip_audit", "--skip-editable", "--progress-spinner=off", "--format=json"]
    ran = subprocess.run([*audit, "--path", packages], capture_output=True, text=True)
    try:
        found = json.loads(ran.stdout)["dependencies"]
    except ValueError:
        reason = (ran.stderr.strip() or "pip-audit said nothing").splitlines()[-1]
        print(f"audit: nothing was looked up, as the advisories could not be reached: {reason}")
        return 2
    lines, status = report(found)
    print(*lines, sep="\n")
    return status


def report(found: list[dict[str, Any]]) -> tuple[list[str], int]:
    """What pip-audit found, in lines, and the exit status."""
    looked_up = [each for each in found if "vulns" in each]
    missed = [each for each in found if "skip_reason" in each and "editable" not in each["skip_reason"]]
    flaws = [(each, flaw) for each in looked_up for flaw in each["vulns"]]
    lines = [
        f"{each['name']} {each['version']}: {flaw['id']}, mended in {', '.join(flaw['fix_versions']) or 'none yet'}"
        for each, flaw in flaws
    ]
    if looked_up:
        lines.append(f"audit: {len(looked_up)} packages were looked up, and have {len(flaws)} known vulnerabilities")
    if missed:
        reason = "" if looked_up else ": the advisories cannot be reached from here"
        lines.append(f"audit: {len(missed)} packages could not be looked up{reason}")
    return lines, 1 if flaws else 2 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
