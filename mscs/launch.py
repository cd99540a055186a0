"""Several training processes on one machine, started by torchrun."""

import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

SAVING_SECONDS = 110
"""How long processes that were asked to stop may take; Docker and schedulers are told to wait two minutes."""


def is_launched() -> bool:
    """Return whether this process is one of several that a launcher has started."""
    return "WORLD_SIZE" in os.environ


def default_processes(device: str, groups: int) -> int:
    """Return how many processes a training of `groups` groups of images gets here: one per GPU it can use."""
    if device == "cpu" or not any(Path("/dev").glob("nvidia[0-9]*")):
        return 1
    import torch

    count = torch.cuda.device_count()
    return max((n for n in range(1, groups + 1) if groups % n == 0 and n <= count), default=1)


def launch(processes: int, restarts: int, argv: Sequence[str]) -> int:
    """Run `mscs ARGV` under torchrun with this many processes; return its exit code."""
    # by address, because a container without network cannot resolve its own name
    one_machine = ["--standalone", "--local-addr=127.0.0.1", f"--nproc-per-node={processes}"]
    patience = [f"--max-restarts={restarts}", f"--shutdown-timeout={SAVING_SECONDS}"]
    command = [sys.executable, "-m", "torch.distributed.run", *one_machine, *patience]
    # else PyTorch 2.14 sends restarted processes to the addresses of the lost ones
    environment = {**os.environ, "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
    launcher = subprocess.Popen([*command, "-m", "mscs", *argv], env=environment)
    received: list[int] = []

    def pass_on(signum: int, _frame: object) -> None:
        received.append(signum)
        launcher.send_signal(signal.SIGTERM)

    for signum in (signal.SIGTERM, signal.SIGINT):
        signal.signal(signum, pass_on)
    code = launcher.wait()
    return 128 + received[0] if received else code
