"""New words and other tokenizers for a model, and the command that trains it further."""

import copy
import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoTokenizer,
    BertConfig,
    GPT2Config,
    RobertaConfig,
    T5Config,
    T5ForConditionalGeneration,
)

from hf_pretrain import cli
from hf_pretrain.commands import adapt
from hf_pretrain.data import draws
from hf_pretrain.data.documents.tokenizers import train_tokenizer
from hf_pretrain.data.text.docstrings import docstring_documents
from hf_pretrain.errors import InputError
from hf_pretrain.evaluation.token_scores import encode_words, masked_scores
from hf_pretrain.modeling.base import GENERATOR_FOLDER
from hf_pretrain.transfer.adaptation import (
    add_words,
    choose_words,
    extend_checkpoint,
    extended_tokenizer,
    read_words,
    token_counts,
    token_vectors,
)
from hf_pretrain.vectors.corpus import word_tokenizer
from hf_pretrain.vectors.folder import WordVectors

GENERAL = [
    "the patient had a pain in the liver, and the doctor saw it at once.",
    "a cat sat on the mat; the dog ran to the tree and the house.",
    "he sat in a tent in it, is it his pen? a hen, a nest, it has it.",
] * 30
DOMAIN = ["the patient has hepatitis, and chronic Hepatitis is in the liver. a steatosis is not hepatitis."] * 12
DOMAIN += ["it is a rare steatosis; hepatitisx is no word. cats sat on the mat."] * 6
PLAIN = "the dog and the cat sat, and hepatitisx ran to xhepatitis at once."
SIZES = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
KINDS = ["wordpiece", "bpe", "unigram"]


@pytest.fixture(scope="module", params=KINDS)
def tokenizer(request):
    return make_tokenizer(request.param)


def make_tokenizer(kind):
    return train_tokenizer(GENERAL, kind=kind, vocab_size=330, lowercase=kind != "bpe")


def make_model(tokenizer, *, tied=True, config=BertConfig, **options):
    torch.manual_seed(0)
    values = SIZES | {"vocab_size": len(tokenizer), "tie_word_embeddings": tied, "initializer_range": 0.5} | options
    model = AutoModelForMaskedLM.from_config(config(**values, pad_token_id=tokenizer.pad_token_id)).eval()
    model.get_output_embeddings().bias.data.normal_()
    return model


def logits(model, tokenizer, text):
    with torch.no_grad():
        return model(**tokenizer(text, return_tensors="pt", return_token_type_ids=False)).logits[0]


class TestChoosing:
    def test_those_that_save_most_tokens_first(self, tokenizer):
        words = choose_words(DOMAIN, tokenizer, 2)
        by_name = {word.text: word for word in choose_words(DOMAIN, tokenizer, 100)}
        assert [word.text for word in words] == ["hepatitis", "steatosis"]
        is_lower = tokenizer("THE")["input_ids"] == tokenizer("the")["input_ids"]
        # Those with a capital are the same word in lower case alone.
        assert by_name["hepatitis"].times == (36 if is_lower else 24)
        assert by_name["steatosis"].times == 18
        for word in words:
            pieces = tokenizer.tokenize(f"the {word.text}")[len(tokenizer.tokenize("the")) :]
            assert word.pieces == len([piece for piece in pieces if piece != "▁" and piece != "Ġ"])
            assert word.saved == word.times * (word.pieces - 1)
        saved = [word.saved for word in choose_words(DOMAIN, tokenizer, 100)]
        assert saved == sorted(saved, reverse=True)

    def test_the_order_of_the_text_does_not_matter(self, tokenizer):
        assert choose_words(DOMAIN, tokenizer, 9) == choose_words(reversed(DOMAIN), tokenizer, 9)
        many = [letter * count for letter in "aehinst" for count in (5, 6, 7)]
        ours, theirs = (choose_words([" ".join(words)] * 5, tokenizer, 99) for words in (many, many[::-1]))
        assert ours == theirs and len({word.saved for word in ours}) < len(ours)

    def test_rare_words_and_whole_ones_are_none(self, tokenizer):
        _, extended = add_words(make_model(tokenizer), tokenizer, ["hepatitis"])
        found = {word.text for word in choose_words([*DOMAIN, "cirrhosis"], extended, 100)}
        assert "steatosis" in found and not {"cirrhosis", "hepatitis"} & found

    def test_no_word_is_refused(self, tokenizer):
        with pytest.raises(InputError, match="new_words='auto:3': the tokenizer cuts no word"):
            choose_words(["ox ox ox ox"], tokenizer, 3)

    def test_words_of_a_file(self, tokenizer, tmp_path):
        file = tmp_path / "words.txt"
        _, extended = add_words(make_model(tokenizer), tokenizer, ["cirrhosis"])
        file.write_text("hepatitis\ncirrhosis\n\nsteatosis\nhepatitis\n")
        assert [word.text for word in read_words(file, extended)] == ["hepatitis", "steatosis"]
        file.write_text("fatty liver\n")
        with pytest.raises(InputError, match="has the line 'fatty liver'"):
            read_words(file, tokenizer)
        file.write_text("cirrhosis\n")
        with pytest.raises(InputError, match="each of its 1 words is one token already"):
            read_words(file, extended)


