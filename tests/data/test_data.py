"""Splits, the views that reach only some of them, and streams that start at any step."""

import gc
import itertools
import json
import multiprocessing
import os
import pickle
import random
import signal
import threading
from functools import partial
from types import FunctionType, MethodType

import numpy as np
import psutil
import pytest
import torch
from forked import Forked
from hypothesis import given
from hypothesis import strategies as st

from tanglenas_datasets.digits import Digits
from tanglenas_engine.data import (
    Dataset,
    DataView,
    Splits,
    Stream,
    TensorSamples,
    batches,
    content_hash,
    make_splits,
    open_splits,
)
from tanglenas_engine.errors import OutOfReachError, TangleNASError


class Numbers(Dataset):
    """One input number per sample, its own position: what is where can be read off a batch."""

    name = "numbers"
    image_size = in_channels = 1

    def __init__(self, labels, test=None):
        self.labels = torch.tensor(labels)
        self.num_classes = int(self.labels.max()) + 1
        self.class_names = tuple(f"class {i}" for i in range(self.num_classes))
        self.test_indices = None if test is None else torch.tensor(test)
        self.fingerprint = content_hash(self.labels)

    def subset(self, indices, *, train):
        rows = indices.float().reshape(-1, 1, 1, 1)
        return TensorSamples(rows, self.labels[indices], jitter if train else None)


def jitter(rows):
    """Draws from all three global generators, as an augmentation may."""
    return rows + 0.1 * torch.rand(len(rows), 1, 1, 1) + 0.01 * random.random() + 0.001 * np.random.rand()


@pytest.fixture(scope="module")
def digits():
    return Digits()


@pytest.fixture(scope="module")
def samples():
    return Numbers([0, 1] * 25).subset(torch.arange(50), train=True)


# Splits


def test_splits_are_disjoint_and_cover_the_pool(digits):
    splits = make_splits(digits, seed=0)
    parts = [splits.weights, splits.architecture, splits.validation, splits.test]
    assert torch.cat(parts).sort().values.equal(torch.arange(len(digits)))
    assert splits.sizes() == {"weights": 647, "architecture": 647, "validation": 144, "test": 359}
    assert splits.training.equal(torch.cat(parts[:2]).sort().values)


@pytest.mark.slow
@given(
    seed=st.integers(0, 2**32),
    counts=st.lists(st.integers(20, 60), min_size=2, max_size=5),
    train=st.floats(0.2, 0.8),
)
def test_each_split_has_its_share_of_every_class(seed, counts, train):
    dataset = Numbers([label for label, count in enumerate(counts) for _ in range(count)])
    splits = make_splits(dataset, seed=seed, train_portion=train, test_portion=0.25)
    shares = {
        "test": 0.25,
        "validation": 0.75 * 0.1,
        "weights": 0.75 * 0.9 * train,
        "architecture": 0.75 * 0.9 * (1 - train),
    }
    for name, share in shares.items():
        found = dataset.labels[splits.indices(name)].bincount(minlength=len(counts))
        # Two cuts, each off by about one sample per class.
        assert (found - share * torch.tensor(counts)).abs().max() < 3


def test_the_official_test_part_is_the_test_split():
    splits = make_splits(Numbers([0, 1] * 50, test=range(80, 100)), seed=3)
    assert splits.test.tolist() == list(range(80, 100))
    assert splits.sizes() == {"weights": 36, "architecture": 36, "validation": 8, "test": 20}


def test_the_seed_decides_the_splits(digits):
    assert make_splits(digits, seed=5) == make_splits(digits, seed=5)
    assert make_splits(digits, seed=np.int64(5)).to_json() == make_splits(digits, seed=5).to_json()
    assert make_splits(digits, seed=5) != make_splits(digits, seed=6)


def test_chance_can_put_every_sample_into_every_split():
    dataset = Numbers([0, 1] * 20)
    drawn = [make_splits(dataset, seed=seed).assignment for seed in range(100)]
    assert all(set(letters) == set("wavt") for letters in zip(*drawn, strict=True))


