from __future__ import annotations

import numpy as np
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    AlbertTokenizer,
    BertTokenizer,
    PreTrainedTokenizerFast,
    RobertaTokenizer,
    T5Tokenizer,
    XLNetTokenizer,
)

from hf_pretrain.data.examples.sentence_pairs import PairTemplate
from hf_pretrain.errors import InputError

WORDS = {"[PAD]": 0, "[UNK]": 1, "[CLS]": 2, "[SEP]": 3, "[MASK]": 4, "x": 5}
PIECES = [("▁", -1.0), ("a", -2.0)]


def zeros(prefix: int, middle: int, suffix: int) -> tuple[tuple[int, ...], ...]:
    return (0,) * prefix, (0,) * middle, (0,) * suffix


def fast_tokenizer(single: str | None, pair: str | None = None) -> PreTrainedTokenizerFast:
    backend = Tokenizer(models.WordLevel({"<s>": 0, "</s>": 1, "<unk>": 2, "q": 3}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    if single:
        backend.post_processor = processors.TemplateProcessing(
            single=single, pair=pair, special_tokens=[("<s>", 0), ("</s>", 1)]
        )
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


def specials(*names: str) -> list[tuple[str, float]]:
    return [(name, 0.0) for name in names]


def test_templates_of_stock_tokenizers():
    bert = BertTokenizer(vocab=WORDS)
    assert PairTemplate.of(bert) == PairTemplate((2,), (3,), (3,), (0,), (0,), (1,), (0, 1))
    # "a" is not in this byte-level vocabulary and vanishes: another text has to be found.
    roberta = RobertaTokenizer(vocab={"<s>": 0, "<pad>": 1, "</s>": 2, "<unk>": 3, "<mask>": 4, "q": 5}, merges=[])
    assert roberta("a", "a")["input_ids"] == [0, 2, 2, 2]
    assert PairTemplate.of(roberta) == PairTemplate((0,), (2, 2), (2,), *zeros(1, 2, 1), (0, 0))
    albert = AlbertTokenizer(vocab=[*specials("<pad>", "<unk>", "[CLS]", "[SEP]", "[MASK]"), *PIECES])
    assert PairTemplate.of(albert) == PairTemplate((2,), (3,), (3,), (0,), (0,), (1,), (0, 1))
    xlnet = XLNetTokenizer(vocab=[*specials("<unk>", "<s>", "</s>", "<cls>", "<sep>", "<pad>", "<mask>"), *PIECES])
    assert PairTemplate.of(xlnet) == PairTemplate((), (4,), (4, 3), (), (0,), (1, 2), (0, 1))
    t5 = T5Tokenizer(vocab=[*specials("<pad>", "</s>", "<unk>"), *PIECES])
    end = t5.eos_token_id
    assert PairTemplate.of(t5) == PairTemplate((), (end,), (end,), *zeros(0, 1, 1), (0, 0))
    xlm = fast_tokenizer("<s> $A </s>", "<s> $A </s> $B </s>")
    assert PairTemplate.of(xlm) == PairTemplate((0,), (1,), (1,), *zeros(1, 1, 1), (0, 0))
    own_frames = fast_tokenizer("</s> $A </s>", "</s> $A </s> </s> $B </s>")
    assert PairTemplate.of(own_frames).middle == (1, 1)


def test_template_of_a_python_tokenizer():
    class XLMLike:
        def num_special_tokens_to_add(self, pair):
            return 3 if pair else 2

        def build_inputs_with_special_tokens(self, first, second):
            return [0, *first, 1, *second, 1]

        def create_token_type_ids_from_sequences(self, first, second):
            return [0] * (len(first) + 2) + [1] * (len(second) + 1)

    assert PairTemplate.of(XLMLike()) == PairTemplate((0,), (1,), (1,), (0,), (0,), (1,), (0, 1))


def test_what_does_not_tell_two_sequences_apart_is_refused():
    for tokenizer in (fast_tokenizer(None), fast_tokenizer("<s> $A </s>"), fast_tokenizer("$A", "<s> $A $B </s>")):
        with pytest.raises(InputError, match="puts nothing between the two sequences"):
            PairTemplate.of(tokenizer)
    with pytest.raises(InputError, match="adds 2 special tokens to a pair, but none around any token"):
        PairTemplate.of(fast_tokenizer("$A", "<s> $B </s> $A"))


def test_an_example_is_what_the_tokenizer_would_have_made():
    tokenizer = BertTokenizer(vocab=WORDS)
    template = PairTemplate.of(tokenizer)
    a, b = np.array([5, 5, 5]), np.array([5, 1])
    example = template.join((a, np.array([False, True, False])), (b, np.array([False, False])))
    stock = tokenizer("x x x", "x y")
    assert example["input_ids"].tolist() == stock["input_ids"]
    assert example["token_type_ids"].tolist() == stock["token_type_ids"]
    assert example["input_ids"].dtype == np.int32
    # The first token of a segment begins a word, whatever was cut off before it.
    assert example["word_starts"].tolist() == [True, True, True, False, True, True, False, True]
    assert example["source_length"] == 5


def test_budget():
    template = PairTemplate.of(BertTokenizer(vocab=WORDS))
    assert (template.num_special_tokens, template.budget(5)) == (3, 2)
    with pytest.raises(InputError, match="block_size=4 leaves no room for a pair.*at least 5"):
        template.budget(4)
