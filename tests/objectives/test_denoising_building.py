"""What denoising needs before its first step: options, tokens, the length of texts, and examples."""

from dataclasses import replace

import pytest
from transformers import (
    AutoTokenizer,
    T5Tokenizer,
)

from helpers.denoising_models import TEXTS, copy_of, extra_ids, model_options, save_models
from hf_pretrain.corruption.denoising import BartNoise
from hf_pretrain.corruption.fragments import MassNoise, PrefixLM, SpanCorruption, UL2Noise
from hf_pretrain.corruption.sentinels import sentinel_ids
from hf_pretrain.data.arguments import DataArguments
from hf_pretrain.data.documents.tokenizers import add_special_tokens, train_tokenizer
from hf_pretrain.errors import InputError
from hf_pretrain.objectives.denoising import building
from hf_pretrain.objectives.denoising.arguments import DenoisingModelArguments, DenoisingTrainingArguments
from hf_pretrain.objectives.denoising.building import (
    check_tokens,
    cut_text,
    load_examples,
    longest_pair,
    made_up_examples,
)
from hf_pretrain.training.parsing import parse_arguments

NOISES = ("bart", "t5", "ul2", "prefix_lm", "mass")


def options(folder="unused", **others):
    return DenoisingTrainingArguments(output_dir=str(folder), report_to="none", **others)


def data_options(folder, **others):
    file = folder / "corpus.txt"
    file.write_text("\n\n".join(TEXTS), encoding="utf-8")
    chosen = {"block_size": 24, "block_mode": "tokens", "vocab_size": 120, "validation_fraction": 0.1} | others
    return DataArguments(train_file=[str(file)], **chosen)


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(TEXTS, vocab_size=120)


@pytest.fixture
def own(tokenizer, tmp_path):
    return copy_of(tokenizer, tmp_path / "tokenizer")


@pytest.fixture(scope="module")
def t5_tokenizer():
    return T5Tokenizer().train_new_from_iterator(TEXTS, vocab_size=200)


@pytest.fixture(scope="module")
def folders(tokenizer, tmp_path_factory):
    return save_models(tokenizer, tmp_path_factory.mktemp("models"))


# Options


@pytest.mark.parametrize(
    ("chosen", "words"),
    [
        ({"noise": "brat"}, "noise='brat' must be one of .*did you mean 'bart'"),
        ({"noise_steps": ["infiling"]}, "noise_steps='infiling'.*did you mean 'infilling'"),
        ({"noise_steps": ["infilling", "infilling"]}, "names infilling twice"),
        ({"noise_steps": []}, "leaves the text as it is"),
        ({"noise_steps": ["infilling"], "infilling_probability": 0.0}, "leaves the text as it is"),
        ({"noise": "t5", "infilling_probability": 0.35}, "infilling_probability=0.35 has no effect with noise='t5'"),
        ({"noise": "t5", "noise_steps": ["rotation"]}, "noise_steps=.* has no effect with noise='t5'"),
        ({"noise_density": 0.3}, "noise_density=0.3 has no effect with noise='bart': it is for noise=t5"),
        (
            {"rotation_probability": 0.5},
            "rotation_probability=0.5 has no effect with noise_steps=.*it is for rotation",
        ),
        (
            {"noise": "t5", "span_choice": "iid", "random_roll": True},
            "random_roll=True has no effect with span_choice",
        ),
        ({"noise": "ul2", "fragment_share": 0.3}, "fragment_share=0.3 has no effect with noise='ul2'"),
        ({"noise": "ul2", "denoisers": ["Q:3:0.15"]}, "denoisers: 'Q:3:0.15'"),
        ({"noise": "ul2", "denoisers": []}, "denoisers is empty"),
        ({"noise": "prefix_lm", "target_share": 1.0}, "target_share=1.0 must be a number above 0 and below 1"),
        ({"noise": "t5", "mean_span_length": 0.5}, "mean_span_length=0.5 must be"),
    ],
)
def test_options_without_sense_or_effect_are_refused(chosen, words):
    with pytest.raises(InputError, match=words):
        options(**chosen)