def test_portions_of_training_leave_test_and_validation_alone(digits):
    splits, other = make_splits(digits, seed=0), make_splits(digits, seed=0, train_portion=0.8)
    assert splits.test.equal(other.test) and splits.validation.equal(other.validation)
    assert len(other.weights) > len(splits.weights)
    assert splits.test.equal(make_splits(digits, seed=0, validation_portion=0.3).test)


def test_some_samples_stand_for_all_and_leave_test_alone(digits):
    whole, some = make_splits(digits, seed=0), make_splits(digits, seed=0, samples=200)
    assert some.test.equal(whole.test)
    assert some.sizes() == {"weights": 90, "architecture": 90, "validation": 20, "test": len(whole.test)}
    counts = digits.labels[some.training].bincount()
    assert counts.min() >= 16 and counts.max() <= 20
    assert Splits.from_json(some.to_json()) == some


def test_more_samples_than_there_are_outside_test_are_refused():
    dataset = Numbers([0, 1] * 20, test=range(10))
    assert make_splits(dataset, seed=0, samples=30) == make_splits(dataset, seed=0)
    with pytest.raises(TangleNASError, match=r"make_splits\.samples is 31, but numbers has 30 samples outside test"):
        make_splits(dataset, seed=0, samples=31)


@pytest.mark.parametrize("portion", [0, 1, -0.1, 1.5, float("nan")])
@pytest.mark.parametrize("name", ["train_portion", "validation_portion", "test_portion"])
def test_impossible_portions_are_named(digits, name, portion):
    with pytest.raises(TangleNASError, match=f"{name} is {portion}"):
        make_splits(digits, seed=0, **{name: portion})


def test_a_class_too_small_for_both_searched_splits_is_named():
    with pytest.raises(TangleNASError, match="class 'class 1' of numbers has 1 samples outside test"):
        make_splits(Numbers([0] * 40 + [1], test=[0, 1]), seed=0)


def test_a_rare_class_may_be_missing_from_validation():
    splits = make_splits(Numbers([0] * 100 + [1] * 3, test=[0, 1]), seed=0)
    labels = Numbers([0] * 100 + [1] * 3).labels
    assert 1 in labels[splits.weights] and 1 in labels[splits.architecture]


def test_data_too_small_for_four_splits_is_refused():
    with pytest.raises(TangleNASError, match="validation would be empty"):
        make_splits(Numbers([0, 1, 0, 1]), seed=0)


def test_splits_survive_json_and_its_bytes_are_canonical(digits):
    splits = make_splits(digits, seed=0)
    text = splits.to_json()
    assert Splits.from_json(text) == splits
    assert Splits.from_json(text).to_json() == text
    assert len(text) < 1.2 * len(digits)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"version": 99}, "version 99"),
        ({"assignment": "wax"}, "strange letters"),
        ({"seed": "0"}, "JSON object with the fields"),
        ({"more": 1}, "JSON object with the fields"),
    ],
)
def test_a_splits_file_that_is_not_ours_is_refused(digits, change, message):
    fields = json.loads(make_splits(digits, seed=0).to_json()) | change
    with pytest.raises(TangleNASError, match=message):
        Splits.from_json(json.dumps(fields))


@pytest.mark.parametrize("text", ["", "{", "[]", "null", "[" * 100_000])
def test_text_that_is_no_splits_file_is_refused(text):
    with pytest.raises(TangleNASError, match="splits file"):
        Splits.from_json(text)


def test_splits_of_other_data_are_refused(digits):
    numbers = Numbers([0, 1] * 20)
    with pytest.raises(TangleNASError, match=r"made for numbers .* do not fit digits"):
        open_splits(digits, make_splits(numbers, seed=0), ["weights"])
    with pytest.raises(TangleNASError, match="do not fit numbers"):
        open_splits(Numbers([1, 0] * 20), make_splits(numbers, seed=0), ["weights"])