class TestAdding:
    WORDS = ("hepatitis", "steatosis")

    def test_a_word_is_one_token_where_it_stands_alone(self, tokenizer):
        _, extended = add_words(make_model(tokenizer), tokenizer, self.WORDS)
        ids = extended.get_vocab()
        assert [ids[word] for word in self.WORDS] == [len(tokenizer), len(tokenizer) + 1]
        text = "a hepatitis, steatosis and hepatitis-x"
        encoded = extended(text, return_offsets_mapping=True)
        found = [
            (number, text[begin:end].strip())
            for number, (begin, end) in zip(encoded["input_ids"], encoded["offset_mapping"], strict=True)
            if number >= len(tokenizer)
        ]
        assert found == [(ids[word], word) for word in ("hepatitis", "steatosis", "hepatitis")]

    def test_other_text_is_cut_as_before_and_ids_stay(self, tokenizer):
        _, extended = add_words(make_model(tokenizer), tokenizer, self.WORDS)
        assert extended.get_vocab().items() >= tokenizer.get_vocab().items()
        for text in [PLAIN, "xhepatitis", "hepatitis_x", *GENERAL[:3]]:
            ours, before = (one(text, return_offsets_mapping=True) for one in (extended, tokenizer))
            assert ours["input_ids"] == before["input_ids"] and ours["offset_mapping"] == before["offset_mapping"]
        pair = [one(PLAIN, GENERAL[0])["input_ids"] for one in (extended, tokenizer)]
        assert pair[0] == pair[1]

    def test_case_follows_the_tokenizer(self, tokenizer):
        _, extended = add_words(make_model(tokenizer), tokenizer, self.WORDS)
        is_one = extended.get_vocab()["hepatitis"] in extended("a Hepatitis")["input_ids"]
        assert is_one == (tokenizer("THE")["input_ids"] == tokenizer("the")["input_ids"])

    @pytest.mark.parametrize("tied", [True, False])
    def test_rows_are_the_means_of_their_pieces(self, tokenizer, tied):
        model = make_model(tokenizer, tied=tied)
        larger, _ = add_words(model, tokenizer, self.WORDS)
        old = len(tokenizer)
        for word, number in zip(self.WORDS, (old, old + 1), strict=True):
            ids = tokenizer(f"the {word}", add_special_tokens=False)["input_ids"]
            ids = ids[len(tokenizer("the", add_special_tokens=False)["input_ids"]) :]
            ids = ids[1:] if tokenizer.convert_ids_to_tokens(ids[0]) in ("▁", "Ġ") else ids
            assert len(ids) > 1
            for before, after in (
                (model.get_input_embeddings().weight, larger.get_input_embeddings().weight),
                (model.get_output_embeddings().weight, larger.get_output_embeddings().weight),
                (model.get_output_embeddings().bias, larger.get_output_embeddings().bias),
            ):
                torch.testing.assert_close(after[number], before[ids].mean(0))
                assert torch.equal(after[:old], before) and len(after) == old + 2
        is_tied = larger.get_input_embeddings().weight is larger.get_output_embeddings().weight
        assert is_tied == tied

    def test_logits_of_other_text_stay(self, tokenizer):
        model = make_model(tokenizer)
        larger, extended = add_words(model, tokenizer, self.WORDS)
        before, after = logits(model, tokenizer, PLAIN), logits(larger, extended, PLAIN)
        torch.testing.assert_close(after[:, : len(tokenizer)], before, atol=1e-6, rtol=0)

    def test_it_opens_again(self, tokenizer, tmp_path):
        larger, extended = add_words(make_model(tokenizer), tokenizer, self.WORDS)
        larger.save_pretrained(tmp_path)
        extended.save_pretrained(tmp_path)
        model, opened = AutoModelForMaskedLM.from_pretrained(tmp_path), AutoTokenizer.from_pretrained(tmp_path)
        for text in DOMAIN[:1] + [PLAIN]:
            assert opened(text)["input_ids"] == extended(text)["input_ids"]
            torch.testing.assert_close(logits(model, opened, text), logits(larger, extended, text))
        assert token_counts(DOMAIN, [tokenizer])[0] > token_counts(DOMAIN, [opened])[0]

    def test_rows_beyond_the_tokenizer_are_used_first(self):
        """A vocabulary that is filled up to a round number has rows to spare."""
        tokenizer = make_tokenizer("wordpiece")
        model = make_model(tokenizer, vocab_size=len(tokenizer) + 5)
        larger, extended = add_words(model, tokenizer, self.WORDS)
        assert larger.config.vocab_size == len(tokenizer) + 5 and len(extended) == len(tokenizer) + 2

    def test_configured_ids_stay(self):
        tokenizer = make_tokenizer("wordpiece")
        last = len(tokenizer) - 1
        larger, _ = add_words(make_model(tokenizer, eos_token_id=last), tokenizer, self.WORDS)
        assert larger.config.eos_token_id == last

    def test_a_model_that_counts_from_padding(self):
        tokenizer = make_tokenizer("bpe")
        larger, _ = add_words(
            make_model(tokenizer, config=RobertaConfig, max_position_embeddings=40), tokenizer, self.WORDS
        )
        assert larger.config.pad_token_id == tokenizer.pad_token_id

    def test_a_token_is_no_new_word(self, tokenizer):
        with pytest.raises(InputError, match="is a token already"):
            add_words(make_model(tokenizer), tokenizer, ["hepatitis", tokenizer.convert_ids_to_tokens(20)])


