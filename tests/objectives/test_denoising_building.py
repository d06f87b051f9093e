"""What denoising needs before its first step: options, tokens, the length of texts, examples, and stock encoder-decoders."""

import logging
from dataclasses import replace

import pytest
import torch
from transformers import (
    AutoModelForSeq2SeqLM,
    AutoTokenizer,
    BartConfig,
    BartForCausalLM,
    BartForConditionalGeneration,
    BartModel,
    BertConfig,
    BertForMaskedLM,
    EncoderDecoderModel,
    GPT2Config,
    GPT2LMHeadModel,
    ModernBertConfig,
    ModernBertForMaskedLM,
    RobertaConfig,
    RobertaForCausalLM,
    T5Config,
    T5EncoderModel,
    T5ForConditionalGeneration,
    T5Tokenizer,
    set_seed,
)

from hf_pretrain.corruption.denoising import BartNoise
from hf_pretrain.corruption.fragments import MassNoise, PrefixLM, SpanCorruption, UL2Noise
from hf_pretrain.corruption.sentinels import sentinel_ids
from hf_pretrain.data.arguments import DataArguments
from hf_pretrain.data.documents.tokenizers import add_special_tokens, train_tokenizer
from hf_pretrain.errors import InputError
from hf_pretrain.modeling.configuration import build_encoder_decoder_config
from hf_pretrain.objectives.denoising import building
from hf_pretrain.objectives.denoising.arguments import DenoisingModelArguments, DenoisingTrainingArguments
from hf_pretrain.objectives.denoising.building import (
    build_stock_model,
    check_decoder_length,
    check_tokens,
    cut_text,
    load_examples,
    longest_pair,
    made_up_examples,
)
from hf_pretrain.training.parsing import parse_arguments

TEXTS = [
    f"The {noun} sat by the {noun}. It was a fine {noun} today." for noun in ("cat", "dog", "river", "garden")
] * 40
NOISES = ("bart", "t5", "ul2", "prefix_lm", "mass")
SIZES = {"hidden_size": 32, "num_hidden_layers": 3, "num_decoder_layers": 2, "num_attention_heads": 4}
SIZES |= {"intermediate_size": 48, "max_position_embeddings": 64}
STARTS = {
    **dict.fromkeys(("t5", "mt5", "umt5", "longt5", "switch_transformers", "pegasus", "marian", "prophetnet"), "pad"),
    **dict.fromkeys(("bart", "mbart", "m2m_100", "plbart"), "sep"),
    **dict.fromkeys(("blenderbot", "t5gemma"), "cls"),
}


def options(folder="unused", **others):
    return DenoisingTrainingArguments(output_dir=str(folder), report_to="none", **others)


def model_options(**others):
    return DenoisingModelArguments(**(SIZES | others))


def data_options(folder, **others):
    file = folder / "corpus.txt"
    file.write_text("\n\n".join(TEXTS), encoding="utf-8")
    chosen = {"block_size": 24, "block_mode": "tokens", "vocab_size": 120, "validation_fraction": 0.1} | others
    return DataArguments(train_file=[str(file)], **chosen)


def extra_ids(count, start=0):
    return [f"<extra_id_{number}>" for number in range(start, count)]


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(TEXTS, vocab_size=120)


@pytest.fixture
def own(tokenizer, tmp_path):
    """A copy of the tokenizer that a test may change."""
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    return AutoTokenizer.from_pretrained(tmp_path / "tokenizer")


@pytest.fixture(scope="module")
def t5_tokenizer():
    return T5Tokenizer().train_new_from_iterator(TEXTS, vocab_size=200)


