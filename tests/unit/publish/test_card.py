"""The card: metadata that a hub accepts, and everything a reader needs to judge a release."""

from __future__ import annotations

import inspect
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import yaml
from huggingface_hub import ModelCard, metadata_load
from jinja2 import UndefinedError
from markdown_it import MarkdownIt

from jobs.cli.convert import convert_command
from jobs.cli.flags import spec_from_flags
from pipeline.facts import Check, ReleaseFacts
from pipeline.publish import card
from pipeline.publish.card import front_matter, render_card
from pipeline.publish.reproduce import reproduce_command, reproduce_spec
from pipeline.publish.tensor_parallel import TP_SIZES
from pipeline.spec import (
    CalibrationSpec,
    ConversionSpec,
    GateSpec,
    VariantSpec,
    build_spec,
    parse_variant,
    resolve_budgets,
)
from tests.factories import make_facts, make_module, make_modules, make_sample, make_verdict

VARIANTS = ("gptq-w4-g128", "awq-w4-g128", "rtn-w8-g128", "gptq-w4-g64-ct-asym", "rtn-w8-channel")


def with_source(facts: ReleaseFacts, **changes: Any) -> ReleaseFacts:
    return facts.model_copy(update={"source": facts.source.model_copy(update=changes)})


def section(text: str, title: str) -> str:
    """Return what stands below a heading, up to the next heading of any level."""
    lines = text.splitlines()
    start = next(i for i, line in enumerate(lines) if re.fullmatch(rf"#+ {re.escape(title)}", line)) + 1
    end = next((i for i in range(start, len(lines)) if re.match(r"#{1,6} ", lines[i])), len(lines))
    return "\n".join(lines[start:end])


def fences(text: str) -> list[str]:
    return [token.content for token in MarkdownIt("commonmark").parse(text) if token.type == "fence"]


def loaded_metadata(text: str, folder: Path) -> dict[str, Any]:
    path = folder / "README.md"
    path.write_text(text, encoding="utf-8")
    metadata = metadata_load(path)
    assert metadata is not None
    return metadata


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_hub_s_own_reader_finds_the_metadata(variant: str, tmp_path: Path) -> None:
    spec = parse_variant(variant)
    text = render_card(make_facts(variant))
    assert loaded_metadata(text, tmp_path) == {
        "license": "apache-2.0",
        "base_model": "acme/TinyLlama",
        "base_model_relation": "quantized",
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": list(dict.fromkeys([spec.method.value, f"{spec.bits}-bit", spec.format.value, "bitmill"])),
    }
    assert ModelCard(text).data.get("base_model") == "acme/TinyLlama"


def test_a_local_source_has_no_base_model_and_the_card_says_so(tmp_path: Path) -> None:
    facts = with_source(make_facts(), is_local=True, name="my model", license=None)
    text = render_card(facts)
    metadata = loaded_metadata(text, tmp_path)
    assert not {"base_model", "base_model_relation", "license"} & set(metadata)
    assert "`my model` (a local folder)" in text
    assert "not stated by the source" in section(text, "Provenance")


@pytest.mark.parametrize(
    ("base_models", "expected"),
    [
        (("acme/base",), "acme/base"),
        (("acme/base", "acme/other"), ["acme/base", "acme/other"]),
        (("acme/base", "./somewhere/on/disk", "x\n---\n"), "acme/base"),
        (("not a name",), None),
    ],
)
def test_what_a_local_source_says_that_it_was_made_from_is_carried_through(
    base_models: tuple[str, ...], expected: object, tmp_path: Path
) -> None:
    facts = with_source(make_facts(), is_local=True, name="my-model", base_models=base_models)
    metadata = loaded_metadata(render_card(facts), tmp_path)
    assert metadata.get("base_model") == expected
    assert "base_model_relation" not in metadata


