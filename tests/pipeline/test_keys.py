"""Keys name what results depend on; a change of the code is not forgotten in their version."""

import json

import pytest

from sessions import session
from stage_code import CODE, SNAPSHOT, current, stages
from trimbit.pipeline.prepare import moments_key


def test_every_stage_is_in_the_snapshot():
    assert stages().keys() == CODE.keys() == json.loads(SNAPSHOT.read_text()).keys()


@pytest.mark.parametrize("stage", sorted(CODE))
def test_a_change_of_the_code_raises_the_version_or_is_said_to_change_nothing(stage):
    known, now = json.loads(SNAPSHOT.read_text())[stage], current()[stage]
    assert now == known, (
        f"the code of stage {stage!r} was changed: if its results change, raise `version` in pipeline/keys.py; "
        "then run `PYTHONPATH=benchmarks python tests/stage_code.py`"
    )


def test_sampled_text_depends_on_the_tokenizer(job, tmp_path):
    """Its chat template decides what is sampled."""
    opened = [session(job, calibration="self", cache=tmp_path) for _ in range(2)]
    first = opened[0].text.fit.digest
    tokenizer = opened[1].checkpoint.tokenizer()
    tokenizer.chat_template = "{% for m in messages %}w7 {{ m.content }} w8{% endfor %}"
    object.__setattr__(opened[1].job.checkpoint, "tokenizer", lambda: tokenizer)
    assert opened[1].text.fit.digest != first
    assert len(list((tmp_path / "text").iterdir())) == 2


def test_moments_depend_on_text_and_compute(job):
    made = [session(job), session(job, seed=1), session(job, "compute=float32"), session(job, "measure.rows=1")]
    digests = [moments_key(one.job, one.text).digest for one in made]
    assert len(set(digests)) == 3
    assert digests[0] == digests[3]
