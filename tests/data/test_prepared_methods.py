"""Every method trains on prepared data as on the text itself, to the bit, or refuses it before any work."""

import json
from types import SimpleNamespace

import datasets
import numpy as np
import pytest
import torch
from data.test_prepared import make_texts, write
from transformers import AutoTokenizer, BertConfig, BertForMaskedLM

from helpers.method_matrix import programs
from helpers.two_ranks import run_on_ranks
from hf_pretrain import cli
from hf_pretrain.data import prepared
from hf_pretrain.data.documents.tokenizers import train_tokenizer
from hf_pretrain.training import program
from hf_pretrain.training.checkpointing import text_fingerprint
from hf_pretrain.training.parsing import parse_run
from hf_pretrain.training.phases.plan import plan

SIZES = "--hidden_size 16 --num_hidden_layers 1 --num_attention_heads 2 --intermediate_size 32"
SHORT = "--max_steps 2 --logging_steps 1 --per_device_train_batch_size 4 --save_strategy no --use_cpu true --seed 3"
HELD_OUT = "--validation_fraction 0.1 --max_unknown_share 0.5"
T5 = " ".join(f"<extra_id_{number}>" for number in range(100))
ELMO = "elmo --hidden_size 16 --cell_size 16 --num_hidden_layers 1"
METHODS = {
    "mlm": f"mlm {SIZES}",
    "vectors": f"mlm {SIZES} --init_embeddings {{place}}/vectors.txt",
    "part-of-evaluation": f"mlm {SIZES} --max_eval_tokens 100",
    "word-masks": f"mlm {SIZES} --masking_unit word --block_mode full_sentences",
    "isolated": f"mlm {SIZES} --block_mode isolated_documents",
    "validation-file": f"mlm {SIZES} --block_mode doc_sentences",
    "rtd": f"rtd {SIZES}",
    "electric": f"electric {SIZES}",
    "plm": f"plm {SIZES}",
    "plm-memory": f"plm {SIZES} --mem_len 8",
    "clm": f"clm {SIZES} --block_mode tokens",
    "recurrent": f"recurrent-lm {SIZES} --tgt_len 8 --mem_len 8",
    "elmo": ELMO,
    "elmo-lanes": f"{ELMO} --stateful true --unroll_length 8",
    "bart": f"denoise {SIZES} --noise bart",
    "t5": f"denoise {SIZES} --noise t5",
    "ul2": f"denoise {SIZES} --noise ul2",
    "mass": f"denoise {SIZES} --noise mass",
    "simcse": f"contrastive {SIZES} --views same",
    "neighbours": f"contrastive {SIZES} --views neighbours --beside mlm",
    "ict": f"contrastive {SIZES} --views ict",
    "nsp": f"encoder {SIZES} --objectives mlm nsp",
    "structbert": f"encoder {SIZES} --objectives mlm sentence_structure word_order",
    "unilm": f"encoder {SIZES} --objectives mlm left_to_right sequence_to_sequence",
    "distil": "distil --teacher_name_or_path {place}/model --student_layers 0",
}
# How the text was prepared for them: as the run would by itself, or with a named tokenizer.
OF_TEXT = {
    "named": "--tokenizer_name {place}/tokenizer",
    "validation-file": "--tokenizer_name {place}/tokenizer --validation_file {place}/held_out.jsonl",
    "word": "--vocab_size 80 --tokenizer_type word --lowercase false",
    "causal": "--vocab_size 300 --tokenizer_type bpe --lowercase false",
    "t5": f"--vocab_size 420 --added_tokens {T5}",
    "ul2": f"--vocab_size 420 --added_tokens [NLU] [NLG] [S2S] {T5}",
}
TEXT_OF = {"elmo": "word", "elmo-lanes": "word", "clm": "causal"}
TEXT_OF |= {name: name for name in ("validation-file", "t5", "ul2")}
# Those are the run's own defaults.
OF_PREPARE = (" --added_tokens", " --tokenizer_type")


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    """A corpus, its tokenizer, a model with it, and what `opened` prepares."""
    place = tmp_path_factory.mktemp("text")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(prepared, "_LEAST_BYTES", 900)
        patch.setattr(prepared, "_GROUP_BYTES", 300)
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", place / "cache")
        corpus = write(place / "corpus.jsonl", make_texts())
        write(place / "held_out.jsonl", make_texts(12, seed=5))
        # It does not know every letter of the corpus.
        known = [text for text in make_texts() if text and text.isascii()]
        train_tokenizer(known, kind="wordpiece", vocab_size=200).save_pretrained(place / "tokenizer")
        own = AutoTokenizer.from_pretrained(place / "tokenizer")
        sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
        BertForMaskedLM(BertConfig(vocab_size=len(own), **sizes)).save_pretrained(place / "model")
        own.save_pretrained(place / "model")
        rows = [
            f"{word} {' '.join(str((len(word) + i) % 5) for i in range(16))}" for word in ("reader", "corpus", "long")
        ]
        (place / "vectors.txt").write_text("\n".join(rows))
        yield Prepared(place, corpus)