def test_a_source_in_a_bucket_is_named_and_is_no_base_model(tmp_path: Path) -> None:
    facts = with_source(make_facts(), name="s3://models/in/my-model", commit="ab" * 32)
    text = render_card(facts)
    assert not {"base_model", "base_model_relation"} & set(loaded_metadata(text, tmp_path))
    provenance = section(text, "Provenance")
    assert "| source | `s3://models/in/my-model` |" in provenance
    assert f"| fingerprint of its listing | `{'ab' * 32}` |" in provenance
    assert reproduce_command(facts).startswith("bitmill convert s3://models/in/my-model --variant ")
    assert "To make the same weights again, while the bucket holds the same files:" in text
    made_from = with_source(facts, base_models=("acme/base",))
    assert loaded_metadata(render_card(made_from), tmp_path)["base_model"] == "acme/base"


@pytest.mark.parametrize(
    ("license_id", "expected"),
    [
        ("llama3.1", {"license": "llama3.1"}),
        ("Acme: Research\nOnly", {"license": "other", "license_name": "Acme: Research\nOnly"}),
    ],
)
def test_a_licence_that_is_no_identifier_becomes_other_with_its_name(
    license_id: str, expected: dict[str, str], tmp_path: Path
) -> None:
    facts = with_source(make_facts(), license=license_id)
    metadata = front_matter(facts)
    assert {key: metadata[key] for key in metadata if key.startswith("license")} == expected
    assert loaded_metadata(render_card(facts), tmp_path) == metadata


def test_the_card_says_how_to_load_each_format() -> None:
    needs_half = make_facts("gptq-w4-g64", modules=(make_module(in_features=576, group_size=64),))
    gptq, awq, ct = (section(render_card(make_facts(name)), "Load it") for name in VARIANTS[:3])
    assert "bitmill download TARGET/releases/demo/TinyLlama-gptq-w4-g128 TinyLlama-gptq-w4-g128\n" in gptq
    assert "vllm serve ./TinyLlama-gptq-w4-g128\n" in gptq
    assert 'release = "./TinyLlama-gptq-w4-g128"' in gptq
    assert "demo/TinyLlama" not in gptq.replace("TARGET/releases/demo/TinyLlama", "")
    assert all("gptqmodel==7.6.0 optimum==2.3.0" in text and "compressed-tensors" not in text for text in (gptq, awq))
    assert "compressed-tensors==0.20.0" in ct
    assert "gptqmodel" not in ct
    assert "it needs a GPU" in ct
    asymmetric = section(render_card(make_facts("gptq-w4-g64-ct-asym")), "Load it")
    assert '"transformers>=5" accelerate compressed-tensors==0.20.0' in asymmetric
    assert "--dtype half" not in gptq
    assert "vllm serve ./TinyLlama-gptq-w4-g64 --dtype half" in section(render_card(needs_half), "Load it")


def test_the_card_offers_no_program_where_transformers_does_not_load_the_files() -> None:
    modules = (make_module("gpt_neox.layers.0.attention.dense"),)
    facts = with_source(make_facts("awq-w4-g128", modules=modules), architecture="GPTNeoXForCausalLM")
    text = section(render_card(facts), "Load it")
    assert "transformers 5.23.0 does not load these files: " in text
    assert "vllm serve" in text
    assert "AutoModelForCausalLM" not in text
    assert "gptqmodel" not in text


def test_the_card_offers_no_command_where_vllm_does_not_load_the_files() -> None:
    modules = (make_module("transformer.h.0.self_attention.query_key_value"),)
    facts = with_source(make_facts("gptq-w4-g128", modules=modules), architecture="BloomForCausalLM")
    text = section(render_card(facts), "Load it")
    assert "vLLM 0.32.0 does not load these files: " in text
    assert "vllm serve" not in text
    assert "AutoModelForCausalLM" in text


