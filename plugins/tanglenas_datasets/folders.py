"""Folders of images: which of them are parts, which are classes, and which files are samples."""

import os
import re
import stat
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path, PurePath

from tanglenas_engine import TangleNASError

SUFFIXES = frozenset(".bmp .dib .gif .jfif .jpe .jpeg .jpg .pbm .pgm .png .pnm .ppm .tif .tiff .webp".split())

_SPELLINGS = {
    "train": "train training trainset trn",
    "val": "val valid validate validation valset dev",
    "test": "test testing testset tst",
}
_ROLES = {word: role for role, words in _SPELLINGS.items() for word in words.split()}
# These say nothing of the part, as in seg_train, train_images and "Training Data".
_FILLERS = frozenset("seg set data dataset split part image images img imgs picture pictures folder".split())
# Systems keep thumbnails, copies and lost files in these. Names that start with a dot are passed over too.
_JUNK = frozenset(
    (
        *("@eadir", "@recycle", "#recycle", "#snapshot", "$recycle.bin", "__macosx", "__pycache__", "lost+found"),
        *("system volume information", "thumbs.db", "desktop.ini"),
    )
)
_NAMED = 10
"""The number of names that a message lists before it says how many more there are."""


@dataclass(frozen=True)
class Part:
    """A part of a dataset: its role ("train", "val", "test", or "all" where there are no parts), folder and classes."""

    role: str
    folder: Path
    classes: dict[str, list[Path]]


@dataclass
class Passed:
    """The entries of folders that are no samples: files counted by suffix, and the names of folders and links."""

    files: Counter[str] = field(default_factory=Counter)
    folders: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        files = [f"{count:,} {shown(suffix)}" for suffix, count in self.files.most_common()]
        return listed(files + [shown(folder) for folder in self.folders])


def read_parts(root: Path, test_folder: str | None, parts: bool) -> tuple[list[Part], Passed]:
    """Return the parts of a folder of images in the order train, val, test, and what was passed over.

    Args:
        root: The folder.
        test_folder: The folder in `root` that is the test part, or None to go by the names.
        parts: False takes every folder in `root` for a class.

    Raises:
        TangleNASError: The folder looks like one with parts and is none, a folder cannot be listed, a link leads
            nowhere, or a file or folder is there twice.
    """
    walk = _Walk(root)
    chosen = _chosen(root, test_folder, parts)
    if chosen[0][0] != "all":
        walk.pass_over(root, {_unwrapped_from(root, folder) for _, folder in chosen})
    walk.enter([folder for _, folder in chosen])
    found = [Part(role, folder, walk.classes(folder)) for role, folder in chosen]
    walk.check()
    return found, walk.passed


def shown(name: str | Path) -> str:
    """Return a name as a message has it: without control characters, and cut where it is long."""
    text = str(name)
    text = text if text.isprintable() else ascii(text)[1:-1]
    return text if len(text) <= 200 else f"{text[:100]}...{text[-97:]}"


def listed(items: Iterable[object], most: int = _NAMED) -> str:
    """Return names with commas, the first of them if they are many."""
    names = [shown(str(item)) for item in items]
    return ", ".join(names[:most]) + (f" and {len(names) - most:,} more" if len(names) > most else "")


def _chosen(root: Path, test_folder: str | None, parts: bool) -> list[tuple[str, Path]]:
    """Return the role and the folder of each part; the role "all" and the root if there are no parts."""
    if not parts:
        if test_folder is not None:
            raise TangleNASError(
                f"image_folder: test_folder is {test_folder!r}, but parts is False: set only one of the two."
            )
        return [("all", root)]
    folders, _ = _listing(root)
    named: dict[str, list[Path]] = {}
    for folder in folders:
        if role := _role(folder.name):
            named.setdefault(role, []).append(folder)
    if test_folder is not None:
        return _around_test(root, test_folder, named)
    kinds = {folder: _kind(folder) for folder in folders}
    roleless = [folder for folder in folders if not _role(folder.name)]
    if all(kinds[folder] == "images" for same in named.values() for folder in same) and len(named) < 2:
        _refuse_disguised(root, roleless)
        return [("all", root)]  # a class may be called "train"; its folder then holds images

    rename = (
        "Give root= (create_dataset.root in a gin file) a folder with train/, and val/ or test/ if there are such "
        "parts, each with one folder per class. "
        "If every folder is a class, set parts=False."
    )
    if "train" not in named:
        there = listed(folder.name for same in named.values() for folder in same)
        raise TangleNASError(f"image_folder: {shown(root)} has {there}, which look like parts, but no train/. {rename}")
    for role, same in named.items():
        if len(same) > 1:
            raise TangleNASError(
                f"image_folder: {shown(root)} has {len(same)} folders that look like the {role} part: "
                f"{listed(folder.name for folder in same)}. Join or move them. {rename}"
            )
    chosen = [(role, _unwrapped(named[role][0], role)) for role in _SPELLINGS if role in named]
    train = chosen[0][1]
    for role, folder in chosen:
        if (kind := _kind(folder)) in ("images", "both"):
            raise TangleNASError(
                f"image_folder: {shown(folder)} looks like the {role} part, but holds images "
                f"{'' if kind == 'images' else 'beside folders '}that are not sorted by class. Sort them into one "
                f"folder per class, or move them out of {shown(root)}. {rename}"
            )
    like_classes = [folder for folder in roleless if kinds[folder] == "images"]
    if len(chosen) == 1 and like_classes:
        raise TangleNASError(
            f"image_folder: {shown(train)} looks like the train part, but {listed(f.name for f in like_classes)} "
            f"beside it hold images like classes. {rename}"
        )
    classes = {folder.name for folder in _listing(train)[0]}
    for folder in roleless:
        if len(same_names := classes & {inner.name for inner in _listing(folder)[0]}) > 1:
            raise TangleNASError(
                f"image_folder: {shown(folder)} has classes of {shown(train)} ({listed(sorted(same_names), 3)}), but "
                f"its name is of no part. Call it train, val or test, or move it out of {shown(root)}."
            )
    return chosen


