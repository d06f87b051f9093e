"""Word vectors: one folder for three libraries, and what words answer."""

import gzip
import shutil

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModel, AutoTokenizer, BertConfig, BertModel

from hf_pretrain import SentenceModules, StaticEmbeddingModel, WordVectors, encode, text_vectors
from hf_pretrain.errors import InputError
from hf_pretrain.vectors.folder import analogy_scores
from hf_pretrain.vectors.formats import write_vectors

WORDS = tuple(f"w{row}" for row in range(200))
KNOWN = [" ".join(WORDS[row % 199] for row in range(length, 3 * length)) for length in (1, 2, 3, 17, 400)] + ["W7, w8"]


def vectors(*, weighted=False, seed=0, **options):
    rng = np.random.default_rng(seed)
    table = rng.standard_normal((200, 16)).astype(np.float32)
    weights = rng.random(200).astype(np.float32) + 0.1 if weighted else None
    return WordVectors((*WORDS[:199], ","), table, weights=weights, **options)


def saved(folder, *, normalize=False, weighted=False):
    vectors(weighted=weighted).save(folder, method="test", training={"window": 5}, lowercase=True, normalize=normalize)
    return str(folder)


def auto_vectors(folder, texts):
    model, tokenizer = AutoModel.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    with torch.no_grad():
        return model(**tokenizer(texts, padding=True, return_tensors="pt")).pooler_output.numpy()


def by_hand(texts, *, weighted):
    found = vectors(weighted=weighted)
    table = found.vectors if not weighted else found.vectors * found.weights[:, None]
    rows = [[found.find(word) for word in text.replace(",", " ,").split()] for text in texts]
    return np.stack([table[[row for row in text if row is not None]].mean(axis=0) for text in rows])


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("normalize", [False, True])
def test_sentence_transformers_gives_the_same_bits(normalize, weighted, tmp_path):
    library = pytest.importorskip("sentence_transformers")
    folder = saved(tmp_path, normalize=normalize, weighted=weighted)
    theirs = library.SentenceTransformer(folder, device="cpu")
    # Unknown words count as zero vectors in both.
    texts = [*KNOWN, "w1 unknown w2", "unknown", ""]
    assert np.array_equal(auto_vectors(folder, texts), theirs.encode(texts))
    expected = by_hand(KNOWN[:4], weighted=weighted)
    expected = expected / np.linalg.norm(expected, axis=1, keepdims=True) if normalize else expected
    np.testing.assert_allclose(auto_vectors(folder, KNOWN[:4]), expected, atol=1e-6)


@pytest.mark.parametrize("weighted", [False, True])
def test_model2vec_gives_the_same_bits(weighted, tmp_path):
    model2vec = pytest.importorskip("model2vec")
    folder = saved(tmp_path / "plain", weighted=weighted)
    theirs = model2vec.StaticModel.from_pretrained(folder)
    long = " ".join(WORDS[:100] * 20)  # no text is cut
    assert np.array_equal(auto_vectors(folder, [*KNOWN, long]), theirs.encode([*KNOWN, long]))
    # It leaves unknown words out of the mean: the same direction, and another length.
    ours, other = auto_vectors(folder, ["w1 unknown w2", "unknown"]), theirs.encode(["w1 unknown w2", "unknown"])
    np.testing.assert_allclose(ours[0] * 3 / 2, other[0], atol=1e-6)
    assert not ours[1].any() and not other[1].any()
    folder = saved(tmp_path / "unit", normalize=True, weighted=weighted)
    texts = [*KNOWN, "w1 unknown w2"]
    theirs = model2vec.StaticModel.from_pretrained(folder)
    np.testing.assert_allclose(auto_vectors(folder, texts), theirs.encode(texts), atol=2e-7)


def test_the_librarys_functions_take_it(tmp_path):
    folder = saved(tmp_path)
    model, tokenizer = AutoModel.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    texts = ["w1 w2 w3", "w9", "w4 w5"]
    expected = auto_vectors(folder, texts)
    np.testing.assert_allclose(encode(model, tokenizer, texts), expected, atol=1e-6)
    np.testing.assert_allclose(encode(model, tokenizer, texts, layer=0), expected, atol=1e-6)
    np.testing.assert_allclose(text_vectors(model, tokenizer, texts, modules=SentenceModules()), expected, atol=1e-6)


