"""Metrics of tasks: hand cases, other libraries' values, the official scripts' rules, and the form of evaluate."""

import evaluate
import numpy as np
import pytest
import sklearn.metrics
from scipy.stats import rankdata

from helpers.fresh_process import run_fresh
from hf_pretrain.errors import InputError
from hf_pretrain.tasks import metrics

# The example of seqeval's page.
TRUE = [["O", "O", "O", "B-MISC", "I-MISC", "I-MISC", "O"], ["B-PER", "I-PER", "O"]]
GUESSED = [["O", "O", "B-MISC", "I-MISC", "I-MISC", "I-MISC", "O"], ["B-PER", "I-PER", "O"]]


class TestClassesAndValues:
    def test_a_table_by_hand(self):
        """Of six, four are right; class one: 2 hits, 3 guesses, 3 truths. (2·2 - 1·1) / sqrt(3·3·3·3) = 1/3."""
        guessed, true = [1, 1, 1, 0, 0, 0], [1, 1, 0, 0, 0, 1]
        assert metrics.accuracy(guessed, true) == pytest.approx(4 / 6)
        assert metrics.f1(guessed, true) == pytest.approx(4 / 6)
        assert metrics.matthews(guessed, true) == pytest.approx(1 / 3)
        assert metrics.f1([0, 1, 1, 1], [0, 0, 0, 1]) == pytest.approx(0.5)
        assert metrics.f1([0, 1, 1, 1], [0, 0, 0, 1], positive=0) == pytest.approx(0.5)
        assert metrics.f1([0, 0, 1], [0, 1, 1], positive=0) == pytest.approx(2 / 3)

    def test_they_are_scikit_learns(self):
        generator = np.random.default_rng(0)
        for classes in (2, 4):
            guessed, true = generator.integers(0, classes, (2, 80))
            assert metrics.accuracy(guessed, true) == pytest.approx(sklearn.metrics.accuracy_score(true, guessed))
            assert metrics.macro_f1(guessed, true) == pytest.approx(
                sklearn.metrics.f1_score(true, guessed, average="macro")
            )
            for positive in range(classes):
                expected = sklearn.metrics.f1_score(true == positive, guessed == positive)
                assert metrics.f1(guessed, true, positive=positive) == pytest.approx(expected)
        # Precision and recall differ, so that exchanged arguments show.
        assert metrics.macro_f1([0, 0, 0], [0, 1, 2]) == pytest.approx(0.5 / 3)

    def test_correlations_by_their_definition(self):
        generator = np.random.default_rng(1)
        guessed, true = generator.normal(size=30), np.round(generator.normal(size=30))
        assert metrics.pearson(guessed, true) == pytest.approx(np.corrcoef(guessed, true)[0, 1])
        ranks = rankdata(guessed), rankdata(true)
        assert metrics.spearman(guessed, true) == pytest.approx(np.corrcoef(*ranks)[0, 1])
        assert metrics.spearman(np.exp(guessed), guessed) == pytest.approx(1.0)
        assert metrics.pearson(np.exp(guessed * 2), guessed) < 0.99

    @pytest.mark.parametrize("name", ["pearson", "spearman", "matthews", "f1"])
    def test_what_is_undefined_is_zero(self, name, recwarn):
        assert getattr(metrics, name)([0, 0, 0], [0, 0, 0]) == 0.0
        assert getattr(metrics, name)([], []) == 0.0
        assert not recwarn.list

    def test_unequal_lengths_are_refused(self):
        with pytest.raises(InputError, match="predictions and references: 2 and 1 values"):
            metrics.accuracy([1, 1], [1])
        with pytest.raises(InputError, match="1 and 2 tags in sentence 0"):
            metrics.entity_f1([["O"]], [["O", "O"]])


