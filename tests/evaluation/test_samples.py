"""What a program shows at its end of what was learned, and what it shows no more."""

import logging
import re
import unicodedata
from itertools import islice
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from datasets import Dataset
from transformers import AutoModelForSeq2SeqLM, BartConfig, T5Config, set_seed

from hf_pretrain import DataArguments, cli, prepare_data
from hf_pretrain.corruption.denoising import BartNoise
from hf_pretrain.corruption.fragments import MassNoise, SpanCorruption
from hf_pretrain.data.documents.words import letter_share, letter_words
from hf_pretrain.evaluation.samples import held_out_sentences, print_rebuilt, rebuilt, rebuilt_sentences
from hf_pretrain.hub.card import render_card
from hf_pretrain.hub.record import ObjectiveDescription, PretrainingCard, read_record, write_record
from hf_pretrain.objectives.denoising.collator import DataCollatorForDenoising
from hf_pretrain.objectives.replaced_token_detection.trainer import wrong_word_sentences

WORDS = "Bären Hörner schöne Bücher lesen über Füße große Brücken öffnen Äpfel wärmen Mütter".split()
SIZES = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 64,
    "vocab_size": 300,
    "block_size": 32,
    "max_steps": 3,
    "validation_fraction": 0.3,
    "tokenizer_type": "wordpiece",
    "lowercase": "false",
    "use_cpu": "true",
    "report_to": "none",
    "disable_tqdm": "true",
}


@pytest.fixture
def run(tmp_path, capsys):
    """Run a method on tiny German text, and return its status, what it printed, and its errors."""
    documents = [
        ". ".join(" ".join(WORDS[(i * k + j * (k + 2)) % len(WORDS)] for j in range(9)) for k in range(1, 5)) + "."
        for i in range(60)
    ]
    (tmp_path / "text.txt").write_text("\n\n".join(documents), encoding="utf-8")

    def run(method, *argv, **options):
        values = SIZES | {"train_file": tmp_path / "text.txt", "output_dir": tmp_path / "out"} | options
        words = (part for name, value in values.items() if value is not None for part in (f"--{name}", str(value)))
        status = cli.main([method, *words, *argv])
        out, err = capsys.readouterr()
        return status, out, err

    return run


@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("mlm", {}),
        ("bert_small", {}),
        ("plm", {}),
        ("plm", {"model_type": "modernbert"}),
        ("clm", {}),
        ("recurrent-lm", {"tgt_len": 8, "mem_len": 8, "eval_tgt_len": 8, "eval_mem_len": 8, "block_size": None}),
    ],
)
def test_a_run_ends_on_held_out_sentences_with_the_likeliest_tokens(run, tmp_path, method, options):
    status, out, _ = run(method, **options)
    assert status == 0
    shown = out.partition("model card")[2]
    guesses = re.findall(r"^  (.*)\[\?\](.*)\n    (.+); in the text: (\S+) (0\.\d\d)$", shown, flags=re.MULTILINE)
    assert 1 <= len(guesses) <= 3
    text = (tmp_path / "text.txt").read_text(encoding="utf-8").replace(" ", "")
    for before, after, candidates, token, _ in guesses:
        # The sentence with its token is one of the text, umlauts and all, and is not shown by the model's own guess.
        assert (before + token + after).replace(" ", "") in text
        values = [float(candidate.split()[-1]) for candidate in candidates.split(", ")]
        assert len(values) == 3 and values == sorted(values, reverse=True) and sum(values) <= 1.01
        assert method not in ("clm", "recurrent-lm") or not after


def test_electric_ends_on_the_likelihood_of_sentences(run):
    status, out, _ = run("electric")
    assert status == 0
    pairs = re.findall(
        r"^ +(-?[\d.]+)  (.+)\n +(-?[\d.]+)  (.+)$", out.partition("words exchanged")[2], flags=re.MULTILINE
    )
    assert pairs
    for _, text, _, exchanged in pairs:
        assert text != exchanged and sorted(text.split()) == sorted(exchanged.split())


