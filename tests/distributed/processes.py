"""Several processes that talk through gloo: each runs the same function, by its rank."""

import os
import time
import traceback
from multiprocessing import get_context
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
import torch.distributed as dist

LIMIT = 120
_CONTEXT = get_context("forkserver")  # which has imported torch once, and run nothing
_CONTEXT.set_forkserver_preload(["torch", "torch.distributed.tensor", "torch.distributed.fsdp", "comoving"])


class Failed(AssertionError):
    """What one of the processes raised, or that it came to no end."""


def run(count, work, *args, limit=LIMIT):
    """What ``work(rank, *args)`` returned in each of ``count`` processes.

    Args:
        count: of processes, in one group of gloo.
        work: a function of a module; what it returns is saved by torch.
        *args: pickled.
        limit: seconds.

    Raises:
        Failed: with the trace of the first that failed; the others are ended.
    """
    with TemporaryDirectory() as folder:
        processes = [
            _CONTEXT.Process(target=_work, args=(rank, count, folder, work, args), daemon=True) for rank in range(count)
        ]
        for process in processes:
            process.start()
        end = time.monotonic() + limit
        try:
            while any(process.is_alive() for process in processes):
                if any(process.exitcode for process in processes) or time.monotonic() > end:
                    time.sleep(0.5)  # others may be about to say more
                    break
                time.sleep(0.01)
        finally:
            for process in processes:
                process.kill()
                process.join()
        errors = [path.read_text() for path in sorted(Path(folder).glob("error.*"))]
        if errors:
            raise Failed(f"of {count} processes {len(errors)} failed, the first one by\n{errors[0]}")
        if any(process.exitcode for process in processes):
            raise Failed(f"exit codes {[process.exitcode for process in processes]} within {limit} s")
        return [torch.load(Path(folder) / f"result.{rank}", weights_only=False) for rank in range(count)]


def _work(rank, count, folder, work, args):
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(count), "LOCAL_RANK": str(rank), "MASTER_ADDR": "127.0.0.1"}
    try:
        dist.init_process_group("gloo", store=dist.FileStore(f"{folder}/store", count), rank=rank, world_size=count)
        result = work(rank, *args)
        torch.save(result, Path(folder) / f"result.{rank}")
        dist.barrier()
        dist.destroy_process_group()
    except BaseException:
        (Path(folder) / f"error.{time.monotonic_ns()}.{rank}").write_text(traceback.format_exc())
        os._exit(1)
