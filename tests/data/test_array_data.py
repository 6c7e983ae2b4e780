import codecs
import gzip
import pickle
import struct

import numpy as np
import pytest

from meshuffle.data import open_data
from meshuffle.errors import DataError


def error_of(spec: str) -> str:
    with pytest.raises(DataError) as caught:
        open_data(spec)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def members(view) -> set[int]:
    return {int(view.name(i).split("[")[1][:-1]) for i in range(len(view))}


def test_digits():
    data = open_data("digits")
    assert data.classes == tuple("0123456789")
    parts = {split: members(view) for split, view in data.splits.items()}
    assert {split: len(part) for split, part in parts.items()} == {
        "train": 1295,
        "val": 143,
        "test": 359,
    }
    assert set().union(*parts.values()) == set(range(1797))
    for view in data.splits.values():
        shares = np.bincount(view.labels) / len(view)
        assert shares.min() > 0.09 and shares.max() < 0.11


def test_the_test_digits_are_fixed():
    """Whatever the seed: these were chosen before the first training run."""
    first, other = open_data("digits", seed=0), open_data("digits", seed=12345)
    for split in ("train", "val", "test"):
        assert members(first.splits[split]) == members(other.splits[split])
    assert sorted(members(first.splits["test"]))[:8] == [20, 38, 39, 40, 43, 54, 55, 62]


def test_digit_pixels_fill_the_byte():
    view = open_data("digits").splits["train"]
    image = np.asarray(view.image(0))
    assert image.shape == (8, 8, 3)
    assert {np.asarray(view.image(i)).max() for i in range(50)} <= {255, 239, 223, 207}
    assert image.min() == 0
    assert view.name(0).startswith("digits[")
    assert view.content(0) == image[:, :, 0].tobytes()
    assert view.in_memory


def test_digit_statistics_are_the_pixels():
    data = open_data("digits")
    view = data.splits["train"]
    pixels = np.stack([np.asarray(view.image(i)) for i in range(len(view))]) / 255
    assert abs(pixels.mean() - data.mean[0]) < 0.005
    assert abs(pixels.std() - data.std[0]) < 0.005


def test_digits_take_no_path():
    assert "did you mean 'digits'" in error_of("digit")


# --- MNIST -----------------------------------------------------------------------------------


def idx(array: np.ndarray, magic: int | None = None) -> bytes:
    head = struct.pack(f">{1 + array.ndim}I", magic or 2048 + array.ndim, *array.shape)
    return head + array.astype(np.uint8).tobytes()


@pytest.fixture
def mnist(tmp_path):
    rng = np.random.default_rng(0)
    arrays = {}
    for prefix, num in (("train", 100), ("t10k", 20)):
        images = rng.integers(0, 256, (num, 28, 28), dtype=np.uint8)
        labels = np.arange(num, dtype=np.uint8) % 10
        (tmp_path / f"{prefix}-images-idx3-ubyte").write_bytes(idx(images))
        (tmp_path / f"{prefix}-labels-idx1-ubyte").write_bytes(idx(labels))
        arrays[prefix] = images
    return tmp_path, arrays


def test_mnist(mnist):
    root, arrays = mnist
    data = open_data(f"mnist:{root}")
    assert {split: len(view) for split, view in data.splits.items()} == {
        "train": 90,
        "val": 10,
        "test": 20,
    }
    assert np.bincount(data.splits["val"].labels).tolist() == [1] * 10
    test = data.splits["test"]
    np.testing.assert_array_equal(np.asarray(test.image(7))[:, :, 1], arrays["t10k"][7])
    assert test.name(7) == "mnist test[7]"
    assert test.labels[7] == 7
    assert (data.input_size, data.style) == (32, "symbols")


def test_mnist_packed_nested_and_with_dots(mnist):
    root, arrays = mnist
    raw = root / "MNIST" / "raw"
    raw.mkdir(parents=True)
    for file in list(root.glob("*-ubyte")):
        (raw / (file.name.replace("-idx", ".idx") + ".gz")).write_bytes(
            gzip.compress(file.read_bytes(), mtime=0)
        )
        file.unlink()
    test = open_data(f"mnist:{root}").splits["test"]
    np.testing.assert_array_equal(np.asarray(test.image(3))[:, :, 0], arrays["t10k"][3])