def test_a_folder_opens_as_it_was_saved(tmp_path):
    given = vectors(counts=np.arange(200)[::-1])
    given.save(tmp_path, method="glove", training={"x_max": np.float32(10)}, lowercase=False)
    found = WordVectors.open(tmp_path)
    assert found.words == given.words and np.array_equal(found.vectors, given.vectors)
    assert np.array_equal(found.counts, given.counts) and found.weights is None
    model = AutoModel.from_pretrained(tmp_path)
    assert type(model) is StaticEmbeddingModel and not model.embeddings[:2].any()
    assert np.array_equal(model.embeddings[2:].detach().numpy(), given.vectors)
    assert (model.config.method, model.config.training, model.config.lowercase) == ("glove", {"x_max": 10.0}, False)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    assert tokenizer("w0 W0")["input_ids"] == [2, 1] and "token_type_ids" not in tokenizer("w0")
    assert (tokenizer.pad_token_id, tokenizer.unk_token_id, len(tokenizer)) == (0, 1, 202)
    # Saved again, it is the same; without counts, no old ones stay.
    WordVectors(found.words, found.vectors, tokenizer=found.tokenizer).save(
        tmp_path, method="glove", training={}, lowercase=False
    )
    again = WordVectors.open(tmp_path)
    assert again.words == given.words and np.array_equal(again.vectors, given.vectors) and again.counts is None


def test_weights_are_in_the_table_and_divided_out(tmp_path):
    given = vectors(weighted=True)
    found = WordVectors.open(saved(tmp_path, weighted=True))
    assert np.array_equal(found.weights, given.weights)
    np.testing.assert_allclose(found.vectors, given.vectors, rtol=2e-7)
    table = AutoModel.from_pretrained(tmp_path).embeddings[2:].detach().numpy()
    assert np.array_equal(table, given.vectors * given.weights[:, None])


def test_a_tokenizer_of_its_own_gives_the_ids(tmp_path):
    vocabulary = {"b": 0, "[PAD]": 1, "a": 2, "[UNK]": 3, "c": 4}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    table = np.array([[1, 0], [2, 0], [3, 1]], dtype=np.float32)
    WordVectors(("a", "b", "c"), table, np.array([9, 8, 7]), tokenizer=tokenizer).save(
        tmp_path, method="x", training={}, lowercase=False
    )
    assert AutoModel.from_pretrained(tmp_path).embeddings.tolist() == [[2, 0], [0, 0], [1, 0], [0, 0], [3, 1]]
    assert auto_vectors(str(tmp_path), ["a b", "c"]).tolist() == [[1.5, 0], [3, 1]]
    found = WordVectors.open(tmp_path)
    assert found.words == ("b", "a", "c") and found.vectors.tolist() == [[2, 0], [1, 0], [3, 1]]
    assert found.counts.tolist() == [8, 9, 7]
    for words in (("a", "b"), ("a", "b", "c", "d")):
        with pytest.raises(InputError, match="tokenizer and words differ: '[cd]'"):
            WordVectors(words, np.ones((len(words), 2)), tokenizer=tokenizer).save(
                tmp_path, method="x", training={}, lowercase=False
            )


def test_files_and_folders_of_others_open(tmp_path):
    given = vectors()
    for name, kind in (("x.txt", "glove"), ("x.bin", "word2vec"), ("x.vec", "word2vec_binary"), ("x.gz", "fasttext")):
        found = WordVectors.open(write_vectors(tmp_path / name, given.words, given.vectors, kind=kind))
        assert found.words == given.words and np.array_equal(found.vectors, given.vectors)
    shutil.move(tmp_path / "x.gz", tmp_path / "unnamed")  # the content counts
    assert (
        gzip.open(tmp_path / "unnamed").read(3) == b"200"
        and WordVectors.open(tmp_path / "unnamed").words == given.words
    )


def test_a_folder_of_sentence_transformers_opens(tmp_path):
    library = pytest.importorskip("sentence_transformers")
    library.SentenceTransformer(saved(tmp_path / "ours", weighted=True), device="cpu").save(str(tmp_path / "theirs"))
    found, given = WordVectors.open(tmp_path / "theirs"), vectors(weighted=True)
    assert found.words == given.words
    assert np.array_equal(found.vectors, given.vectors * given.weights[:, None])