# Views


def test_a_view_reaches_the_opened_splits_only(digits):
    view = open_splits(digits, make_splits(digits, seed=0), ["weights", "architecture"])
    assert view.names == ("weights", "architecture")
    assert len(view.weights) == len(view.architecture) == 647
    with pytest.raises(OutOfReachError, match="test split is out of reach: this stage sees weights, arch"):
        view.test  # noqa: B018
    with pytest.raises(OutOfReachError):
        view.training  # noqa: B018
    with pytest.raises(AttributeError, match="Did you mean 'weights'"):
        view.wieghts  # noqa: B018


def test_an_unknown_split_is_named(digits):
    with pytest.raises(TangleNASError, match=r"unknown split 'tests'\. Did you mean 'test'"):
        open_splits(digits, make_splits(digits, seed=0), ["weights", "tests"])


def test_a_view_survives_pickling(digits):
    view = open_splits(digits, make_splits(digits, seed=0), ["weights"])
    assert pickle.loads(pickle.dumps(view)).weights.labels.equal(view.weights.labels)


def test_only_training_splits_are_augmented():
    dataset = Numbers([0, 1] * 50)
    splits = make_splits(dataset, seed=0)
    names = ["weights", "architecture", "training", "validation", "test"]

    def augmented(name, **options):
        part = getattr(open_splits(dataset, splits, names, **options), name)
        inputs, targets = part.batch(torch.arange(len(part)))
        assert targets.equal(dataset.labels[splits.indices(name)])
        return not inputs.flatten().equal(splits.indices(name).float())

    assert [augmented(name) for name in names] == [True, True, True, False, False]
    assert not any(augmented(name, augment=False) for name in names)


def reachable_tensors(root):
    """All tensors that a holder of `root` can get to, short of modules and classes."""
    seen, found, todo = {}, [], [root]
    while todo:
        thing = todo.pop()
        if id(thing) in seen:
            continue
        seen[id(thing)] = thing
        if isinstance(thing, torch.Tensor):
            # The whole storage: a slice keeps all that it was cut from.
            found.append(torch.empty(0, dtype=thing.dtype).set_(thing.untyped_storage()))
        elif isinstance(thing, FunctionType):
            todo += [cell.cell_contents for cell in thing.__closure__ or ()]
        elif isinstance(thing, (dict, list, tuple, set, partial, MethodType)) or type(thing).__module__.startswith(
            ("tanglenas", __name__)
        ):
            todo += [other for other in gc.get_referents(thing) if not isinstance(other, type)]
    return found


def test_no_tensor_of_a_search_view_holds_a_test_image(digits):
    splits = make_splits(digits, seed=0)
    searched, all_images = splits.training, digits.subset(torch.arange(len(digits)), train=False)
    raw = all_images._rows.flatten(1)
    # An image that is both in test and in training proves nothing; digits has none such.
    test_images = {tuple(row) for row in raw[splits.test].tolist()}
    assert not test_images & {tuple(row) for row in raw[searched].tolist()}

    def holds_test_images(root):
        return any(
            test_images & {tuple(row) for row in tensor.float().reshape(-1, 64).tolist()}
            for tensor in reachable_tensors(root)
            if tensor.numel() % 64 == 0
        )

    view = open_splits(digits, splits, ["weights", "architecture", "validation"])
    assert len(reachable_tensors(view)) == 10  # images and labels of three splits, and of two without augmentation
    assert not holds_test_images(view)
    # The walk does find them where they are, and in a slice or a closure too.
    assert holds_test_images(digits)
    assert holds_test_images(open_splits(digits, splits, ["weights", "test"]))
    sliced = TensorSamples(all_images._rows[:10], digits.labels[:10])
    assert holds_test_images(DataView({"weights": sliced}))
    closure = TensorSamples(torch.zeros(9), torch.zeros(9), lambda _: digits)
    assert holds_test_images(DataView({"weights": closure}))


