"""The name of the KV cache in transformers, both as an argument of a model and in its output."""

from dataclasses import fields

from transformers.modeling_outputs import BaseModelOutputWithPast

OLD = "past_key_values"  # name until transformers 5.23
CACHE = "cache" if "cache" in {field.name for field in fields(BaseModelOutputWithPast)} else OLD
