"""Child of test_nodes: what one rank was told by its launcher, and what it hears from the main one; written to a file."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import torch

from lingshu_rl.planning.given import load_config
from lingshu_rl.policy import make_accelerator
from lingshu_rl.processes.control import Control

if __name__ == "__main__":
    told = {name: os.environ[name] for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE")}
    accelerator = make_accelerator(load_config(), on_gpu=False)
    control = Control(accelerator.process_index, accelerator.num_processes)
    told["heard"] = control.share(f"from process {os.getpid()}")
    told["at"] = control.gather(os.environ["GLOO_SOCKET_IFNAME"])
    Path(sys.argv[1], f"{os.getpid()}.json").write_text(json.dumps(told))
    control.barrier()
    torch.distributed.destroy_process_group()  # as a run ends; threads of a group that is left abort the process
