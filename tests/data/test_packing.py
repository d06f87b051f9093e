import pickle

import datasets
import numpy as np
import pyarrow as pa
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch.utils.data import DataLoader
from transformers import BertTokenizer, PreTrainedTokenizerFast, RobertaTokenizer, T5Tokenizer

from hf_pretrain.data import draws
from hf_pretrain.data.examples import packing
from hf_pretrain.data.examples.epochs import EpochDataset
from hf_pretrain.data.examples.packing import BlockDataset, BlockTemplate
from hf_pretrain.errors import InputError

FEATURES = datasets.Features(
    {
        "input_ids": datasets.List(datasets.Value("int32")),
        "word_starts": datasets.List(datasets.Value("bool")),
        "sent_starts": datasets.List(datasets.Value("bool")),
        "doc_id": datasets.Value("int64"),
    }
)
CLS, SEP, FIRST_ID = 2, 3, 5
FLAGS = ["word_starts", "sent_starts"]
MODES = ["full_rows", "full_sentences", "doc_sentences", "tokens"]


def make_tokenizer(template="[CLS] $A [SEP]", sep_token="[SEP]"):
    vocab = {"[PAD]": 0, "[UNK]": 1, "[CLS]": CLS, "[SEP]": SEP, "[MASK]": 4, "a": 5, "b": 6}
    backend = Tokenizer(models.WordLevel(vocab, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    if template:
        backend.post_processor = processors.TemplateProcessing(
            single=template, special_tokens=[("[CLS]", CLS), ("[SEP]", SEP)]
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]", sep_token=sep_token
    )


@pytest.fixture(scope="module")
def tokenizer():
    return make_tokenizer()


@pytest.fixture(scope="module")
def bare():
    return make_tokenizer(template=None)


def make_corpus(seed, num_documents=40, longest_sentence=12, sentences_at_most=9):
    """Return keyed documents, each a list of sentences, each a list of (token, begins a word); no id repeats."""
    keys = draws.row_keys(np.arange(num_documents), seed=seed, stream="corpus")
    counts = draws.integers(keys, 1, high=sentences_at_most + 1)[:, 0]  # an empty document now and then
    lengths = 1 + draws.integers(keys ^ np.uint64(1), sentences_at_most, high=longest_sentence)
    words = draws.uniforms(keys ^ np.uint64(2), sentences_at_most * longest_sentence) < 0.6
    corpus, token = [], FIRST_ID
    for document in range(num_documents):
        sentences, flags = [], iter(words[document])
        for length in lengths[document, : counts[document]]:
            sentences.append([(token + k, bool(next(flags)) or k == 0) for k in range(length)])
            token += int(length)
        corpus.append(sentences)
    return corpus


def to_documents(corpus):
    return datasets.Dataset.from_dict(
        {
            "input_ids": [[token for sentence in document for token, _ in sentence] for document in corpus],
            "word_starts": [[word for sentence in document for _, word in sentence] for document in corpus],
            "sent_starts": [[k == 0 for sentence in document for k in range(len(sentence))] for document in corpus],
            "doc_id": list(range(len(corpus))),
        },
        features=FEATURES,
    )


def naive_blocks(corpus, budget, mode):
    """Pack with plain loops; blocks are lists of (token, begins a word) with separators, without special tokens."""
    separator = (SEP, True)
    if mode == "tokens":
        stream = []
        for document in (document for document in corpus if document):
            stream += [separator] * bool(stream) + [pair for sentence in document for pair in sentence]
        blocks = []
        while stream:
            stream = stream[stream[0] == separator :]
            block, stream = stream[:budget], stream[budget:]
            blocks.append(block[: len(block) - (block[-1] == separator)])
        return blocks
    blocks, block, last_document = [], [], None
    for number, document in enumerate(corpus):
        words = [(word, False) for sentence in document for word in words_of(sentence, budget)]
        for piece, begins_block in words if mode == "full_rows" else parts_of(document, budget):
            border = [separator] * (bool(block) and number != last_document)
            is_full = begins_block or len(block + border + piece) > budget
            if block and (is_full or (border and mode == "doc_sentences")):
                blocks.append(block)
                block, border = [], []
            block = block + border + piece
            last_document = number
    return [*blocks, block]


def words_of(sentence, budget):
    """The words of a sentence; one longer than the budget is cut."""
    starts = [k for k, (_, begins) in enumerate(sentence) if begins or k == 0]
    words = [sentence[low:high] for low, high in zip(starts, [*starts[1:], len(sentence)], strict=True)]
    return [word[k : k + budget] for word in words for k in range(0, len(word), budget)]


def parts_of(document, budget):
    """The sentences of a document; of one that is too long, as many words as fit, and the next ones. The first begins a block."""
    for sentence in document:
        parts = [[]]
        for word in words_of(sentence, budget):
            if parts[-1] and len(parts[-1] + word) > budget:
                parts.append([])
            parts[-1] += word
        yield from ((part, number == 0 and len(parts) > 1) for number, part in enumerate(parts))


def with_specials(block, prefix=(CLS,), suffix=(SEP,)):
    ids = [*prefix, *(token for token, _ in block), *suffix]
    return ids, [*[True] * len(prefix), *(word for _, word in block), *[True] * len(suffix)]


def assert_equal(blocks, expected):
    assert len(blocks) == len(expected)
    for block, (ids, words) in zip(blocks, expected, strict=True):
        assert block["input_ids"].dtype == np.int32
        assert block["word_starts"].dtype == np.bool_
        assert block["input_ids"].tolist() == ids
        assert block["word_starts"].tolist() == words


def text_tokens(block):
    return [token for token in block["input_ids"].tolist() if token >= FIRST_ID]


CORPORA = {
    "mixed": dict(),
    "one-token documents": dict(longest_sentence=1, sentences_at_most=1, num_documents=90),
    "one-token sentences": dict(longest_sentence=1, sentences_at_most=9),
    "long sentences": dict(longest_sentence=60, sentences_at_most=3),
    "one document": dict(num_documents=1, sentences_at_most=60),
}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("shape", CORPORA)
@pytest.mark.parametrize("window", [packing._WINDOW_TOKENS, 7])
def test_equals_a_plain_loop(tokenizer, mode, shape, window, monkeypatch):
    monkeypatch.setattr(packing, "_WINDOW_TOKENS", window)
    for seed in range(3):
        corpus = make_corpus(seed, **CORPORA[shape])
        documents = to_documents(corpus)
        for block_size in (3, 4, 5, 9, 16, 33, 1000):
            blocks = BlockDataset(documents, tokenizer=tokenizer, block_size=block_size, mode=mode)
            expected = [with_specials(block) for block in naive_blocks(corpus, block_size - 2, mode)]
            assert_equal(blocks.__getitems__(range(len(blocks))), expected)
            assert blocks.lengths.tolist() == [len(ids) for ids, _ in expected]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("block_size", [4, 10, 24])
def test_no_token_is_lost_and_no_block_is_too_long(tokenizer, mode, block_size):
    corpus = make_corpus(1, num_documents=200)
    documents = to_documents(corpus)
    blocks = BlockDataset(documents, tokenizer=tokenizer, block_size=block_size, mode=mode)
    everything = [token for block in blocks for token in text_tokens(block)]
    assert everything == [token for ids in documents["input_ids"] for token in ids]
    assert blocks.num_tokens == len(everything)
    assert max(len(block["input_ids"]) for block in blocks) <= block_size
    assert blocks.fill == pytest.approx(np.mean([len(block["input_ids"]) for block in blocks]) / block_size)


def test_separators_are_exactly_at_document_borders(tokenizer):
    corpus = make_corpus(2, num_documents=100)
    document_of = {token: n for n, document in enumerate(corpus) for sentence in document for token, _ in sentence}
    inner = 0
    for mode in ("full_rows", "full_sentences", "tokens"):
        for block in BlockDataset(to_documents(corpus), tokenizer=tokenizer, block_size=20, mode=mode):
            ids = block["input_ids"].tolist()
            assert (ids[0], ids[-1]) == (CLS, SEP)
            assert SEP not in (ids[1], ids[-2])
            expected = []
            for token in text_tokens(block):
                if expected and document_of[expected[-1]] != document_of[token]:
                    expected.append(SEP)
                    inner += 1
                expected.append(token)
            assert ids[1:-1] == expected
    assert inner > 50


def test_doc_sentences_never_crosses(tokenizer):
    corpus = make_corpus(3, num_documents=100)
    document_of = {token: n for n, document in enumerate(corpus) for sentence in document for token, _ in sentence}
    for block in BlockDataset(to_documents(corpus), tokenizer=tokenizer, block_size=20, mode="doc_sentences"):
        assert len({document_of[token] for token in text_tokens(block)}) == 1
        assert SEP not in block["input_ids"][:-1]


def test_full_sentences_are_whole_and_packed_as_tightly_as_possible(tokenizer):
    """Each block ends where a sentence ends, and the next sentence, with its separator, would not have fitted."""
    corpus = make_corpus(4, num_documents=150)
    first = {sentence[0][0]: len(sentence) for document in corpus for sentence in document}
    first_of_document = {document[0][0][0] for document in corpus if document}
    block_size = 2 + 24
    blocks = BlockDataset(to_documents(corpus), tokenizer=tokenizer, block_size=block_size, mode="full_sentences")
    blocks = list(blocks)
    for block, following in zip(blocks, blocks[1:], strict=False):
        start = text_tokens(following)[0]
        assert len(block["input_ids"]) + (start in first_of_document) + first[start] > block_size


def zipf_documents(num_documents=150, *, most_sentences=60, seed=3):
    """Documents of 1 to `most_sentences` sentences, whose lengths have a long tail: most are short, some of 100 tokens."""
    keys = draws.row_keys(np.arange(num_documents), seed=seed, stream="zipf")
    counts = 1 + draws.integers(keys, 1, high=most_sentences)[:, 0]
    uniform = draws.uniforms(keys ^ np.uint64(1), most_sentences)
    lengths = np.minimum(4 / (uniform + 0.02), 100).astype(int)
    words = draws.uniforms(keys ^ np.uint64(2), most_sentences * 100) < 0.7
    token, corpus = FIRST_ID, []
    for document in range(num_documents):
        flags, sentences = iter(words[document].tolist()), []
        for length in lengths[document, : counts[document]].tolist():
            sentences.append([(token + k, next(flags) or k == 0) for k in range(length)])
            token += length
        corpus.append(sentences)
    return to_documents(corpus)


@pytest.mark.parametrize("block_size", [64, 128, 512])
def test_rows_are_full(tokenizer, block_size):
    """Whole sentences leave some of each row empty; whole words nearly nothing, and no more than a word."""
    documents = zipf_documents()
    blocks = {mode: BlockDataset(documents, tokenizer=tokenizer, block_size=block_size, mode=mode) for mode in MODES}
    rows = blocks["full_rows"]
    assert rows.mode == BlockDataset(documents, tokenizer=tokenizer, block_size=block_size).mode
    assert rows.fill > 0.98 > blocks["full_sentences"].fill > blocks["doc_sentences"].fill
    assert f"fill={rows.fill:.3f}" in repr(rows) and blocks["tokens"].fill > 0.99
    firsts = [rows[index] for index in range(len(rows))]
    for block, following in zip(firsts, firsts[1:], strict=False):
        assert following["word_starts"][1], "no block begins inside a word"
        word = 1 + following["word_starts"][2:].tolist().index(True)
        assert len(block["input_ids"]) + word + 1 > block_size, "the next word, with a separator, does not fit"


def test_a_sentence_or_a_word_that_is_longer_than_a_block_is_cut(tokenizer):
    words = [True, False, False, True, False, True, *[False] * 9, True, True]
    corpus = [[[(FIRST_ID + k, begins) for k, begins in enumerate(words)]]]
    for mode in ("full_rows", "full_sentences", "doc_sentences"):
        blocks = BlockDataset(to_documents(corpus), tokenizer=tokenizer, block_size=2 + 4, mode=mode)
        assert [len(text_tokens(block)) for block in blocks] == [3, 2, 4, 4, 4]


def test_first_token_of_a_document_begins_a_sentence_even_if_not_marked(tokenizer):
    documents = to_documents(make_corpus(0)).map(lambda row: {"sent_starts": [False] * len(row["input_ids"])})
    blocks = BlockDataset(documents.cast(FEATURES), tokenizer=tokenizer, block_size=2 + 200, mode="doc_sentences")
    assert len(blocks) == sum(len(ids) > 0 for ids in documents["input_ids"])


def arrow_layouts(corpus, folder):
    """Return the same documents in every layout that Arrow and datasets can give them."""
    whole, n = to_documents(corpus), len(corpus)
    order = draws.permutation(n, seed=9)
    shuffled = to_documents([corpus[i] for i in order])
    others = make_corpus(77, num_documents=3)
    whole.save_to_disk(folder / "whole", num_shards=3)
    chunked = datasets.concatenate_datasets([whole.select(range(k, min(k + 11, n))) for k in range(0, n, 11)])
    large = whole.data.table
    apart = whole.data.table
    for position, name in enumerate(("input_ids", *FLAGS)):
        column = whole.data.table.column(name).combine_chunks()
        large = large.set_column(position, name, column.cast(pa.large_list(column.type.value_type)))
        # items begin at another place of their buffer in each column, and rows at another of the items
        items = pa.concat_arrays([column.values[:3], column.values[: position + 2], column.values])[3:]
        offsets = pa.array(column.offsets.to_numpy() + position + 2, pa.int32())
        apart = apart.set_column(position, name, pa.ListArray.from_arrays(offsets, items))
    return [
        chunked,
        datasets.load_from_disk(folder / "whole"),
        datasets.concatenate_datasets([to_documents(others), whole]).select(range(3, 3 + n)),  # whole chunks skipped
        to_documents([*others, *corpus, *others]).select(range(3, 3 + n)),  # a slice of a chunk
        shuffled.select(np.argsort(order)),  # an indices mapping
        datasets.concatenate_datasets([to_documents(others), shuffled]).select(np.argsort(order) + 3),
        datasets.concatenate_datasets([chunked.select_columns("input_ids"), whole.select_columns(FLAGS)], axis=1),
        datasets.Dataset(large),
        datasets.Dataset(apart),
        datasets.concatenate_datasets([whole.select([]), whole, whole.select([])]),
        whole.with_format("torch", columns=["doc_id"]),
    ]


@pytest.mark.parametrize("mode", MODES)
def test_every_arrow_layout_gives_the_same_blocks(tokenizer, mode, tmp_path):
    corpus = make_corpus(6, num_documents=50)
    expected = [with_specials(block) for block in naive_blocks(corpus, 17, mode)]
    for documents in arrow_layouts(corpus, tmp_path):
        assert_equal(list(BlockDataset(documents, tokenizer=tokenizer, block_size=19, mode=mode)), expected)


def test_chunks_that_continue_at_the_same_offset_of_another_buffer(tokenizer):
    corpus = make_corpus(6)
    decoy = [[[(token + 10_000, word) for token, word in sentence] for sentence in document] for document in corpus]
    documents = datasets.concatenate_datasets(
        [to_documents(decoy).select(range(20)), to_documents(corpus).select(range(20, len(corpus)))]
    )
    expected = [with_specials(block) for block in naive_blocks(decoy[:20] + corpus[20:], 17, "full_sentences")]
    assert_equal(list(BlockDataset(documents, tokenizer=tokenizer, block_size=19, mode="full_sentences")), expected)


def test_shuffled_and_split_documents_are_read_in_their_new_order(tokenizer):
    documents = to_documents(make_corpus(7)).train_test_split(0.3, seed=3)["train"]
    assert documents._indices is not None
    blocks = BlockDataset(documents, tokenizer=tokenizer, block_size=30)
    expected = [token for ids in documents["input_ids"] for token in ids]
    assert [token for block in blocks for token in text_tokens(block)] == expected


def test_a_block_that_needs_no_insertion_is_a_view_of_the_arrow_buffer(bare):
    documents = to_documents(make_corpus(8))
    buffer = documents.data.table.column("input_ids").chunk(0).values.to_numpy()
    blocks = BlockDataset(documents, tokenizer=bare, block_size=16, mode="doc_sentences")
    assert len(blocks) > 20
    for block in blocks:
        assert np.shares_memory(block["input_ids"], buffer)
    corpus_with_insertions = BlockDataset(documents, tokenizer=make_tokenizer(), block_size=16, mode="doc_sentences")
    assert corpus_with_insertions[0]["input_ids"].flags.writeable


def test_construction_copies_no_tokens(tokenizer):
    documents = to_documents([[[(FIRST_ID, True)] * 20] * 5000])
    state = BlockDataset(documents, tokenizer=tokenizer, block_size=512)
    held = [value for value in {**vars(state), **vars(state.store)}.values() if isinstance(value, np.ndarray)]
    assert sum(array.nbytes for array in held) < 8 * (len(state) + 1) + 100
    assert state.num_tokens == 100_000


def test_spawned_workers_read_the_same_blocks(tokenizer, tmp_path):
    to_documents(make_corpus(9)).save_to_disk(tmp_path / "documents")
    documents = datasets.load_from_disk(tmp_path / "documents").shuffle(seed=1)
    blocks = EpochDataset(BlockDataset(documents, tokenizer=tokenizer, block_size=20))
    loader = DataLoader(
        blocks, batch_size=8, num_workers=1, multiprocessing_context="spawn", collate_fn=_identity, timeout=120
    )
    received = [example for batch in loader for example in batch]
    assert len(received) == len(blocks)
    for got, kept in zip(received, blocks, strict=True):
        assert got["input_ids"].tolist() == kept["input_ids"].tolist()
        assert got["word_starts"].tolist() == kept["word_starts"].tolist()
        assert got["example_id"] == kept["example_id"]


def test_a_memory_mapped_corpus_is_pickled_by_path(tokenizer, tmp_path):
    to_documents([[[(FIRST_ID, True)] * 20] * 5000]).save_to_disk(tmp_path / "documents")
    blocks = BlockDataset(datasets.load_from_disk(tmp_path / "documents"), tokenizer=tokenizer, block_size=512)
    pickled = pickle.dumps(blocks)
    assert len(pickled) < 50_000  # 100 000 tokens are 400 000 bytes
    assert_equal(list(pickle.loads(pickled)), [(b["input_ids"].tolist(), b["word_starts"].tolist()) for b in blocks])


def _identity(examples):
    return examples


@pytest.mark.parametrize("index", [-1, 10**6])
def test_index_out_of_range(tokenizer, index):
    blocks = BlockDataset(to_documents(make_corpus(0)), tokenizer=tokenizer, block_size=20)
    with pytest.raises(IndexError, match=str(index)):
        blocks[index]


def test_templates_of_stock_tokenizers(bare):
    words = {"[PAD]": 0, "[UNK]": 1, "[CLS]": 2, "[SEP]": 3, "[MASK]": 4, "x": 5}
    bert = BertTokenizer(vocab=words)
    assert BlockTemplate.of(bert) == BlockTemplate((2,), (3,), 3)
    # "a" is not in this byte-level vocabulary and vanishes: another text has to be found
    roberta = RobertaTokenizer(vocab={"<s>": 0, "<pad>": 1, "</s>": 2, "<unk>": 3, "<mask>": 4, "q": 5}, merges=[])
    assert roberta("a")["input_ids"] == [0, 2]
    assert BlockTemplate.of(roberta) == BlockTemplate((0,), (2,), 2)
    t5 = T5Tokenizer(vocab=[("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -1.0), ("a", -2.0)])
    assert BlockTemplate.of(t5) == BlockTemplate((), (t5.eos_token_id,), t5.eos_token_id)
    assert BlockTemplate.of(make_tokenizer("[CLS] [CLS] $A")) == BlockTemplate((CLS, CLS), (), SEP)
    assert BlockTemplate.of(bare) == BlockTemplate((), (), SEP)


def test_template_of_a_python_tokenizer():
    class PythonTokenizer:
        sep_token_id, eos_token_id, all_special_tokens = None, 9, []

        def num_special_tokens_to_add(self, pair):
            return 3

        def build_inputs_with_special_tokens(self, ids):
            return [7, *ids, 8, 9]

    assert BlockTemplate.of(PythonTokenizer()) == BlockTemplate((7,), (8, 9), 9)


def test_template_passes_over_a_text_whose_own_tokens_are_marked_special():
    class Marking:
        sep_token_id, eos_token_id, all_special_tokens = 3, None, []

        def num_special_tokens_to_add(self, pair):
            return 2

        def get_vocab(self):
            return {"a": 5, "b": 6}

        def __call__(self, text, return_special_tokens_mask):
            unknown = {"input_ids": [2, 1, 5, 3], "special_tokens_mask": [1, 1, 0, 1]}
            return unknown if text == "a" else {"input_ids": [2, 6, 3], "special_tokens_mask": [1, 0, 1]}

    assert BlockTemplate.of(Marking()) == BlockTemplate((2,), (3,), 3)
    Marking.get_vocab = lambda self: {}
    with pytest.raises(InputError, match="Marking adds 2 special tokens"):
        BlockTemplate.of(Marking())


@pytest.mark.parametrize("mode", MODES)
def test_blocks_of_a_tokenizer_with_a_suffix_only(mode):
    corpus = make_corpus(3)
    blocks = BlockDataset(to_documents(corpus), tokenizer=make_tokenizer("$A [SEP]"), block_size=12, mode=mode)
    assert_equal(list(blocks), [with_specials(block, (), (SEP,)) for block in naive_blocks(corpus, 11, mode)])


def test_bad_input_is_refused(tokenizer, bare):
    documents = to_documents(make_corpus(0))
    with pytest.raises(InputError, match="block_size=2 .*at least 3"):
        BlockDataset(documents, tokenizer=tokenizer, block_size=2)
    with pytest.raises(InputError, match="block_size=0"):
        BlockDataset(documents, tokenizer=bare, block_size=0)
    with pytest.raises(InputError, match="mode='sentences' .*full_rows, full_sentences, doc_sentences, tokens"):
        BlockDataset(documents, tokenizer=tokenizer, mode="sentences")
    with pytest.raises(InputError, match="no token"):
        BlockDataset(to_documents([]), tokenizer=tokenizer)
    with pytest.raises(InputError, match="no token"):
        BlockDataset(to_documents([[], []]), tokenizer=tokenizer)
    with pytest.raises(InputError, match="sent_starts"):
        BlockDataset(documents.remove_columns("sent_starts"), tokenizer=tokenizer)
    with pytest.raises(InputError, match="DatasetDict"):
        BlockDataset(datasets.DatasetDict(train=documents), tokenizer=tokenizer)
    no_separator = make_tokenizer(template=None, sep_token=None)
    with pytest.raises(InputError, match="doc_sentences"):
        BlockDataset(documents, tokenizer=no_separator)
    assert len(BlockDataset(documents, tokenizer=no_separator, mode="doc_sentences")) > 0


def test_documents_that_break_the_schema_are_refused(tokenizer):
    rows = {"input_ids": [[5, 6]], "word_starts": [[True, True]], "sent_starts": [[True, False]]}

    def blocks_of(**changed):
        return BlockDataset(datasets.Dataset.from_dict({**rows, **changed}), tokenizer=tokenizer)

    assert blocks_of()[0]["input_ids"].tolist() == [CLS, 5, 6, SEP]  # from_dict makes the ids int64
    with pytest.raises(InputError, match="word_starts and input_ids differ"):
        blocks_of(word_starts=[[True]])
    with pytest.raises(InputError, match="'sent_starts' is"):
        blocks_of(sent_starts=[[1, 0]])
    with pytest.raises(InputError, match="null"):
        blocks_of(input_ids=[[5, None]])
    two = {name: [*column, None] for name, column in rows.items()}
    with pytest.raises(InputError, match="null"):
        blocks_of(**two)


@st.composite
def corpora(draw):
    """Documents of sentences of tokens that never repeat; some are empty, some longer than any block."""
    lengths = draw(st.lists(st.lists(st.integers(1, 40), max_size=4), min_size=1, max_size=8).filter(any))
    token, corpus = FIRST_ID + 2, []
    for document in lengths:
        corpus.append([])
        for length in document:
            corpus[-1].append([(token + k, k == 0 or draw(st.booleans())) for k in range(length)])
            token += length
    return corpus


@settings(derandomize=True, max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    corpus=corpora(),
    block_size=st.integers(3, 50),
    mode=st.sampled_from([*MODES, "isolated_documents"]),
    template=st.sampled_from(["[CLS] $A [SEP]", None]),
)
def test_every_token_is_in_one_block_once_with_its_word(corpus, block_size, mode, template):
    blocks = BlockDataset(to_documents(corpus), tokenizer=make_tokenizer(template), block_size=block_size, mode=mode)
    expected = {token: begins for document in corpus for sentence in document for token, begins in sentence}
    of_document = {
        token: number for number, document in enumerate(corpus) for sentence in document for token, _ in sentence
    }
    longest_word = max(len(word) for document in corpus for sentence in document for word in words_of(sentence, 999))
    seen = []
    for index in range(len(blocks)):
        block = blocks[index]
        cuts_words = mode == "tokens" or longest_word > block_size - blocks.template.num_special_tokens
        assert cuts_words or expected[text_tokens(block)[0]], "the first word of a block is whole"
        assert 0 < len(block["input_ids"]) == len(block["word_starts"]) == blocks.lengths[index] <= block_size
        text = np.flatnonzero(block["input_ids"] >= FIRST_ID)
        ids = block["input_ids"][text].tolist()
        seen += ids
        pieces = block.get("document_ids", np.zeros(len(block["input_ids"]), dtype=np.int32))
        begins_piece = np.concatenate([[True], pieces[1:] != pieces[:-1]])
        for place, token in zip(text, ids, strict=True):
            assert block["word_starts"][place] == expected[token] or begins_piece[place]
        if mode in ("doc_sentences", "isolated_documents"):
            for piece in set(pieces[text].tolist()):
                assert (
                    len({of_document[token] for token, at in zip(ids, pieces[text], strict=True) if at == piece}) == 1
                )
    assert sorted(seen) == sorted(expected)
    # Only the rows of isolated documents are put together out of order.
    assert mode == "isolated_documents" or seen == list(expected)