def test_the_card_names_the_package_that_reads_asymmetric_files_with_several_group_sizes() -> None:
    modules = (make_module(), make_module("model.layers.0.mlp.down_proj", group_size=64))
    text = section(render_card(make_facts("gptq-w4-g128-ct-asym", modules=modules)), "Load it")
    assert "compressed-tensors==0.17.0" in text
    assert "several group sizes" in text
    assert "AutoModelForCausalLM" in text


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_snippet_is_a_program(variant: str) -> None:
    programs = [text for text in fences(render_card(make_facts(variant))) if "import" in text]
    assert len(programs) == 1
    compile(programs[0], "card", "exec")


def test_sizes_figures_and_siblings_are_there() -> None:
    text = render_card(make_facts())
    assert "| weights | 336 MB (bfloat16) | 136 MB, 2.47× smaller |" in section(text, "Size")
    assert "4.16 |" in section(text, "Size")
    quality = section(text, "Quality")
    assert "held-out text" in quality
    assert "8,176 predicted tokens" in quality
    assert "| perplexity | 22.61 | 23.94 (×1.0588) |" in quality
    assert "| 0 | 0.0612 |" in quality
    assert "87.31 %" in quality
    siblings = section(text, "Variants of the same conversion")
    assert "**gptq-w4-g128** (this one) | 136 MB | 0.0612 | 23.94 |" in siblings
    assert "| awq-w4-g128 | 152 MB | 0.0533 | 23.71 |" in siblings
    assert "made one variant" in render_card(make_facts(siblings=()))


def test_a_variant_that_failed_is_not_offered() -> None:
    facts = make_facts()
    failed = facts.siblings[0].model_copy(update={"passed": False})
    text = render_card(facts.model_copy(update={"siblings": (failed, *facts.siblings[1:])}))
    family = section(text, "Variants of the same conversion")
    assert "| awq-w4-g128 (failed its gates, not published) | 152 MB |" in family
    assert family.count("not published") == 1


@pytest.mark.parametrize("share", [0.0, 0.1234])
def test_text_that_calibration_has_seen_is_admitted(share: float) -> None:
    facts = make_facts()
    facts = facts.model_copy(update={"quality": facts.quality.model_copy(update={"heldout_overlap": share})})
    quality = section(render_card(facts), "Quality")
    assert ("12.34 % of its tokens lie in runs of 32 that are in the calibration tokens too" in quality) is bool(share)
    assert ("No 32 tokens in a row of it are among the calibration tokens." in quality) is not share


def test_tensor_parallel_sizes_are_answered_with_the_limiting_linear() -> None:
    answers = section(render_card(make_facts()), "Load it")
    assert "| 2 | yes |  |" in answers
    assert "| 4 | no | `model.layers.0.mlp.down_proj`: 704 inputs per rank are not whole groups of 128 |" in answers


def test_a_release_that_no_kernel_takes_is_not_said_to_load() -> None:
    load = section(render_card(make_facts("awq-w8-g128")), "Load it")
    assert "| 1 | no | vLLM's Marlin kernel takes zero points with 4-bit codes only" in load
    assert "fast kernel" not in load
    assert load.count("takes zero points with 4-bit codes only") == 1 + len(TP_SIZES)


@pytest.mark.parametrize("variant", ["gptq-w3-g64", "awq-w2-g64"])
def test_a_release_that_vllm_refuses_shows_no_command_for_it_and_says_why_once(variant: str) -> None:
    text = render_card(make_facts(variant))
    load = section(text, "Load it")
    assert "vllm serve" not in load
    assert load.count("vLLM 0.32.0 does not load these files") == 1
    assert load.count("takes codes of 4 and 8 bits only, not of") == len(TP_SIZES)
    assert "gptqmodel==7.6.0" in load
    assert f"{parse_variant(variant).bits}-bit" in text


def test_a_passing_verdict_shows_every_figure_against_its_budget() -> None:
    text = render_card(make_facts())
    assert "**Verified:** all 4 checks passed." in text
    verdict = section(text, "Verdict")
    assert "| KL divergence (nats per token) | 0.0612 | 0.75 | yes |" in verdict
    assert "| `relative_error` | passed | largest against budget | largest 0.2 |" in verdict


