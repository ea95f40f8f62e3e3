"""A LAPACK that fails: what the ways out of a failed decomposition are tested with on machines where none fails."""

import torch

NAMES = ("eigh", "qr", "svd", "pinv")


class FakeLapack:
    """Stands for torch's own: every call whose number is in ``wrong`` raises or returns NaN, in turn."""

    def __init__(self, monkeypatch, wrong):
        self.calls, self.wrong, self.spoilt = 0, wrong, 0
        for name in NAMES:
            monkeypatch.setattr(torch.linalg, name, self.standing_for(getattr(torch.linalg, name)))

    def standing_for(self, true):
        def call(*args, **kwargs):
            self.calls += 1
            if not self.wrong(self.calls):
                return true(*args, **kwargs)
            self.spoilt += 1
            if self.spoilt % 2:
                raise torch.linalg.LinAlgError("the algorithm failed to converge")
            found = true(*args, **kwargs)
            return found * torch.nan if isinstance(found, torch.Tensor) else type(found)([x * torch.nan for x in found])

        return call


def thirds(call):
    return call % 3 == 0


def always(call):
    return True
