"""Every kind of model × every measure: a number that is right, or a refusal by name before anything is computed."""

import itertools
import json
import math
import re

import numpy as np
import peft
import pytest
import torch
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
)

from helpers.evaluated_models import (
    KINDS,
    elmo,
    elmo_tokenizer,
    save_kind,
    saved,
    static_vectors,
    tiny_tokenizer,
    write_tasks,
)
from hf_pretrain import (
    EncoderForSequenceClassification,
    EvaluatedModel,
    InputError,
    LikelihoodScorer,
    LoadedTask,
    MeasureOptions,
    PretrainedFeatures,
    denoising_log_likelihoods,
    encode,
    find_tasks,
    measure_task,
    probe_accuracy,
    pseudo_log_likelihoods,
    rolling_perplexity,
    score_options,
    score_permutations,
    score_texts,
)
from hf_pretrain.cli import main
from hf_pretrain.evaluation.probes import probe_predictions
from hf_pretrain.transfer.tuning.fine_tune import head_scores

pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")

TASK_OF = {"probe": "SST-2", "similarity": "stsb", "pairs": "blimp", "words": "wordsim", "likelihood": "first"}
TASK_OF |= {"head": "SST-2", "finetune": "SST-2"}
NO_TEXT_SCORE = "does not score text: name a checkpoint with a language-modelling head"
NO_HEAD = "has no head of a task .*: name a model that was fine-tuned"
# Measure -> kind -> why it is refused. What is not here has a number.
REFUSED = {
    "pairs": dict.fromkeys(
        ("encoder", "t5 encoder", "elmo characters", "sentence", "classifier", "architecture", "multitask"),
        NO_TEXT_SCORE,
    )
    | dict.fromkeys(("static", "vec", "txt", "bin", "classifier adapter"), NO_TEXT_SCORE),
    "head": dict.fromkeys([kind for kind in KINDS if kind not in ("classifier", "architecture")], NO_HEAD)
    | dict.fromkeys(("static", "vec", "txt", "bin"), "has one vector a word: give an encoder")
    | dict.fromkeys(("adapter", "classifier adapter"), "is an adapter alone: merge it"),
    "finetune": dict.fromkeys(("static", "vec", "txt", "bin"), "has one vector a word: give an encoder")
    | dict.fromkeys(("adapter", "classifier adapter"), "is an adapter alone: merge it"),
}
REFUSED["likelihood"] = REFUSED["pairs"] | {
    "electra": "is of the kind discriminator, which does not score one text after another",
    "electric": "is of the kind energy, which does not score one text after another",
}
MEASURED = ("probe", "similarity", "pairs", "words", "likelihood")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_tasks(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Kind -> name of its checkpoint, made at the first use."""
    folder, known = tmp_path_factory.mktemp("models"), {}

    def name_of(kind):
        return known[kind] if kind in known else known.setdefault(kind, save_kind(kind, folder))

    return name_of


def loaded(data, how, **options):
    name = f"{data / 'tasks.yaml'}:first" if how == "likelihood" else TASK_OF[how]
    (task,) = find_tasks([name], data_dir=data)
    return LoadedTask(task, MeasureOptions(**options))


@pytest.mark.parametrize("kind", KINDS)
def test_a_number_or_a_refusal(kind, data, models):
    """The whole row of a kind; the numbers themselves are compared below."""
    model = EvaluatedModel(models(kind))
    for how in (*MEASURED, "head", "finetune"):
        task, why = loaded(data, how), REFUSED.get(how, {}).get(kind)
        if why is not None:
            with pytest.raises(InputError, match=why) as caught:
                model.check(how, task=task.task.name)
            assert f"model={models(kind)!r} cannot be measured on {task.task.name!r} by how={how!r}" in str(
                caught.value
            )
            continue
        model.check(how, task=task.task.name)
        if how in MEASURED:
            model.open([how])
            evaluation = measure_task(model, task, how)
            value = next(iter(evaluation.metrics.values()))
            assert math.isfinite(value) and evaluation.num_examples >= 20, how
        elif how == "head":
            assert 0 <= head_scores(models(kind), task.data)["accuracy"] <= 1


@pytest.mark.parametrize(
    "kind", ["static", "vec", "adapter", "electric", "classifier adapter", "elmo characters", "sentence"]
)
def test_the_command_refuses_before_anything_is_computed(kind, data, models, tmp_path, capsys):
    out = ["--data_dir", str(data), "--output_file", str(tmp_path / "out.json")]
    for how in ("pairs", "likelihood", "head"):
        why = REFUSED[how].get(kind)
        if why is None:
            continue
        # What could be measured stands first: nothing of it is computed either.
        task = f"{data / 'tasks.yaml'}:first" if how == "likelihood" else TASK_OF[how]
        hows = ["--how", "words", how]
        assert main(["evaluate", models(kind), "--tasks", "wordsim", task, *hows, *out]) == 2
        shown = capsys.readouterr()
        assert re.search(why, shown.err), shown.err
        assert " by " not in shown.out and not (tmp_path / "out.json").exists()


TEXTS = ["w1 w2 w3 w4", "w9 w8 w7 w30 w31", "w5", "w1 w2 w3 w5"]


def mean_of_both(model, tokenizer, text):
    """ELMo's score of a text by its logits: each word from the left and from the right, special tokens not scored."""
    batch = tokenizer(text, return_tensors="pt")
    with torch.no_grad():
        found = model(**batch)
    ids, last = batch["input_ids"][0], len(batch["input_ids"][0]) - 1
    left = sum(float(found.forward_logits[0, i - 1].double().log_softmax(-1)[ids[i]]) for i in range(1, last))
    right = sum(float(found.backward_logits[0, i + 1].double().log_softmax(-1)[ids[i]]) for i in range(1, last))
    return left, right


def by_hand(kind, name, tokenizer):
    """The scores of texts without the suite."""
    if kind == "elmo":
        return [sum(mean_of_both(elmo(), tokenizer, text)) / 2 for text in TEXTS]
    if kind in ("bart", "t5"):
        model = AutoModelForSeq2SeqLM.from_pretrained(name).eval()
        return denoising_log_likelihoods(model, tokenizer, TEXTS, within_word="l2r")
    if kind == "xlnet":
        model = AutoModelForCausalLM.from_pretrained(name).eval()
        return [score.log_likelihood for score in score_permutations(model, tokenizer, TEXTS)]
    if kind == "electric":
        from transformers import ElectraForPreTraining

        return score_texts(ElectraForPreTraining.from_pretrained(name).eval(), tokenizer, TEXTS)
    assert kind == "adapter"
    base = AutoModelForMaskedLM.from_pretrained(f"{name}-base")
    adapted = peft.PeftModel.from_pretrained(base, name).eval()
    return pseudo_log_likelihoods(adapted.get_base_model(), tokenizer, TEXTS, within_word="l2r")


@pytest.mark.parametrize("kind", ["elmo", "bart", "t5", "xlnet", "electric", "adapter"])
def test_the_score_of_a_text_is_that_of_the_kind(kind, models):
    model = EvaluatedModel(models(kind), batch_size=3)
    expected = np.array(by_hand(kind, models(kind), model.tokenizer))
    np.testing.assert_allclose(model.language_model.score(TEXTS), expected, rtol=1e-4, atol=1e-5)
    assert len(set(np.round(expected, 5))) == len(TEXTS)


class TestElmo:
    def test_directions_are_weighed_alike_and_unknown_words_are_read_by_their_characters(self, models):
        model, tokenizer = elmo(), elmo_tokenizer()
        scorer = LikelihoodScorer(model, tokenizer, batch_size=2)
        assert scorer.kind == "bidirectional"
        texts = ["w1 zebra w3", "w1 horse w3", "w1 w2 w3"]
        expected = [sum(mean_of_both(model, tokenizer, text)) / 2 for text in texts]
        found = scorer.score([("", text) for text in texts])
        np.testing.assert_allclose(found.log_likelihoods, expected, rtol=1e-5)
        # Both are unknown, and not the same.
        assert abs(expected[0] - expected[1]) > 1e-3
        left, right = mean_of_both(model, tokenizer, texts[0])
        assert abs(left - right) > 1e-2
        # Behind a context, its words are read too.
        behind = scorer.score([("w1 zebra", " w3"), ("w1 horse", " w3")]).log_likelihoods
        assert abs(behind[0] - behind[1]) > 1e-4
        whole = rolling_perplexity(model, tokenizer, texts[0], window=20)
        assert whole.nats == pytest.approx(-expected[0], rel=1e-5)

    def test_options_are_scored_in_both_directions(self):
        found = score_options(elmo(), elmo_tokenizer(), ["w1 zebra"], [["w2", "w3", "w4 w5"]], unconditional=None)
        scorer = LikelihoodScorer(elmo(), elmo_tokenizer())
        sums = scorer.score([("w1 zebra", f" {option}") for option in ("w2", "w3", "w4 w5")])
        np.testing.assert_allclose(found["sum"][0], sums.log_likelihoods, rtol=1e-5)

    def test_another_kind_is_refused(self):
        with pytest.raises(
            InputError, match="kind='masked' does not fit ElmoForPreTraining, which has two directions"
        ):
            LikelihoodScorer(elmo(), elmo_tokenizer(), kind="masked")

    def test_a_probe_reads_the_characters_of_unknown_words_and_begins_each_text_anew(self, models):
        model = EvaluatedModel(models("elmo characters"), batch_size=1)
        texts = ["zebra horse", "cat", "horse zebra", "cat"]
        vectors = model.features(texts)
        np.testing.assert_allclose(vectors[1], vectors[3], atol=1e-6)
        tokenizer = AutoTokenizer.from_pretrained(models("elmo characters"))
        bare = AutoModel.from_pretrained(models("elmo characters")).eval()
        bare.config.stateful = False
        for text, vector in zip(texts, vectors, strict=True):
            with torch.no_grad():
                states = bare(**tokenizer(text, return_tensors="pt")).last_hidden_state[0]
            np.testing.assert_allclose(vector, states.mean(0).numpy(), atol=1e-5)
        assert np.abs(vectors[0] - vectors[1]).max() > 1e-2

    def test_kept_features_tell_unknown_words_apart(self, models, tmp_path):
        texts = ["zebra", "horse"]
        kept = PretrainedFeatures(models("elmo"), cache_dir=str(tmp_path / "kept"), pooling="mean").fit(texts)
        first, again = kept.transform(texts), kept.transform(texts)
        assert np.abs(first[0] - first[1]).max() > 1e-2
        np.testing.assert_array_equal(first, again)


def probe_of(vectors_of, data):
    """The accuracy of a probe on vectors that a function makes of texts."""
    task = loaded(data, "probe").data
    texts = {split: vectors_of(task.texts(split)) for split in ("train", "validation")}
    return probe_accuracy(
        texts["train"], task.targets("train"), texts["validation"], task.targets("validation")
    ).accuracy


class TestVectors:
    def test_a_sentence_model_has_its_own_pooling_and_length(self, data, models):
        name = models("sentence")
        bare, tokenizer = AutoModel.from_pretrained(name).eval(), tiny_tokenizer()

        def own(texts):
            with torch.no_grad():
                states = bare(**tokenizer(list(texts), padding=True, return_tensors="pt")).last_hidden_state
            return torch.nn.functional.normalize(states[:, 0], dim=-1).numpy()

        model = EvaluatedModel(name)
        texts = ["w1 w2", "w3 w4 w5"]
        np.testing.assert_allclose(model.features(texts), own(texts), atol=1e-5)
        evaluation = measure_task(model, loaded(data, "probe"), "probe")
        assert evaluation.metrics["accuracy"] == pytest.approx(probe_of(own, data), abs=1e-6)
        assert "frozen cls-pooled states, of length one" in evaluation.method
        # The same of words alone, and of pairs.
        vectors, how = model.word_vectors(["w3", "w4", "w3"])
        np.testing.assert_allclose(vectors.vectors, own(["w3", "w4"]), atol=1e-5)
        assert vectors.words == ("w3", "w4") and "cls-pooled" in how
        first, second = own(["w1 w2"])[0], own(["w3"])[0]
        pair = model.features([("w1 w2", "w3")])
        np.testing.assert_allclose(pair[0], [*abs(first - second), *(first * second)], atol=1e-5)
        evaluation = measure_task(model, loaded(data, "similarity"), "probe")
        assert "difference and product of both texts'" in evaluation.method

    @pytest.mark.parametrize("kind", ["static", "vec", "txt", "bin"])
    def test_static_vectors_are_the_mean_of_the_words(self, kind, data, models):
        table = static_vectors()

        def own(texts):
            return np.stack([np.mean([table.vector(word) for word in text.split()], axis=0) for text in texts])

        model = EvaluatedModel(models(kind))
        texts = ["w1 w2", "w3 w4 w4"]
        np.testing.assert_allclose(model.features(texts), own(texts), atol=1e-5)
        evaluation = measure_task(model, loaded(data, "probe"), "probe")
        assert evaluation.metrics["accuracy"] == pytest.approx(probe_of(own, data), abs=1e-6)
        assert "mean of static word vectors" in evaluation.method

    def test_an_encoder_reads_a_pair_together(self, data, models):
        model, task = EvaluatedModel(models("masked")), loaded(data, "similarity")
        evaluation = measure_task(model, task, "probe")
        states = {
            split: encode(model.encoder, tiny_tokenizer(), task.data.texts(split)) for split in ("train", "validation")
        }
        predicted, _ = probe_predictions(
            states["train"], task.data.targets("train"), states["validation"], kind="regression", seed=0
        )
        expected = task.data.score("validation", predicted)
        assert evaluation.metrics["spearmanr"] == pytest.approx(expected["spearman"], abs=1e-6)
        assert "both texts read together" in evaluation.method

    @pytest.mark.parametrize("kind", ["bart", "t5", "t5 encoder", "architecture", "classifier adapter"])
    def test_the_encoder_is_the_part_that_reads(self, kind, data, models):
        name, tokenizer = models(kind), EvaluatedModel(models(kind)).tokenizer
        if kind == "architecture":
            bare = EncoderForSequenceClassification.from_pretrained(name).eval().encoder
        elif kind == "classifier adapter":
            head = AutoModelForSequenceClassification.from_pretrained(f"{name}-base", num_labels=3)
            bare = peft.PeftModel.from_pretrained(head, name).eval().get_base_model().bert
        elif kind == "t5 encoder":
            from transformers import T5EncoderModel

            bare = T5EncoderModel.from_pretrained(name).eval()
        else:
            bare = AutoModel.from_pretrained(name).eval().get_encoder()
        texts = ["w1 w2", "w3 w4 w5 w6"]
        for text, vector in zip(texts, EvaluatedModel(name).features(texts), strict=True):
            with torch.no_grad():
                states = bare(input_ids=tokenizer(text, return_tensors="pt")["input_ids"]).last_hidden_state[0]
            np.testing.assert_allclose(vector, states.mean(0).numpy(), atol=1e-4)

    def test_an_adapter_changes_what_the_model_below_it_says(self, models):
        name = models("adapter")
        texts = ["w1 w2", "w3 w4 w5 w6"]
        assert (
            np.abs(EvaluatedModel(name).features(texts) - EvaluatedModel(f"{name}-base").features(texts)).max() > 0.01
        )
        model = EvaluatedModel(name)
        assert model.fingerprint and model.fingerprint != EvaluatedModel(f"{name}-base").fingerprint


class TestHead:
    def test_its_score_is_that_of_the_logits(self, data, models):
        task = loaded(data, "head").data
        for kind in ("classifier", "architecture"):
            model = AutoModelForSequenceClassification.from_pretrained(models(kind)).eval()
            with torch.no_grad():
                batch = tiny_tokenizer()(task.texts("validation"), padding=True, return_tensors="pt")
                logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
            expected = float(np.mean(logits.argmax(-1).numpy() == task.targets("validation")))
            assert head_scores(models(kind), task, batch_size=7)["accuracy"] == pytest.approx(expected), kind

    def test_the_head_of_other_labels_is_refused(self, data, models, tmp_path, capsys):
        out = ["--data_dir", str(data), "--output_file", str(tmp_path / "out.json")]
        assert main(["evaluate", models("classifier"), "--tasks", "topics", "--how", "head", *out]) == 2
        shown = capsys.readouterr()
        assert "of 0, 1, and the task has moon, star, sun" in shown.err and " by " not in shown.out

    def test_the_command_measures_it(self, data, models, tmp_path, capsys):
        out = ["--data_dir", str(data), "--output_file", str(tmp_path / "out.json")]
        assert main(["evaluate", models("classifier"), "--tasks", "SST-2", "--how", "head", *out]) == 0
        assert "SST-2, head" in capsys.readouterr().out


@pytest.mark.parametrize("kind", ["masked", "causal", "bart", "electra", "elmo", "architecture", "multitask"])
def test_kinds_are_fine_tuned(kind, data, models, tmp_path):
    out = ["--data_dir", str(data), "--output_file", str(tmp_path / "out.json")]
    options = ["--how", "finetune", "--num_train_epochs", "0.1"]
    assert main(["evaluate", models(kind), "--tasks", "SST-2", *options, *out]) == 0
    # Rates by layer need layers in one list.
    found = json.loads((tmp_path / "out.json").read_text(encoding="utf-8"))
    assert ("fine-tuned (full)" in json.dumps(found)) == (kind in ("bart", "elmo"))


class TestNames:
    def test_a_revision_is_refused_with_the_way_on(self):
        with pytest.raises(InputError, match="hf download me/bert --revision main --local-dir FOLDER"):
            EvaluatedModel("me/bert@main").check("probe", task="SST-2")

    def test_a_folder_may_have_the_sign_of_a_revision(self, tmp_path, models):
        folder = saved(AutoModel.from_pretrained(models("encoder")), tmp_path / "a@b")
        EvaluatedModel(str(folder)).check("probe", task="SST-2")

    def test_an_adapter_that_does_not_fit_is_refused(self, models, tmp_path):
        import shutil

        shutil.copytree(models("adapter"), tmp_path / "adapter")
        path = tmp_path / "adapter" / "adapter_config.json"
        path.write_text(path.read_text().replace(f"{models('adapter')}-base", models("causal")))
        with pytest.raises(InputError, match="adapter"):
            _ = EvaluatedModel(str(tmp_path / "adapter")).encoder
        path.write_text(
            re.sub(r'"base_model_name_or_path": "[^"]*"', '"base_model_name_or_path": null', path.read_text())
        )
        with pytest.raises(InputError, match="names no model below it"):
            EvaluatedModel(str(tmp_path / "adapter")).check("probe", task="SST-2")

    def test_untrained_weights_need_an_architecture(self, models):
        for kind, how in itertools.product(("adapter", "vec", "static"), ("probe", "words")):
            with pytest.raises(InputError, match="leave untrained out"):
                EvaluatedModel(models(kind), untrained=True).check(how, task="SST-2")
