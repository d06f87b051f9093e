"""The facts of a model card, as plain data: what is not known is left out, never guessed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from hf_pretrain.hub.card_text import Row
from hf_pretrain.hub.compute import Compute
from hf_pretrain.hub.evaluation import Evaluation


@dataclass(frozen=True, kw_only=True)
class ObjectiveDescription:
    """What a reader should know of a pre-training objective.

    Attributes:
        name: Name of the method on the command line and as a tag: "rtd".
        title: Its name in the field: "Replaced token detection".
        description: One paragraph, in Markdown.
        formula: The loss in LaTeX, without delimiters.
        citations: BibTeX entries.
        pipeline_tag: The Hub's task for models of this objective: "fill-mask", "feature-extraction", ...
        usage: Python code that uses the trained head, where "{repo}" stands for the repository and
            "{model_class}" for the stock class that opens it.
    """

    name: str
    title: str
    description: str
    formula: str = ""
    citations: Sequence[str] = ()
    pipeline_tag: str = "feature-extraction"
    usage: str = ""


@dataclass(frozen=True, kw_only=True)
class PretrainingCard:
    """The facts of a card, as plain data.

    Attributes:
        model_name: Name of the model, the title of the card.
        model_class: transformers class that opens the root of the repository with its head: "ElectraForPreTraining".
        objective: What it was trained to do.
        has_own_code: Whether that class is no stock one and its code lies in the repository.
        adapter: Kind of adapter, such as "LORA", where the root holds one alone, without the model below it; "" for a model.
        fresh_parameters: What of the model did not come from `base_model` and began anew, in words: "the head cls".
        fine_tuning_class: Auto class that opens the root with a fresh head for a task, "" if there is none.
        repo: What the snippets load: the repository's id, or "." for the folder of the card.
        note: A paragraph to put before all others.
        origin: How the weights began, in Markdown, where `base_model` does not tell all of it: "Cut from ...".
        base_model: Hub id of the model whose weights the run began with, or the absolute path of a local one, which is
            not named in the card; `None` if the run began from scratch.
        language: ISO code or codes of the text.
        license: The Hub's identifier of a license: "apache-2.0".
        datasets: Hub ids of data sets among the training data.
        data: The training data, by what each entry is: {"sources": ["a.txt"], "documents": 1200, "tokens": 2_000_000,
            "blocks": 16_000, "tokenizer": "WordPiece", "vocabulary_size": 8000, "held_out_documents": 60, ...}.
        recipe: Options of the run; see [`recipe_options`].
        log_history: `Trainer.state.log_history`.
        metrics_before: Held-out metrics before the first step, keyed as `Trainer.evaluate` returns them; of several
            held-out sets those of all.
        metrics_after: The same of the weights that are exported.
        weights_step: Step of these weights, where it is not the last one of the run.
        chosen_by: Key of the metric that they were the best by: "mlm_accuracy".
        evaluation_name: What they were measured on.
        evaluations: What was measured on tasks.
        comparison: Header and rows of a table of the model beside the one that taught it.
        compute: What the run took.
        parts: Sub-folder -> (class that opens it, what it is). The class is a name in transformers or a dotted path,
            or "" where the folder is not a checkpoint.
        limits: What the model should not be trusted with, in Markdown.
        versions: See [`hf_pretrain.hub.environment.versions`].
    """

    model_name: str
    model_class: str
    objective: ObjectiveDescription
    has_own_code: bool = False
    adapter: str = ""
    fresh_parameters: str = ""
    fine_tuning_class: str = ""
    repo: str = "."
    note: str = ""
    origin: str = ""
    base_model: str | None = None
    language: str | Sequence[str] | None = None
    license: str | None = None
    datasets: Sequence[str] = ()
    data: Mapping[str, Any] = field(default_factory=dict)
    recipe: Mapping[str, Any] = field(default_factory=dict)
    log_history: Sequence[Mapping[str, Any]] = ()
    metrics_before: Mapping[str, float] = field(default_factory=dict)
    metrics_after: Mapping[str, float] = field(default_factory=dict)
    weights_step: int | None = None
    chosen_by: str = ""
    evaluation_name: str = "held-out documents"
    evaluations: Sequence[Evaluation] = ()
    comparison: Sequence[Row] = ()
    compute: Compute = Compute()
    parts: Mapping[str, tuple[str, str]] = field(default_factory=dict)
    limits: str = ""
    versions: Mapping[str, str] = field(default_factory=dict)