def test_the_command_line_refuses_what_has_no_effect_even_at_its_default():
    classes = (DataArguments, DenoisingModelArguments, DenoisingTrainingArguments)

    def parse(line):
        words = f"--output_dir unused --demo_corpus true {line}".split()
        return parse_arguments(classes, words, prog="hf-pretrain denoise", description="")

    for line, words in {
        "--noise mass --noise_density 0.15": "noise_density=0.15 has no effect",
        "--encoder_name_or_path a --hidden_size 64": "hidden_size=64 has no effect beside encoder_name_or_path",
        "--model_name_or_path a --num_decoder_layers 2": "num_decoder_layers=2 has no effect beside model_name_or_path",
        "--model_name_or_path a --encoder_name_or_path b": "encoder_name_or_path='b' has no effect beside model_name",
        "--decoder_name_or_path b": "decoder_name_or_path='b' has no effect without encoder_name_or_path",
        "--encoder_name_or_path a --tokenizer_type bpe": "tokenizer_type='bpe' has no effect beside encoder_name",
        "--noise brat": "did you mean 'bart'",
    }.items():
        with pytest.raises(InputError, match=words):
            parse(line)
    data, model, training = parse("--noise bart --noise_steps token_deletion rotation --num_decoder_layers 2")
    assert (model.model_type, model.num_decoder_layers, training.noise_steps) == (
        "bart",
        2,
        ["token_deletion", "rotation"],
    )


def test_each_noise_is_made_with_its_options_and_ids(own):
    add_special_tokens(own, ["[NLU]", "[NLG]", "[S2S]", *extra_ids(4)])
    vocabulary = own.get_vocab()
    steps = ["infilling", "rotation"]
    bart = options(noise_steps=steps, infilling_probability=0.35, rotation_probability=0.5).make_noise(own)
    assert isinstance(bart, BartNoise)
    assert (bart.steps, bart.mask_token_id) == (tuple(steps), own.mask_token_id)
    assert (bart.infilling_probability, bart.rotation_probability) == (0.35, 0.5)
    t5 = options(noise="t5", noise_density=0.2, mean_span_length=5.0, random_roll=True).make_noise(own)
    assert isinstance(t5, SpanCorruption)
    assert (t5.density, t5.mean_length, t5.choice, t5.random_roll) == (0.2, 5.0, "random", True)
    assert t5.sentinels.tolist() == [vocabulary[token] for token in extra_ids(4)]
    ul2 = options(noise="ul2").make_noise(own)
    assert isinstance(ul2, UL2Noise)
    assert len(ul2.denoisers) == 7
    assert ul2.mode_ids == {"R": vocabulary["[NLU]"], "X": vocabulary["[NLG]"], "S": vocabulary["[S2S]"]}
    prefix_lm = options(noise="prefix_lm", target_share=0.25).make_noise(own)
    assert isinstance(prefix_lm, PrefixLM)
    assert prefix_lm.share == 0.25
    mass = options(noise="mass", fragment_share=0.3).make_noise(own)
    assert isinstance(mass, MassNoise)
    assert (mass.share, mass.mask_token_id) == (0.3, own.mask_token_id)
    special = {*own.all_special_ids, *(vocabulary[token] for token in extra_ids(4))}
    assert sorted({*mass.random_ids.tolist(), *special}) == list(range(len(own)))
    assert not special & set(mass.random_ids.tolist())


# Tokens


def test_sentinels_are_found_by_their_names(own, t5_tokenizer):
    # Those of a tokenizer that transformers 5 trains are neither at the end nor in ascending order.
    assert sentinel_ids(t5_tokenizer).tolist() == list(range(102, 2, -1))
    assert t5_tokenizer.convert_ids_to_tokens(sentinel_ids(t5_tokenizer).tolist()) == extra_ids(100)
    assert not len(sentinel_ids(own))
    add_special_tokens(own, ["<extra_id_2>", "<extra_id_0>", "<extra_id_1>", "<extra_id_4>"])
    vocabulary = own.get_vocab()
    assert sentinel_ids(own).tolist() == [vocabulary[token] for token in extra_ids(3)]


def test_sentinels_of_mt5_are_found(own):
    add_special_tokens(own, ["▁<extra_id_1>", "▁<extra_id_0>"])
    assert own.convert_ids_to_tokens(sentinel_ids(own).tolist()) == ["▁<extra_id_0>", "▁<extra_id_1>"]


def without(tokenizer, *roles):
    for role in roles:
        setattr(tokenizer, f"{role}_token", None)
    return tokenizer


