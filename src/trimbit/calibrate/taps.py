"""Capture the inputs of modules while a block runs."""

from collections.abc import Callable, Mapping

from torch import Tensor, nn


class StopForwardError(Exception):
    """Ends a block's forward pass once the requested site has been seen."""


class Tap:
    """Captures the inputs of modules while a block runs: `with Tap({"o_in": module}) as seen: ...; seen["o_in"]`."""

    def __init__(self, modules: Mapping[str, nn.Module], *, stop_at: str | None = None) -> None:
        self.modules = modules
        self.stop_at = stop_at
        self.seen: dict[str, Tensor] = {}

    def __enter__(self) -> dict[str, Tensor]:
        self.handles = [m.register_forward_pre_hook(self._hook(site)) for site, m in self.modules.items()]
        return self.seen

    def _hook(self, site: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def see(_module: nn.Module, args: tuple[Tensor, ...]) -> None:
            self.seen[site] = args[0].detach().flatten(0, -2)
            if site == self.stop_at:
                raise StopForwardError

        return see

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> bool:
        for handle in self.handles:
            handle.remove()
        return kind is StopForwardError
