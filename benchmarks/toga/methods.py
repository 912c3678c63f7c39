"""Settings, and the methods compared in each: recipes with overrides."""

Method = tuple[str, tuple[str, ...]]  # a recipe and its overrides

NEAREST = "quant={name: rtn, params: {scales: mse}}"
ALONE = ("search.share=0.0", "search.sort=false")
W3A3 = ("search.low=int3g128", "search.low_acts={bits: 3, group: 128, clip: 0.9}")
SETTINGS: dict[str, tuple[str, str, dict[str, Method]]] = {  # by diag H, with learnt masks, other methods
    "W3.2A3.2": (
        "atom-w3.2a3.2",
        "toga-q-w3.2a3.2",
        {
            "learnt, channel by channel": ("toga-q-w3.2a3.2", ("search.whole_tiles=false",)),
            "QuaRot, W3A3": ("quarot-w4a4", W3A3),
        },
    ),
    "W1.6A16": ("salient-w1.6a16", "toga-q-w1.6a16", {"PTQ1.61's layout": ("ptq161-w1.6a16", ())}),
    "W2A16": (
        "salient-w2a16",
        "toga-q-w2a16",
        {"SliM": ("slim-w2a16", ()), "GPTQ, INT2": ("gptq-w2a16", ()), "RTN, INT2": ("rtn-w2a16", ())},
    ),
    "W3A16": (
        "salient-w3a16",
        "toga-q-w3a16",
        {"SliM": ("slim-w3a16", ()), "GPTQ, INT3": ("gptq-w3a16", ()), "RTN, INT3": ("rtn-w3a16", ())},
    ),
    "W4A4": (
        "atom-w4a4",
        "toga-q-w4a4",
        {"RTN, diag H, not sorted": ("atom-w4a4", (NEAREST, "search.sort=false")), "QuaRot": ("quarot-w4a4", ())},
    ),
}
WITH_ALL = ("W3.2A3.2", "W1.6A16", "W2A16")  # settings that also try random channels, and shares by measured KL
WITH_KV4 = ("diag H", "learnt")  # methods that are also tried with a KV cache in 4 bits
LEARNT = ("learnt", "RTN, learnt")
SHORTER = ("search.steps=100",)


def methods(setting: str) -> dict[str, Method]:
    """The recipe and overrides of each method in a setting."""
    salient, learnt, more = SETTINGS[setting]
    steps = () if setting in WITH_ALL else SHORTER
    others: dict[str, Method] = {
        "random": (salient, ("search.by=random",)),
        "shares by measured KL": (salient, ("search.name=shares",)),
    }
    return {
        "low format alone": (salient, ALONE),
        "RTN, low format alone": (salient, (NEAREST, *ALONE)),
        "RTN, diag H": (salient, (NEAREST,)),
        "diag H": (salient, ()),
        **(others if setting in WITH_ALL else {}),
        "learnt": (learnt, steps),
        "RTN, learnt": (learnt, (NEAREST, *steps)),
        **more,
    }
