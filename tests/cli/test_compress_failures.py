"""Full disks, broken caches and signals: one line on stderr, and nothing is left behind."""

import signal
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError

from commands import compress
from trimbit.artifact import writer as writers
from trimbit.pipeline import applying


def test_h_that_is_not_positive_definite(refused, job, options, tmp_path):
    """64 tokens cannot tell 80 channels apart."""
    few = ["quant.damping=0", "calibration.rows=4", "calibration.length=16"]
    sets = [part for one in few for part in ("--set", one)]
    error = refused(
        *compress(job.model, tmp_path / "out", options, *sets), words=["not positive definite", "damping 0"]
    )
    assert "a damping of" in error
    assert "model.layers." in error


@pytest.fixture
def untried(tmp_path_factory, monkeypatch):
    """A cache in which nothing was tried yet, and in which a trial that breaks off is no finished entry."""
    cache = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("TRIMBIT_CACHE", str(cache))
    yield
    assert list(cache.glob("partial/applied/*"))
    assert not list(cache.glob("applied/*"))


@pytest.fixture
def tried(run, job, options, tmp_path_factory):
    """The cache of the test run, in which the job's plans were tried."""
    run(*compress(job.model, tmp_path_factory.mktemp("tried") / "out", options))


@pytest.mark.usefixtures("tried")
@pytest.mark.parametrize("step", ["shutil.copyfile", "trimbit.pipeline.writing.model_card"])
def test_no_space_left_or_interrupted_while_the_output_is_filled(refused, job, options, tmp_path, monkeypatch, step):
    def full(*_args, **_kwargs):
        raise OSError(28, "No space left on device")

    def stop(*_args, **_kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(step, stop)
    refused(*compress(job.model, tmp_path / "out", options), words=["interrupted"], code=130)
    monkeypatch.setattr(step, full)
    refused(*compress(job.model, tmp_path / "out", options), words=["No space left on device"])


@pytest.mark.usefixtures("untried")
def test_a_gpu_without_memory_left_is_said(refused, job, options, tmp_path, monkeypatch):
    def full(*_args, **_kwargs):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.\nSee more")

    monkeypatch.setattr(applying, "apply_plan", full)
    words = ["trimbit: CUDA out of memory. Tried to allocate 20.00 GiB. Finished stages are kept"]
    refused(*compress(job.model, tmp_path / "out", options), words=words)


@pytest.mark.usefixtures("untried")
def test_no_space_left(refused, job, options, tmp_path, monkeypatch):
    def full(*_args, **_kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(writers, "save_file", full)
    refused(*compress(job.model, tmp_path / "out", options), words=["cannot write", "No space left on device"])


@pytest.mark.parametrize("module", ["calibrate.stats", "jobs.checked"])
def test_no_space_left_for_the_cache(refused, job, options, tmp_path, monkeypatch, module):
    def full(_tensors, path, *_args):
        Path(path).write_bytes(b"half of it")
        raise OSError(28, "No space left on device")

    cache = tmp_path / "cache"
    cache.mkdir()
    monkeypatch.setenv("TRIMBIT_CACHE", str(cache))
    monkeypatch.setattr(f"trimbit.{module}.save_file", full)
    refused(*compress(job.model, tmp_path / "out", options), words=["No space left on device"])
    assert not list(cache.rglob("*.tmp"))


def test_a_cache_that_safetensors_cannot_write(refused, job, options, tmp_path, monkeypatch):
    def full(*_args, **_kwargs):
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    cache = tmp_path / "cache"
    monkeypatch.setenv("TRIMBIT_CACHE", str(cache))
    cache.mkdir()
    with monkeypatch.context() as patched:
        patched.setattr("trimbit.calibrate.stats.save_file", full)
        refused(*compress(job.model, tmp_path / "out", options), words=[str(cache), "No space left", "free space"])
    with monkeypatch.context() as patched:
        patched.setattr(applying, "apply_plan", full)
        refused(*compress(job.model, tmp_path / "out", options), words=[])


@pytest.mark.usefixtures("untried")
def test_interrupted(refused, job, options, tmp_path, monkeypatch):
    def stop(_stream, _plan, _tokens, _method, _repair, _stats, writer, *_):
        assert writer.folder.is_dir()
        raise KeyboardInterrupt

    monkeypatch.setattr(applying, "apply_plan", stop)
    refused(*compress(job.model, tmp_path / "out", options), words=["interrupted", "reused"], code=130)


@pytest.mark.usefixtures("untried")
def test_terminated(refused, job, options, tmp_path, monkeypatch):
    monkeypatch.setattr(applying, "apply_plan", lambda *_: signal.raise_signal(signal.SIGTERM))
    refused(*compress(job.model, tmp_path / "out", options), words=["interrupted"], code=130)