def whole_words(tokenizer):
    """Words that are one token in the middle of a text, and their ids."""
    skipped = len(tokenizer.tokenize("the"))
    words = sorted({token.strip("#▁Ġ") for token in tokenizer.get_vocab()} - {"the"})
    cut = {word: tokenizer(f"the {word}", add_special_tokens=False)["input_ids"][skipped:] for word in words}
    return {word: ids[0] for word, ids in cut.items() if len(ids) == 1 and len(word) > 1 and word.isalpha()}


def mere_piece(tokenizer):
    """A token that stands inside of words alone, as a word."""
    words = {token.strip("#▁Ġ") for token in tokenizer.get_vocab()} - whole_words(tokenizer).keys()
    return next(word for word in sorted(words) if len(word) > 1 and word.isalpha())


def vectors_of(**rows):
    """Vectors by the cosines with two axes; what is left is an axis of the word's own."""
    table = np.zeros((len(rows), 2 + len(rows)))
    for number, (first, second) in enumerate(rows.values()):
        table[number, :2] = first, second
        table[number, 2 + number] = np.sqrt(max(0.0, 1 - first**2 - second**2))
    # Lengths say nothing.
    return WordVectors(tuple(rows), table * np.arange(1, 1 + len(rows))[:, None])


class TestRowsFromVectors:
    def near(self, tokenizer, **others):
        """Two known words at right angles, one far from all, and a new word that has cosines of 0.8 and 0.6 with the two."""
        (first, a), (second, b), (far, _) = list(whole_words(tokenizer).items())[:3]
        rows = {first: (1, 0), second: (0, 1), far: (0, 0), "hepatitis": (0.8, 0.6)}
        return vectors_of(**rows | others), (a, b)

    def rows(self, tokenizer, words, near):
        """Rows of new words: half of known words near them, half of their pieces."""
        larger, _ = add_words(make_model(tokenizer), tokenizer, words)
        return [(row + near) / 2 for row in larger.get_input_embeddings().weight[len(tokenizer) :]]

    @pytest.mark.parametrize("tied", [True, False])
    def test_a_row_is_half_a_mean_of_known_words_near_it(self, tokenizer, tied, caplog):
        vectors, (a, b) = self.near(tokenizer)
        model, old = make_model(tokenizer, tied=tied), len(tokenizer)
        larger, extended = add_words(model, tokenizer, ["steatosis", "hepatitis"], vectors=vectors)
        plain, _ = add_words(model, tokenizer, ["steatosis", "hepatitis"])
        tables = [
            (one.get_input_embeddings().weight, one.get_output_embeddings().weight, one.get_output_embeddings().bias)
            for one in (model, larger, plain)
        ]
        for before, after, pieces in zip(*tables, strict=True):
            # The sparsemax of two numbers: half of one, and half of their difference.
            near = 0.6 * before[a] + 0.4 * before[b]
            torch.testing.assert_close(after[old + 1], (near + pieces[old + 1]) / 2)
            assert torch.equal(after[old], pieces[old]), "a word without a vector has the mean of its pieces"
            assert torch.equal(after[:old], before)
        assert (larger.get_input_embeddings().weight is larger.get_output_embeddings().weight) == tied
        assert extended.get_vocab()["hepatitis"] == old + 1
        assert "1 of 2 new words begin near known words with such vectors, 1 as the mean" in caplog.text

    def test_no_row_is_made_of_special_tokens_new_words_or_pieces(self, tokenizer):
        special = {name: (0.8, 0.6) for name in (tokenizer.pad_token, tokenizer.mask_token, tokenizer.unk_token)}
        others = special | {mere_piece(tokenizer): (0.8, 0.6), "steatosis": (0.8, 0.6)}
        vectors, (a, b) = self.near(tokenizer, **others)
        model = make_model(tokenizer)
        larger, _ = add_words(model, tokenizer, ["steatosis", "hepatitis"], vectors=vectors)
        table = model.get_input_embeddings().weight
        wanted = self.rows(tokenizer, ["steatosis", "hepatitis"], 0.6 * table[a] + 0.4 * table[b])
        torch.testing.assert_close(larger.get_input_embeddings().weight[len(tokenizer) :], torch.stack(wanted))

    @pytest.mark.parametrize(("word", "known"), [("Hepatitis", "hepatitis"), ("hepatitis", "Hepatitis")])
    def test_case(self, tokenizer, word, known):
        """A word in capitals takes the vector of the lower-case word; the reverse only where the tokenizer knows no case."""
        (first, a), (far, _) = list(whole_words(tokenizer).items())[:2]
        vectors = vectors_of(**{first: (1, 0), far: (0, 0), known: (1, 0)})
        is_lower = tokenizer("THE")["input_ids"] == tokenizer("the")["input_ids"]
        word = word.lower() if is_lower else word
        model = make_model(tokenizer)
        if not is_lower and known == "Hepatitis":
            with pytest.raises(InputError, match="vectors: none of the 1 new words is among the 3 words"):
                add_words(model, tokenizer, [word], vectors=vectors)
            return
        larger, _ = add_words(model, tokenizer, [word], vectors=vectors)
        table = larger.get_input_embeddings().weight
        torch.testing.assert_close(table[len(tokenizer)], self.rows(tokenizer, [word], table[a])[0])

    def test_a_folder_of_vectors(self, tokenizer, tmp_path):
        vectors, (a, b) = self.near(tokenizer)
        vectors.save(tmp_path / "vectors", method="glove", training={}, lowercase=True)
        opened = WordVectors.open(tmp_path / "vectors")
        larger, _ = add_words(make_model(tokenizer), tokenizer, ["steatosis", "hepatitis"], vectors=opened)
        table = larger.get_input_embeddings().weight
        near = 0.6 * table[a] + 0.4 * table[b]
        torch.testing.assert_close(table[-1], self.rows(tokenizer, ["steatosis", "hepatitis"], near)[1])
        pieces, _ = add_words(make_model(tokenizer), tokenizer, ["steatosis", "hepatitis"])
        assert torch.equal(table[-2], pieces.get_input_embeddings().weight[-2]), "[UNK] is no word"

    def test_vectors_of_tokens(self, tokenizer, tmp_path):
        """Vectors of another tokenizer's tokens, of which the new word is one."""
        other = train_tokenizer(GENERAL + DOMAIN * 9, kind="bpe", vocab_size=420, lowercase=False)
        assert other.tokenize("a hepatitis")[-1] == "Ġhepatitis"
        (first, a), *_ = [item for item in whole_words(tokenizer).items() if f"Ġ{item[0]}" in other.get_vocab()]
        words = [f"Ġ{first}", "Ġhepatitis", "Ġit"]
        vectors = WordVectors(tuple(words), np.eye(3)[[0, 0, 1]] + 0.0, tokenizer=other.backend_tokenizer)
        larger, _ = add_words(make_model(tokenizer), tokenizer, ["hepatitis", "steatosis"], vectors=vectors)
        table = larger.get_input_embeddings().weight
        torch.testing.assert_close(table[len(tokenizer)], self.rows(tokenizer, ["hepatitis"], table[a])[0])

    def test_a_vector_of_zeros_is_none(self, tokenizer):
        vectors, _ = self.near(tokenizer)
        zero = np.where((np.array(vectors.words) == "hepatitis")[:, None], 0, vectors.vectors)
        with pytest.raises(InputError, match="none of the 1 new words"):
            add_words(make_model(tokenizer), tokenizer, ["hepatitis"], vectors=WordVectors(vectors.words, zero))

    def test_the_vector_of_unknown_words_is_none_of_a_word(self, tokenizer):
        first, far = list(whole_words(tokenizer))[:2]
        known = word_tokenizer([first, far])
        vectors = WordVectors(("[UNK]", first, far), np.eye(3), tokenizer=known)
        with pytest.raises(InputError, match="none of the 1 new words"):
            add_words(make_model(tokenizer), tokenizer, ["hepatitis"], vectors=vectors)

    def test_vectors_of_another_language_are_refused(self, tokenizer):
        with pytest.raises(InputError, match="none of the tokenizer's other tokens is among the 2 words"):
            vectors = vectors_of(hepatitis=(1, 0), Leberentzündung=(1, 0))
            add_words(make_model(tokenizer), tokenizer, ["hepatitis"], vectors=vectors)

    def test_an_encoder_decoder(self):
        tokenizer = make_tokenizer("unigram")
        vectors, (a, b) = self.near(tokenizer)
        torch.manual_seed(0)
        sizes = {"d_model": 16, "d_kv": 8, "d_ff": 16, "num_layers": 1, "num_heads": 2, "tie_word_embeddings": False}
        config = T5Config(
            vocab_size=len(tokenizer) + 3, pad_token_id=tokenizer.pad_token_id, decoder_start_token_id=0, **sizes
        )
        model = T5ForConditionalGeneration(config)
        larger, _ = add_words(model, tokenizer, ["hepatitis"], vectors=vectors)
        assert larger.config.vocab_size == config.vocab_size
        plain, _ = add_words(model, tokenizer, ["hepatitis"])
        tables = [(one.shared.weight, one.lm_head.weight) for one in (model, larger, plain)]
        for before, after, pieces in zip(*tables, strict=True):
            near = 0.6 * before[a] + 0.4 * before[b]
            torch.testing.assert_close(after[len(tokenizer)], (near + pieces[len(tokenizer)]) / 2)
            assert torch.equal(after[: len(tokenizer)], before[: len(tokenizer)])
        assert larger.encoder.embed_tokens.weight is larger.shared.weight


