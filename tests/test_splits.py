"""Splits are even, never separate a group, and use what came with the data; near duplicates are found and counted."""

import warnings
from argparse import Namespace
from dataclasses import asdict, replace

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings, strategies
from PIL import Image
from sklearn.model_selection import StratifiedGroupKFold, StratifiedKFold

from course_ml import splitting
from course_ml.crossval import write_submission
from course_ml.data import Dataset, Split
from course_ml.data_commands import check_command, training_data
from course_ml.duplicates import duplicate_pairs, linked_groups, linking_pairs, near_pairs
from course_ml.launching import train_from_command_line
from course_ml.readers import read_dataset
from course_ml.reading import Reading, ReadOptions
from course_ml.splitting import assign_groups, torn_groups

HOLDOUT = [0.7, 0.15, 0.15]


def table_of(labels, assigned, sets):
    "Images of each class (rows) in each set (columns)."
    table = np.zeros((labels.max() + 1, sets))
    np.add.at(table, (labels, assigned), 1)
    return table


def unevenness(labels, assigned, shares):
    "How far class shares and sizes are from what they should be: root mean squares, of the classes their mean."
    table = table_of(labels, assigned, len(shares))
    of_classes = np.sqrt(((table / table.sum(1, keepdims=True) - shares) ** 2).mean(1)).mean()
    return np.array([of_classes, np.sqrt(((table.sum(0) / table.sum() - shares) ** 2).mean())])


def design(seed, least):
    "Random labels and groups; a class has `least` groups or more, twice as many where groups have several classes."
    rng = np.random.default_rng(seed)
    count, mean = rng.integers(20, 200), rng.choice([1, 1.2, 2, 5])
    groups = np.repeat(np.arange(count), rng.geometric(1 / mean, count))
    rarity = rng.dirichlet(np.full(rng.integers(2, 30), rng.choice([0.5, 2, 50])))
    pure = rng.random() < 0.6
    labels = rng.choice(len(rarity), count if pure else len(groups), p=rarity)
    labels = labels[groups] if pure else labels
    frequent = pd.Series(groups).groupby(labels).transform("nunique") >= least * (1 if pure else 2)
    if not frequent.any():
        return design(seed + 1000, least)
    return np.unique(labels[frequent], return_inverse=True)[1], groups[frequent]


def of_design(labels, groups):
    return Dataset.from_arrays("design", np.zeros((len(labels), 1, 1), "uint8"), labels, groups=groups)


def numbers(split):
    "The number of each image's set, in the order train, validation, test, or of its fold."
    names = ["train", "validation", "test"] if split.k == 1 else [f"fold {fold}" for fold in range(split.k)]
    return np.array([names.index(name) for name in split.splits])


def by_scikit_learn(labels, groups, k, seed):
    "The number of each image's fold."
    single = len(set(groups)) == len(groups)
    kind, own = (StratifiedKFold, None) if single else (StratifiedGroupKFold, groups)
    folds = np.zeros(len(labels), int)
    with warnings.catch_warnings(action="ignore"):  # of classes with fewer images than folds
        for fold, (_, rows) in enumerate(kind(k, shuffle=True, random_state=seed).split(labels, labels, own)):
            folds[rows] = fold
    return folds


@pytest.mark.parametrize("seed", range(0, 200, 20))
def test_folds_are_as_even_as_scikit_learns(seed):
    for number in range(seed, seed + 20):
        k = [3, 5, 10][number % 3]
        labels, groups = design(number, least=k)
        ours = numbers(Split.kfold(of_design(labels, groups), k, number))
        theirs = by_scikit_learn(labels, groups, k, number)
        assert not torn_groups(ours, groups).any()
        if (table_of(labels, theirs, k) > 0).all():
            assert (unevenness(labels, ours, [1 / k] * k) <= unevenness(labels, theirs, [1 / k] * k) + 1e-9).all()


