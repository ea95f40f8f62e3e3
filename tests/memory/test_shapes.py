"""Models without data: built in, from settings, configs and user code."""

import json
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from comoving.memory.shapes import subject, without_data

LLAMA = {
    "model_type": "llama",
    "hidden_size": 512,
    "intermediate_size": 1376,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "vocab_size": 32000,
}
VIT = {
    "model_type": "vit",
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "image_size": 32,
    "patch_size": 8,
}


def written(path: Path, fields: dict[str, object]) -> str:
    file = path / "config.json"
    file.write_text(json.dumps(fields))
    return str(file)


@pytest.mark.parametrize(
    ("name", "count"),
    [
        # embedding and head, the layers' matrices, norms
        ("llama-60m", 2 * 32000 * 512 + 8 * (4 * 512**2 + 3 * 512 * 1376) + 17 * 512),
        ("llama-1b", 2 * 32000 * 2048 + 24 * (4 * 2048**2 + 3 * 2048 * 5461) + 49 * 2048),
        ("llama-7b", 6_738_415_616),
        ("llama-13b", 13_015_864_320),
        ("llama-70b", 68_976_648_192),
    ],
)
def test_built_in_shapes_have_the_published_sizes(name: str, count: int) -> None:
    module = subject(name, torch.bfloat16).module
    assert sum(p.numel() for p in module.parameters()) == count
    assert {(p.dtype, p.device.type) for p in module.parameters()} == {(torch.bfloat16, "meta")}


def test_built_in_names_are_those_of_transformers(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    theirs = subject(written(tmp_path, LLAMA)).module
    ours = {
        name: tuple(p.shape)
        for name, p in subject("llama-60m").module.named_parameters()
        if ".layers." not in name or name.split(".")[2] in "01"
    }
    assert ours == {name: tuple(p.shape) for name, p in theirs.named_parameters()}


def test_a_config_of_images(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    found = subject(written(tmp_path, VIT), torch.bfloat16)
    assert {(p.dtype, p.device.type) for p in found.module.parameters()} == {(torch.bfloat16, "meta")}
    assert found.activations is not None
    layer = 6 * 32 + 2 * 32 + 2 * 64
    assert found.activations.estimate(3, None, 2, False) == 3 * 17 * 2 * layer * 2 + 3 * 2 * 6


@pytest.mark.parametrize("field", ["hidden_size", "num_hidden_layers", "vocab_size", "model_type"])
def test_a_config_without_a_needed_field_is_refused_by_its_name(tmp_path: Path, field: str) -> None:
    fields = {name: value for name, value in LLAMA.items() if name != field}
    with pytest.raises(ValueError, match=f"lacks {field}, which the plan of a language model needs"):
        subject(written(tmp_path, fields))


def test_all_missing_fields_are_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="lacks model_type, hidden_size, intermediate_size, num_hidden_layers"):
        subject(written(tmp_path, {"vocab_size": 3}))
    with pytest.raises(ValueError, match="lacks image_size, which the plan of an image model needs"):
        subject(written(tmp_path, {name: value for name, value in VIT.items() if name != "image_size"}))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden_size": "wide"}, "hidden_size must be integers"),
        ({"model_type": "no-such-model"}, "transformers makes no model"),
    ],
)
def test_wrong_fields_are_refused(tmp_path: Path, change: dict[str, object], message: str) -> None:
    pytest.importorskip("transformers")
    with pytest.raises(ValueError, match=message):
        subject(written(tmp_path, LLAMA | change))


def test_files_that_are_no_config_are_refused(tmp_path: Path) -> None:
    (tmp_path / "list.json").write_text("[1]")
    (tmp_path / "broken.json").write_text("{")
    for name, message in (("list", "holds no config"), ("broken", "no JSON"), ("absent", "there is no config")):
        with pytest.raises(ValueError, match=message):
            subject(str(tmp_path / f"{name}.json"))


def test_a_config_needs_transformers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ImportError, match=r"comoving\[hf\]"):
        subject(written(tmp_path, LLAMA))


def test_an_fno_from_its_settings() -> None:
    found = subject("fno:modes=8x6,channels=16,layers=3,inputs=2,resolution=32x32", torch.bfloat16)
    shapes = {name: (tuple(p.shape), p.dtype) for name, p in found.module.named_parameters()}
    assert shapes["convs.2.weight"] == ((16, 16, 8, 4), torch.complex64)
    assert shapes["fno_skips.0.weight"] == ((16, 16), torch.bfloat16)
    assert shapes["lifting.0.weight"] == ((32, 2), torch.bfloat16)
    assert found.activations is not None
    assert found.activations.estimate(2, None, 4, False) == 2 * (1024 * 16 * 13 * 4 + 3 * 16 * 32 * 8)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("fno:modes=8x8,channels=16", "lacks layers"),
        ("fno:modes=8x8,channels=16,layers=2,depth=3", "'depth=3' .* is no setting"),
        ("fno:modes=8x0,channels=16,layers=2", "integers >= 1"),
        ("fno:modes=8,channels=16x2,layers=2", "single integers"),
        ("fno:modes=8x8,channels=16,layers=2,resolution=64", "as many dimensions"),
        ("llama-8b", "unknown model"),
        ("torch.nn:Nothing", "has no function 'Nothing'"),
    ],
)
def test_models_that_are_none_are_refused(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        subject(text)


def test_user_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "planned_model.py").write_text(
        "from torch import nn\ndef make():\n    return nn.Sequential(nn.Linear(30, 40), nn.BatchNorm1d(40))\n"
        "def number():\n    return 3\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    module = subject("planned_model:make").module
    assert {x.device.type for x in (*module.parameters(), *module.buffers())} == {"meta"}
    with pytest.raises(TypeError, match="returned a int"):
        subject("planned_model:number")
    with pytest.raises(ImportError, match="no_such_module_here"):
        subject("no_such_module_here:make")


def test_a_copy_without_data_keeps_ties_and_what_is_frozen() -> None:
    model = nn.ModuleDict({"embed": nn.Embedding(8, 4), "head": nn.Linear(4, 8, bias=False), "last": nn.Linear(8, 2)})
    model["head"].weight = model["embed"].weight
    model["last"].bias.requires_grad_(False)
    copy = without_data(model)
    assert copy["head"].weight is copy["embed"].weight
    assert copy["head"].weight.is_meta
    assert not copy["last"].bias.requires_grad
    assert not model["last"].weight.is_meta
