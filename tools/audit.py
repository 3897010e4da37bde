"""`make audit`: is a vulnerability known of what is installed here? Asks pip-audit, and holds its answer against dated waivers.

    python tools/audit.py [--requirements FILE] [--service pypi|osv] [--waivers tools/audit.toml]

It fails of a vulnerability that nobody waived, of a waiver that has expired, and of an answer that cannot be trusted: pip-audit takes a
package that its service does not know for a clean one, and behind a mirror no package is known. So it asks about one more package, of
which everybody knows that it is vulnerable.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.metadata
import importlib.util
import json
import re
import subprocess
import sys
import tempfile
import tomllib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

KNOWN_TO_BE_VULNERABLE = "pycrypto==2.6.1"
"""CVE-2013-7459, never mended: the package was given up."""
OURSELVES = "gpt2-from-scratch"
LONGEST_WAIVER = datetime.timedelta(days=184)
"""Then somebody has to look again."""


@dataclass(frozen=True)
class Waiver:
    """One vulnerability that is known and lived with, for a while."""

    id: str
    """Of the vulnerability: PYSEC-…, GHSA-… or CVE-…."""
    package: str
    reason: str
    """Why it does not matter here."""
    date: datetime.date
    """When somebody decided so."""
    expires: datetime.date
    """When somebody has to decide anew: at most half a year later."""


class AuditFailed(Exception):
    """The audit could not be made; the message is one line."""


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code: 0 nothing to do, 1 there is, or nobody knows, 2 a mistake in the waivers."""
    parser = argparse.ArgumentParser(description="Is a vulnerability known of what is installed here?")
    parser.add_argument("--requirements", type=Path, help="pinned versions to ask about, instead of the installed ones")
    parser.add_argument("--service", choices=("pypi", "osv"), default="pypi", help="whom to ask")
    parser.add_argument("--osv-url", help="where OSV's query interface is, if not at osv.dev")
    parser.add_argument("--waivers", type=Path, default=Path(__file__).with_name("audit.toml"), help="vulnerabilities lived with")
    options = parser.parse_args(arguments)
    service = ["--vulnerability-service", options.service, *(["--osv-url", options.osv_url] if options.osv_url else [])]
    try:
        waivers = read_waivers(options.waivers)
    except (OSError, ValueError) as error:
        return _said(f"{options.waivers}: {error}", 2)
    try:
        pins = pins_of(options.requirements.read_text("utf-8")) if options.requirements else sorted(installed())
        found = ask(pins, service)
    except (OSError, AuditFailed) as error:
        return _said(str(error), 1)
    complaints = list(complaints_about(found, waivers, datetime.datetime.now(datetime.UTC).date()))
    for complaint in complaints:
        print(complaint)
    if not complaints:
        print(f"{len(pins)} packages, nothing known against them{f' that is not waived ({len(waivers)})' if waivers else ''}")
    return 1 if complaints else 0


def read_waivers(path: Path) -> list[Waiver]:
    """The waivers of a file.

    Raises:
        ValueError: not TOML, a field is missing, unknown or of another kind, or a waiver for too long.
    """
    written = tomllib.loads(path.read_text(encoding="utf-8"))
    if set(written) - {"waiver"}:
        raise ValueError(f"knows only [[waiver]], not {', '.join(sorted(set(written) - {'waiver'}))}")
    waivers = []
    for number, entry in enumerate(written.get("waiver", []), 1):
        wanted = {field.name: datetime.date if field.name in ("date", "expires") else str for field in fields(Waiver)}
        wrong = sorted(set(entry) ^ set(wanted))
        wrong = wrong or [name for name, kind in wanted.items() if type(entry[name]) is not kind or not entry[name]]
        if wrong:
            raise ValueError(f"waiver {number}: needs {', '.join(wanted)} (two dates such as 2026-11-23), look at: {', '.join(wrong)}")
        waiver = Waiver(**entry)
        if not waiver.date < waiver.expires <= waiver.date + LONGEST_WAIVER:
            raise ValueError(f"waiver {number}: `expires` must come after `date`, and at most {LONGEST_WAIVER.days} days later")
        waivers.append(waiver)
    return waivers