@pytest.mark.parametrize(
    "labels, message",
    [
        (np.arange(40) % 2, "is ndarray, expected a tensor of integers"),
        ([0, 1] * 20, "is list, expected"),
        (torch.arange(40).float() % 2, r"is torch.float32 of shape \(40,\), expected"),
        (torch.arange(40) % 2 == 0, "is torch.bool of shape"),
        ((torch.arange(40) % 2)[:, None], r"is torch.int64 of shape \(40, 1\), expected .* of shape \(N,\)"),
        (torch.eye(2).long().repeat(20, 1), r"is torch.int64 of shape \(40, 2\)"),
        (
            torch.tensor([0, 1] * 20).index_fill(0, torch.tensor([7, 9]), -1),
            "has -1 at position 7, expected .* 0 to 1:",
        ),
        (torch.tensor([0, 1] * 20).index_fill(0, torch.tensor([39]), 2), "has 2 at position 39, .*correct num_classes"),
    ],
)
def test_labels_that_are_no_classes_are_named(labels, message):
    dataset = Numbers([0, 1] * 20)
    dataset.labels = labels
    with pytest.raises(TangleNASError, match=f"labels of numbers {message}"):
        make_splits(dataset, seed=0)


@pytest.mark.parametrize("kind", [torch.int32, torch.int16, torch.int8, torch.uint8, torch.uint16])
def test_labels_of_any_integer_type_are_classes(kind):
    dataset, narrow = Numbers([0, 1] * 20), Numbers([0, 1] * 20)
    narrow.labels = narrow.labels.to(kind)
    splits = make_splits(dataset, seed=0)
    assert make_splits(narrow, seed=0) == splits
    samples, wide = (open_splits(one, splits, ["training"]).training for one in (narrow, dataset))
    assert samples.labels.dtype == torch.int64
    assert equal(batches(samples, 8), batches(wide, 8))


# Streams


def take(stream, count, step=0):
    return list(itertools.islice(stream.start(step), count))


def equal(batches_a, batches_b):
    pairs = zip(batches_a, batches_b, strict=True)
    return all(a[0].equal(b[0]) and a[1].equal(b[1]) for a, b in pairs)


def test_an_epoch_is_a_permutation_cut_into_full_batches(samples):
    stream = Stream(samples, 8, seed=0)
    assert stream.batches_per_epoch == 6
    seen = [torch.cat([x.flatten() for x, _ in take(stream, 6, step)]).int().tolist() for step in (0, 6)]
    assert len(set(seen[0])) == len(set(seen[1])) == 48
    assert seen[0] != seen[1]


def test_equal_seeds_give_equal_streams_and_others_do_not(samples):
    assert equal(take(Stream(samples, 8, seed=1), 15), take(Stream(samples, 8, seed=1), 15))
    assert not equal(take(Stream(samples, 8, seed=1), 1), take(Stream(samples, 8, seed=2), 1))


def test_augmentation_changes_from_batch_to_batch():
    one = TensorSamples(torch.zeros(4, 1, 1, 1), torch.zeros(4), jitter)
    (first, _), (second, _) = take(Stream(one, 4, seed=0), 2)
    assert not first.equal(second)


@pytest.mark.parametrize("step", [1, 5, 6, 13])
def test_a_stream_that_starts_later_is_the_tail_of_the_whole(samples, step):
    stream = Stream(samples, 8, seed=1)
    assert equal(take(stream, 20 - step, step), take(stream, 20)[step:])


