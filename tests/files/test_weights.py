"""Weights files are read without running anything, and every file that is none gets one clear sentence."""

import argparse
import os
import pickle
import tarfile
import zipfile

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from wan_files import RAW, sentence

from packforcing.files.weights import check_floating, read_json, read_state_dict


def test_torch_metadata_is_the_plain_values(tmp_path):
    torch.save({"generator": RAW, "step": 3, "lr": [1]}, tmp_path / "a.pt")
    assert read_state_dict(tmp_path / "a.pt")[1] == {"step": "3"}


def test_reading_does_not_load_the_file(tmp_path):
    def resident():
        with open("/proc/self/statm") as file:
            return int(file.read().split()[1]) * os.sysconf("SC_PAGESIZE")

    sets = {"generator": {"a": torch.ones(8 << 20)}, "generator_ema": {"a": torch.ones(8 << 20)}}  # 2 x 32 MiB
    torch.save(sets, tmp_path / "big.pt")
    save_file({"a": sets["generator"]["a"]}, tmp_path / "big.safetensors")
    del sets
    for name in ("big.pt", "big.safetensors"):
        before = resident()
        held = read_state_dict(tmp_path / name)
        assert resident() - before < 16 << 20
        del held


def test_missing_folder_and_empty(tmp_path):
    assert "does not exist" in sentence(read_state_dict, tmp_path / "no.pt")
    (tmp_path / "folder.pt").mkdir()
    assert "folder" in sentence(read_state_dict, tmp_path / "folder.pt")
    (tmp_path / "empty.pt").touch()
    assert "empty" in sentence(read_state_dict, tmp_path / "empty.pt")


@pytest.mark.parametrize("suffix", [".pt", ".safetensors", ".ckpt"])
@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"\n<!DOCTYPE html><html><body>Sign in</body></html>", "web page"),
        (b"<html>", "web page"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 5676070424\n", "git-lfs"),
        (b'{"error":"Repository not found"}', "JSON"),
        (b"GGUF\x03\x00\x00\x00", "GGUF"),
        (b"Entry not found", "download the file again"),
        (b"\x00", "download the file again"),
        (bytes(range(200, 256)), "download the file again"),
    ],
)
def test_other_things_saved_as_weights(tmp_path, suffix, content, says):
    path = tmp_path / f"model{suffix}"
    path.write_bytes(content)
    text = sentence(read_state_dict, path)
    assert says in text
    assert str(path) in text


def test_suffixes(tmp_path):
    torch.save(RAW, tmp_path / "a.safetensors")
    assert "rename it so that it ends in .pt" in sentence(read_state_dict, tmp_path / "a.safetensors")
    save_file(RAW, tmp_path / "a.pt")
    assert "ends in .safetensors" in sentence(read_state_dict, tmp_path / "a.pt")
    save_file(RAW, tmp_path / "a.sft")
    assert read_state_dict(tmp_path / "a.sft")[0].keys() == RAW.keys()
    (tmp_path / "a.json").write_text("[]")
    assert "'.json'" in sentence(read_state_dict, tmp_path / "a.json")


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_archives(tmp_path):
    with zipfile.ZipFile(tmp_path / "a.pt", "w") as archive:
        archive.writestr("readme.txt", "hello")
    assert "'readme.txt'" in sentence(read_state_dict, tmp_path / "a.pt")
    torch.jit.save(torch.jit.script(torch.nn.Linear(2, 2)), tmp_path / "b.pt")
    assert "TorchScript" in sentence(read_state_dict, tmp_path / "b.pt")
    with tarfile.open(tmp_path / "c.pt", "w", format=tarfile.GNU_FORMAT, encoding="latin-1") as archive:
        archive.addfile(tarfile.TarInfo("\x80storages"))  # a tar that starts as a pickle does
    assert "tar archive" in sentence(read_state_dict, tmp_path / "c.pt")


class Bomb:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (os.mkdir, (str(self.path),))


@pytest.mark.parametrize("zip_format", [True, False])
def test_code_in_a_pickle_is_not_run(tmp_path, zip_format):
    mark = tmp_path / "was-run"
    torch.save({"generator": RAW, "x": Bomb(mark)}, tmp_path / "a.pt", _use_new_zipfile_serialization=zip_format)
    text = sentence(read_state_dict, tmp_path / "a.pt")
    assert "mkdir" in text
    assert "nothing of it was run" in text
    assert not mark.exists()


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("protocol", [0, 2, 4])
def test_a_bare_pickle_is_not_run(tmp_path, protocol):
    mark = tmp_path / "was-run"
    (tmp_path / "a.pt").write_bytes(pickle.dumps({"x": Bomb(mark)}, protocol))
    sentence(read_state_dict, tmp_path / "a.pt")
    assert not mark.exists()