@pytest.fixture(scope="module")
def folders(tokenizer, tmp_path_factory):
    """Tiny checkpoints by name, each with the tokenizer."""
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48}
    sizes |= {"vocab_size": len(tokenizer), "max_position_embeddings": 64}
    bart = {"d_model": 32, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2}
    bart |= {"decoder_attention_heads": 2, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48, "vocab_size": len(tokenizer)}
    bart |= {"pad_token_id": tokenizer.pad_token_id, "max_position_embeddings": 64}
    gpt2 = GPT2Config(n_embd=16, n_layer=1, n_head=2, vocab_size=len(tokenizer), n_positions=64)
    special = {
        f"{role}_token_id": getattr(tokenizer, f"{role}_token_id") for role in ("pad", "cls", "sep", "bos", "eos")
    }
    t5 = T5Config(d_model=32, d_kv=16, d_ff=48, num_layers=1, num_heads=2, vocab_size=len(tokenizer))
    set_seed(0)
    models = {
        "bert": BertForMaskedLM(BertConfig(**sizes)),
        "modernbert": ModernBertForMaskedLM(ModernBertConfig(**sizes, **special)),
        "gpt2": GPT2LMHeadModel(gpt2),
        "bart": BartForConditionalGeneration(BartConfig(**bart)),
        "bart-decoder": BartForCausalLM(BartConfig(**bart)),
        "t5-encoder": T5EncoderModel(t5),
    }
    folder = tmp_path_factory.mktemp("models")
    for name, model in models.items():
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    return {name: str(folder / name) for name in models}


def runs(model, **others):
    """Logits of a few tokens."""
    ids = torch.arange(4, 24).view(2, 10)
    with torch.no_grad():
        return model.eval()(input_ids=ids, decoder_input_ids=ids[:, :6], **others).logits


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


# From sizes


@pytest.mark.parametrize("model_type", STARTS)
def test_an_architecture_is_built_from_the_usual_sizes(model_type, tokenizer, tmp_path):
    set_seed(1)
    model = build_stock_model(model_options(model_type=model_type), tokenizer)
    assert isinstance(model, AutoModelForSeq2SeqLM._model_mapping[type(model.config)])
    lists = [[m for m in part.modules() if isinstance(m, torch.nn.ModuleList)] for part in halves(model)]
    depths = [len(found[0]) for found in lists]
    assert depths == [3, 2]
    for part in halves(model):
        shapes = {tuple(parameter.shape) for parameter in part.parameters()}
        assert {(48, 32), (32, 48), (32, 32)} <= shapes
        assert {size for shape in shapes for size in shape} <= allowed_sizes(model_type, len(tokenizer))
    config, start = model.config, getattr(tokenizer, f"{STARTS[model_type]}_token_id")
    for known in (config, model.generation_config):
        assert known.decoder_start_token_id == start
        assert (known.pad_token_id, known.eos_token_id) == (tokenizer.pad_token_id, tokenizer.sep_token_id)
        assert known.bos_token_id == tokenizer.cls_token_id
        assert getattr(known, "forced_eos_token_id", None) in (None, tokenizer.sep_token_id)
    # The decoder reads the encoder.
    logits = runs(model)
    ids = torch.arange(4, 24).view(2, 10)
    with torch.no_grad():
        other = model(input_ids=ids.flip(0), decoder_input_ids=ids[:, :6]).logits
    assert logits.shape == (2, 6, len(tokenizer))
    assert not torch.allclose(logits, other)
    model.save_pretrained(tmp_path)
    opened, info = AutoModelForSeq2SeqLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert all(torch.equal(opened.state_dict()[key], value) for key, value in model.state_dict().items())
    # Products of the same numbers elsewhere in memory may be summed in another order.
    assert torch.allclose(runs(opened), logits, atol=1e-5)
    assert (opened.generate(ids, max_new_tokens=2)[:, 0] == start).all()


def halves(model):
    return [model.get_encoder(), model.get_decoder()]


