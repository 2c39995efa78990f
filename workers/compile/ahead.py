"""What can be done for compiled pieces while weights are still read: fetch, verify and try them, import a compiler.

Leaves its results where :func:`workers.compile.compile_model` looks: blobs on this node, a verdict on the pieces,
modules in this process. Whatever goes wrong here goes wrong there again, and is dealt with there.
"""

from __future__ import annotations

import logging

import torch

from workers.artifacts.errors import RefusedError, StoreError
from workers.artifacts.key import BundleKey
from workers.artifacts.library import ArtifactLibrary
from workers.compile.check_process import is_wanted, not_needed
from workers.compile.errors import CompileError
from workers.compile.prefetch import prefetch_compiler
from workers.compile.self_check import check_on_node
from workers.compile.stored import StoredPieces
from workers.config import CompilationConfig
from workers.startup.account import StartupAccount

logger = logging.getLogger(__name__)


def get_pieces_ahead(
    config: CompilationConfig, device: torch.device, library: ArtifactLibrary, key: BundleKey, account: StartupAccount
) -> None:
    """Look for the pieces of ``key`` and have everything at hand that loading them needs.

    Args:
        device: Where they will run.
    """
    formats = config.piece_formats(device.type)
    sizes = config.all_sizes()
    try:
        with account.phase("find"):
            pieces = StoredPieces(library, key, formats, sizes).find()
        needed = formats[-1] if pieces is None else pieces.piece_format
        # AOTInductor's pieces are built by a compiler and loaded without; plain ones never need it.
        if needed == "standalone" or (needed == "aoti" and pieces is None):
            prefetch_compiler()
        if pieces is None:
            not_needed()
            return
        with account.phase("fetch, verify") as phase:
            pieces.fetch(sizes)
            phase.num_bytes = sum(build.num_bytes for build in pieces.builds(sizes))
        if is_wanted(library.config):
            with account.phase("self-check") as phase:
                has_run = check_on_node(pieces, sizes, str(device), library.config.self_check_timeout_s)
                phase.note = "" if has_run else "passed before on this node"
    except (CompileError, RefusedError, StoreError) as error:
        logger.debug("not ahead: %s", error)
