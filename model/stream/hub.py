"""Datasets on the Hugging Face Hub: `datasets` finds the files, the commit is pinned, sizes and digests come with the listing."""

from __future__ import annotations

import re
from typing import Any

from model.errors import UserError
from model.stream.manifest import DataFile
from model.stream.source import describe

_ANSWER_S = 5.0
"""The first question to the Hub is asked once, and must be answered in this time."""
_PAGE = 500
"""Files asked about at once."""


def is_dataset_id(path: str) -> bool:
    """Whether `path` could name a dataset on the Hub: `owner/name`."""
    return re.fullmatch(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", path) is not None


def find_files(name: str, revision: str | None) -> tuple[str, list[DataFile]]:
    """The commit that `revision` (None: the default branch) means now, and the dataset's training files at it, nothing counted yet.

    Raises:
        UserError: the Hub cannot be reached, knows no such dataset or revision, or it is not made of parquet files.
    """
    import huggingface_hub
    from huggingface_hub.errors import RepositoryNotFoundError, RevisionNotFoundError

    api = huggingface_hub.HfApi()
    try:
        commit = api.dataset_info(name, revision=revision, timeout=_ANSWER_S).sha
    except RevisionNotFoundError:
        raise UserError(f"data.revision: {name} has no revision {revision!r} on the Hub") from None
    except RepositoryNotFoundError:
        raise UserError(f"data.path: {name} is neither a folder here nor a dataset on the Hub (a private one needs HF_TOKEN)") from None
    except Exception as error:
        raise UserError(f"data.path: {name} cannot be reached ({describe(error)}); check the network, or give a local folder") from None
    assert commit is not None
    return commit, _parquet_files(api, name, commit)


def _parquet_files(api: Any, name: str, commit: str) -> list[DataFile]:
    """The parquet files of the dataset's training split, as `datasets` finds them, in its order."""
    import datasets

    datasets.disable_progress_bars()
    try:
        builder = datasets.load_dataset_builder(name, revision=commit)
        splits = {str(split): list(urls) for split, urls in (builder.config.data_files or {}).items()}
        urls = splits.get("train") or (next(iter(splits.values())) if len(splits) == 1 else [])
        prefix = f"hf://datasets/{name}@{commit}/"
        paths = [url.removeprefix(prefix) for url in urls if url.startswith(prefix) and url.endswith(".parquet")]
        if paths:
            pages = [paths[first : first + _PAGE] for first in range(0, len(paths), _PAGE)]
            info = {file.path: file for page in pages for file in api.get_paths_info(name, page, revision=commit, repo_type="dataset")}
            return [DataFile(prefix + path, path, info[path].size, _digest(info[path]), 0, 0, 0) for path in paths]
    except Exception as error:
        raise UserError(f"data.path: {name} is on the Hub, but `datasets` cannot read it ({describe(error)})") from error
    raise UserError(
        f"data.path: {name} has no parquet files to train on (splits: {', '.join(splits) or 'none'}); "
        "many datasets have them under data.revision: refs/convert/parquet"
    )


def _digest(file: Any) -> str:
    return str(file.lfs.sha256 if file.lfs else file.blob_id)
