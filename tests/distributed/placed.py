"""Parameters that are placed on meshes, and gradients that are made for them, whole or what is here of them."""

import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, distribute_tensor

import comoving
from comoving.finders import Power

# Frames that do not depend on the signs that a decomposition happens to return, and are on the side that is not cut.
STEADY = {"finder": Power(inertia=0.9), "refresh_every": 3, "side": "right"}


def whole(x):
    return x.full_tensor() if isinstance(x, DTensor) else x


def here(x):
    return x.to_local() if isinstance(x, DTensor) else x


def drawn(shape, seed, dtype=torch.float64):
    """Numbers whose unfoldings have falling singular values."""
    x = torch.randn(shape, dtype=dtype, generator=torch.Generator().manual_seed(seed))
    for n, d in enumerate(shape):
        x = x * torch.arange(1, d + 1).view([-1 if m == n else 1 for m in range(len(shape))]) ** -0.7
    return x.to(dtype)


def mesh_of(dims, names=None):
    """A mesh of all processes."""
    return init_device_mesh("cpu", tuple(dims), mesh_dim_names=names)


def made(shapes, places=None, mesh=None, dtype=torch.float64):
    """Name -> parameter, placed on the mesh where there is a placement for its name, or for "*"."""
    found = {}
    for i, (name, shape) in enumerate(shapes.items()):
        x, place = drawn(shape, i, dtype), (places or {}).get(name, (places or {}).get("*"))
        found[name] = nn.Parameter(x if place is None else distribute_tensor(x, mesh, place, src_data_rank=None))
    return found


def give(params, step):
    """Set the gradients of a step, which depend on the weights too."""
    for i, p in enumerate(params.values()):
        g = drawn(tuple(p.shape), 1000 * (step + 1) + i, p.dtype)
        if isinstance(p, DTensor):
            g = distribute_tensor(g, p.device_mesh, p.placements, src_data_rank=None)
        p.grad = g + 0.1 * p.detach()


def built(params, recipe, options):
    return comoving.build(recipe, params.items(), 1e-2, rank=0.25, **options)


def stepped(params, recipe, options, steps=8):
    """Whole weights after some steps, and the optimizer."""
    optimizer = built(params, recipe, options)
    for step in range(steps):
        give(params, step)
        optimizer.step()
    return weights_of(params), optimizer


def weights_of(params):
    return {name: whole(p.detach()).clone() for name, p in params.items()}


def where(optimizer):
    """Parameter -> "dealt", "shared" out, or "whole"."""
    return {
        site.name: "dealt" if site.owner is not None else "shared" if site.shard is not None else "whole"
        for site in optimizer.sites.values()
    }


def assert_same(found, expected, tolerance=1e-9):
    for name, x in expected.items():
        off = (found[name] - x).abs().max() if x.numel() else 0
        torch.testing.assert_close(
            found[name], x, rtol=tolerance, atol=tolerance, msg=f"{name} differs by {off}", equal_nan=False
        )