def test_a_resume_is_quiet_about_the_type_of_the_model(run):
    assert run("mlm", save_steps=2)[0] == 0
    records: list[logging.LogRecord] = []
    handler = logging.Handler()
    handler.emit = records.append
    logging.getLogger("transformers").addHandler(handler)
    try:
        assert run("mlm", "--resume_from_checkpoint", "auto", save_steps=2, max_steps=4)[0] == 0
    finally:
        logging.getLogger("transformers").removeHandler(handler)
    assert not [record for record in records if "You are using a model of type" in record.getMessage()]


def test_a_decoder_is_refused_for_what_it_is(run):
    status, _, err = run("rtd", model_type="gpt2")
    assert status == 2
    assert re.search(r"model_type='gpt2' is no .*masked", err) and "intermediate_size" not in err


TEXTS = {
    "hi": "लड़के ने आज सुबह बगीचे में मीठे आम खाये। किसान शाम को खेत से धीरे धीरे लौटा। नदी के किनारे पुराना मन्दिर है।",
    "th": "เด็กกินข้าวที่บ้านแล้ว เขาไปตลาดตอนเช้า ที่นี่มีดอกไม้สวยมาก",
    "he": "הַיֶּלֶד אָכַל אֶת הַתַּפּוּחַ בַּבַּיִת. הָאִישׁ הָלַךְ לַשּׁוּק בַּבֹּקֶר.",
    "de": "Der Bäcker hat das Brot geholt. Am Abend war davon nichts mehr übrig.",
    "zh": "昨天下午我们一起去山上看红叶。孩子们在河边高兴地唱歌。老师给学生讲了一个很长的故事。",
}


def tiny_data(tmp_path, language, *, vocab_size=315):
    return prepare_data(
        DataArguments(vocab_size=vocab_size, tokenizer_type="bpe", lowercase=False, validation_fraction=0.2),
        seed=0,
        output_dir=tmp_path,
        dataset=Dataset.from_dict({"text": [TEXTS[language]] * 30}),
    )


@pytest.mark.parametrize("language", TEXTS)
def test_sentences_of_every_script_are_shown_with_whole_words(language, tmp_path):
    """Vowel signs, tones and points belong to the letters before them."""
    text = TEXTS[language]
    data = tiny_data(tmp_path, language)
    found = list(islice(held_out_sentences(data, seed=0), 2))
    assert found
    for sentence in found:
        words = [sentence[begin:end] for begin, end in letter_words(sentence)]
        assert words and all(word in text for word in words)
        # No word begins with a mark that belongs to the letter before it.
        assert not any(unicodedata.category(word[0]).startswith("M") for word in words)
    assert letter_share(text) > 0.9


def test_a_wrong_word_is_the_longest_of_the_sentence_before():
    sentences = ["लड़के ने मीठे आम खाये", "किसान धीरे से लौटा", "a bb ccc."]
    assert list(wrong_word_sentences(sentences)) == [("लड़के धीरे से लौटा", 0, "किसान"), ("a bb किसान.", 5, "ccc")]


class Composite(torch.nn.Module):
    export_parts = {"": "model"}  # noqa: RUF012

    def __init__(self, model):
        super().__init__()
        self.model = self.root = model


