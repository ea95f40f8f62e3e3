"""All memory features together survive SIGKILL, bit for bit."""

import signal
import subprocess
import sys
import time
from pathlib import Path

import torch

from killed import main

SCRIPT = Path(__file__).with_name("killed.py")


def start(folder, pause):
    return subprocess.Popen([sys.executable, str(SCRIPT), str(folder), str(pause)])


def equal(a, b):
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[k], b[k]) for k in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(equal, a, b))
    return a == b


def test_a_killed_training_goes_on_as_if_nothing_had_happened(tmp_path):
    whole, folder, threads = tmp_path / "whole", tmp_path / "killed", torch.get_num_threads()
    whole.mkdir()
    folder.mkdir()
    killed = start(folder, 0.05)
    checkpoint, deadline = folder / "checkpoint.pt", time.monotonic() + 120
    while not (checkpoint.exists() and torch.load(checkpoint, weights_only=True)["done"] >= 15):
        assert killed.poll() is None, "it ended before it could be killed"
        assert time.monotonic() < deadline
        time.sleep(0.01)
    killed.send_signal(signal.SIGKILL)
    assert killed.wait() == -signal.SIGKILL
    done = torch.load(checkpoint, weights_only=True)["done"]
    assert 15 <= done < 40
    resumed = start(folder, 0.0)
    with torch.random.fork_rng():
        main(whole, 0.0)
    torch.set_num_threads(threads)
    assert resumed.wait(120) == 0
    final = [torch.load(path / "final.pt", weights_only=True) for path in (whole, folder)]
    assert equal(*final)
    assert any(x.dtype == torch.int8 for x in final[0]["optimizer"]["state"][1].values() if isinstance(x, torch.Tensor))
    assert all(x.dtype == torch.bfloat16 for x in final[0]["model"].values())
