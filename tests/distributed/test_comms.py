"""The comms of processes join what threads' do (tests/contract/threads.py), in every dtype."""

import pytest
import torch

from comoving.distributed import Replicas, Shards
from contract.threads import Mean, Split, Table
from distributed.processes import run

SIZES = [3, 0, 2]
DTYPES = [torch.float64, torch.float32, torch.complex64]


def made(dtype, rank):
    return torch.randn((2, 4, SIZES[rank]), dtype=dtype, generator=torch.Generator().manual_seed(rank))


def told(comm, x):
    """Everything that a comm says of a tensor (rows, modes 0 and 1), and of norms."""
    norms = torch.linalg.vector_norm(x, dim=(1, 2)).to(x.dtype.to_real()) * 1e30
    return {
        "kept": comm.joined(x.clone(), (0,)) if comm.split is not None else x,
        "joined": comm.joined(x.sum(-1), (1,)),
        "whole": comm.whole(x, -1),
        "largest": comm.largest(norms),
        "norm": comm.norm(norms / 1e30),
        "here": comm.here(torch.arange(5.0), 0),
    }


def _work(rank, kind, dtype):
    import torch.distributed as dist  # noqa: PLC0415

    comm = Replicas() if kind == "mean" else Shards(dist.group.WORLD, 1, SIZES, rank)
    return told(comm, made(dtype, 0) if kind == "mean" else made(dtype, rank))


@pytest.mark.parametrize("kind", ["mean", "split"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_processes_tell_one_another_what_threads_do(kind, dtype):
    table = Table(3)

    def work(rank):
        comm = Mean(table, rank) if kind == "mean" else Split(table, rank, 1, SIZES)
        return told(comm, made(dtype, 0) if kind == "mean" else made(dtype, rank))

    for found, expected in zip(run(3, _work, kind, dtype), table.run(work), strict=True):
        for name, x in expected.items():
            torch.testing.assert_close(found[name], x, msg=name)


def _rounded(rank):
    comm = Replicas(wire=torch.bfloat16)
    mean = comm.joined(torch.full((3,), 1 + rank / 1000), ())
    return mean, comm.traffic.bytes, comm.traffic.calls


def test_products_are_rounded_where_they_are_sent():
    for mean, sent, calls in run(2, _rounded):
        assert mean.dtype == torch.float32 and mean.tolist() == [1.0] * 3
        assert (sent, calls) == (6, 1)


def _overflowing(rank):
    import torch.distributed as dist  # noqa: PLC0415

    return Shards(dist.group.WORLD, 0, [1, 1], rank).norm(torch.tensor([3e30, 3e-30][rank : rank + 1] * 2))


def test_norms_do_not_overflow():
    for norms in run(2, _overflowing):
        torch.testing.assert_close(norms, torch.tensor([3e30, 3e30]))
