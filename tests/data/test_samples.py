"""compress.data.samples and images: real files in, tensors and notes out."""

from __future__ import annotations

import os
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest
import safetensors.torch
import torch

from compress.data.samples import Samples, load_samples
from compress.errors import InputError

RNG = np.random.default_rng(0)
BYTES = RNG.integers(0, 256, (6, 5, 7, 3), dtype=np.uint8)
FLOATS = RNG.standard_normal((6, 3, 5, 4)).astype(np.float32)
LABELS = np.array([0, 1, 2, 0, 1, 2])


def _pictures(folder: Path, names: list[str], side: tuple[int, int] = (12, 10), mode: str = "RGB") -> Path:
    for i, name in enumerate(names):
        file = folder / name
        file.parent.mkdir(parents=True, exist_ok=True)
        PIL.Image.new(mode, side, color=i * 20 if mode == "L" else (i * 20, 0, 255)).save(file)
    return folder


def test_npz_of_bytes(tmp_path: Path) -> None:
    np.savez(tmp_path / "d.npz", images=BYTES, labels=LABELS, official_index=np.arange(6))
    samples = load_samples(tmp_path / "d.npz", mean=(0.5, 0.4, 0.3), std=(0.2, 0.2, 0.1), labelled=True)
    want = (BYTES / 255 - np.array([0.5, 0.4, 0.3])) / np.array([0.2, 0.2, 0.1])
    np.testing.assert_allclose(samples.inputs[0].numpy(), want.transpose(0, 3, 1, 2), rtol=1e-4, atol=1e-5)
    assert samples.inputs[0].dtype == torch.float32
    assert samples.labels is not None
    assert samples.labels.tolist() == LABELS.tolist()
    notes = " | ".join(samples.notes)
    assert "uint8 NHWC images: scaled by 1/255, channels first, normalised with mean [0.5, 0.4, 0.3]" in notes
    assert "not used: official_index" in notes
    plain = load_samples(str(tmp_path / "d.npz"))
    assert "mean/std not given so none subtracted" in " ".join(plain.notes)


def test_a_distilled_set_is_not_normalised_again(tmp_path: Path) -> None:
    held = {"images": FLOATS, "labels": LABELS, "step_size": np.float32(0.01), "provenance": np.array("a1")}
    np.savez(tmp_path / "plain.npz", **held)
    np.savez(tmp_path / "made.npz", **held, data_mean=np.array([0.5]), data_std=np.array([0.1, 0.2, 0.3]))
    mean, std = [0.5, 0.5, 0.5], [0.1, 0.2, 0.3]
    samples = load_samples(tmp_path / "made.npz", mean=mean, std=std)
    assert torch.equal(samples.inputs[0], torch.from_numpy(FLOATS))
    assert any("--mean and --std are not applied again" in note for note in samples.notes)
    for name, options, told in (
        ("made", {"mean": mean}, "made with --mean 0.5 --std 0.1,0.2,0.3, and now --mean 0.5,0.5,0.5 was given"),
        ("made", {"mean": mean, "std": 0.1}, "and now --mean 0.5,0.5,0.5 --std 0.1 was given"),
        ("plain", {"std": std}, "made with no --mean or --std that it names, and now --std 0.1,0.2,0.3 was given"),
    ):
        with pytest.raises(InputError, match=f"{name}.npz is a distilled set, whose images .*{told}.*leave that out"):
            load_samples(tmp_path / f"{name}.npz", **options)  # type: ignore[arg-type]
        assert torch.equal(load_samples(tmp_path / f"{name}.npz").inputs[0], torch.from_numpy(FLOATS))


