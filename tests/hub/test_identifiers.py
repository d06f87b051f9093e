"""What the front matter of a card may hold: identifiers of the Hub, checked before anything is trained."""

from __future__ import annotations

import re
from typing import Any

import pytest

from helpers.method_matrix import programs
from hf_pretrain.errors import InputError
from hf_pretrain.hub.identifiers import LANGUAGES, LICENSES, check_identifiers

TRAINING = programs()["mlm"].arguments[2]

WRONG = [
    ({"license": "Apache 2.0"}, "license='Apache 2.0' is no identifier of the Hub: did you mean 'apache-2.0'?"),
    ({"license": "apache"}, "did you mean 'apache-2.0'?"),
    ({"license": "proprietary-of-ours"}, "give one of the Hub, or other"),
    ({"language": ["en", "German"]}, "language='German' is no code of a language: did you mean 'de'?"),
    ({"language": ["jp"]}, "did you mean 'ja'?"),
    ({"language": ["DE"]}, "did you mean 'de'?"),
    ({"language": ["q"]}, "give a code of ISO 639, such as en"),
    ({"language": ["xq"]}, "give a code of ISO 639"),
    ({"datasets": ["./corpus/a"]}, "datasets='./corpus/a': give an id on the Hub"),
    ({"tags": [" "]}, "tags=' ': give a word"),
]


@pytest.mark.parametrize(("values", "words"), WRONG)
def test_a_wrong_identifier_is_refused_at_once_with_what_to_give(values: dict[str, Any], words: str, tmp_path) -> None:
    """Both by the options of a training, before there is any text, and by the command that makes a card again."""
    for refused in (lambda: check_identifiers(values), lambda: TRAINING(output_dir=str(tmp_path), **values)):
        with pytest.raises(InputError, match=re.escape(words)):
            refused()


def test_what_the_hub_knows_is_taken() -> None:
    right = {
        "license": "openrail++",
        "language": ["de", "nds", "zh-Hant", "pt-BR", "code", "multilingual"],
        "tags": ["x"],
    }
    check_identifiers(right | {"datasets": ["allenai/c4", "wikitext"], "hub_model_id": "me/x"})
    check_identifiers(dict.fromkeys(right))


def test_the_lists_are_whole() -> None:
    assert len(LANGUAGES) >= 183 and all(re.fullmatch("[a-z]{2}", code) for code in LANGUAGES)
    assert len(set(LICENSES)) == len(LICENSES) > 70 and {"apache-2.0", "mit", "other", "cc-by-nc-sa-4.0"} <= set(
        LICENSES
    )