def allowed_sizes(model_type, tokens):
    """Return the lengths that parameters of the model have, if nothing of it keeps a default size."""
    # Positions with the rows that some leave free, buckets of distances and their heads, experts.
    own = {"bart": {66}, "mbart": {66}, "plbart": {66}, "prophetnet": {64 + 1, 32 * 4, 2}}
    others = {"switch_transformers": {8}}.get(model_type, set())
    return {32, 48, tokens, 64, 4} | own.get(model_type, set()) | others


def test_a_decoder_has_as_many_layers_as_its_encoder_by_default(tokenizer):
    config = build_encoder_decoder_config(model_options(model_type="t5"), tokenizer)
    assert (config.num_layers, config.num_decoder_layers, config.d_kv) == (3, 3, 8)


def test_a_decoder_deeper_than_its_encoder_is_built_where_generate_can_use_it(tokenizer):
    deep = {"num_hidden_layers": 1, "num_decoder_layers": 2}
    model = build_stock_model(model_options(model_type="bart", **deep), tokenizer)
    assert model.generate(torch.arange(4, 14)[None], max_new_tokens=3).shape[1] <= 4
    with pytest.raises(
        InputError, match="num_decoder_layers=2 is more than the 1 layers that transformers generates with in a t5"
    ):
        build_stock_model(model_options(model_type="t5", **deep), tokenizer)


def test_further_values_of_a_configuration_come_through(tokenizer):
    chosen = model_options(config_overrides='{"tie_word_embeddings": false, "attention_dropout": 0.25}')
    model = build_stock_model(chosen, tokenizer)
    assert model.get_output_embeddings().weight is not model.get_input_embeddings().weight
    assert model.config.attention_dropout == 0.25


@pytest.mark.parametrize(
    ("chosen", "words"),
    [
        ({"model_type": "bert"}, "model_type='bert' is no encoder-decoder: choose one such as bart, t5"),
        ({"model_type": "gpt2"}, "model_type='gpt2' is no encoder-decoder"),
        ({"model_type": "brat"}, "did you mean 'bart'"),
        ({"model_type": "encoder-decoder"}, "two checkpoints: name them with encoder_name_or_path"),
        ({"model_type": "t5gemma2"}, "model_type='t5gemma2' cannot be built from these sizes"),
        ({"embedding_size": 16}, "embedding_size=16: bart embeds at its full width"),
        ({"hidden_size": 30}, "hidden_size=30 does not divide into num_attention_heads=4"),
        ({"config_overrides": '{"no_such": 1}'}, "bart has no option no_such"),
        # transformers ties the head of every T5.
        (
            {"model_type": "t5", "config_overrides": '{"tie_word_embeddings": false}'},
            "config_overrides: t5 sets tie_word_embeddings=True itself",
        ),
    ],
)
def test_what_cannot_be_built_is_refused(chosen, words, tokenizer):
    with pytest.raises(InputError, match=words):
        build_stock_model(model_options(**chosen), tokenizer)


# Opened


def test_an_encoder_decoder_is_opened_as_it_is(folders, tokenizer):
    model = build_stock_model(model_options(model_name_or_path=folders["bart"]), tokenizer)
    plain = AutoModelForSeq2SeqLM.from_pretrained(folders["bart"])
    assert type(model) is BartForConditionalGeneration
    assert torch.equal(runs(model), runs(plain))
    assert model.config.decoder_start_token_id == plain.config.decoder_start_token_id


@pytest.mark.parametrize(
    ("name", "words"),
    [
        (
            "bert",
            "must be an encoder-decoder, but bert is an encoder: join it with a decoder by --encoder_name_or_path",
        ),
        ("modernbert", "but modernbert is an encoder"),
        (
            "gpt2",
            "but gpt2 is a decoder: name an encoder with --encoder_name_or_path, and this one with --decoder_name",
        ),
        ("t5-encoder", "holds no weights of a decoder, such as decoder"),
        ("bart-decoder", "holds no weights of an encoder, such as model.encoder"),
    ],
)
def test_one_half_alone_is_refused(name, words, folders, tokenizer):
    with pytest.raises(InputError, match=words):
        build_stock_model(model_options(model_name_or_path=folders[name]), tokenizer)


