"""What is saved is what is loaded, bit for bit, whatever the shapes, dtypes and boxes."""

from __future__ import annotations

import json
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import xxhash
from cuts import bits, cuts, part, random_tensor, region_in, shapes, shards_of
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from megalm.checkpoint import CheckpointManifest, DamagedCheckpoint, Shard, load, read_manifest, save, whole
from megalm.checkpoint.manifest import DTYPES, MANIFEST, VERSION, Region, TensorRecord
from megalm.errors import UserError

DIMS = st.lists(st.integers(0, 5), max_size=4).map(tuple)
NAMES = st.text(min_size=1, max_size=12).filter(lambda name: name != "__metadata__" and name.isprintable())


@st.composite
def tensors(draw: st.DrawFn) -> torch.Tensor:
    tensor = random_tensor(draw(DIMS), draw(st.sampled_from(sorted(DTYPES))), draw(st.integers(0, 2**31)))
    return tensor.T if tensor.dim() == 2 and draw(st.booleans()) else tensor


def zeros_like(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: torch.zeros(tensor.shape, dtype=tensor.dtype) for name, tensor in tensors.items()}


@settings(deadline=None, max_examples=60)
@given(st.dictionaries(NAMES, tensors(), max_size=6))
def test_any_tensors_come_back_bit_for_bit_and_the_safetensors_library_reads_the_same(
    saved: dict[str, torch.Tensor],
) -> None:
    with tempfile.TemporaryDirectory() as folder:
        directory = save(Path(folder), 7, whole(saved), {}, keep=1)
        loaded = zeros_like(saved)
        load(directory, whole(loaded))
        assert {n: bits(t) for n, t in loaded.items()} == {n: bits(t) for n, t in saved.items()}
        library = load_file(directory / "rank-00000.safetensors") if saved else {}
        assert {n: bits(t) for n, t in library.items()} == {n: bits(t) for n, t in saved.items()}


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


@settings(deadline=None, max_examples=100)
@given(st.dictionaries(st.text(), JSON, max_size=4))
def test_state_comes_back_exactly(state: dict[str, Any]) -> None:
    manifest = CheckpointManifest(step=3, state=state, files={}, tensors={})
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / MANIFEST).write_bytes(manifest.to_bytes())
        back = read_manifest(Path(folder)).state
    assert back == state
    assert repr(back) == repr(state)  # tells 1 from 1.0 and 0.0 from -0.0


def test_the_directory_holds_a_json_manifest_and_a_safetensors_file(tmp_path: Path) -> None:
    saved = whole({"model.x": torch.arange(6.0).reshape(2, 3)})
    directory = save(tmp_path / "checkpoints", 100, saved, {"a": 1}, keep=1)
    assert directory == tmp_path / "checkpoints" / "step-00000100"
    assert sorted(path.name for path in directory.iterdir()) == [MANIFEST, "rank-00000.safetensors"]
    fields = json.loads((directory / MANIFEST).read_text())
    assert (fields["format"], fields["version"], fields["step"], fields["state"]) == (
        "megalm-checkpoint",
        1,
        100,
        {"a": 1},
    )
    assert fields["files"]["rank-00000.safetensors"]["size"] == (directory / "rank-00000.safetensors").stat().st_size
    assert fields["tensors"]["model.x"]["shape"] == [2, 3]
    with safe_open(directory / "rank-00000.safetensors", "pt") as file:
        assert file.get_tensor("model.x").tolist() == [[0, 1, 2], [3, 4, 5]]


def test_tensors_are_aligned_to_their_elements(tmp_path: Path) -> None:
    saved = {"a": torch.ones(3, dtype=torch.bool), "b": torch.ones(3), "c": torch.ones(3, dtype=torch.int64)}
    manifest = read_manifest(save(tmp_path, 1, whole(saved), {}, keep=1))
    assert all(manifest.tensors[name].boxes[0].start % saved[name].element_size() == 0 for name in saved)


