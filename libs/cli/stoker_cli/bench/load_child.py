"""The child of one measurement of `stoker bench load`: prepares, then does what its parent's messages ask.

`python -m stoker_cli.bench.load_child FD JOB`: FD is a socket of type SOCK_SEQPACKET, JOB a contestant's Job as JSON.
A message is JSON, {"call": name, …}; its answer is JSON, too. It ends when the parent closes the socket, however it does.
"""

from __future__ import annotations

import gc
import json
import os
import socket
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec

from stoker_cli.bench.load_contestants import CHILDREN, Contestant, Job, wrong_tensors

MESSAGE_BYTES_MAX = 65_536
_DESCRIPTORS_MAX = 2
_SHOWN = 5


def main(fd: int, job: Job) -> None:
    with socket.socket(fileno=fd) as parent:
        contestant: Any = _kinds(job.device)[job.contestant](job)
        contestant.prepare()
        gc.collect()
        gc.freeze()  # as the process is that an engine is forked from: what was imported is not gone through again
        parent.send(json.dumps({"ready": True}).encode())
        kept: Any = {}
        while True:
            message, descriptors, _, _ = socket.recv_fds(parent, MESSAGE_BYTES_MAX, _DESCRIPTORS_MAX)
            if not message:
                return
            asked = json.loads(message)
            match asked["call"]:
                case "load" | "load_verified" | "load_from_pool" as load:
                    kept = None  # what an earlier load kept
                    began_s = time.perf_counter()
                    kept = getattr(contestant, load)()
                    answer = {"seconds": time.perf_counter() - began_s, **getattr(contestant, "parts", {})}
                case "prepare_verified":
                    kept = None
                    contestant.prepare_verified()
                    answer = {}
                case "borrow":
                    contestant.borrow(descriptors)
                    answer = {}
                case "lend":
                    socket.send_fds(parent, [b"{}"], contestant.lend())
                    continue
                case "check":
                    began_s = time.perf_counter()
                    wrong = wrong_tensors(kept, json.loads(Path(asked["record"]).read_bytes()))
                    answer = {"seconds": time.perf_counter() - began_s, "wrong": wrong[:_SHOWN], "count": len(wrong)}
                case unknown:
                    raise ValueError(unknown)
            parent.send(json.dumps(answer).encode())


def _kinds(device: str) -> Mapping[str, type[Contestant]]:
    if device == "cpu":
        return CHILDREN
    from stoker_cli.bench.load_cuda import CUDA_CHILDREN

    return CUDA_CHILDREN


if __name__ == "__main__":
    main(int(sys.argv[1]), msgspec.json.decode(sys.argv[2], type=Job))
    # Nothing of a contestant's own end is of interest, and some take long or fail in it.
    os._exit(0)
