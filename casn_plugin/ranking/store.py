"""An index's folder and what one process has opened of it, changed behind the lock."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from casn_plugin.doors import check_weight
from casn_plugin.files import move
from casn_plugin.ranking.company import locked, tidy
from casn_plugin.ranking.contents import Contents
from casn_plugin.ranking.manifest import Manifest
from casn_plugin.ranking.shards import Written, without_taken


class Store:
    """The folder of an index; what it holds is replaced as a whole.

    All methods but :meth:`locked` and :meth:`open` are called while it is locked.

    Args:
        folder: of the index.
        verify: compare features and maps with their checksums when they are first asked for.
        timeout: so many seconds are waited for the lock, >= 0.

    Attributes:
        contents: what has been opened.

    Raises:
        FileNotFoundError, ValueError: as :class:`Contents`; ValueError: a negative timeout.

    Example:
        >>> from tempfile import TemporaryDirectory
        >>> with TemporaryDirectory() as name:
        ...     Manifest(model="0" * 64, dtype=None).write(Path(name))
        ...     first, second = (Store(Path(name), verify=True, timeout=1.0) for _ in range(2))
        ...     with first.locked():
        ...         first.commit(Manifest(model="0" * 64, dtype=None, added=3))
        ...     with second.locked():
        ...         second.refresh()
        ...     second.contents.manifest.added
        3
    """

    def __init__(self, folder: Path, *, verify: bool, timeout: float) -> None:
        self._folder, self._timeout = folder, float(check_weight("timeout", timeout))
        self._verify = verify
        manifest = Manifest.read(folder)
        while True:
            try:
                self.contents = Contents(folder, manifest, verify=verify)
                break
            except FileNotFoundError:  # deleted since the manifest was read?
                before, manifest = manifest, Manifest.read(folder)
                if manifest == before:
                    raise

    @contextmanager
    def locked(self) -> Iterator["Store"]:
        """Keeps every other writer out of the folder.

        Raises:
            TimeoutError: another one is in it, and does not finish.
        """
        with locked(self._folder, self._timeout):
            yield self

    def open(self, manifest: Manifest) -> None:
        """Takes over what another manifest names; what is open already is not read again."""
        self.contents = self._opened(manifest)

    def refresh(self) -> None:
        """Takes in what other processes have changed.

        Raises:
            ValueError: into an index of other images.
        """
        before, manifest = self.contents.manifest, Manifest.read(self._folder)
        if manifest.made != before.made:
            raise self._changed()
        if manifest != before:
            self.open(manifest)

    def check_unchanged(self) -> None:
        """Raises ValueError where another process has changed the index."""
        if Manifest.read(self._folder) != self.contents.manifest:
            raise self._changed()

    def take(self, written: Sequence[Written], *, skip: bool) -> None:
        """Takes new shards over, after those that are there.

        Args:
            written: the shards.
            skip: leave out images whose name is taken.

        Raises:
            FileNotFoundError: a shard that is not there.
            ValueError: a name that is taken, or images of another kind or size.
        """
        manifest = self.contents.manifest
        new = without_taken(written, set(self.contents.names), skip=skip)
        after = manifest.of(manifest.shards, [entry for _, entry in new])
        try:
            for path, entry in new:
                if not path.is_file():
                    raise FileNotFoundError(f"the gallery index lacks its shard {path}")
                move(path, self._folder / entry.file)
            self.commit(after)
        except BaseException:
            with suppress(OSError, ValueError):  # of the manifest
                tidy(self._folder, Manifest.read(self._folder).files)
            raise

    def commit(self, manifest: Manifest) -> None:
        """Puts another manifest into its place and takes it over.

        Then deletes the shards that it does not name, and what a killed process left.
        """
        contents = self._opened(manifest)
        manifest.write(self._folder)
        self.contents = contents
        tidy(self._folder, manifest.files)

    def _opened(self, manifest: Manifest) -> Contents:
        return Contents(self._folder, manifest, verify=self._verify, opened=self.contents)

    def _changed(self) -> ValueError:
        return ValueError(
            f"the index in {self._folder} has been changed by another process: open it anew"
        )