def test_a_failing_verdict_cannot_be_overlooked() -> None:
    facts = make_facts()
    checks = (*facts.verdict.checks, Check(name="generation", passed=False, detail="prompt 2 repeats"))
    text = render_card(facts.model_copy(update={"verdict": make_verdict(facts.variant, checks=checks)}))
    assert "NOT VERIFIED: 1 of 5 checks failed" in text
    assert "Verified:**" not in text
    assert "| `generation` | **FAILED** | prompt 2 repeats |" in text


def test_degradations_are_listed_and_their_absence_is_said() -> None:
    assert "None: every linear was solved as asked." in section(render_card(make_facts()), "Degradations")
    modules = tuple(make_module(f"m.{i}.q", degradations=("damping 0.04",)) for i in range(52))
    listed = section(render_card(make_facts(modules=modules)), "Degradations")
    assert "In 52 places" in listed
    assert listed.count("damping 0.04") == 50
    assert "and 2 more in `bitmill.json`" in listed


def test_what_was_left_out_or_done_otherwise_is_named_with_its_reason() -> None:
    facts = make_facts(
        modules=(
            make_module("m.0.down_proj", group_size=64, note="128 does not divide 576"),
            make_module("m.1.down_proj", group_size=64, note="128 does not divide 576"),
            make_module("m.0.up_proj", bits=16, group_size=0, note="left unquantized: the spec ignores it"),
        ),
        dropped={"m.0.inv_freq": "recomputed", "m.1.inv_freq": "recomputed", "mtp.weight": "not part of the model"},
    )
    text = section(render_card(facts), "What differs from the scheme")
    assert "| `m.*.down_proj` | 2 | 4 bit, groups of 64: 128 does not divide 576 |" in text
    assert "| `m.0.up_proj` | 1 | left unquantized: the spec ignores it |" in text
    assert "| `m.*.inv_freq` | 2 | recomputed |" in text
    assert "| `mtp.weight` | 1 | not part of the model |" in text
    assert "Copied unquantized: embedding (1), norm (13)." in text
    plain = section(render_card(make_facts()), "What differs from the scheme")
    assert "all follow the scheme" in plain
    assert "Dropped from the source: nothing." in plain


def test_the_ten_worst_linears_are_shown_and_the_rest_is_referred_to() -> None:
    errors = section(render_card(make_facts()), "Error per module")
    assert errors.count("model.layers.") == 10
    assert "`bitmill.json` holds all 84" in errors
    assert "No linear was quantized." in render_card(make_facts(modules=()))


def test_provenance_names_source_calibration_versions_and_fingerprint() -> None:
    facts = make_facts()
    text = section(render_card(facts), "Provenance")
    for expected in (
        f"| commit | `{facts.source.commit}` |",
        "| licence | apache-2.0 |",
        "| calibration text | `builtin` |",
        "| calibration tokens | 128 × 512, seed 0 |",
        "| special tokens | none added |",
        facts.calibration.tokens_digest,
        facts.spec_fingerprint,
        "bitmill 0.1.0, compressed-tensors 0.20.0, torch 2.13.0, transformers 5.23.0",
        "cpu float32",
    ):
        assert expected in text


def test_a_short_name_is_reproduced_by_flags() -> None:
    facts = make_facts()
    assert reproduce_spec(facts) is None
    assert reproduce_command(facts) == (
        f"bitmill convert acme/TinyLlama@{facts.source.commit} --variant gptq-w4-g128 --calibration builtin "
        "--samples 128 --length 512 --to releases"
    )


@pytest.mark.parametrize(
    ("text", "flag"),
    [("builtin:calibration", "builtin"), ("my text.txt", "'my text.txt'"), ("hub:a/b@c:d.txt", "hub:a/b@c:d.txt")],
)
def test_the_command_takes_the_calibration_text_as_the_flag_does(text: str, flag: str) -> None:
    facts = make_facts()
    facts = facts.model_copy(update={"calibration": facts.calibration.model_copy(update={"text": text})})
    assert f"--calibration {flag} --samples" in reproduce_command(facts)


