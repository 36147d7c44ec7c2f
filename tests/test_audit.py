"True tables are never flagged, damages are found, and so are the errors of five published reports."

from pathlib import Path

import numpy as np
import pytest
import yaml
from hypothesis import given, settings, strategies
from sklearn.metrics import accuracy_score, precision_recall_fscore_support, roc_auc_score

from course_ml.audit import (
    audit,
    check_auc,
    check_averages,
    exact_scores,
    harmonic_f1,
    p_value_bounds,
    possible_counts,
)
from course_ml.audit_layers import layer_parameters
from course_ml.audit_trials import DAMAGES, flagged_share, random_matrix, true_record
from course_ml.command_line import main
from course_ml.intervals import mcnemar_p_value
from course_ml.printed_numbers import read_printed
from course_ml.published_records import parse_record, read_record

REPORTS = Path(__file__).parents[1] / "reports"
seeds = strategies.integers(0, 10**9)


@given(value=strategies.floats(0, 1), digits=strategies.integers(1, 6))
def test_a_number_is_in_the_range_of_its_print(value, digits):
    assert read_printed(f"{value:.{digits}f}").contains(value)
    assert read_printed(f"{100 * value:.{digits}f} %").contains(value)


@given(n=strategies.integers(1, 5000), data=strategies.data(), digits=strategies.integers(1, 5))
def test_the_counts_of_a_share_are_all_that_round_to_it(n, data, digits):
    hits = data.draw(strategies.integers(0, n))
    counts = read_printed(f"{hits / n:.{digits}f}").counts(n)
    assert hits in counts and all(abs(k / n - hits / n) <= 1.01 * 10**-digits for k in (counts[0], counts[-1]))


@pytest.mark.parametrize("text", ["", "good", ".", "0.9.1", "9 T", "1e-4", "0,967", "96,7 %"])
def test_other_strings_than_printed_numbers_are_refused(text):
    with pytest.raises(ValueError, match="is not a printed number"):
        read_printed(text)


@given(seed=seeds)
def test_exact_scores_are_scikit_learns(seed):
    random = np.random.default_rng(seed)
    classes = random.integers(2, 6)
    true, called = random.integers(0, classes, (2, 80))
    matrix = np.zeros((classes, classes), int)
    np.add.at(matrix, (true, called), 1)
    exact, names = exact_scores(matrix, [f"c{c}" for c in range(classes)], "c1"), ("precision", "recall", "F1")
    assert exact["accuracy"] == pytest.approx(accuracy_score(true, called))
    oracle = precision_recall_fscore_support(true, called, labels=range(classes), zero_division=np.nan)
    for c in range(classes):
        for name, values in zip(names, oracle):
            assert np.isnan(exact[f"{name} of c{c}"]) or exact[f"{name} of c{c}"] == pytest.approx(values[c])
    for kind in ("macro", "weighted"):
        for name, value in zip(
            names, precision_recall_fscore_support(true, called, labels=range(classes), average=kind, zero_division=0)
        ):
            assert np.isnan(exact[f"{kind} {name}"]) or exact[f"{kind} {name}"] == pytest.approx(value)


@settings(deadline=None, max_examples=150)
@given(seed=seeds, digits=strategies.integers(2, 4), with_matrix=strategies.booleans())
def test_true_tables_are_never_flagged(seed, digits, with_matrix):
    found = audit(true_record(np.random.default_rng(seed), digits, with_matrix))
    assert not found.verdict.isin(["impossible", "implausible"]).any(), found.finding.tolist()


def record_of_every_score(seed, classes, digits, percent, harmonic, with_matrix):
    "A record of a random classifier that prints all scores there are, and they are true."
    names = [f"class {c}" for c in range(classes)]
    matrix = random_matrix(np.random.default_rng(seed), classes)
    exact = exact_scores(matrix, names, names[0])
    if harmonic:
        exact["macro F1"] = harmonic_f1(exact["macro precision"], exact["macro recall"])
    strings = {name: f"{100 * value:.{digits}f}" if percent else f"{value:.{digits + 2}f}"
               for name, value in exact.items() if not np.isnan(value)}
    per_class = {name: [*(strings.get(f"{column} of {name}", "-") for column in ("precision", "recall", "F1")),
                        str(exact[f"support of {name}"])] for name in names}
    scores = {name: string for name, string in strings.items() if name != "n" and not name.startswith("support")}
    model = {"split": "test", "n": str(matrix.sum()), "classes": names, "positive": names[0], "scores": scores,
             "per class": per_class}
    if with_matrix:
        model["matrix"] = [[f"{cell:,}" for cell in row] for row in matrix]
    return parse_record(yaml.safe_dump({"models": {"m": model}}))