@pytest.mark.parametrize("suffix", [".npy", ".pt", ".pth", ".safetensors", ".npz"])
def test_float_arrays_stay_as_they_are(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"d{suffix}"
    if suffix == ".npy":
        np.save(path, FLOATS)
    elif suffix == ".npz":
        np.savez(path, whatever=FLOATS)
    elif suffix == ".safetensors":
        safetensors.torch.save_file({"inputs": torch.from_numpy(FLOATS)}, path)
    else:
        torch.save({"x": torch.from_numpy(FLOATS)}, path)
    samples = load_samples(path)
    assert torch.equal(samples.inputs[0], torch.from_numpy(FLOATS))
    assert samples.labels is None
    assert samples.notes == ()


def test_other_dtypes_and_layouts() -> None:
    assert load_samples(FLOATS.astype(">f8")).inputs[0].dtype == torch.float32
    assert load_samples(FLOATS[:, :, ::-1]).inputs[0].shape == (6, 3, 5, 4)
    assert load_samples(np.arange(4, dtype=np.uint16)[:, None]).inputs[0].dtype == torch.int64
    assert load_samples(torch.from_numpy(FLOATS).half()).inputs[0].dtype == torch.float32
    first = load_samples(BYTES.transpose(0, 3, 1, 2).copy())
    assert "uint8 NCHW images" in first.notes[0]
    assert torch.allclose(first.inputs[0], load_samples(BYTES).inputs[0])
    assert load_samples(BYTES[..., 0]).inputs[0].shape == (6, 1, 5, 7)
    assert "not scaled" in load_samples(BYTES[:, 0, :, 0]).notes[0]


def test_the_callers_tensor_is_not_written_to() -> None:
    mine = torch.from_numpy(FLOATS.copy())
    load_samples(mine, mean=1.0, std=2.0)
    assert torch.equal(mine, torch.from_numpy(FLOATS))


def test_tuples_and_several_inputs() -> None:
    pair = load_samples((FLOATS, LABELS), labelled=True)
    assert len(pair.inputs) == 1
    assert pair.labels is not None
    two = load_samples((torch.ones(6, 2), torch.ones(6, 3), torch.zeros(6)))
    assert [x.shape[1] for x in two.inputs] == [2, 3]
    assert two.labels is not None
    assert two.labels.dtype == torch.float32


def test_limit_take_and_batches() -> None:
    samples = load_samples((np.arange(50)[:, None], np.arange(50)), limit=10, seed=3)
    assert len(samples) == 10
    assert samples.labels is not None
    assert samples.inputs[0].flatten().tolist() == samples.labels.tolist() == sorted(set(samples.labels.tolist()))
    assert "10 of 50 samples, chosen with seed 3" in samples.notes
    again = load_samples((np.arange(50)[:, None], np.arange(50))).take(10, 3)
    assert again.fingerprint == samples.fingerprint
    assert again.take(None, 0).fingerprint == again.fingerprint
    assert again.take(10, 4).fingerprint == again.fingerprint
    assert again.take(5, 0).fingerprint != again.fingerprint
    assert [len(b[0]) for b in samples.batches(4)] == [4, 4, 2]
    assert load_samples(FLOATS, limit=100).notes == ("all 6 samples were used",)
    assert len(load_samples(samples, limit=4)) == 4
    with pytest.raises(InputError, match="at least 1"):
        samples.take(0, 0)
    with pytest.raises(InputError, match="at least 1"):
        list(samples.batches(0))


def test_loader_stops_at_the_limit() -> None:
    def endless() -> Any:
        while True:
            yield torch.ones(4, 2), torch.zeros(4, dtype=torch.int64)

    samples = load_samples(endless(), limit=6, labelled=True)
    assert len(samples) == 6
    assert "the first 6 samples of the iterable" in samples.notes
    dataset = torch.utils.data.TensorDataset(torch.ones(7, 2), torch.arange(7))
    loaded = load_samples(torch.utils.data.DataLoader(dataset, batch_size=3))
    assert loaded.labels is not None
    assert loaded.labels.tolist() == list(range(7))
    with pytest.raises(InputError, match="for a Dataset: a DataLoader"):
        load_samples(dataset)


def test_function_from_the_current_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "samples_of_mine.py").write_text(
        "import numpy as np\n"
        "def pair(): return np.ones((4, 2), 'f4'), np.arange(4)\n"
        "def broken(): raise KeyError('no data')\n"
        "def text(): return 'text'\n"
        "constant = 3\n"
    )
    monkeypatch.chdir(tmp_path)
    assert load_samples("samples_of_mine:pair", labelled=True).source == "samples_of_mine:pair"
    for name, message in [
        ("broken", "raised KeyError: 'no data'; it is called without arguments"),
        ("text", "gave a str; samples are an array"),
        ("constant", "is a int, not a function"),
        ("absent", "samples_of_mine has no 'absent'; it has .*broken"),
    ]:
        with pytest.raises(InputError, match=message):
            load_samples(f"samples_of_mine:{name}")
    with pytest.raises(InputError, match="no Python module 'samples_of_nobody'"):
        load_samples("samples_of_nobody:f")


