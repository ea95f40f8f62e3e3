"""The data of the laboratory: parts that do not overlap, real loading code, and what is refused."""

import datasets
import numpy as np
import pytest
import torch
from PIL import Image

from comoving.lab import config as configs
from comoving.lab import tasks
from comoving.race.settings import SettingsError
from comoving.race.tasks import vit


def configured(name="vit-tiny-digits", **changes):
    return configs.configure(configs.load(name), changes)


def test_digits_in_three_parts_that_do_not_overlap():
    task = tasks.load(configured())
    sizes = {part: len(labels) for part, (_, labels) in task.parts.items()}
    assert sizes == {"training": 899, "validation": 449, "test": 449}
    x, labels = task.batch(16, torch.Generator().manual_seed(0))
    assert x.shape == (16, 1, 8, 8) and labels.dtype == torch.int64
    whole = task.prepared(task.parts["training"][0])
    assert abs(float(whole.mean())) < 1e-4 and abs(float(whole.std()) - 1) < 1e-3


def test_fewer_samples_are_a_subset_and_another_fingerprint():
    whole, part = tasks.load(configured()), tasks.load(configured(samples=50))
    assert len(part.parts["training"][1]) == 50 and part.fingerprint() != whole.fingerprint()
    assert torch.equal(part.parts["test"][0], whole.parts["test"][0])
    rows = {tuple(x.flatten().tolist()) for x in whole.parts["training"][0]}
    assert all(tuple(x.flatten().tolist()) in rows for x in part.parts["training"][0])


def test_evaluation_counts_every_picture_once():
    task = tasks.load(configured())
    model = task.model().eval()
    with torch.no_grad():
        point = task.evaluate(model, "test")
        logits = model(pixel_values=task.prepared(task.parts["test"][0])).logits
    right = (logits.argmax(1) == task.parts["test"][1]).float().mean().item()
    assert point["value"] == pytest.approx(100 * right)
    assert point["loss"] == pytest.approx(
        torch.nn.functional.cross_entropy(logits, task.parts["test"][1]).item(), rel=1e-5
    )


def test_augmented_pictures_are_flips_and_shifts():
    x = torch.zeros(64, 1, 8, 8)
    x[:, 0, 3, 2] = 1.0
    found = tasks.Pictures.augmented(x, torch.Generator().manual_seed(0))
    places = {tuple(p.nonzero()[0].tolist()) for p in found[:, 0]}
    assert found.shape == x.shape and (found.sum((1, 2, 3)) == 1).all()
    assert {row for row, _ in places} == {2, 3, 4} and {column for _, column in places} == {1, 2, 3, 4, 5, 6}
    again = tasks.Pictures.augmented(x, torch.Generator().manual_seed(0))
    assert torch.equal(found, again)


def test_bytes_in_windows_that_do_not_coincide():
    task = tasks.load(configured("lm-bytes"))
    assert not set(task.starts["validation"].tolist()) & set(task.starts["test"].tolist())
    model = task.model().eval()
    with torch.no_grad():
        assert 7.5 < task.evaluate(model, "validation")["value"] < 8.7


def hub_folder(tmp_path, columns=("img", "fine_label", "coarse_label")):
    picture, fine, coarse = columns
    rng = np.random.default_rng(0)

    def part(count):
        kinds = {
            picture: datasets.Image(),
            fine: datasets.ClassLabel(num_classes=7),
            coarse: datasets.ClassLabel(num_classes=2),
        }
        rows = {
            picture: [Image.fromarray(rng.integers(0, 255, (32, 32, 3), dtype=np.uint8)) for _ in range(count)],
            fine: [i % 7 for i in range(count)],
            coarse: [i % 2 for i in range(count)],
        }
        return datasets.Dataset.from_dict(rows, features=datasets.Features(kinds))

    datasets.DatasetDict({"train": part(60), "test": part(20)}).save_to_disk(tmp_path / "data")
    return str(tmp_path / "data")


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_the_loading_code_of_cifar100_on_a_folder_of_the_same_form(tmp_path):
    source = hub_folder(tmp_path)
    task = tasks.load(configured("vit-s-cifar100", source=source, hidden_size=48, layers=1, intermediate_size=32))
    assert {part: len(labels) for part, (_, labels) in task.parts.items()} == {
        "training": 57,
        "validation": 3,
        "test": 20,
    }
    x, labels = task.batch(4, torch.Generator().manual_seed(0))
    assert x.shape == (4, 3, 224, 224) and task.classes == 7 and int(labels.max()) < 7
    model = task.model()
    assert model.config.num_labels == 7
    assert torch.isfinite(task.loss(model, (x, labels)))
    original = datasets.load_from_disk(source)["test"]
    assert task.parts["test"][1].tolist() == original["fine_label"][:]
    assert torch.equal(
        task.parts["test"][0][3].permute(1, 2, 0), torch.from_numpy(np.asarray(original[3]["img"]).copy())
    )


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_data_that_cannot_be_used(tmp_path, monkeypatch):
    with pytest.raises(SettingsError, match="cannot read /nowhere/at/all"):
        tasks.load(configured(source="/nowhere/at/all"))
    datasets.Dataset.from_dict({"text": ["a"]}).save_to_disk(tmp_path / "text")
    with pytest.raises(SettingsError, match="needs the parts train and test"):
        tasks.load(configured(source=str(tmp_path / "text")))
    monkeypatch.setattr(vit, "find_fashion", lambda: None)
    with pytest.raises(SettingsError, match="apt-get install dataset-fashion-mnist"):
        tasks.load(configured("vit-tiny-fashion"))