# Joined


def test_an_encoder_is_joined_with_a_copy_of_itself(folders, tokenizer, tmp_path, caplog):
    with caplog.at_level(logging.WARNING, logger="hf_pretrain"):
        model = build_stock_model(model_options(encoder_name_or_path=folders["bert"]), tokenizer)
    own = [record.getMessage() for record in caplog.records if record.name.startswith("hf_pretrain")]
    assert len(own) == 1
    assert "the decoder's attention to the encoder (20 parameters)" in own[0]
    checkpoint = BertForMaskedLM.from_pretrained(folders["bert"]).state_dict()
    state = model.state_dict()
    for key, value in checkpoint.items():
        assert torch.equal(state[f"decoder.{key}"], value)
        if key.startswith("bert."):
            assert torch.equal(state[f"encoder.{key.removeprefix('bert.')}"], value)
    fresh = set(model.fresh_parameters)
    assert {key for key in fresh if "crossattention" in key} == {
        key for key, _ in model.named_parameters() if "crossattention" in key
    }
    assert all("crossattention" in key or "pooler" in key for key in fresh)
    # Training one half leaves the other.
    assert model.encoder.get_input_embeddings().weight is not model.decoder.get_input_embeddings().weight
    model.save_pretrained(tmp_path)
    opened, info = AutoModelForSeq2SeqLM.from_pretrained(tmp_path, output_loading_info=True)
    assert type(opened) is EncoderDecoderModel
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert torch.equal(runs(opened), runs(model))
    ids = torch.arange(4, 24).view(2, 10)
    assert (opened.generate(ids, max_new_tokens=2)[:, 0] == tokenizer.cls_token_id).all()
    assert opened.generation_config.eos_token_id == tokenizer.sep_token_id


def test_the_joined_decoder_reads_the_encoder_and_not_the_future(folders, tokenizer):
    model = build_stock_model(model_options(encoder_name_or_path=folders["bert"]), tokenizer).eval()
    ids = torch.arange(4, 24).view(2, 10)
    changed = ids[:, :6].clone()
    changed[:, -1] = 5
    with torch.no_grad():
        logits, other = (model(input_ids=ids, decoder_input_ids=target).logits for target in (ids[:, :6], changed))
        flipped = model(input_ids=ids.flip(0), decoder_input_ids=ids[:, :6]).logits
    assert torch.allclose(logits[:, :-1], other[:, :-1], atol=1e-6)
    assert not torch.allclose(logits[:, -1], other[:, -1])
    assert not torch.allclose(logits, flipped)


def test_an_encoder_is_joined_with_a_decoder_of_another_width(folders, tokenizer, tmp_path):
    chosen = model_options(encoder_name_or_path=folders["modernbert"], decoder_name_or_path=folders["gpt2"])
    model = build_stock_model(chosen, tokenizer)
    assert {"enc_to_dec_proj.weight", "enc_to_dec_proj.bias"} <= set(model.fresh_parameters)
    encoder = ModernBertForMaskedLM.from_pretrained(folders["modernbert"]).model.state_dict()
    assert all(torch.equal(model.encoder.state_dict()[key], value) for key, value in encoder.items())
    model.save_pretrained(tmp_path)
    opened, info = AutoModelForSeq2SeqLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"]
    assert torch.equal(runs(opened), runs(model))


