"""Methods of full rank: rules in the whole frame."""

from ..codecs import RankOne, TopDirections
from ..rules import SOAP, Adafactor, Lion, LowRankAdam, LowRankMuon, Muon, NorMuon, Scheduled, Shampoo
from .recipe import Recipe

RECIPES = (
    Recipe("adamw", "AdamW on every parameter: torch's own, |g|^2 for complex ones", "1711.05101", full_rank=True),
    Recipe(
        "muon",
        "orthogonalized momentum with an update of RMS 0.2; one matrix per frequency for complex tensors",
        "2502.16982",
        dict(rule=Muon(bf16=True)),
        full_rank=True,
        relative_rate=4.0,
    ),
    Recipe(
        "orthogonal-sgd",
        "the orthogonalized gradient with an update of RMS 0.2, without momentum or any other state",
        "2202.07052",
        dict(rule=Muon(decay=0.0, nesterov=False, bf16=True)),
        full_rank=True,
        relative_rate=12.0,
    ),
    Recipe(
        "normuon",
        "muon whose rows have step sizes of their own, by a second moment of the orthogonalized rows",
        "2510.05491",
        dict(rule=NorMuon(bf16=True)),
        full_rank=True,
        relative_rate=4.0,
    ),
    Recipe(
        "muonq",
        "muon in 4 bits: normalized momentum whose strongest directions are stored apart, companded by the mu-law",
        "2605.11396",
        dict(rule=Muon(nesterov=False, bf16=True, normalized=True), moments=TopDirections()),
        full_rank=True,
        relative_rate=4.0,
    ),
    Recipe(
        "smmf",
        "Adam whose moments are stored as rank-one matrices and signs",
        "2412.08894",
        dict(rule=Scheduled(), moments=RankOne()),
        full_rank=True,
        relative_rate=2.5,
    ),
    Recipe(
        "lion",
        "signs of interpolated momentum",
        "2302.06675",
        dict(rule=Lion(), betas=(0.9, 0.99)),
        relative_rate=0.3,
        full_rank=True,
    ),
    Recipe(
        "adafactor",
        "second moments as a product of the means of slices, clipped updates, momentum",
        "1804.04235",
        dict(rule=Adafactor(), betas=(0.9, 0.999)),
        full_rank=True,
    ),
    Recipe(
        "lora-pre",
        "Adam whose moments are products of two thin factors, fitted to every gradient by least squares",
        "2602.24283",
        dict(rule=LowRankAdam()),
        full_rank=True,
    ),
    Recipe(
        "lora-pre-muon",
        "Muon whose momentum is a product of two thin factors, fitted to every gradient by least squares",
        "2602.24283",
        dict(rule=LowRankMuon()),
        full_rank=True,
        relative_rate=4.0,
    ),
    Recipe(
        "shampoo",
        "Kronecker-factored preconditioning of every mode, updates of Adam's length",
        "1802.09568; grafting as in 2309.06497",
        dict(rule=Shampoo(every=10)),
        full_rank=True,
    ),
    Recipe(
        "soap",
        "Adam in the slowly turning eigenbases of Shampoo's factors",
        "2409.11321",
        dict(rule=SOAP(), betas=(0.95, 0.95)),
        full_rank=True,
        relative_rate=3.0,
    ),
)
