"""Which revision of a hub id a loaded model may be: newer versions of transformers do not keep it."""

from __future__ import annotations

from pathlib import Path

from huggingface_hub import constants
from huggingface_hub.errors import HFValidationError
from huggingface_hub.file_download import repo_folder_name

from .files import WEIGHTS


def loaded_commits(repo: str) -> list[str]:
    """The commits of a hub id whose weights are on this machine, that of its main branch first.

    What was loaded is one of them, unless it came from a cache directory of its own.
    """
    try:
        folder = Path(constants.HF_HUB_CACHE) / repo_folder_name(repo_id=repo, repo_type="model")
    except HFValidationError:  # a directory that is no longer there
        return []
    main = folder / "refs" / "main"
    first = main.read_text(encoding="utf-8").strip() if main.is_file() else None
    commits = [path.name for path in folder.glob("snapshots/*") if _has_weights(path)]
    return sorted(commits, key=lambda commit: (commit != first, commit))


def _has_weights(directory: Path) -> bool:
    return any(True for pattern in WEIGHTS for _ in directory.glob(pattern))
