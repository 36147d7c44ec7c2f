"True tables are never flagged, damages are found, and so are the errors of five published reports."

from pathlib import Path

import numpy as np
import pytest
import yaml
from hypothesis import given, settings, strategies
from sklearn.metrics import (
    accuracy_score,
    balanced_accuracy_score,
    classification_report,
    cohen_kappa_score,
    confusion_matrix,
    matthews_corrcoef,
    precision_recall_fscore_support,
    roc_auc_score,
)

from course_ml.audit import (
    audit,
    average_findings,
    check_auc,
    exact_scores,
    harmonic_f1,
    p_value_bounds,
    possible_counts,
    two_class_matrices,
)
from course_ml.audit_bounds import coefficient_bounds
from course_ml.audit_layers import layer_parameters
from course_ml.audit_trials import (
    DAMAGES,
    PRINTED,
    ROUNDINGS,
    Design,
    flagged_count,
    is_flagged,
    print_share,
    random_design,
    random_matrix,
    true_record,
)
from course_ml.command_line import main
from course_ml.intervals import mcnemar_p_value
from course_ml.pasted_tables import read_pasted
from course_ml.printed_numbers import read_count, read_printed, read_share
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


@pytest.mark.parametrize("text", ["", "good", ".", "0.9.1", "9 T", "1e-4", "1,2,3", "12,34,567"])
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
    assert exact["kappa"] == pytest.approx(cohen_kappa_score(true, called))
    assert exact["MCC"] == pytest.approx(matthews_corrcoef(true, called))
    if matrix.sum(1).all():
        assert exact["balanced accuracy"] == pytest.approx(balanced_accuracy_score(true, called))
    oracle = precision_recall_fscore_support(true, called, labels=range(classes), zero_division=np.nan)
    for c in range(classes):
        for name, values in zip(names, oracle):
            assert np.isnan(exact[f"{name} of c{c}"]) or exact[f"{name} of c{c}"] == pytest.approx(values[c])
    for kind in ("macro", "weighted"):
        for name, value in zip(
            names, precision_recall_fscore_support(true, called, labels=range(classes), average=kind, zero_division=0)
        ):
            assert np.isnan(exact[f"{kind} {name}"]) or exact[f"{kind} {name}"] == pytest.approx(value)


@settings(deadline=None, max_examples=200)
@given(seed=seeds, digits=strategies.integers(2, 4), printed=strategies.sampled_from(PRINTED))
def test_true_tables_are_never_flagged(seed, digits, printed):
    random = np.random.default_rng(seed)
    design = random_design(random, printed, digits)
    record = true_record(random, design)
    found = audit(record)
    assert not found.verdict.isin(["impossible", "implausible"]).any(), (design, found.finding.tolist())
    parse_record(yaml.safe_dump(record))  # no true table is refused either


@given(strategies.floats(-1, 1), strategies.integers(2, 5), strategies.sampled_from(list(ROUNDINGS)))
def test_a_share_is_in_the_range_of_its_print_however_it_was_rounded(value, digits, rounding):
    for percent in ("", "%"):
        number = read_share(print_share(value, Design(digits=digits, rounding=rounding), percent), percent=False)
        assert (number.truncated() if rounding == "cut off" else number).contains(value)


def record_of_every_score(seed, classes, digits, percent, harmonic, with_matrix):
    "A record of a random classifier that prints all scores there are, and they are true."
    names = [f"class {c}" for c in range(classes)]
    matrix = random_matrix(np.random.default_rng(seed), classes)
    exact = {name: float(value) for name, value in exact_scores(matrix, names, names[0]).items()}
    if harmonic:
        exact["macro F1"] = harmonic_f1(exact["macro precision"], exact["macro recall"])
    alone = ("AUC", "kappa", "MCC")
    strings = {name: f"{100 * value:.{digits}f}" + (" %" if value < 0.02 else "") if percent and name not in alone
               else f"{value:.{digits + 2}f}" for name, value in exact.items() if not np.isnan(value)}
    per_class = {name: [*(strings.get(f"{column} of {name}", "-") for column in ("precision", "recall", "F1")),
                        str(int(exact[f"support of {name}"]))] for name in names}
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
    assert any(finding in words for words in impossible), impossible.tolist()