@pytest.mark.parametrize("step", [0, 5, 6])
def test_a_batch_can_be_loaded_again(samples, step):
    stream = Stream(samples, 8, seed=1)
    assert equal([stream.batch(step)], take(stream, 1, step))


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
@pytest.mark.slow
def test_workers_change_no_batch(samples):
    stream, alone = Stream(samples, 8, seed=1, num_workers=2), Stream(samples, 8, seed=1)
    assert equal(take(stream, 9, 4), take(alone, 9, 4))
    assert equal(list(batches(samples, 20, num_workers=1)), list(batches(samples, 20)))


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
@pytest.mark.parametrize("num_workers", [0, 1])
def test_streams_leave_the_global_generators_alone(samples, num_workers):
    def states():
        return torch.get_rng_state().tolist(), random.getstate(), np.random.get_state()[1].tolist()

    torch.manual_seed(5), random.seed(6), np.random.seed(7)
    before = states()
    take(Stream(samples, 8, seed=1, num_workers=num_workers), 3)
    list(batches(samples, 20, num_workers=num_workers))
    assert states() == before


def test_the_global_generators_come_back_after_a_failed_batch():
    def fail(rows):
        torch.rand(1), random.random()
        raise RuntimeError("no such image")

    before = torch.get_rng_state(), random.getstate()
    with pytest.raises(RuntimeError, match="no such image"):
        take(Stream(TensorSamples(torch.zeros(4), torch.zeros(4), fail), 2, seed=0), 1)
    assert torch.get_rng_state().equal(before[0]) and random.getstate() == before[1]


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
@pytest.mark.parametrize("num_workers", [0, 1])
def test_an_error_of_a_batch_is_its_sentence_alone(num_workers):
    rows = TensorSamples(torch.arange(8), torch.zeros(8), refuse_the_last)
    loaded = batches(rows, 2, num_workers=num_workers)
    assert len(list(itertools.islice(loaded, 3))) == 3
    with pytest.raises(TangleNASError) as caught:
        next(loaded)
    assert str(caught.value) == "no image: replace it"


class UnsentError(TangleNASError):
    """An error that no process can send to another one."""

    def __init__(self, *, kind):
        super().__init__(f"no {kind}: replace it")
        self.lock = threading.Lock()


def refuse_the_last(rows):
    if 7 in rows:
        raise UnsentError(kind="image")
    return rows


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_workers_outlast_the_signals_that_a_whole_run_gets(samples):
    before = set(multiprocessing.active_children())
    loaded = Stream(samples, 8, seed=1, num_workers=2).start()
    found = [next(loaded), next(loaded)]  # by now both workers run
    workers = set(multiprocessing.active_children()) - before
    assert len(workers) == 2
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGINT):
        for worker in workers:
            os.kill(worker.pid, number)
    found += itertools.islice(loaded, 8)
    assert equal(found, take(Stream(samples, 8, seed=1), 10))
    assert all(worker.is_alive() for worker in workers)
    del loaded
    for worker in workers:
        worker.join(20)
        assert worker.exitcode == 0


LOADS = """
import gc, multiprocessing, sys, time, torch
from tanglenas_engine.data import TensorSamples, batches

def load(rows):
    time.sleep(1000 if how != "idle" and 3 in rows else 0)
    return rows

how = sys.argv[1]
multiprocessing.set_start_method("fork", force=True)  # this process comes from a server, and its code from no file
loaded = batches(TensorSamples(torch.arange(8), torch.zeros(8), load), 1, num_workers=2)
next(loaded), next(loaded)  # by now a worker loads the fourth row
print("workers", *(child.pid for child in multiprocessing.active_children()), flush=True)
if how in ("killed", "terminated"):
    sys.stdin.read()
if how in ("dropped", "cycle"):
    cycle = [loaded]
    how == "cycle" and cycle.append(cycle)
    start = time.monotonic()
    del loaded, cycle
    gc.collect()
    print("dropped in", time.monotonic() - start)
"""


