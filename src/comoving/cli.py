"""The command line; thin: it turns strings into settings and errors into one line."""

import errno
import os
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, NoReturn

BAD_INPUT = 2


def application() -> Any:
    """The typer application. Built in a function so that importing this module needs no extra."""
    import typer  # noqa: PLC0415

    from comoving.race import team  # noqa: PLC0415
    from comoving.race.command import execute, settings_from  # noqa: PLC0415
    from comoving.race.tasks import TASKS  # noqa: PLC0415

    app = typer.Typer(
        add_completion=False,
        no_args_is_help=True,
        rich_markup_mode=None,
        pretty_exceptions_enable=False,
        help="Low-rank optimizers whose state moves with the gradient's subspace.",
    )

    def print_version(wanted: bool) -> None:
        if wanted:
            from importlib.metadata import version  # noqa: PLC0415

            typer.echo(version("comoving"))
            raise typer.Exit()

    @app.callback()
    def options(  # pyright: ignore[reportUnusedFunction]
        version: Annotated[
            bool, typer.Option("--version", callback=print_version, is_eager=True, help="Show the version.")
        ] = False,
    ) -> None:
        pass

    @app.command()
    def race(  # pyright: ignore[reportUnusedFunction]
        task: Annotated[str, typer.Option(help=f"One of: {', '.join(TASKS)}.")],
        optimizers: Annotated[
            str | None,
            typer.Option(
                help="Names separated by commas, or all (every recipe), with overrides: name:key=value;key=value."
            ),
        ] = None,
        steps: Annotated[int | None, typer.Option(help="Training steps of each run. [default: the task's]")] = None,
        seeds: Annotated[int, typer.Option(help="Runs per contender and rate: seeds 0, 1, ...")] = 1,
        lr: Annotated[
            str, typer.Option(help="Peak rates separated by commas. [default: the task's times the recipe's factor]")
        ] = "",
        rank: Annotated[
            str | None, typer.Option(help="Directions (64), share of entries (0.1), or one per mode (8,8,4,None).")
        ] = None,
        codec: Annotated[
            str, typer.Option(help="Of moments and feedback: full, int8, int4 ...; every contender in each, by commas.")
        ] = "",
        budget: Annotated[
            str, typer.Option(help="Of comoving's whole state, by commas: 1/8, 10%, 400MB, 0; the curve over bytes.")
        ] = "",
        out: Annotated[Path | None, typer.Option(help="Folder of results. [default: out/race-TASK]")] = None,
        device: Annotated[str, typer.Option(help="cpu, cuda, cuda:1 ...")] = "cpu",
        dtype: Annotated[str, typer.Option(help="float32, float64 or bfloat16.")] = "float32",
        target: Annotated[
            float | None, typer.Option(help="Report when this validation value is first reached.")
        ] = None,
        batch: Annotated[int | None, typer.Option(help="Samples per step. [default: the task's]")] = None,
        text: Annotated[str, typer.Option(help="Text for lm: a file, a folder, or a Hugging Face data set.")] = "",
        jobs: Annotated[int, typer.Option(help="Runs at once, one thread each; times are honest only with 1.")] = 1,
        weight_decay: Annotated[
            float | None, typer.Option(help="Decoupled, for every contender. [default: the task's, mostly 0.01]")
        ] = None,
        warmup: Annotated[
            int | None, typer.Option(help="Steps of linear warm-up. [default: the task's share, mostly a tenth]")
        ] = None,
        validations: Annotated[
            int | None, typer.Option(help="Looks at the held-out data along a run. [default: the task's, mostly 16]")
        ] = None,
        ddp: Annotated[
            bool, typer.Option("--ddp", help="The processes of torchrun train each run, each with the whole model.")
        ] = False,
        compress: Annotated[
            bool, typer.Option("--compress", help="With --ddp, send the cores of projected gradients only.")
        ] = False,
        fsdp: Annotated[
            bool, typer.Option("--fsdp", help="The processes of torchrun train each run, each with a shard of it.")
        ] = False,
        tune: Annotated[
            int,
            typer.Option(help="Candidates of rate and ratio for each contender, halved rung by rung; 0: no tuning."),
        ] = 0,
        rungs: Annotated[int, typer.Option(help="With --tune: rungs of half the candidates at twice the steps.")] = 3,
        tasks: Annotated[
            bool, typer.Option("--tasks", callback=list_tasks, is_eager=True, help="List the tasks with their minutes.")
        ] = False,
    ) -> None:
        """Train one real model with several optimizers side by side and compare what they reached."""
        settings = settings_from(
            task=task,
            optimizers=optimizers,
            steps=steps,
            seeds=seeds,
            lr=lr,
            rank=rank,
            codec=codec,
            budget=budget,
            out=out,
            device=device,
            dtype=dtype,
            target=target,
            batch=batch,
            text=text,
            jobs=jobs,
            weight_decay=weight_decay,
            warmup=warmup,
            validations=validations,
            compress=compress,
            tune=tune,
            rungs=rungs,
            **team.launched(ddp, fsdp, ARGUMENTS),
        )
        raise typer.Exit(execute(settings, team.typed(ARGUMENTS)))

    @app.command()
    def recipes(  # pyright: ignore[reportUnusedFunction]
        as_json: Annotated[bool, typer.Option("--json", help="Plain data instead of a table.")] = False,
        as_markdown: Annotated[bool, typer.Option("--markdown", help="The page docs/recipes.md.")] = False,
    ) -> None:
        """List the recipes: every method as a composition of the engine's parts, with its state as a formula."""
        from comoving import catalogue  # noqa: PLC0415

        if as_json and as_markdown:
            raise typer.BadParameter("--json and --markdown are two forms of one list: choose one")
        if as_json or as_markdown:
            typer.echo(catalogue.as_json() if as_json else catalogue.as_markdown(), nl=as_json)
        else:
            show(catalogue.as_table())

    @app.command()
    def plan(  # pyright: ignore[reportUnusedFunction]
        model: Annotated[
            str,
            typer.Option(
                help="llama-60m, -130m, -350m, -1b, -7b, -13b, -70b; fno:modes=16x16,channels=64,layers=4; the path of "
                "a Hugging Face config; or package.module:function, which returns a module."
            ),
        ],
        recipe: Annotated[str, typer.Option(help="A name of comoving recipes.")] = "comoving",
        rank: Annotated[
            str | None, typer.Option(help="Directions (64), share of entries (0.1), or one per mode (8,8,4,None).")
        ] = None,
        dtype: Annotated[
            str, typer.Option(help="Of weights and gradients: float32, float64, bfloat16 or float16.")
        ] = "bfloat16",
        batch: Annotated[int | None, typer.Option(min=1, help="Samples per step and rank, for activations.")] = None,
        sequence: Annotated[int | None, typer.Option(min=1, help="Tokens per sample, for activations.")] = None,
        ddp: Annotated[int | None, typer.Option(min=1, help="Ranks of DistributedDataParallel.")] = None,
        fsdp: Annotated[int | None, typer.Option(min=1, help="Ranks of fully_shard.")] = None,
        compress: Annotated[
            bool, typer.Option("--compress", help="DDP sends cores in place of gradients (docs/distributed.md).")
        ] = False,
        wire: Annotated[
            str | None, typer.Option(help="Of cores: same, bfloat16 or int8; bfloat16 with --compress.")
        ] = None,
        wire_rank: Annotated[
            str | None,
            typer.Option(help="With --compress, of what is sent of whole frames (Muon): 64, or 0.1."),
        ] = None,
        layerwise: Annotated[
            bool, typer.Option("--layerwise", help="Parameters are stepped in the backward pass, gradients freed.")
        ] = False,
        checkpointing: Annotated[
            bool, typer.Option("--checkpointing", help="Layers keep their inputs alone for the backward pass.")
        ] = False,
        device: Annotated[str, typer.Option(help="cuda or cpu.")] = "cuda",
        fit: Annotated[str | None, typer.Option(help="A memory, such as 24GB: find the largest rank for it.")] = None,
        codec: Annotated[str | None, typer.Option(help="Of error feedback: full, bfloat16, int8, int4 ...")] = None,
        moments: Annotated[str | None, typer.Option(help="Codec of the moments.")] = None,
        budget: Annotated[str | None, typer.Option(help="Of comoving's whole state: 1/8, 10%, 400MB, 0.")] = None,
        out: Annotated[Path | None, typer.Option(help="Folder for plan.json and plan.png.")] = None,
        as_json: Annotated[bool, typer.Option("--json", help="Plain data instead of tables.")] = False,
    ) -> None:
        """Know the memory before the run: bytes per part, exact for weights, gradients and state."""
        from comoving.memory.command import execute as draft  # noqa: PLC0415

        if device not in {"cuda", "cpu"}:
            raise typer.BadParameter(f"device must be cuda or cpu, got {device!r}")
        if wire is not None and not compress:
            raise typer.BadParameter(f"--wire {wire} is of cores: add --compress")
        if wire_rank is not None and not compress:
            raise typer.BadParameter(f"--wire-rank {wire_rank} is of cores: add --compress")
        status = draft(
            model=model,
            recipe=recipe,
            rank=rank,
            dtype=dtype,
            limit=fit,
            options={"codec": codec, "moments": moments, "budget": budget},
            out=out,
            as_json=as_json,
            show=show,
            batch=batch,
            sequence=sequence,
            ddp=ddp,
            fsdp=fsdp,
            compress=(wire or True) if compress else None,
            wire_rank=wire_rank,
            layerwise=layerwise,
            checkpointing=checkpointing,
            device=device,
        )
        raise typer.Exit(status)

    bench = typer.Typer(no_args_is_help=True, rich_markup_mode=None, help="Measure the parts against each other.")
    app.add_typer(bench, name="bench")

    @bench.callback()
    def benchmarks() -> None:  # pyright: ignore[reportUnusedFunction]
        pass

    @bench.command()
    def subspace(  # pyright: ignore[reportUnusedFunction]
        out: Annotated[Path, typer.Option(help="Folder of results.")] = Path("out/bench-subspace"),
        quick: Annotated[bool, typer.Option("--quick", help="Small tensors and few steps, in half a minute.")] = False,
    ) -> None:
        """Accuracy against time for every finder and frame, as ratios within one run."""
        from comoving.bench.command import execute as measure  # noqa: PLC0415

        raise typer.Exit(measure(out, quick, shlex.join(["comoving", *ARGUMENTS])))

    app.add_typer(laboratory(), name="lab")

    return app