@settings(deadline=None, max_examples=100)
@given(seeds, strategies.integers(2, 5), strategies.integers(1, 2), *[strategies.booleans()] * 3)
def test_all_true_scores_are_accepted_as_shares_and_percentages(seed, classes, digits, percent, harmonic, with_matrix):
    found = audit(record_of_every_score(seed, classes, digits, percent, harmonic, with_matrix))
    assert not found.verdict.isin(["impossible", "implausible", "not checked"]).any(), found.finding.tolist()


def test_the_definition_of_an_average_f1_is_named():
    for with_matrix in (False, True):
        found = audit(record_of_every_score(1, 4, 2, True, True, with_matrix))
        named = found[found.verdict == "not comparable"].finding
        assert sum("macro F1" in finding and "harmonic mean" in finding for finding in named) == 1
    assert not audit(record_of_every_score(1, 4, 2, True, False, True)).finding.str.contains("harmonic").any()


BINARY = "classes: [yes, no], positive: yes, n: 300"


@pytest.mark.parametrize("model, finding", [
    ("matrix: [[90, 10], [40, 160]], scores: {sensitivity: .80, specificity: .90}", "sensitivity .80 (0.9), specific"),
    ("matrix: [[90, 10], [40, 160]], scores: {balanced accuracy: .833}", "balanced accuracy .833 (0.85)"),
    ("scores: {accuracy: 95.5, sensitivity: 90.1, specificity: 92.5}", "accuracy 95.5; sensitivity 90.1 and"),
    ("scores: {balanced accuracy: .95, sensitivity: .90, specificity: .90}", "balanced accuracy .95; sensitivity"),
    ("scores: {recall: .92, sensitivity: .90}", "recall .92 and sensitivity .90 are the same number"),
    ("scores: {specificity: .92}, per class: {yes: ['-', .80, '-', 100], no: ['-', .90, '-', 200]}",
     "specificity .92 and recall of no .90 are the same number"),
])  # fmt: skip
def test_sensitivity_and_specificity_are_checked(model, finding):
    found = audit(parse_record(f"models: {{m: {{{BINARY}, {model}}}}}"))
    impossible = found[found.verdict == "impossible"].finding
    assert len(impossible) == 1 and finding in impossible.iloc[0], impossible.tolist()


REFUSED = {
    "m: {scores: {Accuracy: .9}}": "m: scores: unknown 'Accuracy'; did you mean 'accuracy'?",
    "m: {scores: {macro-recall: .9}}": "did you mean 'macro recall'?",
    "m: {classes: [a, b], scores: {recall of c: .9}}": "m: scores: unknown 'c'",
    "m: {scores: .9}": "m: scores: needs names with values, not '.9'",
    "m: {classes: [a, b], matrix: [[.98, .02], [.1, .9]]}": "matrix: '.98' is not a number of images.*multiplied",
    "m: {classes: [a, b], matrix: [[9 %, 1], [1, 9]]}": "matrix: '9 %' is not a number of images",
    "m: {classes: [a, b], errors: {false positives: some}}": "errors: false positives: 'some' is not a number",
    "m: {classes: [a, b], errors: {false positive: 3}}": "did you mean 'false positives'",
    "m: {classes: [a, b], per class: {c: [.9, .9, .9, 3]}}": "m: per class: unknown 'c'",
    "m: {scores: {accuracy: '0,967'}}": "'0,967' is not a printed number",
    "m: {members: [n]}": "m: members: unknown 'n'",
}


@pytest.mark.parametrize("models", REFUSED)
def test_what_cannot_be_read_is_refused_by_name(models):
    with pytest.raises(ValueError, match=REFUSED[models].replace("?", r"\?")):
        parse_record(f"models: {{{models}}}")