@pytest.mark.parametrize("seed", range(0, 200, 20))
def test_holdouts_are_as_even_as_twenty_of_scikit_learns_folds_but_for_one_image(seed):
    "14, 3 and 3 of 20 folds are 70, 15 and 15 %."
    for number in range(seed, seed + 20):
        labels, groups = design(number, least=3)
        ours = numbers(Split.holdout(of_design(labels, groups), seed=number))
        assert not torn_groups(ours, groups).any()
        if len(set(groups)) < 20 or np.bincount(labels).max() < 20:
            continue
        theirs = np.repeat([0, 1, 2], [14, 3, 3])[by_scikit_learn(labels, groups, 20, number)]
        if (table_of(labels, theirs, 3) > 0).all():
            assert (unevenness(labels, ours, HOLDOUT) <= unevenness(labels, theirs, HOLDOUT) + 1 / len(labels)).all()


cases = strategies.lists(
    strategies.tuples(strategies.integers(0, 3), strategies.integers(0, 40)), min_size=1, max_size=200
)


@settings(deadline=None)
@given(cases, strategies.integers(2, 5), strategies.integers(0, 5))
def test_groups_are_never_split(rows, sets, seed):
    labels, groups = np.array([r[0] for r in rows]), np.array([r[1] for r in rows])
    assigned = assign_groups(labels, groups, [1 / sets] * sets, seed)
    assert pd.Series(assigned).groupby(groups).nunique().max() == 1


def test_80_20_of_the_nature10_study():
    labels = np.repeat(np.arange(10), [1000] * 2 + [1010] + [1000] * 7)
    assigned = assign_groups(labels, np.arange(10_010), [0.8, 0.2], 0)
    assert np.bincount(labels[assigned == 1]).tolist() == [200, 200, 202] + [200] * 7


def without_groups(counts):
    "A data set with so many images of each class."
    labels = np.repeat(np.arange(len(counts)), counts)
    return Dataset.from_arrays("single", np.zeros((len(labels), 1, 1), "uint8"), labels)


def test_remainders_go_to_different_splits():
    tens, sevens = without_groups([10] * 100), without_groups([7] * 100)
    assert np.abs(Split.holdout(tens).counts(tens).sum() - [700, 150, 150]).max() <= 1
    assert np.abs(Split.kfold(sevens, 5).counts(sevens).sum() - 140).max() <= 1


@settings(deadline=None)
@given(strategies.lists(strategies.integers(3, 60), min_size=2, max_size=30), strategies.integers(0, 100))
def test_single_images_are_split_to_one_image_in_each_class_and_to_two_in_all(counts, seed):
    dataset = without_groups(counts)
    table = Split.holdout(dataset, seed=seed).counts(dataset)
    small = np.array(counts) < 7  # of which 15 % are less than one image, and every split gets one
    fair = np.outer(counts, HOLDOUT)
    assert table.min(axis=None) >= 1
    assert (np.abs(table - fair)[~small] < 1 + 1e-9).all(axis=None)
    if not small.any():
        assert np.abs(table.sum() - fair.sum(0)).max() <= 2


@pytest.mark.parametrize("images, sizes", [(3, [1, 1, 1]), (4, [2, 1, 1])])
def test_a_thousand_small_classes_have_an_image_in_each_split(images, sizes):
    dataset = without_groups([images] * 1000)
    assert (Split.holdout(dataset).counts(dataset) == sizes).all(axis=None)


def test_classes_that_are_too_small_are_named_with_their_numbers():
    with pytest.raises(ValueError, match="'0' has 2, '2' has 1. Add images, or leave the class out"):
        Split.holdout(without_groups([2, 3, 1, 3]))
    with pytest.raises(ValueError, match="'0' has 2, '2' has 1. Add images$"):  # one class would be left
        Split.holdout(without_groups([2, 3, 1]))
    with pytest.raises(ValueError, match="'9' has 2, and 990 more classes have too few"):
        Split.holdout(without_groups([2] * 1000))


@pytest.mark.parametrize("shares", [HOLDOUT, [0.2] * 5])
def test_a_seed_gives_one_split(shares):
    labels, groups = design(4, least=5)
    first, again, other = (assign_groups(labels, groups, shares, seed) for seed in (0, 0, 1))
    assert (first == again).all() and (first != other).any()


