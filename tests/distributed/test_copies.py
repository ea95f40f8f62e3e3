"""What each process keeps for itself under compress(): saved by all, loaded by as many or by another number."""

from copy import deepcopy

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.tensor import DTensor

from comoving import LowRankOptimizer
from comoving.codecs import Full, Int4, Int8
from comoving.distributed import compress, load
from comoving.frames import Blocks
from comoving.residual import Feedback
from contract.support import feedback_error, feedback_of, randn
from distributed.models import Net, loss_of, optimizer_of, weights_of, wrapped
from distributed.processes import run

WHOLE = StateDictOptions(full_state_dict=True, cpu_offload=True)


def built(codec, **options):
    ddp = wrapped(Net())
    optimizer = optimizer_of(ddp.module, codec=codec, **options)
    compress(ddp, optimizer, "same")
    return ddp, optimizer


def trained(model, optimizer, rank, start, steps):
    for t in range(start, start + steps):
        loss_of(model, t, rank).backward()
        optimizer.step()
        optimizer.zero_grad()


def state_of(model, optimizer):
    return {"model": get_model_state_dict(model), "optimizer": get_optimizer_state_dict(model, optimizer)}


def put(model, optimizer, saved, options=None):
    set_model_state_dict(model, saved["model"], options=options)
    set_optimizer_state_dict(model, optimizer, saved["optimizer"], options=options)


def kept(optimizer):
    return [feedback_of(optimizer, p) for p, site in optimizer.sites.items() if site.projected]


def tensors(optimizer):
    """All that a process has, to be compared bit by bit."""
    return {
        (site.name, name): x.clone() if isinstance(x, torch.Tensor) else x
        for p, site in optimizer.sites.items()
        for name, x in optimizer.state[p].items()
    }


def same(one, other):
    assert one.keys() == other.keys()
    return [
        k for k, x in one.items() if not (torch.equal(x, other[k]) if isinstance(x, torch.Tensor) else x == other[k])
    ]


CODECS = {"full": Full(), "int8": Int8(), "int4": Int4()}


def _resumed(rank, folder):
    found = {}
    for name, codec in CODECS.items():
        ddp, optimizer = built(codec)
        trained(ddp, optimizer, rank, 0, 4)
        saved = state_of(ddp, optimizer)
        own = saved["optimizer"]["state"]["layers.1.weight"]
        found[name] = {slot.rpartition(".")[0] for slot, x in own.items() if isinstance(x, DTensor)}
        whole = deepcopy(get_optimizer_state_dict(ddp, optimizer, options=WHOLE))  # dense ones are stepped in place
        places = [f"{folder}/{name}", f"{folder}/{name}.later"]
        dcp.save(saved, checkpoint_id=places[0])
        dcp.async_save(saved, checkpoint_id=places[1]).result()
        before = tensors(optimizer)
        trained(ddp, optimizer, rank, 4, 5)
        for place in places:
            again, other = built(codec)
            fresh = state_of(again, other)
            assert fresh["optimizer"]["state"]["layers.1.weight"].keys() == own.keys()
            dcp.load(fresh, checkpoint_id=place)
            put(again, other, fresh)
            assert same(before, tensors(other)) == []
        trained(again, other, rank, 4, 5)
        assert same(tensors(optimizer), tensors(other)) == []
        assert same(weights_of(ddp.module), weights_of(again.module)) == []
        again, other = built(codec)
        options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
        set_optimizer_state_dict(again, other, whole if rank == 0 else {}, options=options)
        assert same(before, tensors(other)) == []
    return found


def test_as_many_processes_go_on_as_they_were(tmp_path):
    """Bit for bit, across a refresh: from dcp.save and dcp.async_save, and from a whole state on the first process."""
    for found in run(2, _resumed, str(tmp_path)):
        assert found == dict.fromkeys(CODECS, {"", "feedback.gradients", "feedback.used"})