def test_objects_beside_the_weights_are_named(tmp_path):
    torch.save({"generator": RAW, "args": argparse.Namespace(lr=1)}, tmp_path / "a.pt")
    assert "argparse.Namespace" in sentence(read_state_dict, tmp_path / "a.pt")
    torch.save([torch.ones(1)], tmp_path / "b.pt")
    assert "list" in sentence(read_state_dict, tmp_path / "b.pt")


SMALL = {"a": torch.arange(300.0), "b": torch.ones(3)}


@pytest.mark.parametrize("kind", ["zip", "legacy", "safetensors"])
@given(st.floats(0, 1, exclude_max=True))
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_cut_short_anywhere(tmp_path, kind, where):
    path = tmp_path / ("a.safetensors" if kind == "safetensors" else "a.pt")
    if kind == "safetensors":
        save_file(SMALL, path)
    else:
        torch.save({"generator": SMALL}, path, _use_new_zipfile_serialization=kind == "zip")
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * where)])
    sentence(read_state_dict, path)


UNUSUAL = {
    "quantised by PyTorch": lambda: torch.quantize_per_tensor(torch.ones(4, 4), 0.1, 0, torch.qint8),
    "a sparse tensor (torch.sparse_coo)": lambda: torch.eye(4).to_sparse(),
    "a sparse tensor (torch.sparse_csr)": lambda: torch.eye(4).to_sparse_csr(),
    "a meta tensor": lambda: torch.ones(4, 4, device="meta"),
    "a nested tensor": lambda: torch.nested.nested_tensor([torch.ones(2), torch.ones(3)]),
    "claims 4,000,000,000,000 bytes and holds 4": lambda: torch.ones(1).expand(10**12),
}


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("says", UNUSUAL)
def test_tensors_that_are_no_dense_numbers_are_refused(tmp_path, says):
    torch.save({"generator": RAW, "other": {"deeper": {"x.weight": UNUSUAL[says]()}}}, tmp_path / "a.pt")
    text = sentence(read_state_dict, tmp_path / "a.pt")
    assert says in text
    assert "'x.weight'" in text


def test_a_name_that_is_no_text_is_refused(tmp_path):
    torch.save({**RAW, 0.5: torch.ones(2)}, tmp_path / "a.pt")
    assert "it names a tensor 0.5, and names of weights are texts" in sentence(read_state_dict, tmp_path / "a.pt")
    torch.save({**RAW, "optimizer": {0: {"step": torch.ones(())}}}, tmp_path / "a.pt")  # as optimizers number theirs
    assert read_state_dict(tmp_path / "a.pt")[0].keys() == {*RAW, "optimizer"}


def test_part_of_a_larger_tensor_is_dense(tmp_path):
    whole = torch.arange(64.0).reshape(8, 8)
    torch.save({"a": whole[2:4], "b": whole.T}, tmp_path / "a.pt")
    assert torch.equal(read_state_dict(tmp_path / "a.pt")[0]["b"], whole.T)


def test_mappings_that_are_deep_or_hold_themselves(tmp_path):
    circle = {"a": torch.ones(1)}
    circle["itself"] = circle
    torch.save(circle, tmp_path / "a.pt")
    assert read_state_dict(tmp_path / "a.pt")[0]["a"] == 1
    deep = {"x": torch.ones(1)}
    for _ in range(200):
        deep = {"deeper": deep}
    torch.save(deep, tmp_path / "b.pt")
    assert read_state_dict(tmp_path / "b.pt")[0].keys() == {"deeper"}


@pytest.mark.parametrize("tensor", [torch.ones(2).int(), torch.ones(2).bool(), torch.ones(2) + 1j, [1.0], {}])
def test_weights_are_floating_point_tensors(tensor):
    text = sentence(check_floating, {"x": torch.ones(2).half(), "a.bias": tensor}, "f.pt")
    assert text.startswith("f.pt cannot be used: 'a.bias' is a ")
    check_floating({"x": torch.ones(2, dtype=torch.float8_e5m2)}, "f.pt")


def test_json_that_is_nested_too_deep():
    for text in ("[" * 100_000, '{"a":' * 100_000):
        with pytest.raises(ValueError, match="nested too deep"):
            read_json(text)
    assert read_json("[[1]]") == [[1]]
