"""Which parameters are projected, and why; groups and their hyper-parameters."""

import warnings

import pytest
import torch
from torch import nn

from comoving import AdamW, LowRankOptimizer, build, explain, param_groups
from comoving.finders import Exact, Power
from comoving.residual import Discard, Feedback
from comoving.transport import Carry, Rotate

PROJECTED = "projected"


def choice(source, **options):
    """Parameter -> reason, "projected" for the projected ones, of a model or an optimizer."""
    if isinstance(source, nn.Module):
        options = {"rank": 4, **options}
        source = LowRankOptimizer(param_groups(source, **options))
    return {site.name: PROJECTED if site.projected else site.reason for site in source.sites.values()}


class Net(nn.Module):
    """Every kind of parameter that stays dense, and two that do not."""

    def __init__(self):
        super().__init__()
        self.tokens = nn.Embedding(50, 16)
        self.position_embeddings = nn.Parameter(torch.zeros(20, 16))
        self.body = nn.Linear(16, 40)
        self.conv = nn.Conv2d(16, 24, 3)
        self.ln_f = nn.LayerNorm(16)
        self.scale = nn.RMSNorm((16, 40))
        self.tiny = nn.Linear(5, 6, bias=False)
        self.gain = nn.Parameter(torch.ones(40))
        self.last = nn.Linear(40, 16)


class WithHead(Net):
    def __init__(self):
        super().__init__()
        self.to_vocabulary = nn.Linear(16, 50)

    def get_output_embeddings(self):
        return self.to_vocabulary


def test_kinds_of_parameters():
    reasons = choice(Net())
    assert {name for name, why in reasons.items() if why == PROJECTED} == {"body.weight", "conv.weight", "last.weight"}
    assert reasons["tokens.weight"] == "embedding"
    assert reasons["position_embeddings"] == "embedding, by its name"
    assert reasons["ln_f.weight"] == reasons["ln_f.bias"] == reasons["scale.weight"] == "norm"
    assert reasons["body.bias"] == reasons["conv.bias"] == "bias"
    assert reasons["gain"] == "fewer than two modes"
    assert reasons["tiny.weight"] == "too small to gain"
    assert choice(Net(), rank=1)["tiny.weight"] == PROJECTED
    assert choice(Net(), rank=5)["tiny.weight"] == "rank covers every mode, or no mode is long enough"


def test_the_head_is_what_the_model_says():
    reasons = choice(WithHead())
    assert (reasons["to_vocabulary.weight"], reasons["to_vocabulary.bias"]) == ("output head", "bias")
    assert reasons["last.weight"] == PROJECTED


@pytest.mark.parametrize(
    "name", ["lm_head", "head", "heads", "classifier", "score", "embed_out", "qa_outputs", "fc", "output"]
)
def test_heads_by_name(name):
    model = nn.Module()
    model.add_module("inner", nn.Linear(16, 24))
    model.add_module(name, nn.Linear(16, 24))
    assert choice(model)[f"{name}.weight"] == "output head, by its name"
    assert choice(model)["inner.weight"] == PROJECTED


@pytest.mark.parametrize(
    "name",
    [
        "layers.1.fc.weight",
        "blocks.output.weight",
        "decoder.attention_head_proj.weight",
        "membership.weight",
        "overhead.weight",
        "layers.0.self_attn.q_proj.weight",
        "mlp.fc1.weight",
        "planner.weight",
    ],
)
def test_names_that_only_look_alike(name):
    p = nn.Parameter(torch.zeros(16, 24))
    assert choice(LowRankOptimizer([(name, p)], rank=4)) == {name: PROJECTED}


def test_the_last_layer_is_not_a_head():
    model = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 24))
    assert choice(model) == {"0.weight": PROJECTED, "0.bias": "bias", "2.weight": PROJECTED, "2.bias": "bias"}


class Tied(nn.Module):
    def __init__(self, first):
        super().__init__()
        names = ["input_table", "projection"] if first == "embedding" else ["projection", "input_table"]
        for name in names:
            self.add_module(name, nn.Embedding(50, 16) if name == "input_table" else nn.Linear(16, 50, bias=False))
        self.projection.weight = self.input_table.weight
        self.body = nn.Linear(16, 24, bias=False)