class Prepared:
    def __init__(self, place, corpus):
        self.place, self.corpus, self._made = place, corpus, set()

    def options(self, name):
        """Options by which a run reads the text as `folder` has it."""
        read, *_ = OF_TEXT[name].format(place=self.place).split(OF_PREPARE[0])
        return f"--train_file {self.corpus} {HELD_OUT} {read.split(OF_PREPARE[1])[0]}"

    def folder(self, name="named"):
        """The text as `prepare` wrote it."""
        folder = self.place / f"prepared-{name}"
        if name not in self._made:
            argv = (
                f"prepare --train_file {self.corpus} {HELD_OUT} {OF_TEXT[name]} --num_workers 1 --output_dir {folder}"
            )
            assert cli.main(argv.format(place=self.place).split()) == 0
            self._made.add(name)
        return folder

    def both(self, method):
        """Words for a run that reads the text, and for one that opens it."""
        name = TEXT_OF.get(method, "named")
        size = "" if "tgt_len" in METHODS[method] else " --block_size 32"
        argv = f"{METHODS[method].format(place=self.place)} {SHORT}{size}"
        opened = f"--prepared_data {self.folder(name)} --max_unknown_share 0.5"
        return [f"{argv} {given}".split() for given in (self.options(name), opened)]


def plain(value):
    """A batch, or a part of one, as lists."""
    if isinstance(value, torch.Tensor | np.ndarray):
        return value.tolist()
    if isinstance(value, list | tuple):
        return [plain(part) for part in value]
    return {name: plain(part) for name, part in value.items()} if hasattr(value, "items") else value


def parsed_run(argv, folder):
    method = programs()[argv[0]]
    return method, parse_run(method.arguments, [*argv[1:], "--output_dir", str(folder)], prog="", description="")


def first_and_held_out(method, options):
    """The batches of the first steps and of an evaluation, weights, and what the card says of the data."""
    trainer, data = program._build(method, options)
    steps = [plain(batch) for _, batch in zip(range(2), trainer.get_train_dataloader(), strict=False)]
    held_out = [plain(batch) for batch in trainer.get_eval_dataloader()]
    return SimpleNamespace(
        batches=(steps, held_out),
        weights=plain(trainer.model.state_dict()),
        # Of the options only that of the folder may differ.
        card={name: value for name, value in data.description.items() if name != "options"},
        options=data.description["options"],
        tokenizer=prepared.key_of(data.tokenizer),
        fingerprint=text_fingerprint(trainer.train_dataset),
    )


OTHER_OPTIONS = {"train_file", "validation_file", "prepared_data", "tokenizer_name"}


@pytest.mark.parametrize("name", METHODS)
def test_a_method_gets_the_batches_of_a_run_that_reads_the_text(text, tmp_path, name, capsys):
    runs = (parsed_run(argv, tmp_path / f"{k}") for k, argv in enumerate(text.both(name)))
    read, opened = (first_and_held_out(method, parsed.options) for method, parsed in runs)
    assert_equal_runs(read, opened)
    if TEXT_OF.get(name, "named") == "named":
        assert read.card["unknown_share"] > 0


def assert_equal_runs(read, opened):
    assert len(read.batches[0]) == 2 and read.batches[1]
    assert opened.batches == read.batches
    assert opened.weights == read.weights
    assert opened.card == read.card
    assert opened.tokenizer == read.tokenizer
    # A resume compares it.
    assert opened.fingerprint == read.fingerprint is not None
    assert {key for key, value in read.options.items() if opened.options.get(key) != value} <= OTHER_OPTIONS


