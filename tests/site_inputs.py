"""Tokens, and the inputs that each weight reads of them in the plain transformers model."""

import torch

from tiny import VOCAB

TOKENS = torch.randint(3, VOCAB, (6, 20), generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def inputs(model, layout, embedded):
    """What each weight reads, in the plain model."""
    seen, handles = {}, []
    for weight in layout.weights.values():
        if weight.site != "embed":
            module = model.get_submodule("lm_head" if weight.site == "head_in" else weight.name)
            see = lambda _module, args, site=weight.site: seen.__setitem__(site, args[0].flatten(0, -2))  # noqa: E731
            handles.append(module.register_forward_pre_hook(see))
    model(inputs_embeds=embedded, use_cache=False)
    for handle in handles:
        handle.remove()
    return seen
