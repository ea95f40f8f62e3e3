"""Low-rank methods for matrices; most take tensors, mode by mode, too."""

from math import sqrt
from typing import Any

from ..cadence import Growing, Lazy
from ..codecs import Full, Int4, Int8
from ..finders import Amortized, Correlation, CosineSelection, Exact, Oja, Power, RandomProjection
from ..frames import Cosines, Seeded
from ..precondition import Factored
from ..residual import Channel, Discard, Feedback, Fira, MomentumBuffer, Sign
from ..rules import Columns, Momentum
from ..transport import Keep, Reset, Rotate
from .following import FOLLOWING
from .recipe import Recipe

_RANDOM: dict[str, Any] = dict(
    frame=Seeded(), finder=RandomProjection(), codec=Full(), refresh_every=200, scale=1.0
)  # fmt: skip
"""What the recipes share that draw their frames."""

RECIPES = (
    Recipe(
        "galore",
        "periodic SVD of the gradient, moments left in old coordinates",
        "2403.03507",
        dict(
            finder=Exact(),
            transport=Keep(),
            residual=Discard(),
            codec=Full(),
            refresh_every=200,
            scale=0.25,
        ),  # fmt: skip
        relative_rate=15.0,
    ),
    Recipe(
        "q-galore",
        "galore with 8-bit moments and 4-bit bases, and ever rarer SVDs where the leading direction stays; with "
        "quantize(model) 8-bit weights too",
        "2407.08296",
        dict(
            finder=Exact(),
            cadence=Lazy(),
            transport=Keep(),
            residual=Discard(),
            codec=Full(),
            moments=Int8(),
            bases=Int4(block=256, table="linear"),
            refresh_every=200,
            scale=0.25,
        ),  # fmt: skip
        relative_rate=15.0,
    ),
    Recipe(
        "loqt",
        "galore with exponentially growing intervals, at which its changes are merged into 4-bit weights; with "
        "quantize(model, Int4(), compensate=5)",
        "2405.16528",
        dict(
            finder=Exact(),
            cadence=Growing(),
            transport=Keep(),
            residual=Discard(),
            codec=Full(),
            refresh_every=100,
            scale=0.5,
        ),  # fmt: skip
        relative_rate=10.0,
    ),
    Recipe(
        "ldadam",
        "power iteration at every step, moments rotated along, generalized error feedback",
        "2410.16103",
        dict(
            finder=Power(inertia=0.908, start="exact"),
            transport=Rotate(),
            residual=Feedback(lazy=False),
            codec=Full(),
            refresh_every=1,
            scale=1.0,
            betas=(0.908, 0.99),
        ),  # fmt: skip,
        relative_rate=2.5,
    ),
    Recipe(
        "fira",
        "GaLore with the rest of the gradient, scaled as Adam scales what the frame holds",
        "2410.01623",
        dict(
            finder=Exact(),
            transport=Keep(),
            residual=Fira(),
            codec=Full(),
            refresh_every=200,
            scale=0.25,
        ),  # fmt: skip
        relative_rate=20.0,
    ),
    Recipe(
        "apollo",
        "the whole gradient, each channel scaled as Adam scales a random projection of it",
        "2412.05270",
        _RANDOM | dict(frame=Seeded(stored=True), transport=Keep(), residual=Channel()),
        relative_rate=5.0,
    ),
    Recipe(
        "apollo-mini",
        "the whole gradient with one scale for the tensor, from a random projection of rank 1",
        "2412.05270",
        _RANDOM | dict(frame=Seeded(stored=True), transport=Keep(), residual=Channel(per="tensor"), scale=sqrt(128)),
        relative_rate=7.0,
        rank=1,
    ),
    Recipe(
        "frugal",
        "Adam in a random frame, begun anew with each, and signSGD outside of it",
        "2411.07837",
        _RANDOM | dict(transport=Reset(), residual=Sign()),
        relative_rate=0.5,
    ),
    Recipe(
        "dion",
        "orthonormalized updates of low rank by one amortized power iteration, momentum and feedback in one buffer",
        "2504.05295",
        dict(
            view="matrix",
            finder=Amortized(),
            transport=Rotate(),
            rule=Columns(),
            residual=MomentumBuffer(),
            codec=Full(),
            refresh_every=1,
            scale="spectral",
        ),  # fmt: skip
        relative_rate=15.0,
    ),
    Recipe(
        "flora",
        "Adafactor's preconditioner, then momentum in a random subspace that is drawn anew from a seed now and then",
        "2402.03293",
        dict(
            frame=Seeded(),
            finder=RandomProjection(),
            precondition=Factored(),
            transport=Rotate(),
            rule=Momentum(),
            residual=Discard(),
            codec=Full(),
            refresh_every=1000,
            scale="match",
        ),  # fmt: skip
    ),
    Recipe(
        "online-subspace-descent",
        "a step of online PCA at every step, moments left in old coordinates",
        "2408.12857",
        dict(
            finder=Oja(inertia=0.0, rate=0.1, start="exact"),
            transport=Keep(),
            residual=Discard(),
            codec=Full(),
            refresh_every=1,
            scale=0.25,
        ),  # fmt: skip
        relative_rate=10.0,
    ),
    Recipe(
        "coap",
        "descent on what the frame loses and how far the momentum disagrees, an SVD now and then, moments left",
        "2412.00071",
        dict(
            finder=Correlation(),
            transport=Keep(),
            residual=Discard(),
            codec=Full(),
            refresh_every=32,
            scale=1.0,
        ),  # fmt: skip
        relative_rate=2.0,
    ),
    Recipe(
        "dct-adamw",
        "the columns of the cosine transform that hold most, at every step; moments follow them, 8-bit error feedback",
        "2505.17967",
        dict(
            frame=Cosines(),
            finder=CosineSelection(inertia=0.0, norm=1),
            transport=Rotate(),
            residual=Feedback(lazy=False, momentum=False),
            codec=Int8(),
            refresh_every=1,
            scale=1.0,
        ),  # fmt: skip
    ),
    Recipe(
        "comoving-adamw",
        "AdamW in a moving subspace: power iteration (short modes: exact) every 4 steps, moments rotated, feedback; "
        "both in 8 bits",
        "this package",
        FOLLOWING | {"finder": Power(inertia=0.9, exact_up_to=32), "codec": Int8(), "moments": "auto"},
    ),
)
