"""comoving.save, and the files of the commands: whole or not at all, and an error that says what to do."""

import errno
import os
import re
import stat
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import comoving
from comoving import files
from comoving.files import check_folder, write_bytes, write_text

FULL = Path("/dev/full")
PAGE = Path(__file__).parents[1] / "docs" / "checkpoints.md"
OLD = b"what was there before"


def stepped():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(24, 16), nn.Tanh(), nn.Linear(16, 4))
    optimizer = comoving.AdamW(model.named_parameters(), 1e-2, rank=2)
    model(torch.randn(3, 24)).square().sum().backward()
    optimizer.step()
    return model, optimizer


def mode_of(path):
    return stat.S_IMODE(path.stat().st_mode)


def raising(code):
    def refuse(*args, **options):
        raise OSError(code, os.strerror(code))

    return refuse


@pytest.fixture
def full(monkeypatch):
    """A disk on which a file can be made and nothing be written."""
    if not FULL.exists():
        pytest.skip("needs /dev/full")

    def opened(path, mode):
        Path(path).touch(exist_ok=False)
        return FULL.open("wb")

    monkeypatch.setattr(files, "open", opened, raising=False)


def test_things_by_name_are_saved_as_their_state_and_load_as_data(tmp_path):
    model, optimizer = stepped()
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 10)
    comoving.save(tmp_path / "a.pt", model=model, optimizer=optimizer, scheduler=scheduler, step=7, note=None)
    comoving.save(str(tmp_path / "b.pt"), {"model": model.state_dict(), "optimizer": optimizer, "step": 7})
    saved, again = (torch.load(tmp_path / name, weights_only=True) for name in ("a.pt", "b.pt"))
    assert saved["step"] == 7 and saved["note"] is None and saved["scheduler"] == scheduler.state_dict()
    twin, other = stepped()
    for p in twin.parameters():
        nn.init.zeros_(p)
    twin.load_state_dict(saved["model"])
    other.load_state_dict(again["optimizer"])
    for a, b in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.equal(a, b)
    assert saved["optimizer"].keys() == again["optimizer"].keys() == {"state", "param_groups"}


@pytest.mark.parametrize("which", ["module", "its state", "tensor", "list"])
def test_one_state_is_saved_as_it_is(which, tmp_path):
    model = nn.Linear(3, 2)
    state = {"module": model, "its state": model.state_dict(), "tensor": torch.arange(3), "list": [1, "a"]}[which]
    comoving.save(tmp_path / "x.pt", state)
    found = torch.load(tmp_path / "x.pt", weights_only=True)
    if which in ("module", "its state"):
        assert found.keys() == {"weight", "bias"} and torch.equal(found["weight"], model.weight)
        assert found._metadata == model.state_dict()._metadata
    else:
        assert str(found) == str(state)


@pytest.mark.parametrize("mask", [0o022, 0o077, 0o002])
def test_permissions_are_those_of_open(mask, tmp_path):
    before = os.umask(mask)
    try:
        (tmp_path / "plain").touch()
        comoving.save(tmp_path / "new.pt", 1)
        write_text(tmp_path / "folder" / "new.json", "{}")
        assert mode_of(tmp_path / "new.pt") == mode_of(tmp_path / "folder" / "new.json") == mode_of(tmp_path / "plain")
        os.chmod(tmp_path / "new.pt", 0o640)
        comoving.save(tmp_path / "new.pt", 2)
        assert mode_of(tmp_path / "new.pt") == 0o640
    finally:
        os.umask(before)


def test_the_file_is_on_the_disk_before_its_name_and_then_the_folder(tmp_path, monkeypatch):
    seen, sync, replace = [], os.fsync, os.replace

    def synced(descriptor):
        kind = "folder" if stat.S_ISDIR(os.fstat(descriptor).st_mode) else "file"
        seen.append((kind, os.fstat(descriptor).st_size > 0))
        sync(descriptor)

    def renamed(source, target):
        seen.append(("rename", Path(source).parent == Path(target).parent))
        replace(source, target)

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(os, "replace", renamed)
    comoving.save(tmp_path / "x.pt", torch.zeros(3))
    assert seen == [("file", True), ("rename", True), ("folder", True)]


@pytest.mark.parametrize("size", [1, 10**6], ids=["at the end", "in the middle"])
def test_a_full_disk_leaves_the_old_file_alone(size, tmp_path, full):
    path = tmp_path / "x.pt"
    path.write_bytes(OLD)
    with pytest.raises(OSError, match=r"No space left on device; free some space, or choose another.*x\.pt") as found:
        comoving.save(path, weight=torch.zeros(size))
    assert found.value.errno == errno.ENOSPC and found.value.filename == str(path)
    assert path.read_bytes() == OLD and os.listdir(tmp_path) == ["x.pt"]