@pytest.mark.parametrize("where", ["folders", "numbers"])
def test_folder_of_pictures(tmp_path: Path, where: str) -> None:
    names = ["cat/a.png", "cat/b.png", "dog/c.png"] if where == "folders" else ["7_a.png", "7-b.png", "12_c.png"]
    samples = load_samples(_pictures(tmp_path, names), size=8, mean=(0.0, 0.0, 0.5), std=(1, 1, 0.5), labelled=True)
    assert samples.inputs[0].shape == (3, 3, 8, 8)
    assert samples.labels is not None
    assert sorted(samples.labels.tolist()) == ([0, 0, 1] if where == "folders" else [7, 7, 12])
    assert torch.allclose(samples.inputs[0][:, 2], torch.ones(()))
    assert "resized to 9 on the shorter side, centre 8x8" in samples.notes[0]
    assert len(load_samples(tmp_path, limit=2)) == 2


def test_the_cut_is_the_centre_and_grey_stays_one_channel(tmp_path: Path) -> None:
    array = RNG.integers(0, 256, (11, 14, 3), dtype=np.uint8)
    PIL.Image.fromarray(array).save(tmp_path / "a.png")
    samples = load_samples(tmp_path, size=7, resize=11)
    want = torch.from_numpy(array[2:9, 4:11] / 255).permute(2, 0, 1).float()  # round(3.5) is 4
    assert torch.allclose(samples.inputs[0][0], want)
    grey = _pictures(tmp_path / "grey", ["a.png"], mode="L")
    assert load_samples(grey).inputs[0].shape == (1, 1, 10, 12)


def test_folder_errors(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="holds no pictures"):
        load_samples(tmp_path / "empty")
    mixed = _pictures(_pictures(tmp_path / "mixed", ["a.png"]), ["b.png"], side=(9, 9))
    with pytest.raises(InputError, match=r"b.png is 9x9 pixels and a.png is 12x10; give --size"):
        load_samples(mixed)
    with pytest.raises(InputError, match="has no labels: put the pictures into one sub-folder"):
        load_samples(mixed, labelled=True)
    with pytest.raises(InputError, match=r"--mean has 2 numbers and the samples have 3 channels"):
        load_samples(mixed, size=8, mean=(1, 2))
    with pytest.raises(InputError, match="--resize 4 is smaller than --size 8"):
        load_samples(mixed, size=8, resize=4)
    (mixed / "c.png").write_bytes((mixed / "a.png").read_bytes()[:40])
    with pytest.raises(InputError, match=r"c\.png is damaged or no picture"):
        load_samples(mixed, size=8)
    _pictures(tmp_path / "both", ["a.png", "sub/b.png"])
    with pytest.raises(InputError, match="both directly and in sub-folders"):
        load_samples(tmp_path / "both")


class _Evil:
    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self.mark}",)


