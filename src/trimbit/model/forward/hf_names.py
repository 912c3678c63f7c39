"""What transformers calls a model's cache of keys and values, as an argument and in an output."""

from dataclasses import fields

from transformers.modeling_outputs import BaseModelOutputWithPast

OLD = "past_key_values"  # until 5.23
CACHE = "cache" if "cache" in {field.name for field in fields(BaseModelOutputWithPast)} else OLD