def _chained(rank, folder, whole, start, count):
    """Load what another number of processes has saved, train, save; the mean of what is kept before and after."""
    found = {}
    for name, codec in CODECS.items():
        ddp, optimizer = _any(codec, count)
        found[name] = {}
        if start:
            fresh = state_of(ddp, optimizer)
            load(fresh, checkpoint_id=f"{folder}/{name}.{start}")
            put(ddp, optimizer, fresh)
            found[name]["before"] = tensors(optimizer), mean(kept(optimizer)), errors(optimizer)
            again, other = _any(codec, count)
            set_optimizer_state_dict(again, other, whole[name], options=StateDictOptions(full_state_dict=True))
            assert same(tensors(optimizer), tensors(other)) == []
        trained(ddp, optimizer, rank, start, 4)
        dcp.save(state_of(ddp, optimizer), checkpoint_id=f"{folder}/{name}.{start + 4}")
        found[name]["after"] = mean(kept(optimizer))
        found[name]["whole"] = get_optimizer_state_dict(ddp, optimizer, options=WHOLE)
        found[name]["weights"] = weights_of(ddp if isinstance(ddp, Net) else ddp.module)
    return found


def _any(codec, count):
    """With compress(), or in one process without."""
    if count > 1:
        return built(codec)
    model = Net()
    return model, optimizer_of(model, codec=codec, residual=Feedback(own=True))


def mean(given):
    means = []
    for x in given:
        dist.all_reduce(total := x.clone())
        means.append(total / dist.get_world_size())
    return means


def errors(optimizer):
    return [feedback_error(optimizer, p) for p, site in optimizer.sites.items() if site.projected]


def test_another_number_of_processes_keeps_the_mean(tmp_path):
    """Two, four, one, two: what is kept stays the same in the mean; from a whole state it is the same."""
    last = None
    for start, count in ((0, 2), (4, 4), (8, 1), (12, 2)):
        whole = last and {name: own["whole"] for name, own in last.items()}
        results = run(count, _chained, str(tmp_path), whole, start, count)
        for name in CODECS:
            for own in (result[name] for result in results):
                assert same(own["weights"], results[0][name]["weights"]) == []
                if start:
                    assert same(own["before"][0], results[0][name]["before"][0]) == []
                    for one, other, error in zip(own["before"][1], last[name]["after"], own["before"][2], strict=True):
                        assert (one - other).norm() <= 1e-12 + (0 if name == "full" else error)
        last = results[0]
        slots = last["full"]["whole"]["state"]["layers.1.weight"]
        assert count == 1 or slots["feedback.gradients.value"].shape == (count, 16, 16)
    plain = optimizer_of(Net())
    with pytest.raises(ValueError, match="own"):
        plain.load_state_dict(last["full"]["whole"])


def test_copies_of_blocks_and_at_another_rank():
    """The mean of each block's, whatever the ranks are here; of one that was idle nothing."""

    def made(rank):
        experts = nn.Parameter(randn((4, 12, 8), torch.float64, 0))
        groups = [{"params": [("experts", experts)], "frame": Blocks()}]
        return LowRankOptimizer(groups, 0.01, rank, residual=Feedback(own=True), codec=Int8())

    optimizer = made(3)
    (p,) = optimizer.sites
    for t in range(3):
        p.grad = randn((4, 12, 8), torch.float64, t + 1)
        p.grad[1] = 0
        optimizer.step()
    saved = optimizer.state_dict()
    several = {name: x for name, x in saved["state"][0].items() if "feedback" in name or "diagnostics" in name}
    for name, x in several.items():
        saved["state"][0][name] = torch.stack([x, 3 * x if x.is_floating_point() else x])
    assert len(several) == 4 * 5
    for rank in (3, 2):
        other = made(rank)
        other.load_state_dict(saved)
        (q,) = other.sites
        assert not any(name.startswith("1.") for name in other.state[q])
        for name, x in ((name, x) for name, x in several.items() if not name.startswith("1.")):
            expected = 2 * x if x.is_floating_point() else x
            torch.testing.assert_close(other.state[q][name], expected, rtol=1e-6, atol=0)
        q.grad = randn((4, 12, 8), torch.float64, 9)
        other.step()
