"""flows/prefect_server.py: garbage keeps no event loop waiting."""

import subprocess
import sys
from pathlib import Path

PROGRAM = """
import contextlib, sqlite3, sys, threading, time
from flows.prefect_server import collect_apart

collect_apart()
holds, waits = (sqlite3.connect(sys.argv[1], isolation_level=None, check_same_thread=False, timeout=10) for _ in range(2))
holds.execute("PRAGMA journal_mode = WAL")
holds.execute("CREATE TABLE numbers (number INTEGER PRIMARY KEY)")
holds.execute("INSERT INTO numbers VALUES (1)")


def fail():  # what failed stays in its cursor, and the cursor in a circle, as in a traceback
    cursor = waits.cursor()
    with contextlib.suppress(sqlite3.IntegrityError):
        cursor.execute("INSERT INTO numbers VALUES (1)")
    circle = [cursor]
    circle.append(circle)


def wait():
    try:
        waits.execute("BEGIN IMMEDIATE")
        print("the lock came")
    except sqlite3.OperationalError as error:
        print(error)


fail()
holds.execute("BEGIN IMMEDIATE")
thread = threading.Thread(target=wait)
thread.start()
time.sleep(0.3)
kept = [[] for _ in range(100_000)]  # the loop allocates: Python collects
time.sleep(1)  # and so does the thread that is there for it
holds.execute("COMMIT")
thread.join()
"""


def test_who_waits_for_sqlite_does_not_keep_the_loop_from_its_commit(tmp_path: Path) -> None:
    command = [sys.executable, "-c", PROGRAM, str(tmp_path / "prefect.db")]
    done = subprocess.run(command, cwd=Path(__file__).parents[2], capture_output=True, text=True, timeout=60)
    assert (done.stdout.strip(), done.stderr) == ("the lock came", "")