@pytest.mark.parametrize("first", ["embedding", "linear"])
def test_tied_weights_are_embeddings_wherever_they_are_met_first(first):
    reasons = choice(Tied(first))
    assert len(reasons) == 2 and reasons.pop("body.weight") == PROJECTED
    assert list(reasons.values()) == ["embedding"]


@pytest.mark.parametrize("pattern", ["input_table.*", "projection.*"])
def test_a_pattern_reaches_a_tied_weight_by_each_of_its_names(pattern):
    (group,) = param_groups(Tied("embedding"), rank=4, project=[pattern])
    assert [name for name, _ in group["params"]] == ["input_table.weight", "body.weight"]


def test_frozen_weights_are_left_out():
    model = Net()
    model.body.requires_grad_(False)
    names = choice(model).keys()
    assert not {"body.weight", "body.bias"} & names and "conv.weight" in names
    table = {row.parameter: row for row in explain(model, rank=4).rows}
    assert table["body.weight"].why == "frozen" and table["body.weight"].bytes == 0


@pytest.mark.parametrize(
    ("options", "changed"),
    [
        ({"dense": ["body.*"]}, {"body.weight": "chosen to stay dense", "body.bias": "chosen to stay dense"}),
        ({"dense": [nn.Conv2d]}, {"conv.weight": "chosen to stay dense", "conv.bias": "chosen to stay dense"}),
        ({"project": [nn.Embedding]}, {"tokens.weight": PROJECTED}),
        ({"project": ["position_*"]}, {"position_embeddings": PROJECTED}),
        (
            {"dense": ["*.weight"], "project": ["conv.*"]},
            {
                "body.weight": "chosen to stay dense",
                "last.weight": "chosen to stay dense",
                "tokens.weight": "chosen to stay dense",
                "ln_f.weight": "chosen to stay dense",
                "scale.weight": "chosen to stay dense",
                "tiny.weight": "chosen to stay dense",
                "conv.bias": "fewer than two modes",
            },
        ),
        ({"project": ["body.bias"]}, {"body.bias": "fewer than two modes"}),
    ],
)
def test_overrides(options, changed):
    assert choice(Net(), **options) == choice(Net()) | changed


def test_build_passes_overrides_on():
    assert choice(build("galore", Net(), rank=4, dense=["body.*"], project=[nn.Embedding])) == choice(
        Net(), dense=["body.*"], project=[nn.Embedding]
    )


def test_plain_parameters_go_by_shape_alone():
    model = Net()
    reasons = list(choice(LowRankOptimizer(model.parameters(), rank=4)).values())
    by_shape = [PROJECTED if p.ndim > 1 and min(p.shape[:2]) > 5 else None for p in model.parameters()]
    assert [PROJECTED if why == PROJECTED else None for why in reasons] == by_shape
    assert by_shape.count(PROJECTED) == 6  # both embeddings, the matrix-shaped norm, body, conv, last


def test_named_parameters_go_by_name():
    model = Net()
    reasons = choice(LowRankOptimizer(model.named_parameters(), rank=4))
    assert {n for n, why in reasons.items() if why == PROJECTED} == {
        "tokens.weight",  # its name says nothing
        "scale.weight",
        "body.weight",
        "conv.weight",
        "last.weight",
    }
    assert reasons["position_embeddings"] == "embedding, by its name" and reasons["ln_f.weight"] == "norm, by its name"
    by_shape = LowRankOptimizer(model.named_parameters(), rank=4, select="shape")
    assert choice(by_shape)["position_embeddings"] == PROJECTED


# ------------------------------------------------------------------------------------------------------ real models


def transformer(kind):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        transformers = pytest.importorskip("transformers")
        size = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2}
        if kind == "llama":
            return transformers.LlamaForCausalLM(
                transformers.LlamaConfig(vocab_size=64, num_key_value_heads=2, tie_word_embeddings=False, **size)
            )
        if kind == "llama-tied":
            return transformers.LlamaForCausalLM(
                transformers.LlamaConfig(vocab_size=64, num_key_value_heads=2, tie_word_embeddings=True, **size)
            )
        if kind == "vit":
            return transformers.ViTForImageClassification(
                transformers.ViTConfig(image_size=8, patch_size=4, num_labels=10, **size)
            )
        if kind == "gpt2":
            return transformers.GPT2LMHeadModel(
                transformers.GPT2Config(vocab_size=64, n_positions=16, n_embd=32, n_layer=1, n_head=2)
            )
        return transformers.BertForMaskedLM(transformers.BertConfig(vocab_size=64, max_position_embeddings=16, **size))


