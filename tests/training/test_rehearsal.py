"""What can be known without the text is refused before any is read, in one line; what works is not refused."""

import logging
import random
import re
from dataclasses import replace

import numpy as np
import pytest
import torch
from transformers import BertConfig, BertForMaskedLM

from helpers.method_matrix import programs, teacher_of
from hf_pretrain import cli
from hf_pretrain.training import rehearsal

PROGRAMS = programs()
SIZES = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 128,
    "vocab_size": 500,
    "block_size": 32,
}
# None is read: were a mistake found later, this would be found first.
NOWHERE = "nowhere.txt"
HEADS = ("num_attention_heads=3", "num_attention_heads|multiple|heads|shapes|divisible|n_head")
WRONG = {
    "mlm": [
        ("model_type=modernbrt", "model_type='modernbrt'"),
        ("max_position_embeddings=16", "block_size=32 is longer than the 16 positions"),
        ("block_size=2", "block_size=2"),
        ('config_overrides={"hidden_act": "bogus"}', "bogus"),
        ("config_overrides=[]", "config_overrides"),
        ("attn_implementation=flash_attention_2", "FlashAttention2"),
        ("lr_scheduler_type=cosine_with_min_lr", "min_lr"),
        ('lr_scheduler_type=cosine lr_scheduler_kwargs={"nonsense":1}', "nonsense"),
        ("optim=adamw_bnb_8bit", "bitsandbytes"),
        ("adam_beta1=1.5", "beta"),
        ("report_to=nonsense", "report_to='nonsense' must be one of"),
        ("validation_fraction=0 eval_strategy=steps", "without held-out text"),
        ("metric_for_best_model=accuracy", "choose one of loss, mlm_accuracy, mlm_loss"),
        ("max_steps=0", "max_steps=0"),
        ("max_steps=-1 num_train_epochs=0", "num_train_epochs=0"),
        ("tokenizer_name=missing", "missing"),
        HEADS,
    ],
    "encoder": [
        ("objectives=mlm,sop block_mode=isolated_documents", "isolated_documents"),
        ("objectives=mlm,sop streaming=true max_steps=3", "leave out streaming"),
        ("model_type=mpnet", "mpnet"),
        HEADS,
    ],
    "rtd": [
        HEADS,
        ("metric_for_best_model=mlm_acc", "choose one of .*rtd_loss"),
        ("streaming=true max_steps=-1", "max_steps"),
    ],
    "electric": [("max_position_embeddings=16", "16"), HEADS],
    "plm": [
        ("mem_len=8 streaming=true max_steps=3", "leave streaming out"),
        ("block_mode=isolated_documents", "isolated_documents"),
        ("model_type=bogus", "bogus"),
        HEADS,
    ],
    "clm": [
        HEADS,
        ("model_type=bogus", "bogus"),
        ("max_position_embeddings=16", "block_size=32 is longer than the 16 positions"),
        ("model_type=openai-gpt block_mode=isolated_documents", "cannot isolate documents"),
    ],
    "recurrent-lm": [("streaming=true max_steps=3", "leave streaming out"), ("cutoffs=600", "cutoffs")],
    "distil": [
        ("distillation_method=minilmv2 teacher_layer=12 student_layers=first", "the teacher has 6 layers"),
        ("student_layers=0,9", "student_layers|layers"),
        ("", "no student is named"),
        ("student_layers=first cosine_weight=0 cache_top_k=4 streaming=true max_steps=3", "cache_top_k"),
    ],
    "distil-task": [("student_layers=first num_hidden_layers=9", "num_hidden_layers=9"), ("", "no student is named")],
}
RIGHT = {
    "mlm": ["", "streaming=true max_steps=3", "block_mode=isolated_documents", "validation_fraction=0",
            "tokenizer_type=bpe model_type=roberta max_position_embeddings=32", "tokenizer_type=unigram model_type=albert",
            "metric_for_best_model=mlm_accuracy", "model_type=modernbert"],
    "encoder": ["config=bert_small", "config=structbert_small", "config=unilm_small", "config=spanbert_small",
                "config=albert_small", "config=gpt_bert", "objectives=clm",
                "config=xlm_small language_file=en=a,de=b parallel_file=en-de=a,b"],
    "rtd": ["", "metric_for_best_model=eval_rtd_loss", "streaming=true max_steps=3"],
    "electric": [""],
    "plm": ["", "mem_len=16", "model_type=modernbert"],
    "clm": ["", "streaming=true max_steps=3", "block_mode=isolated_documents", "model_type=llama", "model_type=bert"],
    "recurrent-lm": ["cutoffs=100", "per_device_train_batch_size=64"],
    "distil": ["student_layers=first", "student_layers=first cosine_weight=0 cache_top_k=4 static_masks=2",
               "distillation_method=minilmv2 num_hidden_layers=3"],
    "distil-task": ["student_layers=first", "student_layers=first labels_weight=1"],
}  # fmt: skip