@pytest.mark.parametrize("data, message", [
    ("classes: many", "data: classes: 'many'"),
    ("counts: {a: 12, b: few}", "data: counts: b: 'few'"),
    ("split: {train: most}", "data: split: train: 'most'"),
    ("counts: {a: 1, b: 2}, weights: {a: .5, c: .5}", "data: weights: unknown 'c'"),
])
def test_data_that_cannot_be_read_are_refused_by_name(data, message):
    with pytest.raises(ValueError, match=message):
        parse_record(f"{{data: {{{data}}}, models: {{m: {{}}}}}}")


def test_thousands_separators_are_read():
    record = parse_record("""
        {data: {classes: "1,000"}, models: {m: {classes: [a, b], positive: b, n: "2,000", scores: {accuracy: 98.5},
         matrix: [["1,470", 10], [20, 500]], errors: {false positives: "10", false negatives: "1,020"}}}}""")
    found = audit(record)
    assert found[found.verdict == "impossible"].finding.tolist() == [
        "the text says 1020 false negatives (20), in parentheses what the matrix gives"]


def test_a_score_that_no_check_knows_is_listed():
    found = audit(parse_record("models: {m: {scores: {accuracy: .9, kappa: .8, top-5 accuracy: .99}}}"))
    assert found[found.verdict == "not checked"].finding.tolist() == ["no check knows kappa"]


@settings(deadline=None)
@given(seed=seeds, digits=strategies.integers(2, 4))
def test_a_true_area_under_the_curve_is_never_impossible(seed, digits):
    random = np.random.default_rng(seed)
    true = random.integers(0, 2, 60)
    if true.min() == true.max():
        return
    scores = random.normal(size=60) + random.uniform(0, 3) * true
    called = scores > random.normal()
    matrix = [[str(((true == t) & (called == c)).sum()) for c in (0, 1)] for t in (0, 1)]
    model = {
        "classes": ["no", "yes"],
        "positive": "yes",
        "matrix": matrix,
        "scores": {"AUC": f"{roc_auc_score(true, scores):.{digits}f}"},
    }
    assert not [finding for finding in check_auc({"models": {"m": model}}) if finding[1] == "impossible"]
    model["scores"]["AUC"] = f"{roc_auc_score(true, called):.{digits}f}"
    assert [finding[1] for finding in check_auc({"models": {"m": model}})] == ["implausible"]


@pytest.mark.parametrize(
    "damage, with_matrix, digits, least",
    [
        ("a score's last digit, by 1", True, 3, 0.95),
        ("a cell's last digit, by 1", True, 3, 0.95),
        ("two rows of the table exchanged", True, 3, 0.95),
        ("a cell of the matrix, by 1", True, 3, 0.95),
        ("the matrix transposed", True, 3, 0.95),
        ("a cell's last digit, by 1", False, 4, 0.9),
    ],
)
def test_damages_are_found(damage, with_matrix, digits, least):
    assert flagged_share(damage, digits, with_matrix, tries=60, seed=5) >= least
    assert set(DAMAGES) >= {damage}


def test_a_row_of_a_class_that_is_never_predicted_is_possible():
    for precision in ("0.00", "1.00"):  # zero_division of 0 and 1
        assert possible_counts(
            {"precision": read_printed(precision), "recall": read_printed("0.00"), "F1": read_printed("0.00")}, 20, 100
        )
    assert not possible_counts({"precision": read_printed("0.50"), "recall": read_printed("0.02")}, 20, 100)


@given(a=strategies.integers(0, 40), b=strategies.integers(0, 40), data=strategies.data())
def test_the_p_value_of_any_overlap_is_within_the_bounds(a, b, data):
    n = 100
    both = data.draw(strategies.integers(max(0, a + b - n), min(a, b)))
    low, high = p_value_bounds(range(a, a + 1), range(b, b + 1), n)
    assert low - 1e-9 <= mcnemar_p_value(a - both, b - both) <= high + 1e-9


