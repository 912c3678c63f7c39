"""The format of keys and values in plans."""

import json

import pytest
from pydantic import ValidationError

from kv_caches import KV4
from plans import make_plan
from tiny import tiny_config
from trimbit.model.build import build_layout
from trimbit.schema.kv_cache import KVPrecision
from trimbit.schema.plan import Plan


@pytest.mark.parametrize(
    "fields",
    [{"bits": 1}, {"bits": 9}, {"group": 0}, {"sink_tokens": -1}, {"recent_tokens": -1}, {"bits": "4"}, {"b": 4}],
)
def test_what_is_no_precision_is_refused(fields):
    with pytest.raises(ValidationError):
        KVPrecision.model_validate(fields)


def test_plans_from_before_it_load():
    plan = make_plan(build_layout(tiny_config("llama")))
    fields = json.loads(plan.model_dump_json())
    assert fields.pop("kv_cache") is None
    assert Plan.model_validate_json(json.dumps(fields)) == plan
    packed = plan.model_copy(update={"kv_cache": KV4})
    assert Plan.model_validate_json(packed.model_dump_json()) == packed
