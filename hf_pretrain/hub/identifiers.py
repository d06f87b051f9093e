"""The identifiers that the Hub knows for the front matter of a card, and a check of those that a user gives."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from hf_pretrain.errors import InputError, nearest
from hf_pretrain.hub.text import HUB_NAME

LICENSES = tuple(
    """apache-2.0 mit openrail bigscience-openrail-m creativeml-openrail-m bigscience-bloom-rail-1.0 bigcode-openrail-m afl-3.0
    artistic-2.0 bsl-1.0 bsd bsd-2-clause bsd-3-clause bsd-3-clause-clear c-uda cc cc0-1.0 cc-by-2.0 cc-by-2.5 cc-by-3.0
    cc-by-4.0 cc-by-sa-3.0 cc-by-sa-4.0 cc-by-nc-2.0 cc-by-nc-3.0 cc-by-nc-4.0 cc-by-nd-4.0 cc-by-nc-nd-3.0 cc-by-nc-nd-4.0
    cc-by-nc-sa-2.0 cc-by-nc-sa-3.0 cc-by-nc-sa-4.0 cdla-sharing-1.0 cdla-permissive-1.0 cdla-permissive-2.0 wtfpl ecl-2.0
    epl-1.0 epl-2.0 etalab-2.0 eupl-1.1 eupl-1.2 agpl-3.0 gfdl gpl gpl-2.0 gpl-3.0 lgpl lgpl-2.1 lgpl-3.0 isc h-research
    intel-research lppl-1.3c ms-pl apple-ascl apple-amlr mpl-2.0 odc-by odbl openmdw-1.0 openmdw-1.1 openrail++ osl-3.0
    postgresql ofl-1.1 ncsa unlicense zlib pddl lgpl-lr deepfloyd-if-license fair-noncommercial-research-license llama2 llama3
    llama3.1 llama3.2 llama3.3 llama4 grok2-community gemma unknown other""".split()
)
"""Identifiers of licenses, as the Hub lists them; it refuses others."""

LANGUAGES = frozenset(
    """aa ab ae af ak am an ar as av ay az ba be bg bi bm bn bo br bs ca ce ch co cr cs cu cv cy da de dv dz ee el en eo es et
    eu fa ff fi fj fo fr fy ga gd gl gn gu gv ha he hi ho hr ht hu hy hz ia id ie ig ii ik io is it iu ja jv ka kg ki kj kk kl
    km kn ko kr ks ku kv kw ky la lb lg li ln lo lt lu lv mg mh mi mk ml mn mr ms mt my na nb nd ne ng nl nn no nr nv ny oc oj
    om or os pa pi pl ps pt qu rm rn ro ru rw sa sc sd se sg sh si sk sl sm sn so sq sr ss st su sv sw ta te tg th ti tk tl tn
    to tr ts tt tw ty ug uk ur uz ve vi vo wa wo xh yi yo za zh zu""".split()
)
"""Codes of two letters, ISO 639-1."""

# Codes of countries that are taken for those of their languages.
_COUNTRIES = {
    "cn": "zh",
    "cz": "cs",
    "dk": "da",
    "gr": "el",
    "jp": "ja",
    "se": "sv",
    "ua": "uk",
    "us": "en",
    "vn": "vi",
}
# A code of three letters, ISO 639-3, or one of two, either with a script or a region behind it.
_LANGUAGE = r"(?P<code>[a-z]{2,3})(-[A-Za-z0-9]{2,8})*"
_NO_CODE = ("code", "multilingual")
_HUB_NAMES = {
    "datasets": "give an id on the Hub, such as allenai/c4",
    "hub_model_id": "give a repository, such as me/my-electra",
}


def check_identifiers(values: Mapping[str, Any]) -> None:
    """Refuse what the Hub would refuse in the front matter of a card.

    Args:
        values: Values of `license`, `language`, `datasets`, `tags` and `hub_model_id`, each one text, several, or None.

    Raises:
        InputError: Naming the option, its value and what to give instead.
    """
    for name, given in values.items():
        for value in [given] if isinstance(given, str) else given or ():
            if name == "license" and value not in LICENSES:
                near = nearest(value.lower().replace(" ", "-"), LICENSES, otherwise="give one of the Hub, or other")
                raise InputError(f"license={value!r} is no identifier of the Hub: {near}")
            if name == "language":
                _check_language(value)
            if name == "tags" and not value.strip():
                raise InputError(f"tags={value!r}: give a word, such as biomedical")
            if name in _HUB_NAMES and not re.fullmatch(HUB_NAME, value):
                raise InputError(f"{name}={value!r}: {_HUB_NAMES[name]}")


def _check_language(value: str) -> None:
    found = re.fullmatch(_LANGUAGE, value)
    if value in _NO_CODE or (found and (len(found["code"]) == 3 or found["code"] in LANGUAGES)):
        return
    # A table of names is there already; it is read after a mistake alone.
    from transformers.models.whisper.tokenization_whisper import TO_LANGUAGE_CODE

    meant = _COUNTRIES.get(value.lower()) or TO_LANGUAGE_CODE.get(value.lower())
    meant = meant or (value.lower() if value.lower() in LANGUAGES else None)
    advice = "give a code of ISO 639, such as en, or multilingual" if meant is None else f"did you mean {meant!r}?"
    raise InputError(f"language={value!r} is no code of a language: {advice}")


def as_list(given: str | Sequence[str] | None) -> list[str]:
    """Return one text, several or none as a list."""
    return [given] if isinstance(given, str) else list(given or ())
