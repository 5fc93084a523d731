"""The page that a rater sees: one HTML file that needs nothing else, and shows nothing of where a response is from."""

from __future__ import annotations

import base64
import re
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from elmd.types import Sample

#: The two metrics of §4.4 with their names, the question a rater answers, and what each score means. The paper gives
#: the names and the range 1-5; questions and anchors are ours.
METRICS: dict[str, tuple[str, str, tuple[str, ...]]] = {
    "R1": (
        "Contextual relevance",
        "Does the reply fit what has been said: the last utterance, the dialogue before it and the background?",
        (
            "Unrelated: it does not belong to this dialogue, or cannot be understood.",
            "Hardly related: it shares a word or a topic, but does not answer what was said.",
            "Partly related: on the topic, but it would fit almost anywhere, or is partly at odds with what was said.",
            "Mostly related: it answers what was said, with a small flaw.",
            "Fully related: a natural next turn of this dialogue.",
        ),
    ),
    "R2": (
        "Emotional relevance",
        "Does the emotion of the reply fit the situation and the emotion of the speaker (words and pictures)?",
        (
            "Wrong: the emotion jars with the situation.",
            "Mostly wrong: it hardly fits, or there is none where the situation plainly calls for one.",
            "Undecided: it neither fits nor jars, or is too weak to tell.",
            "Mostly right: the emotion fits, its strength or tone is a little off.",
            "Right: emotion and strength are what a person would show here.",
        ),
    ),
}
SCORES = (1, 2, 3, 4, 5)


@dataclass(frozen=True)
class Response:
    """One text to rate: its id on the page, and the names of the systems that gave it (never on the page)."""

    id: str
    text: str
    systems: tuple[str, ...]


@dataclass(frozen=True)
class Item:
    """A sample and the responses to it, in the order in which they are shown."""

    sample: Sample
    responses: tuple[Response, ...]


def render(study: str, rater: int, form: str, items: Sequence[Item], pictures: Mapping[str, Sequence[bytes]]) -> str:
    """The page of one rater.

    Args:
        study, rater: under which the browser keeps what was rated, and which the exported file names.
        form: the exported file's `format`.
        items: in the order in which they are shown.
        pictures: JPEGs of u's clip by sample id; a sample without is shown as text only.
    """
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("elmd.human", "."),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=StrictUndefined,
    )
    shown = [
        {
            "background": item.sample.background,
            "history": [(turn.speaker, turn.text) for turn in item.sample.history],
            "speaker": item.sample.utterance.speaker,
            "utterance": item.sample.utterance.text,
            "replier": item.sample.response.speaker,
            "responses": [(response.id, response.text) for response in item.responses],
            "pictures": [base64.b64encode(jpeg).decode() for jpeg in pictures.get(item.sample.id, ())],
            "language": _language(item.sample.utterance.text),
        }
        for item in items
    ]
    return environment.get_template("page.html.jinja").render(
        study=study,
        rater=rater,
        form=form,
        items=shown,
        metrics=METRICS,
        scores=SCORES,
        nonce=secrets.token_urlsafe(16),  # only the page's own script runs, whatever a dialogue holds
    )


def _language(text: str) -> str:
    """For the choice of glyphs and for screen readers: Chinese where a Chinese character stands, else English."""
    return "zh-Hans" if re.search("[\u4e00-\u9fff]", text) else "en"