def test_parameters_are_loaded_in_place(tmp_path: Path) -> None:
    model = torch.nn.Linear(3, 2)
    directory = save(tmp_path, 1, whole(model.state_dict()), {}, keep=1)
    other = torch.nn.Linear(3, 2)
    pointer = other.weight.data_ptr()
    load(directory, whole(dict(other.named_parameters())))
    assert torch.equal(other.weight, model.weight)
    assert other.weight.data_ptr() == pointer
    assert other.weight.requires_grad


def test_a_prefix_loads_a_part_and_leaves_the_rest_unread(tmp_path: Path) -> None:
    saved = {"model.x": torch.ones(4), "optimizer.x": torch.ones(4)}
    directory = save(tmp_path, 1, whole(saved), {}, keep=1)
    into = {"model.x": torch.zeros(4)}
    load(directory, whole(into), prefix="model.")
    assert torch.equal(into["model.x"], saved["model.x"])


@pytest.mark.parametrize(
    ("into", "said"),
    [
        ({}, "'model.weight'"),
        ({"model.weight": torch.zeros(4, 2), "model.bias": torch.zeros(2)}, "'model.bias'"),
        ({"model.weigth": torch.zeros(4, 2)}, "Did you mean 'model.weight'?"),
        ({"model.weight": torch.zeros(2, 4)}, r"float32 \[4, 2\], but this run's is float32 \[2, 4\]"),
        ({"model.weight": torch.zeros(4, 2, dtype=torch.bfloat16)}, r"float32 \[4, 2\], but this run's is bfloat16"),
    ],
)
def test_another_set_of_tensors_is_refused_and_named(tmp_path: Path, into: dict[str, torch.Tensor], said: str) -> None:
    directory = save(tmp_path, 1, whole({"model.weight": torch.ones(4, 2)}), {}, keep=1)
    with pytest.raises(UserError, match=said) as caught:
        load(directory, whole(into))
    assert str(directory) in str(caught.value)
    assert "\n" not in str(caught.value)
    assert all(not tensor.any() for tensor in into.values())


def test_a_newer_version_is_refused_and_not_taken_for_damage(tmp_path: Path) -> None:
    manifest = CheckpointManifest(step=1, state={}, files={}, tensors={})
    object.__setattr__(manifest, "version", VERSION + 1)
    (tmp_path / MANIFEST).write_bytes(manifest.to_bytes())
    with pytest.raises(UserError, match="version 2") as caught:
        read_manifest(tmp_path)
    assert not isinstance(caught.value, DamagedCheckpoint)


def test_what_is_no_checkpoint_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such checkpoint"):
        read_manifest(tmp_path / "missing")
    with pytest.raises(DamagedCheckpoint, match="is missing"):
        read_manifest(tmp_path)


# Tensors in boxes: what the ranks of a layout write, and others read


def write_with_the_library(
    directory: Path, tensors: dict[str, torch.Tensor], boxes: dict[str, list[tuple[str, Region]]]
) -> None:
    """A checkpoint of the given (file, region) boxes."""
    files: dict[str, dict[str, torch.Tensor]] = {}
    for name, parts in boxes.items():
        for file, region in parts:
            files.setdefault(file, {})[f"{name}@{region.offset}"] = part(tensors[name], region).contiguous()
    manifest: dict[str, Any] = {"step": 1, "state": {}, "files": {}, "tensors": {}}
    contents, starts = {}, {}
    for file, pieces in files.items():
        save_file(pieces, directory / file)
        content = contents[file] = (directory / file).read_bytes()
        header = 8 + int.from_bytes(content[:8], "little")
        for key, entry in json.loads(content[8:header]).items():
            starts[file, key] = tuple(header + offset for offset in entry["data_offsets"])
        checksum = xxhash.xxh3_128_hexdigest(content[:header])
        manifest["files"][file] = {"size": len(content), "header": header, "checksum": checksum}
    for name, parts in boxes.items():
        record = manifest["tensors"][name] = {"shape": tuple(tensors[name].shape), "boxes": []}
        record["dtype"] = str(tensors[name].dtype).removeprefix("torch.")
        for file, region in parts:
            start, end = starts[file, f"{name}@{region.offset}"]
            checksum = xxhash.xxh3_128_hexdigest(contents[file][start:end])
            place = {"file": file, "start": start, "checksum": checksum}
            record["boxes"].append({"offset": region.offset, "size": region.size} | place)
    (directory / MANIFEST).write_bytes(CheckpointManifest.model_validate(manifest).to_bytes())


