"""The tasks a race can be run on: what each of them is, and how it is loaded."""

import importlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn

Batch = tuple[Tensor, Tensor]


class Task(Protocol):
    """Real data and a model for it. The data are loaded by the constructor; nothing here draws from the global RNG."""

    def fingerprint(self) -> str:
        """Digest of the data, so that runs on other data are never taken for these."""
        ...

    def model(self) -> nn.Module:
        """A fresh model, in float32 on the CPU, initialized from the global RNG as it stands."""
        ...

    def batch(self, size: int, generator: torch.Generator) -> Batch:
        """``size`` training samples drawn with ``generator``, in the dtype of the data."""
        ...

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """The training loss, a real scalar."""
        ...

    def validate(self, model: nn.Module) -> dict[str, float]:
        """``{"value": the metric, "loss": the mean loss}`` on the held-out data, without gradients."""
        ...


@dataclass(frozen=True)
class TaskInfo:
    """Facts about a task that are known without loading it.

    Args:
        title, metric: as shown in tables and pictures; lower is better for every metric.
        counted: what is counted on the way to a target, "tokens" or "samples".
        per_sample: how many of them are in one sample of a batch.
        rate: AdamW's own rate, the one a recipe's ``relative_rate`` multiplies.
        steps, batch, rank: defaults.
        rates: rates of contenders that did best of the few we tried at these defaults, to start from: sweep before any
            claim. Others fall back on ``rate`` times their factor.
        dtypes: that the model can train in.
        optimizers: who races by default.
        module: of :mod:`comoving.race.tasks`, where it is not called as the task is.
        forward: at most so many samples go through the model at once; a larger batch goes in parts of that size, whose
            gradients are added up. 0 for no limit.
        reads_text: takes ``--text``.
        warmup: linear warm-up, a share of the steps.
        weight_decay, validations: defaults.
        model: what is trained, in a few words.
        parameters, seconds: how many it has, and the time of a step with AdamW at the default batch, one thread of the
            machine in :data:`MEASURED_ON`; a complex number counts as one parameter.
    """

    name: str
    title: str
    metric: str
    counted: str
    per_sample: int
    rate: float
    steps: int
    batch: int
    rank: int | float
    dtypes: tuple[str, ...]
    optimizers: str
    rates: Mapping[str, float] = field(default_factory=lambda: {})
    module: str = ""
    forward: int = 0
    reads_text: bool = False
    warmup: float = 0.1
    weight_decay: float = 0.01
    validations: int = 16
    model: str = ""
    parameters: int = 0
    seconds: float = 0.0

    def load(self, **options: Any) -> Task:
        """Load the data; ``options`` are the task's own (``text``)."""
        return importlib.import_module(f"comoving.race.tasks.{self.file}").load(**options)

    @property
    def file(self) -> str:
        """Name of the module that has the task."""
        return self.module or self.name

    @property
    def minutes(self) -> float:
        """Of one run at the defaults, on the machine that :attr:`seconds` were measured on; validations aside."""
        return self.steps * self.seconds / 60


MATRICES = "adamw,galore,ldadam,comoving"
TENSORS = "adamw,tensor-galore,tucker-adam,comoving"
MEASURED_ON = "AMD EPYC (2 virtual cores, torch 2.13.0)"
"""Where the seconds of a step below were measured, one thread."""
REAL = ("float32", "float64", "bfloat16")
TASKS = {
    info.name: info
    for info in (
        TaskInfo(
            "lm",
            "LLaMA on bytes",
            "validation bits per byte",
            "tokens",
            128,
            2e-3,
            600,
            8,
            0.25,
            REAL,
            MATRICES,
            {"adamw": 1e-3, "galore": 2e-2, "ldadam": 5e-3, "comoving-adamw": 2e-3, "muon": 1e-2, "soap": 4e-3},
            reads_text=True,
            model="LLaMA, 4 layers of width 128",
            parameters=869_504,
            seconds=0.09,
        ),  # fmt: skip
        TaskInfo(
            "lm-bpe",
            "LLaMA on tokens, 4k a step",
            "validation bits per byte",
            "tokens",
            128,
            2e-3,
            300,
            32,
            0.25,
            REAL,
            MATRICES,
            {},
            "lm_bpe",
            forward=32,
            reads_text=True,
            model="LLaMA, 4 layers of width 128",
            parameters=1_852_544,
            seconds=0.55,
        ),  # fmt: skip
        TaskInfo(
            "lm-bpe-32k",
            "LLaMA on tokens, 32k a step",
            "validation bits per byte",
            "tokens",
            128,
            2e-3,
            100,
            256,
            0.25,
            REAL,
            MATRICES,
            {},
            "lm_bpe",
            forward=32,
            reads_text=True,
            model="LLaMA, 4 layers of width 128",
            parameters=1_852_544,
            seconds=4.4,
        ),  # fmt: skip
        TaskInfo(
            "ft",
            "SmolLM2-135M tuned on text",
            "validation bits per byte",
            "tokens",
            128,
            5e-5,
            60,
            2,
            0.25,
            ("float32", "bfloat16"),
            MATRICES,
            reads_text=True,
            validations=4,
            model="SmolLM2-135M-Instruct, pretrained, from 4 bits",
            parameters=134_515_008,
            seconds=2.7,
        ),  # fmt: skip
        TaskInfo(
            "fno",
            "FNO on Darcy flow",
            "validation relative L2",
            "samples",
            1,
            1e-2,
            400,
            8,
            0.1,
            REAL[:2],
            TENSORS,
            {"tensor-galore": 2e-2, "tucker-adam": 2e-2, "comoving-adamw": 2e-2, "muon": 2e-2},
            model="FNO, 4 layers of 24 channels, 32 x 32",
            parameters=339_337,
            seconds=0.03,
        ),  # fmt: skip
        TaskInfo(
            "darcy-docs",
            "neuraloperator's example: FNO on its Darcy data",
            "validation relative L2 at 32 x 32",
            "samples",
            1,
            1e-2,
            120,
            128,
            0.25,
            REAL[:2],
            TENSORS,
            module="darcy_docs",
            warmup=0.0,
            weight_decay=1e-4,
            validations=15,
            model="FNO, 4 layers of 24 channels, 16 x 16",
            parameters=99_721,
            seconds=0.10,
        ),  # fmt: skip
        TaskInfo(
            "fno4d",
            "FNO on Allen-Cahn in space-time",
            "validation relative L2",
            "samples",
            1,
            4e-2,
            200,
            4,
            0.1,
            REAL[:2],
            "adamw,tucker-adam,tt-adam,ht-adam,comoving",
            {"tucker-adam": 8e-2, "comoving-adamw": 8e-2},
            model="FNO, 2 layers of 12 channels, order 6",
            parameters=738_649,
            seconds=0.09,
        ),  # fmt: skip
        TaskInfo(
            "vit",
            "ViT on images",
            "validation error in %",
            "samples",
            1,
            1e-3,
            400,
            64,
            0.25,
            REAL,
            MATRICES,
            {"muon": 4e-3},
            model="ViT, 4 layers of width 96",
            parameters=356_234,
            seconds=0.04,
        ),  # fmt: skip
    )
}
