"""Cards that people have edited: what they changed in a README.md stays when the card is made again.

A card is taken apart into the entries of its front matter and its sections, and each is compared with what was written last: what
the user changed or added stays, unless the run changed the same thing since; what the user removed stays away. A card that was
cut off, by a full disk or a kill, has nothing removed: what it lacks is made again.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from typing import Any, NamedTuple

_TITLE = "#"
_TOP = ""
_FRONT_MATTER = r"---\n(.*?)^---[ \t]*\n(.*)\Z"
_DOT_AND_LINES = re.DOTALL | re.MULTILINE


class Written(NamedTuple):
    """What a card consisted of when it was written.

    Attributes:
        metadata: Its front matter.
        sections: Heading -> fingerprint of the section.
    """

    metadata: dict[str, Any]
    sections: dict[str, str]


class Merged(NamedTuple):
    """A card made again.

    Attributes:
        text: The new text.
        replaced: What the user had changed and the run too, so that the user's words are not in it.
    """

    text: str
    replaced: list[str]


def describe_written(text: str) -> Written:
    """Return what is to be remembered of a card that was made here."""
    metadata, sections = _take_apart(text)
    return Written(metadata, {heading: _fingerprint(section) for heading, section in sections.items()})


def merge(old: str, new: str, written: Written, *, is_cut_off: bool = False) -> Merged:
    """Return a card made anew, with what the user changed in the old one.

    Args:
        old: The README.md that is there.
        new: The card as it is made from the facts.
        written: What was written last.
        is_cut_off: Whether the old one lacks its end, see [`was_cut_off`]; its last section is then replaced, and so is what
            should stand behind it.

    Raises:
        ValueError: If the old front matter cannot be read.
    """
    if is_cut_off and _front_matter_is_open(old):
        return Merged(new, ["all of it"] if old.strip() else [])
    old_metadata, old_sections = _take_apart(old)
    new_metadata, new_sections = _take_apart(new)
    if is_cut_off:
        missing, last = _missing_at_the_end(old_sections, written), list(old_sections)[-1]
        lost = {*missing, last}
        if last not in written.sections and any(heading.startswith(last) for heading in missing):
            del old_sections[last]  # half of a heading
        kept = {heading: mark for heading, mark in written.sections.items() if heading not in lost}
        written = Written(written.metadata, kept)
    metadata, replaced = _merge_metadata(old_metadata, new_metadata, written.metadata)
    sections, replaced_sections = _merge_sections(old_sections, new_sections, written.sections)
    return Merged(_put_together(metadata, sections), replaced + replaced_sections)


def was_cut_off(old: str, written: Written, *, made: str | None) -> bool:
    """Return whether a card ends before its end, which is no wish of the user.

    Args:
        old: The README.md that is there.
        written: What was written last.
        made: The text that was made last, without what the user changed, if it is known.

    Returns:
        True if nothing but white space or an open front matter is left; or if all sections from some place on are missing and the
        last one that is there breaks off: in a line, in code, or before the end of what was made; or if the last of all does.
    """
    if not old.strip() or (written.metadata and _front_matter_is_open(old)):
        return True
    try:
        _, sections = _take_apart(old)
        _, made_sections = _take_apart(made or "")
    except ValueError:
        return False
    heading, last = list(sections.items())[-1]
    whole, rest = made_sections.get(heading, "").strip(), last.strip()
    is_part, in_a_line = rest != whole and whole.startswith(rest), not old.endswith("\n")
    if not _missing_at_the_end(sections, written):
        return is_part and in_a_line
    return is_part or in_a_line or last.count("\n```") % 2 == 1


def _front_matter_is_open(text: str) -> bool:
    return not text.strip() or (text.startswith("---") and not re.match(_FRONT_MATTER, text, flags=_DOT_AND_LINES))


def _missing_at_the_end(sections: Mapping[str, str], written: Written) -> list[str]:
    """Return the sections that were written behind the last one that is still there."""
    order = list(written.sections)
    last = max((order.index(heading) for heading in sections if heading in written.sections), default=-1)
    return order[last + 1 :]


def _take_apart(text: str) -> tuple[dict[str, Any], dict[str, str]]:
    """Return the front matter and the sections by heading, those of each level alike; text before a heading is the top."""
    import yaml

    found = re.match(_FRONT_MATTER, text, flags=_DOT_AND_LINES)
    front, body = found.groups() if found else ("", text)
    try:
        metadata = yaml.safe_load(front) or {}
    except yaml.YAMLError as error:
        raise ValueError(f"the front matter is no YAML: {error}") from error
    if not isinstance(metadata, dict):
        raise ValueError("the front matter holds no names and values")
    sections = {_TOP: ""}
    heading, is_code = _TOP, False
    for line in body.splitlines():
        if line.startswith("```"):
            is_code = not is_code
        elif not is_code and re.match(r"#{1,6} ", line):
            heading = _unused(line.strip(), sections)
            sections[heading] = ""
        sections[heading] += line + "\n"
    return metadata, sections


def _unused(line: str, sections: Mapping[str, str]) -> str:
    """Return what a heading is known by: the first title as such, whatever it says, and a repeated one with a number."""
    heading = _TITLE if line.startswith("# ") and _TITLE not in sections else line
    count = sum(1 for known in sections if known == heading or re.fullmatch(re.escape(heading) + r" \(\d+\)", known))
    return f"{heading} ({count + 1})" if count else heading


def _put_together(metadata: Mapping[str, Any], sections: Mapping[str, str]) -> str:
    from huggingface_hub import CardData

    body = "\n\n".join(text.strip("\n") for text in sections.values() if text.strip())
    return f"---\n{CardData(**metadata).to_yaml()}\n---\n\n{body}\n"


def _fingerprint(section: str) -> str:
    lines = "\n".join(line.rstrip() for line in section.strip().splitlines())
    return hashlib.sha256(lines.encode()).hexdigest()[:16]


def _merge_metadata(
    old: dict[str, Any], new: dict[str, Any], written: dict[str, Any]
) -> tuple[dict[str, Any], list[str]]:
    merged: dict[str, Any] = {}
    replaced = []
    for name in dict.fromkeys((*new, *old)):
        theirs, ours, before = (values.get(name) for values in (old, new, written))
        if name == "model-index":
            value = _merge_results(theirs, ours, before)
        elif isinstance(theirs, list) and isinstance(ours, list):
            value = _merge_lists(theirs, ours, before if isinstance(before, list) else [])
        else:
            value = ours if theirs == before else theirs
            if theirs not in (before, ours) and ours != before:
                value = ours
                replaced.append(f"{name} of the front matter")
        if value not in (None, []):
            merged[name] = value
    return merged, replaced


def _merge_lists(theirs: list[Any], ours: list[Any], before: list[Any]) -> list[Any]:
    removed = [item for item in before if item not in theirs]
    added = [item for item in theirs if item not in before]
    return [item for item in ours if item not in removed] + [item for item in added if item not in ours]


def _merge_results(theirs: Any, ours: Any, before: Any) -> Any:
    """Merge model-indexes result by result: others may have added theirs; one that we changed is ours."""
    from huggingface_hub.repocard_data import eval_results_to_model_index, model_index_to_eval_results

    try:
        own, known, added = (
            model_index_to_eval_results(index)[1] if index else [] for index in (ours, before, theirs)
        )
        name = (ours or theirs or [{"name": ""}])[0]["name"]
    except (KeyError, TypeError, IndexError, AttributeError, ValueError):
        return ours
    added = [
        result
        for result in added
        if result not in known and not any(result.is_equal_except_value(other) for other in own)
    ]
    results = [*own, *added]
    return eval_results_to_model_index(name, results) if results else None


def _merge_sections(
    old: dict[str, str], new: dict[str, str], written: dict[str, str]
) -> tuple[dict[str, str], list[str]]:
    merged: dict[str, str] = {}
    replaced = []
    for heading, text in new.items():
        theirs = old.get(heading)
        if theirs is None:
            if written.get(heading) != _fingerprint(text):  # else the user removed it
                merged[heading] = text
        elif _fingerprint(theirs) in (written.get(heading), _fingerprint(text)):
            merged[heading] = text
        elif written.get(heading) == _fingerprint(text):
            merged[heading] = theirs
        else:
            merged[heading] = text
            replaced.append(heading)
    order = list(merged)
    before = None  # the heading that the user's section comes behind
    for heading, text in old.items():
        if heading in merged:
            before = heading
        elif heading not in new and heading not in written:
            merged[heading] = text
            order.insert(0 if before is None else order.index(before) + 1, heading)
            before = heading
        elif heading not in new and _fingerprint(text) != written[heading]:
            replaced.append(heading)
    return {heading: merged[heading] for heading in order}, replaced
