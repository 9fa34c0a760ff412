"""Starts runs by forking a process that has imported everything, so that one costs seconds where a launch costs half a minute.

Not a test. `python nursery.py [module ...]` imports, then reads a line of JSON at a time and answers with one:
{"words": settings, "env": {...}, "ranks": n, "log": file} -> {"pids": [one a rank]}, all in one process group of their own;
{"poll": [pids]} -> {"codes": [exit code, or null while it runs]}.
"""

import importlib
import json
import os
import signal
import sys


def become_run(words, env, rank, ranks, log, leader):
    """In the forked child: what `python recipes/grpo_medvqa.py WORDS` is, with the environment that a launcher makes."""
    from lingshu_rl.cli import train_main
    from lingshu_rl.processes.workers import die_with_parent

    code = 70
    try:
        os.setpgid(0, leader)
        die_with_parent()
        signal.signal(signal.SIGINT, signal.default_int_handler)
        for descriptor, flags in ((0, os.O_RDONLY), (1, os.O_WRONLY), (2, os.O_WRONLY)):
            os.dup2(os.open(log if descriptor else os.devnull, flags | os.O_CREAT | os.O_APPEND), descriptor)
        os.environ.clear()
        os.environ.update(env, RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(ranks))
        code = train_main(words)
        sys.stdout.flush()
    finally:
        if code == 70:
            sys.excepthook(*sys.exc_info())
        sys.stderr.flush()
        os._exit(code)


def start(words, env, ranks, log):
    from lingshu_rl.processes.workers import free_port

    env = {**env, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    pids = []
    for rank in range(ranks):
        pid = os.fork()
        if not pid:
            become_run(words, env, rank, ranks, log, pids[0] if pids else 0)
        os.setpgid(pid, pids[0] if pids else pid)
        pids.append(pid)
    return {"pids": pids}


def poll(pids, ended):
    for pid in pids:
        if pid not in ended:
            found, status = os.waitpid(pid, os.WNOHANG)
            if found:
                ended[pid] = os.waitstatus_to_exitcode(status)
    return {"codes": [ended.get(pid) for pid in pids]}


def main():
    for module in sys.argv[1:]:
        importlib.import_module(module)
    ended = {}
    print("ready", flush=True)
    for line in sys.stdin:
        asked = json.loads(line)
        answer = poll(asked["poll"], ended) if "poll" in asked else start(**asked)
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
