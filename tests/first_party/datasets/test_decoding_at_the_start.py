"""Every image is decoded before a search: what cannot be read costs nothing yet."""

import shutil
from pathlib import Path

import gin
import numpy as np
import pytest
import torch
from PIL import Image
from project import lay_out, set_params

from pipelines import search
from tanglenas_datasets import image_checks
from tanglenas_datasets.image_folder import ImageFolder
from tanglenas_engine import SilentProgress, TangleNASError, create_dataset
from tanglenas_engine.runtime.progress import ConsoleProgress


def write(folder: Path, count: int = 6, side: int = 24) -> Path:
    """Write JPEG files of noise into a train and a test part of two classes."""
    generator = np.random.default_rng(0)
    for part in ("train", "test"):
        for name in ("cat", "dog"):
            (folder / part / name).mkdir(parents=True)
            for i in range(count):
                pixels = generator.integers(0, 256, (side, side, 3), np.uint8)
                Image.fromarray(pixels).save(folder / part / name / f"{i}.jpg")
    return folder


def truncate(*paths: Path) -> None:
    for path in paths:
        path.write_bytes(path.read_bytes()[:-200])  # its header stays whole


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    return write(tmp_path / "pictures")


class Counted:
    """Counts the decoded files."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.count = 0
        decode = image_checks.decode

        def counted(*arguments):
            self.count += 1
            return decode(*arguments)

        monkeypatch.setattr(image_checks, "decode", counted)

    def since(self) -> int:
        count, self.count = self.count, 0
        return count


def test_all_truncated_images_are_named_at_once_in_every_part(pictures: Path, tmp_path: Path) -> None:
    bad = [
        pictures / "train" / "cat" / "3.jpg",
        pictures / "test" / "dog" / "0.jpg",
        pictures / "test" / "dog" / "5.jpg",
    ]
    truncate(*bad)
    dataset = ImageFolder(pictures)  # their headers are whole
    with pytest.raises(TangleNASError, match="3 of 24 files are no readable images") as refused:
        dataset.verify(SilentProgress(), tmp_path / "state")
    assert all(f"{path} (" in str(refused.value) for path in bad)
    assert "Before a search this costs nothing" in str(refused.value)


def test_all_files_that_are_no_images_are_named_at_once(pictures: Path) -> None:
    for name in ("cat", "dog"):
        (pictures / "train" / name / "x.png").write_text("no image")
    with pytest.raises(TangleNASError, match=r"2 of 26 files .*cat/x\.png \(it is of no known format .*dog/x\.png \("):
        ImageFolder(pictures)


def test_what_was_decoded_is_remembered_by_its_content(pictures: Path, tmp_path: Path, monkeypatch) -> None:
    decoded, state = Counted(monkeypatch), tmp_path / "state"
    ImageFolder(pictures).verify(SilentProgress(), state)
    assert decoded.since() == 24
    before = (state / "decoded-images").read_bytes()
    shutil.copytree(pictures, tmp_path / "moved")
    ImageFolder(tmp_path / "moved").verify(SilentProgress(), state)
    assert decoded.since() == 0 and (state / "decoded-images").read_bytes() == before
    path = pictures / "train" / "cat" / "1.jpg"
    Image.new("RGB", (9, 9)).save(path)
    ImageFolder(pictures).verify(SilentProgress(), state)
    assert decoded.since() == 1
    monkeypatch.setattr("PIL.__version__", "0.0")
    ImageFolder(pictures).verify(SilentProgress(), state)
    assert decoded.since() == 24


def test_after_a_repair_only_the_files_that_were_bad_are_decoded(pictures: Path, tmp_path: Path, monkeypatch) -> None:
    decoded, state = Counted(monkeypatch), tmp_path / "state"
    path = pictures / "test" / "cat" / "2.jpg"
    whole = path.read_bytes()
    truncate(path)
    for _ in range(2):  # a bad file is never remembered
        with pytest.raises(TangleNASError, match=r"cat/2\.jpg is no readable image"):
            ImageFolder(pictures).verify(SilentProgress(), state)
    assert decoded.since() == 25
    path.write_bytes(whole)
    ImageFolder(pictures).verify(SilentProgress(), state)
    assert decoded.since() == 1


def test_an_interrupted_check_goes_on_where_it_was(pictures: Path, tmp_path: Path, monkeypatch) -> None:
    decoded, state = Counted(monkeypatch), tmp_path / "state"
    monkeypatch.setattr(image_checks, "_AT_ONCE", 4)

    class Interrupting(SilentProgress):
        def epoch(self, epoch: int, epochs: int, text: str) -> None:
            assert epochs == 24
            if epoch == 12:
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        ImageFolder(pictures).verify(Interrupting(), state)
    assert decoded.since() == 12
    ImageFolder(pictures).verify(SilentProgress(), state)
    assert decoded.since() == 12


def test_a_damaged_memory_is_no_harm(pictures: Path, tmp_path: Path) -> None:
    state = tmp_path / "state"
    state.mkdir()
    (state / "decoded-images").write_bytes(bytes(range(256)))
    ImageFolder(pictures).verify(SilentProgress(), state)


class Noted(SilentProgress):
    """Keeps the messages."""

    def __init__(self) -> None:
        self.notes: list[str] = []

    def note(self, text: str) -> None:
        self.notes.append(text)


def test_images_that_are_in_training_and_test_are_named(pictures: Path, tmp_path: Path) -> None:
    told = Noted()
    ImageFolder(pictures).verify(told, tmp_path / "state")
    assert told.notes == []
    for i in (1, 2):
        shutil.copy(pictures / "train" / "cat" / f"{i}.jpg", pictures / "test" / "cat" / f"copy{i}.jpg")
    shutil.copy(pictures / "train" / "dog" / "1.jpg", pictures / "train" / "dog" / "copy.jpg")
    ImageFolder(pictures).verify(told, tmp_path / "state")
    (note,) = told.notes
    assert "2 of 14 test images are in the training data too, byte for byte, so that the test accuracy" in note
    assert "/train/cat/1.jpg = " in note and "/test/cat/copy1.jpg" in note and "dog" not in note  # long folders are cut


def test_copies_are_named_where_the_test_split_is_drawn_from_all_images(pictures: Path, tmp_path: Path) -> None:
    told, everything = Noted(), pictures / "train"
    for i in (1, 2):
        shutil.copy(everything / "cat" / "1.jpg", everything / "cat" / f"copy{i}.jpg")
    ImageFolder(everything).verify(told, tmp_path / "state")
    (note,) = told.notes
    assert "2 images are copies of others, byte for byte, and a copy may fall into the test split" in note
    assert "/cat/1.jpg = " in note and "/cat/copy1.jpg = " in note  # long folders are cut
    assert "/cat/copy2.jpg. Remove one of each" in note


def test_many_bad_files_are_listed_in_a_file(tmp_path: Path) -> None:
    pictures = write(tmp_path / "pictures", count=20)
    bad = sorted(pictures.rglob("*.jpg"))[:60]
    truncate(*bad)
    dataset = ImageFolder(pictures)
    every = tmp_path / "state" / "unreadable-images.txt"
    with pytest.raises(TangleNASError, match=rf"60 of 80 files .* and 10 more \(all of them: {every}\)\. Replace"):
        dataset.verify(SilentProgress(), tmp_path / "state")
    assert [line.split(": ")[0] for line in every.read_text().splitlines()] == [
        str(path) for part in ("train", "test") for path in bad if path.parts[-3] == part
    ]


def test_imagenet_is_not_decoded_at_the_start(pictures: Path, tmp_path: Path, monkeypatch) -> None:
    decoded = Counted(monkeypatch)
    dataset = create_dataset("imagenet", root=pictures, num_classes=2, test_folder="test")
    dataset.verify(SilentProgress(), tmp_path / "state")
    assert decoded.since() == 0 and not (tmp_path / "state").exists()


def test_a_later_error_says_what_a_removal_costs(pictures: Path) -> None:
    samples = ImageFolder(pictures).subset(torch.arange(24), train=False)
    truncate(pictures / "test" / "dog" / "5.jpg")
    with pytest.raises(TangleNASError, match=r"dog/5\.jpg is no readable image.*Put the file back.*data are others"):
        samples.batch(torch.arange(24))


@pytest.mark.slow
@pytest.mark.exhaustive
def test_a_search_refuses_a_truncated_test_image_before_it_trains(tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(lay_out(tmp_path, code=False))
    monkeypatch.setenv("TANGLENAS_TRACKING", "off")
    set_params(tmp_path, dataset="image_folder", retrain={"batch_size": 4})
    pictures = write(tmp_path / "data" / "images", count=8)
    path = pictures / "test" / "dog" / "1.jpg"
    whole = path.read_bytes()
    truncate(path)
    arguments = ["gin/stages/search.gin", "SPACE = 'autoformer_nano'", "OPTIMIZER = 'drnas'", "SEED = 0",
                 "DATASET = 'image_folder'", "create_dataset.image_size = 8", "search.epochs = 1",
                 "search.batch_size = 4"]  # fmt: skip
    try:
        with pytest.raises(SystemExit) as ended:
            search.main(arguments)
        said = capsys.readouterr()
        assert ended.value.code == 2 and "dog/1.jpg is no readable image" in said.err
        assert "decoding images 32/32  1 unreadable" in said.out and not (tmp_path / "out" / "search").exists()
        path.write_bytes(whole)
        search.main(arguments)
        said = capsys.readouterr()
        assert "decoding images 32/32  all readable" in said.out and "dog (8)" in said.out
        assert len((tmp_path / ".tanglenas" / "decoded-images").read_text().split()) == 32
    finally:
        gin.clear_config()


@pytest.mark.parametrize("brightest, told", [(4095, True), (4096, False)])
def test_grey_images_of_16_bits_with_12_in_use_are_told(
    pictures: Path, tmp_path: Path, capsys, brightest, told
) -> None:
    path = next(pictures.glob("*/*/")) / "12-bits.png"
    Image.fromarray(np.linspace(0, brightest, 100).astype(np.uint16).reshape(10, 10)).save(path)
    for _ in range(2):  # each search says it
        ImageFolder(pictures).verify(ConsoleProgress(), tmp_path / "state")
        said = " ".join("".join(capsys.readouterr()).split())
        assert ("grey images of 16 bits use a sixteenth of the levels at most" in said) is told
        assert (f"16 levels of 256: {path} (1 in all)" in said) is told
