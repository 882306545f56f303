"""Checks of all image files before a search: unreadable files, and files that are there twice."""

import hashlib
import io
import os
from collections.abc import Collection, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import PIL

from tanglenas_datasets.decoding import UNREADABLE, decode, is_nearly_black, reason
from tanglenas_datasets.folders import listed, shown
from tanglenas_engine import Progress, TangleNASError, write_atomic

MOST_NAMED = 50
"""The number of unreadable files that a message names."""
MOST_GROUPS = 3
"""The number of groups of equal files that a message names."""
MOST_ALIKE = 10
"""The number of equal files of one group that a message names."""
_AT_ONCE = 256


def check_all(paths: Sequence[str], folder: Path, progress: Progress) -> list[str]:
    """Decode every file once, in as many threads as there are cores, and return the digest of each.

    Contents that were decoded before are not decoded again. Grey images of 16 bits that use few levels are told.

    Args:
        paths: The files.
        folder: The folder for the digests of contents that were decoded, and for a list of many unreadable files.
        progress: The progress output for a person.

    Raises:
        TangleNASError: Files are no readable images.
    """
    memory = folder / "decoded-images"
    known = set(memory.read_text("ascii", "replace").split()) if memory.exists() else set()
    # Another version of Pillow may refuse what this one reads, and another one of these checks tells other things.
    key = f"Pillow {PIL.__version__}, checks 2".encode()
    digests: list[str] = []
    bad: dict[str, str] = {}
    dark: dict[str, str] = {}  # told each time, so not remembered

    def check(path: str) -> tuple[str, str, str]:
        """Return the path, the digest of the content, and why it is no readable image, or ""."""
        digest = ""
        try:
            content = Path(path).read_bytes()
            digest = hashlib.blake2b(content, digest_size=16, key=key).hexdigest()
            if digest not in known:
                decode(io.BytesIO(content), "RGB")
                if is_nearly_black(io.BytesIO(content)):
                    dark[path] = digest
        except UNREADABLE as error:
            return path, digest, reason(error)
        return path, digest, ""

    try:
        with ThreadPoolExecutor(_cores()) as threads, progress.stage("decoding images", len(paths), 0) as line:
            for start in range(0, len(paths), _AT_ONCE):
                for path, digest, why in threads.map(check, paths[start : start + _AT_ONCE]):
                    line.advance()
                    if why:
                        bad[path] = why
                    else:
                        digests.append(digest)
                done = min(start + _AT_ONCE, len(paths))
                line.epoch(done, len(paths), f"{len(bad):,} unreadable" if bad else "all readable")
    finally:
        if new := set(digests) - known - set(dark.values()):
            write_atomic(memory, "\n".join(sorted(known | new)) + "\n")
    if bad:
        every = folder / "unreadable-images.txt"
        if len(bad) > MOST_NAMED:
            write_atomic(every, "".join(f"{shown(path)}: {why}\n" for path, why in bad.items()))
        raise unreadable(bad, len(paths), f" (all of them: {every})" if len(bad) > MOST_NAMED else "")
    if dark:
        progress.note(
            "image_folder: grey images of 16 bits use a sixteenth of the levels at most, as those of 12 bits do, so "
            f"that they are almost black, with 16 levels of 256: {listed(sorted(dark), MOST_GROUPS)} "
            f"({len(dark):,} in all). Scale their levels up to 65,535"
        )
    return digests


def twins(paths: Sequence[str], digests: Sequence[str], test: Collection[int]) -> str:
    """Return a sentence about images that are there twice, with the same bytes in files of their own, or "".

    Args:
        paths: The files.
        digests: The digest of each.
        test: The numbers of the files of the test part; none where the test split is drawn from all files.
    """
    alike: dict[str, list[int]] = {}
    for number, digest in enumerate(digests):
        alike.setdefault(digest, []).append(number)
    groups = [group for group in alike.values() if len(group) > 1]
    if not groups:
        return ""
    shared = [group for group in groups if 0 < sum(number in test for number in group) < len(group)]
    told = shared or groups
    named = [_named([paths[number] for number in group]) for group in told[:MOST_GROUPS]]
    pairs = ", ".join(named) + (f" and {len(told) - MOST_GROUPS:,} more" if len(told) > MOST_GROUPS else "")
    if shared:
        count = sum(number in test for group in shared for number in group)
        return (
            f"image_folder: {count:,} of {len(test):,} test images are in the training data too, byte for byte, so "
            f"that the test accuracy is too high: {pairs}. Remove one of each"
        )
    where = "" if test else ", and a copy may fall into the test split of an image that is trained on"
    copies = sum(len(group) - 1 for group in groups)
    return f"image_folder: {copies:,} images are copies of others, byte for byte{where}: {pairs}. Remove one of each"


def _named(alike: Sequence[str]) -> str:
    """Return the paths of equal files, the first of them if they are many."""
    more = f" and {len(alike) - MOST_ALIKE:,} more" if len(alike) > MOST_ALIKE else ""
    return " = ".join(map(shown, alike[:MOST_ALIKE])) + more


def unreadable(bad: Mapping[str, str], total: int, more: str = "") -> TangleNASError:
    """Return the error before a search that names files which are no readable images, each with the reason."""
    if len(bad) == 1:
        ((path, why),) = bad.items()
        what = f"{shown(path)} is no readable image: {why}. Replace the file by a whole one, or remove it"
    else:
        names = listed((f"{shown(path)} ({why})" for path, why in bad.items()), MOST_NAMED)
        what = (
            f"{len(bad):,} of {total:,} files are no readable images: {names}{more}. Replace them by whole ones, or "
            "remove them"
        )
    return TangleNASError(
        f"image_folder: {what}. Before a search this costs nothing. A search that is done used the files as they were: "
        "it holds if they are put back so, and has to run again for any others."
    )


def unreadable_later(path: str, error: BaseException) -> TangleNASError:
    """Return the error for a file that cannot be decoded while a stage runs."""
    return TangleNASError(
        f"image_folder: {shown(path)} is no readable image: {reason(error)}. Put the file back as it was when the "
        "search began, and run the same command again: nothing is lost. With the file changed or removed, the data are "
        "others: `dvc repro` makes the splits anew, and runs search and all stages after it again. Where no option "
        "names the data, `dvc repro --force-downstream search` does."
    )


def _cores() -> int:
    """Return the number of processor cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