def test_fashion_mnist(mnist):
    data = open_data(f"fashion-mnist:{mnist[0]}")
    assert data.classes[:2] == ("T-shirt/top", "Trouser") and len(data.classes) == 10
    assert data.style == "thumbnails"


IMAGES = "train-images-idx3-ubyte"
LABELS = "train-labels-idx1-ubyte"


@pytest.mark.parametrize(
    ("name", "content", "text"),
    [
        (IMAGES, None, "holds no train-images-idx3-ubyte"),
        (IMAGES, b"", "magic nothing, not 2051"),
        (IMAGES, b"hello world, this is text", "magic 1751477356, not 2051"),
        (IMAGES, idx(np.zeros((2, 3), np.uint8), 2051), "bytes of data where its header says"),
        (IMAGES, struct.pack(">4I", 2051, *[2**32 - 1] * 3), "which is too many"),
        (IMAGES, idx(np.zeros((9, 28, 28))), "9 train images but 100 labels"),
        (LABELS, idx(np.full(100, 10)), "label 10 is not below 10"),
        (LABELS, idx(np.zeros(100)) + b"x", "more bytes of data where its header says 100"),
        (
            IMAGES + ".gz",
            gzip.compress(idx(np.zeros((100, 28, 28))), mtime=0)[:60],
            "cannot be read",
        ),
        (IMAGES + ".gz", b"not packed at all", "cannot be read"),
    ],
)
def test_broken_mnist(mnist, name, content, text):
    root, _ = mnist
    (root / name.removesuffix(".gz")).unlink()
    if content is not None:
        (root / name).write_bytes(content)
    assert text in error_of(f"mnist:{root}")


# --- CIFAR-10 --------------------------------------------------------------------------------

