"""One file: hardware, models, loaders."""

from __future__ import annotations

from typing import Annotated

import msgspec

from stoker_sim.profiles.hardware import Hardware
from stoker_sim.profiles.loaders import LoaderProfile
from stoker_sim.profiles.models import ModelProfile
from stoker_sim.profiles.quantities import Part


class Profile(Part, frozen=True):
    hardware: Hardware
    models: Annotated[tuple[ModelProfile, ...], msgspec.Meta(min_length=1)]
    loaders: Annotated[tuple[LoaderProfile, ...], msgspec.Meta(min_length=1)]

    @property
    def models_by_name(self) -> dict[str, ModelProfile]:
        """Every single model."""
        return {name: kind for kind in self.models for name in kind.names}

    @property
    def loaders_by_name(self) -> dict[str, LoaderProfile]:
        return {loader.name: loader for loader in self.loaders}