def conll_entities(tags):
    """The rules of CoNLL's official scorer, as a table of where an entity ends and begins between two tags."""
    found, begin = [], None
    before, kind_before = "O", ""
    for index, tag in enumerate([*tags, "O"]):
        prefix, _, kind = tag.partition("-")
        kind = kind or "_"
        changes = kind != kind_before
        ends = before in "ES" or (before in "BI" and prefix in "BSO") or (before != "O" and changes)
        begins = prefix in "BS" or (before in "ESO" and prefix in "EI") or (prefix != "O" and changes)
        if begin is not None and ends:
            found.append((kind_before, begin, index))
            begin = None
        if begins:
            begin = index
        before, kind_before = prefix, kind
    return found


class TestEntities:
    def test_the_example_of_seqeval(self):
        assert metrics.entity_scores(GUESSED, TRUE) == {
            "entity_precision": 0.5,
            "entity_recall": 0.5,
            "entity_f1": 0.5,
        }

    @pytest.mark.parametrize(
        ("tags", "expected"),
        [
            ("B-A I-A O B-B", [("A", 0, 2), ("B", 3, 4)]),
            ("B-A B-A", [("A", 0, 1), ("A", 1, 2)]),
            ("I-A I-A O I-B", [("A", 0, 2), ("B", 3, 4)]),
            ("B-A I-B I-B", [("A", 0, 1), ("B", 1, 3)]),
            ("S-A B-A I-A E-A E-A S-B", [("A", 0, 1), ("A", 1, 4), ("A", 4, 5), ("B", 5, 6)]),
            ("B-A E-A I-A", [("A", 0, 2), ("A", 2, 3)]),
            ("B I O B", [("_", 0, 2), ("_", 3, 4)]),
            ("B-NP-SBJ I-NP-SBJ", [("NP-SBJ", 0, 2)]),
            ("O O", []),
            ("", []),
        ],
    )
    def test_they_are_read_from_tags_by_hand(self, tags, expected):
        assert metrics.entities(tags.split()) == expected

    def test_they_are_the_official_scorers_on_any_tags(self):
        generator = np.random.default_rng(0)
        names = ["O", *(f"{prefix}-{kind}" for prefix in "BIES" for kind in "AB")]
        seen = 0
        for _ in range(500):
            tags = [names[i] for i in generator.integers(0, len(names), generator.integers(0, 12))]
            assert metrics.entities(tags) == conll_entities(tags)
            seen += len(metrics.entities(tags))
        assert seen > 500

    def test_an_entity_has_to_be_right_from_end_to_end(self):
        scores = metrics.entity_scores([["B-A", "O", "B-A", "B-B"]], [["B-A", "I-A", "B-B", "B-B"]])
        assert scores == {
            "entity_precision": pytest.approx(1 / 3),
            "entity_recall": pytest.approx(1 / 3),
            "entity_f1": pytest.approx(1 / 3),
        }
        assert metrics.entity_scores([["B-A", "O"]], [["B-A", "B-A"]])["entity_precision"] == 1.0
        assert metrics.entity_scores([["B-A", "O"]], [["B-A", "B-A"]])["entity_recall"] == 0.5

    def test_other_tags_are_refused(self):
        with pytest.raises(InputError, match="tag='PER' is no tag of entities"):
            metrics.entities(["O", "PER"])
        assert metrics.are_entity_tags(["O", "B-PER", "I-PER"])
        assert not metrics.are_entity_tags(["NOUN", "O"]) and not metrics.are_entity_tags(["B-PER", "I-PER"])