@pytest.mark.parametrize("suffix", [".npy", ".npz", ".pt"])
def test_pickles_do_not_run(tmp_path: Path, suffix: str) -> None:
    mark, path = tmp_path / "ran", tmp_path / f"d{suffix}"
    if suffix == ".npy":
        path.write_bytes(pickle.dumps(_Evil(mark)))
    elif suffix == ".npz":
        np.savez(path, x=np.array([_Evil(mark)], dtype=object))
    else:
        torch.save(_Evil(mark), path)
    with pytest.raises(InputError, match="could not be read safely" if suffix == ".pt" else "pickled Python objects"):
        load_samples(path)
    assert not mark.exists()


def test_file_errors(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no file or folder"):
        load_samples(tmp_path / "absent.npz")
    (tmp_path / "d.doc").write_text("1,2")
    with pytest.raises(InputError, match=r"ends in '.doc'; samples come from .npz, .npy, .pt"):
        load_samples(tmp_path / "d.doc")
    for suffix in (".npz", ".npy", ".safetensors"):
        (tmp_path / f"cut{suffix}").write_bytes(b"")
        with pytest.raises(InputError, match="empty, truncated or damaged"):
            load_samples(tmp_path / f"cut{suffix}")
    np.savez(tmp_path / "l.npz", labels=LABELS)
    with pytest.raises(InputError, match=r"holds no samples \(found: labels\)"):
        load_samples(tmp_path / "l.npz")


@pytest.mark.parametrize(
    ("source", "options", "message"),
    [
        (np.array([["a"], ["b"]]), {}, "dtype <U1, not numbers"),
        (np.array([[1], [1, 2]], dtype=object), {}, "dtype object, not numbers"),
        (np.zeros((0, 3)), {}, r"is empty: the array has shape \[0, 3\]"),
        (np.array(3.0), {}, "single number"),
        ([], {}, "is empty: it gave no batch"),
        (FLOATS, {"labelled": True}, r"no labels \(found: the array\)"),
        ({"x": FLOATS, "y": LABELS[:4]}, {}, "has 6 samples and there are 4 labels"),
        ({"x": FLOATS, "y": np.eye(6)}, {"labelled": True}, r"shape \[6, 6\].*give class numbers"),
        ((torch.ones(4, 2), torch.ones(3, 2)), {}, "array 0 has 4 samples and array 1 3"),
        (FLOATS, {"mean": (1, 2)}, "--mean has 2 numbers and the samples have 3 channels"),
        (FLOATS, {"std": (1, 0, 1)}, "must be positive"),
        (np.ones((3, 4), int), {"mean": 0.5}, "mean and std are for images"),
        (np.ones(3, "f4"), {"mean": 0.5}, "need samples with channels"),
        (torch.ones(3, 2, dtype=torch.complex64), {}, "samples are real numbers"),
        (5, {}, "gave a int; samples are"),
        ([torch.ones(2, 3), torch.ones(2, 4)], {}, "batches do not fit together"),
        (["ab"], {}, "batch of type str"),
        (FLOATS, {"limit": 0}, "at least 1"),
    ],
)
def test_source_errors(source: object, options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        load_samples(source, **options)


def test_nan_is_counted_and_located() -> None:
    bad = FLOATS.copy()
    bad[4, 0, 0, 0], bad[5, 1, 1, 1] = np.nan, np.inf
    with pytest.raises(InputError, match="the array holds 2 values that are NaN or infinite, the first in sample 4"):
        load_samples(bad)
    assert isinstance(load_samples(bad[:4]), Samples)


def test_unusable_labels_only_matter_when_needed() -> None:
    samples = load_samples({"x": FLOATS, "y": np.array(list("abcdef"))}, size=3)
    assert samples.labels is None
    assert "size and resize are for folders" in samples.notes[0]
    assert "not one number a sample: not used" in samples.notes[1]


@pytest.mark.real
def test_cifar10(shared_data: Path) -> None:
    path = shared_data / "cifar10/cifar10_test_a.npz"
    samples = load_samples(path, limit=100, labelled=True, mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))
    assert samples.inputs[0].shape == (100, 3, 32, 32)
    assert samples.labels is not None
    assert len(set(samples.labels.tolist())) == 10
