"""Dense parameters: torch's own AdamW."""

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor
from torch.optim.adam import adam

from ..decay import decay_agreeing
from ..rules.adam import FIRST, SECOND
from ..state import SECOND_MAX

_CAPTURABLE = ("cuda", "xpu", "hpu", "privateuseone")
"""Devices on which torch's AdamW can leave its step count."""


def step_dense(
    params: Sequence[Tensor], grads: Sequence[Tensor], states: Sequence[Mapping[str, Any]], group: Mapping[str, Any]
) -> None:
    """One step of torch's AdamW on dense real parameters of a group, all on one device; decay may be cautious.

    Args:
        params: the parameters.
        grads: their gradients.
        states: their states.
        group: its hyper-parameters.
    """
    beta1, beta2 = group["betas"]
    cautious = group["decay"] == "cautious" and group["weight_decay"] > 0
    before = [p.clone() for p in params] if cautious else []
    adam(
        list(params),
        list(grads),
        [s[FIRST] for s in states],
        [s[SECOND] for s in states],
        [s[SECOND_MAX] for s in states] if group["amsgrad"] else [],
        [s["step"] for s in states],
        foreach=group["foreach"],
        fused=group["fused"],
        capturable=states[0]["step"].device.type in _CAPTURABLE and not group["fused"],
        amsgrad=group["amsgrad"],
        beta1=beta1,
        beta2=beta2,
        lr=group["lr"] * group["rate"],
        weight_decay=0.0 if cautious else group["weight_decay"] / group["rate"],  # decay knows no rate
        eps=group["eps"],
        maximize=group["maximize"],
        decoupled_weight_decay=True,
    )
    for p, old in zip(params, before, strict=False):
        decay_agreeing(p, old, group["lr"] * group["weight_decay"])
