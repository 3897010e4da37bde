"""The dataset manifest: which files hold the samples, in which order, and how many. Names and counts; nothing here opens a file."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path

from model import disk
from model.digest import digest_of, sealed, unsealed
from model.errors import UserError


@dataclass(frozen=True)
class DataFile:
    """One parquet file and what was counted in it."""

    url: str
    """Where it is opened: an absolute local path or an fsspec URL."""
    name: str
    """Its name inside the dataset; the same wherever the dataset lies."""
    size: int
    """Bytes."""
    digest: str | None
    """SHA-256 of a local file or of a Hub file, the server's etag elsewhere; null where there is neither."""
    rows: int
    """Rows, filtered or not."""
    samples: int
    """The first so many rows that pass the filter are the dataset's."""
    train_samples: int
    """How many of those are trained on."""
    text_bytes: int
    """Uncompressed bytes of the columns that make the text, all rows, by the footer: how heavy a sample of this file is."""
    modified_ns: int | None = None
    """When a local file was last written: it is hashed again only if it was written since."""


@dataclass(frozen=True)
class DatasetManifest:
    """The files that hold the samples, in the dataset's order."""

    path: str
    """`data.path` as it was given."""
    revision: str | None
    """The pinned commit on the Hub."""
    files: list[DataFile]
    tokens_per_sample: float
    """Mean over some of the first samples, end-of-text included: an estimate for planning, never for the order of the data."""
    left_out: list[str] = field(default_factory=list)
    """What is wrong with each file that `data.quarantine` left out."""

    @property
    def samples(self) -> int:
        """Samples an epoch, train and validation together."""
        return sum(file.samples for file in self.files)

    @property
    def train_samples(self) -> int:
        """Samples an epoch that are trained on."""
        return sum(file.train_samples for file in self.files)

    @property
    def digest(self) -> str:
        """SHA-256 over what identifies the data. A copy in another place has the same one."""
        return digest_of([[file.name, file.size, file.digest, file.rows, file.samples, file.text_bytes] for file in self.files])

    def write(self, path: Path) -> None:
        """Write the manifest as JSON, sealed, in one move."""
        fields = {**asdict(self), "samples": self.samples, "train_samples": self.train_samples, "digest": self.digest}
        disk.write_file(path, sealed(fields).encode())

    @classmethod
    def read(cls, path: Path) -> DatasetManifest:
        """Read what `write` wrote.

        Raises:
            UserError: not a dataset manifest, or changed since it was written.
        """
        try:
            fields = unsealed(path.read_text(encoding="utf-8"))
            files = [DataFile(**file) for file in fields["files"]]
            manifest = cls(fields["path"], fields["revision"], files, fields["tokens_per_sample"], fields["left_out"])
        except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
            raise UserError(f"{path}: not the dataset manifest that build-config wrote ({error}); run build-config again") from None
        return manifest