@settings(deadline=None, max_examples=60)
@given(st.data())
def test_boxes_over_several_files_come_together(data: st.DataObject) -> None:
    tensors, boxes = {}, {}
    for name in ("a", "b"):
        shape = data.draw(shapes())
        regions = [region for region in data.draw(cuts(shape)) if region.volume]
        tensors[name] = random_tensor(shape, data.draw(st.sampled_from(["float32", "bfloat16", "bool"])), len(regions))
        boxes[name] = [(f"rank-{data.draw(st.integers(0, 2)):05d}.safetensors", region) for region in regions]
    with tempfile.TemporaryDirectory() as folder:
        write_with_the_library(Path(folder), tensors, boxes)
        into = zeros_like(tensors)
        turned = tuple(reversed(range(tensors["a"].dim())))
        into["a"] = into["a"].permute(turned).contiguous().permute(turned)
        load(Path(folder), whole(into))
        assert {n: bits(t) for n, t in into.items()} == {n: bits(t) for n, t in tensors.items()}


@settings(deadline=None, max_examples=100)
@given(st.data(), st.sampled_from([8, 16, 1 << 20]))
def test_what_is_saved_in_any_shards_is_loaded_into_any_others(data: st.DataObject, box_bytes: int) -> None:
    shape = data.draw(shapes())
    tensor = random_tensor(shape, data.draw(st.sampled_from(["float64", "bfloat16", "bool"])), 5)
    saved = data.draw(shards_of(tensor))
    copies = [replace(data.draw(st.sampled_from(saved)), primary=False, tensor=torch.zeros(shape)) for _ in range(2)]
    into = [replace(shard, tensor=torch.zeros_like(shard.tensor)) for shard in data.draw(shards_of(tensor))]
    into.append(replace(into[0], tensor=torch.zeros_like(into[0].tensor)))
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patched:
        patched.setattr("megalm.checkpoint.shard.BOX_BYTES", (box_bytes, box_bytes))
        directory = save(Path(folder), 1, [*saved, *copies], {}, keep=1)
        boxes = read_manifest(directory).tensors["x"].boxes
        load(directory, into)
    width = tensor.element_size()
    assert all(box.region.volume * width <= max(box_bytes, width) for box in boxes)
    for shard in into:
        assert bits(shard.data) == bits(part(tensor, shard.region))
        shard.data.zero_()
        assert not shard.tensor.any()  # the padding was left alone


def test_shards_that_do_not_make_up_a_tensor_are_not_committed(tmp_path: Path) -> None:
    shard = Shard("x", torch.ones(2), (4,), (0,), (2,))
    for shards in ([shard], [shard, replace(shard, offset=(1,)), replace(shard, offset=(2,))]):
        with pytest.raises(ValueError, match=r"gap|overlap"):
            save(tmp_path, 1, shards, {}, keep=1)
        assert not list(tmp_path.glob("*step*"))


