"""Methods that normalize the gradient or its momentum: SinkGD, SWAN, SCALE, and the tables of DeepSeek-V4.1-Flash.

W is m x n (outputs, inputs); p = p (1 - lr wd) - lr update for all of them. |.| is the length of a row or column.

SinkGD (2502.06742, Algorithms 3 and 4), L times:

    X = sqrt(n) Q^-1 X              Q = diag(|X_1,:|, ..., |X_m,:|)
    X = sqrt(m) X R^-1              R = diag(|X_:,1|, ..., |X_:,n|)

SCALE (2506.16659, Algorithm 1, with the lengths of the authors' code: the mean square, not the sum, is 1):

    m = b m + (1-b) g               at the head; m = g elsewhere
    X_o,: = m_o,: / rms(m_o,:)      for every output o; along the other axis for an embedding (tokens, width)

DeepSeek-V4.1-Flash (2609.19969, Algorithm 1):

    M   = b M + (1-b) G,  N = b M + (1-b) G
    rho_i = |N_i,:|;  U = N with rows zero where rho_i <= tau mean(rho)
    for k = 1 .. K:  rows of U to length 1 if k is odd, columns if k is even
    X   = gamma sqrt(n) U

SWAN (2412.13148, Algorithms 1 to 3):

    g = (G - mean of its row) / sqrt(mean of |G - mean|^2 of its row)
    Y = g g^H, Z = 1; k times  Y, Z = beta Y (3 - Z Y), beta (3 - Z Y) Z        from g of unit norm
    X = Z g |g| / |Z g|

What is divided by zero is zero: rows and columns without any gradient have none to take.
"""

import torch


def over(x, size):
    return torch.where(size > 0, x / torch.where(size > 0, size, torch.ones_like(size)), torch.zeros_like(x))


def lengths(x, dim):
    return (x * x.conj()).real.sum(dim, keepdim=True).sqrt()


def sinkhorn(x, iterations):
    m, n = x.shape
    for _ in range(iterations):
        x = n**0.5 * over(x, lengths(x, 1))
        x = m**0.5 * over(x, lengths(x, 0))
    return x


def along(x, dim):
    return over(x, (x * x.conj()).real.mean(dim, keepdim=True).sqrt())


def balanced(x, steps, threshold):
    rho = lengths(x, 1)
    u = torch.where(rho > threshold * rho.mean(), x, torch.zeros_like(x))
    for k in range(1, steps + 1):
        u = over(u, lengths(u, 1 if k % 2 else 0))
    return x.shape[1] ** 0.5 * u


def whitened(x, steps, beta):
    centred = x - x.mean(1, keepdim=True)
    g = over(centred, (centred * centred.conj()).real.mean(1, keepdim=True).sqrt())
    size = torch.linalg.norm(g)
    if size == 0:
        return g
    one = torch.eye(x.shape[0], dtype=x.dtype)
    y, z = (g / size) @ (g / size).mH, one
    for _ in range(steps):
        factor = beta * (3 * one - z @ y)
        y, z = y @ factor, factor @ z
    update = z @ g
    return update * (size / torch.linalg.norm(update))


class Stateless:
    """step(grad) -> parameter, of a map from matrices to updates; with momentum, of m or looking ahead."""

    def __init__(self, p, lr, update, *, momentum=0.0, nesterov=False, weight_decay=0.0):
        self.p, self.lr, self.update, self.wd = p.clone(), lr, update, weight_decay
        self.b, self.nesterov, self.m = momentum, nesterov, torch.zeros_like(p)

    def step(self, g):
        self.m = self.b * self.m + (1 - self.b) * g
        given = self.b * self.m + (1 - self.b) * g if self.nesterov else self.m
        x = self.update(given.reshape(given.shape[0], -1)).reshape(g.shape)
        self.p = self.p * (1 - self.lr * self.wd) - self.lr * x
        return self.p
