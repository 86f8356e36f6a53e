"""Tables and plots from run folders and from evidence files, with numbers worked out by hand."""

import json
from pathlib import Path

import pytest
import report


def write_run(root: Path, dataset: str, method: str, seed: int, accuracy: float, trained: int):
    folder = root / dataset / method / f"seed{seed}"
    folder.mkdir(parents=True)
    result = {
        "dataset": dataset,
        "method": method,
        "seed": seed,
        "test_accuracy": accuracy,
        "trained_parameters": trained,
        "head_parameters": 1000,
        "lr": 1e-3,
        "select": "test",
    }
    (folder / "result.json").write_text(json.dumps(result))
    rows = [{"epoch": epoch, "loss": 2.0 / (epoch + 1)} for epoch in range(3)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    root = tmp_path / "my runs"
    for seed, (first, second) in enumerate(((0.80, 0.60), (0.84, 0.62), (0.82, 0.64))):
        write_run(root, "cub", "svp", seed, first, 251_000)
        write_run(root, "dtd", "svp", seed, second, 251_000)
    write_run(root, "cub", "linear", 0, 0.70, 1000)
    write_run(root, "dtd", "linear", 0, 0.65, 1000)
    return root


def test_the_table_has_mean_and_deviation_over_seeds(runs: Path):
    table = report.accuracy_table(report.read_runs([runs])).splitlines()
    assert table[0] == "| method | trained, thousands | cub | dtd | mean |"
    # cub 80, 84, 82; dtd 60, 62, 64; means 70, 73, 73: deviations with n - 1
    assert table[2] == "| svp | 250.0 | 82.0 ± 2.0 | 62.0 ± 2.0 | 72.0 ± 1.7 |"
    assert table[3] == "| linear | 0.0 | 70.0 | 65.0 | 67.5 |"


def test_a_seed_that_lacks_a_data_set_does_not_count_in_the_mean(runs: Path):
    (runs / "dtd/svp/seed2/result.json").unlink()
    rows = report.read_runs([runs])
    assert report.seed_means(rows, "svp") == pytest.approx([70.0, 73.0])


def test_a_run_counts_once_however_often_its_folder_is_named(runs: Path):
    once, twice = report.read_runs([runs]), report.read_runs([runs, runs / "cub", runs])
    assert len(once) == len(twice) == 8


def test_what_the_command_line_changed_is_a_method_of_its_own(runs: Path, tmp_path: Path):
    other = tmp_path / "groups of six"
    write_run(other, "cub", "svp", 0, 0.5, 251_000)
    write_run(other, "dtd", "svp", 0, 0.5, 251_000)
    for file in other.rglob("result.json"):
        file.write_text(json.dumps(json.loads(file.read_text()) | {"variant": "group size 6"}))
    table = report.accuracy_table(report.read_runs([runs, other])).splitlines()
    assert table[2].startswith("| svp | 250.0 | 82.0")
    assert table[-1] == "| svp, group size 6 | 250.0 | 50.0 | 50.0 | 50.0 |"
    report.plot_curves([runs, other], tmp_path / "curves.svg")
    assert (tmp_path / "curves.svg").is_file()


@pytest.mark.parametrize(("best", "holds"), [(1, "no"), (4, "yes"), (12, "no")])
def test_the_middle_size_is_said_to_be_best_only_where_it_is(best: int, holds: str, tmp_path: Path):
    for size in (1, 4, 12):
        write_run(tmp_path, "cub", str(size), 0, 0.8 if size == best else 0.7, 1000)
    rows = sorted(report.read_runs([tmp_path]), key=lambda row: int(row.method))
    text = report.middle_is_best(rows)
    assert f"Best here: {best}; it holds here: {holds}." in text
    assert "within 10.0 points" in text


def test_claims_that_do_not_hold_are_said_not_to_hold(runs: Path):
    write_run(runs, "cub", "vpt-deep", 0, 0.9, 2000)
    write_run(runs, "dtd", "vpt-deep", 0, 0.6, 2000)
    table = report.claims_table(report.read_runs([runs])).splitlines()
    assert table[2] == "| svp above linear | +4.5 | 1 of 2 | yes |"
    assert table[3] == "| svp above vpt-deep | -3.0 | 1 of 2 | no |"


def test_plots_are_written_and_the_same_numbers_give_the_same_file(runs: Path, tmp_path: Path):
    for name in ("one", "two"):
        text = report.main([str(runs), "--plots", str(tmp_path / name)])
        assert text.endswith("chosen on the test split, as in the released code.")
    for plot in ("accuracy.svg", "curves.svg"):
        texts = [(tmp_path / name / plot).read_text() for name in ("one", "two")]
        assert "<svg" in texts[0]
        assert texts[0] == texts[1]


def evidence_file(path: Path) -> Path:
    rows = []
    for task in ("digits", "counting"):
        for method, accuracy in (("svp", 0.9), ("linear", 0.5), ("group size 1", 0.8)):
            for seed in (0, 1):
                row = {"task": task, "method": method, "seed": seed, "lr": 2e-3}
                row |= {"trained_parameters": 2000, "head_parameters": 1000}
                rows.append(row | {"phase": "test", "accuracy": accuracy})
                rows.append(row | {"phase": "search", "accuracy": 0.0})
    anchor = {"task": "digits", "method": "svp", "phase": "anchor", "seed": 0, "lr": 6e-3}
    rows.append(anchor | {"accuracy": 0.963, "train_images": 300})
    settings = {"seeds": [0, 1], "epochs": 40}
    raw = {"rows": rows, "device": "CPU", "torch": "2", "seconds": 120.0, "settings": settings}
    path.write_text(json.dumps(raw))
    return path


def test_an_evidence_file_gives_every_table(tmp_path: Path):
    text = report.main([str(evidence_file(tmp_path / "evidence.json"))])
    assert "25 runs on CPU in 2.0 minutes" in text
    assert "| svp | 1.0 | 90.0 ± 0.0 | 90.0 ± 0.0 | 90.0 ± 0.0 |" in text
    assert "| svp above linear | +40.0 | 2 of 2 | yes |" in text
    ablation = text[text.index("## Blocks") :].splitlines()
    assert ablation[4].startswith("| 1 | 1.0 | 80.0")
    assert ablation[5].startswith("| 4 | 1.0 | 90.0")
    assert "Best here: 4; it holds here: no." in text
    assert "## Learning rates, chosen on validation" in text
    assert "| svp, lr 0.006 | 96.3 |" in text
    assert "| linear | 0.002 | 0.002 |" in text


def test_learning_rates_that_were_not_searched_for_are_not_said_to_be_chosen(tmp_path: Path):
    file = evidence_file(tmp_path / "evidence.json")
    raw = json.loads(file.read_text())
    raw["rows"] = [row for row in raw["rows"] if row["phase"] != "search"]
    file.write_text(json.dumps(raw))
    assert "## Learning rates, given, not searched for" in report.main([str(file)])


def test_the_report_goes_between_the_markers_of_a_page(tmp_path: Path):
    page = tmp_path / "results.md"
    page.write_text("# Results\n\n<!-- report -->\nold\n<!-- end of report -->\n\nafter\n")
    file = evidence_file(tmp_path / "evidence.json")
    for _ in range(2):
        report.main([str(file), "--into", str(page), "--plots", str(tmp_path / "images")])
    text = page.read_text()
    assert text.count("![accuracy](images/accuracy.svg)") == 1
    assert text.startswith("# Results\n\n<!-- report -->\n\n25 runs")
    assert text.endswith("<!-- end of report -->\n\nafter\n")
    assert "\nold\n" not in text
    page.write_text("no markers")
    with pytest.raises(SystemExit, match="has no lines"):
        report.main([str(file), "--into", str(page)])


def test_folders_without_a_complete_run_are_an_error(tmp_path: Path):
    with pytest.raises(SystemExit, match="no complete run"):
        report.main([str(tmp_path)])
    with pytest.raises(SystemExit, match="does not exist"):
        report.main([str(tmp_path / "nowhere")])