def argv_of(method, folder, words):
    program = PROGRAMS[method]
    options = {"train_file": NOWHERE, "output_dir": str(folder), "report_to": "none", "bf16": "false"}
    fields = set().union(*(cls.__dataclass_fields__ for cls in program.arguments))
    teacher = teacher_of(program)
    options |= {"teacher_name_or_path": teacher, "block_size": 24, "max_length": 24} if teacher else SIZES
    for word in filter(None, words.split(" ") if "{" not in words else words.replace(": ", ":").split(" ")):
        name, _, value = word.partition("=")
        options[name] = value
    if "language_file" in options:
        del options["train_file"]
    if "metric_for_best_model" in options:
        options |= {"load_best_model_at_end": "true", "eval_strategy": "steps", "save_strategy": "steps"}
    if "model_name_or_path" in options:
        # A checkpoint has its own.
        options = {name: value for name, value in options.items() if name == "block_size" or name not in SIZES}
    lists = ("objectives", "language_file", "cutoffs")
    argv = []
    for name, value in options.items():
        if name in fields or name == "config":
            argv += [f"--{name}", *(value.split(",") if name in lists else [str(value)])]
    return [method, *argv]


@pytest.mark.parametrize(("method", "words", "message"), [(m, *row) for m, rows in WRONG.items() for row in rows])
def test_it_is_refused_before_the_text_is_read(method, words, message, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert cli.main(argv_of(method, tmp_path / "out", words)) == 2
    said = capsys.readouterr()
    assert said.err.startswith("error: ") and said.err.count("\n") == 1 and said.out == ""
    assert NOWHERE not in said.err
    assert re.search(message, said.err), said.err
    # The next try may have the folder.
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("method", "words"), [(m, words) for m, rows in RIGHT.items() for words in rows])
def test_what_works_is_not_refused(method, words, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    failures = []
    attempt = rehearsal._attempt

    def attempted(*args, **options):
        failures.append(attempt(*args, **options)[0])
        return failures[-1], 0

    monkeypatch.setattr(rehearsal, "_attempt", attempted)
    assert cli.main(argv_of(method, tmp_path / "out", words)) == 2
    said = capsys.readouterr()
    assert "no file" in said.err and said.out == "", said
    # And it was rehearsed to its end, not given up.
    assert failures and failures[-1] is None, failures
    assert list(tmp_path.iterdir()) == []


def test_nothing_is_changed_by_it(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    states = []
    rehearse = rehearsal.rehearse

    def watched(options, **inputs):
        def state():
            # What transformers seeds.
            return random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()  # noqa: NPY002

        before, args = state(), dict(vars(options[-1]))
        rehearse(options, **inputs)
        states.append((before == state(), args == vars(options[-1])))

    monkeypatch.setattr("hf_pretrain.training.program.rehearse", watched)
    assert cli.main(argv_of("rtd", tmp_path / "out", "")) == 2
    assert states == [(True, True)]
    model = BertForMaskedLM(BertConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=1, vocab_size=9))
    assert model.device.type == "cpu"
    model.save_pretrained(tmp_path / "model")
    assert BertForMaskedLM.from_pretrained(tmp_path / "model").device.type == "cpu"


def test_what_is_said_of_a_model_is_not_said_of_the_rehearsals(caplog):
    logger = logging.getLogger("hf_pretrain.modeling.loading")
    with rehearsal._leaving_no_trace():
        logger.warning("of made-up text")
    logger.warning("of the text")
    assert [record.message for record in caplog.records] == ["of the text"]


def test_a_checkpoint_is_tried_without_its_weights(tmp_path, capsys, monkeypatch, tokenizer):
    monkeypatch.chdir(tmp_path)
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64}
    model = BertForMaskedLM(BertConfig(**sizes, vocab_size=len(tokenizer), max_position_embeddings=24))
    model.save_pretrained("model")
    tokenizer.save_pretrained("model")
    argv = argv_of("mlm", tmp_path / "out", "model_name_or_path=model")
    assert cli.main(argv) == 2
    assert "block_size=32 is longer than the 24 positions" in capsys.readouterr().err
    assert cli.main([*argv, "--block_size", "24"]) == 2
    assert "no file" in capsys.readouterr().err
    # What is damaged is not passed over.
    (tmp_path / "model" / "model.safetensors").write_bytes(b"version https://git-lfs")
    assert cli.main([*argv, "--block_size", "24"]) == 2
    assert "no file" not in capsys.readouterr().err


def test_a_rehearsal_that_is_itself_wrong_refuses_nothing(tmp_path, capsys, monkeypatch, tokenizer):
    monkeypatch.chdir(tmp_path)

    def broken(*args):
        # Found in a library, as a refusal would be.
        return tokenizer.no_such_method()

    argv = argv_of("mlm", tmp_path / "out", "")[1:]
    assert cli.run_program(replace(PROGRAMS["mlm"], made_up=broken).run, argv) == 2
    assert "no file" in capsys.readouterr().err


def test_a_large_model_takes_no_memory():
    from transformers import AutoModelForMaskedLM

    counted = [0]
    with rehearsal._without_numbers("meta", counted):
        model = AutoModelForMaskedLM.from_config(
            BertConfig(hidden_size=8192, num_hidden_layers=2, num_attention_heads=64)
        )
    assert {parameter.device.type for parameter in model.parameters()} == {"meta"}
    assert sum(parameter.numel() for parameter in model.parameters()) <= counted[0] < 2e9
    assert model.cls.predictions.decoder.weight is model.bert.embeddings.word_embeddings.weight