REFUSED = {
    "m: {scores: {accurazy: .9}}": "m: scores: unknown 'accurazy'; did you mean 'accuracy'?",
    "m: {scores: {mAP: .9}}": "m: scores: unknown 'mAP'; .* belongs under 'other'",
    "m: {scores: {accuracy of a: .9}}": "m: scores: unknown 'accuracy of a'",
    "m: {scores: {accuracy: 92.5, macro F1: 0.9}}": "'0.9' among percentages may be a share or not; write 0.9 % or",
    "m: {scores: {accuracy: .9, accuracy: .9}}": "'accuracy' is given twice",
    "m: {chosen on: tset}": "m: chosen on: unknown 'tset'; did you mean 'test'",
    "m: {uncertainty: over five seeds}": "m: uncertainty: 'over five seeds' does not say what ± means",
    "m: {runs: many}": "m: runs: 'many' is not a number",
    "m: {n: 1.5}": "m: n: '1.5' is not a number of images",
    "m: {classes: [a, b], positive: c}": "m: positive: unknown 'c'",
    "m: {classes: [a, a]}": "m: classes: a stands there twice",
    "m: {classes: a}": "m: classes: needs a list, not 'a'",
    "m: {matrix: [[1, 2], [3, 4]]}": "m: matrix: its classes are not named",
    "m: {classes: [a, b], per class: {a: [.9, .9, .9, few]}}": "m: per class: a: support: 'few' is not",
    "m: {parameters: {trained: 3}}": "m: parameters: unknown 'trained'",
    "m: {layers: [[conv 32, 896], [scores 10, 1290]]}": "m: layers: the input is missing",
    "m: {input: 32, layers: [[cnov 32, 896], [scores 10, 1290]]}": "m: layers.*cnov",
    "m: {multilabel: perhaps}": "m: multilabel: unknown 'perhaps'",
    "m: {scores: {Accuracy: .9}}": "m: scores: unknown 'Accuracy'; did you mean 'accuracy'?",
    "m: {scores: {macro-recall: .9}}": "did you mean 'macro recall'?",
    "m: {classes: [a, b], scores: {recall of c: .9}}": "m: scores: unknown 'c'",
    "m: {scores: .9}": "m: scores: needs names with values, not '.9'",
    "m: {classes: [a, b], matrix: [[9, x], [1, 9]]}": "matrix: row a: 'x' is not a number of images",
    "m: {classes: [a, b], errors: {false positives: some}}": "errors: false positives: 'some' is not a number",
    "m: {classes: [a, b], errors: {false positive: 3}}": "did you mean 'false positives'",
    "m: {classes: [a, b], per class: {c: [.9, .9, .9, 3]}}": "m: per class: unknown 'c'",
    "m: {scores: {accuracy: good}}": "m: scores: accuracy: 'good' is not a printed number",
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
    ("weights: total/count", "data: weights: unknown 'total/count'; did you mean 'total / count'"),
    ("stratified: maybe", "data: stratified: unknown 'maybe'"),
    ("split: {train: 80 %, test: 20 % of traim}", "data: split: test: unknown 'traim'; did you mean 'train'"),
    ("item: 12", "data: unknown 'item'; did you mean 'items'"),
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
    found = audit(parse_record("models: {m: {scores: {accuracy: .9}, other: {mAP: .8}}}"))
    assert found[found.verdict == "not checked"].finding.tolist() == ["no check knows mAP"]


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
    found = [finding[1] for finding in check_auc({"models": {"m": model}})]
    assert found == (["implausible"] if digits > 2 and "1.0" not in model["scores"]["AUC"] else [])


@pytest.mark.parametrize("damage, printed, digits, least", [
    ("last digit of a score, by 1", "table and matrix", 3, 0.8),
    ("last digit of a cell, by 1", "table and matrix", 3, 0.8),
    ("two rows of the table exchanged", "table and matrix", 3, 0.8),
    ("a cell of the matrix, by 1", "table and matrix", 3, 0.95),
    ("the matrix transposed", "table and matrix", 3, 0.95),
    ("last digit of a cell, by 1", "table", 4, 0.8),
    ("F1 of a class is its precision or recall", "table", 3, 0.8),
    ("accuracy of another model", "table", 3, 0.8),
    ("another n, by up to a tenth", "table", 2, 1),
    ("macro precision and recall exchanged", "table", 3, 0.6),
])  # fmt: skip
def test_damages_are_found(damage, printed, digits, least):
    assert set(DAMAGES) >= {damage}
    assert flagged_count(damage, printed, digits, tries=40, seed=5) >= 40 * least


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
    model = {"per class": {"a": [], "b": []}}
    assert list(average_findings(model, printed, {"a": 80, "b": 20})) == [
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


@given(seeds, strategies.integers(2, 8))
def test_bounds_of_kappa_and_mcc_contain_them(seed, classes):
    random = np.random.default_rng(seed)
    matrix = random_matrix(random, classes)
    true, predicted, exact = matrix.sum(1), matrix.sum(0), exact_scores(matrix, [str(c) for c in range(classes)])
    (less, more) = random.integers(0, 5, (2, classes))
    low, high = np.maximum(predicted - less, 0), predicted + more
    hits = int(matrix.trace())
    for score, (least, most) in coefficient_bounds(true, low, high, (max(hits - 2, 0), hits + 1)).items():
        assert np.isnan(exact[score]) or least - 1e-9 <= exact[score] <= most + 1e-9


@given(seeds, *[strategies.integers(2, 5)] * 2, strategies.booleans(), strategies.sampled_from([0, 1, None]))
def test_a_true_matrix_of_shares_is_never_flagged(seed, classes, digits, percent, axis):
    random, names = np.random.default_rng(seed), [f"c{c}" for c in range(classes)]
    matrix = random_matrix(random, classes)
    shares = matrix / np.maximum(matrix.sum(axis, keepdims=True), 1)
    cells = [[f"{100 * x:.{digits - 1}f} %" if percent else f"{x:.{digits}f}" for x in row] for row in shares]
    exact = exact_scores(matrix, names)
    names_of_scores = ["accuracy", "macro recall", "macro precision", "balanced accuracy", "macro F1", "recall of c0"]
    scores = {name: f"{exact[name]:.4f}" for name in names_of_scores if not np.isnan(exact[name])}
    model = {"n": str(matrix.sum()), "classes": names, "scores": scores, "matrix": cells}
    if matrix.sum(0).all() and matrix.sum(1).all():
        assert not is_flagged(parse_record(yaml.safe_dump({"models": {"m": model}})))
        table = {c: ["-", "-", "-", str(count)] for c, count in zip(names, matrix.sum(1))}
        assert not is_flagged(parse_record(yaml.safe_dump({"models": {"m": {**model, "per class": table}}})))


@pytest.mark.parametrize("model, finding", [
    ("matrix: [[.90, .10], [.40, .60]], scores: {accuracy: .95}", "accuracy .95; the shares of rows in the matrix"),
    ("matrix: [[.90, .20], [.40, .60]], scores: {}", "neither the rows nor the columns nor all cells"),
    ("matrix: [[90 %, 10 %], [40 %, 60 %]], scores: {recall of a: .80}", "recall of a .80; the shares of rows"),
    ("matrix: [[.90, .10], [.40, .60]], per class: {a: ['-', '-', '-', 200], b: ['-', '-', '-', 100]}, "
     "scores: {accuracy: .75}", "accuracy .75; the shares of rows in the matrix give 0.7"),
])  # fmt: skip
def test_a_matrix_of_shares_is_checked(model, finding):
    found = audit(parse_record(f"models: {{m: {{classes: [a, b], {model}}}}}"))
    assert any(finding in words for words in found[found.verdict == "impossible"].finding), found.finding.tolist()


@given(seeds, strategies.integers(1, 60))
def test_all_matrices_of_two_classes_contain_the_true_one(seed, n):
    random = np.random.default_rng(seed)
    true, called = random.integers(0, 2, (2, n))
    matrix = confusion_matrix(true, called, labels=[0, 1])
    exact = exact_scores(matrix, ["a", "b"], "a")
    known = [score for score in ("accuracy", "recall", "specificity") if not np.isnan(exact[score])]
    printed = {score: read_share(f"{exact[score]:.2f}") for score in known}
    found = two_class_matrices(printed, n)
    assert found is None or (found == matrix).all((1, 2)).any()


@pytest.mark.parametrize("scores, impossible", [
    ("accuracy: .920, sensitivity: .900, specificity: .925, precision: .750, F1: .818", False),  # 54, 6; 18, 222
    ("accuracy: .920, sensitivity: .900, specificity: .925, precision: .790, F1: .841", True),
    ("accuracy: .920, sensitivity: .900, specificity: .925, kappa: .90", True),
    ("accuracy: .920, sensitivity: .900, specificity: .925, MCC: .77", False),
    ("accuracy: .921", True),
])  # fmt: skip
def test_scores_of_two_classes_are_checked_without_a_matrix(scores, impossible):
    found = audit(parse_record(f"models: {{m: {{classes: [yes, no], positive: yes, n: 300, scores: {{{scores}}}}}}}"))
    assert (found.verdict == "impossible").any() == impossible, found.finding.tolist()


@settings(deadline=None)
@given(seeds, strategies.integers(2, 12), strategies.integers(2, 4), strategies.sampled_from([0, 1, np.nan]))
def test_a_report_of_scikit_learn_is_read_as_it_is_and_not_flagged(seed, classes, digits, undefined):
    random = np.random.default_rng(seed)
    true, called = random.integers(0, classes, (2, 60))
    called = np.where(random.random(60) < 0.7, true, called)
    names = [["red fox", "class 10", "3", "accuracy of 2", "very " * 12 + "long", "a.b"][c % 6] + " " * (c > 5) + str(c)
             for c in range(classes)]
    options = {"labels": range(classes), "target_names": names, "zero_division": undefined}
    report = classification_report(true, called, digits=digits, **options)
    model = read_pasted(f"{report}\n{confusion_matrix(true, called, labels=range(classes))}").record["models"]["table"]
    assert list(model["per class"]) == names and [row[3] for row in model["per class"].values()] == [
        str((true == c).sum()) for c in range(classes)]
    assert model["n"] == "60" and read_count(model["matrix"][0][0]) == ((true == 0) & (called == 0)).sum()
    assert not is_flagged({"data": {}, "models": {"table": model}})
    values = classification_report(true, called, output_dict=True, **options)
    assert read_pasted(repr(values)).record["models"]["table"]["classes"] == names


PASTED = {
    "avg / total": ("precision recall f1-score support\nclass 0 0.50 1.00 0.67 1\nclass 1 0.00 0.00 0.00 1\n"
                    "class 2 1.00 0.67 0.80 3\navg / total 0.70 0.60 0.61 5", "weighted F1", "0.61"),
    "Markdown": ("| Class | Precision | Recall | F1 | Support |\n|---|:-:|---|---|---|\n"
                 "| **cat** | 0.9 | 0.9 | 0.9 | 10 |\n"
                 "| dog | 0.9 | 0.9 | 0.9 | 10 |\n| macro avg | 0.9 | 0.9 | *0.9* | 20 |", "macro F1", "0.9"),
    "LaTeX": (r"\begin{tabular}{lrr} \toprule" "\n" r"Class & Prec. (\%) & Recall (\%) & Support \\ \midrule" "\n"
              r"cat & \textbf{92.5} & 90.0 & 1{,}970 \\" "\n" r"weighted avg & 92.5 & 90.0 & 1{,}970 \\ \bottomrule",
              "weighted recall", "90.0"),
    "CSV": ("class;precision;recall;support\nA;0,95;0,90;1.970\nweighted avg;0,95;0,90;1.970",
            "weighted recall", "0,90"),
    "Keras": ("63/63 [====] - 1s 5ms/step - loss: 0.4321 - accuracy: 0.8512", "accuracy", "0.8512"),
    "lines": ("Test accuracy: 92.5 %\nCohen's kappa = 0.85", "kappa", "0.85"),
}


@pytest.mark.parametrize("form", PASTED)
def test_tables_of_all_forms_are_read(form):
    text, score, value = PASTED[form]
    assert read_pasted(text).record["models"]["table"]["scores"][score] == value


@pytest.mark.parametrize("text, message", [
    ("", "no score was found"),
    ("name,precision,f1\nA,.9,.8\nB,.7,.6", None),
    ("x,precision,recall\nA,.9,.8\nB,.7,.6", "line 2: the rows may be classes or models; add --rows"),
    ("class,precision,recall\nA,.9,.8\nAverage,.9,.8", "line 3: nothing says what the average is; write 'macro avg'"),
    ("class,precision,recall\nA,.9,bad", "line 2: recall: 'bad' is not a printed number"),
    ("class,precision,recall\nA,.9,.8\nA,.7,.8", "line 3: class 'A' stands there twice"),
    ("class,precision,support\nA,.9,10.5", "line 2: support: '10.5' is not a number of images"),
    ("accuracy: .9\naccuracy: .8", "line 2: accuracy is .8 here and .9 before"),
    ("[[1 2]\n [3 4 5]]", "line 1: a confusion matrix has as many columns as rows"),
    ("[[1 2 ... 3]\n [3 4 ... 5]]", "line 1: NumPy left out cells"),
])  # fmt: skip
def test_what_can_be_read_in_two_ways_is_refused_by_line(text, message):
    if message is None:
        assert read_pasted(text).record
        return
    with pytest.raises(ValueError, match=message.replace("(", r"\(")):
        read_pasted(text)


def test_a_report_of_several_labels_is_not_taken_for_one_of_single_labels():
    random = np.random.default_rng(3)
    true = random.random((50, 3)) < 0.5
    report = classification_report(true, true ^ (random.random((50, 3)) < 0.2), zero_division=0)
    record = read_pasted(report).record
    assert record["models"]["table"]["multilabel"] == "yes" and not is_flagged(record)


def test_the_command_line_prints_findings_and_names_the_error(tmp_path, capsys):
    assert main(["audit", str(REPORTS / "cactus" / "published.yml")]) == 1
    captured = capsys.readouterr()
    assert "impossible:" in captured.out and "7 of the findings are impossible" in captured.err
    assert main(["audit", str(REPORTS / "leaves" / "published.yml")]) == 0
    (tmp_path / "record.yml").write_text("models: {CNN: {scores: {accuracy: high}}}")
    assert main(["audit", str(tmp_path / "record.yml")]) == 2
    assert "record.yml: models: CNN: scores: accuracy: 'high' is not a printed number" in capsys.readouterr().err
    assert main(["audit", str(tmp_path / "nowhere.yml")]) == 2


def test_the_command_line_shows_what_it_read_of_a_pasted_text(tmp_path, capsys):
    text = "class,precision,recall,f1,support\nA,.90,.80,.85,10\nB,.82,.90,.86,10\nmacro avg,.90,.85,.85,20\nTime: 3 s"
    (tmp_path / "table.csv").write_text(text, encoding="utf-8-sig")
    assert main(["audit", "--from", str(tmp_path / "table.csv")]) == 1
    printed = capsys.readouterr().out
    assert printed.index("What was read") < printed.index("line 5: Time: 3 s") < printed.index("impossible:")
    (tmp_path / "text.txt").write_text("no table at all")
    assert main(["audit", "--from", str(tmp_path / "text.txt")]) == 2
    assert "text.txt: no score was found" in capsys.readouterr().err
    assert main(["audit"]) == 2 and main(["audit", "--from", str(tmp_path / "nowhere.txt")]) == 2
    (tmp_path / "bytes.txt").write_bytes(b"\xff\xfe\x00")
    assert main(["audit", "--from", str(tmp_path / "bytes.txt")]) == 2


def test_a_record_without_yaml_is_named():
    with pytest.raises(ValueError, match="not YAML"):
        parse_record("models: [")
    with pytest.raises(ValueError, match="has no models"):
        parse_record("title: x")