def test_a_local_source_is_reproduced_from_a_folder() -> None:
    assert reproduce_command(with_source(make_facts(), is_local=True)).startswith("bitmill convert ./acme/TinyLlama ")


def test_what_flags_cannot_say_is_reproduced_by_a_spec_file() -> None:
    variant = VariantSpec.model_validate(
        {"name": "mine", "method": "gptq", "format": "gptq", "damping": 0.05, "ignore": ["re:down_proj$"]}
    )
    facts = make_facts(variant)
    facts = facts.model_copy(update={"calibration": facts.calibration.model_copy(update={"seed": 7})})
    text = reproduce_spec(facts)
    assert text is not None
    spec = build_spec(yaml.safe_load(text) | {"source": "acme/TinyLlama", "targets": ["releases"]}, "card")
    assert spec.variants == (variant,)
    words = shlex.split(reproduce_command(facts))
    assert words[3:5] == ["--spec", "spec.yaml"]
    assert "--variant" not in words
    assert words[words.index("--seed") + 1] == "7"
    assert text in fences(render_card(facts))


def reproduced(facts: ReleaseFacts, folder: Path) -> ConversionSpec:
    """Return the spec that the card's command means to the command line."""
    words = shlex.split(reproduce_command(facts))
    text = reproduce_spec(facts)
    assert ("--spec" in words) is (text is not None)
    with convert_command.make_context("convert", words[2:]) as context:
        names = inspect.signature(spec_from_flags).parameters.keys() - {"command"}
        flags = {name: context.params[name] for name in names}
    if text is not None:
        (folder / "spec.yaml").write_text(text, encoding="utf-8")
        flags["spec_file"] = folder / flags["spec_file"]
    return spec_from_flags(command="convert", **flags)


GATES: list[dict[str, Any]] = [
    {},
    {"max_kl": 2.5, "max_relative_error": None, "max_degradations": 7},
    {"max_perplexity_ratio": 1e-9, "generated_tokens": 8},
    {"heldout": "my text.txt", "heldout_samples": 3, "heldout_length": 64},
    {"prompts": [{"prompt": "2 + 2 =", "expect": "^ 4\\b"}, {"prompt": "Çok güzel: \n"}]},
]


@pytest.mark.parametrize("gates", GATES, ids=str)
@pytest.mark.parametrize("variant", ["gptq-w4-g128", "rtn-w8-g128"])
def test_the_command_judges_by_the_same_gates(variant: str, gates: dict[str, Any], tmp_path: Path) -> None:
    spec = GateSpec.model_validate(gates)
    facts = make_facts(variant)
    heldout = {
        "heldout_text": "builtin:heldout" if spec.heldout == "builtin" else spec.heldout,
        "heldout_samples": spec.heldout_samples,
        "heldout_length": spec.heldout_length,
    }
    verdict = {
        "budgets": resolve_budgets(spec, facts.variant),
        "samples": tuple(make_sample(item.prompt, " and", expect=item.expect) for item in spec.prompts),
    }
    facts = facts.model_copy(
        update={
            "quality": facts.quality.model_copy(update=heldout),
            "verdict": make_verdict(facts.variant, **verdict),
            "generated_tokens": spec.generated_tokens,
        }
    )
    again = reproduced(facts, tmp_path)
    assert resolve_budgets(again.gates, again.variants[0]) == resolve_budgets(spec, facts.variant)
    same = ("heldout", "heldout_samples", "heldout_length", "prompts", "generated_tokens")
    assert again.gates.model_dump(include=set(same)) == spec.model_dump(include=set(same))
    assert again.variants == (facts.variant,)
    assert again.calibration == CalibrationSpec()


