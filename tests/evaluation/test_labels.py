"""Classes of data and model are the same by name, never by place."""

import json

import pytest

from polyscale.evaluation.labels import match_labels, read_label_map


PETS = {0: "owl", 1: "cat", 2: "dog"}
NAMELESS = {0: "LABEL_0", 1: "LABEL_1", 2: "LABEL_2"}


def test_names_are_matched_exactly_then_without_case():
    assert match_labels(["cat", "dog", "owl"], PETS) == [1, 2, 0]
    assert match_labels(["Cat", "DOG"], PETS) == [1, 2]
    assert match_labels(["a", "A"], {0: "A", 1: "a"}) == [1, 0]
    assert match_labels(["cat"], {"0": "owl", "1": "cat"}) == [1]  # keys as JSON has them


def test_integers_stand_for_themselves_where_one_side_has_no_names():
    assert match_labels(None, PETS, num_classes=3) == [0, 1, 2]
    assert match_labels(["0", "1", "2"], PETS) == [0, 1, 2]
    assert match_labels(["0", "10", "2"], {index: f"LABEL_{index}" for index in range(11)}) == [0, 10, 2]
    assert match_labels(["cat", "dog", "owl"], NAMELESS) == [0, 1, 2]
    assert match_labels(["7", "5"], {0: "5", 1: "7"}) == [1, 0]  # digits that are names on both sides


@pytest.mark.parametrize(
    ("names", "id2label"),
    [
        (["cat", "dog", "fish"], PETS),  # partial overlap
        (["a", "b"], PETS),
        (["cat", "3"], PETS),
        (["A"], {0: "a", 1: "á"} | {2: "a "} | {3: "b", 4: "B"} | {0: "x"}),
        (["b "], {0: "b", 1: "B"}),
        (["aa"], {0: "aA", 1: "Aa"}),  # two that differ in case alone
        (["0", "1", "2", "3"], PETS),
    ],
)
def test_classes_without_a_counterpart_are_listed_with_both_sides(names, id2label):
    with pytest.raises(ValueError, match=r"Classes of the data: .*Of the model: .*`label_map`"):
        match_labels(names, id2label)


def test_another_number_of_classes_without_names_is_refused():
    with pytest.raises(ValueError, match=r"2 classes \('dog', 'owl'\) and the model 3 without names"):
        match_labels(["dog", "owl"], NAMELESS)


def test_two_classes_that_are_one_in_the_model_need_a_map():
    with pytest.raises(ValueError, match="'cat', 'Cat' are one class"):
        match_labels(["cat", "Cat"], PETS)
    assert match_labels(["cat", "Cat"], PETS, {"Cat": "cat"}) == [1, 1]


def test_a_map_overrides_names():
    assert match_labels(["cat", "hound", "owl"], PETS, {"hound": "dog", "owl": 1}) == [1, 2, 1]
    assert match_labels(["dog", "owl"], NAMELESS, {"dog": "LABEL_1", "owl": "2"}) == [1, 2]
    with pytest.raises(ValueError, match="'bird', which is no class of the data: 'cat'"):
        match_labels(["cat"], PETS, {"bird": "owl"})
    with pytest.raises(ValueError, match="'fish', which is no class of the model: 'owl', 'cat', 'dog'"):
        match_labels(["cat"], PETS, {"cat": "fish"})


def test_a_map_is_read_from_words_and_files(tmp_path):
    (tmp_path / "map.json").write_text(json.dumps({"tabby": "cat", "hound": 2}))
    assert read_label_map([str(tmp_path / "map.json"), "bird=owl"]) == {"tabby": "cat", "hound": "2", "bird": "owl"}
    assert read_label_map(None) == {}
    (tmp_path / "list.json").write_text("[1]")
    with pytest.raises(ValueError, match="must hold a JSON object, got a list"):
        read_label_map([str(tmp_path / "list.json")])
    with pytest.raises(ValueError, match="must be NAME=NAME or a JSON file"):
        read_label_map(["nonsense"])


def test_a_name_that_two_classes_of_a_model_have_says_nothing():
    cranes = {0: "crane", 1: "dog", 2: "crane"}
    with pytest.raises(ValueError, match=r"'crane'. The model has several called 'crane'. Classes of the data"):
        match_labels(["crane", "dog"], cranes)
    assert match_labels(["crane", "dog"], cranes, {"crane": 2}) == [2, 1]
    with pytest.raises(ValueError, match="maps 'crane' to 'crane', which is no class of the model: 'dog'"):
        match_labels(["crane", "dog"], cranes, {"crane": "crane"})


def test_accents_may_be_encoded_otherwise():
    assert match_labels(["cafe\u0301", "the"], {0: "the", 1: "caf\u00e9"}) == [1, 0]


@pytest.mark.parametrize("label_map", [["cat"], "cat=dog", 5])
def test_a_map_that_is_none(label_map):
    with pytest.raises(ValueError, match="`label_map` must be a dict"):
        match_labels(["cat"], PETS, label_map)