def result_of(argv, folder, capsys):
    """Losses, weights and what the card says of the data."""
    assert cli.main([*argv, "--output_dir", str(folder)]) == 0, capsys.readouterr().err
    history = json.loads((folder / "trainer_state.json").read_text())["log_history"]
    losses = [{key: value for key, value in row.items() if "loss" in key or key == "grad_norm"} for row in history]
    weights = {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*.safetensors")}
    card = json.loads((folder / "pretraining" / "run.json").read_text())["card"]
    return losses, weights, card["data"]


@pytest.mark.slow
@pytest.mark.parametrize("name", METHODS)
def test_a_method_has_the_losses_of_a_run_that_reads_the_text(text, tmp_path, name, capsys):
    read, opened = (result_of(argv, tmp_path / f"{k}", capsys) for k, argv in enumerate(text.both(name)))
    assert len(read[0]) >= 3 and any("loss" in key for key in read[0][0])
    assert opened == read


def test_two_ranks_and_a_resume_have_the_losses_of_a_run_that_reads_the_text(text, tmp_path):
    read, opened = text.both("mlm")
    saved = "--save_strategy steps --save_steps 1 --max_steps 2 --eval_strategy no".split()
    at_the_first = ["--resume_from_checkpoint", str(tmp_path / "read" / "checkpoint-1")]
    runs = {"read": read, "opened": opened, "resumed": [*opened, *at_the_first]}
    commands = [
        {"name": name, "argv": [*argv, *saved, "--output_dir", str(tmp_path / name)]} for name, argv in runs.items()
    ]
    (tmp_path / "commands.json").write_text(json.dumps({"2": commands}))
    run_on_ranks("helpers.command_ranks_worker", tmp_path, world_size=2)
    found = {}
    for name in runs:
        for rank in range(2):
            assert json.loads((tmp_path / f"{name}-2-{rank}.json").read_text()) == 0, (
                tmp_path / f"{name}-2-{rank}.err"
            ).read_text()
        history = json.loads((tmp_path / name / "trainer_state.json").read_text())["log_history"]
        losses = [(row["step"], row["loss"], row["grad_norm"]) for row in history if "grad_norm" in row]
        found[name] = (losses, (tmp_path / name / "model.safetensors").read_bytes())
        # Nothing of the text has changed for the resume.
        assert "has changed" not in (tmp_path / f"{name}-2-0.out").read_text()
        assert "has changed" not in (tmp_path / f"{name}-2-0.err").read_text()
    assert len(found["read"][0]) == 2
    assert found["opened"] == found["read"] == found["resumed"]


PHASES = """\
max_steps: 4
phases:
  - {name: one, share: 50%, mlm_probability: 0.4}
  - {name: two, share: 50%, mlm_probability: 0.2, block_size: 16}
"""


def with_phases(argv, folder):
    (folder / "phases.yaml").write_text(PHASES)
    at = argv.index("--max_steps")
    return [*argv[:at], *argv[at + 2 :], "--config", str(folder / "phases.yaml")]


def test_phases_get_the_batches_of_a_run_that_reads_the_text(text, tmp_path):
    found = []
    for k, argv in enumerate(text.both("mlm")):
        method, parsed = parsed_run(with_phases(argv, tmp_path), tmp_path / f"{k}")
        phases = plan(parsed.options[2], parsed.phases, branch=None)
        found.append([first_and_held_out(method, phase.options) for phase in phases])
    for read, opened in zip(*found, strict=True):
        assert_equal_runs(read, opened)
    lengths = [len(phase.batches[0][0]["input_ids"][0]) for phase in found[1]]
    assert lengths[1] <= 16 < lengths[0]


@pytest.mark.slow
def test_phases_have_the_losses_of_a_run_that_reads_the_text(text, tmp_path, capsys):
    found = []
    for k, argv in enumerate(text.both("mlm")):
        argv[argv.index("--save_strategy") + 1] = "steps"
        found.append(result_of(with_phases(argv, tmp_path), tmp_path / f"{k}", capsys))
    assert len(found[0][0]) >= 4 and found[0] == found[1]