@pytest.mark.parametrize(
    ("call", "code", "kind", "says"),
    [
        ("fsync", errno.EDQUOT, OSError, "free some space"),
        ("fsync", errno.EIO, OSError, "Input/output error"),
        ("replace", errno.EACCES, PermissionError, "choose a place that may be written to"),
        ("replace", errno.EROFS, OSError, "Read-only file system; choose a place that may be written to"),
    ],
)
def test_whatever_the_system_refuses_leaves_the_old_file_alone(call, code, kind, says, tmp_path, monkeypatch):
    path = tmp_path / "x.pt"
    path.write_bytes(OLD)
    monkeypatch.setattr(os, call, raising(code))
    for write in (lambda: comoving.save(path, [1]), lambda: write_bytes(path, b"new"), lambda: write_text(path, "new")):
        with pytest.raises(kind, match=says) as found:
            write()
        assert found.value.errno == code
        assert path.read_bytes() == OLD and os.listdir(tmp_path) == ["x.pt"]


def test_an_interrupt_leaves_the_old_file_alone(tmp_path, monkeypatch):
    path = tmp_path / "x.pt"
    path.write_bytes(OLD)

    def interrupted(content, file):
        file.write(b"half of")
        raise KeyboardInterrupt

    monkeypatch.setattr(torch, "save", interrupted)
    with pytest.raises(KeyboardInterrupt):
        comoving.save(path, 1)
    assert path.read_bytes() == OLD and os.listdir(tmp_path) == ["x.pt"]


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (np.float64(0.5), "numpy.*weights_only=True. refuses; save state_dict"),
        (Path("x"), "pathlib"),
        ([nn.Linear(2, 2)], "torch.nn.modules.linear.Linear"),
        (lambda: 1, "not saved to '.*x.pt': .*save state_dict"),
    ],
    ids=["numpy", "path", "module in a list", "function"],
)
def test_what_could_not_be_loaded_is_not_saved(content, says, tmp_path):
    path = tmp_path / "x.pt"
    path.write_bytes(OLD)
    with pytest.raises(TypeError, match=says):
        comoving.save(path, step=1, content=content)
    assert path.read_bytes() == OLD and os.listdir(tmp_path) == ["x.pt"]


def test_paths_that_cannot_be_written(tmp_path, monkeypatch):
    (tmp_path / "file").write_bytes(OLD)
    os.mkfifo(tmp_path / "pipe")
    for path, kind, says in (
        (tmp_path / "no" / "x.pt", FileNotFoundError, f"make the folder '{tmp_path / 'no'}' first"),
        (tmp_path, IsADirectoryError, "give the name of a file"),
        (tmp_path / "file" / "x.pt", NotADirectoryError, "there is a file where a folder is needed"),
        (tmp_path / "pipe", PermissionError, "a device or a pipe"),
    ):
        with pytest.raises(kind, match=says) as found:
            comoving.save(path, 1)
        assert str(path) in str(found.value)
    monkeypatch.setattr(os, "access", lambda path, how: False)
    with pytest.raises(PermissionError, match="choose a place that may be written to.*file"):
        comoving.save(tmp_path / "file", 1)
    assert (tmp_path / "file").read_bytes() == OLD and sorted(os.listdir(tmp_path)) == ["file", "pipe"]


def test_a_link_stays_and_what_it_leads_to_is_replaced(tmp_path):
    (tmp_path / "store").mkdir()
    (tmp_path / "latest.pt").symlink_to(tmp_path / "store" / "x.pt")
    for value in (1, 2):
        comoving.save(tmp_path / "latest.pt", value)
    assert (tmp_path / "latest.pt").is_symlink() and os.listdir(tmp_path / "store") == ["x.pt"]
    assert torch.load(tmp_path / "store" / "x.pt", weights_only=True) == 2


def test_wrong_calls_say_what_to_write(tmp_path):
    path = tmp_path / "x.pt"
    for call, says in (
        (lambda: comoving.save({"step": 1}, path), "a path comes first, unlike torch.save.*got dict"),
        (lambda: comoving.save(path), "one state.*or entries by name|one state or entries by name"),
        (lambda: comoving.save(path, {"step": 1}, step=1), "one state"),
    ):
        with pytest.raises(TypeError, match=says):
            call()
    assert not os.listdir(tmp_path)


def test_a_folder_is_examined_and_not_made(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    (tmp_path / "nowhere").symlink_to(tmp_path / "gone")
    check_folder(tmp_path)
    check_folder(tmp_path / "a" / "b")
    assert not (tmp_path / "a").exists()
    for path in (tmp_path / "file", tmp_path / "file" / "a" / "b", tmp_path / "nowhere"):
        with pytest.raises(NotADirectoryError, match="there is a file where a folder is needed") as found:
            check_folder(path)
        assert found.value.filename == str(path)
    monkeypatch.setattr(os, "access", lambda path, how: False)
    with pytest.raises(PermissionError, match="choose a place that may be written to"):
        check_folder(tmp_path / "a")


def test_the_loop_of_the_page_goes_on_bit_for_bit(tmp_path, monkeypatch):
    (code,) = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.S)
    weights = []
    for name, ends in (("whole", (60,)), ("in parts", (25, 60))):
        (tmp_path / name).mkdir()
        monkeypatch.chdir(tmp_path / name)
        for end in ends:
            names = {}
            with torch.random.fork_rng():
                exec(code.replace("range(begin, 60)", f"range(begin, {end})"), names)
        weights.append(names["model"].state_dict())
    assert names["begin"] == 20
    assert all(torch.equal(weights[0][key], weights[1][key]) for key in weights[0])
