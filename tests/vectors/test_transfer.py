"""Word tables of new models from word vectors, and of trained models for another vocabulary."""

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForMaskedLM,
    AutoModelForSeq2SeqLM,
    BertTokenizer,
    PreTrainedTokenizerFast,
)

from hf_pretrain.data.documents.tokenizers import train_tokenizer
from hf_pretrain.errors import InputError
from hf_pretrain.modeling.configuration import ModelArguments, load_or_build
from hf_pretrain.objectives.encoder.modeling import EncoderForPreTraining
from hf_pretrain.objectives.replaced_token_detection.building import (
    ReplacedTokenDetectionModelArguments,
    build_model,
)
from hf_pretrain.vectors.folder import WordVectors
from hf_pretrain.vectors.transfer import (
    shared_tokens,
    sparsemax,
    start_from_vectors,
    table_from_vectors,
    token_texts,
    transfer_vocabulary,
)

SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
ROBERTA = {"bos_token": "<s>", "eos_token": "</s>", "cls_token": "<s>", "sep_token": "</s>", "unk_token": "<unk>"}
ROBERTA |= {"pad_token": "<pad>", "mask_token": "<mask>"}
ROBERTA_NAMES = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]


def wordpiece(*tokens, lowercase=True):
    names = [*SPECIAL, *tokens]
    return BertTokenizer(vocab={name: number for number, name in enumerate(names)}, do_lower_case=lowercase)


def fast(backend):
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, **ROBERTA)
    assert tokenizer.pad_token_id == 1
    return tokenizer


def byte_level(*tokens):
    names = [*ROBERTA_NAMES, *sorted(pre_tokenizers.ByteLevel.alphabet()), *tokens]
    backend = Tokenizer(models.BPE({name: number for number, name in enumerate(names)}, []))
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    return fast(backend)


def sentencepiece(*tokens):
    pieces = [(name, 0.0) for name in ROBERTA_NAMES] + [(token, -1.0 - n / 100) for n, token in enumerate(tokens)]
    backend = Tokenizer(models.Unigram(pieces, unk_id=3))
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    return fast(backend)


def model_for(tokenizer, kind="bert", auto_class=AutoModelForMaskedLM, **changes):
    torch.manual_seed(0)
    roles = ("pad", "bos", "eos", "cls", "sep")
    ids = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in roles}
    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 12}
    sizes |= ids | {"vocab_size": len(tokenizer), "max_position_embeddings": 40} | changes
    config = AutoConfig.for_model(kind, **sizes)
    model = auto_class.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    return model


def table(model):
    return model.get_input_embeddings().weight.detach().numpy().copy()


# Texts of tokens


def test_a_token_stands_for_the_same_text_in_each_spelling():
    texts = []
    for tokenizer, word, piece in (
        (wordpiece("a", "the", "##ing"), "the", "##ing"),
        (byte_level("Ġthe", "ing"), "Ġthe", "ing"),
        (sentencepiece("▁a", "▁the", "ing"), "▁the", "ing"),
    ):
        known, vocabulary = token_texts(tokenizer), tokenizer.get_vocab()
        assert not known.keys() & set(tokenizer.all_special_ids)
        assert len(known) == len(tokenizer) - len(set(tokenizer.all_special_ids))
        texts.append((known[vocabulary[word]], known[vocabulary[piece]]))
    assert texts == [(("the", True), ("ing", False))] * 3


