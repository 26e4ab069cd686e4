#!/usr/bin/env python3
"""What a results store stands: the measurements of docs/RESULTS.md that take too long for a test.

    tests/store_limits.py kills PROGRAM [N]        kills a sweep of 209 units N times (100) at random moments, and compares with an undisturbed one
    tests/store_limits.py rows PROGRAM [MILLIONS]  times lists and reports of a store of so many rows (1), made by repeating those of a sweep

PROGRAM is a release build of gearbox. Everything is written to a temporary folder, which goes away again.
"""

import json
import random
import sqlite3
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

UNITS = {
    "pipelines": [
        {
            "routes": [{"codec": {"id": "zstd", "level": {"sweep": list(range(1, 20))}}}],
            "chunking": {"mode": "chunked", "tokens": {"sweep": [16, 32, 48, 64, 80, 96, 112, 128, 160, 192, 224]}},
        }
    ]
}


def run(*command):
    """Seconds and standard output of a command that must succeed."""
    start = time.monotonic()
    found = subprocess.run([str(part) for part in command], capture_output=True, text=True)
    if found.returncode:
        sys.exit(f"{command}: exit status {found.returncode}\n{found.stdout}{found.stderr}")
    return time.monotonic() - start, found.stdout


def kills(folder, program, count=100):
    config, whole, killed = (folder / name for name in ("sweep.json", "whole.db", "killed.db"))
    config.write_text(json.dumps(UNITS))
    seconds, said = run(program, "sweep", config, "--results", whole)
    print(f"undisturbed: {seconds:.1f} s; {said.splitlines()[-1]}")
    # Half of the kills hit a sweep that still looks for what is left to do, the others come so soon after that it takes all of them to get
    # to the end.
    idle = run(program, "sweep", config, "--results", whole)[0]
    chance, held, sound = random.Random(7), [], 0
    for turn in range(int(count)):
        pause = chance.uniform(0, idle) if turn % 2 else idle + chance.uniform(0, 4 * (seconds - idle) / int(count))
        process = subprocess.Popen([program, "sweep", config, "--results", killed], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        time.sleep(pause)
        process.kill()
        process.wait()
        with sqlite3.connect(killed) as store:
            rows, keys = 0, 0
            if store.execute("SELECT count(*) FROM sqlite_schema WHERE name = 'rows'").fetchone()[0]:
                rows, keys = store.execute("SELECT count(*), count(DISTINCT key) FROM rows").fetchone()
            sound += store.execute("PRAGMA integrity_check").fetchone()[0] == "ok" and rows == keys
        held.append(rows)
    print(f"rows held after each kill: {held}")
    print(f"sound and without doubles after {sound} of {count} kills")
    print(run(program, "sweep", config, "--results", killed)[1].splitlines()[-1])
    print(run(program, "results", "diff", whole, killed)[1].strip())


def multiply(path, wanted):
    """Repeats the rows of a store, each with a key of its own and slightly other numbers."""
    changed = dict.fromkeys(("ratio", "worst_head_cosine", "kl_p99", "output_error"), "{} * (1 - (abs(random()) % 1000) / 20000.0)")
    changed |= {"key": "lower(hex(randomblob(16)))", "stored_bytes": "{} + abs(random()) % 100000"}
    store = sqlite3.connect(path)
    store.execute("PRAGMA journal_mode = OFF")
    held, last = store.execute("SELECT count(*), max(id) FROM rows").fetchone()
    names = [row[1] for row in store.execute("PRAGMA table_info(rows)") if row[1] != "id"]
    values = ", ".join(changed.get(name, "{}").format(name) for name in names)
    for again in range(1, -(-wanted // held)):
        store.execute(f"INSERT INTO rows (id, {', '.join(names)}) SELECT id + {again * last}, {values} FROM rows WHERE id <= {last}")
        store.execute(f"INSERT INTO bodies SELECT row + {again * last}, zstd FROM bodies WHERE row <= {last}")
    store.commit()
    return store.execute("SELECT count(*) FROM rows").fetchone()[0]


def rows(folder, program, millions=1):
    path = folder / "large.db"
    run(program, "sweep", "--results", path)
    count = multiply(path, round(float(millions) * 1e6))
    print(f"{count} rows, {path.stat().st_size / 1e9:.2f} GB")
    for options in (
        ["--where", "state = 'ok' AND worst_head_cosine > 0.99 AND ratio > 1.96"],
        ["--where", "name LIKE 'planes%' AND ratio > 1.26", "--limit", "20"],
        ["--where", "worst_head_cosine > 0.95", "--sort", "stored_bytes", "--limit", "20"],
        ["--limit", "20"],
    ):
        times, said = zip(*(run(program, "results", "list", "--results", path, *options) for _ in range(5)))
        print(f"list {' '.join(options)}: median {statistics.median(times):.2f} s, {min(times):.2f} to {max(times):.2f}; {said[0].splitlines()[-1]}")
    times = [run(program, "report", path, "--out", folder / "report", "--overwrite")[0] for _ in range(3)]
    size = (folder / "report/index.html").stat().st_size
    print(f"report: median {statistics.median(times):.1f} s, {min(times):.1f} to {max(times):.1f}; index.html of {size / 1e6:.2f} MB")


if __name__ == "__main__":
    works = {"kills": kills, "rows": rows}
    if len(sys.argv) not in (3, 4) or sys.argv[1] not in works:
        sys.exit(__doc__)
    with tempfile.TemporaryDirectory(prefix="gearbox-store-") as temporary:
        works[sys.argv[1]](Path(temporary), Path(sys.argv[2]).absolute(), *sys.argv[3:])