def laboratory() -> Any:
    """The commands of ``comoving lab``."""
    import typer  # noqa: PLC0415

    lab = typer.Typer(
        no_args_is_help=True,
        rich_markup_mode=None,
        help="Do a few directions carry training? Studies with controls, and computed verdicts.",
    )

    @lab.command("list")
    def studies() -> None:  # pyright: ignore[reportUnusedFunction]
        """List the studies and the configurations."""
        from comoving.lab.command import listing  # noqa: PLC0415

        for table in listing():
            show(table)

    @lab.command("run")
    def run_study(  # pyright: ignore[reportUnusedFunction]
        study: Annotated[str, typer.Argument(help="1, 2, 12 (1 against 2), 3, 3b or e4; see comoving lab list.")],
        config: Annotated[str, typer.Option(help="A name of comoving lab list, or the path of a .toml file.")],
        seeds: Annotated[int, typer.Option(help="Seeds 0, 1, ...; fewer than 3 give no verdict.")] = 3,
        out: Annotated[Path | None, typer.Option(help="Folder of results. [default: out/lab-STUDY-CONFIG]")] = None,
        jobs: Annotated[int | None, typer.Option(help="Runs at once. [default: cores, 1 on a GPU]")] = None,
        device: Annotated[str, typer.Option(help="cpu, cuda, cuda:1 ...")] = "cpu",
        steps: Annotated[int | None, typer.Option(help="Updates of each run. [default: the configuration's]")] = None,
        rate: Annotated[float | None, typer.Option(help="AdamW's rate, the middle of every arm's sweep.")] = None,
        spec_monitor: Annotated[
            bool, typer.Option("--spec-monitor", help="Write all spectra as JSON lines too, under OUT/spectra.")
        ] = False,
        spec_every: Annotated[int | None, typer.Option(help="Updates between readings of the spectra.")] = None,
        spec_topk: Annotated[int | None, typer.Option(help="Singular values and directions that are read.")] = None,
        spec_targets: Annotated[str | None, typer.Option(help="Patterns of layers, separated by commas.")] = None,
        log_tensorboard: Annotated[
            bool, typer.Option("--log-tensorboard", help="Spectra for TensorBoard, under OUT/tensorboard.")
        ] = False,
        log_wandb: Annotated[bool, typer.Option("--log-wandb", help="Spectra to Weights & Biases.")] = False,
        wandb_project: Annotated[str, typer.Option(help="Its project.")] = "comoving-lab",
    ) -> None:
        """Run a study: every arm at the best of equally many rates, on the same seeds; then the verdicts."""
        from comoving.lab import command  # noqa: PLC0415

        folder = Path("out") / f"lab-{study}-{Path(config).stem}" if out is None else out
        sinks = {"jsonl": spec_monitor, "tensorboard": log_tensorboard, "wandb": log_wandb}
        places = {"jsonl": folder / "spectra", "tensorboard": folder / "tensorboard", "wandb": wandb_project}
        status = command.execute(
            study=study,
            name=config,
            seeds=seeds,
            out=folder,
            command=shlex.join(["comoving", *ARGUMENTS]),
            jobs=jobs if jobs is not None else 1 if device.startswith("cuda") else os.cpu_count() or 1,
            device=device,
            changes=command.changes(
                steps=steps, rate=rate, spec_every=spec_every, spec_topk=spec_topk, targets=spec_targets
            ),
            log={name: str(places[name]) for name, wanted in sinks.items() if wanted},
        )
        raise typer.Exit(status)

    @lab.command("report")
    def report_studies(  # pyright: ignore[reportUnusedFunction]
        folder: Annotated[Path, typer.Argument(help="What comoving lab run was given as --out.")],
    ) -> None:
        """Write report.html from the results in a folder, and print the verdicts."""
        from comoving.lab.command import write  # noqa: PLC0415

        raise typer.Exit(write(folder))

    return lab