@pytest.mark.slow
@pytest.mark.parametrize("how", ["idle", "busy", "dropped", "cycle", "killed", "terminated"])
def test_workers_end_with_their_loader_or_their_parent_also_in_the_middle_of_a_batch(how):
    with Forked(LOADS, how) as parent:
        line = next(line for line in parent.stdout if line.startswith("workers"))
        workers = [psutil.Process(int(pid)) for pid in line.split()[1:]]
        assert len(workers) == 2
        sent = {"killed": signal.SIGKILL, "terminated": signal.SIGTERM}.get(how, 0)
        for pid in (*(worker.pid for worker in workers if how == "terminated"), parent.pid):
            os.kill(pid, sent)
        assert not psutil.wait_procs(workers, timeout=60)[1]
        if how in ("dropped", "cycle"):
            line = next(line for line in parent.stdout if line.startswith("dropped in"))
            assert float(line.split()[-1]) < 8  # a loader waits twice 5 s for a worker that does not end
    assert parent.returncode == -sent


@pytest.mark.parametrize("seed", [-1, 0.5, None, True, "0", 2**63])
def test_a_seed_that_seeds_nothing_is_refused(seed):
    numbers = Numbers([0, 1] * 20)
    assert make_splits(numbers, seed=2**63 - 1).seed == 2**63 - 1
    with pytest.raises(TangleNASError, match=f"make_splits.seed is {seed!r}, expected a whole number from 0 to 9223"):
        make_splits(numbers, seed=seed)


def test_impossible_batch_sizes_and_steps_are_named(samples):
    with pytest.raises(TangleNASError, match="batch size 51 is larger than the 50 samples"):
        Stream(samples, 51, seed=0)
    with pytest.raises(TangleNASError, match="batch_size is 0"):
        Stream(samples, 0, seed=0)
    with pytest.raises(TangleNASError, match="batch_size is -1"):
        batches(samples, -1)
    with pytest.raises(TangleNASError, match=r"batch_size is 5\.0, expected a whole number"):
        Stream(samples, 5.0, seed=0)
    for workers in (-1, 1.0):
        for made in (partial(Stream, seed=0), batches):
            with pytest.raises(
                TangleNASError, match=f"num_workers is {workers}, expected a whole number of at least 0"
            ):
                made(samples, 5, num_workers=workers)
    with pytest.raises(TangleNASError, match="not at -1"):
        Stream(samples, 5, seed=0).start(-1)


def test_evaluation_batches_are_in_order_and_the_last_is_smaller():
    plain = Numbers([0, 1] * 5).subset(torch.arange(10), train=False)
    assert [x.flatten().tolist() for x, _ in batches(plain, 4)] == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]
    picked = [(x.flatten().tolist(), y.tolist()) for x, y in batches(plain, 2, torch.tensor([9, 3, 4]))]
    assert picked == [([9, 3], [1, 1]), ([4], [0])]
    assert list(batches(plain, 4, torch.tensor([], dtype=torch.int64))) == []


def test_content_hash_tells_values_shapes_and_boundaries_apart():
    row = torch.arange(4, dtype=torch.uint8)
    hashes = [
        content_hash(row),
        content_hash(row.long()),
        content_hash(row.reshape(2, 2)),
        content_hash(row.flip(0)),
        content_hash("ab", "c"),
        content_hash("a", "bc"),
        content_hash(b"a", "bc"),
    ]
    assert len(set(hashes)) == len(hashes)
    assert content_hash(row.long(), "ab", b"c").startswith("b6bd1ff88d830682")  # as in files of users
    for kind in (torch.bfloat16, torch.float16, torch.bool, torch.uint16):  # the first has no type in NumPy
        assert content_hash(row.to(kind)) == content_hash(row.to(kind).clone()) not in hashes
        assert content_hash(row.to(kind)) != content_hash(row.flip(0).to(kind))
    assert content_hash(torch.ones(2, requires_grad=True)) == content_hash(torch.ones(2))
    assert content_hash(torch.tensor(1.0)) != content_hash(torch.tensor([1.0])) != content_hash(torch.zeros(0))
    assert content_hash(torch.eye(3)[:, :2]) == content_hash(torch.eye(3)[:, :2].contiguous())
    for strided in (torch.arange(5)[::2], torch.ones(1, 3)[:, 0], torch.zeros(0)[::2]):
        assert content_hash(strided) == content_hash(torch.tensor(strided.tolist(), dtype=strided.dtype))