def installed() -> Iterator[str]:
    """`name==version` of every installed package but this project. A build's mark such as +cpu means nothing to a package index."""
    found: dict[str, str] = {}
    for distribution in importlib.metadata.distributions():
        found.setdefault(_canonical(distribution.name), distribution.version.partition("+")[0])  # the first on the path is imported
    found.pop(OURSELVES, None)
    yield from (f"{name}=={version}" for name, version in found.items())


def pins_of(text: str) -> list[str]:
    """The pinned lines of a requirements file."""
    lines = [line.partition("#")[0].strip() for line in text.splitlines()]
    return [f"{name}=={version.partition('+')[0]}" for name, equals, version in (line.partition("==") for line in lines) if equals]


def ask(pins: Iterable[str], service: Sequence[str]) -> list[dict[str, Any]]:
    """What pip-audit says of each package.

    Raises:
        AuditFailed: it could not find out, or its service is none.
    """
    if importlib.util.find_spec("pip_audit") is None:
        raise AuditFailed("not audited: pip-audit is not installed; `make audit` installs it, or: pip install -e '.[audit]'")
    with tempfile.TemporaryDirectory() as scratch:
        asked = Path(scratch) / "requirements.txt"
        asked.write_text("\n".join({*pins, KNOWN_TO_BE_VULNERABLE}) + "\n", encoding="utf-8")
        quiet = ["--format", "json", "--progress-spinner", "off", "--disable-pip", "--no-deps", "--requirement", str(asked)]
        done = subprocess.run([sys.executable, "-m", "pip_audit", *quiet, *service], capture_output=True, text=True)
    try:
        answers: list[dict[str, Any]] = json.loads(done.stdout)["dependencies"]
    except (ValueError, KeyError, TypeError):
        last = (done.stderr.strip().splitlines() or ["it said nothing"])[-1]
        raise AuditFailed(f"not audited: pip-audit got no answer ({last[:300]}); it needs the network, or another --service") from None
    known = KNOWN_TO_BE_VULNERABLE.partition("==")[0]
    if not any(answer["name"] == known and answer.get("vulns") for answer in answers):
        raise AuditFailed(
            f"not audited: whoever answers knows nothing against {KNOWN_TO_BE_VULNERABLE}, which is known to be vulnerable "
            "(a mirror of the package index without its vulnerabilities?); ask from another network, or with another --service"
        )
    return [answer for answer in answers if answer["name"] != known]


def complaints_about(answers: Iterable[dict[str, Any]], waivers: Sequence[Waiver], today: datetime.date) -> Iterator[str]:
    """What is wrong, a line each: vulnerabilities without a waiver, packages that nobody knows, waivers that expired or are for nothing."""
    used = set()
    for answer in answers:
        if "skip_reason" in answer:
            yield f"{answer['name']}: not audited: {answer['skip_reason']}"
        for vulnerability in answer.get("vulns", []):
            names = {vulnerability["id"], *vulnerability.get("aliases", [])}
            waiver = next((w for w in waivers if w.id in names and _canonical(w.package) == _canonical(answer["name"])), None)
            if waiver is not None:
                used.add(waiver)
                continue
            cure = f"fixed in {', '.join(vulnerability['fix_versions'])}" if vulnerability.get("fix_versions") else "not fixed yet"
            about = " ".join(vulnerability.get("description", "").split())[:120]
            yield f"{answer['name']} {answer['version']}: {', '.join(sorted(names))}: {cure}; {about}"
    for waiver in waivers:
        if waiver.expires < today:
            yield f"{waiver.package}: the waiver of {waiver.id} expired on {waiver.expires}; look again ({waiver.reason})"
        elif waiver not in used:
            yield f"{waiver.package}: the waiver of {waiver.id} is for nothing any more; remove it"


def _canonical(name: str) -> str:
    """PEP 503's spelling."""
    return re.sub(r"[-_.]+", "-", name).lower()


def _said(line: str, code: int) -> int:
    print(f"error: {' '.join(line.split())}", file=sys.stderr)
    return code


if __name__ == "__main__":
    sys.exit(main())
