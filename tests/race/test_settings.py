"""What is typed: read, checked, refused in one line."""

from dataclasses import asdict, replace
from pathlib import Path

import pytest

import comoving
from comoving.race import contenders
from comoving.race.command import settings_from
from comoving.race.settings import RaceSettings, SettingsError, parse_names, parse_rank, parse_rates
from comoving.race.tasks import TASKS


def settings(**changes):
    base = {
        "task": "vit",
        "optimizers": ("torch-adamw",),
        "steps": 4,
        "seeds": 1,
        "rates": (1e-3,),
        "rank": 0.25,
        "out": Path("out"),
    }
    return RaceSettings(**{**base, **changes})


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"task": "chess"}, "unknown task 'chess'; known: lm, lm-bpe, lm-bpe-32k, ft, fno, darcy-docs, fno4d, vit"),
        ({"optimizers": ()}, "empty"),
        ({"optimizers": ("a", "a")}, "twice"),
        ({"steps": 0}, "steps is 0"),
        ({"steps": -5}, "steps is -5"),
        ({"seeds": 0}, "seeds is 0"),
        ({"jobs": 0}, "jobs is 0"),
        ({"batch": 0}, "batch is 0"),
        ({"validations": 0}, "validations is 0"),
        ({"rates": (0.0,)}, "learning rate is 0.0"),
        ({"rates": (-1e-3,)}, "learning rate"),
        ({"rates": (float("inf"),)}, "learning rate"),
        ({"rates": (1e-3, 1e-3)}, "twice"),
        ({"rank": 0}, "rank"),
        ({"rank": 1.5}, r"\(0, 1\]"),
        ({"rank": (4, 0)}, "rank"),
        ({"rank": ()}, "rank"),
        ({"rank": True}, "rank"),
        ({"dtype": "float8"}, "unknown dtype"),
        ({"task": "fno", "dtype": "bfloat16"}, "cannot run in bfloat16"),
        ({"device": "abacus"}, "abacus"),
        ({"text": "x"}, "--text"),
        ({"weight_decay": -1.0}, "weight decay"),
        ({"warmup": 5}, r"\[0, 4\]"),
    ],
)
def test_bad_settings(changes, word):
    with pytest.raises(SettingsError, match=word) as caught:
        settings(**changes)
    assert "\n" not in str(caught.value)


def test_defaults_come_from_the_task():
    made = settings_from("fno", "torch-adamw", None, "", None, None, seeds=1)
    assert (made.steps, made.rank, made.rates, made.out) == (400, 0.1, (), Path("out/race-fno"))
    run = made.run("torch-adamw", 1e-2, 0, "")
    assert (run.batch, run.warmup) == (8, 40)
    made = settings_from(
        "lm", "comoving-adamw:rank=8,adamw", None, "", None, None, codec="int8,int4(table='linear')", seeds=1
    )
    assert made.optimizers == (
        "comoving-adamw:rank=8;moments=int8;codec=int8",
        "comoving-adamw:rank=8;moments=int4(table='linear');codec=int4(table='linear')",
        "adamw:moments=int8",
        "adamw:moments=int4(table='linear')",
    )
    with pytest.raises(SettingsError, match="torch-adamw is none"):
        settings_from("fno", "torch-adamw", None, "", None, None, codec="int8", seeds=1)
    few = ("lm", "adamw,comoving,comoving:budget=1/4", None, "", None, None)
    made = settings_from(*few, seeds=1, budget="1/2,10%,0")
    assert made.optimizers[1:] == (*(f"comoving:budget={b}" for b in ("1/2", "10%", "0")), "comoving:budget=1/4")
    for budget, match in (("much", "budget must be a size"), ("3/2", "share of AdamW's")):
        with pytest.raises(SettingsError, match=match):
            settings_from(*few, seeds=1, budget=budget)
    with pytest.raises(SettingsError, match="--budget is of comoving, which is not among adamw"):
        settings_from("lm", "adamw", None, "", None, None, seeds=1, budget="1/2")
    made = settings_from("darcy-docs", "torch-adamw", None, "", None, None, seeds=1)
    run = made.run("torch-adamw", 1e-2, 0, "")
    assert (run.warmup, run.weight_decay, run.validations, run.batch) == (0, 1e-4, 15, 128)
    made = settings_from("fno4d", None, None, "", None, None, seeds=1)
    assert made.optimizers == ("adamw", "tucker-adam", "tt-adam", "ht-adam", "comoving")
    assert (made.steps, made.rank) == (200, 0.1)


def test_every_field_of_a_run_is_in_its_key():
    run = settings().run("torch-adamw", 1e-3, 0, "data")
    changed = {"rank": 7, "text": "other", "task": "lm", "contender": "x", "dtype": "float64", "device": "cuda"}
    for name, value in asdict(run).items():
        other = changed.get(name, value + 1 if isinstance(value, int | float) else value + "x")
        assert replace(run, **{name: other}).key != run.key, name
    assert replace(run).key == run.key


def test_reading_lists():
    assert parse_names("adamw, b:x=(1,2);y='a,b' ,c") == ("adamw", "b:x=(1,2);y='a,b'", "c")
    assert parse_rates("1e-2,1e-3") == (1e-3, 1e-2)
    assert [parse_rank(t) for t in ("64", "0.1", "8,8,None", "(4,4)")] == [64, 0.1, (8, 8, None), (4, 4)]
    for bad in ("many", "True", "{1}"):
        with pytest.raises(SettingsError, match="rank"):
            parse_rank(bad)
    with pytest.raises(SettingsError, match="learning rates"):
        parse_rates("fast")
    with pytest.raises(SettingsError, match="empty"):
        settings_from("vit", " , ", None, "", None, None, seeds=1)


def test_overrides():
    made = contenders.parse("torch-adamw:betas=(0.8,0.9);mode=plain")
    assert made.overrides == {"betas": (0.8, 0.9), "mode": "plain"}
    assert (made.name, made.label) == ("torch-adamw", "torch-adamw:betas=(0.8,0.9);mode=plain")
    with pytest.raises(SettingsError, match="key=value"):
        contenders.parse("torch-adamw:betas")


def test_unknown_contender_lists_the_known():
    with pytest.raises(SettingsError, match="unknown optimizer 'sgd'.*comoving.*torch-muon"):
        contenders.parse("sgd")


def test_our_contenders_take_their_rate_and_overrides_from_the_library():
    import comoving  # noqa: PLC0415

    made = contenders.parse("comoving-adamw:betas=(0.8,0.99)")
    assert made.foreign is None
    assert made.relative_rate == comoving.recipes()["comoving-adamw"].relative_rate
    assert len(made.code()) > 16


def test_every_measured_rate_belongs_to_a_known_contender():
    for info in TASKS.values():
        for name, rate in info.rates.items():
            assert contenders.parse(name).label == name
            assert rate > 0


def test_all_is_every_recipe_once():
    every = tuple(comoving.recipes())
    assert contenders.named(("all",)) == every
    assert contenders.named(("torch-muon", "all", "galore:scale=1.0")) == ("torch-muon", *every, "galore:scale=1.0")
    chosen = contenders.named(("galore", "all"))
    assert chosen[0] == "galore"
    assert sorted(chosen) == sorted(every)
    made = settings_from("vit", "all", steps=4, lr="", rank=None, out=None, seeds=1)
    assert made.optimizers == every


@pytest.mark.parametrize("name", comoving.recipes())
def test_every_recipe_has_a_rate_to_start_from(name):
    assert 0.1 <= contenders.parse(name).relative_rate <= 30
