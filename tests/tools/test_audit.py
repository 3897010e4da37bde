"""`make audit` with the real pip-audit, and a server on loopback that answers as OSV does (the entries are OSV's, shortened)."""

from __future__ import annotations

import datetime
import json
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("pip_audit", reason="pip-audit is not installed: make setup")

AUDIT = Path(__file__).parents[2] / "tools" / "audit.py"


def entry(package: str, name: str, alias: str, fixed: str | None, summary: str) -> dict[str, Any]:
    events = [{"introduced": "0"}, *([{"fixed": fixed}] if fixed else [])]
    return {
        "id": name,
        "summary": summary,
        "details": summary,
        "aliases": [alias],
        "modified": "2023-11-08T04:03:22.446410Z",
        "published": "2021-03-25T21:26:26Z",
        "schema_version": "1.7.3",
        "affected": [
            {
                "package": {"name": package, "ecosystem": "PyPI", "purl": f"pkg:pypi/{package}"},
                "ranges": [{"type": "ECOSYSTEM", "events": events}],
                "versions": ["5.3", "5.3.1"],
            }
        ],
    }


PYYAML = entry("pyyaml", "GHSA-8q59-q68h-6hv4", "CVE-2020-14343", "5.4", "Improper Input Validation in PyYAML")
PYCRYPTO = entry("pycrypto", "GHSA-cq27-v7xp-c356", "CVE-2013-7459", None, "Buffer Overflow in pycrypto")


class Osv:
    """What it answers by package, and where."""

    def __init__(self) -> None:
        self.vulnerabilities: dict[str, list[dict[str, Any]]] = {"pycrypto": [PYCRYPTO]}
        self.asked: set[tuple[str, str]] = set()
        osv = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                query = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                osv.asked.add((query["package"]["name"], query["version"]))
                vulnerabilities = osv.vulnerabilities.get(query["package"]["name"])
                body = json.dumps({"vulns": vulnerabilities} if vulnerabilities else {}).encode()
                self.send_response(200)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *_: object) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}/v1/query"


@pytest.fixture
def osv() -> Iterator[Osv]:
    osv = Osv()
    thread = threading.Thread(target=osv.server.serve_forever, daemon=True)
    thread.start()
    yield osv
    osv.server.shutdown()
    osv.server.server_close()
    thread.join()


def audit(tmp_path: Path, url: str, waivers: str = "") -> tuple[int, str, str]:
    (tmp_path / "audit.toml").write_text(waivers)
    (tmp_path / "requirements.txt").write_text("# pinned\npyyaml==5.3\nTorch==2.13.0+cpu  # a build of its own\n")
    options = ["--requirements", str(tmp_path / "requirements.txt"), "--waivers", str(tmp_path / "audit.toml")]
    command = [sys.executable, str(AUDIT), "--service", "osv", "--osv-url", url, *options]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    return done.returncode, done.stdout, done.stderr


def waiver(ends: int, began: int = -30, **changes: str) -> str:
    """A waiver from `began` to `ends`, in days from today."""
    today = datetime.datetime.now(datetime.UTC).date()
    fields = {"id": '"CVE-2020-14343"', "package": '"PyYAML"', "reason": '"only a SafeLoader is used"'}
    fields |= {"date": str(today + datetime.timedelta(began)), "expires": str(today + datetime.timedelta(ends)), **changes}
    return "[[waiver]]\n" + "".join(f"{key} = {value}\n" for key, value in fields.items() if value)


def test_nothing_known_is_nothing_to_do(tmp_path: Path, osv: Osv) -> None:
    assert audit(tmp_path, osv.url) == (0, "2 packages, nothing known against them\n", "")
    assert osv.asked == {("pyyaml", "5.3"), ("torch", "2.13.0"), ("pycrypto", "2.6.1")}


@pytest.mark.slow
def test_a_vulnerability_fails_until_it_is_waived_and_again_when_the_waiver_expires(tmp_path: Path, osv: Osv) -> None:
    osv.vulnerabilities["pyyaml"] = [PYYAML]
    code, out, _ = audit(tmp_path, osv.url)
    assert code == 1
    assert out == "pyyaml 5.3: CVE-2020-14343, GHSA-8q59-q68h-6hv4: fixed in 5.4; Improper Input Validation in PyYAML\n"
    assert audit(tmp_path, osv.url, waiver(30)) == (0, "2 packages, nothing known against them that is not waived (1)\n", "")
    code, out, _ = audit(tmp_path, osv.url, waiver(-1))
    assert code == 1
    assert "the waiver of CVE-2020-14343 expired on" in out
    assert audit(tmp_path, osv.url, waiver(30, package='"torch"'))[0] == 1, "it is another package's"


def test_a_waiver_for_nothing_is_removed(tmp_path: Path, osv: Osv) -> None:
    code, out, _ = audit(tmp_path, osv.url, waiver(30))
    assert code == 1
    assert out == "PyYAML: the waiver of CVE-2020-14343 is for nothing any more; remove it\n"


@pytest.mark.parametrize(
    ("waivers", "complaint"),
    [
        (waiver(30, reason=""), "look at: reason"),
        (waiver(30, reason='""'), "look at: reason"),
        (waiver(30, expires='"never"'), "look at: expires"),
        (waiver(365), "at most 184 days later"),
        (waiver(-60), "must come after"),
        (waiver(30, until="2027-01-01"), "look at: until"),
        ("waiver", "audit.toml"),
        ("[ignore]", "only [[waiver]]"),
    ],
)
def test_a_waiver_without_reason_or_end_is_none(tmp_path: Path, waivers: str, complaint: str) -> None:
    code, out, err = audit(tmp_path, "http://127.0.0.1:9/", waivers)
    assert (code, out) == (2, "")
    assert complaint in err
    assert err.count("\n") == 1


def test_nobody_who_answers_is_no_clean_bill(tmp_path: Path) -> None:
    code, out, err = audit(tmp_path, "http://127.0.0.1:9/v1/query")
    assert (code, out) == (1, "")
    assert err.startswith("error: not audited")
    assert err.count("\n") == 1


def test_somebody_who_knows_nothing_is_no_clean_bill(tmp_path: Path, osv: Osv) -> None:
    osv.vulnerabilities = {}
    code, out, err = audit(tmp_path, osv.url)
    assert (code, out) == (1, "")
    assert "knows nothing against pycrypto" in err
    assert err.count("\n") == 1