ARGUMENTS: list[str] = []
"""What the command line was called with, for the record in ``results.json``."""


def list_tasks(wanted: bool) -> None:
    """What ``comoving race --tasks`` does."""
    if wanted:
        import typer  # noqa: PLC0415

        from comoving.race.listing import as_table  # noqa: PLC0415

        show(as_table())
        raise typer.Exit()


def show(table: Any) -> None:
    """A table of rich on standard output, of one width where that is no terminal."""
    from rich.console import Console  # noqa: PLC0415

    console = Console()
    console.print(table) if console.is_terminal else Console(width=160).print(table)


def fail(message: str) -> NoReturn:
    """One line on stderr, of several processes the first one's, and exit status 2."""
    if os.environ.get("RANK", "0") == "0":
        sys.stderr.write(f"comoving: {' '.join(message.split())}\n")
    raise SystemExit(BAD_INPUT)


def of_the_system(error: OSError) -> str:
    """What the system refused, and of which file."""
    if error.filename is not None:
        return f"{os.fsdecode(error.filename)}: {error.strerror}"
    if error.errno != errno.ENOSPC:
        return str(error)
    # No file of ours is without a name. What waits to be written would fail again when the interpreter ends.
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return f"standard output: {error.strerror}; free some space, or send it elsewhere"


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """The command ``comoving``; ends the process with status 0, 1 (no contender finished), 2 (bad input) or 130."""
    ARGUMENTS[:] = list(sys.argv[1:] if arguments is None else arguments)
    try:
        import rich  # noqa: F401, PLC0415  # pyright: ignore[reportUnusedImport]
        import typer.main  # noqa: PLC0415
    except ImportError:
        fail('the command line needs typer and rich, which are not installed: pip install "comoving[cli]"')
    from comoving.race.settings import SettingsError  # noqa: PLC0415

    command = typer.main.get_command(application())
    try:
        status = command.main(list(ARGUMENTS), prog_name="comoving", standalone_mode=False)
        sys.stdout.flush()
    except (SettingsError, ImportError) as error:
        fail(str(error))
    except OSError as error:
        fail(of_the_system(error))
    except KeyboardInterrupt:
        raise SystemExit(130) from None
    except Exception as error:
        # click's usage errors, whichever click typer brings; anything else is a fault of ours and keeps its traceback.
        if not hasattr(error, "format_message"):
            raise
        fail(error.format_message())  # pyright: ignore[reportAttributeAccessIssue]
    raise SystemExit(status or 0)
