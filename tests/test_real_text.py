"""Every method learns from real text: better than its trivial baseline, on documents it has not seen."""

import math
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
from transformers import AutoModel, AutoTokenizer, set_seed

from helpers.method_matrix import EXAMPLE, NO_DROPOUT, programs
from hf_pretrain import SentenceModules, cli, retrieval_recall, text_vectors
from hf_pretrain.data.prepare import DataArguments, prepare_data
from hf_pretrain.data.text.docstrings import docstring_documents
from hf_pretrain.training.parsing import parse_arguments

SIZES = {
    "hidden_size": 128,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 512,
    "max_position_embeddings": 64,
    "config_overrides": NO_DROPOUT,
}
EXAMPLE_RECIPE = str(Path(__file__).parents[1] / "examples" / "token_deletion" / "token_deletion.yaml")
# With fewer steps, a model of some seeds still predicts only the frequencies of words.
STEPS = {"mlm": 1200, "rtd": 2600}


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    # These numbers of steps belong to this tokenizer; `auto` would choose bytes and keep the case.
    tokenizer = {"tokenizer_type": "wordpiece", "lowercase": True, "vocab_size": 4096}
    options = DataArguments(
        demo_corpus=True, max_corpus_bytes=6_000_000, block_size=64, validation_fraction=0.03, **tokenizer
    )
    return prepare_data(options, seed=0, output_dir=tmp_path_factory.mktemp("text"))


def unigram_loss(text):
    """Nats a token of the held-out text under the frequencies of the training text, one added to each count."""
    counts, held_out = (
        np.bincount(part.store.read(0, part.store.num_tokens)[0], minlength=len(text.tokenizer))
        for part in (text.train_dataset, text.eval_dataset)
    )
    log_p = np.log((counts + 1) / (counts + 1).sum())
    return float(-(held_out * log_p).sum() / held_out.sum())


@pytest.mark.slow
@pytest.mark.parametrize("method", sorted(STEPS))
def test_held_out_text_is_better_predicted_than_by_the_baseline(method, text, tmp_path):
    program = programs()[method]
    _, model_class, args_class = program.arguments
    options = {"generator_layers": 0.34} if method == "rtd" else {}
    args = args_class(
        output_dir=str(tmp_path),
        per_device_train_batch_size=16,
        per_device_eval_batch_size=64,
        max_steps=STEPS[method],
        warmup_steps=200,
        learning_rate=5e-4,
        logging_steps=500,
        save_strategy="no",
        eval_on_start=False,
        disable_tqdm=True,
    )
    set_seed(0)
    trainer = program.build_trainer(text, model_class(**SIZES, **options), args)
    before = trainer.evaluate()
    assert before["eval_mlm_loss"] == pytest.approx(math.log(len(text.tokenizer)), rel=0.01)
    trainer.train()
    after = trainer.evaluate()
    assert after["eval_mlm_loss"] < unigram_loss(text) - 0.3
    if method == "rtd":
        # Below the entropy of the labels: the loss of a model that knows only the share of replaced tokens. Two million tokens
        # are few for a discriminator: on two samples of docstrings the gain came to 0.020 and 0.028.
        assert after["eval_disc_gain"] > 0.01
        assert after["eval_disc_auc"] > before["eval_disc_auc"] + 0.02


@pytest.mark.slow
def test_missing_tokens_are_found_better_than_by_their_share(tmp_path):
    """The method of the example package, with its recipe, on docstrings."""
    recipe = [EXAMPLE_RECIPE, "--max_corpus_bytes", "400000", "--max_steps", "1000"]
    recipe += ["--demo_corpus", "true", "--disable_tqdm", "true", "--output_dir", str(tmp_path), "--use_cpu", "true"]
    options = parse_arguments(EXAMPLE.arguments, ["--config", *recipe], prog="token-deletion", description="")
    data = prepare_data(options[0], seed=0, output_dir=tmp_path)
    set_seed(0)
    trainer = EXAMPLE.build_trainer(data, *options[1:])
    before = trainer.evaluate()
    trainer.train()
    after = trainer.evaluate()
    assert before["eval_deletion_auc"] == pytest.approx(0.5, abs=0.05)
    assert after["eval_deletion_auc"] > 0.6
    examples = [trainer.eval_dataset[i] for i in range(len(trainer.eval_dataset))]
    labels = trainer.data_collator(examples)["labels"]
    share = float((labels == 1).sum() / (labels >= 0).sum())
    guess = -share * math.log(share) - (1 - share) * math.log(1 - share)
    assert after["eval_deletion_loss"] < guess - 0.03


@pytest.mark.slow
def test_a_contrast_makes_vectors_that_find_the_rest_of_a_text(tmp_path):
    """Vectors of a masked language model, and those of the same model after a contrast of sentences with what is around them."""
    documents = list(islice(docstring_documents(seed=1), 1600))
    train, held_out = documents[:-400], documents[-400:]
    # A blank line ends a document, and docstrings have some.
    text = "\n\n".join(" ".join(document.split()) for document in train)
    (tmp_path / "train.txt").write_text(text, encoding="utf-8")
    begun, contrasted = str(tmp_path / "begun"), str(tmp_path / "contrasted")
    shared = ["--train_file", str(tmp_path / "train.txt"), *"--validation_fraction 0 --block_size 64".split()]
    shared += "--save_strategy no --eval_strategy no --use_cpu true --disable_tqdm true".split()
    sizes = "--hidden_size 128 --num_hidden_layers 3 --num_attention_heads 4 --intermediate_size 512 --vocab_size 4096"
    steps = "--max_steps 300 --per_device_train_batch_size 16 --learning_rate 1e-3"
    assert cli.main(["mlm", *shared, *sizes.split(), *steps.split(), "--output_dir", begun]) == 0
    steps = "--max_steps 150 --per_device_train_batch_size 32 --learning_rate 5e-4"
    assert (
        cli.main(
            [
                "contrastive",
                "--views",
                "ict",
                *shared,
                *steps.split(),
                "--model_name_or_path",
                begun,
                "--output_dir",
                contrasted,
            ]
        )
        == 0
    )
    lines = [document.partition("\n") for document in held_out]
    pairs = [(first, rest) for first, _, rest in lines if len(first.split()) > 2 and len(rest.split()) > 20]
    recalls = {}
    for folder in (begun, contrasted):
        model, tokenizer = AutoModel.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
        vectors = [
            text_vectors(model, tokenizer, texts, modules=SentenceModules(), max_length=64)
            for texts in zip(*pairs, strict=True)
        ]
        recalls[folder] = retrieval_recall(*vectors, list(range(len(pairs))))["recall_at_10"]
    # .06 and .19 on one set of packages.
    assert recalls[contrasted] > 1.8 * recalls[begun] and recalls[contrasted] > 0.1
