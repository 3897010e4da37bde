"""Datasets on the Hugging Face Hub: `datasets` finds the files, the commit is pinned, sizes and digests come with the listing."""

from __future__ import annotations

import re
from typing import Any

from model.errors import UserError
from model.stream import source
from model.stream.manifest import DataFile
from model.stream.source import describe

_ANSWER_S = 5.0
"""The first question to the Hub is asked once, and must be answered in this time."""
_PAGE = 500
"""Files asked about at once."""
_PINNED = re.compile(r"hf://datasets/([^/@]+/[^/@]+)@([0-9a-f]{40})/(.+)")


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
    try:
        return commit, source.in_time(lambda: _parquet_files(api, name, commit), source.SILENCE_S)
    except TimeoutError as error:
        raise UserError(f"data.path: {name} cannot be listed ({describe(error)}); check the network, or give a local folder") from None


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
            return [DataFile(prefix + path, path, info[path].size, _digest(info[path]), 0, 0, 0, 0) for path in paths]
    except Exception as error:
        raise UserError(f"data.path: {name} is on the Hub, but `datasets` cannot read it ({describe(error)})") from error
    raise UserError(
        f"data.path: {name} has no parquet files to train on (splits: {', '.join(splits) or 'none'}); "
        "many datasets have them under data.revision: refs/convert/parquet"
    )


def _digest(file: Any) -> str:
    return str(file.lfs.sha256 if file.lfs else file.blob_id)


def is_pinned(url: str) -> bool:
    """Whether it is a file of a dataset at a commit, as `find_files` names them."""
    return _PINNED.fullmatch(url) is not None


class PinnedFiles:
    """Files at a commit, as much of a file system as reading needs, one request a question.

    `HfFileSystem` tries again by itself, for minutes, whatever a server asks for; trying again is model/stream/source.py's.
    """

    def info(self, url: str) -> dict[str, Any]:
        """The file's `size`, and its digest as `ETag`."""
        import huggingface_hub

        name, commit, path = _parts(url)
        found = huggingface_hub.HfApi().get_paths_info(name, path, revision=commit, repo_type="dataset")
        if not found:
            raise FileNotFoundError(f"no {path} at {commit}")
        return {"size": found[0].size, "ETag": _digest(found[0])}

    def open(self, url: str, mode: str, cache_type: str) -> _PinnedFile:
        """The file, to be read in ranges; nothing is asked yet."""
        assert (mode, cache_type) == ("rb", "none")
        return _PinnedFile(url)


class _PinnedFile:
    """Each `read` is one request."""

    def __init__(self, url: str) -> None:
        import huggingface_hub

        name, commit, path = _parts(url)
        self._url = huggingface_hub.hf_hub_url(name, path, repo_type="dataset", revision=commit)
        self._position = 0

    def seek(self, position: int) -> None:
        self._position = position

    def read(self, length: int) -> bytes:
        from huggingface_hub.utils import build_hf_headers, get_session, hf_raise_for_status

        span = {"Range": f"bytes={self._position}-{self._position + length - 1}"}
        response = get_session().get(self._url, headers={**build_hf_headers(), **span}, timeout=source.SILENCE_S)
        hf_raise_for_status(response)
        return bytes(response.content)

    def close(self) -> None:
        pass


def _parts(url: str) -> tuple[str, str, str]:
    match = _PINNED.fullmatch(url)
    assert match is not None
    return match[1], match[2], match[3]