def test_vectors_of_a_text_follow_from_its_seed(tmp_path):
    words = [a + b + c for a in "bcdfghkl" for b in ("an", "et", "ig", "om", "ur", "aw", "ey") for c in "abdefghikl"]
    numbers = draws.integers(draws.row_keys(range(900), seed=0, stream="text"), 8, high=len(words)).tolist()
    texts = [" ".join(words[number] for number in row) for row in numbers]
    tokenizer = train_tokenizer(texts, kind="wordpiece", vocab_size=700, lowercase=True)
    first, again, other = (token_vectors(lambda: texts, tokenizer, tmp_path / "work", seed=seed) for seed in (0, 0, 1))
    assert len(first) > 400 and first.vectors.shape[1] == 100 and set(first.words) <= tokenizer.get_vocab().keys()
    assert np.array_equal(first.vectors, again.vectors) and not np.array_equal(first.vectors, other.vectors)


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    """A folder with a tiny model and its tokenizer, and one with text."""
    folder = tmp_path_factory.mktemp("start")
    tokenizer = make_tokenizer("wordpiece")
    make_model(tokenizer, max_position_embeddings=64).save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    (folder / "text.txt").write_text("\n\n".join(DOMAIN + GENERAL[:12]))
    return folder


QUIET = "--max_steps 2 --block_size 32 --report_to none --disable_tqdm true --per_device_train_batch_size 4 --bf16 false".split()