def test_halves_that_cannot_be_joined_are_refused(folders, tokenizer, own, tmp_path):
    def refused(words, *, tokens=tokenizer, **chosen):
        with pytest.raises(InputError, match=words):
            build_stock_model(model_options(**chosen), tokens)

    bert, modernbert = folders["bert"], folders["modernbert"]
    refused(
        "encoder_name_or_path=.*modernbert has no attention to an encoder: name its decoder with decoder_name.*bert, roberta",
        encoder_name_or_path=modernbert,
    )
    refused(
        "decoder_name_or_path=.*modernbert has no attention",
        encoder_name_or_path=bert,
        decoder_name_or_path=modernbert,
    )
    refused("must be an encoder, not bart: continue it with model_name_or_path", encoder_name_or_path=folders["bart"])
    refused(
        "decoder_name_or_path=.*bart has no", encoder_name_or_path=bert, decoder_name_or_path=folders["bart-decoder"]
    )
    small = tmp_path / "small"
    config = BertConfig(**BertConfig.from_pretrained(bert).to_diff_dict() | {"vocab_size": len(tokenizer) - 5})
    BertForMaskedLM(config).save_pretrained(small)
    refused(
        f"embeds {len(tokenizer) - 5} tokens, and the tokenizer has {len(tokenizer)}",
        encoder_name_or_path=bert,
        decoder_name_or_path=str(small),
    )
    other = train_tokenizer(["zyx wvu"] * 9, vocab_size=len(tokenizer))
    other.add_tokens([f"more{number}" for number in range(len(tokenizer) - len(other))])
    BertForMaskedLM.from_pretrained(bert).save_pretrained(tmp_path / "other")
    other.save_pretrained(tmp_path / "other")
    refused(
        "decoder_name_or_path=.*has another vocabulary",
        encoder_name_or_path=bert,
        decoder_name_or_path=str(tmp_path / "other"),
    )
    add_special_tokens(own, extra_ids(4))
    refused("encoder_name_or_path=.*resize_token_embeddings", tokens=own, encoder_name_or_path=bert)


# Given in Python


def test_a_given_model_is_taken_or_refused_by_its_name(folders, tokenizer):
    stock = T5ForConditionalGeneration(T5Config(d_model=32, d_kv=8, d_ff=48, num_layers=1, num_heads=4, vocab_size=99))
    assert build_stock_model(model_options(), tokenizer, stock=stock) is stock
    assert (
        stock.config.decoder_start_token_id == stock.generation_config.decoder_start_token_id == tokenizer.pad_token_id
    )
    bert = BertForMaskedLM.from_pretrained(folders["bert"])
    with pytest.raises(InputError, match="model=BertForMaskedLM is no encoder-decoder.*encoder_name_or_path"):
        build_stock_model(model_options(), tokenizer, stock=bert)
    with pytest.raises(InputError, match="model=BartModel has no language-model head.*BartForConditionalGeneration"):
        build_stock_model(model_options(), tokenizer, stock=BartModel.from_pretrained(folders["bart"]))


# Positions of the decoder


@pytest.mark.parametrize("model_type", ["bart", "prophetnet", "pegasus"])
def test_targets_longer_than_the_positions_are_refused(model_type, tokenizer):
    model = build_stock_model(model_options(model_type=model_type), tokenizer)
    check_decoder_length(model, 64)
    with pytest.raises(InputError, match="targets of up to 65 tokens are longer than the 64 positions .*block_size"):
        check_decoder_length(model, 65)


def test_the_positions_of_a_joined_decoder_are_its_own(folders, tokenizer, tmp_path):
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 48}
    config = RobertaConfig(
        **sizes, vocab_size=len(tokenizer), max_position_embeddings=42, pad_token_id=1, is_decoder=True
    )
    RobertaForCausalLM(config).save_pretrained(tmp_path)
    chosen = model_options(encoder_name_or_path=folders["bert"], decoder_name_or_path=str(tmp_path))
    model = build_stock_model(chosen, tokenizer)
    check_decoder_length(model, 40)
    with pytest.raises(InputError, match="longer than the 40 positions of the decoder of EncoderDecoderModel"):
        check_decoder_length(model, 41)


def test_distances_have_no_end(tokenizer):
    check_decoder_length(build_stock_model(model_options(model_type="t5"), tokenizer), 1 << 20)