class TestAnswers:
    @pytest.mark.parametrize(
        ("text", "expected"),
        [
            ("The Quick,  brown-fox!", "quick brownfox"),
            ("an apple a day", "apple day"),
            ("Another theatre", "another theatre"),
            ("A.", ""),
            ("the U.S.A.", "usa"),
            ("$1,000", "1000"),
            ("“quoted” – text", "“quoted” – text"),
            ("a_b an'the", "ab anthe"),
            ("\tTabs\n and lines ", "tabs and lines"),
        ],
    )
    def test_english_is_normalised_as_the_official_script_does(self, text, expected):
        assert metrics.normalised_answer(text) == expected

    def test_other_languages_keep_their_words(self):
        """German "an" is a preposition, French "a" a verb."""
        assert metrics.normalised_answer("An der „Elbe“!", language="de") == "an der elbe"
        assert metrics.normalised_answer("il y a", language="fr") == "il y a"
        assert metrics.normalised_answer("北京。", language="zh") == "北京"

    @pytest.mark.parametrize(
        ("guess", "answers", "exact", "f1"),
        [
            ("the cat", ["Cat."], 1.0, 1.0),
            ("black cat", ["a cat", "the dog"], 0.0, 2 / 3),
            ("cat cat", ["cat"], 0.0, 2 / 3),
            ("cat", ["dog", "cat"], 1.0, 1.0),
            ("bird", ["dog"], 0.0, 0.0),
            ("", [], 1.0, 1.0),
            ("cat", [], 0.0, 0.0),
            ("", ["cat"], 0.0, 0.0),
            ("the", ["a"], 1.0, 1.0),
            # A right answer of articles alone does not count beside another.
            ("", ["the", "cat"], 0.0, 0.0),
        ],
    )
    def test_by_hand(self, guess, answers, exact, f1):
        assert metrics.answer_exact_match(guess, answers) == exact
        assert metrics.answer_f1(guess, answers) == pytest.approx(f1)

    def test_of_many_it_is_the_mean(self):
        scores = metrics.squad_scores(["the cat", "black cat", "x"], [["cat"], ["cat"], []])
        assert scores == {"exact_match": pytest.approx(1 / 3), "f1": pytest.approx((1 + 2 / 3) / 3)}
        assert metrics.squad_scores(["die Katze"], [["the die Katze"]], language="de")["exact_match"] == 0.0


class TestEvaluate:
    @pytest.mark.parametrize("name", ["accuracy", "f1", "macro_f1", "matthews", "pearson", "spearman"])
    def test_it_has_the_plain_value_in_one_call_and_in_batches(self, name, tmp_path):
        """The mean over batches would be another number."""
        guessed, true = np.random.default_rng(3).integers(0, 2, (2, 30))
        expected = {name: pytest.approx(getattr(metrics, name)(guessed, true))}
        metric = metrics.as_evaluate_metric(name, cache_dir=str(tmp_path))
        assert isinstance(metric, evaluate.Metric)
        assert metric.compute(predictions=guessed, references=true) == expected
        for part in (slice(0, 7), slice(7, 30)):
            metric.add_batch(predictions=guessed[part], references=true[part])
        assert metric.compute() == expected

    def test_of_tags_and_of_answers(self, tmp_path):
        tags = metrics.as_evaluate_metric("entity_f1", cache_dir=str(tmp_path))
        assert tags.compute(predictions=GUESSED, references=TRUE) == {"entity_f1": 0.5}
        squad = metrics.as_evaluate_metric("squad", cache_dir=str(tmp_path))
        pair = ["the cat", "x"], [["a cat", "dog"], []]
        assert squad.compute(predictions=pair[0], references=pair[1]) == metrics.squad_scores(*pair)

    def test_an_unknown_one_is_refused(self):
        with pytest.raises(InputError, match="name='acuracy'.*did you mean 'accuracy'"):
            metrics.as_evaluate_metric("acuracy")

    def test_only_this_imports_evaluate(self, tmp_path):
        program = (
            "import sys\nimport hf_pretrain.tasks.spec, hf_pretrain.evaluation.metrics\n"
            "print('evaluate' in sys.modules)\n"
            "from hf_pretrain.tasks.metrics import as_evaluate_metric\n"
            "as_evaluate_metric('accuracy')\nprint('evaluate' in sys.modules)"
        )
        assert run_fresh({"import": program}, tmp_path)["import"].split() == ["False", "True"]