def _around_test(root: Path, test_folder: str, named: dict[str, list[Path]]) -> list[tuple[str, Path]]:
    """Return the parts where the test part was named."""
    named_parts = PurePath(test_folder).parts
    if not named_parts or ".." in named_parts or PurePath(test_folder).is_absolute():
        raise TangleNASError(
            f"image_folder: test_folder is {test_folder!r}, expected the name of a folder in {shown(root)}, such as "
            "'holdout'"
        )
    test = root / test_folder
    rest = {role: [folder for folder in same if folder != test] for role, same in named.items()}
    train = rest.get("train") or [root / "train"]
    if missing := [shown(folder) for folder in (train[0], test) if not folder.is_dir()]:
        raise TangleNASError(
            f"image_folder: there is no folder {' and no '.join(missing)}. Give root= (create_dataset.root in a gin "
            f"file), a folder with train/ and {test_folder}/, each with one folder per class."
        )
    for role in ("train", "val"):
        if len(rest.get(role, [])) > 1:
            raise TangleNASError(
                f"image_folder: {shown(root)} has {len(rest[role])} folders that look like the {role} part: "
                f"{listed(folder.name for folder in rest[role])}. Join or move them."
            )
    val = [("val", _unwrapped(folder, "val")) for folder in rest.get("val", [])]
    return [("train", _unwrapped(train[0], "train")), *val, ("test", test)]


def _refuse_disguised(root: Path, folders: list[Path]) -> None:
    """Refuse class folders that look like parts, or that contain parts.

    Raises:
        TangleNASError: The folders look like parts.
    """
    inner = {folder: [sub.name for sub in _listing(folder)[0]] for folder in folders if _kind(folder) == "folders"}
    otherwise = "If they are classes, set parts=False."
    if alike := [folder.name for folder in inner if set(_words(folder.name)) & _ROLES.keys()]:
        raise TangleNASError(
            f"image_folder: {listed(alike)} in {shown(root)} look like parts. Call them train, val and test. "
            f"{otherwise}"
        )
    for folder, names in inner.items():
        if names and all(map(_role, names)):
            raise TangleNASError(
                f"image_folder: {shown(folder)} holds the parts {listed(names)}. Put the parts above the classes: "
                f"{shown(root)}/train/{shown(folder.name)}. {otherwise}"
            )
    if len(folders) == len(inner) > 1:
        first, *others = ({*names} for names in inner.values())
        if len(first) > 1 and all(names == first for names in others):
            raise TangleNASError(
                f"image_folder: {listed(folder.name for folder in folders)} in {shown(root)} hold the same folders, "
                f"{listed(sorted(first), 3)}, as parts do. Call them train, val and test. {otherwise}"
            )


def _role(name: str) -> str | None:
    """Return the role of a part by its name in any case, such as Training, seg_train or "Train Images"."""
    words = [word for word in _words(name) if word not in _FILLERS]
    return _ROLES.get(words[0]) if len(words) == 1 else None


def _words(name: str) -> list[str]:
    return re.findall(r"[^\W\d_]+", re.sub(r"(?<=[a-z])(?=[A-Z])", " ", name).lower())


def _kind(folder: Path) -> str:
    """Return what a folder holds: "images", "folders", "both" or "nothing"."""
    folders, files = _listing(folder)
    images = any(file.suffix.lower() in SUFFIXES for file in files)
    return {(True, True): "both", (True, False): "images", (False, True): "folders"}.get(
        (images, bool(folders)), "nothing"
    )


def _unwrapped(folder: Path, role: str) -> Path:
    """Return the part itself where its folder holds nothing but another of the same role: seg_train/seg_train."""
    folders, _ = _listing(folder)
    if len(folders) == 1 and _role(folders[0].name) == role and _kind(folder) == "folders":
        return _unwrapped(folders[0], role)
    return folder


def _unwrapped_from(root: Path, folder: Path) -> Path:
    """Return the entry of the root that a part lies in."""
    return root / folder.relative_to(root).parts[0]