@pytest.mark.parametrize(
    ("noise", "prepare", "words"),
    [
        ("t5", lambda t: None, "no sentinels .<extra_id_0>, <extra_id_1>, ....*noise='t5'.*extra_special_tokens"),
        ("ul2", lambda t: None, "no sentinels"),
        ("ul2", lambda t: add_special_tokens(t, ["[NLU]", "[S2S]", *extra_ids(99)]), r"no token \[NLG\].*noise='ul2'"),
        ("bart", lambda t: without(t, "mask"), "no mask_token.*noise='bart'.*'mask_token': '<mask>'"),
        ("mass", lambda t: without(t, "mask"), "no mask_token.*noise='mass'"),
        ("prefix_lm", lambda t: without(t, "pad"), "no pad_token"),
        ("prefix_lm", lambda t: without(t, "sep", "eos"), "no eos_token and no sep_token"),
    ],
)
def test_a_tokenizer_without_what_the_noise_needs_is_refused(own, noise, prepare, words):
    prepare(own)
    with pytest.raises(InputError, match=words) as refusal:
        check_tokens(options(noise=noise), own, DataArguments(demo_corpus=True, block_size=32))
    assert "\n" not in str(refusal.value)


def test_deletion_needs_no_mask(own):
    check_tokens(options(noise_steps=["token_deletion"]), without(own, "mask"), DataArguments(demo_corpus=True))


@pytest.mark.parametrize(
    ("chosen", "block_size", "needed"),
    [
        # 28 spans in 568 tokens, as T5's code has it; 229 // 2 hidden tokens of 1,137 in 57 spans.
        ({"noise": "t5"}, 512, 28),
        ({"noise": "t5"}, 1024, 57),
        ({"noise": "t5", "random_roll": True}, 512, 29),
        ({"noise": "ul2", "denoisers": ["X:3:0.5"]}, 512, 127),
    ],
)
def test_as_many_sentinels_are_needed_as_the_longest_text_may_have_spans(own, chosen, block_size, needed):
    args, data_args = options(**chosen), DataArguments(demo_corpus=True, block_size=block_size)
    add_special_tokens(own, ["[NLG]", *extra_ids(needed - 1)])
    with pytest.raises(
        InputError, match=f"needs {needed} sentinels for block_size={block_size}.*has {needed - 1}: add"
    ):
        check_tokens(args, own, data_args)
    add_special_tokens(own, extra_ids(needed, needed - 1))
    check_tokens(args, own, data_args)


# Lengths


@pytest.mark.parametrize(
    ("block_size", "text", "target"), [(512, 568, 114), (128, 141, 29), (256, 284, 58), (1024, 1137, 229)]
)
def test_texts_of_t5_are_as_long_as_their_input_fits(t5_tokenizer, block_size, text, target):
    args, data_args = options(noise="t5"), DataArguments(demo_corpus=True, block_size=block_size)
    cut = cut_text(data_args, args, tokenizer=t5_tokenizer)
    assert cut.block_size == text + 1
    assert longest_pair(args, t5_tokenizer, cut.block_size) == (block_size, target)
    assert replace(cut, block_size=block_size) == data_args


@pytest.mark.parametrize("noise", ["t5", "ul2"])
@pytest.mark.parametrize("block_size", [16, 33, 100, 511])
def test_no_input_is_longer_than_block_size_and_one_token_more_would_be(tokenizer, noise, block_size):
    args, data_args = options(noise=noise), DataArguments(demo_corpus=True, block_size=block_size)
    cut = cut_text(data_args, args)
    assert cut == cut_text(data_args, args, tokenizer=tokenizer)
    assert longest_pair(args, tokenizer, cut.block_size)[0] <= block_size
    assert longest_pair(args, tokenizer, cut.block_size + 1)[0] > block_size
    assert cut.block_size >= block_size


@pytest.mark.parametrize(
    "chosen", [{"noise": "bart"}, {"noise": "prefix_lm"}, {"noise": "mass"}, {"noise": "t5", "span_choice": "iid"}]
)
def test_other_texts_are_as_long_as_the_input(tokenizer, chosen):
    args, data_args = options(**chosen), DataArguments(demo_corpus=True, block_size=64)
    assert cut_text(data_args, args, tokenizer=tokenizer) == data_args


def test_lengths_of_the_pairs_of_other_noises(tokenizer):
    # Two special tokens: 62 of text.
    assert longest_pair(options(), tokenizer, 64) == (64, 64)
    assert longest_pair(options(noise="mass"), tokenizer, 64) == (64, 64)
    assert longest_pair(options(noise="prefix_lm"), tokenizer, 64) == (63, 62)
    assert longest_pair(options(noise="prefix_lm", target_share=0.5), tokenizer, 64) == (33, 32)


# Examples