def test_tokens_are_paired_by_what_they_stand_for():
    new = wordpiece("a", "the", "##ing", "é", "paris", "##the", lowercase=False)
    for old in (byte_level("Ġthe", "ing", "ĠÃ©", "ĠParis"), sentencepiece("▁a", "▁the", "ing", "▁é", "▁Paris")):
        pairs = shared_tokens(old, new)
        named = {new.convert_ids_to_tokens(n): old.convert_ids_to_tokens(match) for n, match in pairs.items()}
        prefix = "Ġ" if "Ġthe" in old.get_vocab() else "▁"
        accent = "ĠÃ©" if prefix == "Ġ" else "▁é"
        for token, partner in {"the": f"{prefix}the", "##ing": "ing", "é": accent, "paris": f"{prefix}Paris"}.items():
            assert named[token] == partner
        assert "##the" not in named
        roles = {"[PAD]": "<pad>", "[UNK]": "<unk>", "[CLS]": "<s>", "[SEP]": "</s>", "[MASK]": "<mask>"}
        assert roles.items() <= named.items()
        assert shared_tokens(new, old)[old.get_vocab()["<mask>"]] == new.mask_token_id


def test_case_counts_where_it_can():
    old = wordpiece("a", "The", "the", "PARIS", "Paris", lowercase=False)
    new = wordpiece("a", "the", "The", "THE", "paris", lowercase=False)
    names = {new.convert_ids_to_tokens(n): old.convert_ids_to_tokens(m) for n, m in shared_tokens(old, new).items()}
    assert (names["the"], names["The"], names["THE"], names["paris"]) == ("the", "The", "the", "PARIS")


def test_bytes_that_are_no_character_are_paired_by_their_spelling():
    one, other = byte_level("Ġthe"), byte_level("ing", "Ġthe")
    pairs, names = shared_tokens(one, other), one.get_vocab()
    for byte in ("Ã", "ã", "¢"):
        assert pairs[other.get_vocab()[byte]] == names[byte]
    # Other letters of the spelling are other bytes, not another case.
    one, other = byte_level("Ġã"), byte_level("ĠÃ")
    assert other.get_vocab()["ĠÃ"] not in shared_tokens(one, other)


# FOCUS


def test_sparsemax():
    rng = np.random.default_rng(0)
    scores = rng.uniform(-1, 1, (7, 900))
    scores[3] = 0.25  # all are in the support
    shares = sparsemax(scores)
    np.testing.assert_allclose(shares.sum(1), 1)
    assert (shares >= 0).all() and (shares[[0, 1, 2, 4, 5, 6]] > 0).sum(1).max() < 100
    np.testing.assert_allclose(shares[3], 1 / 900)
    # Nearest point of the simplex: all scores in the support are lowered by the same threshold, the others lie below it.
    for row, share in zip(scores, shares, strict=True):
        thresholds = (row - share)[share > 0]
        assert np.ptp(thresholds) < 1e-9 and row[share == 0].max(initial=-9) <= thresholds[0]
    np.testing.assert_allclose(sparsemax(np.array([[1.0, 0.0, -1.0], [0.6, 0.2, -0.5]])), [[1, 0, 0], [0.7, 0.3, 0]])


@pytest.fixture(scope="module")
def pair():
    old = wordpiece("a", "the", "fox", "dog", "##s", "cat", "tree")
    new = wordpiece("dog", "a", "wolf", "##s", "fox", "puma", "new", "blank")
    return old, new


def auxiliary():
    """Of the new tokenizer's tokens: "wolf" is as "dog", "puma" between "fox" and "a", "new" and "[MASK]" have none."""
    eye = np.eye(6, dtype=np.float32)
    vectors = {"dog": eye[0], "a": 3 * eye[1], "##s": eye[2], "fox": eye[3], "wolf": 2 * eye[0]}
    vectors |= {"puma": 0.8 * eye[3] + 0.6 * eye[1], "blank": 0 * eye[0], "elsewhere": eye[5], "[CLS]": eye[4]}
    return WordVectors(tuple(vectors), np.stack(list(vectors.values())))