def test_samples_keep_the_border_between_prompt_and_continuation() -> None:
    facts = make_facts()
    samples = (make_sample("```\n# heading", '"\n---\n\x1b[2J```` </p>'),)
    text = render_card(facts.model_copy(update={"verdict": make_verdict(facts.variant, samples=samples)}))
    shown = [fence for fence in fences(text) if fence.startswith("prompt:")]
    assert shown == ['prompt:  "```\\n# heading"\nrelease: "\\"\\n---\\n\\u001b[2J```` </p>"\n']


def test_hostile_names_change_neither_the_structure_nor_the_metadata(tmp_path: Path) -> None:
    evil = "x`|\n---\n# <img src=x onerror=y> **b** [l](j)"
    facts = make_facts(
        modules=(make_module(evil, note=evil, degradations=(evil,)),),
        kept={evil: evil},
        dropped={evil: evil},
        versions={evil: evil},
        compute=evil,
    )
    facts = with_source(facts, name=evil, architecture=evil, license=evil, dtype=evil, is_local=True)
    calm = with_source(
        make_facts(
            modules=(make_module("x", note="x", degradations=("x",)),),
            kept={"x": "x"},
            dropped={"x": "x"},
            versions={"x": "x"},
        ),
        is_local=True,
        license="Some Licence",
    )
    parser = MarkdownIt("commonmark").enable("table")

    def body(text: str) -> str:
        return (
            text.split("\n---\n", 1)[1] if text is calm_text else re.split(r"\n- bitmill\n---\n", text, maxsplit=1)[1]
        )

    calm_text, evil_text = render_card(calm), render_card(facts)
    outline = [token.type for token in parser.parse(body(evil_text))]
    assert outline == [token.type for token in parser.parse(body(calm_text))]
    inline = [child.type for token in parser.parse(body(evil_text)) for child in token.children or []]
    assert "html_inline" not in inline
    assert "link_open" not in inline
    assert loaded_metadata(evil_text, tmp_path)["license_name"] == evil


def test_the_same_facts_give_the_same_text_whatever_the_order_of_mappings() -> None:
    facts = make_facts()
    turned = facts.model_copy(
        update={
            "kept": dict(reversed(facts.kept.items())),
            "versions": dict(reversed(facts.versions.items())),
        }
    )
    assert render_card(facts) == render_card(turned)


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_text_is_tidy(variant: str) -> None:
    text = render_card(make_facts(variant))
    assert text.endswith("\n")
    assert not text.endswith("\n\n")
    assert "\n\n\n" not in text
    assert not [line for line in text.splitlines() if line != line.rstrip()]
    assert "None" not in text.replace("None: ", "")


def test_a_card_of_many_blocks_stays_readable() -> None:
    assert len(render_card(make_facts(num_blocks=80, modules=make_modules(80))).splitlines()) < 260


def test_a_name_that_the_template_does_not_get_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    values = card._values

    def lacking(facts: ReleaseFacts) -> dict[str, Any]:
        return {key: value for key, value in values(facts).items() if key != "scheme"}

    monkeypatch.setattr(card, "_values", lacking)
    with pytest.raises(UndefinedError, match="scheme"):
        render_card(make_facts())


@pytest.mark.parametrize(("variant", "tags"), [("w8a8-int8", ["w8a8"]), ("fp8-dynamic", ["fp8"]), ("rtn-w8-g128", [])])
def test_rounded_inputs_are_said_in_tags_in_words_and_beside_the_figures(variant: str, tags: list[str]) -> None:
    modules = tuple(module.model_copy(update={"bits": 8}) for module in make_facts(variant).modules)
    facts = make_facts(variant, modules=modules)
    text, found = render_card(facts), front_matter(facts)["tags"]
    assert [tag for tag in found if tag in ("w8a8", "fp8")] == tags
    said = ("inputs rounded alike with a scale for each token", "Inputs of linears were rounded", "of weights alone")
    assert [words in text for words in said] == [bool(tags)] * 3
    assert ("8-bit floating-point" in text) == (variant == "fp8-dynamic")
    assert "--dtype half" not in text