def run(start, output_dir, *options, objective="mlm"):
    words = [str(start / "model"), "--objective", objective, "--train_file", str(start / "text.txt")]
    return cli.main(["adapt", *words, "--output_dir", str(output_dir), *QUIET, *options])


class TestCommand:
    def test_it_prints_the_command_that_it_is(self, start, tmp_path, capsys):
        assert run(start, tmp_path / "out", "--weight_decay=0.02") == 0
        out = capsys.readouterr().out
        line = next(line for line in out.splitlines() if line.startswith("adapt "))
        assert f"hf-pretrain mlm --model_name_or_path {start / 'model'} --learning_rate 5e-05 " in line
        recipe = (tmp_path / "out/recipe.yaml").read_text()
        assert "learning_rate: 5.0e-05" in recipe and "weight_decay: 0.02" in recipe
        before, after = (load_file(f"{folder}/model.safetensors") for folder in (start / "model", tmp_path / "out"))
        assert before.keys() == after.keys() and any(not torch.equal(before[name], after[name]) for name in before)

    @pytest.mark.parametrize(
        ("others", "rate"),
        [
            (["--adapter", "lora"], ["--learning_rate", "0.0002"]),
            (["--adapter=lora"], ["--learning_rate", "0.0002"]),
            (["--adapter", "none"], ["--learning_rate", "5e-05"]),
            (["--learning_rate", "1e-3", "--adapter", "lora"], []),
            (["--learning_rate=1e-3"], []),
        ],
    )
    def test_defaults_go_behind_what_is_given(self, start, others, rate):
        command = adapt.expanded(adapt.AdaptArguments(model=str(start / "model")), others)
        assert command == ["mlm", "--model_name_or_path", str(start / "model"), *rate, *others]

    def test_a_recipe_goes_before_a_default(self, start, tmp_path):
        recipe = tmp_path / "mine.yaml"
        recipe.write_text("learning_rate: 1e-3\nadapter: lora\n")
        command = adapt.expanded(adapt.AdaptArguments(model=str(start / "model")), ["--config", str(recipe)])
        assert "--learning_rate" not in command

    def test_modernbert_has_its_share_of_masks(self, tmp_path):
        AutoConfig.for_model("modernbert").save_pretrained(tmp_path)
        assert "--mlm_probability 0.3" in " ".join(adapt.expanded(adapt.AdaptArguments(model=str(tmp_path)), []))

    def test_new_words_and_adapters(self, start, tmp_path, capsys):
        """Nothing of the model moves but its adapters and the rows of the new words."""
        options = ("--new_words", "auto:2", "--adapter", "lora", "--adapter_rank", "2", "--learning_rate", "0.01")
        assert run(start, tmp_path / "out", *options) == 0
        out = capsys.readouterr().out
        assert "2 get a token each: hepatitis (" in out and "of the training text before" in out
        facts = json.loads((tmp_path / "out-start/adaptation.json").read_text())
        assert facts["tokens_after"] < facts["tokens_before"]
        tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
        old = facts["first_new_token"]
        assert tokenizer("hepatitis")["input_ids"][1] == old and len(tokenizer) == old + 2
        begin, end = (load_file(tmp_path / name / "model.safetensors") for name in ("out-start", "out"))
        table = "bert.embeddings.word_embeddings.weight"
        assert torch.equal(begin[table][:old], end[table][:old])
        assert not torch.equal(begin[table][old:], end[table][old:])
        moved = {name for name in begin if not torch.equal(begin[name], end[name])}
        assert moved == {
            table,
            "cls.predictions.bias",
            *(name for name in begin if ".layer.0." in name and "weight" in name),
        } - {name for name in begin if "LayerNorm" in name}

    def test_new_words_from_a_file_of_vectors(self, start, tmp_path, caplog):
        file = tmp_path / "vectors.txt"
        file.write_text("liver 2 0 0\nthe 0 1 0\nhepatitis 1 0 0\n")
        (tmp_path / "words.txt").write_text("hepatitis\nsteatosis\n")
        options = ("--new_words", str(tmp_path / "words.txt"), "--init_embeddings", str(file))
        assert run(start, tmp_path / "out", *options) == 0
        assert "1 of 2 new words begin near known words with such vectors" in caplog.text
        tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out-start")
        ids = tokenizer.get_vocab()
        table = load_file(tmp_path / "out-start/model.safetensors")["bert.embeddings.word_embeddings.weight"]
        model = AutoModelForMaskedLM.from_pretrained(start / "model")
        pieces, _ = add_words(model, AutoTokenizer.from_pretrained(start / "model"), ["hepatitis", "steatosis"])
        plain = pieces.get_input_embeddings().weight
        torch.testing.assert_close(table[ids["hepatitis"]], (plain[ids["hepatitis"]] + table[ids["liver"]]) / 2)
        assert torch.equal(table[ids["steatosis"]], plain[ids["steatosis"]])

    def test_new_words_from_vectors_of_the_text(self, start, tmp_path, caplog):
        for name, options in (
            ("plain", ()),
            ("auto", ("--init_embeddings", "auto")),
            ("again", ("--init_embeddings", "auto")),
        ):
            assert run(start, tmp_path / name, "--new_words", "auto:2", *options) == 0
        assert "2 of 2 new words begin near known words with such vectors, 0 as the mean" in caplog.text
        plain, auto, again = (
            load_file(tmp_path / f"{name}-start/model.safetensors") for name in ("plain", "auto", "again")
        )
        table, old = "bert.embeddings.word_embeddings.weight", len(make_tokenizer("wordpiece"))
        assert torch.equal(auto[table][:old], plain[table][:old]) and len(auto[table]) == old + 2
        assert all(not torch.equal(auto[table][number], plain[table][number]) for number in (old, old + 1))
        assert all(torch.equal(auto[name], again[name]) for name in auto), "the same text gives the same rows"
        assert not (tmp_path / "auto-start/_vectors").exists()

    def test_the_start_is_used_again_by_the_same_run_alone(self, start, tmp_path, capsys):
        assert (
            run(start, tmp_path / "out", "--new_words", "auto:2", "--save_strategy", "steps", "--save_steps", "1") == 0
        )
        written = (tmp_path / "out-start/model.safetensors").stat().st_mtime_ns
        options = ("--new_words", "auto:2", "--resume_from_checkpoint", str(tmp_path / "out/checkpoint-1"))
        assert run(start, tmp_path / "out", *options) == 0
        assert (tmp_path / "out-start/model.safetensors").stat().st_mtime_ns == written
        capsys.readouterr()
        assert run(start, tmp_path / "out", "--new_words", "auto:3") == 2
        assert "is the start of another run" in capsys.readouterr().err

    @pytest.mark.parametrize("place", ["out-start", "out"])
    def test_the_start_is_replaced_with_its_run(self, start, tmp_path, capsys, place):
        assert run(start, tmp_path / "out", "--new_words", "auto:2") == 0
        before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
        (tmp_path / place / "notes.txt").write_text("precious")
        again = ("--new_words", "auto:1", "--overwrite_output_dir", "true")
        assert run(start, tmp_path / "out", *again) == 2
        assert f"{place}/notes.txt is not of a run" in capsys.readouterr().err
        (tmp_path / place / "notes.txt").unlink()
        assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before
        assert run(start, tmp_path / "out", *again) == 0
        facts = [json.loads((tmp_path / "out-start/adaptation.json").read_text())]
        assert (
            len(facts[0]["words"]) == 1 and "hepatitis" in AutoTokenizer.from_pretrained(tmp_path / "out").get_vocab()
        )

    def test_words_of_a_file(self, start, tmp_path):
        (tmp_path / "words.txt").write_text("steatosis\n")
        assert run(start, tmp_path / "out", "--new_words", str(tmp_path / "words.txt")) == 0
        tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
        assert "steatosis" in tokenizer.get_vocab() and "hepatitis" not in tokenizer.get_vocab()

    def test_another_tokenizer(self, start, tmp_path, capsys):
        options = ("--exchange_tokenizer", "wordpiece", "--exchange_vocab_size", "150", "--adapter", "lora")
        assert run(start, tmp_path / "out", *options) == 0
        tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
        model = AutoModelForMaskedLM.from_pretrained(tmp_path / "out")
        assert len(tokenizer) == model.config.vocab_size <= 150
        assert len(tokenizer.tokenize("hepatitis")) == 1
        old = AutoModelForMaskedLM.from_pretrained(start / "model")
        begin = AutoModelForMaskedLM.from_pretrained(tmp_path / "out-start")
        known = AutoTokenizer.from_pretrained(start / "model").get_vocab()["the"]
        rows = [one.get_input_embeddings().weight for one in (old, begin)]
        assert torch.equal(rows[0][known], rows[1][tokenizer.get_vocab()["the"]])
        assert not torch.equal(rows[1], model.get_input_embeddings().weight), "a table of new tokens is trained"

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            (("--new_words", "many"), "new_words='many' is no file"),
            (("--new_words", "auto:0"), "new_words=0 must be"),
            (("--new_words", "auto:2", "--exchange_tokenizer", "bpe"), "give one of the two"),
            (("--exchange_vocab_size", "9"), "exchange_vocab_size=9 has no effect without exchange_tokenizer"),
            (("--init_embeddings", "auto"), "init_embeddings='auto' has no effect without new_words"),
            (("--new_words", "auto:2", "--init_embeddings", "no-such-file.txt"), "no-such-file.txt"),
            (("--objective", "mlmm"), "did you mean 'mlm'"),
            (("--wieght_decay", "1"), "did you mean"),
            (("--new_words", "auto:2", "--streaming", "true", "--validation_fraction", "0"), "streaming=True"),
        ],
    )
    def test_what_cannot_work_is_refused(self, start, tmp_path, capsys, options, message):
        assert run(start, tmp_path / "out", *options) == 2
        assert message in capsys.readouterr().err
        assert not (tmp_path / "out").exists()

    def test_a_pair_keeps_its_parts(self, tmp_path):
        """New words of replaced token detection are words of the generator too."""
        tokenizer = make_tokenizer("wordpiece")
        sizes = [
            "--hidden_size",
            "16",
            "--num_hidden_layers",
            "1",
            "--num_attention_heads",
            "2",
            "--intermediate_size",
            "32",
        ]
        text = tmp_path / "text.txt"
        text.write_text("\n\n".join(DOMAIN))
        tokenizer.save_pretrained(tmp_path / "tokenizer")
        words = ["--train_file", str(text), "--tokenizer_name", str(tmp_path / "tokenizer"), *QUIET, *sizes]
        assert cli.main(["rtd", *words, "--output_dir", str(tmp_path / "pair")]) == 0
        extend_checkpoint(str(tmp_path / "pair"), None, ["hepatitis"], tmp_path / "larger")
        rows = [AutoConfig.from_pretrained(tmp_path / "larger" / part).vocab_size for part in ("", GENERATOR_FOLDER)]
        assert rows == [len(tokenizer) + 1] * 2
        words = ["adapt", str(tmp_path / "larger"), "--objective", "rtd", "--train_file", str(text), *QUIET]
        assert cli.main([*words, "--output_dir", str(tmp_path / "out"), "--adapter", "lora"]) == 0

    def test_a_causal_model(self, tmp_path):
        tokenizer = make_tokenizer("bpe")
        config = GPT2Config(n_embd=16, n_layer=1, n_head=2, vocab_size=len(tokenizer), n_positions=64)
        AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "model")
        tokenizer.save_pretrained(tmp_path / "model")
        (tmp_path / "text.txt").write_text("\n\n".join(DOMAIN))
        assert run(tmp_path, tmp_path / "out", "--adapter", "lora", "--new_words", "auto:1", objective="clm") == 0
        assert AutoModelForCausalLM.from_pretrained(tmp_path / "out").config.vocab_size == len(tokenizer) + 1

    def test_a_model_that_is_missing_is_asked_for(self, capsys):
        assert cli.main(["adapt", "--train_file", "text.txt", "--output_dir", "out"]) == 2
        assert "are required: --model" in capsys.readouterr().err


