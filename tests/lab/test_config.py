"""Configurations: the ones that come along, and what is refused."""

import pytest

from comoving.lab import config as configs
from comoving.lab.studies import STUDIES, find
from comoving.race.settings import SettingsError


@pytest.mark.parametrize("name", configs.names())
def test_the_ones_that_come_along(name):
    config = configs.load(name)
    assert config.name == name
    assert configs.from_plain(config.plain()) == config
    assert config.harder_task() != config
    for study in STUDIES.values():
        arms = study.arms(config)
        assert arms[0].role == "baseline" and len({arm.name for arm in arms}) == len(arms)
        assert [arm.role for arm in arms].count("baseline") == 1
        more = [arm for _, arms in study.followups(config) for arm in arms]
        assert len({arm.name for arm in arms + more}) == len(arms + more)


def test_the_standing_configuration_is_vit_s():
    config = configs.load("vit-s-cifar100")
    assert (config.hidden_size, config.layers, config.heads, config.intermediate_size) == (384, 12, 6, 1536)
    assert (config.image_size, config.patch_size, config.source) == (224, 16, "uoft-cs/cifar100")


def test_a_file_of_the_users(tmp_path):
    text = (configs.FOLDER / "vit-tiny-digits.toml").read_text()
    file = tmp_path / "mine.toml"
    file.write_text("ranks = [2]\n" + text)
    config = configs.load(str(file))
    assert config.name == "mine" and config.ranks == (2,)
    assert [arm.rank for arm in find("E4").arms(config) if arm.name.startswith("E4")] == [2]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rate": "x"}, "rate is 'x'; it must be a number"),
        ({"rate": True}, "rate is True; it must be a number"),
        ({"rates": 3.0}, "rates is 3.0; it must be a list of numbers"),
        ({"ranks": [4.0]}, r"ranks is \(4.0,\); it must be a list of ints"),
        ({"augment": "no"}, "augment is 'no'; it must be true or false"),
        ({"harder": 3}, "harder is 3; it must be a table"),
        ({"rates": [1.0, 1.0]}, "rates are .* differ in four digits"),
        ({"ranks": [4, 4]}, "ranks are .* differ in four digits"),
        ({"absolute": [float("nan")]}, "absolute are .* must be finite"),
        ({"steps": 0}, "steps is 0; it must be an int of at least 1"),
        ({"steps": 3}, "extract_at 0.2 is step 1 of 3|steps"),
        ({"rate": 0.0}, "rate is 0.0; it must be positive"),
        ({"rates": []}, "must not be empty"),
        ({"alpha": 1.0}, "alpha is 1.0; it must be above 1"),
        ({"ranks": [4, 0]}, "ranks is 0"),
        ({"stable": 1.5}, r"stable is 1.5; it must lie in \[0.0, 1.0\]"),
        ({"heads": 3}, "hidden_size 64 is no multiple of 3 heads"),
        ({"patch_size": 3}, "image_size 8 is no multiple of patch 3"),
        ({"task": "sound"}, "task is 'sound'; known: images, bytes"),
        ({"extract_from": "gradient"}, "extract_from is 'gradient'; known: change, weight, momentum"),
        ({"extract_at": 0.001}, "extract_at 0.001 is step 0 of 400"),
        ({"leraning_rate": 1.0}, "unknown field 'leraning_rate'; known: "),
        ({"name": "other"}, "unknown field 'name'"),
    ],
)
def test_values_out_of_range(change, message):
    config = configs.load("vit-tiny-digits")
    if change == {"steps": 3}:
        change = {"steps": 3, "extract_at": 0.0}
        message = "extract_at 0.0 is step 0 of 3"
    with pytest.raises(SettingsError, match=message):
        configs.configure(config, change)


def test_files_that_are_none(tmp_path):
    with pytest.raises(SettingsError, match="no configuration 'nothing'; known: lm-bytes, vit-s-cifar100"):
        configs.load("nothing")
    file = tmp_path / "broken.toml"
    file.write_text("steps = ")
    with pytest.raises(SettingsError, match="is no TOML"):
        configs.load(str(file))
    file.write_text('title = "t"\ntask = "bytes"\n')
    with pytest.raises(SettingsError, match="missing hidden_size, layers, heads"):
        configs.load(str(file))
    file.write_text('title = "t"\nharder = 3\n')
    with pytest.raises(SettingsError, match="harder is 3; it must be a table"):
        configs.load(str(file))
    file.write_text('title = "t"\n[harder]\nnothing = 1\n')
    with pytest.raises(SettingsError, match="unknown field 'nothing'"):
        configs.load(str(file))


def test_a_task_that_is_not_harder_than_itself():
    config = configs.configure(configs.load("vit-tiny-digits"), {"harder": {}})
    with pytest.raises(SettingsError, match="has no table"):
        config.harder_task()
    assert not any("harder" in what for what, _ in STUDIES["12"].followups(config))


def test_an_unknown_study():
    with pytest.raises(SettingsError, match="unknown study 'e5'; known: 1, 2, 12, 3, 3b, e4"):
        find("e5")