def denoising_run(tmp_path, language, kind, noise, **options):
    """What a run of denoising has at its end, with fresh weights."""
    data = tiny_data(tmp_path, language, **options)
    tokenizer = data.tokenizer
    tokenizer.add_special_tokens({"extra_special_tokens": [f"<extra_id_{i}>" for i in range(20)]})
    made = {
        "bart": lambda: BartNoise(steps=("infilling",), mask_token_id=tokenizer.mask_token_id),
        "t5": lambda: SpanCorruption(
            density=0.3, sentinels=np.array(tokenizer.convert_tokens_to_ids([f"<extra_id_{i}>" for i in range(20)]))
        ),
        "mass": lambda: MassNoise(mask_token_id=tokenizer.mask_token_id, random_ids=np.arange(20, 40)),
    }[noise]()
    set_seed(0)
    ids = {"vocab_size": len(tokenizer), "pad_token_id": tokenizer.pad_token_id}
    ids |= {"eos_token_id": tokenizer.sep_token_id, "forced_eos_token_id": tokenizer.sep_token_id}
    if kind == "t5":
        del ids["forced_eos_token_id"]
        sizes = {"d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4, "initializer_factor": 4.0}
        config = T5Config(**ids, **sizes, decoder_start_token_id=tokenizer.pad_token_id)
    else:
        sides = {
            f"{side}_{name}": n for side in ("encoder", "decoder") for name, n in (("layers", 2), ("ffn_dim", 64))
        }
        heads = {"encoder_attention_heads": 4, "decoder_attention_heads": 4, "init_std": 0.3}
        start = {"decoder_start_token_id": tokenizer.sep_token_id}
        config = BartConfig(**ids, **sides, **heads, **start, d_model=32, max_position_embeddings=128)
    trainer = SimpleNamespace(
        model=Composite(AutoModelForSeq2SeqLM.from_config(config)),
        data_collator=DataCollatorForDenoising(tokenizer, noise=made, seed=3, pad_to_multiple_of=8),
        processing_class=tokenizer,
        eval_dataset=data.eval_dataset,
        args=SimpleNamespace(seed=0, private_text=False, hub_private_repo=None),
    )
    return trainer, data


@torch.no_grad()
def written_by_hand(model, batch, *, ends):
    """The likeliest token each time, from the logits of the whole text so far."""
    keep = batch["attention_mask"][0] != 0
    source, targets = batch["input_ids"][:, keep], batch["labels"][batch["labels"] >= 0].tolist()
    first, start = int(batch["decoder_input_ids"][0, 0]), model.config.decoder_start_token_id
    column = int(batch["decoder_position_ids"][0, 0]) if "decoder_position_ids" in batch else 0
    read = [7] * column + [start if first < 0 else first]
    visible = [0] * column + [1]
    for _ in range(2 * len(targets) + 8 if ends else len(targets)):
        decoder = {"decoder_input_ids": torch.tensor([read]), "decoder_attention_mask": torch.tensor([visible])}
        logits = model.eval()(source, **decoder).logits[0, -1]
        if not ends:
            logits[model.config.eos_token_id] = -torch.inf
        read, visible = [*read, int(logits.argmax())], [*visible, 1]
        if ends and read[-1] == targets[-1]:
            break
    return read[column + 1 :]


class TestRebuilding:
    @pytest.mark.parametrize(("kind", "noise"), [("bart", "bart"), ("t5", "t5"), ("bart", "mass"), ("t5", "mass")])
    def test_what_is_shown_is_what_the_model_reads_and_writes(self, kind, noise, tmp_path):
        # So few tokens that most words have several.
        trainer, data = denoising_run(tmp_path, "de", kind, noise, vocab_size=290)
        tokenizer, model = data.tokenizer, trainer.model.model.train()
        if (kind, noise) == ("bart", "mass"):
            model.final_logits_bias[0, model.config.eos_token_id] = 100.0  # a fragment has no end
        sentences = [f"{part.rstrip('.')}." for part in TEXTS["de"].split(". ")]
        found = list(rebuilt(trainer, sentences))
        assert [sample.original for sample in found] == sentences and model.training
        assert found == list(rebuilt(trainer, sentences)), "dropout is off, and noise is keyed"
        for number, sample in enumerate(found):
            ids = tokenizer(sample.original)["input_ids"]
            example = {"input_ids": ids, "word_starts": [True] * len(ids), "sent_starts": [False] * len(ids)}
            example["word_starts"] = word_starts_of(sample.original, tokenizer)
            batch = trainer.data_collator([example | {"example_id": number, "epoch": 0}])
            special = {tokenizer.pad_token_id, tokenizer.cls_token_id, tokenizer.sep_token_id}
            expected = [
                " ".join(tokenizer.decode([token for token in row if token not in special]).split())
                for row in (batch["input_ids"][0].tolist(), written_by_hand(model, batch, ends=noise != "mass"))
            ]
            assert re.sub("\ufffd+", "\ufffd", expected[0]) == sample.noised
            assert re.sub("\ufffd+", "\ufffd", expected[1]) == sample.written
        signs = "<extra_id_0>" if noise == "t5" else tokenizer.mask_token
        assert all(signs in sample.noised for sample in found)
        assert not any(
            token in text for sample in found for text in sample for token in (tokenizer.sep_token, "[PAD]")
        )

    @pytest.mark.parametrize("language", TEXTS)
    def test_sentences_of_every_script_are_shown_as_they_are_read(self, language, tmp_path, capsys):
        """What lies between the masks is the sentence's own text, letter by letter."""
        trainer, data = denoising_run(tmp_path, language, "bart", "bart")
        print_rebuilt(trainer, data)
        out = capsys.readouterr().out
        shown = re.findall(r"^  noised   (.*)\n  written  .*\n  original (.*)$", out, flags=re.MULTILINE)
        assert 1 <= len(shown) <= 3 and out.count("  noised ") == len(shown)
        mask = data.tokenizer.mask_token
        for noised, original in shown:
            parts = [part.replace(" ", "") for part in noised.split(mask)]
            assert original in " ".join(TEXTS[language].split()) and len(parts) > 1
            assert re.fullmatch(".*".join(map(re.escape, parts)), original.replace(" ", ""))

    def test_a_sentence_without_positions_is_left_out(self, tmp_path):
        trainer, data = denoising_run(tmp_path, "de", "bart", "bart")
        long = " ".join(TEXTS["de"].split() * 14)
        assert [sample.original for sample in rebuilt(trainer, [long, "Der Bäcker hat das Brot geholt."])] == [
            "Der Bäcker hat das Brot geholt."
        ]

    def test_the_card_has_a_sentence_unless_the_text_is_private(self, tmp_path):
        trainer, _ = denoising_run(tmp_path, "hi", "t5", "t5")
        (sample,) = rebuilt_sentences(trainer)
        assert sample.original in TEXTS["hi"] and "<extra_id_0>" in sample.noised
        for name in ("private_text", "hub_private_repo"):
            args = SimpleNamespace(**vars(trainer.args) | {name: True})
            assert rebuilt_sentences(SimpleNamespace(**vars(trainer) | {"args": args})) == ()
        objective = ObjectiveDescription(name="denoise", title="Denoising", description="Undoes noise.")
        facts = {"model_name": "tiny", "model_class": "T5ForConditionalGeneration", "objective": objective}
        card = PretrainingCard(**facts, samples=(sample, ("a | b", "c", "d")))
        text = render_card(card)
        rows = re.findall(r"^\| (With noise|Written|Text) \| (.*) \|$", text, flags=re.MULTILINE)
        assert [name for name, _ in rows] == ["With noise", "Written", "Text"] * 2
        assert rows[2][1].replace("\\", "") == sample.original and rows[3][1] == "a \\| b"
        assert "<extra_id_0>" not in text.partition("## Samples")[2]
        assert "## Samples" not in render_card(PretrainingCard(**facts))
        write_record(card, tmp_path, readme="")
        assert read_record(tmp_path).samples == (tuple(sample), ("a | b", "c", "d"))


def word_starts_of(text, tokenizer):
    """Whether each token begins a word, by the words of letters and the lone characters of German."""
    encoding = tokenizer(text, return_offsets_mapping=True)
    begins = {found.start() for found in re.finditer(r"\w+|[^\w\s]", text)}
    starts: list[bool] = []
    for token, (begin, end) in zip(encoding["input_ids"], encoding["offset_mapping"], strict=True):
        begin += len(text[begin:end]) - len(text[begin:end].lstrip())
        starts.append(begin in begins or token in tokenizer.all_special_ids)
        begins.discard(begin)  # A letter of several bytes, or one behind a space, may be several tokens.
    return starts
