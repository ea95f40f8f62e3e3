"""Patterns of layers: what they find, and what they refuse."""

import pytest
import transformers
from torch import nn

from comoving.directions import TARGETS, targets
from comoving.directions.targets import matrix_of


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.qkv, self.proj = nn.Linear(8, 24), nn.Linear(8, 8)


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.attn, self.norm = Attention(), nn.LayerNorm(8)
        self.mlp = nn.ModuleDict({"fc1": nn.Linear(8, 16), "fc2": nn.Linear(16, 8)})


def timm_like():
    return nn.ModuleDict({"blocks": nn.ModuleList([Block(), Block()]), "head": nn.Linear(8, 3)})


SIZES = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}


def models():
    yield "vit", transformers.ViTForImageClassification(transformers.ViTConfig(**SIZES, image_size=8, patch_size=4)), 12
    yield "llama", transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES, vocab_size=9)), 14
    yield "bert", transformers.BertModel(transformers.BertConfig(**SIZES, vocab_size=9)), 12
    gpt2 = transformers.GPT2Config(n_embd=16, n_layer=2, n_head=2, vocab_size=9)
    yield "gpt2", transformers.GPT2Model(gpt2), 8
    yield "neox", transformers.GPTNeoXModel(transformers.GPTNeoXConfig(**SIZES, vocab_size=9)), 8


@pytest.mark.parametrize(("name", "model", "count"), [pytest.param(*case, id=case[0]) for case in models()])
def test_the_same_layers_in_transformers(name, model, count):
    found = targets(model, TARGETS)
    assert len(found) == count, list(found)
    assert not any(word in key for key in found for word in ("embed", "lm_head", "classifier", "norm", "pooler"))
    # Together the four patterns name each layer once.
    by_pattern = [set(targets(model, pattern)) for pattern in TARGETS.split(",")]
    assert sum(map(len, by_pattern)) == count


def test_timm_names_and_wildcards_in_model_order():
    model = timm_like()
    assert list(targets(model, "mlp.fc2,attn.qkv")) == [
        "blocks.0.attn.qkv", "blocks.0.mlp.fc2", "blocks.1.attn.qkv", "blocks.1.mlp.fc2",
    ]  # fmt: skip
    assert list(targets(model, ["blocks.1.*.proj"])) == ["blocks.1.attn.proj"]
    assert list(targets(model, "head")) == ["head"]
    assert matrix_of(model["head"]) is model["head"].weight


def test_a_parametrized_layer_keeps_its_name():
    model = timm_like()
    before = matrix_of(model["head"])
    nn.utils.parametrizations.orthogonal(model["head"])
    assert list(targets(model, "head")) == ["head"]
    assert matrix_of(model["head"]) is not model["head"].weight and matrix_of(model["head"]).shape == before.shape


@pytest.mark.parametrize(
    ("patterns", "message"),
    [
        ("attn.query", r"'attn.query' matches no module; matrices are in blocks.0.attn.qkv, .* and \d+ more"),
        ("attn", r"'attn' matches blocks.0.attn, which is no matrix; inside of it are blocks.0.attn.qkv"),
        ("norm", r"'norm' matches blocks.0.norm, which is no matrix$"),
        ("mlp.fc1,nothing", "'nothing' matches no module"),
        (" , ", "no target is named"),
    ],
)
def test_patterns_that_cannot_be_meant(patterns, message):
    with pytest.raises(ValueError, match=message):
        targets(timm_like(), patterns)


def test_shared_modules_and_weights():
    model = timm_like()
    model["blocks"][1].attn = model["blocks"][0].attn
    with pytest.raises(ValueError, match=r"blocks.0.attn.qkv and blocks.1.attn.qkv share one weight"):
        targets(model, "attn.qkv")
    model = timm_like()
    model["blocks"][1].mlp["fc1"].weight = model["blocks"][0].mlp["fc1"].weight
    with pytest.raises(ValueError, match="share one weight"):
        targets(model, "mlp.fc1")
    assert len(targets(model, "mlp.fc2")) == 2
