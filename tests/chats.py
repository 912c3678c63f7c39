"""A tokenizer of words, with a chat template if wanted."""

from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

BOS, EOS, END, USER, ASSISTANT = range(5)


VOCAB = {"<s>": 0, "</s>": 1, "<end>": 2, "<user>": 3, "<assistant>": 4}


VOCAB |= {f"w{i}": i for i in range(5, 40)}


TEMPLATE = (
    "{% for m in messages %}<s> <user> {{ m['content'] }} <end>{% endfor %}"
    "{% if add_generation_prompt %} <assistant>{% endif %}"
)


def make_tokenizer(*, chat: bool = False, add_bos: bool = False) -> PreTrainedTokenizerFast:
    core = Tokenizer(WordLevel(VOCAB, unk_token="w5"))
    core.pre_tokenizer = WhitespaceSplit()
    if add_bos:
        core.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", BOS)])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<s>", eos_token="</s>", model_max_length=16)
    tokenizer.chat_template = TEMPLATE if chat else None
    return tokenizer
