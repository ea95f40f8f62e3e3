"""Watching the spectra of chosen layers while they train."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from ..linalg import svd
from ..validate import check_int
from .figures import Key, check_finite, reading
from .matrices import effective_weight, momentum_of, steps_in_backward, unwrapped
from .sinks import Sink
from .spectra import Spectrum, check_count, present, working
from .targets import TARGETS, matrix_of, targets

KINDS = ("weight", "gradient", "momentum", "update")
_READINGS = ("last", "before")


class SpectralMonitor:
    """Reads the leading singular triplets of layers' weights, gradients, momenta and updates.

    A reading is made at the first update and at every ``every``-th after it: updates 1, 1 + every, 1 + 2 every, ... An
    update is a step of the optimizer, which may be any, in any loop; what it skips (a gradient scaler's overflow, say)
    does not count. (Where a fused optimizer skips by itself, only updates that are due for a reading are looked at.)
    Figures of layer ``<module>`` are named

        spec/<module>/F            of the weight, after parametrizations
        spec/<module>/grad/F       of the gradient as the optimizer saw it, after clipping
        spec/<module>/momentum/F   of the optimizer's momentum (:func:`comoving.directions.matrices.momentum_of`)
        spec/<module>/update/F     of the new weight minus the old one

    and F is, with U, s, V of this reading and those of the last one (absent at the first):

        sigma_max, sv1..svk        the k leading singular values
        delta_sv_rel               |s - s_last| / |s_last|, 0 for s_last = 0
        cos_u1..k, cos_v1..k       |<u_i, u_i,last>|, |<v_i, v_i,last>|
        cos_u_max, cos_u_mean      of the principal cosines of span U and span U_last; likewise cos_v_max, cos_v_mean
        p                          not of weights: ||U^H G V||_F^2 / ||G||_F^2 of the present matrix G in the U, V
                                   of the *momentum's* last reading
        p_weight                   the same in those of the *weight's*

    A direction whose singular value is zero up to roundoff has cosine 0 and no energy. A parameter that got no gradient
    yet counts as a zero gradient and momentum. Layers that do not train (``requires_grad`` off) have weights only;
    gradients and momenta of a parametrized layer are those of the parameter that its parametrization starts from.

    Triplets come from :func:`comoving.directions.spectra.leading` in float32 at least, started from the last reading.
    A reading moves its figures to the host at once, after one check that everything is finite.

    Args:
        model: any module.
        targets: patterns, see :func:`comoving.directions.targets`.
        every: updates from one reading to the next, >= 1.
        k: triplets, in [1, smallest side of any target].
        kinds: which of "weight", "gradient", "momentum", "update".
        sinks: where figures go, see :mod:`comoving.directions.sinks`.
        exact: decompose completely at every reading.

    Raises:
        ValueError: patterns that match nothing, an unknown kind, numbers outside their interval, a layer with fewer
            than k singular values, or parametrized from anything but one matrix of the weight's shape. At a reading: a
            NaN or an infinity in what is read, or a momentum that is not found; nothing is recorded then.
    """

    def __init__(
        self,
        model: nn.Module,
        targets: str | Iterable[str] = TARGETS,
        *,
        every: int = 100,
        k: int = 8,
        kinds: Sequence[str] = KINDS,
        sinks: Sequence[Sink] = (),
        exact: bool = False,
    ) -> None:
        check_int("every", every, 1)
        check_int("k", k, 1)
        unknown = [kind for kind in kinds if kind not in KINDS]
        if unknown or not kinds or isinstance(kinds, str):
            raise ValueError(f"kinds = {kinds!r}: give some of {', '.join(KINDS)}")
        self.modules = _checked(model, targets, k)
        self.every, self.k, self.exact = every, k, exact
        self.kinds, self.sinks = tuple(kind for kind in KINDS if kind in kinds), tuple(sinks)
        self.updates = 0
        """Updates so far."""
        self.last: dict[Key, Spectrum] = {}
        self.before: dict[Key, Spectrum] = {}
        self._owners: dict[str, Optimizer] = {}
        self._counts: dict[Optimizer, int] = {}
        self._handles: list[RemovableHandle] = []
        self._old: dict[str, Tensor] = {}
        self._gathered: dict[Key, Tensor] = {}

    # -------------------------------------------------------------------------------------------------- attachment

    def attach(self, *optimizers: Optimizer) -> Self:
        """Read at the steps of these optimizers from now on; several must step equally often, e.g. Muon and AdamW.

        Raises:
            ValueError: a layer that trains and is in none of them; an optimizer that steps in the backward pass.
            RuntimeError: attached already.
        """
        if self._handles:
            raise RuntimeError("the monitor is attached already; call detach() first")
        if not optimizers:
            raise ValueError("no optimizer to attach to")
        inner = [unwrapped(optimizer) for optimizer in optimizers]
        for optimizer in inner:
            _refuse_in_backward(optimizer)
        owner_of = {id(p): optimizer for optimizer in inner for g in optimizer.param_groups for p in g["params"]}
        matrices = {name: matrix_of(module) for name, module in self.modules.items()}
        missing = [name for name, p in matrices.items() if p.requires_grad and id(p) not in owner_of]
        if missing:
            raise ValueError(
                f"{', '.join(missing[:4])}{f' and {len(missing) - 4} more' if len(missing) > 4 else ''}: trained by no "
                f"optimizer that was given; attach to the one that trains them, or set requires_grad_(False)"
            )
        self._owners = {name: owner_of[id(p)] for name, p in matrices.items() if id(p) in owner_of}
        stepped = list(dict.fromkeys(self._owners.values())) or inner[:1]
        self._counts = dict.fromkeys(stepped, self.updates)
        for optimizer in stepped:
            self._handles.append(optimizer.register_step_pre_hook(self._before_step))
            self._handles.append(optimizer.register_step_post_hook(self._after_step))
        return self

    def detach(self) -> None:
        """Read no more; what was read stays."""
        for handle in self._handles:
            handle.remove()
        self._handles, self._counts, self._owners = [], {}, {}
        self._old, self._gathered = {}, {}

    def close(self) -> None:
        """Detach, and close the sinks."""
        self.detach()
        for sink in self.sinks:
            sink.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # ------------------------------------------------------------------------------------------------------ readings

    def read(self) -> dict[str, float]:
        """A reading of the weights, now: becomes their last one, goes to the sinks, and is returned."""
        return self._record({Key(name, "weight"): effective_weight(m) for name, m in self.modules.items()})

    def directions(self, name: str, of: str = "momentum") -> tuple[Tensor, Tensor, Tensor]:
        """U (m, k), V (n, k), s (k,) of the last reading.

        Args:
            name: of the layer, as in ``modules``.
            of: a kind.

        Raises:
            ValueError: no such layer or kind, or not read yet.
        """
        u, s, v = self._read_before(name, of)
        return u, v, s

    def stable(self, name: str, of: str = "momentum", threshold: float = 0.7) -> tuple[Tensor, Tensor]:
        """The directions of the last reading that the one before it had, too: U (m, j) and V (n, j), orthonormal.

        On each side the subspace is kept whose principal cosines against the reading before are >= threshold: P, Q.
        With the last reading's A = U diag(s) V^H, the columns are the singular vectors of P P^H A Q Q^H, largest first,
        as many as the smaller of the two has: column i of U belongs to column i of V.

        Args:
            name: of the layer.
            of: a kind.
            threshold: in [0, 1]; cosines of unrelated subspaces are about sqrt(k / d).

        Returns:
            No columns (j = 0) where nothing is stable, and after a single reading.

        Raises:
            ValueError: no such layer or kind, not read yet, or a threshold outside its interval.
        """
        if not 0 <= threshold <= 1:
            raise ValueError(f"threshold = {threshold} is outside [0, 1]")
        now, before = self._read_before(name, of), self.before.get(Key(name, of))
        if before is None:
            return now.u[:, :0], now.v[:, :0]
        shape = (len(now.u), len(now.v))
        old, new = present(before.s, shape), present(now.s, shape)
        p, q = (_kept(a[:, new], b[:, old], threshold) for a, b in ((now.u, before.u), (now.v, before.v)))
        a, _, bh = svd((p.mH @ now.u * now.s) @ (now.v.mH @ q))
        return p @ a, q @ bh.mH

    def _read_before(self, name: str, of: str) -> Spectrum:
        if name not in self.modules:
            raise ValueError(f"{name!r} is not watched; watched are {', '.join(self.modules)}")
        if of not in self.kinds:
            raise ValueError(f"of = {of!r} is not watched; watched are {', '.join(self.kinds)}")
        if Key(name, of) not in self.last:
            raise ValueError(f"the {of} of {name} has not been read yet")
        return self.last[Key(name, of)]

    def _before_step(self, optimizer: Optimizer, _args: Any, _kwargs: Any) -> None:
        if self._counts[optimizer] % self.every:
            return
        _refuse_in_backward(optimizer)
        if "update" in self.kinds:
            for name in self._trained_by(optimizer):
                self._old[name] = effective_weight(self.modules[name]).clone()

    def _after_step(self, optimizer: Optimizer, _args: Any, _kwargs: Any) -> None:
        due = self._counts[optimizer] % self.every == 0
        if due and _overflowed(optimizer):
            self._old = {}
            return
        self._counts[optimizer] += 1
        if due:
            gathered = self._gather(optimizer)
            if len(self._counts) > 1:
                gathered = {key: x.clone() for key, x in gathered.items()}
            self._gathered |= gathered
        self.updates = min(self._counts.values())
        if due and all(count == self._counts[optimizer] for count in self._counts.values()):
            matrices, self._gathered = self._gathered, {}
            if "weight" in self.kinds:
                matrices |= {Key(name, "weight"): effective_weight(module) for name, module in self.modules.items()}
            if matrices:
                self._record(matrices)

    def _trained_by(self, optimizer: Optimizer) -> list[str]:
        return [n for n, o in self._owners.items() if o is optimizer and matrix_of(self.modules[n]).requires_grad]

    def _gather(self, optimizer: Optimizer) -> dict[Key, Tensor]:
        """Gradients, momenta and updates after a step: with a closure there was no gradient before it."""
        names = self._trained_by(optimizer)
        parameters = {name: matrix_of(self.modules[name]) for name in names}
        if "gradient" in self.kinds and names and all(p.grad is None for p in parameters.values()):
            raise ValueError("no layer that is watched has a gradient after the step; leave gradient out of kinds")
        found: dict[Key, Tensor] = {}
        for name, p in parameters.items():
            if "gradient" in self.kinds:
                found[Key(name, "gradient")] = torch.zeros_like(p) if p.grad is None else p.grad.detach()
            if "momentum" in self.kinds:
                momentum = momentum_of(optimizer, p)
                found[Key(name, "momentum")] = torch.zeros_like(p) if momentum is None else momentum.detach()
            if "update" in self.kinds:
                new, old = effective_weight(self.modules[name]), self._old.pop(name)
                found[Key(name, "update")] = working(new) - working(old)
        return found

    @torch.no_grad()
    def _record(self, matrices: Mapping[Key, Tensor]) -> dict[str, float]:
        order = {name: i for i, name in enumerate(self.modules)}
        matrices = dict(sorted(matrices.items(), key=lambda x: (order[x[0].name], KINDS.index(x[0].kind))))
        check_finite(matrices)
        now, values = reading(matrices, self.last, self.k, self.exact, self.updates)
        self.before |= {key: self.last[key] for key in now if key in self.last}
        self.last |= now
        for sink in self.sinks:
            sink.write(self.updates, values)
        return values

    # --------------------------------------------------------------------------------------------------------- state

    def state_dict(self) -> dict[str, Tensor]:
        """Flat tensors: the count of updates, and the directions that the next reading starts from and compares with.

        Named "updates" and "<reading>/<kind>/<module>/<part>", part u, s or v.
        """
        state = {"updates": torch.tensor(self.updates)}
        for which in _READINGS:
            for (name, kind), spectrum in getattr(self, which).items():
                state |= {f"{which}/{kind}/{name}/{part}": x.clone() for part, x in spectrum._asdict().items()}
        return state

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Continue where :meth:`state_dict` was taken; before or after :meth:`attach`.

        Raises:
            ValueError: a layer, kind, or shape that this monitor does not watch; nothing has changed then.
        """
        if "updates" not in state:
            raise ValueError("not the state of a SpectralMonitor: it has no updates")
        parts: dict[tuple[str, Key], dict[str, Tensor]] = {}
        for entry, value in state.items():
            if entry == "updates":
                continue
            which, kind, rest = entry.split("/", 2)
            name, part = rest.rsplit("/", 1)
            if which not in _READINGS or name not in self.modules or kind not in self.kinds:
                raise ValueError(
                    f"{entry} in the state is not watched: layers and kinds must be those of the saved run"
                )
            weight = effective_weight(self.modules[name])
            shape = {"u": (weight.shape[0], self.k), "s": (self.k,), "v": (weight.shape[1], self.k)}.get(part)
            if tuple(value.shape) != shape:
                raise ValueError(f"{entry} in the state has shape {tuple(value.shape)}; {shape} is expected")
            parts.setdefault((which, Key(name, kind)), {})[part] = value.detach().to(weight.device, copy=True)
        incomplete = [key for key, found in parts.items() if set(found) != {"u", "s", "v"}]
        if incomplete:
            raise ValueError(f"the state of {incomplete[0][1].name} is incomplete")
        for which in _READINGS:
            setattr(self, which, {key: Spectrum(**found) for (r, key), found in parts.items() if r == which})
        self.updates = int(state["updates"])
        self._counts = dict.fromkeys(self._counts, self.updates)


def _checked(model: nn.Module, patterns: str | Iterable[str], k: int) -> dict[str, nn.Module]:
    modules = targets(model, patterns)
    for name, module in modules.items():
        shape = tuple(effective_weight(module).shape)
        check_count(k, shape, f"{name}: k")
        trained = matrix_of(module)
        if tuple(trained.shape) != shape:
            raise ValueError(
                f"{name} is parametrized from a tensor of shape {tuple(trained.shape)}, not {shape}: its gradient has "
                f"no spectrum to compare with the weight's"
            )
        if not (trained.is_floating_point() or trained.is_complex()):
            raise ValueError(f"{name} has a weight of {trained.dtype}, which has no spectrum")
    return modules


def _refuse_in_backward(optimizer: Optimizer) -> None:
    if steps_in_backward(optimizer):
        raise ValueError(
            "the optimizer steps in the backward pass (step_in_backward): gradients are gone, and weights have moved, "
            "before step() is called, so that there is nothing to read; call step_after_backward() first"
        )


def _kept(a: Tensor, b: Tensor, threshold: float) -> Tensor:
    """An orthonormal basis of the part of span(a) whose principal cosines with span(b) are at least this."""
    turn, cosines, _ = svd(a.mH @ b)
    return (a @ turn)[:, cosines >= threshold]


def _overflowed(optimizer: Optimizer) -> bool:
    """Whether a gradient scaler has told an optimizer that skips by itself, as fused ones do, to skip this step."""
    found: Tensor | None = getattr(optimizer, "found_inf", None)
    return found is not None and bool(found.any())