@pytest.mark.slow
class TestOnRealText:
    """A small model of docstrings, without the words that are new to it later."""

    def word_loss(self, model, tokenizer, words, texts):
        """Mean loss of masked new words in texts, in nats."""
        numbers = {tokenizer.get_vocab()[word] for word in words}
        encoded = encode_words(tokenizer, texts)
        asked = [text._replace(scored=np.flatnonzero(np.isin(text.ids, list(numbers)))) for text in encoded]
        asked = [text for text in asked if len(text.scored)]
        parts = masked_scores(model, tokenizer, asked, within_word="l2r", batch_size=64)
        scores = np.concatenate([part.log_probabilities for part in parts])
        assert len(scores) > 100
        return -scores.mean()

    def test_rows_from_vectors_know_more_than_drawn_ones(self, tmp_path):
        texts = list(docstring_documents(max_bytes=1_500_000))
        held_out = [text[begin : begin + 120] for text in texts[:60] for begin in range(0, len(text), 120)]
        texts = texts[60:]
        tokenizer = train_tokenizer(texts, kind="wordpiece", vocab_size=2000, lowercase=True)
        tokenizer.save_pretrained(tmp_path / "tokenizer")
        (tmp_path / "text.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in texts))
        options = {"tokenizer_name": tmp_path / "tokenizer", "hidden_size": 64, "num_hidden_layers": 2, "seed": 0}
        options |= {
            "num_attention_heads": 2,
            "intermediate_size": 128,
            "max_steps": 400,
            "block_size": 64,
            "bf16": False,
        }
        options |= {
            "per_device_train_batch_size": 32,
            "learning_rate": 2e-3,
            "report_to": "none",
            "disable_tqdm": True,
        }
        words = ["--train_file", str(tmp_path / "text.jsonl"), "--output_dir", str(tmp_path / "model")]
        words += [str(word) for name, value in options.items() for word in (f"--{name}", value)]
        assert cli.main(["mlm", *words]) == 0
        model = AutoModelForMaskedLM.from_pretrained(tmp_path / "model")
        words = [word.text for word in choose_words(texts, tokenizer, 150)]
        vectors = token_vectors(lambda: texts, extended_tokenizer(tokenizer, words), tmp_path / "work", seed=0)
        near, extended = add_words(model, tokenizer, words, vectors=vectors)
        drawn = copy.deepcopy(near)
        with torch.no_grad():
            table, old = drawn.get_input_embeddings().weight, len(tokenizer)
            torch.manual_seed(0)
            # As rows of a fresh token are drawn elsewhere: spread as those that are there.
            table[old:] = torch.randn_like(table[old:]) * table[:old].std(0) + table[:old].mean(0)
        losses = [self.word_loss(one, extended, words, held_out) for one in (near, drawn)]
        assert losses[0] < losses[1] - 0.4, losses
