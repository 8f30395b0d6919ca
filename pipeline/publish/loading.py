"""How a release is loaded in vLLM and transformers: commands, snippets, and what is known to keep them from it.

The package versions are those that the formats were tried with (``formats/loaders.py``).
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Sequence
from dataclasses import dataclass

from pipeline.formats.loaders import Contents, Limit, Loader, limits
from pipeline.publish.tensor_parallel import kernel_refusal
from pipeline.spec import Format, VariantSpec


@dataclass(frozen=True)
class LoadingGuide:
    """What to type to load a release, as plain text to be fenced.

    Attributes:
        download_shell: Shell command that makes a checked copy; ``TARGET`` stands for where the release was published.
        vllm_shell: Shell commands that install and serve; empty when vLLM does not load it.
        vllm_notes: Known limits in vLLM, as Markdown sentences.
        transformers_shell: Shell command that installs what is needed; empty when transformers does not load it.
        transformers_python: Python program that generates; empty when transformers does not load it.
        transformers_notes: Needed packages and known limits in transformers, as Markdown sentences.
    """

    download_shell: str
    vllm_shell: str
    vllm_notes: tuple[str, ...]
    transformers_shell: str
    transformers_python: str
    transformers_notes: tuple[str, ...]


def loading_guide(contents: Contents, variant: VariantSpec, release: str, *, runs_half_only: bool) -> LoadingGuide:
    """Return the guide for a release.

    Args:
        contents: What it holds.
        variant: Its variant.
        release: ``namespace/name``. It is no repository of a hub, so engines are given a folder of that name.
        runs_half_only: Whether only vLLM's general kernel takes its shapes, which computes in float16.
    """
    dtype = " --dtype half" if runs_half_only else ""
    folder = release.rpartition("/")[2]
    known = limits(contents)
    vllm = [limit for limit in known if limit.loader is Loader.VLLM]
    serve = f"pip install vllm\nvllm serve {shlex.quote('./' + folder)}{dtype}"
    transformers = [limit for limit in known if limit.loader is Loader.TRANSFORMERS]
    loads = all(limit.loads for limit in transformers)
    packages = (_packages_note(contents.format),) if loads else ()
    loads_vllm = all(limit.loads for limit in vllm)
    # Of files that vLLM does not load at all, the limit already says why.
    refusal = kernel_refusal(variant, (bits for bits, _ in contents.grids)) if loads_vllm else ""
    refused = (f"{refusal[0].upper()}{refusal[1:]}.",) if refusal else ()
    return LoadingGuide(
        download_shell=shlex.join(["bitmill", "download", f"TARGET/releases/{release}", folder]),
        vllm_shell=serve if loads_vllm else "",
        vllm_notes=(*refused, *(limit.text for limit in vllm)),
        transformers_shell=f"pip install {_requirements(contents.format, transformers)}" if loads else "",
        transformers_python=_python("./" + folder) if loads else "",
        transformers_notes=(*packages, *(limit.text for limit in transformers)),
    )


def _requirements(format_: Format, known: Sequence[Limit]) -> str:
    match format_:
        case Format.GPTQ | Format.GPTQ_V2 | Format.AWQ:
            return '"transformers>=5" accelerate gptqmodel==7.6.0 optimum==2.3.0'
        case Format.COMPRESSED_TENSORS:
            package = next((limit.package for limit in known if limit.package), "compressed-tensors==0.20.0")
            return f'"transformers>=5" accelerate {package}'


def _packages_note(format_: Format) -> str:
    match format_:
        case Format.GPTQ | Format.GPTQ_V2 | Format.AWQ:
            return "transformers 5 reads this format through the `gptqmodel` and `optimum` packages."
        case Format.COMPRESSED_TENSORS:
            return "transformers reads this format natively once the `compressed-tensors` package is installed."


def _python(folder: str) -> str:
    # A JSON string is a Python string, whatever the name holds.
    return f"""from transformers import AutoModelForCausalLM, AutoTokenizer

release = {json.dumps(folder)}
tokenizer = AutoTokenizer.from_pretrained(release)
model = AutoModelForCausalLM.from_pretrained(release, dtype="auto", device_map="auto")

inputs = tokenizer("The people of the United States", return_tensors="pt").to(model.device)
output = model.generate(**inputs, max_new_tokens=32, do_sample=False)
print(tokenizer.decode(output[0], skip_special_tokens=True))"""
