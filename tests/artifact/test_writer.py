"""The writer: all or nothing, and exactly the plan's tensors."""

import errno
import json

import pytest
import torch
from safetensors.torch import load_file

from plans import make_plan, random_plan, runs
from tiny import tiny_config
from trimbit.artifact import files
from trimbit.artifact import writer as writers
from trimbit.artifact.files import weight_nbytes
from trimbit.artifact.writer import appearing, copy_weights, write_file
from trimbit.errors import ArtifactError
from trimbit.model.build import build_layout
from trimbit.model.resolved import resolve
from trimbit.model.shards import shards
from trimbit.schema.plan import load_plan
from written import writing

LAYOUT = build_layout(tiny_config("llama"))
PLAN = random_plan(LAYOUT, 0)
DTYPES = {name: getattr(torch, kind.removeprefix("torch.")) for kind, name in writers.DTYPES.items()}


def tensors(plan=PLAN):
    return {
        name: torch.zeros(spec.shape, dtype=DTYPES[spec.dtype])
        for name, spec in resolve(plan, LAYOUT).tensors().items()
    }


def test_a_directory_appears_whole(tmp_path):
    out = tmp_path / "deep" / "out"
    with writing(out, LAYOUT, PLAN) as writer:
        for item in reversed(tensors().items()):  # in any order
            writer.add(dict([item]))
        write_file(writer.folder, "recipe.yaml", "a: 1\n")
        assert not out.exists()
    assert {file.name for file in out.iterdir()} == {"config.json", "model.safetensors", "plan.json", "recipe.yaml"}
    assert load_plan(out / "plan.json") == PLAN
    assert weight_nbytes(out) == resolve(PLAN, LAYOUT).file_nbytes
    config = json.loads((out / "config.json").read_text())
    assert (config["model_type"], config["base"]["model_type"], config["vocab_size"]) == ("trimbit", "llama", 96)
    assert [*tmp_path.iterdir(), *out.parent.iterdir()] == [out.parent, out]


def test_shards_have_an_index(tmp_path, monkeypatch):
    monkeypatch.setattr(writers, "shards", lambda specs: shards(specs, 10_000))
    with writing(tmp_path / "out", LAYOUT, PLAN) as writer:
        names = [*tensors()]
        writer.add(dict([*tensors().items()][:-1]))
        assert len([*writer.folder.glob("*.safetensors")]) == len(writer.files) - 1  # written as soon as complete
        writer.add({names[-1]: tensors()[names[-1]]})
    index = json.loads((tmp_path / "out/model.safetensors.index.json").read_text())
    files = sorted((tmp_path / "out").glob("*.safetensors"))
    assert len(files) > 2
    assert files[0].name == f"model-00001-of-{len(files):05d}.safetensors"
    assert index["weight_map"] == {name: file.name for file in files for name in load_file(file)}
    assert index["metadata"]["total_size"] == resolve(PLAN, LAYOUT).nbytes


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_nothing_is_left_after_an_error(tmp_path, error):
    def run():
        with writing(tmp_path / "out", LAYOUT, PLAN) as writer:
            writer.add(tensors())
            raise error

    with pytest.raises(error):
        run()
    assert not [*tmp_path.iterdir()]


def test_missing_tensors_leave_nothing(tmp_path):
    some = tensors()
    del some["model.norm.weight"]

    def run():
        with writing(tmp_path / "out", LAYOUT, PLAN) as writer:
            writer.add(some)

    with pytest.raises(ArtifactError, match="never written"):
        run()
    assert not [*tmp_path.iterdir()]


@pytest.mark.parametrize(
    ("name", "tensor"),
    [
        ("model.norm.weight", torch.zeros(47, dtype=torch.bfloat16)),
        ("model.norm.weight", torch.zeros(48, dtype=torch.float16)),
        ("model.norm.weight", torch.zeros(48)),
        ("model.other.weight", torch.zeros(48, dtype=torch.bfloat16)),
    ],
)
def test_a_tensor_that_is_not_the_plan_s_is_refused(tmp_path, name, tensor):
    with writing(tmp_path / "out", LAYOUT, PLAN) as writer:
        with pytest.raises(ArtifactError, match=f"tensor {name} is .*but the plan says"):
            writer.add({name: tensor})
        writer.add(tensors())


def test_an_output_that_exists_is_refused(tmp_path):
    full, file, empty = tmp_path / "full", tmp_path / "file", tmp_path / "empty"
    full.mkdir()
    empty.mkdir()
    (full / "x").touch()
    file.touch()
    for out in (full, file):
        with pytest.raises(ArtifactError, match="already exists"), appearing(out):
            pass
    with writing(empty, LAYOUT, PLAN) as writer:
        writer.add(tensors())
    assert weight_nbytes(empty)


def test_an_output_below_a_file_is_refused(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(ArtifactError, match="cannot write"), appearing(tmp_path / "file" / "out"):
        pass


@pytest.mark.parametrize(
    "where", ["trimbit.artifact.writer.save_file", "pathlib.Path.write_bytes", "pathlib.Path.rename"]
)
def test_a_full_disk_leaves_nothing(tmp_path, monkeypatch, where):
    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    def run():
        with writing(tmp_path / "out", LAYOUT, PLAN) as writer:
            writer.add(tensors())
            write_file(writer.folder, "recipe.yaml", "a: 1\n")

    monkeypatch.setattr(where, full)
    with pytest.raises(ArtifactError, match=r"cannot write .*out.*No space left on device"):
        run()
    assert not [*tmp_path.iterdir()]


def test_weights_are_copied_but_for_those_that_changed(tmp_path, monkeypatch):
    monkeypatch.setattr(writers, "shards", lambda specs: shards(specs, 10_000))
    with writing(tmp_path / "source", LAYOUT, PLAN) as writer:
        writer.add(tensors())
    norm = torch.ones(48, dtype=torch.bfloat16)
    with writing(tmp_path / "copy", LAYOUT, PLAN) as writer:
        copy_weights(tmp_path / "source", writer, {"model.norm.weight": norm})
    files = sorted((tmp_path / "source").glob("*.safetensors"))
    assert len(files) > 2
    changed = [file for file in files if file.read_bytes() != (tmp_path / "copy" / file.name).read_bytes()]
    assert ["model.norm.weight" in load_file(file) for file in changed] == [True]
    have = load_file(tmp_path / "copy" / changed[0].name)
    assert {name for name, tensor in have.items() if bool(tensor.any())} == {"model.norm.weight"}
    assert torch.equal(have["model.norm.weight"], norm)


def test_a_full_disk_while_weights_are_copied_leaves_nothing(tmp_path, monkeypatch):
    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    with writing(tmp_path / "source", LAYOUT, PLAN) as writer:
        writer.add(tensors())

    def run():
        with writing(tmp_path / "out", LAYOUT, PLAN) as writer:
            copy_weights(tmp_path / "source", writer)

    monkeypatch.setattr("shutil.copyfile", full)
    with pytest.raises(ArtifactError, match=r"cannot write .*out.*No space left on device"):
        run()
    assert [*tmp_path.iterdir()] == [tmp_path / "source"]


def test_the_structure_has_no_index_lists(tmp_path):
    plan = make_plan(LAYOUT, lambda _, cols: runs((cols, "int4row")), {"blocks.0.mlp.mid": (7, 3)})
    fields = files.config_fields(LAYOUT.config, resolve(plan, LAYOUT).structure)
    assert fields["structure"]["widths"] == {"blocks.0.mlp.mid": 2}
    assert fields["structure"]["weights"]["lm_head"] == [{"count": 48, "precision": "int4row"}]
    assert fields["eos_token_id"] == 2