NAMES = [*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"]


def cifar_rows(seed: int) -> tuple[np.ndarray, np.ndarray]:
    pixels = np.random.default_rng(seed).integers(0, 256, (20, 3072), dtype=np.uint8)
    return pixels, np.arange(20) % 10


def python2_pickle(pixels: np.ndarray, labels: list[int]) -> bytes:
    """The opcodes of a Python 2 pickle of numpy 1: what the real files hold."""

    def text(value: bytes) -> bytes:
        return b"T" + struct.pack("<I", len(value)) + value

    array = (
        b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\n(K\x00tU\x01btR"
        b"(K\x01" + b"(J" + struct.pack("<i", len(pixels)) + b"J" + struct.pack("<i", 3072) + b"t"
        b"cnumpy\ndtype\n(U\x02u1K\x00K\x01tR(K\x03U\x01|NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb"
        b"\x89" + text(pixels.tobytes()) + b"tb"
    )
    numbers = b"](" + b"".join(b"K" + bytes([label]) for label in labels) + b"e"
    return b"\x80\x02}(U\x04data" + array + b"U\x06labels" + numbers + b"u."


@pytest.fixture(params=["binary", "python 2", "python 3"])
def cifar(tmp_path, request):
    nested = tmp_path / ("cifar-10-batches-" + request.param[:2].replace("bi", "bin"))
    nested.mkdir()
    for seed, name in enumerate(NAMES):
        pixels, labels = cifar_rows(seed)
        if request.param == "binary":
            rows = np.concatenate([labels.astype(np.uint8)[:, None], pixels], axis=1)
            (nested / f"{name}.bin").write_bytes(rows.tobytes())
        elif request.param == "python 2":
            (nested / name).write_bytes(python2_pickle(pixels, labels.tolist()))
        else:
            batch = {"data": pixels, "labels": labels.tolist(), "batch_label": name}
            (nested / name).write_bytes(pickle.dumps(batch, protocol=2))
    return tmp_path


def test_cifar10(cifar):
    data = open_data(f"cifar10:{cifar}")
    assert {split: len(view) for split, view in data.splits.items()} == {
        "train": 90,
        "val": 10,
        "test": 20,
    }
    assert data.classes[3] == "cat"
    test = data.splits["test"]
    pixels, _ = cifar_rows(5)
    np.testing.assert_array_equal(
        np.asarray(test.image(4)), pixels[4].reshape(3, 32, 32).transpose(1, 2, 0)
    )
    assert test.labels[4] == 4
    assert (data.input_size, data.style) == (32, "thumbnails")


def test_cifar10_also_by_its_own_folder(cifar):
    (nested,) = cifar.iterdir()
    assert len(open_data(f"cifar10:{nested}").splits["test"]) == 20


def test_the_python_2_pickle_is_what_plain_pickle_reads():
    pixels, labels = cifar_rows(0)
    batch = pickle.loads(python2_pickle(pixels, labels.tolist()), encoding="latin1")
    np.testing.assert_array_equal(batch["data"], pixels)
    assert batch["labels"] == labels.tolist()


class Evil:
    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


def test_a_pickle_cannot_run_code(tmp_path):
    """`open` in write mode would leave a file: the planted attack has a visible effect."""
    trace = tmp_path / "trace"
    attack = pickle.dumps({"data": Evil(open, str(trace), "w"), "labels": []}, protocol=2)
    pickle.loads(attack)["data"].close()
    assert trace.exists()
    trace.unlink()
    (tmp_path / "data_batch_1").write_bytes(attack)
    assert "which is refused" in error_of(f"cifar10:{tmp_path}")
    assert not trace.exists()


@pytest.mark.parametrize(
    ("batch", "text"),
    [
        (Evil(eval, "1"), ".eval, which is refused"),
        (Evil(np.load, "x"), "which is refused"),
        (Evil(codecs.encode, "x", "zip"), "codec 'zip'"),
        ({"data": np.array([Evil(eval, "1")], dtype=object), "labels": []}, "not of bytes"),
        ({"data": np.zeros((1, 3072), np.float32), "labels": [0]}, "not of bytes"),
        ({"data": np.zeros((2, 3072), np.uint8), "labels": [0]}, "(2, 3072), labels 1"),
        ({"data": np.zeros((1, 3072), np.uint8), "labels": ["cat"]}, "a label is no integer"),
        ({"data": np.zeros((1, 3072), np.uint8), "labels": [17]}, "label outside 0 … 9"),
        ({"labels": [0]}, "no 'data' and 'labels'"),
        ([1, 2], "no 'data' and 'labels'"),
    ],
)
def test_broken_cifar10_pickles(tmp_path, batch, text):
    for name in NAMES:
        (tmp_path / name).write_bytes(pickle.dumps(batch, protocol=2))
    assert text in error_of(f"cifar10:{tmp_path}")


@pytest.mark.parametrize("content", [b"", b"text", b"\x80\x02}(U\x04data", b"\x80\x04\x95"])
def test_files_that_are_no_pickle(tmp_path, content):
    (tmp_path / "data_batch_1").write_bytes(content)
    assert "is not a CIFAR-10 batch" in error_of(f"cifar10:{tmp_path}")


def test_cifar10_binary_of_a_wrong_size(tmp_path):
    (tmp_path / "data_batch_1.bin").write_bytes(bytes(3074))
    assert "3,074 bytes is no multiple of 3073" in error_of(f"cifar10:{tmp_path}")


def test_cifar10_not_unpacked(tmp_path):
    (tmp_path / "cifar-10-python.tar.gz").touch()
    message = error_of(f"cifar10:{tmp_path}")
    assert "holds neither data_batch_1.bin nor data_batch_1" in message
    assert "unpack cifar-10-python.tar.gz first" in message


def test_digits_are_scikit_learns_wherever_its_file_lies(monkeypatch: pytest.MonkeyPatch) -> None:
    near = open_data("digits")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    far = open_data("digits")
    for split, source in near.splits.items():
        assert (source.labels == far.splits[split].labels).all()
        for index in range(0, len(source), 97):
            assert source.image(index).tobytes() == far.splits[split].image(index).tobytes()
