"""The release's README.md: a model card in the hub's form.

It is a pure function of ``ReleaseFacts``: no time, no path, no machine, so an interrupted and an undisturbed run write
the same bytes. Text that comes from outside (names, prompts, continuations, messages) passes through ``markdown.py``.
The template is ``templates/card.md.jinja``; a name that it does not know is an error, never an empty string.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from typing import Any

import yaml
from jinja2 import Environment, PackageLoader, StrictUndefined

from pipeline.facts import FACTS_FILE, OVERLAP_TOKENS, Check, ReleaseFacts, SourcePlace, weights_by_width
from pipeline.formats.loaders import Contents
from pipeline.publish import figures, markdown
from pipeline.publish.loading import loading_guide
from pipeline.publish.plots import LAYER_ERROR_FILE, SIZE_QUALITY_FILE
from pipeline.publish.reproduce import reproduce_command, reproduce_spec
from pipeline.publish.tensor_parallel import Loading, tp_answers
from pipeline.spec import Activations
from pipeline.units import format_bytes, format_count
from pipeline.variants import ROUNDED_INPUTS

CARD_FILE = "README.md"
NUM_WORST_MODULES = 10
MAX_LISTED = 50
"""Entries of one list that the card spells out; the rest is counted and stands in the facts file."""

_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", re.ASCII)
_HUB_LICENSE = re.compile(r"[a-z0-9][a-z0-9.-]*")


def render_card(facts: ReleaseFacts) -> str:
    """Return the text of the release's README.md, ending with a newline."""
    environment = Environment(
        loader=PackageLoader("pipeline.publish"),
        undefined=StrictUndefined,
        autoescape=False,  # Markdown, escaped by the filters below.
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters |= {
        "escape": markdown.escape,
        "code": markdown.code_span,
        "code_cell": markdown.code_cell,
        "fenced": markdown.fenced,
        "bytes": format_bytes,
        "count": format_count,
        "ratio": lambda value: f"{value:.4f}",
        "figure": lambda value: f"{value:.4g}",
        "group": figures.group_word,
        "percent": lambda value: f"{100 * value:.2f} %",
    }
    return environment.get_template("card.md.jinja").render(_values(facts))


def front_matter(facts: ReleaseFacts) -> dict[str, Any]:
    """Return the card's metadata.

    A source that is not on a hub has no address there: there is a ``base_model`` only if its own card names one. What
    that is to the source (fine-tuned, merged) is for the hub to find out, so no relation is stated.
    """
    metadata: dict[str, Any] = {}
    license_id = facts.source.license
    if license_id is not None and _HUB_LICENSE.fullmatch(license_id):
        metadata["license"] = license_id
    elif license_id is not None:
        metadata |= {"license": "other", "license_name": license_id}
    if facts.source.place is SourcePlace.HUB:
        metadata |= {"base_model": facts.source.name, "base_model_relation": "quantized"}
    elif base_models := [name for name in facts.source.base_models if _HUB_NAME.fullmatch(name)]:
        metadata["base_model"] = base_models if len(base_models) > 1 else base_models[0]
    variant = facts.variant
    widths = weights_by_width(facts.modules) or {variant.bits: 1}
    rounded = () if variant.activations is Activations.NONE else (ROUNDED_INPUTS[variant.type],)
    methods = variant.method.value.split("-")
    tags = [*methods, *(f"{bits}-bit" for bits in widths), *rounded, variant.format.value, "bitmill"]
    return metadata | {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": list(dict.fromkeys(tags)),
    }


def _values(facts: ReleaseFacts) -> dict[str, Any]:
    answers = tp_answers(facts.modules, facts.variant)
    # Of weights whose inputs are rounded the general kernel takes what the fast one takes.
    runs_half_only = answers[0].loading is Loading.GENERAL and facts.variant.activations is Activations.NONE
    expert_layers = figures.expert_layers(facts)
    return {
        "facts": facts,
        "front_matter": yaml.safe_dump(front_matter(facts), sort_keys=False, allow_unicode=True).rstrip(),
        "schedule": figures.describe_schedule(facts.variant),
        "shrinkage": figures.describe_shrinkage(facts),
        "scheme": figures.describe_scheme(facts.variant, facts.modules),
        "judged": figures.judge(facts),
        "checks": [(check, _check_figures(check)) for check in facts.verdict.checks],
        "guide": loading_guide(Contents.of_release(facts), facts.variant, facts.release, runs_half_only=runs_half_only),
        "tp_answers": answers,
        "runs_half_only": runs_half_only,
        "ratio": figures.size_ratio(facts),
        "perplexity_ratio": figures.perplexity_ratio(facts),
        "bits_per_parameter": figures.bits_per_parameter(facts),
        "bits_per_quantized_weight": figures.bits_per_quantized_weight(facts),
        "quantized": figures.quantized_modules(facts),
        "quantized_share": figures.quantized_share(facts),
        "family": figures.family(facts),
        "exceptions": figures.list_exceptions(facts),
        "kept": Counter(facts.kept[name] for name in sorted(facts.kept)),
        "dropped": figures.fold_names(sorted(facts.dropped.items())),
        "degradations": figures.list_degradations(facts),
        "worst": figures.worst_modules(facts, NUM_WORST_MODULES),
        "width_rows": figures.width_rows(facts),
        "predicted_kl": figures.predicted_kl(facts),
        "expert_layers": expert_layers,
        "experts": figures.describe_experts(facts, expert_layers) if expert_layers else "",
        "max_listed": MAX_LISTED,
        "overlap_tokens": OVERLAP_TOKENS,
        "samples": [_sample_text(sample.prompt, sample.continuation) for sample in facts.verdict.samples],
        "reproduce_spec": reproduce_spec(facts),
        "reproduce_command": reproduce_command(facts),
        "facts_file": FACTS_FILE,
        "layer_error_file": LAYER_ERROR_FILE,
        "size_quality_file": SIZE_QUALITY_FILE,
    }


def _check_figures(check: Check) -> str:
    return ", ".join(f"{name} {value:.4g}" for name, value in sorted(check.figures.items()))


def _sample_text(prompt: str, continuation: str) -> str:
    # The border between what was given and what was made must survive any text: JSON strings quote it.
    quoted = [json.dumps(text, ensure_ascii=False) for text in (prompt, continuation)]
    return f"prompt:  {quoted[0]}\nrelease: {quoted[1]}"
