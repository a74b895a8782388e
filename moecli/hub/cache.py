"""Knows how the cache lies on disk that all tools of the hub share; downloads nothing.

A repository is a folder `models--org--name`: `blobs/` holds files by their digest, `snapshots/` a
folder of links for each commit, `refs/` the commit that a branch or tag had when it was asked for.
"""

import os
from dataclasses import dataclass
from pathlib import Path

from moecli.hub.client import RemoteFile, Repository, cache_directory


@dataclass(frozen=True)
class CachedRepository:
    """The folder of one repository; it need not exist."""

    path: Path

    @classmethod
    def of(cls, repo_id: str) -> "CachedRepository":
        return cls(cache_directory() / f"models--{repo_id.replace('/', '--')}")

    def blob(self, file: RemoteFile) -> Path:
        return self.path / "blobs" / file.digest

    def snapshot(self, commit: str) -> Path:
        return self.path / "snapshots" / commit

    def snapshot_of(self, revision: str) -> Path | None:
        """The folder of a branch, tag or commit, as far as the cache knows."""
        reference = self.path / "refs" / revision
        commit = reference.read_text().strip() if reference.is_file() else revision
        found = self.snapshot(commit)
        return found if found.is_dir() else None

    def has(self, repository: Repository, file: RemoteFile) -> bool:
        return (self.snapshot(repository.commit) / file.name).is_file()

    def link(self, repository: Repository, file: RemoteFile) -> None:
        """Enter a blob into the snapshot of its commit."""
        link = self.snapshot(repository.commit) / file.name
        link.parent.mkdir(parents=True, exist_ok=True)
        temporary = link.with_name(f".{link.name}.{os.getpid()}")
        temporary.symlink_to(os.path.relpath(self.blob(file), link.parent))
        os.replace(temporary, link)

    def remember(self, repository: Repository) -> None:
        """Note which commit the revision means now."""
        if repository.revision == repository.commit:
            return
        reference = self.path / "refs" / repository.revision
        reference.parent.mkdir(parents=True, exist_ok=True)
        temporary = reference.with_name(f".{reference.name}.{os.getpid()}")
        temporary.write_text(repository.commit)
        os.replace(temporary, reference)