@pytest.mark.parametrize("method", ["focus", "mean", "random"])
@pytest.mark.parametrize("tied", [True, False])
def test_shared_rows_are_copied_and_outputs_follow(pair, method, tied):
    old, new = pair
    model = model_for(old, tie_word_embeddings=tied)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    moved = transfer_vocabulary(model, old, new, auxiliary(), method=method)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert moved.config.vocab_size == len(new) and not moved.training
    decoder = moved.get_output_embeddings()
    assert (decoder.weight is moved.get_input_embeddings().weight) == tied
    names = {"[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "dog", "a", "##s", "fox"}
    ours, theirs = new.get_vocab(), old.get_vocab()
    rows, matches = [ours[name] for name in names], [theirs[name] for name in names]
    own = model.get_output_embeddings()
    assert np.array_equal(table(moved)[rows], table(model)[matches])
    assert torch.equal(decoder.weight[rows], own.weight[matches]) and torch.equal(
        decoder.bias[rows], own.bias[matches]
    )
    with torch.no_grad():
        text = "a fox dogs"
        logits = model(**old(text, return_tensors="pt")).logits[..., matches]
        torch.testing.assert_close(moved(**new(text, return_tensors="pt")).logits[..., rows], logits)


def test_a_new_token_is_a_sparse_mean_of_shared_ones(pair):
    old, new = pair
    model = model_for(old, tie_word_embeddings=False)
    moved = transfer_vocabulary(model, old, new, auxiliary())
    ours, theirs = new.get_vocab(), old.get_vocab()
    # Cosines of puma: fox .8, a .6, others 0; sparsemax lowers both by .2.
    for mine, its in (
        (table(moved), table(model)),
        (moved.get_output_embeddings().weight.detach().numpy(), model.get_output_embeddings().weight.detach().numpy()),
        (moved.get_output_embeddings().bias.detach().numpy(), model.get_output_embeddings().bias.detach().numpy()),
    ):
        np.testing.assert_allclose(mine[ours["wolf"]], its[theirs["dog"]], rtol=1e-6)
        expected = 0.6 * its[theirs["fox"]] + 0.4 * its[theirs["a"]]
        np.testing.assert_allclose(mine[ours["puma"]], expected, rtol=1e-5, atol=1e-7)


def test_a_token_without_an_auxiliary_vector_is_drawn(pair):
    old, new = pair
    model = model_for(old)
    ours = new.get_vocab()
    one, same, other, drawn = (
        table(transfer_vocabulary(model, old, new, auxiliary(), method=method, seed=seed))
        for method, seed in (("focus", 0), ("focus", 0), ("focus", 1), ("random", 0))
    )
    rows = [ours["new"], ours["blank"]]
    assert np.array_equal(one, same) and np.array_equal(one[rows], drawn[rows])
    assert not np.isclose(one[rows], other[rows]).any() and not np.isclose(one[rows[0]], one[rows[1]]).any()


def test_mean_and_random():
    old = wordpiece("a", "fox")
    new = wordpiece("a", *(f"w{number}" for number in range(4000)))
    model = model_for(old)
    with torch.no_grad():
        model.get_input_embeddings().weight[:, 2] += 5
        model.get_input_embeddings().weight[:, 3] *= 9
    known = table(model)
    fresh = new.convert_tokens_to_ids([f"w{number}" for number in range(4000)])
    rows = table(transfer_vocabulary(model, old, new, method="mean"))[fresh]
    np.testing.assert_allclose(rows, np.broadcast_to(known.mean(0), rows.shape), rtol=1e-5, atol=1e-6)
    rows = table(transfer_vocabulary(model, old, new, method="random"))[fresh]
    np.testing.assert_allclose(rows.std(0), known.std(0), rtol=0.06)
    assert (np.abs(rows.mean(0) - known.mean(0)) < 5 * known.std(0) / 4000**0.5).all()


@pytest.mark.parametrize("kind", ["bert", "roberta", "modernbert", "deberta-v2", "electra"])
@pytest.mark.parametrize("auto_class", [AutoModel, AutoModelForMaskedLM])
def test_other_architectures_and_ids(kind, auto_class):
    old, new = byte_level("Ġthe", "ing"), sentencepiece("▁dog", "▁the", "ing")
    model = model_for(old, kind, auto_class)
    moved = transfer_vocabulary(model, old, new, method="mean")
    assert type(moved) is type(model) and moved.config.pad_token_id == new.pad_token_id
    assert np.array_equal(table(moved)[new.get_vocab()["▁the"]], table(model)[old.get_vocab()["Ġthe"]])
    moved(**{k: v for k, v in new("the dog", return_tensors="pt").items() if k != "token_type_ids"})


@pytest.mark.parametrize("method", ["focus", "mean", "random"])
def test_a_bias_with_its_tokens_in_columns(pair, method):
    old, new = pair
    sizes = {"d_model": 8, "encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 8, "decoder_ffn_dim": 8}
    sizes |= {"encoder_attention_heads": 2, "decoder_attention_heads": 2}
    model = model_for(old, "bart", AutoModelForSeq2SeqLM, **sizes, decoder_start_token_id=2)
    model.final_logits_bias.copy_(torch.arange(float(len(old)))[None])
    moved = transfer_vocabulary(model, old, new, auxiliary(), method=method)
    ours, theirs = new.get_vocab(), old.get_vocab()
    bias = moved.final_logits_bias
    assert bias.shape == (1, len(new))
    assert [bias[0, ours[name]].item() for name in ("dog", "a", "fox")] == [theirs["dog"], theirs["a"], theirs["fox"]]
    mean = {"focus": 0.6 * theirs["fox"] + 0.4 * theirs["a"], "mean": (len(old) - 1) / 2}
    if method in mean:
        assert bias[0, ours["puma"]].item() == pytest.approx(mean[method])


def test_special_ids_of_the_configuration_are_the_new_ones():
    old, new = wordpiece("a", "the"), sentencepiece("▁a", "▁the")
    moved = transfer_vocabulary(model_for(old), old, new, method="random")
    config = moved.config
    assert (config.pad_token_id, config.cls_token_id, config.sep_token_id) == (1, 0, 2)


def test_what_cannot_be_transferred_is_refused(pair):
    old, new = pair
    with pytest.raises(InputError, match="auxiliary=None"):
        transfer_vocabulary(model_for(old), old, new)
    with pytest.raises(InputError, match="none of its 1 words"):
        transfer_vocabulary(model_for(old), old, new, WordVectors(("wolf",), np.ones((1, 4))))
    with pytest.raises(InputError, match="method='best'"):
        transfer_vocabulary(model_for(old), old, new, method="best")
    roberta = byte_level("Ġthe")
    with pytest.raises(InputError, match="padding token 0, and RobertaForMaskedLM numbers its positions from token 1"):
        transfer_vocabulary(model_for(roberta, "roberta"), roberta, new, method="mean")


# Word tables of new models


def words(width=8, *, counts=(50, 30, 10, 5, 5), scale=7.0):
    names = ("the", "foxes", "dogs", "unfit", "zebra")
    vectors = np.random.default_rng(3).normal(0, scale, (5, width))
    return WordVectors(names, vectors, counts=None if counts is None else np.array(counts))


def pieces_tokenizer():
    return wordpiece("the", "The", "fox", "##es", "dog", "##s", "un", "##fit", "lonely", lowercase=False)


@pytest.mark.parametrize("tokenizer", [pieces_tokenizer(), None])
def test_rows_by_hand(tokenizer):
    """WordPiece, and byte-level BPE trained on the words, where "foxes" is a token."""
    vectors, is_wordpiece = words(), tokenizer is not None
    if not is_wordpiece:
        tokenizer = train_tokenizer(["the foxes dogs the foxes"] * 9, kind="bpe", vocab_size=300, min_frequency=1)
    model = model_for(tokenizer)
    before = table(model)
    report = table_from_vectors(model, tokenizer, vectors)
    after, ids = table(model), tokenizer.get_vocab()
    the, foxes, dogs, unfit, _ = vectors.vectors
    if is_wordpiece:
        expected = {"the": the, "The": the, "fox": foxes, "##es": foxes, "dog": dogs, "##s": dogs, "un": unfit}
        expected["##fit"] = unfit
        assert report == (2, 6, len(tokenizer) - 8) and report.found == 8 / len(tokenizer)
    else:
        expected = {"Ġthe": the, "Ġfoxes": foxes, "Ġdogs": dogs}
    new = np.stack(list(expected.values()))
    rows = [ids[token] for token in expected]
    factors = after[rows] / new
    np.testing.assert_allclose(factors, factors[0, 0], rtol=1e-4)
    kept = np.setdiff1d(np.arange(len(before)), rows)
    if is_wordpiece:
        assert after[rows].std() == pytest.approx(before.std(), rel=1e-4)
        assert np.array_equal(after[kept], before[kept])
    assert np.array_equal(after[tokenizer.all_special_ids], before[tokenizer.all_special_ids])


@pytest.mark.parametrize(("counts", "share"), [((9, 1), 0.9), (None, 2 / 3)])
def test_a_piece_is_the_mean_of_its_words_by_how_often_they_occur(counts, share):
    tokenizer = wordpiece("dog", "##s", "cat")
    vectors = WordVectors(
        ("dogs", "cats"), np.random.default_rng(0).normal(size=(2, 8)), counts=counts and np.array(counts)
    )
    model = model_for(tokenizer)
    table_from_vectors(model, tokenizer, vectors)
    dog, cat, s = (table(model)[tokenizer.get_vocab()[token]] for token in ("dog", "cat", "##s"))
    np.testing.assert_allclose(s, share * dog + (1 - share) * cat, rtol=1e-4, atol=1e-7)


def test_a_word_that_is_a_token_is_no_piece_of_others():
    tokenizer = wordpiece("dog", "##s")
    vectors = WordVectors(("dogs", "dog"), np.random.default_rng(0).normal(size=(2, 8)))
    model = model_for(tokenizer)
    table_from_vectors(model, tokenizer, vectors)
    dog, s = (table(model)[tokenizer.get_vocab()[token]] for token in ("dog", "##s"))
    assert np.ptp(dog / vectors.vectors[1]) < 1e-5 and np.ptp(s / vectors.vectors[0]) < 1e-5


def test_wider_vectors_are_reduced_and_narrower_ones_refused():
    tokenizer = wordpiece("a", *(f"w{number}" for number in range(30)))
    names = tuple(f"w{number}" for number in range(30))
    vectors = np.random.default_rng(0).normal(size=(30, 12)) * np.array([9] * 8 + [1e-3] * 4)
    model = model_for(tokenizer)
    table_from_vectors(model, tokenizer, WordVectors(names, vectors))
    rows = table(model)[[tokenizer.get_vocab()[name] for name in names]]
    # Eight components hold all of it: distances are kept, up to one factor.
    apart = [np.linalg.norm(each[:, None] - each, axis=-1)[~np.eye(30, dtype=bool)] for each in (rows, vectors)]
    np.testing.assert_allclose(apart[0] / apart[1], (apart[0] / apart[1])[0], rtol=1e-3)
    for wrong in (WordVectors(names, vectors[:, :7]), WordVectors(names[:5], vectors[:5])):
        with pytest.raises(InputError, match="8 wide"):
            table_from_vectors(model, tokenizer, wrong)


def test_vectors_of_another_tokenizers_tokens():
    old, new = byte_level("Ġthe", "ing"), wordpiece("a", "the", "##ing", "dog")
    names = [name for name in old.get_vocab() if name not in old.all_special_tokens]
    drawn = np.random.default_rng(0).normal(size=(len(names), 8)).astype(np.float32)
    model = model_for(new)
    before = table(model)
    report = table_from_vectors(model, new, WordVectors(tuple(names), drawn, tokenizer=old.backend_tokenizer))
    ids, after = new.get_vocab(), table(model)
    rows = {"the": "Ġthe", "##ing": "ing"}
    factors = [after[ids[mine]] / drawn[names.index(its)] for mine, its in rows.items()]
    np.testing.assert_allclose(factors, factors[0][0], rtol=1e-4)
    assert np.array_equal(after[ids["dog"]], before[ids["dog"]]) and report.words == 2


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("vectors")
    known = words(width=16)
    fillers = np.random.default_rng(4).normal(size=(20, 16))
    names = (*known.words, *(f"filler{number}" for number in range(20)))
    WordVectors(names, np.concatenate([known.vectors, fillers])).save(
        path, method="glove", training={}, lowercase=True
    )
    return str(path)


SIZES = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64}


def aligned(model, tokenizer):
    rows = table(model)[[tokenizer.get_vocab()["the"], tokenizer.get_vocab()["fox"]]]
    factors = rows / words(width=16).vectors[:2]
    return np.allclose(factors, factors[0, 0], rtol=1e-4)


def test_a_new_model_starts_from_the_vectors(folder, caplog):
    tokenizer = pieces_tokenizer()
    args = ModelArguments(init_embeddings=folder, **SIZES)
    model = load_or_build(AutoModelForMaskedLM, args, tokenizer)
    assert aligned(model, tokenizer)
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    assert "57.1% of the word table" in caplog.text
    assert not aligned(load_or_build(AutoModelForMaskedLM, ModelArguments(**SIZES), tokenizer), tokenizer)
    assert aligned(EncoderForPreTraining.from_arguments(args, tokenizer).model, tokenizer)


@pytest.mark.parametrize("sharing", ["tied", "gdes", "none"])
def test_generator_and_discriminator_start_from_the_vectors(folder, sharing):
    tokenizer = pieces_tokenizer()
    args = ReplacedTokenDetectionModelArguments(
        init_embeddings=folder, model_type="bert", generator_size=0.5, embedding_sharing=sharing, **SIZES
    )
    model = build_model(args, tokenizer)
    if sharing != "none":
        assert aligned(model.generator, tokenizer)
    if sharing != "gdes":
        assert aligned(model.discriminator, tokenizer)
    else:
        part, state = model.stock_part("discriminator", None)
        rows = state["bert.embeddings.word_embeddings.weight"][tokenizer.get_vocab()["the"]].detach().numpy()
        assert np.ptp(rows / words(width=16).vectors[0]) < 1e-4


def test_vectors_of_other_words_are_refused(tmp_path):
    WordVectors(("слово", "язык"), np.ones((2, 8))).save(tmp_path, method="glove", training={}, lowercase=True)
    tokenizer = pieces_tokenizer()
    with pytest.raises(InputError, match="none of its 2 words"):
        start_from_vectors(model_for(tokenizer), tokenizer, str(tmp_path))


def test_vectors_for_a_model_that_is_there_are_refused(folder):
    with pytest.raises(InputError, match="leave out one of the two"):
        ModelArguments(init_embeddings=folder, model_name_or_path="bert-base-uncased")
    tokenizer = pieces_tokenizer()
    with pytest.raises(InputError, match="has a word table: leave it out"):
        load_or_build(
            AutoModelForMaskedLM, ModelArguments(init_embeddings=folder), tokenizer, stock=model_for(tokenizer)
        )


def test_a_model_without_values_only_checks_the_width(folder):
    tokenizer = pieces_tokenizer()
    with torch.device("meta"):
        model = load_or_build(AutoModelForMaskedLM, ModelArguments(init_embeddings=folder, **SIZES), tokenizer)
        assert model.get_input_embeddings().weight.is_meta
        with pytest.raises(InputError, match="32 wide"):
            start_from_vectors(model_for(tokenizer, hidden_size=32), tokenizer, folder)
