"""What a program shows at its end of what was learned, and what it shows no more."""

import logging
import re
import unicodedata
from itertools import islice

import pytest
from datasets import Dataset

from hf_pretrain import DataArguments, cli, prepare_data
from hf_pretrain.data.documents.words import letter_share, letter_words
from hf_pretrain.evaluation.samples import held_out_sentences
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
        assert method != "recurrent-lm" or not after


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
}


@pytest.mark.parametrize("language", TEXTS)
def test_sentences_of_every_script_are_shown_with_whole_words(language, tmp_path):
    """Vowel signs, tones and points belong to the letters before them."""
    text = TEXTS[language]
    data = prepare_data(
        DataArguments(vocab_size=315, tokenizer_type="bpe", lowercase=False, validation_fraction=0.2),
        seed=0,
        output_dir=tmp_path,
        dataset=Dataset.from_dict({"text": [text] * 30}),
    )
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
