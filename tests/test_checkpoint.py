"""Checkpoints: every container, the released file's names, what does not fit, and files that are something else."""

from __future__ import annotations

import collections
import copy
import gzip
import io
import json
import math
import os
import pickle
import pickletools
import random
import re
import struct
import subprocess
import sys
import tarfile
import threading
import traceback
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from support import PATIENCE
from torch import Tensor, nn

import dyreg_triton as dt
from dyreg_triton.compat import Checkpoint, CheckpointError, load_checkpoint

GOLDEN = Path(__file__).parent / "golden"
PARAMS = {"offset_lstm_dim": 4, "offset_generator": "small", "init_regions": "center"}
WRAPPER = {"params": PARAMS, "in_channels": 8, "node_dim": 8, "H": 6, "W": 6, "h": 2, "w": 2}
pickled = pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])


# --- models in the style of the published ones ----------------------------------------------------------------------


class Split(nn.Module):
    """(B, C, H, W) -> (B / T, T, C, H, W) behind a convolution."""

    def __init__(self, block: nn.Module):
        super().__init__()
        self.block = block

    def forward(self, x: Tensor) -> Tensor:
        return self.block(x).unflatten(0, (-1, 2))


class Bottleneck(nn.Module):
    def __init__(self, second: nn.Module | None = None):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(8, 8, 1, bias=False), nn.BatchNorm2d(8)
        self.conv2 = second or nn.Conv2d(8, 8, 3, 1, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv2(self.bn1(self.conv1(x)))


class Base(nn.Module):
    def __init__(self, *seconds: nn.Module | None):
        super().__init__()
        self.layer3 = nn.Sequential(*map(Bottleneck, seconds))

    def forward(self, x: Tensor) -> Tensor:
        return self.layer3(x)


class Network(nn.Module):
    def __init__(self, *seconds: nn.Module | None):
        super().__init__()
        self.base_model = Base(*seconds)
        self.map_final_project = nn.Conv2d(8, 8, 1)
        self.new_fc = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.new_fc(self.map_final_project(self.base_model(x)).mean((-2, -1)))


def randomized(model: nn.Module, seed: int) -> nn.Module:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(0.3 * torch.randn(p.shape, generator=generator))
    return model.eval()


def dyreg_network(seed: int) -> nn.Module:
    wrapper = dt.compat.build("ops.dyreg.DynamicGraphWrapper", WRAPPER)
    seconds = nn.Sequential(Split(nn.Conv2d(8, 8, 3, 1, 1, bias=False)), wrapper)
    return randomized(Network(None, seconds), seed)


def rsa_network(seed: int) -> nn.Module:
    config = {"d_in": 8, "d_out": 8, "nh": 2, "dk": 0, "kernel_type": "VplusR", "feat_type": "VplusR"}
    return randomized(nn.ModuleDict({"base_model": Base(dt.compat.build("ops.rsa.RSA", config))}), seed)


def small_state() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(3)
    state: dict[str, Tensor] = collections.OrderedDict()
    state["conv.weight"] = torch.randn(4, 3, 3, generator=generator)
    state["conv.half"] = torch.randn(4, generator=generator).half()
    state["bn.num_batches_tracked"] = torch.tensor(17)
    state["mask"] = torch.tensor([True, False])
    return state


def released(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """A network's state_dict as the released DyReG file has it."""
    old = {}
    for name, t in state.items():
        name = name.replace(".conv2.0.block.", ".conv2.block.").replace(".conv2.1.", ".conv2.")
        name = re.sub("^map_final_project", "base_model.map_final_project", name)
        if not name.endswith("_buf"):
            old["module." + name] = t
        elif not name.endswith("pos_emb_buf"):  # these were saved, of the run's own batch
            old["module." + name.removesuffix("_buf")] = t.expand(3, *t.shape[1:]).clone()
    prefix = "module.base_model.layer3.1.conv2.dynamic_graph."
    constants = ("const_dh_ones", "const_dw_ones", "fix_offsets")
    return old | {prefix + name: torch.ones(3, 4, 1) for name in constants}


# --- files ----------------------------------------------------------------------------------------------------------


def written(path: Path, content: object, zipped: bool = True) -> Path:
    torch.save(content, path, _use_new_zipfile_serialization=zipped)
    return path


def saved_bytes(content: object, zipped: bool) -> bytes:
    stream = io.BytesIO()
    torch.save(content, stream, _use_new_zipfile_serialization=zipped)
    return stream.getvalue()


def with_records(data: bytes, edit: Callable[[str, bytes], bytes]) -> bytes:
    """A zip with its records edited and right checksums."""
    out = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(data)) as old, zipfile.ZipFile(out, "w") as new:
        for name in old.namelist():
            new.writestr(name, edit(name, old.read(name)))
    return out.getvalue()


def with_pickle(data: bytes, edit: Callable[[bytes], bytes]) -> bytes:
    """A file of torch.save with its pickle edited."""
    if not data.startswith(b"PK"):
        return edit(data)
    return with_records(data, lambda name, record: edit(record) if name.endswith("data.pkl") else record)


def assert_same(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert list(actual) == list(expected)
    for name, t in expected.items():
        assert type(actual[name]) is Tensor
        assert actual[name].device.type == "cpu"
        assert actual[name].dtype == t.dtype
        assert torch.equal(actual[name], t), name


def copied(model: nn.Module) -> dict[str, Tensor]:
    return {name: t.clone() for name, t in model.state_dict().items()}


def refusal(path: Path, *parts: str) -> str:
    """The message with which a file is refused: names the file, and has these parts."""
    with pytest.raises(CheckpointError) as caught:
        load_checkpoint(path)
    message = str(caught.value)
    for part in (str(path), *parts):
        assert part in message, message
    assert isinstance(caught.value, ValueError)
    shown = "".join(traceback.format_exception(caught.value))
    assert "add_safe_globals" not in shown  # torch's advice is to load it all the same
    return message


EXTRAS: dict[str, dict[str, Any]] = {
    "flat": {},
    "dyreg": {"epoch": 12, "arch": "resnet50", "optimizer": {"state": {}}, "best_prec1": np.float64(61.5)},
    "rsa": {"epoch": 12, "arch": "resnet50", "best_prec1": torch.tensor(61.5)},
    "bat": {
        "epoch": 12,
        "optim": {"state": {0: {"momentum_buffer": torch.tensor(2.0)}}, "param_groups": [{"lr": 0.1}]},
    },
}


@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module."])
@pytest.mark.parametrize("container", EXTRAS)
@pickled
def test_containers(zipped: bool, container: str, prefix: str, tmp_path: Path) -> None:
    state = small_state()
    inner = collections.OrderedDict((prefix + name, t) for name, t in state.items())
    extra = EXTRAS[container]
    path = written(tmp_path / "best.pth.tar", {**extra, "state_dict": inner} if extra else inner, zipped)
    checkpoint = load_checkpoint(path)
    assert_same(checkpoint, state)
    assert isinstance(checkpoint, Checkpoint)
    assert isinstance(checkpoint, dict)
    assert checkpoint.path == str(path)
    assert checkpoint.extra == extra
    assert checkpoint.renamed == ({name: prefix + name for name in state} if prefix else {})
    assert checkpoint.dropped == {}


def test_prefix_that_not_every_key_has(tmp_path: Path) -> None:
    state = {"module.a": torch.ones(2), "n_averaged": torch.tensor(3)}
    checkpoint = load_checkpoint(written(tmp_path / "x.pth", state))
    assert_same(checkpoint, state)
    assert checkpoint.renamed == {}


def test_safetensors(tmp_path: Path) -> None:
    state = small_state() | {"bf": torch.randn(3).bfloat16()}
    path = tmp_path / "model.pth"  # its content decides
    save_file({"module." + name: t for name, t in state.items()}, str(path), metadata={"epoch": "12"})
    checkpoint = load_checkpoint(str(path))
    assert_same({name: checkpoint[name] for name in state}, state)
    assert checkpoint.extra == {"epoch": "12"}
    assert checkpoint.renamed["mask"] == "module.mask"
    size = path.stat().st_size
    with path.open("r+b") as f:  # in place: the tensors must not be the file
        f.write(bytes(size))
    assert_same({name: checkpoint[name] for name in state}, state)


def test_torch_file_named_safetensors(tmp_path: Path) -> None:
    for zipped in (True, False):
        assert_same(load_checkpoint(written(tmp_path / "x.safetensors", small_state(), zipped)), small_state())


def test_safetensors_not_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_file(small_state(), str(tmp_path / "x.safetensors"))
    monkeypatch.setitem(sys.modules, "safetensors", None)
    with pytest.raises(ImportError, match=r"x\.safetensors' is a safetensors file; `pip install safetensors`"):
        load_checkpoint(tmp_path / "x.safetensors")
    assert_same(load_checkpoint(written(tmp_path / "x.pth", small_state())), small_state())


@pytest.mark.parametrize("spelling", [b"numpy.core.multiarray", b"numpy._core.multiarray"])
@pytest.mark.parametrize(
    "value",
    [np.float64(61.53125), np.float32(-2.5), np.float16(0.5), np.int64(-7), np.uint8(200), np.bool_(True)],
    ids=lambda value: value.dtype.name,
)
@pickled
def test_numpy_scalars(zipped: bool, value: np.generic, spelling: bytes, tmp_path: Path) -> None:
    big_endian = np.array(3.25, dtype=">f4")[()]
    content = {"state_dict": small_state(), "best_prec1": value, "other": [big_endian]}
    data = with_pickle(
        saved_bytes(content, zipped), lambda p: re.sub(rb"numpy\._?core\.multiarray", spelling, p, count=1)
    )
    path = tmp_path / "x.pth"
    path.write_bytes(data)
    allowed = set(torch.serialization.get_safe_globals())
    extra = load_checkpoint(path).extra
    assert sorted(extra) == ["best_prec1", "other"]
    assert extra["best_prec1"] == value
    assert type(extra["best_prec1"]) is type(value)
    assert extra["other"] == [3.25]
    assert set(torch.serialization.get_safe_globals()) == allowed


@pytest.mark.parametrize("spelling", [b"numpy.core.multiarray", b"numpy._core.multiarray"])
def test_numpy_allowed_by_the_application(spelling: bytes, tmp_path: Path) -> None:
    """The usual recipe for such files; it names one dtype."""
    scalar = np.float64(0).__reduce__()[0]
    content = {"state_dict": small_state(), "best_prec1": np.float64(1.5), "other": np.float32(2.5)}
    data = saved_bytes(content, True)
    path = tmp_path / "x.pth"
    path.write_bytes(with_pickle(data, lambda p: re.sub(rb"numpy\._?core\.multiarray", spelling, p)))
    for recipe in ([np.dtype], [scalar, np.dtype, type(np.dtype("f8"))]):
        with torch.serialization.safe_globals(recipe):
            allowed = set(torch.serialization.get_safe_globals())
            assert load_checkpoint(path).extra == {"best_prec1": 1.5, "other": 2.5}
            assert set(torch.serialization.get_safe_globals()) == allowed


@pickled
def test_saved_on_a_gpu(zipped: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.serialization, "location_tag", lambda storage: "cuda:3")
    content = {"state_dict": small_state(), "optimizer": {"state": {0: {"momentum_buffer": torch.ones(2)}}}}
    path = written(tmp_path / "x.pth", content, zipped)
    assert b"cuda:3" in path.read_bytes()
    checkpoint = load_checkpoint(path)
    assert_same(checkpoint, small_state())
    assert checkpoint.extra["optimizer"]["state"][0]["momentum_buffer"].device.type == "cpu"


@pickled
def test_parameters_and_shared_storages(zipped: bool, tmp_path: Path) -> None:
    base = torch.arange(12.0)
    state = {"p": nn.Parameter(torch.ones(3)), "a": base[2:6], "b": base.view(3, 4).t(), "e": torch.ones(1).expand(5)}
    checkpoint = load_checkpoint(written(tmp_path / "x.pth", state, zipped))
    assert_same(checkpoint, {name: t.detach() for name, t in state.items()})
    assert checkpoint["a"].untyped_storage().data_ptr() == checkpoint["b"].untyped_storage().data_ptr()


def test_entries_that_are_no_tensors(tmp_path: Path) -> None:
    state = {**small_state(), "head._extra_state": {"scale": 2}, "version": 3}
    flat = load_checkpoint(written(tmp_path / "flat.pth", state))
    nested = load_checkpoint(written(tmp_path / "nested.pth", {"epoch": 1, "state_dict": state}))
    left = {"head._extra_state": {"scale": 2}, "version": 3}
    assert flat.extra == left
    assert nested.extra == {"epoch": 1, "state_dict": left}
    assert_same(flat, small_state())
    assert_same(nested, small_state())


def test_checkpoint_is_a_dict(tmp_path: Path) -> None:
    checkpoint = load_checkpoint(written(tmp_path / "x.pth", {"epoch": 1, "state_dict": small_state()}))
    twin = copy.deepcopy(checkpoint)
    assert type(twin) is Checkpoint
    assert_same(twin, small_state())
    assert (twin.path, twin.extra) == (checkpoint.path, {"epoch": 1})
    assert repr(checkpoint) == (
        f"Checkpoint({str(tmp_path / 'x.pth')!r}: 4 tensors, published None, extra ['epoch'], 0 renamed, 0 dropped)"
    )


def test_threads(tmp_path: Path) -> None:
    """What one load allows does not leave the other without it."""
    path = written(tmp_path / "x.pth", {"state_dict": small_state(), "best_prec1": np.float64(1.5)})
    found: list[object] = []

    def load() -> None:
        for _ in range(20):
            try:
                found.append(load_checkpoint(path).extra["best_prec1"])
            except Exception as error:
                found.append(error)

    threads = [threading.Thread(target=load) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [1.5] * 80


# --- saved again ----------------------------------------------------------------------------------------------------


def released_checkpoint(folder: Path) -> Checkpoint:
    """With something in every attribute, tensors that share memory, and one that is not contiguous."""
    base = torch.arange(12.0)
    graph = "module.P.dynamic_graph."
    state = {
        graph + "offset_alpha": base[2:6],
        graph + "ph": torch.ones(3, 4, 1),
        "module.P.block.weight": base.view(3, 4).t(),
        "module.head.weight": torch.zeros(0, 3),
        "module.head.scale": torch.tensor([1.5, math.nan]).half(),
    }
    content = {"epoch": 3, "best_prec1": np.float64(51.6), "state_dict": {**state, "module.version": 2}}
    checkpoint = load_checkpoint(written(folder / "released.pth", content))
    assert checkpoint.renamed
    assert list(checkpoint.dropped) == [graph + "ph"]
    assert checkpoint.extra == {"epoch": 3, "best_prec1": 51.6, "state_dict": {"module.version": 2}}
    return checkpoint


def assert_bits(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert list(actual) == list(expected)
    for name, t in expected.items():
        dt.testing.assert_identical(actual[name], t, name)
        assert actual[name].stride() == t.stride()


def assert_same_checkpoint(actual: Checkpoint, expected: Checkpoint) -> None:
    assert type(actual) is type(expected) is Checkpoint
    assert_bits(actual, expected)
    assert repr(actual) == repr(expected)
    for name in ("path", "published", "extra", "renamed"):
        assert getattr(actual, name) == getattr(expected, name)
    assert list(actual.dropped) == list(expected.dropped)
    for one, other in zip(actual.dropped.values(), expected.dropped.values(), strict=True):
        assert type(one) is type(other)
        assert one.why == other.why
        assert one.tensor.equal(other.tensor)


@pickled
def test_a_saved_checkpoint_is_a_plain_state_dict(zipped: bool, tmp_path: Path) -> None:
    """By itself and inside of other things, for the reader that runs nothing and for the other one."""
    checkpoint = released_checkpoint(tmp_path)
    path = written(tmp_path / "again.pth", checkpoint, zipped)
    for weights_only in (True, False):
        plain = torch.load(path, weights_only=weights_only)
        assert type(plain) is collections.OrderedDict
        assert not vars(plain)
        assert_bits(plain, checkpoint)
    assert plain["P.0.block.weight"].untyped_storage().nbytes() == 48  # shared, and in the file once
    places = {
        plain[name].untyped_storage().data_ptr() for name in ("P.1.dynamic_graph.offset_alpha", "P.0.block.weight")
    }
    assert len(places) == 1
    again = load_checkpoint(path)
    assert_bits(again, checkpoint)
    assert (again.extra, again.renamed, again.dropped) == ({}, {}, {})
    nested = {"model": [checkpoint], "epoch": 4, "renamed": checkpoint.renamed, "dropped": checkpoint.dropped}
    plain = torch.load(written(tmp_path / "nested.pth", nested, zipped), weights_only=True)
    assert_bits(plain["model"][0], checkpoint)
    assert plain["renamed"] == checkpoint.renamed
    for name, entry in checkpoint.dropped.items():
        assert list(plain["dropped"][name]) == ["why", "tensor"]
        assert plain["dropped"][name]["why"] == entry.why
        assert plain["dropped"][name]["tensor"].equal(entry.tensor)


@pickled
def test_a_checkpoint_is_saved_with_what_else_was_in_its_file(zipped: bool, tmp_path: Path) -> None:
    checkpoint = released_checkpoint(tmp_path)
    path = written(tmp_path / "again.pth", {**checkpoint.extra, "state_dict": checkpoint}, zipped)
    again = load_checkpoint(path)
    assert_bits(again, checkpoint)
    assert again.extra == {"epoch": 3, "best_prec1": 51.6}
    with pytest.raises(pickle.UnpicklingError, match="numpy"):  # the scalar, as in the first file
        torch.load(path, weights_only=True)


WHOLE: dict[str, Callable[[Any], Any]] = {
    "copy": copy.copy,
    "deepcopy": copy.deepcopy,
    **{
        f"pickle {protocol}": lambda c, protocol=protocol: pickle.loads(pickle.dumps(c, protocol))
        for protocol in range(pickle.HIGHEST_PROTOCOL + 1)
        if protocol != 2
    },
    "pickle": lambda c: pickle.loads(pickle.dumps(c)),
    "the other pickler": lambda c: pickle._loads(pickle._dumps(c)),  # type: ignore[attr-defined]
}


@pytest.mark.parametrize("copied", WHOLE.values(), ids=WHOLE)
def test_copies_of_a_checkpoint_are_whole(copied: Callable[[Any], Any], tmp_path: Path) -> None:
    checkpoint = released_checkpoint(tmp_path)
    twin = copied(checkpoint)
    assert_same_checkpoint(twin, checkpoint)
    model = nn.ModuleDict({"head": nn.ParameterDict({"scale": torch.zeros(2)})})
    assert twin.load_into(model, strict=False).loaded == ("head.scale",)
    assert model["head"]["scale"][0] == 1.5
    names = [name for name in checkpoint if checkpoint[name].numel()]
    shared = [twin[name].data_ptr() == checkpoint[name].data_ptr() for name in names]
    assert shared == [copied is copy.copy] * len(names)
    twin["more"] = torch.ones(1)
    assert "more" not in checkpoint
    assert (twin.extra is checkpoint.extra) == (copied is copy.copy)


def test_pickle_in_torchs_protocol_is_what_torch_saves(tmp_path: Path) -> None:
    checkpoint = released_checkpoint(tmp_path)
    plain = pickle.loads(pickle.dumps(checkpoint, 2))
    assert type(plain) is collections.OrderedDict
    assert_bits(plain, checkpoint)


def test_dicts_made_of_a_checkpoint_are_plain(tmp_path: Path) -> None:
    checkpoint = released_checkpoint(tmp_path)
    for plain in (dict(checkpoint), checkpoint.copy(), checkpoint | {}, {**checkpoint}):
        assert type(plain) is dict
        assert_bits(plain, checkpoint)


def test_a_checkpoint_in_safetensors(tmp_path: Path) -> None:
    """It takes the dict itself; what shares memory or is not contiguous it refuses, and clones of that it takes."""
    path = tmp_path / "x.safetensors"
    checkpoint = load_checkpoint(written(tmp_path / "x.pth", small_state()))
    save_file(checkpoint, path)
    assert_bits(load_file(path), {name: checkpoint[name] for name in load_file(path)})
    assert set(load_file(path)) == set(checkpoint)
    checkpoint = released_checkpoint(tmp_path)
    path.unlink()
    tied = load_checkpoint(written(tmp_path / "tied.pth", {"a": (t := torch.ones(2)), "b": t}))
    strided = load_checkpoint(written(tmp_path / "strided.pth", {"a": torch.ones(2, 3).t()}))
    for refused, why in ((tied, "share memory"), (strided, "non contiguous"), (checkpoint, "")):
        with pytest.raises((RuntimeError, ValueError), match=why):
            save_file(refused, path)
        assert not path.exists()
    save_file({name: t.clone(memory_format=torch.contiguous_format) for name, t in checkpoint.items()}, path)
    again = load_checkpoint(path)
    assert set(again) == set(checkpoint)
    for name, t in checkpoint.items():
        dt.testing.assert_identical(again[name], t, name)


@pytest.mark.slow
def test_a_saved_checkpoint_opens_without_this_library(tmp_path: Path) -> None:
    checkpoint = released_checkpoint(tmp_path)
    written(tmp_path / "x.pth", {"state": checkpoint, "dropped": checkpoint.dropped})
    code = (
        "import sys; sys.modules['dyreg_triton'] = None; import torch; "
        "found = torch.load('x.pth', weights_only=True); "
        "print(*found['state'], *(list(entry) for entry in found['dropped'].values()))\n"
        "try: import dyreg_triton\n"
        "except ImportError: print('not here')"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=PATIENCE, check=True
    )
    assert done.stdout.splitlines() == [f"{' '.join(checkpoint)} ['why', 'tensor']", "not here"]


# --- names ----------------------------------------------------------------------------------------------------------


@pickled
def test_released_dyreg_file(zipped: bool, tmp_path: Path) -> None:
    model, other = dyreg_network(1), dyreg_network(2)
    file = released(model.state_dict())
    content = {"epoch": 50, "arch": "resnet50", "state_dict": file, "optimizer": {}, "best_prec1": np.float64(65.0)}
    checkpoint = load_checkpoint(written(tmp_path / "dyreg.pth.tar", content, zipped))
    assert checkpoint.published == "DyReG"
    prefix = "base_model.layer3.1.conv2."
    assert checkpoint.renamed[f"{prefix}0.block.weight"] == f"module.{prefix}block.weight"
    assert checkpoint.renamed[f"{prefix}1.dynamic_graph.offset_alpha"] == f"module.{prefix}dynamic_graph.offset_alpha"
    norm = "norm_dict.residual_norm.scale"
    assert checkpoint.renamed[f"{prefix}1.{norm}"] == f"module.{prefix}{norm}"
    # the graph has norms of its own, which stay where they are in it
    norm = "norm_dict.offset_ln_lstm.scale"
    assert checkpoint.renamed[f"{prefix}1.dynamic_graph.{norm}"] == f"module.{prefix}dynamic_graph.{norm}"
    assert checkpoint.renamed["map_final_project.bias"] == "module.base_model.map_final_project.bias"
    assert checkpoint.renamed.keys() == checkpoint.keys()
    dropped = {name.rpartition(".")[2]: entry for name, entry in checkpoint.dropped.items()}
    assert sorted(dropped) == sorted(
        ["ph", "pw", "arange_h", "arange_w", "const_dh_ones", "const_dw_ones", "fix_offsets"]
    )
    assert all("constant" in entry.why for entry in dropped.values())
    assert torch.equal(dropped["ph"].tensor, file[f"module.{prefix}dynamic_graph.ph"])
    report = checkpoint.load_into(other)
    assert report.complete
    assert {name.rpartition(".")[2] for name in report.kept} == {
        "ph_buf", "pw_buf", "arange_h_buf", "arange_w_buf", "pos_emb_buf"
    }  # fmt: skip
    x = torch.randn(4, 8, 6, 6)
    assert torch.equal(other(x), model(x))
    assert_same(copied(other), copied(model))


def test_new_form_is_unchanged(tmp_path: Path) -> None:
    for model in (dyreg_network(1), rsa_network(1)):
        state = model.state_dict()
        checkpoint = load_checkpoint(written(tmp_path / "x.pth", {"state_dict": state}))
        assert_same(checkpoint, state)
        assert (checkpoint.renamed, checkpoint.dropped) == ({}, {})
        assert str(model.load_state_dict(checkpoint)) == "<All keys matched successfully>"


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (["a.block.w", "a.dynamic_graph.w"], ["a.0.block.w", "a.1.dynamic_graph.w"]),
        (["block.w", "dynamic_graph.w"], ["0.block.w", "1.dynamic_graph.w"]),
        (["l.conv2.dynamic_graph.w"], ["l.conv2.1.dynamic_graph.w"]),
        (["conv2.dynamic_graph.w", "conv2.norm_dict.other.w"], ["conv2.1.dynamic_graph.w", "conv2.norm_dict.other.w"]),
        (["conv2.dynamic_graph.w", "conv2.block"], ["conv2.1.dynamic_graph.w", "conv2.block"]),
        # as they are
        (["l.4.dynamic_graph.w", "l.4.norm_dict.residual_norm.b"], None),
        (["a.block.w", "b.dynamic_graph.w"], None),
        (["a.0.block.w", "a.1.dynamic_graph.w", "a.1.norm_dict.residual_norm.b"], None),
        (["myconv2.dynamic_graph.w", "a.block.w"], None),
        (["a.block", "a.dynamic_graph.w"], None),
        (["conv2.dynamic_graph"], None),
        (["a.blocks.w", "a.dynamic_graph.w"], None),
        (["base_model.map_final.w", "x.base_model.new_fc.w"], None),
        # moved up
        (["base_model.map_final_project.w"], ["map_final_project.w"]),
        (["net.base_model.map_final_project.w"], ["net.map_final_project.w"]),
    ],
)
def test_renames(names: list[str], expected: list[str] | None, tmp_path: Path) -> None:
    state = {name: torch.full((2,), float(i)) for i, name in enumerate(names)}
    checkpoint = load_checkpoint(written(tmp_path / "x.pth", state))
    assert_same(checkpoint, dict(zip(expected or names, state.values(), strict=True)))
    assert checkpoint.renamed == {n: o for n, o in zip(expected or names, names, strict=True) if n != o}


@pytest.mark.parametrize(
    ("name", "dropped"),
    [
        *((f"x.dynamic_graph.{last}", True) for last in ("ph", "pw", "arange_h", "arange_w", "fix_offsets")),
        *((f"dynamic_graph.const_d{axis}_ones", True) for axis in "hw"),
        *((f"x.dynamic_graph.{last}_buf", False) for last in ("ph", "pw", "arange_h", "arange_w", "pos_emb")),
        ("x.graph.ph", False),
        ("dynamic_graph.ph.weight", False),
        ("dynamic_graph.phase", False),
        ("ph", False),
    ],
)
def test_drops(name: str, dropped: bool, tmp_path: Path) -> None:
    state = {"fc.weight": torch.ones(2), name: torch.arange(3.0)}
    checkpoint = load_checkpoint(written(tmp_path / "x.pth", state))
    assert (name in checkpoint.dropped, name in checkpoint) == (dropped, not dropped)
    if dropped:
        assert torch.equal(checkpoint.dropped[name].tensor, torch.arange(3.0))


@pytest.mark.parametrize(
    "names",
    [
        ("module.base_model.map_final_project.w", "module.map_final_project.w"),
        ("module.a.block.w", "module.a.0.block.w", "module.a.dynamic_graph.w"),
    ],
)
def test_two_entries_for_one_name(names: tuple[str, ...], tmp_path: Path) -> None:
    path = written(tmp_path / "x.pth", {name: torch.ones(2) for name in names})
    refusal(path, "two entries for", repr(names[0]), repr(names[1]))


@pytest.mark.parametrize(
    ("names", "published"),
    [
        (["layer3.4.conv2.1.dynamic_graph.offset_alpha", "layer1.0.conv1.net.weight"], "DyReG"),
        (["offset_alpha", "rstg.att_bias"], "DyReG"),
        (["layer2.1.conv2.projection.weight", "layer2.1.conv2.H2.weight", "layer1.0.conv1.weight"], "RSA"),
        (["projection.weight", "H2.weight"], "RSA"),
        (["a.projection.weight", "b.H2.weight"], None),
        (["layer2.nl1.batransform.conv_p.weight", "layer1.0.conv1.weight"], "BAT"),
        (["conv_p.weight", "conv_q.weight"], "BAT"),
        (["base_model.layer1.0.conv1.net.weight", "new_fc.weight"], "TSM"),
        (["layer1.0.conv1.weight", "fc.weight"], "ResNet"),
        (["encoder.weight"], None),
    ],
)
def test_published(names: list[str], published: str | None, tmp_path: Path) -> None:
    assert load_checkpoint(written(tmp_path / "x.pth", {n: torch.ones(1) for n in names})).published == published


@pytest.mark.parametrize(
    ("case", "name"),
    [
        ("dyreg_wrapper_i3d_14", "ops.dyreg.DynamicGraphWrapper"),
        ("dyreg_small_glore", "ops.dyreg.DynamicGraph"),
        ("rsa_VplusR_VplusR", "ops.rsa.RSA"),
        ("rsa_V_V", "ops.rsa.RSA"),
    ],
)
def test_the_authors_own_tensors(case: str, name: str, tmp_path: Path) -> None:
    with safe_open(GOLDEN / f"{case}.safetensors", "pt") as f:
        ctor = json.loads(f.metadata()["ctor"])
        state = {key[6:]: f.get_tensor(key) for key in f.keys() if key.startswith("state.")}  # noqa: SIM118
    module = dt.compat.build(name, ctor)
    content = {"epoch": 1, "state_dict": {f"module.{key}": t for key, t in state.items()}}
    checkpoint = load_checkpoint(written(tmp_path / "x.pth.tar", content))
    assert checkpoint.published == case.partition("_")[0].replace("dyreg", "DyReG").replace("rsa", "RSA")
    report = checkpoint.load_into(module)
    assert report.complete
    assert sorted(report.loaded) == sorted(state)
    assert report.kept == ()
    assert_same(dict(sorted(copied(module).items())), dict(sorted(state.items())))


# --- into a model ---------------------------------------------------------------------------------------------------


class Odd(nn.Module):
    """An int buffer, a bool one, and a parameter and buffers whose names are those of computed buffers, or almost."""

    def __init__(self) -> None:
        super().__init__()
        self.fc, self.gone = nn.Linear(3, 2), nn.Linear(2, 2)
        self.pw_buf = nn.Parameter(torch.zeros(2))
        self.register_buffer("ph_buf", torch.full((2,), 7.0))
        self.register_buffer("other_buf", torch.zeros(2))
        self.register_buffer("count", torch.tensor(5))
        self.register_buffer("mask", torch.tensor([True, False]))


def odd_file() -> dict[str, Tensor]:
    return {
        "fc.weight": torch.ones(3, 2),
        "fc.bias": torch.ones(2),
        "count": torch.tensor(6.0),
        "mask": torch.tensor([1, 0]),
        "gone.weight": torch.ones(2, 2, dtype=torch.int32),
        "surplus.weight": torch.ones(4),
        "more": torch.ones(1),
    }


MISSING, UNEXPECTED = ("pw_buf", "other_buf", "gone.bias"), ("surplus.weight", "more")
MIS_SHAPED = {
    "fc.weight": ("float32 (3, 2)", "float32 (2, 3)"),
    "count": ("float32 ()", "int64 ()"),
    "mask": ("int64 (2,)", "bool (2,)"),
    "gone.weight": ("int32 (2, 2)", "float32 (2, 2)"),
}


def test_everything_that_does_not_fit_is_told_at_once(tmp_path: Path) -> None:
    checkpoint = load_checkpoint(written(tmp_path / "x.pth", odd_file()))
    model = Odd()
    before = copied(model)
    with pytest.raises(CheckpointError) as caught:
        checkpoint.load_into(model)
    assert_same(copied(model), before)
    message = str(caught.value)
    assert checkpoint.path in message
    for name in (*MISSING, *UNEXPECTED):
        assert f"\n  {name}\n" in f"{message}\n"
    for name, (file, own) in MIS_SHAPED.items():
        assert f"  {name}: {file} in the file, {own} in the model" in message
    assert "kept as the model has them (1):\n  ph_buf" in message


def test_not_strict_loads_what_fits(tmp_path: Path) -> None:
    model = Odd()
    before = copied(model)
    report = load_checkpoint(written(tmp_path / "x.pth", odd_file())).load_into(model, strict=False)
    assert not report.complete
    assert report.loaded == ("fc.bias",)
    assert sorted(report.missing) == sorted(MISSING)
    assert report.unexpected == UNEXPECTED
    assert report.mis_shaped == MIS_SHAPED
    assert report.kept == ("ph_buf",)
    assert str(report).startswith("Odd: 1 tensors fit\nmissing from the file (3):\n")
    assert_same(copied(model), before | {"fc.bias": torch.ones(2)})


def test_model_keeps_dtypes_and_parameters(tmp_path: Path) -> None:
    state = nn.Linear(3, 2).state_dict()
    path = written(tmp_path / "x.pth", {name: t.half() for name, t in state.items()})
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        model = nn.Linear(3, 2, dtype=dtype).requires_grad_(False)
        own = [(p, p.data_ptr()) for p in model.parameters()]
        assert load_checkpoint(path).load_into(model).complete
        assert [(p, p.data_ptr()) for p in model.parameters()] == own or len(own) == 0
        assert not model.weight.requires_grad
        assert torch.equal(model.weight, state["weight"].half().to(dtype))


@pytest.mark.parametrize("wrap", ["parallel", "distributed", "compiled", "both"])
def test_wrapped_models(wrap: str, tmp_path: Path) -> None:
    model, other = rsa_network(1), rsa_network(2)
    wrapped: nn.Module = other
    if wrap == "distributed":
        store = torch.distributed.FileStore(str(tmp_path / "store"), 1)
        torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
        try:
            wrapped = nn.parallel.DistributedDataParallel(other)
        finally:
            torch.distributed.destroy_process_group()
    if wrap in ("parallel", "both"):
        wrapped = nn.DataParallel(other)
    if wrap in ("compiled", "both"):
        wrapped = torch.compile(wrapped)
    assert not set(wrapped.state_dict()) & set(other.state_dict())
    for content in (model.state_dict(), nn.DataParallel(model).state_dict()):
        randomized(other, 2)
        report = load_checkpoint(written(tmp_path / "x.pth", content)).load_into(wrapped)
        assert report.complete
        assert set(report.loaded) == set(other.state_dict())
        assert_same(copied(other), copied(model))


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(2, 2, bias=False), nn.Linear(2, 2, bias=False)
        self.b.weight = self.a.weight


def test_shared_parameters(tmp_path: Path) -> None:
    value = torch.arange(4.0).view(2, 2)
    for names in (("a.weight",), ("b.weight",), ("a.weight", "b.weight")):
        model = Tied()
        report = load_checkpoint(written(tmp_path / "x.pth", dict.fromkeys(names, value))).load_into(model)
        assert set(report.loaded) == {"a.weight", "b.weight"}
        assert report.missing == ()
        assert model.a.weight is model.b.weight
        assert torch.equal(model.b.weight, value)
    spoilt = value / 0  # NaN differs from itself
    path = written(tmp_path / "x.pth", {"a.weight": spoilt, "b.weight": spoilt})
    assert load_checkpoint(path).load_into(Tied()).complete
    model = Tied()
    before = copied(model)
    path = written(tmp_path / "x.pth", {"a.weight": value, "b.weight": value + 1})
    with pytest.raises(CheckpointError, match=r"different values in the file \(1\):\n  a\.weight and b\.weight"):
        load_checkpoint(path).load_into(model)
    assert_same(copied(model), before)
    assert load_checkpoint(path).load_into(model, strict=False).conflicting == (("a.weight", "b.weight"),)


def test_a_load_that_fails_half_way_is_taken_back(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    before = copied(model)
    checkpoint = load_checkpoint(written(tmp_path / "x.pth", {name: t + 1 for name, t in before.items()}))

    def fail(module: nn.Module, incompatible: object) -> None:
        assert torch.equal(model[0].weight, before["0.weight"] + 1)
        raise KeyError("a hook of the user")

    handle = model[1].register_load_state_dict_post_hook(fail)
    with pytest.raises(KeyError, match="a hook of the user"):
        checkpoint.load_into(model)
    assert_same(copied(model), before)
    handle.remove()
    with torch.inference_mode():
        model[0].bias = nn.Parameter(torch.zeros(2))
    before = copied(model)
    with pytest.raises(RuntimeError, match="inference"):
        checkpoint.load_into(model)
    assert_same(copied(model), before)


@pytest.mark.parametrize("model", [nn.Linear(2, 2, device="meta"), nn.LazyLinear(2)], ids=["meta", "lazy"])
def test_models_without_memory(model: nn.Module, tmp_path: Path) -> None:
    checkpoint = load_checkpoint(written(tmp_path / "x.pth", nn.Linear(2, 2).state_dict()))
    for strict in (True, False):
        with pytest.raises(CheckpointError, match=r"model has no memory for weight, bias; accepted is"):
            checkpoint.load_into(model, strict=strict)


def test_bad_arguments(tmp_path: Path) -> None:
    checkpoint = load_checkpoint(written(tmp_path / "x.pth", small_state()))
    for model in (nn.Linear, {}, None):
        with pytest.raises(TypeError, match=r"load_into: model is .*; accepted is an nn\.Module"):
            checkpoint.load_into(model)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="load_into: strict is 1; accepted are True and False"):
        checkpoint.load_into(nn.Linear(2, 2), strict=1)  # type: ignore[arg-type]
    for path in (None, 3, b"x.pth", io.BytesIO(), small_state()):
        with pytest.raises(TypeError, match=r"load_checkpoint: path is .*; accepted is a str or an os\.PathLike"):
            load_checkpoint(path)  # type: ignore[arg-type]


# --- hostile files --------------------------------------------------------------------------------------------------


class Evil:
    """Pickles as a call."""

    def __init__(self, function: Callable[..., object], *arguments: object):
        self.call = function, arguments

    def __reduce__(self) -> tuple:
        return self.call


def places(thing: object) -> dict[str, object]:
    state = small_state()
    return {
        "whole": thing,
        "entry": {**state, "x": thing},
        "optimizer": {"state_dict": state, "optimizer": {"state": {0: {"m": [(thing,)]}}}},
        "state_dict": {"epoch": 1, "state_dict": thing},
    }


@pytest.mark.parametrize("where", places(None))
@pytest.mark.parametrize("protocol", [2, 4])
@pickled
def test_nothing_is_executed(zipped: bool, protocol: int, where: str, tmp_path: Path) -> None:
    mark = tmp_path / "was-run"
    content = places(Evil(os.mkdir, str(mark)))[where]
    path = tmp_path / "x.pth"
    torch.save(content, path, pickle_protocol=protocol, _use_new_zipfile_serialization=zipped)
    message = refusal(path, "'posix.mkdir'", "none of it was imported or run")
    assert "OrderedDict" not in message  # what is accepted is not blamed
    assert not mark.exists()
    # it would have been
    torch.load(path, weights_only=False)
    assert mark.exists()


@pickled
def test_every_global_is_named(zipped: bool, tmp_path: Path) -> None:
    evil = [Evil(os.mkdir, "a"), Evil(eval, "1"), Evil(np.zeros, 3), Evil(torch.load, "x")]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        path = written(tmp_path / "x.pth", {**small_state(), "x": evil}, zipped)
    message = refusal(path, "posix.mkdir", "builtin", ".eval'", "numpy.zeros", "torch.serialization.load")
    assert "torch._utils" not in message
    assert "weights_only" not in message


@pickled
def test_whole_module(zipped: bool, tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        path = written(tmp_path / "x.pth", nn.Sequential(nn.Linear(2, 2)), zipped)
    refusal(path, "a whole pickled module that asks for 'torch.nn.modules.container.Sequential'", "Linear")


def test_hidden_names(tmp_path: Path) -> None:
    """Names from the memo, and by older opcodes, behind the magic number."""
    magic = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."
    assert saved_bytes(small_state(), False).startswith(magic)
    payloads = {
        "memo": b"\x80\x04\x8c\x05posix\x940\x8c\x06system\x940\x8c\x01x0h\x00h\x01\x93\x8c\x02ls\x85R.",
        "put": b"Vposix\np5\n0Vsystem\np7\n0g5\ng7\n\x93Vls\n\x85R.",
        "inst": b"(S'ls'\niposix\nsystem\n.",
    }
    for name, payload in payloads.items():
        pickletools.dis(payload, out=io.StringIO())  # well formed
        (tmp_path / name).write_bytes(magic + payload)
        refusal(tmp_path / name, "'posix.system'")


@pytest.mark.parametrize(
    "dtype",
    [b"X\x02\x00\x00\x00O8", b"X\x02\x00\x00\x00V8", b"X\x03\x00\x00\x00f99", b"X\x02\x00\x00\x00f4", b"K\x05"],
    ids=["object", "void", "size", "length", "type"],
)
def test_hostile_numpy_scalars(dtype: bytes, tmp_path: Path) -> None:
    data = saved_bytes({"state_dict": small_state(), "best_prec1": np.float64(1.5)}, True)
    original = b"X\x02\x00\x00\x00f8"
    path = tmp_path / "x.pth"
    path.write_bytes(with_pickle(data, lambda p: p.replace(original, original)))
    assert load_checkpoint(path).extra == {"best_prec1": 1.5}
    path.write_bytes(with_pickle(data, lambda p: p.replace(original, dtype)))
    refusal(path, "damaged or unsupported", "numpy")


def test_numpy_itself_is_not_reached(tmp_path: Path) -> None:
    """A file cannot change the dtype that all arrays share."""
    state = b"(K\x03X\x01\x00\x00\x00>NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb"
    data = saved_bytes({"state_dict": small_state(), "x": np.float64(1.5)}, True)
    edited = with_pickle(data, lambda p: p.replace(b"\x89\x88\x87", b"\x89\x89\x87"))
    (tmp_path / "x.pth").write_bytes(with_pickle(edited, lambda p: re.sub(rb"\(K\x03.*?tq.b", state, p, flags=re.S)))
    swapped = struct.unpack(">d", struct.pack("<d", 1.5))[0]
    assert load_checkpoint(tmp_path / "x.pth").extra == {"x": swapped}
    assert np.dtype("f8").isnative
    assert np.frombuffer(struct.pack("=d", 1.5), "f8")[0] == 1.5


@pickled
def test_tensors_larger_than_their_storage(zipped: bool, tmp_path: Path) -> None:
    data = saved_bytes({"a": torch.arange(4.0)}, zipped)
    for size in (b"K\xc8", b"J\x00\x00\x00\x40"):
        edited = with_pickle(data, lambda p, size=size: p.replace(b"K\x04\x85", size + b"\x85"))
        (tmp_path / "size.pth").write_bytes(edited)
        refusal(tmp_path / "size.pth", "damaged")
        both = with_pickle(edited, lambda p, size=size: re.sub(rb"K\x04(N?t)", size + rb"\1", p))
        assert both != edited
        (tmp_path / "both.pth").write_bytes(both)
        refusal(tmp_path / "both.pth", "damaged")


def test_storage_that_the_file_does_not_fill(tmp_path: Path) -> None:
    """An older file that leaves out its numbers would give what happens to be in memory."""
    data = saved_bytes({"a": torch.zeros(1000)}, False)
    start = data.rindex(b"\x80\x02")
    assert data[start:].startswith(b"\x80\x02]")
    (tmp_path / "x.pth").write_bytes(data[:start] + b"\x80\x02].")
    refusal(tmp_path / "x.pth", "tensors larger than what the file stores for them")


def test_zip_bombs(tmp_path: Path) -> None:
    data = saved_bytes({"state_dict": {"a": torch.zeros(100_000)}}, True)
    path = tmp_path / "x.pth"
    with zipfile.ZipFile(io.BytesIO(data)) as old, zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as new:
        for name in old.namelist():
            new.writestr(name, old.read(name))
    refusal(path, "compressed records", "data.pkl")
    # the directory claims more than there is; both sizes, so that it does not look compressed
    end = data.index(b"PK\x01\x02")
    one = data.index(b"PK\x01\x02", end + 4)
    edited = bytearray(data)
    edited[one + 20 : one + 28] = struct.pack("<II", 2**31, 2**31)
    path.write_bytes(edited)
    refusal(path, "records are larger than the file")


def test_zip_with_two_records_of_one_name(tmp_path: Path) -> None:
    path = written(tmp_path / "x.pth", small_state())
    with warnings.catch_warnings(), zipfile.ZipFile(path, "a") as archive:
        warnings.simplefilter("ignore")
        archive.writestr(next(name for name in archive.namelist() if name.endswith("/data/0")), b"other")
    refusal(path, "two records of one name")


def test_checksums(tmp_path: Path) -> None:
    state = {"a": torch.full((1000,), 1.5)}
    data = bytearray(saved_bytes(state, True))
    where = data.index(struct.pack("<f", 1.5) * 4)
    data[where + 2] ^= 1
    path = tmp_path / "x.pth"
    path.write_bytes(data)
    refusal(path, "wrong checksum of", "/data/0")
    before = torch.serialization.get_crc32_options()
    torch.serialization.set_crc32_options(False)
    try:
        written(path, state)
    finally:
        torch.serialization.set_crc32_options(before)
    assert_same(load_checkpoint(path), state)


# --- damaged files --------------------------------------------------------------------------------------------------


def checkpoint_bytes(kind: str, tmp_path: Path) -> bytes:
    state = {f"module.{name}": t for name, t in small_state().items()}
    if kind == "safetensors":
        save_file(state, str(tmp_path / "whole"))
        return (tmp_path / "whole").read_bytes()
    content = {"state_dict": state, "best_prec1": np.float64(1.5), "optimizer": {"m": [torch.ones(3)]}}
    return saved_bytes(content, kind == "zip")


kinds = pytest.mark.parametrize("kind", ["zip", "legacy", "safetensors"])


@kinds
def test_truncated(kind: str, tmp_path: Path) -> None:
    data = checkpoint_bytes(kind, tmp_path)
    path = tmp_path / "x.pth"
    path.write_bytes(data)
    assert_same(dict(sorted(load_checkpoint(path).items())), dict(sorted(small_state().items())))
    for end in sorted({*range(0, 40), *range(40, len(data), 23), *range(len(data) - 30, len(data))}):
        path.write_bytes(data[:end])
        refusal(path)
    path.write_bytes(data[: len(data) // 2])
    refusal(path, "cut off or damaged" if kind != "legacy" else "cut off, damaged")


@kinds
def test_flipped_bits(kind: str, tmp_path: Path) -> None:
    """Refused, or read; nothing else."""
    data = checkpoint_bytes(kind, tmp_path)
    path = tmp_path / "x.pth"
    rng = random.Random(5)
    refused = 0
    for i in range(300):
        damaged = bytearray(data)
        for _ in range(rng.choice((1, 1, 4, 32))):
            damaged[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        if kind == "zip" and i % 2:  # behind a right checksum

            def flip(record: bytes) -> bytes:
                at = rng.randrange(len(record))
                return record[:at] + bytes([record[at] ^ (1 << rng.randrange(8))]) + record[at + 1 :]

            damaged = bytearray(with_pickle(data, flip))
        path.write_bytes(damaged)
        try:
            checkpoint = load_checkpoint(path)
        except CheckpointError:
            refused += 1
        else:
            assert all(type(t) is Tensor for t in checkpoint.values())
    assert refused > 50


@pytest.mark.parametrize("head", [b"", b"PK\x03\x04", b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19.", b"\x80\x04\x95"])
def test_garbage(head: bytes, tmp_path: Path) -> None:
    rng = random.Random(6)
    for i in range(60):
        (tmp_path / "x.pth").write_bytes(head + rng.randbytes(rng.choice((1, 7, 40, 500, 3000))))
        refusal(tmp_path / "x.pth")
        if not head and i < 20:  # almost a safetensors header
            (tmp_path / "x.pth").write_bytes(struct.pack("<Q", 40) + b"{" + rng.randbytes(80))
            refusal(tmp_path / "x.pth", "safetensors")


# --- foreign files --------------------------------------------------------------------------------------------------


def zip_of(**records: bytes) -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as archive:
        for name, record in records.items():
            archive.writestr(name.replace("__", "/").replace("_dot_", "."), record)
    return stream.getvalue()


def tar_of(name: str) -> bytes:
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w") as archive:
        member = tarfile.TarInfo(name)
        member.size = 3
        archive.addfile(member, io.BytesIO(b"abc"))
    return stream.getvalue()


def numpy_bytes(save: Callable[..., None], **arrays: np.ndarray) -> bytes:
    stream = io.BytesIO()
    save(stream, *([] if arrays else [np.ones(3)]), **arrays)
    return stream.getvalue()


FOREIGN = {
    "empty": (b"", "nothing: it is empty"),
    "html": (b"\n<!DOCTYPE html><html><head><title>Google Drive - Quota exceeded</title>", "Quota exceeded"),
    "html without title": (b"<html>404</html>", "an HTML page: the download failed"),
    "git-lfs": (b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n", "git lfs pull"),
    "text": (b'{"error": "not found"}', """text that begins with '{"error": "not found"}'"""),
    "tar": (tar_of("model.pth"), "a tar archive of 'model.pth'; unpack it first"),
    "damaged tar": (tar_of("model.pth")[:300], "a tar archive"),
    "gzip": (gzip.compress(saved_bytes(small_state(), True)), "gzip; unpack it first"),
    "zip": (zip_of(readme_dot_txt=b"hello"), "a zip archive that torch.save did not write: 'readme.txt'"),
    "empty zip": (zip_of(), "a zip archive that is empty"),
    "torchscript": (zip_of(m__data_dot_pkl=b"\x80\x02}.", m__constants_dot_pkl=b"\x80\x02)."), "a TorchScript archive"),
    "old torchscript": (zip_of(m__data_dot_pkl=b"\x80\x02}.", m__code__m_dot_py=b"op = 1"), "a TorchScript archive"),
    "npz": (numpy_bytes(np.savez, a=np.ones(3)), "numpy arrays (.npz): 'a.npy'"),
    "npy": (numpy_bytes(np.save), "a numpy array (.npy)"),
    "hdf5": (b"\x89HDF\r\n\x1a\n" + bytes(40), "HDF5"),
    "onnx": (b"\x08\x07\x12\x07pytorch\x1a\x053.1:" + bytes(9), "an ONNX model"),
    "tensorflow": (b"\x08\x01\x12\xab\x03\x0a" + bytes(9), "TensorFlow"),
    "tensorflow index": (bytes(90) + struct.pack("<Q", 0xDB4775248B80FB57), "TensorFlow"),
    "tflite": (b"\x1c\x00\x00\x00TFL3" + bytes(90), "TensorFlow"),
    "pickle": (pickle.dumps({"a": np.ones(2)}, 2), "a plain pickle, not of torch.save (it was not run; it names"),
    "plain pickle": (pickle.dumps({"a": 1}, 4), "a plain pickle, not of torch.save (it was not run)"),
    "unknown": (b"\x00\xff" * 30, "unknown data that begins with 00 ff 00 ff"),
}


@pytest.mark.parametrize("name", FOREIGN)
def test_foreign_files(name: str, tmp_path: Path) -> None:
    content, what = FOREIGN[name]
    path = tmp_path / "checkpoint.pth.tar"
    path.write_bytes(content)
    message = refusal(path, what)
    assert "accepted is a state_dict" in message


def test_real_torchscript(tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.save(torch.jit.trace(nn.Linear(2, 2), torch.ones(1, 2)), tmp_path / "x.pt")
    refusal(tmp_path / "x.pt", "a TorchScript archive, which holds code")


@pytest.mark.parametrize(
    ("content", "what"),
    [
        ([torch.ones(2), torch.ones(3), 1], "a list of 3 (2 x Tensor, 1 x int)"),
        (torch.ones(2, 3), "a tensor (float32 (2, 3)"),
        (3, "one int"),
        ({}, "a dict of nothing, no state_dict"),
        ({"epoch": 3, "lr": 0.1}, "a dict of 'epoch' (int), 'lr' (float), no state_dict"),
        ({"state_dict": {"epoch": 3}}, "a dict of 'epoch' (int)"),
        ({"state_dict": [1]}, "a list of 1 (1 x int) as its state_dict"),
        ({"state_dict": None, "a": torch.ones(1)}, "one NoneType as its state_dict"),
        ({"model": small_state(), "epoch": 3}, "a dict of 'model' (OrderedDict of 4), 'epoch' (int)"),
        ({"model": small_state(), "best": torch.ones(1)}, "('model' would do, saved by itself)"),
        ({0: torch.ones(2), "a": torch.ones(2)}, "keys in the dict are no names: 0"),
        ({"state_dict": {(1, 2): torch.ones(2)}}, "keys in its 'state_dict' are no names: (1, 2)"),
        ({"a": torch.ones(2).to_sparse(), "b": torch.ones(1)}, "other than dense tensors with values: a dict of 'a'"),
        ({"a": torch.ones(2, device="meta"), "b": torch.ones(1)}, "other than dense tensors with values"),
    ],
)
def test_other_contents(content: object, what: str, tmp_path: Path) -> None:
    message = refusal(written(tmp_path / "x.pth", content), what)
    assert "'b'" not in message  # what is right is not blamed


def test_no_file(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"there is no such file: .*none\.pth"):
        load_checkpoint(tmp_path / "none.pth")
    refusal(tmp_path, "a directory")
    os.mkfifo(tmp_path / "pipe")
    refusal(tmp_path / "pipe", "no regular file")
