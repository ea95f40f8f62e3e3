import io

import pytest
from rich.console import Console

from comoving.lab import pictures
from comoving.lab.report import save, save_all, table
from comoving.lab.verdicts import judge
from lab.synthetic import against, arm, broken, run, study

PNG = b"\x89PNG"


def rich_study():
    """A treatment and a control with spectra, energy and alignment."""
    results = against(3, 0.01, speed=1.4)
    control = [run(s, noise=0.01, kind=2) for s in range(3)]
    results["arms"].append(arm("B2-<r4>", "control", control, rank=4, summary="random & fixed"))
    for i, one in enumerate(results["arms"]):
        for record in one["runs"]:
            keys = {
                f"spec/l{j}.fc/{what}": [[0, 1.0 + i], [200, 2.0]] for j in range(6) for what in ("sigma_max", "sv2")
            }
            keys |= {f"spec/l0.fc/{part}cos_u_mean": [[0, None], [200, 0.9]] for part in ("", "grad/")}
            record["spectra"] = keys
            if i:
                record |= {"energy": [[100, 0.1 * i], [200, 0.2]], "alignment": [[100, 0.5], [200, 0.4]]}
    return results


def test_the_page_has_everything_and_escapes(tmp_path):
    results = rich_study() | {"question": "Is a < b?", "followups": ["lower rank: <2>"]}
    path = save(results, tmp_path / "new")
    text = path.read_text()
    assert path.name == "report.html" and list(path.parent.iterdir()) == [path]
    for word in ("Is a &lt; b?", "B2-&lt;r4&gt;", "random &amp; fixed", "lower rank: &lt;2&gt;", "comoving lab run e4"):
        assert word in text, word
    for word in ('class="yes">yes', 'class="no">no', 'class="unknown">not enough evidence', "Rules", "vit-tiny-digits"):
        assert word in text, word
    assert "<r4>" not in text and "http" not in text and "nan" not in text.split("base64")[0]
    assert text.count("data:image/png;base64,") == 5
    for verdict in judge(results):
        assert f">{verdict.answer}</td>" in text


def test_a_bare_study_says_what_is_missing(tmp_path):
    results = study([arm("B0", "baseline", [], rate=None), arm("E4-r4", "treatment", [], rate=None, error="refused")])
    text = save(results, tmp_path).read_text()
    assert "image/png" not in text and text.count("Nothing to draw") == 5
    assert "E4-r4 has no run (refused)" in text


def test_diverged_runs_are_in_the_table(tmp_path):
    results = against(3)
    results["arms"][1]["runs"][1] = broken(1)
    results["arms"][1]["runs"][2]["curve"][5]["value"] = None
    text = save(results, tmp_path).read_text()
    assert "2 of 3 finished, 1 diverged" in text and "0.004: diverged" in text


def test_several_studies_in_one_page(tmp_path):
    alone = study(rich_study()["arms"][:1], study="3", title="Alone")
    text = save_all([study([arm("B0", "baseline", [])]), alone], tmp_path).read_text()
    assert 'href="#e4, vit-tiny-digits"' in text and 'id="3, vit-tiny-digits"' in text and "Alone" in text
    with pytest.raises(ValueError, match="no study"):
        save_all([], tmp_path)


def test_pictures_of_nothing_are_none():
    bare = study([arm("B0", "baseline", [])])
    assert [data for _, _, data in pictures.everything(bare)] == [None] * 5


def test_pictures_of_one_diverged_seed():
    results = study([arm("B0", "baseline", [broken(0)]), arm("B1", "control", [broken(0, at=0)])], 1)
    assert (pictures.held_out(results) or b"").startswith(PNG) and pictures.ratios(results) is None


def test_terminal_table():
    results = rich_study()
    console = Console(width=160, record=True, file=io.StringIO())
    console.print(table(results, judge(results)))
    shown = console.export_text()
    assert "B2-<r4>" in shown and "not enough evidence" in shown and "speed: 80%" not in shown
    assert table(results, judge(results), details=True).row_count == len(judge(results))