def test_tables_that_are_too_large_for_scikit_learn_are_split_as_evenly(monkeypatch):
    labels, groups = design(4, least=5)
    theirs = assign_groups(labels, groups, [0.2] * 5, 0)
    monkeypatch.setattr(splitting, "LARGEST_TABLE", 0)
    ours = assign_groups(labels, groups, [0.2] * 5, 0)
    assert not torn_groups(ours, groups).any() and (ours != theirs).any()
    assert (unevenness(labels, ours, [0.2] * 5) <= unevenness(labels, theirs, [0.2] * 5) + 1 / len(labels)).all()


# Splits that came with the data


def with_split(*names, groups=None, labels=None, **metadata):
    "A data set whose image i came in the i-th split."
    columns = pd.DataFrame({"split": names, **metadata})
    labels = np.arange(len(names)) % 2 if labels is None else labels
    return Dataset.from_arrays("given", np.zeros((len(names), 4, 4), "uint8"), labels, groups=groups, metadata=columns)


def test_a_complete_split_is_used_as_it_came():
    dataset = with_split(*["Train"] * 4, *["valid"] * 2, *["Testing"] * 2)
    split = Split.of(dataset)
    assert split.splits == ["train"] * 4 + ["validation"] * 2 + ["test"] * 2
    assert split.how == "the split that came with the data" and split.remarks(dataset) == []


@pytest.mark.parametrize("came, cut", [("test", "validation"), ("validation", "test")])
def test_what_is_missing_is_cut_from_the_training_set(came, cut):
    dataset = with_split(*["train"] * 170, *[came] * 20)
    split = Split.of(dataset)
    assert list(split.rows(came)) == list(range(170, 190))
    assert split.counts(dataset).sum().to_dict() == {"train": 140, cut: 30, came: 20}
    assert split.how == f"{came} came with the data; train is split into 82% train, 18% {cut}, seed 0"


def test_folds_leave_a_given_test_set_alone():
    dataset = with_split(*["train"] * 30, *["val"] * 10, *["test"] * 10)
    split = Split.of(dataset, k=4)
    assert split.k == 4 and list(split.rows("test")) == list(range(40, 50))
    assert split.counts(dataset).sum().to_dict() == {f"fold {i}": 10 for i in range(4)} | {"test": 10}
    assert split.how == "test came with the data; train and validation is split into 4 folds, seed 0"
    assert not set(split.rows("train", 2)) & set(split.rows("test"))


def test_without_a_split_one_is_made():
    alone, all_train = without_groups([20, 20]), with_split(*["train"] * 40, labels=np.repeat([0, 1], 20))
    assert Split.of(alone, seed=3).hash == Split.holdout(alone, seed=3).hash
    assert Split.of(all_train).splits == Split.holdout(all_train).splits
    assert Split.of(alone, k=5).hash == Split.kfold(alone, 5).hash


def test_splits_that_cannot_be_used_are_refused_by_name():
    with pytest.raises(ValueError, match="the split 'later' of '000001' is none of train, validation, test"):
        Split.of(with_split("train", "later"))
    with pytest.raises(ValueError, match="no training images"):
        Split.of(with_split("test", "validation"))
    with pytest.raises(ValueError, match="2 splits need at least 2 images .*'1' has 1"):
        Split.of(with_split("train", "train", "train", "test", labels=[0, 0, 1, 0]))


def test_classes_in_one_split_only_are_reported():
    labels = [0, 1, 2, 0, 1, 0, 1, 3]
    dataset = with_split("train", "train", "train", "val", "val", "test", "test", "test", labels=labels)
    assert Split.of(dataset).remarks(dataset) == [
        "train has no image of '3'",
        "validation has no image of '2', '3'",
        "test has no image of '2'",
    ]