@pytest.mark.parametrize(
    ("kind", "projected", "expected"),
    [
        (
            "llama",
            {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"},
            {
                "model.embed_tokens.weight": "embedding",
                "lm_head.weight": "output head",
                "model.norm.weight": "norm",
                "model.layers.0.input_layernorm.weight": "norm",
            },
        ),
        (
            "llama-tied",
            {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"},
            {"model.embed_tokens.weight": "embedding"},
        ),
        (
            "vit",
            {"query", "key", "value", "q_proj", "k_proj", "v_proj", "o_proj", "dense", "fc1", "fc2"},
            {
                "classifier.weight": "output head, by its name",
                "vit.embeddings.cls_token": "embedding, by its name",
                "vit.embeddings.patch_embeddings.projection.weight": "embedding of patches",
                "vit.layernorm.weight": "norm",
            },
        ),
        (
            "gpt2",
            {"c_attn", "c_proj", "c_fc"},
            {
                "transformer.wte.weight": "embedding",
                "transformer.wpe.weight": "embedding",
                "transformer.ln_f.weight": "norm",
            },
        ),
        (
            "bert",
            {"query", "key", "value", "dense"},
            {
                "bert.embeddings.word_embeddings.weight": "embedding",
                "bert.embeddings.position_embeddings.weight": "embedding",
                "bert.embeddings.LayerNorm.weight": "norm",
            },
        ),
    ],
)
def test_transformers(kind, projected, expected):
    model = transformer(kind)
    reasons = choice(model)
    for name, why in expected.items():
        assert reasons[name] == why, name
    chosen = {name for name, why in reasons.items() if why == PROJECTED}
    assert chosen and {name.split(".")[-2] for name in chosen} <= projected
    matrices = {
        n
        for n, p in model.named_parameters()
        if p.ndim == 2 and not any(m in n for m in ("embed", "wte", "wpe", "head"))
    }
    assert matrices - chosen <= {"classifier.weight"}
    assert reasons.keys() == dict(model.named_parameters()).keys()


def test_neural_operator():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        models = pytest.importorskip("neuralop.models")
        model = models.FNO(n_modes=(8, 8), hidden_channels=16, in_channels=1, out_channels=1, n_layers=2)
    reasons = choice(model, rank=0.1)
    spectral = {n for n, p in model.named_parameters() if p.is_complex()}
    assert spectral and all(reasons[n] == PROJECTED for n in spectral)
    assert all(why != PROJECTED for n, why in reasons.items() if n.endswith("bias"))
    optimizer = AdamW(param_groups(model, rank=0.1))
    for p, site in optimizer.sites.items():
        if site.name in spectral:
            core = torch.Size(site.core_shape).numel()
            assert 0.06 < core / p.numel() < 0.16


# ----------------------------------------------------------------------------------------------- groups and options


def matrices(count, shape=(16, 24)):
    return [nn.Parameter(torch.randn(shape, generator=torch.Generator().manual_seed(i))) for i in range(count)]


@pytest.mark.parametrize("count", [1, 2, 5])
@pytest.mark.parametrize("named", [True, False])
def test_the_groups_given_are_the_groups_kept(count, named):
    params = matrices(count)
    groups = [{"params": [(f"w{i}", p)] if named else [p], "lr": 0.1 * (i + 1)} for i, p in enumerate(params)]
    optimizer = AdamW(groups)
    assert [g["lr"] for g in optimizer.param_groups] == [0.1 * (i + 1) for i in range(count)]
    assert [g["params"][0] for g in optimizer.param_groups] == params
    assert [g.get("param_names") for g in optimizer.param_groups] == (
        [[f"w{i}"] for i in range(count)] if named else [None] * count
    )
    assert len(AdamW(Net().parameters()).param_groups) == len(AdamW(Net().named_parameters()).param_groups) == 1


@pytest.mark.parametrize("named", [True, False])
def test_groups_that_join_later(named):
    first, second, third = matrices(3)
    optimizer = LowRankOptimizer([("first", first)] if named else [first], 1e-2, 4, refresh_every=3)
    first.grad = torch.ones_like(first)
    optimizer.step()
    optimizer.add_param_group(
        {"params": [("head.weight", second), ("third", third)] if named else [second, third], "rank": 6}
    )
    assert [s.name for s in optimizer.sites.values()] == (
        ["first", "head.weight", "third"] if named else ["parameter 0", "parameter 1", "parameter 2"]
    )
    assert optimizer.sites[third].ranks == (6, None)
    assert optimizer.sites[second].projected is not named
    assert optimizer.sites[third].phase != optimizer.sites[first].phase  # staggered against what was there
    for p in (first, second, third):
        p.grad = torch.randn_like(p)
    optimizer.step()
    assert optimizer.state[third]["frame.0"].shape == (16, 6) and int(optimizer.state[third]["step"]) == 1
    assert int(optimizer.state[first]["step"]) == 2


def test_named_and_unnamed_groups_do_not_mix():
    p, q = matrices(2)
    optimizer = LowRankOptimizer([("p", p)])
    with pytest.raises(ValueError, match="names"):
        optimizer.add_param_group({"params": [q]})
    assert list(optimizer.sites) == [p] and len(optimizer.param_groups) == 1


OVERRIDES = {
    "rank": 8, "finder": Exact(), "transport": Rotate(), "residual": Feedback(), "scale": 0.5, "refresh_every": 7,
    "lr": 0.3,
    "betas": (0.5, 0.9),
    "eps": 1e-3, "weight_decay": 0.2, "side": "both", "maximize": True, "diagnostics": False,
}  # fmt: skip


@pytest.mark.parametrize("key", OVERRIDES)
def test_an_override_changes_its_own_group_and_no_other(key):
    """The middle one of three groups: neighbours train as they would in a uniform optimizer, it does not."""

    def run(*options):
        params = matrices(3)
        base = {
            "rank": 4,
            "finder": Power(),
            "transport": Carry(),
            "residual": Discard(),
            "refresh_every": 2,
            "lr": 1e-2,
        }
        groups = [{"params": [p], **own} for p, own in zip(params, options, strict=True)]
        optimizer = LowRankOptimizer(groups, **base)
        # The phase is spread over groups of one period: the same for all, so that only the override differs.
        for t in range(7):
            for i, p in enumerate(params):
                p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(10 * t + i))
            optimizer.step()
        return params, optimizer

    own = {key: OVERRIDES[key]}
    uniform, _ = run({}, {}, {})
    mixed, optimizer = run({}, own, {})
    assert (
        optimizer.param_groups[1][key]
        == OVERRIDES[key]
        != optimizer.param_groups[0][key]
        == optimizer.param_groups[2][key]
    )
    assert torch.equal(mixed[0], uniform[0])
    if key != "refresh_every":  # which frees a place in the schedule for the third
        assert torch.equal(mixed[2], uniform[2])
    assert torch.equal(mixed[1], uniform[1]) is (key == "diagnostics")
    assert optimizer.sites[mixed[0]].ranks == optimizer.sites[mixed[2]].ranks == (4, None)
    assert ("feedback.gradients.value" in optimizer.state[mixed[1]]) is (key == "residual")
    assert "feedback.gradients.value" not in optimizer.state[mixed[2]]


def test_param_groups_carry_options_for_the_projected_group_only():
    projected, dense = param_groups(Net(), rank=4, scale=0.5, refresh_every=9)
    assert (projected["rank"], projected["scale"], projected["refresh_every"]) == (4, 0.5, 9)
    assert dense["rank"] == 1.0 and "scale" not in dense
    names = {n for g in (projected, dense) for n, _ in g["params"]}
    assert names == dict(Net().named_parameters()).keys()


@pytest.mark.parametrize(
    ("rank", "side", "ranks"),
    [
        (4, "auto", (4, None)),
        (4, "left", (4, None)),
        (4, "right", (None, 4)),
        (4, "both", (4, 4)),
        (16, "auto", (None, None)),
        (24, "right", (None, None)),
        (0.25, "auto", (4, None)),
        (0.25, "both", (8, 12)),
        ((3, 5), "auto", (3, 5)),
        ((None, 5), "auto", (None, 5)),
    ],
)
def test_ranks_of_a_matrix(rank, side, ranks):
    (p,) = matrices(1)
    optimizer = LowRankOptimizer([p], rank=rank, side=side)
    assert optimizer.sites[p].ranks == ranks
    p.grad = torch.randn_like(p)
    optimizer.step()
    core = tuple(d if r is None else r for d, r in zip(p.shape, ranks, strict=True))
    assert optimizer.state[p]["moment.first"].shape == core