@settings(max_examples=300)
@given(st.data())
def test_boxes_are_taken_for_a_tiling_if_and_only_if_they_hold_each_element_once(data: st.DataObject) -> None:
    shape = data.draw(shapes())
    regions = data.draw(cuts(shape)) if data.draw(st.booleans()) else []
    for _ in range(data.draw(st.integers(0, 3))):
        regions.append(data.draw(region_in(shape)))
    if regions and data.draw(st.booleans()):
        regions.remove(data.draw(st.sampled_from(regions)))
    counts = np.zeros(shape, int)
    for region in regions:
        counts[tuple(slice(o, o + n) for o, n in zip(region.offset, region.size, strict=True))] += 1
    boxes = [box(region.offset, region.size) for region in regions]
    try:
        TensorRecord.model_validate({"shape": shape, "dtype": "float32", "boxes": boxes})
        taken = True
    except ValidationError:
        taken = False
    assert taken == bool((counts == 1).all())


@settings(max_examples=300)
@given(st.data())
def test_the_intersection_of_two_regions_is_that_of_their_elements(data: st.DataObject) -> None:
    shape = data.draw(shapes())

    def elements(region: Region) -> np.ndarray:
        return numbers[tuple(slice(o, o + n) for o, n in zip(region.offset, region.size, strict=True))]

    numbers = np.arange(int(np.prod(shape))).reshape(shape)
    a, b = data.draw(region_in(shape)), data.draw(region_in(shape))
    common = a.intersection(b)
    expected = np.intersect1d(elements(a), elements(b))
    if common is None:
        assert len(expected) == 0
    else:
        for outer in (a, b):
            assert np.array_equal(np.sort(elements(outer)[common.within(outer)].ravel()), expected)
        assert common.volume == len(expected)


def box(offset: tuple[int, ...], size: tuple[int, ...], **other: Any) -> dict[str, Any]:
    return {"offset": offset, "size": size, "file": "f", "start": 8, "checksum": "0" * 32} | other


@pytest.mark.parametrize(
    ("boxes", "said"),
    [
        ([box((0, 0), (2, 2)), box((0, 3), (2, 1))], "gap"),
        ([box((0, 0), (2, 3)), box((0, 2), (2, 2))], "overlap"),
        ([box((0, 0), (2, 2)), box((0, 0), (2, 2))], "overlap"),
        ([box((1, 0), (2, 4))], "reaches out"),
        ([box((0,), (8,))], "number of dims"),
        ([], "gap"),
        ([box((0, 0), (2, 4), file="../f")], "pattern"),
        ([box((0, 0), (2, 4), file="/f")], "pattern"),
        ([box((0, 0), (2, 4), file="..")], "pattern"),
        ([box((0, 0), (2, 4), file="g")], "not inside a file"),
        ([box((0, 0), (2, 4), start=16)], "not inside a file"),
        ([box((0, 0), (2, 4), start=0)], "not inside a file"),
        ([box((0, 0), (2, 4), start=-8)], "greater than or equal to 0"),
    ],
)
def test_a_manifest_that_does_not_add_up_is_refused(tmp_path: Path, boxes: list[dict[str, Any]], said: str) -> None:
    fields = {
        "format": "megalm-checkpoint",
        "version": 1,
        "step": 1,
        "state": {},
        "files": {"f": {"size": 40, "header": 8, "checksum": "0" * 32}},
        "tensors": {"x": {"shape": (2, 4), "dtype": "float32", "boxes": boxes}},
    }
    (tmp_path / "f").write_bytes(bytes(40))
    body = json.dumps(fields).encode()[1:]
    (tmp_path / MANIFEST).write_bytes(b'{"checksum": "' + xxhash.xxh3_128_hexdigest(body).encode() + b'",\n' + body)
    with pytest.raises(DamagedCheckpoint, match=said):
        read_manifest(tmp_path)


def test_a_link_out_of_the_directory_is_refused(tmp_path: Path) -> None:
    directory = save(tmp_path, 1, whole({"x": torch.ones(2)}), {}, keep=1)
    shard = directory / "rank-00000.safetensors"
    shard.rename(tmp_path / "elsewhere")
    shard.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(DamagedCheckpoint, match="not a regular file"):
        read_manifest(directory)
