"""Let a compressed model answer: python examples/generate.py DIR [PROMPT]."""

import sys

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import trimbit  # noqa: F401  teaches transformers to read a compressed directory

directory = sys.argv[1]
prompt = sys.argv[2] if len(sys.argv) > 2 else "Why is the sky blue?"

tokenizer = AutoTokenizer.from_pretrained(directory)
model = AutoModelForCausalLM.from_pretrained(directory).eval()
chat = [{"role": "user", "content": prompt}]
inputs = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
with torch.inference_mode():
    tokens = model.generate(**inputs, max_new_tokens=60, do_sample=False)
print(tokenizer.decode(tokens[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))