def test_averages_of_weighted_rows():
    printed = {
        "recall of a": read_printed(".90"),
        "recall of b": read_printed(".50"),
        "weighted recall": read_printed(".82"),
        "macro recall": read_printed(".82"),
    }
    assert [finding[2] for finding in check_averages("m", printed, {"a": 80, "b": 20})] == [
        "macro recall .82; the rows give 0.6950 to 0.7050"
    ]


def test_layers_of_a_keras_network():
    assert layer_parameters(
        ["conv 32", "pool", "conv 64", "pool", "dropout 0.3", "flatten", "dense 256", "dropout 0.5"], 160, 10
    ) == [896, 0, 18_496, 0, 0, 0, 23_658_752, 0, 2_570]


FOUND = {
    "cactus": [
        ("ResNet-50", "impossible", "transposed, it gives all printed scores"),
        ("EfficientNet-B0", "impossible", "transposed, it gives all printed scores"),
        ("ResNet-50", "impossible", "41 false positives (46), 46 false negatives (41)"),
        ("EfficientNet-B0", "impossible", "0 false positives (9), 9 false negatives (0)"),
        ("ResNet-50", "impossible", "fit the counts of the data only with exchanged names"),
        ("data", "impossible", "class weights are inverse frequency"),
        ("ResNet-50", "implausible", "computed from labels"),
        ("EfficientNet-B0", "implausible", "computed from labels"),
        ("EfficientNet-B0 against ResNet-50", "comparison", "significant, whatever the overlap"),
        ("ResNet-50, EfficientNet-B0", "not reported", "no interval"),
    ],
    "leaves": [
        ("EfficientNet-B4 clean", "not comparable", "18,256 of the 18,353"),
        ("ensemble B4 and 50d, baseline", "implausible", "accuracy .9767 is below its member EfficientNet-B4 baseline"),
        ("ensemble B4, 50d and 200d, baseline", "implausible", "is below its member"),
        ("ensemble B4 and 50d, clean", "implausible", "to the digit that of its member"),
        ("", "comparison", "within noise"),
        ("", "not reported", "±0.002"),
    ],
    "nature10": [
        ("baseline CNN", "impossible", "input of 128x128; they have them at 158 to 161"),
        ("CNN with dropout and augmentation", "impossible", "they have them at 158 to 161"),
        ("ResNet-50 transfer", "impossible", "not 23.851 M"),
        ("baseline CNN against CNN with dropout", "comparison", "undecided"),
        ("baseline CNN", "not comparable", "chosen and scored on the same"),
    ],
    "blood_cells": [
        ("MobileNetV3Small", "not reported", "what ± means"),
        ("ConvNeXtXLarge, cleaned initial set", "not reported", "held out of training; they are 50%"),
        ("data", "implausible", "number of classes"),
    ],
    "rare_species": [
        ("data", "impossible", "leaves +10%"),
        ("table", "not reported", "202 of them"),
        ("EfficientNetB0", "not reported", "how many runs"),
    ],
}


@pytest.mark.parametrize("study", FOUND)
def test_the_errors_of_the_published_reports_are_found(study):
    found = audit(read_record(REPORTS / study / "published.yml"))
    for where, verdict, words in FOUND[study]:
        assert any(
            where in row.where and row.verdict == verdict and words in row.finding for row in found.itertuples()
        ), (where, verdict, words, found.to_dict("records"))


def test_consistent_tables_of_the_published_reports_are_not_flagged():
    found = audit(read_record(REPORTS / "blood_cells" / "published.yml"))
    assert not (found.verdict == "impossible").any()


def test_the_command_line_prints_findings_and_names_the_error(tmp_path, capsys):
    assert main(["audit", str(REPORTS / "cactus" / "published.yml")]) == 0
    assert "impossible:" in capsys.readouterr().out
    (tmp_path / "record.yml").write_text("models: {CNN: {scores: {accuracy: high}}}")
    assert main(["audit", str(tmp_path / "record.yml")]) == 2
    assert "record.yml: models: CNN: accuracy: 'high' is not a printed number" in capsys.readouterr().err
    assert main(["audit", str(tmp_path / "nowhere.yml")]) == 2


def test_a_record_without_yaml_is_named():
    with pytest.raises(ValueError, match="not YAML"):
        parse_record("models: [")
    with pytest.raises(ValueError, match="has no models"):
        parse_record("title: x")