def _listing(folder: Path) -> tuple[list[Path], list[Path]]:
    """Return the folders and the other entries of a folder, sorted, without those that systems put there.

    Raises:
        TangleNASError: The folder cannot be listed.
    """
    try:
        with os.scandir(folder) as entries:
            kept = sorted((folder / entry.name, entry.is_dir()) for entry in entries if not _junk(entry.name))
    except OSError as error:
        raise TangleNASError(
            f"image_folder: {shown(folder)} cannot be listed: {error.strerror or error}. Make it readable, or move it."
        ) from None
    return [path for path, is_folder in kept if is_folder], [path for path, is_folder in kept if not is_folder]


def _junk(name: str) -> bool:
    return name.startswith(".") or name.lower() in _JUNK


class _Walk:
    """A walk through the classes of a folder that enters no real folder twice and takes no real file twice."""

    def __init__(self, root: Path) -> None:
        self.passed = Passed()
        self._root = root
        self._above = {_identity(folder) for folder in (root.resolve(), *root.resolve().parents)}
        self._entered: dict[tuple[int, int], Path] = {}
        self._taken: dict[tuple[int, int], Path] = {}
        self._twice: list[tuple[Path, Path]] = []
        self._broken: list[Path] = []

    def enter(self, folders: list[Path]) -> None:
        """Note folders that are about to be read.

        Raises:
            TangleNASError: One was noted before: two paths lead to it.
        """
        for folder in folders:
            identity = _identity(folder)
            if identity in self._entered:
                raise TangleNASError(
                    f"image_folder: {shown(folder)} and {shown(self._entered[identity])} are one folder, so that each "
                    "of its images would be several samples. Remove one of the two, which is a link."
                )
            self._entered[identity] = folder

    def classes(self, folder: Path) -> dict[str, list[Path]]:
        """Return the sorted image files of each class folder, which may be none.

        Raises:
            TangleNASError: A class has no name in UTF-8, or a folder cannot be listed or is there twice.
        """
        folders, files = _listing(folder)
        for file in files:
            self._pass_file(file)
        folders = self._without_links_up(folders)
        self.enter(folders)
        found = {}
        for class_folder in folders:
            try:
                class_folder.name.encode()
            except UnicodeEncodeError:  # the names of classes are written into files and figures
                raise TangleNASError(
                    f"image_folder: the name of class folder {shown(class_folder)} is not UTF-8. Rename the folder."
                ) from None
            found[class_folder.name] = sorted(self._images(class_folder))
        return found

    def pass_over(self, folder: Path, but: set[Path]) -> None:
        """Count the entries of a folder as passed over, with all but these."""
        folders, files = _listing(folder)
        for file in files:
            self._pass_file(file)
        for other in folders:
            if other not in but:
                self.passed.folders.append(f"{other.relative_to(self._root).as_posix()}/")

    def check(self) -> None:
        """Raise a TangleNASError for links that lead nowhere and for files that would be several samples."""
        if self._broken:
            raise TangleNASError(
                f"image_folder: {len(self._broken)} links lead to no file: {listed(self._broken)}. Fetch the files "
                "(`dvc pull` or `git annex get`, if one of them made the links), or remove the links."
            )
        if self._twice:
            pairs = [f"{shown(one)} is {shown(other)}" for one, other in self._twice]
            raise TangleNASError(
                f"image_folder: {len(pairs)} files are there twice, as links to one file, so that one image would be "
                f"several samples, of training and test perhaps: {listed(pairs, 3)}. Keep one of each."
            )

    def _images(self, class_folder: Path) -> list[Path]:
        images, ahead = [], [class_folder]
        while ahead:
            folder = ahead.pop()
            folders, files = _listing(folder)
            for file in files:
                if file.suffix.lower() in SUFFIXES and self._take(file):
                    images.append(file)
                else:
                    self._pass_file(file)
            folders = self._without_links_up(folders)
            self.enter(folders)
            ahead += folders
        return images

    def _take(self, file: Path) -> bool:
        """Return whether a file is a regular one, and note those that are there twice or lead nowhere."""
        try:
            status = file.stat()
        except OSError:
            self._broken.append(file)
            return True
        if not stat.S_ISREG(status.st_mode):  # opening a FIFO would wait for ever
            return False
        first = self._taken.setdefault((status.st_dev, status.st_ino), file)
        if first is not file:
            self._twice.append((file, first))
        return True

    def _without_links_up(self, folders: list[Path]) -> list[Path]:
        """Return the folders but for links to folders that they lie in, which have no end."""
        kept = []
        for folder in folders:
            above = _identity(folder) in self._above or folder.parent.resolve().is_relative_to(folder.resolve())
            if folder.is_symlink() and above:
                self.passed.folders.append(f"link {folder.relative_to(self._root).as_posix()} to a folder above it")
            else:
                kept.append(folder)
        return kept

    def _pass_file(self, file: Path) -> None:
        try:
            regular = stat.S_ISREG(file.stat().st_mode)
        except OSError:
            regular = True  # a link to no file, counted by its name
        self.passed.files[file.suffix.lower() or "without suffix" if regular else "not a regular file"] += 1


def _identity(folder: Path) -> tuple[int, int]:
    status = folder.stat()
    return status.st_dev, status.st_ino