def test_groups_that_a_given_split_separates_are_counted_and_the_rest_stays_together():
    names = ["train"] * 80 + ["test"] * 20
    groups = [f"leaf {i // 2 % 40}" for i in range(100)]  # 10 leaves of the test set have two more images in train
    dataset = with_split(*names, groups=groups, labels=np.zeros(100, int))
    split = Split.of(dataset)
    assert split.remarks(dataset) == [
        "10 of 40 groups are in more than one split (40 images), so scores may be too high"]
    assert not torn_groups(np.array(split.splits)[:80], groups[:80]).any()
    with pytest.raises(ValueError, match=r"the group 'leaf 0' would be split over test, train, and 9 more groups"):
        Split.from_split(dataset)


def test_offered_columns_that_a_split_separates_are_counted():
    lesions = pd.DataFrame({"lesion": [f"{i // 2}" if i < 60 else "" for i in range(80)]})
    dataset = Dataset.from_arrays("offered", np.zeros((80, 4, 4), "uint8"), np.arange(80) // 2 % 2, metadata=lesions)
    dataset = replace(dataset, reading=Reading().offer("lesion"))
    split = Split.of(dataset)
    torn = pd.Series(split.splits)[:60].groupby(lesions.lesion[:60]).nunique() > 1
    assert split.remarks(dataset) == [
        f"{torn.sum()} of 30 values of lesion are in more than one split ({2 * torn.sum()} images), so scores may be "
        "too high; group_column='lesion' keeps them together"]


# Every path uses the split that came with the data


@pytest.fixture
def published(tmp_path):
    "A folder with train/ and test/, two classes, and a training image that is in the test set too."
    for name, images in {"train": 20, "test": 6}.items():
        for label in ("cat", "dog"):
            (tmp_path / name / label).mkdir(parents=True)
            for i in range(images):
                draw(seed_of(name, label, i)).save(tmp_path / name / label / f"{name}_{i}.png")
    (tmp_path / "test" / "cat" / "again.png").write_bytes((tmp_path / "train" / "cat" / "train_0.png").read_bytes())
    return tmp_path


def options(**own):
    "The options of a command, those of reading empty."
    return Namespace(**asdict(ReadOptions()), group_duplicates="none", **own)


def seed_of(name, label, i):
    return 1000 * len(name) + 100 * (label == "cat") + i


def draw(seed):
    coarse = np.random.default_rng(seed).integers(0, 256, (8, 8, 3), dtype="uint8")
    return Image.fromarray(coarse).resize((32, 32), Image.Resampling.BICUBIC)


def test_train_keeps_the_given_test_set(published):
    for fold in ("", "1/3"):
        dataset, split, _ = training_data(options(data=str(published), fold=fold))
        assert sorted(dataset.items.id.iloc[split.rows("test")]) == sorted(i for i in dataset.items.id if i[:5] == "test/")
        assert len(split.rows("test")) == 13 and "test came with the data" in split.how


def test_the_launcher_keeps_the_given_test_set(published, tmp_path, monkeypatch):
    used = []

    def stop(recipe, dataset, split, *rest):
        used.append((split.how, len(split.rows("test"))))
        raise InterruptedError

    monkeypatch.setattr("course_ml.launching.train_recipe", stop)
    (tmp_path / "recipe.yml").write_text("image_size: 16")
    with pytest.raises(InterruptedError):
        train_from_command_line([str(tmp_path / "recipe.yml"), "--data-path", str(published)])
    assert used == [("test came with the data; train is split into 82% train, 18% validation, seed 0", 13)]


def test_check_says_how_many_duplicates_a_split_separates(published, capsys):
    check_command(options(path=str(published)))
    text = capsys.readouterr().out
    assert "Split: test came with the data; train is split into 82% train, 18% validation, seed 0" in text
    assert "1 of 1 groups of duplicates are in more than one split (2 images)" in text


def test_duplicates_stay_together_when_asked(tmp_path):
    for label in ("cat", "dog"):
        (tmp_path / label).mkdir()
        for i in range(10):
            image = draw(seed_of("own", label, i))
            image.save(tmp_path / label / f"{i}.png")
            image.save(tmp_path / label / f"{i} again.jpg", quality=95)
    dataset = read_dataset(tmp_path)
    duplicates = dataset.check().duplicates
    assert len(duplicates) == 20 and set(duplicates.kind) == {"near"}
    careless = Split.of(dataset)
    advice = "group_duplicates='near' keeps them together"
    assert [advice in sentence for sentence in careless.remarks(dataset, duplicates)] == [True]
    assert dataset.group_duplicates(duplicates, "exact").fingerprint == dataset.fingerprint
    grouped = dataset.group_duplicates(duplicates, "near")
    assert Split.of(grouped).remarks(grouped, duplicates) == []
    with pytest.raises(ValueError, match="group_duplicates: 'all' is none of none, exact, near"):
        dataset.group_duplicates(duplicates, "all")


# Near duplicates

hashes = strategies.lists(strategies.integers(0, 2**64 - 1), min_size=1, max_size=20)
flips = strategies.lists(strategies.tuples(strategies.integers(0, 19), strategies.sets(strategies.integers(0, 63),
                                                                                      max_size=7)), max_size=20)


@settings(deadline=None)
@given(hashes, flips, strategies.integers(0, 8))
def test_near_pairs_link_what_the_plain_double_loop_links(values, flips, distance):
    values = values + [values[i % len(values)] ^ sum(1 << bit for bit in bits) for i, bits in flips]
    count = len(values)
    plain = [(i, j) for j in range(count) for i in range(j) if (values[i] ^ values[j]).bit_count() <= distance]
    pairs = near_pairs(np.array(values, "uint64"), distance)
    expected = linked_groups(count, [i for i, _ in plain], [j for _, j in plain])
    assert (linked_groups(count, pairs[:, 0], pairs[:, 1]) == expected).all()
    assert len(pairs) == count - len(set(expected))
    assert [(values[i] ^ values[j]).bit_count() for i, j, _ in pairs.tolist()] == pairs[:, 2].tolist()
    assert (pairs[:, 0] < pairs[:, 1]).all() and {(i, j) for i, j, _ in pairs.tolist()} <= set(plain)


def test_pairs_of_blank_tiles_stay_few():
    rng = np.random.default_rng(0)
    nearly_blank = np.uint64(1) << rng.integers(0, 64, 3000).astype("uint64")  # two of them differ in two bits at most
    assert len(near_pairs(np.zeros(3000, "uint64"), 4)) == len(near_pairs(nearly_blank, 4)) == 2999


def test_thinning_out_in_batches_changes_nothing(monkeypatch):
    bits = np.random.default_rng(0).integers(0, 2**12, 300).astype("uint64")
    at_once = near_pairs(bits, 2)
    monkeypatch.setattr("course_ml.duplicates.BATCH", 10)
    assert (linked_groups(300, *near_pairs(bits, 2)[:, :2].T) == linked_groups(300, *at_once[:, :2].T)).all()
    assert len(near_pairs(bits, 2)) == len(at_once)


def test_linking_pairs_are_the_nearest():
    rng = np.random.default_rng(0)
    every = np.array([[i, j, rng.integers(0, 9)] for j in range(12) for i in range(j)])
    linking = linking_pairs(12, np.concatenate([every, every]))
    assert len(linking) == 11
    for distance in range(9):  # also the nearest pairs alone link the same
        near, linked = every[every[:, 2] <= distance], linking[linking[:, 2] <= distance]
        assert (linked_groups(12, *near[:, :2].T) == linked_groups(12, *linked[:, :2].T)).all()


def test_exact_duplicates_are_linked_as_such():
    bits, digests = np.array([0, 1, 0, 2**40 - 1, 1], "uint64"), np.array(list("abaxb"))
    pairs, exact = duplicate_pairs(bits, digests, 4)
    assert pairs.tolist() == [[0, 1, 1], [0, 2, 0], [1, 4, 0]] and exact.tolist() == [False, True, True]


# Submissions


def test_a_submission_of_many_ids_is_complete_and_in_order():
    ids = [f"{i:06d}" for i in range(50_000)]
    table = write_submission(None, ids[::-1], list(range(50_000)), ids)
    assert table.id.tolist() == ids and table.label.tolist() == list(range(50_000))[::-1]
