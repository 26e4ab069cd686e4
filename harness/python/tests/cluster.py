"""Two Ray nodes on this machine, and a sweep during which the second one is killed. `test_ray.py` runs it in namespaces of its own.

    cluster.py FOLDER CONFIG DUMP

It writes `rows.json`, `started.txt` (unit and node of every start) and `left.json` (what still ran at the end) into the folder. A unit that
lands on the second node is held there until the node is gone, so that the sweep has something to lose.
"""

import fcntl
import json
import os
import pathlib
import signal
import socket
import struct
import subprocess
import sys
import threading
import time

HEAD, VICTIM = "127.0.0.1", "127.0.0.2"
PORT = 46379


def loopback_up():
    """A new network namespace has its loopback device down."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as device:
        request = struct.pack("16sh14x", b"lo", 0)
        flags = struct.unpack("16sh14x", fcntl.ioctl(device, 0x8913, request))[1]
        fcntl.ioctl(device, 0x8914, struct.pack("16sh14x", b"lo", flags | 1))


def processes():
    """Parents of all processes in the namespace."""
    parents = {}
    for entry in pathlib.Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                parents[int(entry.name)] = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
            except OSError:
                continue
    return parents


def family(pid):
    """A process and everything below it."""
    parents, found = processes(), [pid]
    for member in found:
        found.extend(child for child, parent in parents.items() if parent == member)
    return found


def node(folder, address, *arguments):
    log = open(folder / f"{address}.log", "w")
    program = [str(pathlib.Path(sys.executable).with_name("ray")), "start", "--block", f"--node-ip-address={address}"]
    settings = ["--num-cpus=2", "--object-store-memory=100000000", "--disable-usage-stats"]
    return subprocess.Popen([*program, *settings, *arguments], stdout=log, stderr=log, start_new_session=True)


def nodes_alive(ray):
    return sorted(node["NodeManagerAddress"] for node in ray.nodes() if node["Alive"])


def wait(what, condition, seconds=120):
    end = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > end:
            raise TimeoutError(f"waited {seconds} s for {what}")
        time.sleep(0.05)


def left():
    """What still runs. This is process 1 of the namespace, so orphans are its children, to be buried."""
    while True:
        try:
            if os.waitpid(-1, os.WNOHANG)[0] == 0:
                break
        except ChildProcessError:
            break
    return sorted(set(processes()) - {os.getpid()})


def main(folder, config, dump):
    loopback_up()
    head = node(folder, HEAD, "--head", f"--port={PORT}", f"--temp-dir={folder}/ray", "--include-dashboard=false")
    wait("the head", lambda: socket.socket().connect_ex((HEAD, PORT)) == 0)
    victim = node(folder, VICTIM, f"--address={HEAD}:{PORT}")

    import ray

    import gearbox.ray

    ray.init(address=f"{HEAD}:{PORT}", log_to_driver=False, logging_level="error")
    wait("both nodes", lambda: len(nodes_alive(ray)) == 2)
    evaluate, started, first = gearbox.ray._evaluate, str(folder / "started.txt"), VICTIM

    def noted(job, libraries, units, shipped):
        """Notes each start; on the second node it then waits for the end of the node, on the first for such a start."""
        import json
        import time

        import ray

        here = ray.util.get_node_ip_address()
        with open(started, "a") as file:
            file.writelines(f"{json.loads(unit)['name']} {json.loads(unit)['pipeline']['chunking']['tokens']} {here}\n" for unit in units)
        while here == first or first not in open(started).read():
            time.sleep(0.05)
        return evaluate(job, libraries, units, shipped)

    gearbox.ray._evaluate = noted

    def kill():
        try:
            wait("a unit on the second node", lambda: os.path.exists(started) and VICTIM in open(started).read())
        finally:
            for pid in family(victim.pid):
                try:
                    os.kill(pid, signal.SIGKILL)
                except ProcessLookupError:
                    continue

    killer = threading.Thread(target=kill)
    killer.start()
    rows = gearbox.ray.sweep(config, dump, results=folder / "results.db", batch=4)
    killer.join()
    (folder / "rows.json").write_text(json.dumps(list(rows)))
    ray.shutdown()
    victim.wait()
    head.send_signal(signal.SIGTERM)
    head.wait(60)
    try:
        wait("the end of all processes", lambda: not left())
    finally:
        (folder / "left.json").write_text(json.dumps(left()))


if __name__ == "__main__":
    main(pathlib.Path(sys.argv[1]), sys.argv[2], sys.argv[3])
