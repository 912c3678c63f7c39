"""Trimbit fits a language model to a budget.

After `import trimbit`, `transformers.AutoModelForCausalLM.from_pretrained` loads compressed directories.
"""

from trimbit.runtime.transformers import register as _register

__version__ = "0.1.0"

_register()