@pytest.mark.parametrize("noise", NOISES)
def test_a_tokenizer_that_is_trained_has_the_tokens_of_the_noise(noise, tmp_path):
    args, data_args = options(tmp_path / "run", noise=noise), data_options(tmp_path)
    data = load_examples(data_args, model_options(), args)
    opened = AutoTokenizer.from_pretrained(tmp_path / "run")
    wanted = {"t5": extra_ids(100), "ul2": ["[NLU]", "[NLG]", "[S2S]", *extra_ids(100)]}.get(noise, [])
    assert opened.get_vocab() == data.tokenizer.get_vocab()
    assert set(wanted) == {
        token for token in opened.get_vocab() if token.startswith("<extra") or token[1:-1] in ("NLU", "NLG", "S2S")
    }
    # They are cut out of text and left out of decoded text, and nothing else of the vocabulary is.
    assert all(opened.tokenize(f"cat{token}dog") == ["cat", token, "dog"] for token in wanted[:4])
    assert opened.decode(opened("The cat" + "".join(wanted))["input_ids"], skip_special_tokens=True) == "the cat"
    check_tokens(args, opened, data_args)
    text = cut_text(data_args, args).block_size
    assert data.block_size == data.train_dataset.block_size == text
    assert max(len(data.train_dataset[number]["input_ids"]) for number in range(len(data.train_dataset))) == text
    assert data.description["block_size"] == data.description["options"]["block_size"] == 24
    assert data.description.get("text_block_size", 24) == text
    again = load_examples(data_args, model_options(), args)
    assert again.tokenizer.get_vocab() == data.tokenizer.get_vocab()


def test_another_noise_in_the_same_folder_trains_another_tokenizer(tmp_path):
    data_args = data_options(tmp_path)
    sizes = []
    # Texts of the two have the same length, so that the tokens alone tell the tokenizers apart.
    for chosen in ({"noise": "bart"}, {"noise": "t5", "span_choice": "iid"}):
        args = options(tmp_path / "run", **chosen)
        assert cut_text(data_args, args) == data_args
        sizes.append(len(load_examples(data_args, model_options(), args).tokenizer))
    assert sizes[1] - sizes[0] == 100


def test_a_stream_has_the_tokens_and_the_length_too(tmp_path):
    args = options(tmp_path / "run", noise="t5", max_steps=1)
    data_args = data_options(tmp_path, streaming=True, validation_fraction=0.0)
    data = load_examples(data_args, model_options(), args)
    assert len(sentinel_ids(data.tokenizer)) == 100
    assert len(next(iter(data.train_dataset))["input_ids"]) == cut_text(data_args, args).block_size > 24


def test_a_tokenizer_is_refused_before_any_text_is_read(folders, tmp_path, monkeypatch):
    monkeypatch.setattr(building, "prepare_data", lambda *args, **others: pytest.fail("text is read"))
    args, data_args = options(tmp_path / "run", noise="t5"), data_options(tmp_path)
    named = [(replace(data_args, tokenizer_name=folders["bert"]), model_options())]
    named += [(data_args, model_options(model_name_or_path=folders["bart"]))]
    named += [(data_args, model_options(encoder_name_or_path=folders["bert"]))]
    for cut, model_args in named:
        with pytest.raises(InputError, match="no sentinels"):
            load_examples(cut, model_args, args)
        tokenizer = AutoTokenizer.from_pretrained(folders["bert"])
        with pytest.raises(InputError, match="no sentinels"):
            made_up_examples(cut, model_args, args, tokenizer)


def test_an_encoder_brings_its_tokenizer(folders, tokenizer, tmp_path):
    args = options(tmp_path / "run")
    data = load_examples(data_options(tmp_path), model_options(encoder_name_or_path=folders["bert"]), args)
    assert data.tokenizer.get_vocab() == tokenizer.get_vocab()
    assert not (tmp_path / "run" / "tokenizer.json").exists()


@pytest.mark.parametrize("noise", NOISES)
def test_made_up_examples_have_the_shape_of_the_real_ones(noise, tmp_path):
    args, data_args = options(tmp_path / "run", noise=noise), data_options(tmp_path)
    made_up = made_up_examples(data_args, model_options(), args, None)
    real = load_examples(data_args, model_options(), args)
    assert made_up.block_size == real.block_size
    # A real vocabulary may be smaller than the most that is asked for, the made-up one is not.
    added = len(building.added_tokens(args, data_args))
    assert len(made_up.tokenizer) == 120 + added
    args.make_noise(made_up.tokenizer)
