"""LDAdam (2410.16103) written plainly: the baseline that the engine is timed against.

Every step, for an m x n matrix with its frame U on the smaller side (left when m <= n), t = finished steps:

    a  = g + e
    U' = QR(b b^T U),  b = rho U m/(1-b1^t) + (1-rho) a     (exact SVD of a at the first step)
    R  = U'^T U,  m' = R m,  v' = c2 | R^2 (v/c2 - m^2/c1^2) + m'^2/c1^2 |,  c1 = 1-b1^t, c2 = 1-b2^t
    e  = a - U' U'^T a + b1/(1-b1) (U m - U' m')
    m  = b1 m' + (1-b1) U'^T a,  v = b2 v' + (1-b2) (U'^T a)^2
    p  = p (1 - lr wd) - lr U' (m/(1-b1^(t+1))) / (sqrt(v/(1-b2^(t+1))) + eps)

Each lift is formed where the algorithm names it: eight products of 2 m n r per step, as many as the authors' code
spends (U m twice, the power iteration two, projection, U' z, U' m', and the update). What costs nothing in clarity is
done in place, as a careful author would; no product is saved by algebra.
"""

import torch


class PlainLDAdam(torch.optim.Optimizer):
    """LDAdam with power iteration and generalized error feedback at every step, for real matrices only (2410.16103).

    State per parameter: U (min(m, n) x r), the moments (r x max(m, n)), the feedback (m x n) and the step count.
    """

    def __init__(
        self,
        params,
        *,
        lr=1e-3,
        rank=16,
        betas=(0.908, 0.99),
        rho=0.908,
        eps=1e-8,
        weight_decay=0.0,
    ):
        super().__init__(
            params, {"lr": lr, "rank": rank, "betas": betas, "rho": rho, "eps": eps, "weight_decay": weight_decay}
        )
        for group in self.param_groups:
            for p in group["params"]:
                if p.ndim != 2 or p.is_complex():
                    raise ValueError(f"PlainLDAdam takes real matrices only, not {p.dtype} of shape {tuple(p.shape)}")
                if not 0 < group["rank"] <= min(p.shape):
                    raise ValueError(f"rank {group['rank']} does not fit a matrix of shape {tuple(p.shape)}")

    @torch.no_grad()
    def step(self, closure=None):
        """Step every parameter that has a gradient."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    self._step_matrix(p, group)
        return loss

    def _step_matrix(self, p, group):
        beta1, beta2 = group["betas"]
        state = self.state[p]
        left = p.shape[0] <= p.shape[1]

        def project(u, x):
            return u.T @ x if left else x @ u

        def lift(u, z):
            return u @ z if left else z @ u.T

        first = not state
        if first:
            state["step"] = 0
            state["feedback"] = torch.zeros_like(p)

        # a = g + e; the buffer of e is free from here until the new e is written to it
        a = state["feedback"].add_(p.grad)

        # the new frame
        t = state["step"]
        if first:
            u, _, vh = torch.linalg.svd(a, full_matrices=False)
            frame = u[:, : group["rank"]].clone() if left else vh[: group["rank"]].T.clone()
            state["frame"] = frame
            state["m"] = torch.zeros_like(project(frame, a))
            state["v"] = torch.zeros_like(state["m"])
        else:
            b = lift(state["frame"], state["m"]).mul_(group["rho"] / (1 - beta1**t)).add_(a, alpha=1 - group["rho"])
            image = b @ (b.T @ state["frame"]) if left else b.T @ (b @ state["frame"])
            frame, _ = torch.linalg.qr(image)
        old, m, v = state["frame"], state["m"], state["v"]

        # the gradient in the new frame
        z = project(frame, a)

        # the moments in the new frame, and what the frame loses of gradient and momentum
        a.sub_(lift(frame, z))
        if not first:
            c1, c2 = 1 - beta1**t, 1 - beta2**t
            overlap = frame.T @ old
            new_m = overlap @ m if left else m @ overlap.T
            a.add_(lift(old, m), alpha=beta1 / (1 - beta1))
            a.sub_(lift(frame, new_m), alpha=beta1 / (1 - beta1))
            v.div_(c2).addcmul_(m, m, value=-1 / c1**2)
            v = overlap.square() @ v if left else v @ overlap.square().T
            v.addcmul_(new_m, new_m, value=1 / c1**2).abs_().mul_(c2)
            m = new_m

        # Adam in the frame
        m.mul_(beta1).add_(z, alpha=1 - beta1)
        v.mul_(beta2).addcmul_(z, z, value=1 - beta2)
        state["step"] = t + 1
        denominator = v.div(1 - beta2 ** (t + 1)).sqrt_().add_(group["eps"])
        direction = (m / (1 - beta1 ** (t + 1))).div_(denominator)

        # decoupled weight decay and the write
        p.mul_(1 - group["lr"] * group["weight_decay"])
        p.add_(lift(frame, direction), alpha=-group["lr"])
        state["frame"], state["m"], state["v"] = frame, m, v