def test_what_is_no_word_vectors_is_refused(tmp_path):
    with pytest.raises(InputError, match="is no file, and no folder or repository"):
        WordVectors.open(tmp_path / "nowhere")
    folder = saved(tmp_path / "bert")
    BertModel(
        BertConfig(hidden_size=4, num_hidden_layers=1, num_attention_heads=1, intermediate_size=4)
    ).save_pretrained(folder)
    with pytest.raises(InputError, match="no table of static vectors"):
        WordVectors.open(folder)
    folder = saved(tmp_path / "cut")
    weights = tmp_path / "cut" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(InputError, match="copy it again"):
        WordVectors.open(folder)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"words": ("a", "a")}, "'a' twice"),
        ({"words": ("a",)}, "for 1 words"),
        ({"vectors": np.full((2, 2), np.nan)}, "not finite"),
        ({"counts": [1]}, "counts has the shape"),
        ({"weights": [1.0, 0.0]}, "above 0"),
    ],
)
def test_wrong_vectors_are_refused(options, message):
    with pytest.raises(InputError, match=message):
        WordVectors(**({"words": ("a", "b"), "vectors": np.eye(2)} | options))
    special = WordVectors(("a", "[UNK]"), np.eye(2))
    with pytest.raises(InputError, match=r"\[UNK\]"):
        special.save("nowhere", method="x", training={}, lowercase=False)


ROYAL = WordVectors(
    ("king", "man", "woman", "queen", "apple", "pear", "zero"),
    np.array([[1, 1, 0], [1, 0, 0], [1, 0, 1], [1, 1, 1], [0, -1, -1], [0, -2, -1.9], [0, 0, 0]], dtype=np.float32),
)


def test_neighbours():
    assert [word for word, _ in ROYAL.most_similar("apple", top=2)] == ["pear", "man"]
    assert ROYAL.most_similar("king", top=1) == [("queen", pytest.approx(2 / 6**0.5))]
    # A vector is no word: its own word is a neighbour, the first of equal ones.
    assert ROYAL.most_similar(np.array([5, 5, 0]), top=1) == [("king", pytest.approx(1))]
    assert [word for word, _ in ROYAL.most_similar("king", restrict=3)] == ["man", "woman"]
    twins = WordVectors(("c", "b", "a"), np.ones((3, 2)))
    assert [word for word, _ in twins.most_similar("b")] == ["c", "a"]
    assert all(score == 0 for _, score in ROYAL.most_similar("zero"))
    with pytest.raises(InputError, match="give 3 finite numbers"):
        ROYAL.most_similar(np.ones(2))
    with pytest.raises(InputError, match="word='prince' is none of the 7"):
        ROYAL.most_similar("prince")


@pytest.mark.parametrize("method", ["add", "multiply"])
def test_analogies(method):
    assert ROYAL.analogy("man", "king", "woman", method=method, top=1)[0][0] == "queen"
    answers = [word for word, _ in ROYAL.analogy("man", "king", "woman", method=method)]
    assert len(answers) == 4 and not {"man", "king", "woman"} & set(answers)
    assert ROYAL.analogy("man", "king", "woman", method=method, restrict=3) == []
    with pytest.raises(InputError, match="method='divide'"):
        ROYAL.analogy("man", "king", "woman", method="divide")


def test_the_scores_of_analogies():
    a, b, c = (np.array([value], dtype=np.float32) for value in (0.2, 0.6, -0.4))
    assert analogy_scores(a.copy(), b.copy(), c.copy())[0] == pytest.approx(0.6 - 0.2 - 0.4, abs=1e-6)
    expected = (1.6 / 2) * (0.6 / 2) / (1.2 / 2 + 0.001)
    assert analogy_scores(a, b, c, method="multiply")[0] == pytest.approx(expected)


def test_the_word_that_does_not_match():
    assert ROYAL.doesnt_match(["king", "queen", "apple", "man"]) == "apple"
    with pytest.raises(InputError, match="number of words=2"):
        ROYAL.doesnt_match(["king", "man"])


def test_words_are_found_in_the_case_of_the_vocabulary():
    assert "KING" in ROYAL and np.array_equal(ROYAL.vector("King"), ROYAL.vectors[0]) and "prince" not in ROYAL
    cased = WordVectors(("Paris", "paris", "rome"), np.eye(3))
    assert cased.find("Paris") == 0 and cased.find("paris") == 1 and cased.find("Rome") is None
    with pytest.raises(InputError, match="did you mean 'rome'"):
        cased.vector("Rome")
