"""`scd convert autoencoder`: FAR's published deep-compression weights as an autoencoder's folder.

FAR's autoencoders are copies of diffusers' AutoencoderDC, with the same names of weights, and are
published as bare state dicts: what is missing is the settings, which the names and shapes tell, and
the scale. Source of the layout: paper, section 8, and FAR's settings.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from scd.autoencoders.deep_compression import FAR_SCALE, settings_of
from scd.autoencoders.diffusers import new_network, save_network
from scd.common.files import refuse_used, written_aside
from scd.common.weights import read_state_dict
from scd.models.pretrained import check_state


@dataclass(frozen=True, kw_only=True)
class ConvertAutoencoderConfig:
    """One state dict of an autoencoder."""

    file: str = ""
    """State dict of FAR's deep-compression autoencoder: .pth or .safetensors."""
    out: str = ""
    """Folder to write, as diffusers and `scd encode` read it; it must not exist, or be empty."""
    scale: float = FAR_SCALE
    """What its latents are multiplied by to be of unit scale; FAR does so for every collection."""
    key: str = ""
    """Name of the state dict inside the file, where it lies in a dictionary."""

    def __post_init__(self) -> None:
        if not 0 < self.scale < float("inf"):
            raise ValueError(f"scale must be above 0, got {self.scale}")


def convert_autoencoder(config: ConvertAutoencoderConfig) -> Path:
    """Write the folder of an autoencoder.

    Raises:
        FileNotFoundError: there is no such file.
        FileExistsError: `out` holds something.
        ValueError: the file is damaged, weights are missing or unknown or of another shape, or
            diffusers is not installed.
    """
    if not config.file or not config.out:
        raise ValueError("scd convert autoencoder needs a state dict and --out")
    folder = Path(config.out)
    refuse_used(folder)
    state = read_state_dict(config.file, config.key)
    network = new_network(settings_of(state, config.scale))
    check_state(network, state, config.file)
    network.load_state_dict(state)
    with written_aside(folder) as aside:
        save_network(network, aside)
    return folder
