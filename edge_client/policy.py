"""One client's modules on a model that it shares with others: put there, taken away, begun."""

from __future__ import annotations

from pathlib import Path

from device_profiles.errors import InputError
from device_profiles.modules import first_lora_sites, initial_adapters, initial_lora
from edge_client.costs import own_layout
from edge_client.peft.build import Tunable
from edge_client.state import ClientState
from messaging.layout import Layout, Tensors, Vector
from messaging.protocol import DeviceRecord


class Policy:
    """The language model of one client: a base that is lent to it, and its own modules.

    Args:
        model: Lent for one piece of work at a time.
        device: Whose modules they are.
        layout: The tensors that the run shares.
        folder: Where the client's state is, for what an error says.
    """

    def __init__(self, model: Tunable, device: DeviceRecord, layout: Layout, folder: Path) -> None:
        self.model = model
        self.device = device
        self.layout = own_layout(layout, device.lora_count)
        self._folder = folder

    def initial(self, lora_rank: int, adapter_size: int, seed: int) -> ClientState:
        """Return the state of a client that has not trained yet."""
        shape = self.model.base.identity.shape
        tensors: Tensors = {}
        if self.device.lora_count:
            sites = first_lora_sites(shape, self.device.placement, self.device.lora_count)
            tensors = initial_lora(sites, lora_rank, seed)
        if self.device.adapter_count:
            tensors |= initial_adapters(shape, adapter_size, seed)
        return ClientState(round=0, personal=self.personal(tensors))

    def personal(self, tensors: Tensors) -> Tensors:
        """Return those that never leave the device."""
        return {n: t for n, t in tensors.items() if n not in self.layout.names}

    def shared(self, tensors: Tensors) -> Vector:
        """Return those that travel, packed. Shape (layout size,)."""
        return self.layout.pack({n: t for n, t in tensors.items() if n in self.layout.names})

    def install(self, state: ClientState, shared: Vector | None) -> None:
        """Put every tensor that trains on the model: what another client left there is gone.

        Raises:
            InputError: If the state is of other modules than the device's.
        """
        self.model.activate(self.device.lora_count)
        tensors = dict(state.personal)
        if shared is not None:
            tensors |= self.layout.unpack(shared[: self.layout.size])
        wanted = {n: tuple(p.shape) for n, p in self.model.trainable().items()}
        moments = state.first_moments or tensors  # where LoRA is shared they alone tell its count
        if any({n: t.shape for n, t in kept.items()} != wanted for kept in (tensors, moments)):
            raise InputError(
                f"the state of '{self.device.id}' in {self._folder} is of other LoRA modules "
                f"than lora_count = {self.device.lora_count} of rank {self.device.lora_rank}; give "
                "the device the settings it began with, or another folder to begin anew"
            )
        self.model.put(tensors)
